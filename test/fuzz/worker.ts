/**
 * One fuzz run in a worker thread, so that the test can see a hang: mutates golden images until its time is over.
 * Every outcome must be a map, or one VarveError that is not INTERNAL.
 */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { parentPort, workerData } from 'node:worker_threads'
import { isVarveError } from '../../src/base/index.ts'
import { openDisk } from '../../src/chain/index.ts'
import { allExtents, type BlockDevice, MemoryDevice, readBytes } from '../../src/device/index.ts'
import { RangeSet } from '../../src/extents/index.ts'
import { probeFormat } from '../../src/formats/index.ts'
import { mapInUse } from '../../src/inuse/index.ts'
import { Random } from '../kit/index.ts'
import { livePages, mutate } from './mutations.ts'

export interface FuzzJob {
  readonly golden: string
  readonly seed: number
  readonly seconds: number
  /** Mutate only here, and then no byte of these ranges may turn from in use to unused (checksummed structures). */
  readonly keeps?: readonly (readonly [number, number])[] | undefined
}

export type FuzzMessage =
  | { readonly case: number; readonly seed: number }
  | { readonly done: number; readonly errors: number; readonly rssMiB: number }
  | { readonly failure: string; readonly seed: number }

const job = workerData as FuzzJob
const port = parentPort!

async function main(): Promise<void> {
  const original = job.golden.startsWith('disk-')
    ? await diskBytes(job.golden)
    : new Uint8Array(await readFile(path(job.golden)))
  const pages = livePages(original)
  const truth = job.keeps ? (await mapInUse(new MemoryDevice(original), {})).ranges : RangeSet.empty
  const judge = job.golden.startsWith('disk-') ? judgeDisk : judgeImage
  const until = Date.now() + job.seconds * 1000
  let errors = 0
  let count = 0
  for (; Date.now() < until; count++) {
    const seed = job.seed + count
    port.postMessage({ case: count, seed } satisfies FuzzMessage)
    const random = new Random(seed)
    const mutations = mutate(original, pages, random, job.keeps)
    const saved = mutations.map(({ offset, bytes }) => ({
      offset,
      bytes: original.slice(offset, offset + bytes.length),
    }))
    for (const { offset, bytes } of mutations) original.set(bytes, offset)
    // Now and then the file also ends early.
    const length = job.keeps || random.below(5) > 0 ? original.length : random.below(original.length)
    try {
      await judge(original.subarray(0, length), truth)
    } catch (error) {
      if (!isVarveError(error) || error.code === 'INTERNAL') {
        const what = error instanceof Error ? (error.stack ?? error.message) : String(error)
        port.postMessage({ failure: what, seed } satisfies FuzzMessage)
        return
      }
      errors++
    }
    for (const { offset, bytes } of saved.reverse()) original.set(bytes, offset)
  }
  // The image itself is held in memory here, as no reader does.
  const rssMiB = (process.memoryUsage.rss() - original.length) / 2 ** 20
  port.postMessage({ done: count, errors, rssMiB } satisfies FuzzMessage)
}

function path(golden: string): string {
  return join(import.meta.dirname, '../golden', golden)
}

async function diskBytes(golden: string): Promise<Uint8Array> {
  await using disk = await openDisk(path(golden), {})
  return await readBytes(disk, 0, disk.size)
}

async function judgeDisk(bytes: Uint8Array, truth: RangeSet): Promise<void> {
  const map = await mapInUse(new MemoryDevice(bytes), {})
  for (const [from, to] of job.keeps ?? []) {
    const lost = truth.clip(from, to).subtract(map.ranges)
    if (!lost.isEmpty) throw new Error(`in use, but the mutated map calls it unused: ${lost.toString()}`)
  }
}

async function judgeImage(bytes: Uint8Array): Promise<void> {
  const file = new MemoryDevice(bytes)
  const format = await probeFormat(file)
  await using layer = await format.open(file, { openPart: async () => new MemoryDevice(1 << 20) })
  await readAll(layer)
}

/** Reads what an image claims to hold, at most 64 MiB of it: sizes are lies here. */
async function readAll(device: BlockDevice): Promise<void> {
  const limit = 64 << 20
  let read = 0
  let seen = 0
  for await (const extent of allExtents(device)) {
    if (++seen > 100_000 || read > limit) return
    if (extent.kind !== 'data') continue
    const length = Math.min(extent.length, 1 << 20)
    await readBytes(device, extent.offset, length)
    read += length
  }
}

await main()
