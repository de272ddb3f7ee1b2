import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { patternAt } from '../../test/kit/index.ts'
import { isVarveError } from '../base/index.ts'
import type { Extent } from '../extents/index.ts'
import { type BlockDevice, readBytes } from './block-device.ts'
import { CachedDevice } from './cached.ts'
import { CountingDevice } from './counting.ts'
import { FaultDevice } from './fault.ts'
import { MemoryDevice } from './memory.ts'

const SIZE = 1 << 20
const counted = (inner: BlockDevice = new MemoryDevice(patternAt(0, SIZE))): CountingDevice =>
  new CountingDevice(inner, { record: true })

describe('CachedDevice', () => {
  test('many small reads of a page cost one read of that page', async () => {
    const below = counted()
    const cached = new CachedDevice(below)
    for (let at = 4096; at < 8192; at += 16) {
      assert.deepEqual(await readBytes(cached, at, 16), new Uint8Array(patternAt(at, 16)))
    }
    assert.deepEqual(below.calls, [{ call: 'read', offset: 4096, length: 4096 }])
  })

  test('reads only what is missing, neighbours in one piece', async () => {
    const below = counted()
    const cached = new CachedDevice(below)
    await readBytes(cached, 3 * 4096, 1)
    await readBytes(cached, 0, 6 * 4096)
    assert.deepEqual(
      below.calls.map(({ offset, length }) => [offset / 4096, length / 4096]),
      [
        [3, 1],
        [0, 3],
        [4, 2],
      ],
    )
  })

  test('concurrent reads of one page share the read below', async () => {
    const below = counted()
    const cached = new CachedDevice(below)
    const reads = await Promise.all(Array.from({ length: 50 }, (_, i) => readBytes(cached, i * 10, 100)))
    for (const [i, bytes] of reads.entries()) assert.deepEqual(bytes, new Uint8Array(patternAt(i * 10, 100)))
    assert.equal(below.reads, 1)
  })

  test('holds no more than it was told and drops the longest unused first', async () => {
    const below = counted()
    const cached = new CachedDevice(below, { mostBytes: 4 * 4096 })
    const touch = (page: number): Promise<Uint8Array> => readBytes(cached, page * 4096, 1)
    for (const page of [0, 1, 2, 3]) await touch(page)
    await touch(0) // now 1 is the longest unused
    await touch(4)
    assert.equal(cached.heldBytes, 4 * 4096)
    below.reset()
    await touch(0)
    assert.equal(below.reads, 0)
    await touch(1)
    assert.equal(below.reads, 1)
    for (let page = 0; page < 200; page++) {
      await touch(page)
      assert.ok(cached.heldBytes <= 4 * 4096)
    }
  })

  test('a large read goes past and leaves what is held', async () => {
    const below = counted()
    const cached = new CachedDevice(below, { mostBytes: 8 * 4096 })
    await readBytes(cached, 0, 1)
    const bytes = await readBytes(cached, 0, 100_000)
    assert.equal(Buffer.compare(bytes, patternAt(0, 100_000)), 0)
    assert.equal(cached.heldBytes, 4096)
    assert.deepEqual(below.calls.at(-1), { call: 'read', offset: 0, length: 100_000 })
  })

  test('reads ahead, up to the end and over what is held', async () => {
    const below = counted()
    const cached = new CachedDevice(below, { readAheadBytes: 16384 })
    for (let at = 0; at < 5 * 4096; at += 4096) await readBytes(cached, at, 10)
    assert.deepEqual(below.calls, [{ call: 'read', offset: 0, length: 5 * 4096 }])
    below.reset()
    await readBytes(cached, SIZE - 10, 10)
    assert.deepEqual(below.calls, [{ call: 'read', offset: SIZE - 4096, length: 4096 }])
  })

  test('a bad sector fails those who read it, not their neighbours, and is tried again', async () => {
    const faulty = new FaultDevice(new MemoryDevice(patternAt(0, SIZE)), {
      rules: [{ calls: ['read'], range: { start: 5000, end: 5512 } }],
    })
    const cached = new CachedDevice(faulty, { readAheadBytes: 65536 })
    assert.deepEqual(await readBytes(cached, 0, 100), new Uint8Array(patternAt(0, 100)), 'read-ahead met it')
    assert.deepEqual(
      await readBytes(cached, 4096, 100),
      new Uint8Array(patternAt(4096, 100)),
      'it is in the same page',
    )
    await assert.rejects(readBytes(cached, 5100, 1), (error) => isVarveError(error, 'IO'))
    faulty.clearRules()
    assert.deepEqual(await readBytes(cached, 5100, 1), new Uint8Array(patternAt(5100, 1)))
    assert.ok(faulty.failures >= 3)
  })

  test('a signal frees the one who gave it, and the others get their page', async () => {
    const gate = Promise.withResolvers<void>()
    const slow: BlockDevice = {
      size: SIZE,
      blockSize: 512,
      features: { write: false, resize: false, sparse: false, places: false },
      async read(offset, into) {
        await gate.promise
        into.set(patternAt(offset, into.length))
      },
      async extents(offset, length): Promise<readonly Extent[]> {
        return [{ offset, length, kind: 'data' }]
      },
      async [Symbol.asyncDispose]() {},
    }
    const below = counted(slow)
    const cached = new CachedDevice(below)
    const controller = new AbortController()
    const first = readBytes(cached, 0, 10, controller.signal)
    const second = readBytes(cached, 0, 10)
    controller.abort()
    await assert.rejects(first, (error) => isVarveError(error, 'CANCELLED'))
    gate.resolve()
    assert.deepEqual(await second, new Uint8Array(patternAt(0, 10)))
    assert.equal(below.reads, 1)
  })

  test('a page that is read while it is written is not kept', async () => {
    const memory = new MemoryDevice(new Uint8Array(SIZE))
    const gate = Promise.withResolvers<void>()
    let slow = true
    const cached = new CachedDevice({
      size: SIZE,
      blockSize: 512,
      features: memory.features,
      read: async (offset: number, into: Uint8Array) => {
        await memory.read(offset, into)
        if (slow) await gate.promise // the old bytes are on their way
      },
      extents: (offset: number, length: number) => memory.extents(offset, length),
      write: (offset: number, bytes: Uint8Array) => memory.write(offset, bytes),
      zero: (offset: number, length: number) => memory.zero(offset, length),
      flush: () => memory.flush(),
      [Symbol.asyncDispose]: async () => {},
    } as BlockDevice)
    const early = readBytes(cached, 0, 1)
    await cached.write(0, Uint8Array.of(7))
    slow = false
    const late = readBytes(cached, 0, 1)
    gate.resolve()
    assert.equal((await late)[0], 7, 'a read after the write sees it')
    assert.ok([0, 7].includes((await early)[0]!))
    assert.equal((await readBytes(cached, 0, 1))[0], 7)
    await cached.zero(0, 1)
    assert.equal((await readBytes(cached, 0, 1))[0], 0)
  })

  test('nor is a page whose reading began while the write was under way', async () => {
    const memory = new MemoryDevice(new Uint8Array(SIZE))
    const gate = Promise.withResolvers<void>()
    const slowWrites = new FaultDevice(memory)
    slowWrites.write = async (offset, bytes) => {
      await gate.promise
      await memory.write(offset, bytes)
    }
    const cached = new CachedDevice(slowWrites)
    const writing = cached.write(0, Uint8Array.of(7))
    assert.equal((await readBytes(cached, 0, 1))[0], 0, 'not there yet')
    gate.resolve()
    await writing
    assert.equal((await readBytes(cached, 0, 1))[0], 7)
  })
})
