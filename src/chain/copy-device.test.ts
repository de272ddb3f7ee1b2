import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { Random, tempDir } from '../../test/kit/index.ts'
import { type ErrorCode, isVarveError, type Progress } from '../base/index.ts'
import {
  type BlockDevice,
  CountingDevice,
  FaultDevice,
  forceSystemCalls,
  type HostFileDevice,
  MemoryDevice,
  openHostFile,
  readBytes,
} from '../device/index.ts'
import { type Extent, type ExtentKind, ExtentList, RangeSet } from '../extents/index.ts'
import { type CopyOptions, copyDevice } from './index.ts'

const MIB = 1024 * 1024

/** Memory with extents that the test decides; stops early now and then. */
class Patchy extends MemoryDevice implements BlockDevice {
  readonly #extents: readonly Extent[]
  constructor(bytes: Uint8Array, extents: readonly Extent[]) {
    super(bytes)
    this.#extents = extents
  }
  override async extents(offset: number, length: number): Promise<readonly Extent[]> {
    const list = new ExtentList()
    for (const each of this.#extents) {
      const from = Math.max(each.offset, offset)
      const to = Math.min(each.offset + each.length, offset + length)
      if (from < to) list.add(from, to - from, each.kind)
      if (list.count === 3) break
    }
    return list.finish()
  }
}

/** Random content: data (with runs of zeros in it), zero and absent extents. */
function patchy(random: Random, size: number): { source: Patchy; bytes: Uint8Array; data: RangeSet } {
  const bytes = new Uint8Array(size)
  const extents: Extent[] = []
  const data = []
  for (let at = 0; at < size; ) {
    const length = Math.min(size - at, 1 + random.below(random.pick([5000, 100_000, 3_000_000])))
    const kind: ExtentKind = random.pick(['data', 'zero', 'absent'])
    if (kind === 'data') {
      bytes.fill(1 + random.below(255), at, at + length)
      if (random.below(2)) bytes.fill(0, at + random.below(length), at + length)
      data.push({ start: at, end: at + length })
    }
    extents.push({ offset: at, length, kind })
    at += length
  }
  return { source: new Patchy(bytes, extents), bytes, data: RangeSet.from(data) }
}

function randomRanges(random: Random, size: number): RangeSet {
  return RangeSet.from(
    Array.from({ length: random.below(40) }, () => {
      const start = random.below(size)
      return { start, end: start + 1 + random.below(random.pick([100, 50_000, 2_000_000])) }
    }),
  )
}

function same(found: Uint8Array, expected: Uint8Array, what: string): void {
  assert.ok(Buffer.compare(found, expected) === 0, what)
}

describe('copyDevice()', () => {
  test('agrees with a model: ranges, kinds, zero detection, a target with old content or none', async () => {
    const random = new Random()
    for (let round = 0; round < 60; round++) {
      const size = 1 + random.below(6 * MIB)
      const { source, bytes, data } = patchy(random, size)
      const targetIsZero = random.below(2) === 0
      const old = targetIsZero ? 0 : 0x5a
      const target = new CountingDevice(new MemoryDevice(new Uint8Array(size + 1000).fill(old)))
      const ranges = random.below(3) ? randomRanges(random, size) : undefined
      const options: CopyOptions = {
        ranges,
        targetIsZero,
        detectZeroes: random.below(2) === 0,
        parallel: 1 + random.below(6),
      }
      const wanted = (ranges ?? RangeSet.of(0, size)).clip(0, size)
      const model = new Uint8Array(size + 1000).fill(old)
      for (const { start, end } of wanted) model.set(bytes.subarray(start, end), start)
      const steps: Progress[] = []
      const result = await copyDevice(source, target, { ...options, progress: (step) => steps.push(step) })
      const found = await readBytes(target, 0, target.size)
      same(found, model, `round ${round}, seed ${random.seed}`)
      assert.equal(result.copiedBytes + result.zeroBytes, wanted.size)
      assert.equal(result.skippedBytes, size - wanted.size)
      const inData = wanted.intersect(data).size
      if (options.detectZeroes) assert.ok(result.copiedBytes <= inData)
      else assert.equal(result.copiedBytes, inData)
      assert.deepEqual(steps.at(-1), { phase: 'copy', doneBytes: inData, totalBytes: inData })
      if (targetIsZero) assert.equal(target.counts.zeros, 0)
    }
  })

  test('reads data once, in pieces of 1 MiB, and nothing that is not data', async () => {
    const bytes = new Uint8Array(40 * MIB).fill(7)
    const source = new CountingDevice(
      new Patchy(bytes, [
        { offset: 0, length: 10 * MIB, kind: 'data' },
        { offset: 10 * MIB, length: 20 * MIB, kind: 'zero' },
        { offset: 30 * MIB, length: 10 * MIB, kind: 'absent' },
      ]),
    )
    const target = new MemoryDevice(40 * MIB)
    const result = await copyDevice(source, target, { targetIsZero: true })
    assert.deepEqual(result, { copiedBytes: 10 * MIB, zeroBytes: 30 * MIB, skippedBytes: 0 })
    assert.equal(source.counts.reads, 10)
    assert.equal(source.counts.bytesRead, 10 * MIB)
  })

  test('joins small extents that touch into one read', async () => {
    const list = Array.from({ length: 256 }, (_, i) => ({
      offset: i * 4096,
      length: 4096,
      kind: 'data' as const,
    }))
    const source = new CountingDevice(new Patchy(new Uint8Array(MIB).fill(1), list))
    await copyDevice(source, new MemoryDevice(MIB), { targetIsZero: true })
    assert.equal(source.counts.reads, 1)
  })

  for (const [name, plain] of [
    ['by the kernel', false],
    ['on a host without the calls', true],
  ] as const) {
    test(`between host files ${name}`, async () => {
      using _ = plain ? forceSystemCalls(undefined) : undefined
      await using dir = await tempDir()
      const random = new Random()
      for (const size of [5 * MIB + 123, 40 * MIB]) {
        const path = dir.file(`s${size}`)
        await using source = await openHostFile(path, { create: true })
        await source.resize(size)
        const model = new Uint8Array(size)
        for (let i = 0; i < 12; i++) {
          const at = random.below(size)
          const bytes = new Uint8Array(Math.min(size - at, random.below(2 * MIB))).fill(i + 1)
          model.set(bytes, at)
          await source.write(at, bytes)
        }
        await using target = await fresh(dir.file(`t${size}`), size)
        const ranges = randomRanges(random, size)
        await copyDevice(source, target, { targetIsZero: true, ranges })
        const expected = new Uint8Array(size)
        for (const { start, end } of ranges.clip(0, size)) expected.set(model.subarray(start, end), start)
        same(await readBytes(target, 0, size), expected, `seed ${random.seed}`)
      }
    })
  }

  test('a failing read or write ends it with that error, after everything under way', async () => {
    const refuses = async (code: ErrorCode, work: Promise<unknown>): Promise<void> =>
      await assert.rejects(work, (error) => isVarveError(error, code))
    const full = (): MemoryDevice => new MemoryDevice(new Uint8Array(20 * MIB).fill(1))
    const bad = new FaultDevice(full(), {
      rules: [{ calls: ['read'], range: { start: 9 * MIB, end: 9 * MIB + 1 } }],
    })
    await refuses('IO', copyDevice(bad, new MemoryDevice(20 * MIB)))
    await refuses(
      'NO_SPACE',
      copyDevice(full(), new FaultDevice(new MemoryDevice(20 * MIB), { spaceBytes: 3 * MIB })),
    )
    const lost = new FaultDevice(full(), { rules: [{ calls: ['extents'] }] })
    await refuses('IO', copyDevice(lost, new MemoryDevice(20 * MIB)))
  })

  test('stops when the signal fires', async () => {
    const source = new MemoryDevice(new Uint8Array(64 * MIB).fill(1))
    const target = new CountingDevice(new MemoryDevice(64 * MIB))
    const controller = new AbortController()
    const copy = copyDevice(source, target, {
      signal: controller.signal,
      progress: ({ doneBytes }) => doneBytes >= 4 * MIB && controller.abort(),
    })
    await assert.rejects(copy, (error) => isVarveError(error, 'CANCELLED'))
    assert.ok(target.counts.bytesWritten <= 12 * MIB, String(target.counts.bytesWritten))
  })

  test('nothing to copy, an empty source, a target that is too small', async () => {
    const none = { copiedBytes: 0, zeroBytes: 0, skippedBytes: 4096 }
    assert.deepEqual(
      await copyDevice(new MemoryDevice(4096), new MemoryDevice(0), { ranges: RangeSet.empty }),
      none,
    )
    assert.deepEqual(await copyDevice(new MemoryDevice(0), new MemoryDevice(0)), { ...none, skippedBytes: 0 })
    await assert.rejects(copyDevice(new MemoryDevice(4096), new MemoryDevice(4095)), RangeError)
  })
})

async function fresh(path: string, size: number): Promise<HostFileDevice> {
  const file = await openHostFile(path, { create: true, exclusive: true })
  await file.resize(size)
  return file
}
