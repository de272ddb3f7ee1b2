import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { patternAt, Random } from '../../test/kit/index.ts'
import { CountingDevice, FaultDevice, MemoryDevice, readBytes } from '../device/index.ts'
import { ProbeCache } from './probe-cache.ts'

describe('ProbeCache', () => {
  test('reads what stands there, in any order, at any size, on odd devices', async () => {
    const random = new Random()
    for (const size of [0, 1, 127, 128, 129, 2175, 4096, 4097, 70_001]) {
      const bytes = patternAt(0, size).slice()
      const cache = new ProbeCache(new MemoryDevice(bytes))
      for (let i = 0; i < 300; i++) {
        const offset = random.below(size + 1)
        const length = random.below(Math.min(size - offset, random.pick([10, 500, 20_000])) + 1)
        const found = await readBytes(cache, offset, length)
        assert.deepEqual(
          found,
          bytes.slice(offset, offset + length),
          `seed ${random.seed}: ${offset}+${length}`,
        )
      }
    }
  })

  test('the same place costs one read, the start comes at once, page boundaries with both sides', async () => {
    const counting = new CountingDevice(new MemoryDevice(patternAt(0, 100_000).slice()), { record: true })
    const cache = new ProbeCache(counting)
    for (const offset of [510, 0, 1024, 2048, 510]) await readBytes(cache, offset, 8)
    assert.equal(counting.counts.reads, 1)
    for (const offset of [8182, 8192, 8244, 16_384, 16_374]) await readBytes(cache, offset, 10)
    assert.equal(counting.counts.reads, 3)
    await readBytes(cache, 50_000, 10_000)
    await readBytes(cache, 50_000, 10_000)
    assert.equal(counting.counts.reads, 5)
    assert.ok(counting.counts.bytesRead < 3000 + 20_000)
  })

  test('never holds more than its bound', async () => {
    const size = 4_000_000
    const counting = new CountingDevice(new MemoryDevice(patternAt(0, size).slice()))
    const cache = new ProbeCache(counting)
    for (let pass = 0; pass < 2; pass++) {
      for (let at = 0; at + 8000 <= size; at += 8000) {
        assert.deepEqual(await readBytes(cache, at, 8000), patternAt(at, 8000).slice())
      }
    }
    assert.ok(counting.counts.bytesRead > 1.9 * size, 'the second pass reads again')
  })

  test('knows an error of the device below again, also as a cause', async () => {
    const faulty = new FaultDevice(new MemoryDevice(10_000), {
      rules: [{ range: { start: 5000, end: 5001 } }],
    })
    const cache = new ProbeCache(faulty)
    const error: unknown = await readBytes(cache, 4999, 10).catch((thrown: unknown) => thrown)
    assert.equal(cache.failedWith(error), true)
    assert.equal(cache.failedWith(new Error('x', { cause: new Error('y', { cause: error }) })), true)
    assert.equal(cache.failedWith(new Error('x')), false)
    const outside: unknown = await readBytes(cache, 9999, 10).catch((thrown: unknown) => thrown)
    assert.ok(outside instanceof RangeError)
    assert.equal(cache.failedWith(outside), false)
  })
})
