/** Disks for the tests of the repository: random content, random ranges in use, and what a restore of them must give. */
import type { BackupSource, PointDevice } from '../../src/backup/index.ts'
import { MemoryDevice } from '../../src/device/index.ts'
import { RangeSet } from '../../src/extents/index.ts'
import type { Random } from './index.ts'

export interface TestDisk {
  readonly bytes: Uint8Array
  readonly inUse: RangeSet
}

/** Runs of zeros, noise, and text that compresses, of any length; ranges in use at sectors. */
export function randomDisk(random: Random, size: number): TestDisk {
  const bytes = new Uint8Array(size)
  for (let at = 0; at < size; ) {
    const length = Math.min(size - at, 1 + random.below(random.below(4) === 0 ? 2_000_000 : 60_000))
    fillRun(random, bytes.subarray(at, at + length))
    at += length
  }
  const ranges: { start: number; end: number }[] = []
  for (let at = random.below(100_000); at < size; ) {
    const start = at - (at % 512)
    const length = 512 * (1 + random.below(random.below(3) === 0 ? 4000 : 100))
    ranges.push({ start, end: Math.min(size, start + length) })
    at = start + length + random.below(random.below(3) === 0 ? 1_500_000 : 20_000)
  }
  return { bytes, inUse: RangeSet.from(ranges) }
}

function fillRun(random: Random, run: Uint8Array): void {
  const kind = random.below(4)
  if (kind === 0) return
  let state = random.below(2 ** 31)
  for (let i = 0; i < run.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    run[i] = kind === 1 ? state >>> 24 : kind === 2 ? 65 + ((state >>> 28) % 7) : 0x5a
  }
}

/** What a restore gives: the disk with zeros where nothing was in use. */
export function kept(disk: TestDisk): Uint8Array {
  const out = new Uint8Array(disk.bytes.length)
  for (const { start, end } of disk.inUse) out.set(disk.bytes.subarray(start, end), start)
  return out
}

export function sourceOf(name: string, disk: TestDisk): BackupSource {
  return { disk: name, device: new MemoryDevice(disk.bytes), inUse: disk.inUse }
}

export async function contentOf(point: PointDevice): Promise<Uint8Array> {
  const out = new Uint8Array(point.size)
  for (let at = 0; at < out.length; at += 3_000_000) await point.read(at, out.subarray(at, at + 3_000_000))
  return out
}

/** The first place where two arrays differ; undefined when they are equal. */
export function firstDifference(a: Uint8Array, b: Uint8Array): number | undefined {
  if (a.length !== b.length) return Math.min(a.length, b.length)
  if (Buffer.compare(a, b) === 0) return undefined
  return a.findIndex((byte, i) => byte !== b[i])
}
