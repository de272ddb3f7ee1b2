/**
 * Named places between two steps of a backup at which a test lets the process die (SIGKILL), to prove that what is
 * on the disk then is a sound repository. `VARVE_CRASH_AT=name` dies there the first time, `name:3` the third time.
 */

export const CRASH_POINTS = [
  /** The pack's temporary file is there and empty. */
  'pack-created',
  /** All of a pack is written, not synced. */
  'pack-written',
  /** A pack is synced, still under its temporary name. */
  'pack-synced',
  /** A pack has its name; its folder is not synced. */
  'pack-renamed',
  /** A pack is durable; the index does not know it. */
  'pack-durable',
  /** The index knows a pack. */
  'pack-indexed',
  /** Every data pack is durable; the metadata packs have temporary names. */
  'data-durable',
  /** Data and metadata are durable; there is no manifest. */
  'metadata-durable',
  /** The manifest is written and synced under its temporary name. */
  'manifest-synced',
  /** The manifest has its name; its folder is not synced. */
  'manifest-renamed',
  /** The point is durable; the writer is still registered. */
  'manifest-durable',
] as const

export type CrashPoint = (typeof CRASH_POINTS)[number]

const wanted = parse(process.env['VARVE_CRASH_AT'])

export function crashPoint(name: CrashPoint): void {
  if (wanted?.name !== name || --wanted.left > 0) return
  process.kill(process.pid, 'SIGKILL')
  // The signal may take its time; nothing after this line may happen.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)
}

function parse(text: string | undefined): { readonly name: string; left: number } | undefined {
  if (text === undefined) return undefined
  const [name = '', count = '1'] = text.split(':')
  return { name, left: Number(count) }
}
