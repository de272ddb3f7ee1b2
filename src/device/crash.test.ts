import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { Random } from '../../test/kit/index.ts'
import { asWritable, readBytes } from './block-device.ts'
import { CrashClock, CrashDevice } from './crash.ts'
import { FaultDevice } from './fault.ts'
import { MemoryDevice } from './memory.ts'

const SECTOR = 512
const fill = (sectors: number, value: number): Uint8Array => new Uint8Array(sectors * SECTOR).fill(value)
/** One number per sector; NaN when a sector is neither old nor new. */
const sectors = (content: Uint8Array): number[] =>
  Array.from({ length: Math.ceil(content.length / SECTOR) }, (_, i) => {
    const sector = content.subarray(i * SECTOR, (i + 1) * SECTOR)
    return sector.every((byte) => byte === sector[0]) ? sector[0]! : Number.NaN
  })
/** Every state that some dice give at `tick`, as text. */
function states(device: CrashDevice, tick: number, throws = 300): Set<string> {
  const random = new Random()
  const found = new Set<string>()
  for (let i = 0; i < throws; i++) found.add(sectors(device.contentAfterLoss(tick, random)).join(''))
  for (const survival of ['none', 'all'] as const)
    found.add(sectors(device.contentAfterLoss(tick, survival)).join(''))
  return found
}

describe('CrashDevice', () => {
  test('what was flushed is there in every state, what was not may be', async () => {
    const memory = new MemoryDevice(fill(3, 0))
    const device = await CrashDevice.over(memory)
    await device.write(0, fill(1, 1))
    await device.flush()
    await device.write(SECTOR, fill(1, 2))
    assert.deepEqual([...states(device, device.clock.now)].sort(), ['100', '120'])
    assert.deepEqual(sectors(await readBytes(device, 0, device.size)), [1, 2, 0], 'reads see everything')
  })

  test('every boundary has its states', async () => {
    const device = await CrashDevice.over(new MemoryDevice(fill(2, 0)))
    await device.write(0, fill(1, 1)) // ticks 1, 2
    await device.flush() // ticks 3, 4
    await device.write(SECTOR, fill(1, 2)) // ticks 5, 6
    const expected = [['00'], ['00', '10'], ['00', '10'], ['00', '10'], ['10'], ['10', '12'], ['10', '12']]
    assert.equal(device.clock.now, expected.length - 1)
    for (const [tick, texts] of expected.entries()) {
      assert.deepEqual([...states(device, tick)].sort(), texts, `after tick ${tick}`)
    }
  })

  test('an unflushed write is torn between sectors, in any combination, never inside one', async () => {
    const device = await CrashDevice.over(new MemoryDevice(fill(3, 0)))
    await device.write(0, fill(3, 1))
    assert.deepEqual([...states(device, device.clock.now)].sort(), [
      '000',
      '001',
      '010',
      '011',
      '100',
      '101',
      '110',
      '111',
    ])
  })

  test('writes without a flush between them come in any order', async () => {
    const device = await CrashDevice.over(new MemoryDevice(fill(2, 0)))
    await device.write(0, fill(1, 1))
    await device.write(SECTOR, fill(1, 2))
    assert.deepEqual([...states(device, device.clock.now)].sort(), ['00', '02', '10', '12'])
  })

  test('of two writes to one place the later one wins when both are there', async () => {
    const device = await CrashDevice.over(new MemoryDevice(fill(1, 0)))
    await device.write(0, fill(1, 1))
    await device.write(0, fill(1, 2))
    assert.deepEqual([...states(device, device.clock.now)].sort(), ['0', '1', '2'])
    assert.deepEqual(sectors(device.contentAfterLoss(device.clock.now, 'all')), [2])
  })

  test('a flush covers only what had resolved before it was called', async () => {
    const gate = Promise.withResolvers<void>()
    const memory = new MemoryDevice(fill(2, 0))
    let hold = true
    const slow = {
      size: memory.size,
      blockSize: 512,
      features: memory.features,
      read: memory.read.bind(memory),
      extents: memory.extents.bind(memory),
      zero: memory.zero.bind(memory),
      flush: memory.flush.bind(memory),
      write: async (offset: number, bytes: Uint8Array) => {
        if (hold) await gate.promise
        await memory.write(offset, bytes)
      },
      [Symbol.asyncDispose]: async () => {},
    }
    const device = await CrashDevice.over(slow)
    const underWay = device.write(0, fill(1, 1))
    hold = false
    await device.write(SECTOR, fill(1, 2))
    await device.flush()
    gate.resolve()
    await underWay
    assert.deepEqual([...states(device, device.clock.now)].sort(), ['02', '12'])
    await device.flush()
    assert.deepEqual([...states(device, device.clock.now)], ['12'])
  })

  test('a flush that was not done when the power failed promises nothing; nor does one that failed', async () => {
    const faulty = new FaultDevice(new MemoryDevice(fill(1, 0)), { rules: [{ calls: ['flush'] }] })
    const device = await CrashDevice.over(asWritable(faulty))
    await device.write(0, fill(1, 1))
    await assert.rejects(device.flush())
    assert.deepEqual([...states(device, device.clock.now)].sort(), ['0', '1'])
    faulty.clearRules()
    await device.flush()
    assert.deepEqual([...states(device, device.clock.now - 1)].sort(), ['0', '1'])
    assert.deepEqual([...states(device, device.clock.now)], ['1'])
  })

  test('a write that failed may have happened, whole or in part', async () => {
    const faulty = new FaultDevice(new MemoryDevice(fill(2, 0)), { rules: [{ calls: ['write'] }] })
    const device = await CrashDevice.over(asWritable(faulty))
    await assert.rejects(device.write(0, fill(2, 1)))
    await device.flush()
    assert.deepEqual([...states(device, device.clock.now)].sort(), ['00', '01', '10', '11'])
  })

  test('zeros and sizes are lost like writes', async () => {
    const device = await CrashDevice.over(new MemoryDevice(fill(2, 5)))
    await device.zero(0, SECTOR)
    assert.deepEqual([...states(device, device.clock.now)].sort(), ['05', '55'])
    await device.flush()
    await device.resize(3 * SECTOR)
    await device.write(2 * SECTOR, fill(1, 7))
    assert.deepEqual([...states(device, device.clock.now)].sort(), ['05', '050', '057'])
    await device.flush()
    await device.resize(SECTOR)
    await device.resize(2 * SECTOR)
    // Shrunk and grown: what stood there is gone, unless the shrinking never happened.
    assert.deepEqual([...states(device, device.clock.now)].sort(), ['0', '00', '05', '057'])
  })

  test('what the caller does to its buffer afterwards does not change the past', async () => {
    const device = await CrashDevice.over(new MemoryDevice(fill(1, 0)))
    const bytes = fill(1, 1)
    await device.write(0, bytes)
    bytes.fill(9)
    assert.deepEqual(sectors(device.contentAfterLoss(device.clock.now, 'all')), [1])
  })

  test('devices on one clock lose power together', async () => {
    const clock = new CrashClock()
    const journal = await CrashDevice.over(new MemoryDevice(fill(1, 0)), clock)
    const image = await CrashDevice.over(new MemoryDevice(fill(1, 0)), clock)
    await journal.write(0, fill(1, 1))
    await journal.flush()
    await image.write(0, fill(1, 2))
    for (let tick = 0; tick <= clock.now; tick++) {
      for (const i of states(image, tick)) {
        if (i === '2') assert.deepEqual([...states(journal, tick)], ['1'], `after tick ${tick}`)
      }
    }
    assert.ok(states(image, clock.now).has('2'))
  })
})
