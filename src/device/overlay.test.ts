import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { patternAt, Random } from '../../test/kit/index.ts'
import { isVarveError } from '../base/index.ts'
import { RangeSet } from '../extents/index.ts'
import { readBytes } from './block-device.ts'
import { CountingDevice } from './counting.ts'
import { FaultDevice } from './fault.ts'
import { MemoryDevice } from './memory.ts'
import { OverlayDevice } from './overlay.ts'

const SIZE = 300_000

describe('OverlayDevice', () => {
  test('agrees with an array under any patches, and never writes below', async () => {
    const random = new Random()
    const seed = `(VARVE_SEED=${random.seed})`
    const memory = new MemoryDevice(patternAt(0, SIZE).slice())
    const overlay = new OverlayDevice(memory)
    const model = memory.bytes.slice()
    let patched = RangeSet.empty
    for (let step = 0; step < 2000; step++) {
      const offset = random.below(SIZE)
      const length = Math.min(random.pick([0, 1, 128, 512, 4096, 20_000]), SIZE - offset)
      if (random.below(2) === 0) {
        const start = random.below(2) === 0 ? offset : offset - (offset % 4096)
        const bytes = random.bytes(length)
        overlay.patch(start, bytes)
        model.set(bytes, start)
        patched = patched.union(RangeSet.of(start, start + length))
      } else {
        const found = await readBytes(overlay, offset, length)
        assert.equal(
          Buffer.compare(found, model.subarray(offset, offset + length)),
          0,
          `step ${step} ${seed}`,
        )
        if (length > 0) {
          for (const extent of await overlay.extents(offset, length)) assert.equal(extent.kind, 'data')
        }
      }
    }
    assert.ok(overlay.patched.equals(patched), seed)
    assert.ok(overlay.heldBytes <= Math.ceil(SIZE / 4096) * 4096)
    assert.equal(Buffer.compare(memory.bytes, patternAt(0, SIZE)), 0)
  })

  test('the newest patch wins, and takes its own copy', async () => {
    const overlay = new OverlayDevice(new MemoryDevice(SIZE))
    const bytes = new Uint8Array(10).fill(1)
    overlay.patch(100, bytes)
    bytes.fill(9)
    overlay.patch(105, Uint8Array.of(2))
    assert.deepEqual([...(await readBytes(overlay, 98, 14))], [0, 0, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 0, 0])
  })

  test('a read of what is patched does not touch the medium', async () => {
    const below = new CountingDevice(
      new FaultDevice(new MemoryDevice(SIZE), { rules: [{ range: { start: 4096, end: 16_384 } }] }),
    )
    const overlay = new OverlayDevice(below)
    overlay.patch(4000, patternAt(4000, 13_000))
    assert.equal(Buffer.compare(await readBytes(overlay, 4050, 12_000), patternAt(4050, 12_000)), 0)
    assert.equal(below.reads, 0)
    await assert.rejects(readBytes(overlay, 3999, 12_000), (error) => isVarveError(error, 'IO'))
  })

  test('holds no more than its limit, and says so', async () => {
    const overlay = new OverlayDevice(new MemoryDevice(SIZE), { mostBytes: 3 * 4096 })
    for (const page of [5, 0, 9]) overlay.patch(page * 4096 + 7, Uint8Array.of(1))
    for (let i = 0; i < 100; i++) overlay.patch(5 * 4096 + i, Uint8Array.of(i)) // no further memory
    assert.equal(overlay.heldBytes, 3 * 4096)
    assert.throws(
      () => overlay.patch(4096, Uint8Array.of(1)),
      (error) => isVarveError(error, 'LIMIT'),
    )
    assert.equal((await readBytes(overlay, 4096, 1))[0], 0)
  })

  test('a patch outside is a RangeError and after dispose a TypeError', async () => {
    const overlay = new OverlayDevice(new MemoryDevice(SIZE))
    assert.throws(() => overlay.patch(SIZE - 1, new Uint8Array(2)), RangeError)
    assert.throws(() => overlay.patch(-1, new Uint8Array(1)), RangeError)
    await overlay[Symbol.asyncDispose]()
    assert.throws(() => overlay.patch(0, new Uint8Array(1)), TypeError)
  })

  test('a hundred thousand small patches and as many reads take no seconds', async () => {
    const overlay = new OverlayDevice(new MemoryDevice(64 << 20))
    const started = performance.now()
    const chunk = new Uint8Array(128).fill(3)
    for (let i = 0; i < 100_000; i++) overlay.patch(((i * 7919) % 500_000) * 128, chunk)
    for (let i = 0; i < 100_000; i++) await overlay.read((i * 512) % (60 << 20), chunk)
    for (let at = 0; at < 64 << 20; ) {
      const list = await overlay.extents(at, (64 << 20) - at)
      at = list.at(-1)!.offset + list.at(-1)!.length
    }
    assert.ok(performance.now() - started < 30_000, `${performance.now() - started} ms`)
  })
})
