/** For tests: qcow2 images made and judged by qemu-img and qemu-io. */
import assert from 'node:assert/strict'
import { allExtents, type BlockDevice, openHostFile, readBytes } from '../../src/device/index.ts'
import type { Extent } from '../../src/extents/index.ts'
import { must, type Random, run } from './index.ts'

export interface QemuImage {
  readonly path: string
  readonly bytes: number
  /** `-o` options of qemu-img create. */
  readonly options?: string
  readonly backing?: string
}

export async function create(image: QemuImage): Promise<void> {
  await must('qemu-img', [
    'create',
    '-q',
    '-f',
    'qcow2',
    ...(image.options ? ['-o', image.options] : []),
    ...(image.backing ? ['-b', image.backing, '-F', 'qcow2'] : []),
    image.path,
    String(image.bytes),
  ])
}

/** Runs qemu-io commands in one process; what came of them is for the caller to compare. Discards reach the image. */
export async function io(path: string, commands: readonly string[]): Promise<void> {
  const result = await run('qemu-io', [
    '-f',
    'qcow2',
    '-d',
    'unmap',
    ...commands.flatMap((command) => ['-c', command]),
    path,
  ])
  // A compressed write onto an allocated cluster is refused by QEMU ("write failed"): that is no failure here.
  const said = result.stdout.toString() + result.stderr
  assert.ok(!/can't open|Could not open|invalid/i.test(said), `qemu-io: ${said}`)
}

/** Random writes, zero writes, discards and (whole clusters) compressed writes; multiples of 512. */
export function randomCommands(
  random: Random,
  image: { bytes: number; clusterBytes: number; count: number; compressed?: boolean; zeros?: boolean },
): string[] {
  const commands: string[] = []
  // First, because QEMU 7.2 packs into clusters that it has freed when an overwrite comes between two of them.
  const compressed: string[] = []
  for (let i = 0; i < image.count; i++) {
    const most = Math.min(image.bytes, image.clusterBytes * 4)
    const offset = random.below(Math.floor(image.bytes / 512)) * 512
    const length = Math.min(image.bytes - offset, (1 + random.below(most / 512)) * 512)
    const dice = random.next()
    const byte = 1 + random.below(255)
    if (image.compressed && dice < 0.4) {
      const at = offset - (offset % image.clusterBytes)
      const whole = Math.min(image.clusterBytes, image.bytes - at)
      if (whole === image.clusterBytes) compressed.push(`write -c -P ${byte} ${at} ${whole}`)
    } else if (image.zeros !== false && dice < 0.5) commands.push(`write -z ${offset} ${length}`)
    else if (image.zeros !== false && dice < 0.6) commands.push(`write -z -u ${offset} ${length}`)
    else if (image.zeros !== false && dice < 0.65) commands.push(`discard ${offset} ${length}`)
    else commands.push(`write -P ${byte} ${offset} ${length}`)
  }
  return [...compressed, ...commands]
}

/** What qemu-img reads from the image, whole chain, as bytes. */
export async function qemuBytes(path: string, scratch: string): Promise<Uint8Array> {
  await must('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', path, scratch])
  await using file = await openHostFile(scratch)
  return await readBytes(file, 0, file.size)
}

interface MapEntry {
  readonly start: number
  readonly length: number
  readonly present: boolean
  readonly zero: boolean
  readonly data: boolean
  readonly offset?: number
}

/** The image's own extents as qemu-img sees them; the image must have no backing file. */
export async function qemuExtents(path: string): Promise<string[]> {
  const map = JSON.parse(await must('qemu-img', ['map', '--output=json', '-f', 'qcow2', path])) as MapEntry[]
  return join(
    map.map((entry) => ({
      offset: entry.start,
      length: entry.length,
      kind: !entry.present ? 'absent' : entry.data ? 'data' : 'zero',
      place: entry.data ? entry.offset : undefined,
    })),
  )
}

export async function ownExtents(device: BlockDevice): Promise<string[]> {
  const list: Extent[] = []
  if (device.size > 0) for await (const extent of allExtents(device)) list.push(extent)
  return join(list.map(({ offset, length, kind, at }) => ({ offset, length, kind, place: at?.offset })))
}

interface Line {
  offset: number
  length: number
  kind: string
  place: number | undefined
}

function join(list: readonly Line[]): string[] {
  const out: Line[] = []
  for (const line of list) {
    const last = out.at(-1)
    const runsOn =
      last &&
      last.kind === line.kind &&
      (last.place === undefined ? line.place === undefined : last.place + last.length === line.place)
    if (runsOn) last.length += line.length
    else out.push({ ...line })
  }
  return out.map((line) => `${line.kind} ${line.offset}+${line.length} @${line.place ?? '-'}`)
}

/** `qemu-img check` finds nothing: no errors, no leaks. */
export async function assertClean(path: string): Promise<void> {
  const result = await run('qemu-img', ['check', '-f', 'qcow2', path])
  assert.equal(result.code, 0, `qemu-img check: ${result.stdout.toString()}${result.stderr}`)
}

export function assertBytes(found: Uint8Array, expected: Uint8Array, what: string): void {
  assert.equal(found.length, expected.length, `${what}: size`)
  if (Buffer.compare(found, expected) === 0) return
  const at = found.findIndex((byte, index) => byte !== expected[index])
  assert.fail(`${what}: differs first at ${at}: found ${found[at]}, expected ${expected[at]}`)
}
