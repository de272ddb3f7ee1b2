/** What `restore` and `convert` share: writing a restore point into an image, and saying what was written. */
import type { Context } from '../base/index.ts'
import type { CopyResult } from '../chain/index.ts'
import type { BlockDevice } from '../device/index.ts'
import { RangeSet } from '../extents/index.ts'
import type { Region } from '../inuse/index.ts'
import { type Output, printable } from './output.ts'
import { formatBytes, formatSeconds } from './units.ts'
import { usageError } from './verb.ts'

export interface WriteOptions extends Context {
  readonly format: string
  readonly force?: boolean | undefined
  readonly settings?: Readonly<Record<string, string | number | boolean>> | undefined
  /** What to copy; the rest reads as zeros. Default: everything. */
  readonly inUse?: RangeSet | undefined
}

/** `--json` of restore and convert; docs/cli.md. */
export interface WrittenImage extends CopyResult {
  readonly path: string
  readonly format: string
  readonly virtualSize: number
  readonly seconds: number
  /** Verdicts, where only what is in use was copied. */
  readonly regions?: readonly Region[]
}

/** Writes a device that is no chain (a restore point) as the image `path`: whole and durable, or not there. */
export async function writePoint(
  source: BlockDevice,
  path: string,
  options: WriteOptions,
): Promise<CopyResult> {
  const { copyDevice, createImage } = await import('../chain/index.ts')
  const { signal, progress, format, force, settings, inUse } = options
  return await createImage(
    path,
    { signal, format, virtualSize: source.size, force, settings },
    async ({ target, isZero }) => {
      const ranges = inUse ?? RangeSet.of(0, source.size)
      if (!isZero) {
        // Nothing of what stood on a block device may shine through.
        for (const { start, end } of ranges.complement(0, source.size)) {
          await target.zero(start, end - start, signal)
        }
      }
      return await copyDevice(source, target, {
        signal,
        progress,
        ranges,
        targetIsZero: isZero,
        detectZeroes: true,
      })
    },
  )
}

/** `--set NAME=VALUE`, several times. Numbers and true/false are taken as such. */
export function collectSettings(
  text: string,
  before: Readonly<Record<string, string | number | boolean>> = {},
): Readonly<Record<string, string | number | boolean>> {
  const at = text.indexOf('=')
  if (at <= 0) throw usageError(`Cannot use setting '${text}': expected NAME=VALUE`)
  const value = text.slice(at + 1)
  const typed = /^[0-9]{1,15}$/.test(value)
    ? Number(value)
    : value === 'true'
      ? true
      : value === 'false'
        ? false
        : value
  return { ...before, [text.slice(0, at)]: typed }
}

export function writtenText(done: WrittenImage, source: string, output: Output): string[] {
  const rate = done.seconds > 0 ? `, ${formatBytes(Math.round(done.copiedBytes / done.seconds))}/s` : ''
  const row = (name: string, size: number, note: string): string =>
    `  ${name.padEnd(8)} ${formatBytes(size).padStart(9)}  ${output.style('dim', note)}`.trimEnd()
  const lines = [
    `${output.style('green', '✓')} ${output.style('bold', printable(done.path))}  ${output.style('dim', `${done.format}, ${formatBytes(done.virtualSize)}, from ${printable(source)}`)}`,
    row('written', done.copiedBytes, `in ${formatSeconds(done.seconds)}${rate}`),
    row('zeros', done.zeroBytes, 'left out'),
  ]
  if (done.skippedBytes > 0) lines.push(row('skipped', done.skippedBytes, 'no file system uses it'))
  return lines
}
