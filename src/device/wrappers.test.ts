/** What single wrappers do beyond the contract that test/conformance/device.test.ts holds for all of them. */
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { patternAt } from '../../test/kit/index.ts'
import { isVarveError } from '../base/index.ts'
import { allExtents, asWritable, isResizable, isWritable, readBytes } from './block-device.ts'
import { ConcatDevice } from './concat.ts'
import { CountingDevice } from './counting.ts'
import { FaultDevice } from './fault.ts'
import { MemoryDevice } from './memory.ts'
import { ReadOnlyDevice } from './read-only.ts'
import { SliceDevice } from './slice.ts'
import { ZeroDevice } from './zero.ts'

const io = (error: unknown): boolean => isVarveError(error, 'IO')

describe('CountingDevice', () => {
  test('counts calls and bytes, lists them, and begins again', async () => {
    const device = new CountingDevice(new MemoryDevice(10_000), { record: true })
    await device.read(5, new Uint8Array(100))
    await device.read(0, new Uint8Array(0))
    await device.write(7, new Uint8Array(50))
    await device.zero(100, 60)
    await device.flush()
    await device.extents(0, 10)
    await assert.rejects(device.read(9999, new Uint8Array(2)), RangeError)
    assert.deepEqual(device.counts, {
      reads: 3,
      bytesRead: 102,
      writes: 1,
      bytesWritten: 50,
      zeros: 1,
      bytesZeroed: 60,
      flushes: 1,
      extentCalls: 1,
    })
    assert.deepEqual(
      device.calls.map(({ call, offset, length }) => `${call} ${offset} ${length}`),
      ['read 5 100', 'read 0 0', 'write 7 50', 'zero 100 60', 'flush 0 0', 'extents 0 10', 'read 9999 2'],
    )
    device.reset()
    assert.deepEqual(
      [device.reads, device.bytesRead, device.writes, device.bytesWritten, device.calls.length],
      [0, 0, 0, 0, 0],
    )
    assert.deepEqual(new CountingDevice(new MemoryDevice(512)).calls, [])
  })
})

describe('FaultDevice', () => {
  test('fails the n-th matching call alone, or from there on', async () => {
    const device = new FaultDevice(new MemoryDevice(4096), { rules: [{ calls: ['read'], nth: 2 }] })
    await readBytes(device, 0, 1)
    await device.write(0, Uint8Array.of(1))
    await assert.rejects(readBytes(device, 0, 1), io)
    await readBytes(device, 0, 1)
    assert.equal(device.failures, 1)
    const worse = new FaultDevice(new MemoryDevice(4096), { rules: [{ nth: 2, andLater: true }] })
    await readBytes(worse, 0, 1)
    await assert.rejects(readBytes(worse, 0, 1), io)
    await assert.rejects(worse.flush(), io)
    await worse.extents(0, 1)
  })

  test('fails what touches a range', async () => {
    const device = new FaultDevice(new MemoryDevice(4096), { rules: [{ range: { start: 512, end: 1024 } }] })
    await readBytes(device, 0, 512)
    await readBytes(device, 1024, 512)
    await assert.rejects(readBytes(device, 511, 2), io)
    await assert.rejects(device.write(1023, Uint8Array.of(1)), io)
    await assert.rejects(device.zero(0, 4096), io)
    await device.flush()
    assert.equal(device.failures, 3)
  })

  test('a failing write may leave part of itself', async () => {
    const memory = new MemoryDevice(4096)
    const error = new Error('mine')
    const device = new FaultDevice(memory, { rules: [{ calls: ['write'], partialBytes: 3, error }] })
    await assert.rejects(device.write(0, new Uint8Array(10).fill(1)), (thrown) => thrown === error)
    assert.deepEqual([...memory.bytes.subarray(0, 5)], [1, 1, 1, 0, 0])
  })

  test('runs out of space in the middle of a write and stays out', async () => {
    const memory = new MemoryDevice(4096)
    const device = new FaultDevice(memory, { spaceBytes: 1000 })
    const full = (error: unknown): boolean => isVarveError(error, 'NO_SPACE')
    await device.write(0, new Uint8Array(900).fill(1))
    await assert.rejects(device.write(900, new Uint8Array(200).fill(2)), full)
    assert.deepEqual([memory.bytes[899], memory.bytes[999], memory.bytes[1000]], [1, 2, 0])
    await assert.rejects(device.write(0, Uint8Array.of(1)), full)
    assert.equal(device.failures, 2)
  })

  test('fails resize and extents when told to', async () => {
    const device = new FaultDevice(new MemoryDevice(4096), { rules: [{ calls: ['resize', 'extents'] }] })
    await assert.rejects(device.resize(5), io)
    await assert.rejects(device.extents(0, 1), io)
    assert.equal(device.size, 4096)
  })
})

describe('ConcatDevice', () => {
  test('disposes of every part, even when one fails to', async () => {
    const parts = [new MemoryDevice(512), new MemoryDevice(512), new MemoryDevice(512)]
    parts[1]![Symbol.asyncDispose] = async () => Promise.reject(new Error('stuck'))
    const device = new ConcatDevice(parts)
    await assert.rejects(async () => device[Symbol.asyncDispose](), /stuck/)
    await assert.rejects(readBytes(parts[0]!, 0, 1), TypeError)
    await assert.rejects(readBytes(parts[2]!, 0, 1), TypeError)
  })

  test('refuses to write over a part that cannot, before anything is written', async () => {
    const memory = new MemoryDevice(512)
    await using device = new ConcatDevice([memory, new ZeroDevice(512)])
    assert.equal(isWritable(device), false)
    await assert.rejects(device.write(0, new Uint8Array(1024).fill(1)), (error) =>
      isVarveError(error, 'READ_ONLY'),
    )
    assert.ok(memory.bytes.every((byte) => byte === 0))
  })

  test('of nothing is empty; sectors are those of the largest', async () => {
    await using none = new ConcatDevice([])
    assert.deepEqual([none.size, none.blockSize], [0, 512])
    await none.read(0, new Uint8Array(0))
    await using mixed = new ConcatDevice([
      new MemoryDevice(4096),
      new MemoryDevice(new Uint8Array(4096), 4096),
    ])
    assert.equal(mixed.blockSize, 4096)
  })

  test('joins extents over the seam', async () => {
    const memory = new MemoryDevice(patternAt(0, 4096))
    await using device = new ConcatDevice([
      new SliceDevice(memory, 0, 1000),
      new SliceDevice(memory, 2000, 1000),
    ])
    assert.deepEqual(await Array.fromAsync(allExtents(device)), [{ offset: 0, length: 2000, kind: 'data' }])
  })
})

test('asWritable() and the guards tell what a device can do', () => {
  const memory = new MemoryDevice(512)
  assert.equal(asWritable(memory), memory)
  assert.ok(isResizable(memory))
  const reader = new ReadOnlyDevice(memory)
  assert.ok(!isWritable(reader) && !isResizable(reader))
  assert.throws(
    () => asWritable(reader),
    (error) => isVarveError(error, 'READ_ONLY'),
  )
  const slice = new SliceDevice(memory, 0, 100)
  assert.ok(isWritable(slice) && !isResizable(slice))
  assert.throws(() => new SliceDevice(memory, 500, 13), RangeError)
})
