/**
 * The contract of BlockDevice as tests, run over every device, wrapper and layer: what `block-device.ts` promises
 * is held here, once.
 */
import assert from 'node:assert/strict'
import { readSync } from 'node:fs'
import { describe, test } from 'node:test'
import { isVarveError } from '../../src/base/index.ts'
import {
  allExtents,
  type BlockDevice,
  isResizable,
  isWritable,
  readBytes,
  type WritableBlockDevice,
} from '../../src/device/index.ts'
import { checkExtents, type Extent } from '../../src/extents/index.ts'
import { patternAt, Random } from './index.ts'

/** A device to be tested; disposing of this also disposes of what stands below the device. */
export interface DeviceUnderTest extends AsyncDisposable {
  readonly device: BlockDevice
  /** What the device reads as, whole. At least 16 KiB, better not a multiple of 4096; few MiB at most. */
  readonly expected: Uint8Array
  /** Content of the medium below, for a device that writes through; checked after a flush. */
  readonly below?: () => Promise<Uint8Array>
}

export interface DeviceSuiteOptions {
  /** The device can write: a model test runs too. It is an error when this and its features differ. */
  readonly write: boolean
  readonly resize?: boolean
  /** Reason to skip the whole suite, from `needs()`. */
  readonly skip?: string | false
  /** Steps of the model test. Default 300. */
  readonly steps?: number
}

/** Registers the tests. `make` is called once per test and gives a device of its own. */
export function deviceSuite(
  name: string,
  make: () => Promise<DeviceUnderTest>,
  options: DeviceSuiteOptions,
): void {
  void describe(name, { skip: options.skip ?? false }, () => {
    const random = new Random()
    const seed = `(VARVE_SEED=${random.seed})`

    it('says what it can do', async () => {
      await using under = await make()
      const { device, expected } = under
      assert.equal(device.size, expected.length)
      assert.ok(device.size >= 16384, 'the suite needs a device of some size')
      assert.ok([512, 1024, 2048, 4096].includes(device.blockSize), `blockSize ${device.blockSize}`)
      assert.equal(isWritable(device), options.write)
      assert.equal(isResizable(device), options.resize ?? false)
    })

    it('read() fills the buffer completely and touches nothing beside it', async () => {
      await using under = await make()
      const { device, expected } = under
      same(await readBytes(device, 0, device.size), expected, 'whole')
      for (let i = 0; i < 200; i++) {
        const { offset, length } = someRange(random, device.size)
        const around = new Uint8Array(length + 32).fill(0xee)
        await device.read(offset, around.subarray(16, 16 + length))
        same(
          around.subarray(16, 16 + length),
          expected.subarray(offset, offset + length),
          `${offset}+${length} ${seed}`,
        )
        assert.ok(
          around.subarray(0, 16).every((byte) => byte === 0xee) &&
            around.subarray(16 + length).every((byte) => byte === 0xee),
          `wrote beside the buffer at ${offset}+${length} ${seed}`,
        )
      }
    })

    it('read() of no bytes works up to the end', async () => {
      await using under = await make()
      await under.device.read(0, new Uint8Array(0))
      await under.device.read(under.device.size, new Uint8Array(0))
    })

    it('a range outside the device is a RangeError', async () => {
      await using under = await make()
      const { device } = under
      for (const [offset, length] of outside(device.size)) {
        await assert.rejects(
          device.read(offset, new Uint8Array(length)),
          RangeError,
          `read ${offset}+${length}`,
        )
        await assert.rejects(device.extents(offset, length), RangeError, `extents ${offset}+${length}`)
        if (!isWritable(device)) continue
        await assert.rejects(
          device.write(offset, new Uint8Array(length)),
          RangeError,
          `write ${offset}+${length}`,
        )
        await assert.rejects(device.zero(offset, length), RangeError, `zero ${offset}+${length}`)
      }
      await assert.rejects(device.extents(0, device.size + 1), RangeError)
      await assert.rejects(device.extents(0, Number.NaN), RangeError)
      await assert.rejects(device.extents(0, -1), RangeError)
      await assert.rejects(device.extents(0, 0), RangeError, 'extents of no bytes')
      same(await readBytes(device, 0, device.size), under.expected, 'unchanged by refused calls')
    })

    it('extents() keeps the contract and agrees with the content', async () => {
      await using under = await make()
      const { device, expected } = under
      await holdsExtents(device, expected, seed)
      for (let i = 0; i < 100; i++) {
        const { offset, length } = someRange(random, device.size)
        if (length === 0) continue
        const list = await device.extents(offset, length)
        checkExtents(list, offset, length)
        for (const extent of list) agrees(extent, device, expected, seed)
      }
    })

    it('extents() of parts says the same as extents() of the whole', async () => {
      await using under = await make()
      const { device } = under
      const kinds = new Uint8Array(device.size)
      for await (const extent of allExtents(device)) {
        kinds.fill(KINDS.indexOf(extent.kind), extent.offset, extent.offset + extent.length)
      }
      for (let i = 0; i < 100; i++) {
        const { offset, length } = someRange(random, device.size)
        if (length === 0) continue
        for await (const extent of allExtents(device, offset, length)) {
          const end = extent.offset + extent.length
          const kind = KINDS.indexOf(extent.kind)
          assert.ok(
            kinds.subarray(extent.offset, end).every((k) => k === kind),
            `${offset}+${length} ${seed}`,
          )
        }
      }
    })

    it('concurrent reads do not disturb each other', async () => {
      await using under = await make()
      const { device, expected } = under
      await Promise.all(
        Array.from({ length: 64 }, async () => {
          const { offset, length } = someRange(random, device.size)
          const [bytes] = await Promise.all([
            readBytes(device, offset, length),
            device.extents(offset % device.size, 1),
          ])
          same(bytes, expected.subarray(offset, offset + length), `${offset}+${length} ${seed}`)
        }),
      )
    })

    it('a signal that has fired stops every call', async () => {
      await using under = await make()
      const { device } = under
      const signal = AbortSignal.abort()
      const cancelled = (error: unknown): boolean => isVarveError(error, 'CANCELLED')
      await assert.rejects(device.read(0, new Uint8Array(512), signal), cancelled, 'read')
      await assert.rejects(device.extents(0, 512, signal), cancelled, 'extents')
      if (isWritable(device)) {
        await assert.rejects(device.write(0, new Uint8Array(512).fill(1), signal), cancelled, 'write')
        await assert.rejects(device.zero(0, 512, signal), cancelled, 'zero')
        await assert.rejects(device.flush(signal), cancelled, 'flush')
      }
      if (isResizable(device)) await assert.rejects(device.resize(0, signal), cancelled, 'resize')
      same(await readBytes(device, 0, device.size), under.expected, 'unchanged')
    })

    it('a signal that fires later does no harm to others', async () => {
      await using under = await make()
      const { device, expected } = under
      const controller = new AbortController()
      const stopped = readBytes(device, 0, device.size, controller.signal).catch((error: unknown) => error)
      const other = readBytes(device, 0, device.size)
      controller.abort()
      const outcome = await stopped
      if (outcome instanceof Uint8Array) same(outcome, expected, 'read that was done before')
      else assert.ok(isVarveError(outcome, 'CANCELLED'), String(outcome))
      same(await other, expected, 'the other read')
    })

    it('after dispose every call throws, and to dispose again does nothing', async () => {
      await using under = await make()
      const { device } = under
      // Handled at once: a layer may refuse a read that is under way, while dispose is still awaited.
      const late = readBytes(device, 0, 4096).then(
        (bytes) => same(bytes, under.expected.subarray(0, 4096), 'a read under way while disposed'),
        () => {},
      )
      await device[Symbol.asyncDispose]()
      await device[Symbol.asyncDispose]()
      await late
      await assert.rejects(device.read(0, new Uint8Array(512)), TypeError, 'read')
      await assert.rejects(device.read(0, new Uint8Array(0)), TypeError, 'read of nothing')
      await assert.rejects(device.extents(0, 512), TypeError, 'extents')
      const all = device as WritableBlockDevice
      if (all.write) await assert.rejects(all.write(0, new Uint8Array(512)), TypeError, 'write')
      if (all.zero) await assert.rejects(all.zero(0, 512), TypeError, 'zero')
      if (all.flush) await assert.rejects(all.flush(), TypeError, 'flush')
      if (isResizable(device)) await assert.rejects(device.resize(0), TypeError, 'resize')
    })

    if (!options.write) {
      it('refuses to write', async () => {
        await using under = await make()
        const device = under.device as Partial<WritableBlockDevice> & BlockDevice
        const refused = (error: unknown): boolean => isVarveError(error, 'READ_ONLY')
        if (device.write) await assert.rejects(device.write(0, new Uint8Array(512).fill(1)), refused)
        if (device.zero) await assert.rejects(device.zero(0, 512), refused)
        if (device.flush) await assert.rejects(device.flush(), refused)
        same(await readBytes(device, 0, device.size), under.expected, 'unchanged')
      })
      return
    }

    it('behaves as an array of bytes under any sequence of calls', async () => {
      await using under = await make()
      const { device } = under
      assert.ok(isWritable(device))
      let model = under.expected.slice()
      for (let step = 0; step < (options.steps ?? 300); step++) {
        const { offset, length } = someRange(random, device.size)
        const where = `step ${step}: ${offset}+${length} ${seed}`
        const dice = random.below(100)
        // Zeros are kept short and few, or the device would soon be nothing else and hide what is left out.
        const short = random.below(8) === 0 ? length : Math.min(length, 20_000)
        if (dice < 35) {
          const bytes = patternAt(offset, length, step).slice()
          model.set(bytes, offset)
          await device.write(offset, bytes)
          bytes.fill(0x99) // the buffer is the caller's again
        } else if (dice < 40) {
          model.fill(0, offset, offset + short)
          await device.write(offset, new Uint8Array(short))
        } else if (dice < 60) {
          model.fill(0, offset, offset + short)
          await device.zero(offset, short)
        } else if (dice < 65) {
          await device.flush()
        } else if (dice < 70 && isResizable(device)) {
          const size = Math.max(16384, model.length + random.below(20000) - 10000)
          const resized = new Uint8Array(size)
          resized.set(model.subarray(0, size))
          model = resized
          await device.resize(size)
          assert.equal(device.size, size, where)
        } else if (dice < 80 && length > 0) {
          const list = await device.extents(offset, length)
          checkExtents(list, offset, length)
          for (const extent of list) agrees(extent, device, model, where)
        } else {
          same(await readBytes(device, offset, length), model.subarray(offset, offset + length), where)
        }
      }
      await device.flush()
      same(await readBytes(device, 0, device.size), model, `the end ${seed}`)
      await holdsExtents(device, model, seed)
      if (under.below) same(await under.below(), model, `the medium below ${seed}`)
    })

    it('concurrent writes of different places all arrive', async () => {
      await using under = await make()
      const { device } = under
      assert.ok(isWritable(device))
      const model = under.expected.slice()
      const places = Array.from({ length: 40 }, (_, i) => ({ offset: i * 400 + 3, bytes: random.bytes(390) }))
      await Promise.all(
        places.map(async ({ offset, bytes }, i) => {
          if (i % 3 === 0) {
            model.fill(0, offset, offset + bytes.length)
            await device.zero(offset, bytes.length)
          } else {
            model.set(bytes, offset)
            await device.write(offset, bytes)
          }
          same(
            await readBytes(device, offset, bytes.length),
            model.subarray(offset, offset + bytes.length),
            seed,
          )
        }),
      )
      same(await readBytes(device, 0, device.size), model, seed)
    })

    it('write() and zero() of no bytes change nothing', async () => {
      await using under = await make()
      const { device } = under
      assert.ok(isWritable(device))
      for (const offset of [0, 4096, device.size]) {
        await device.write(offset, new Uint8Array(0))
        await device.zero(offset, 0)
      }
      same(await readBytes(device, 0, device.size), under.expected, 'unchanged')
    })

    if (!options.resize) return

    it('resize() keeps what stays and adds zeros, also where bytes stood before', async () => {
      await using under = await make()
      const { device, expected } = under
      assert.ok(isResizable(device))
      const less = expected.length - 5000
      await device.write(less, new Uint8Array(5000).fill(7))
      await device.resize(less)
      assert.equal(device.size, less)
      await assert.rejects(device.read(less - 1, new Uint8Array(2)), RangeError)
      await device.resize(expected.length + 70000)
      const grown = new Uint8Array(expected.length + 70000)
      grown.set(expected.subarray(0, less))
      same(await readBytes(device, 0, device.size), grown, 'grown again')
      await holdsExtents(device, grown, seed)
      await assert.rejects(device.resize(-1), RangeError)
      await assert.rejects(device.resize(1.5), RangeError)
      await assert.rejects(device.resize(2 ** 53), RangeError)
    })
  })
}

/** Node's runner waits for its tests by itself. */
function it(name: string, body: () => Promise<void>): void {
  void test(name, body)
}

const KINDS = ['data', 'zero', 'absent'] as const

/** Walks the whole device: contract, content of what is not data, and bytes at the places. */
async function holdsExtents(device: BlockDevice, expected: Uint8Array, seed: string): Promise<void> {
  let at = 0
  while (at < device.size) {
    const list = await device.extents(at, device.size - at)
    checkExtents(list, at, device.size - at)
    for (const extent of list) agrees(extent, device, expected, seed)
    const last = list.at(-1)!
    at = last.offset + last.length
  }
  assert.equal(at, device.size)
}

function agrees(extent: Extent, device: BlockDevice, expected: Uint8Array, seed: string): void {
  const where = `${extent.kind} ${extent.offset}+${extent.length} ${seed}`
  const bytes = expected.subarray(extent.offset, extent.offset + extent.length)
  assert.ok(KINDS.includes(extent.kind), where)
  if (extent.kind !== 'data') {
    assert.ok(
      bytes.every((byte) => byte === 0),
      `${where} is not zero`,
    )
    assert.equal(extent.at, undefined, `${where} has no place`)
    assert.ok(device.features.sparse, `${where} from a device that says it is not sparse`)
  }
  if (extent.at) {
    assert.ok(device.features.places, `${where} has a place though the device says it has none`)
    assert.ok(extent.at.file.path.startsWith('/'), `${where}: ${extent.at.file.path} is absolute`)
    const there = new Uint8Array(extent.length)
    let got = 0
    while (got < there.length) {
      const n = readSync(extent.at.file.fd, there, got, there.length - got, extent.at.offset + got)
      assert.notEqual(n, 0, `${where}: the place ends early`)
      got += n
    }
    same(there, bytes, `${where}: bytes at its place`)
  }
}

/** Compares without printing megabytes. */
export function same(found: Uint8Array, expected: Uint8Array, where: string): void {
  assert.equal(found.length, expected.length, `${where}: length`)
  if (Buffer.compare(found, expected) === 0) return
  const at = found.findIndex((byte, i) => byte !== expected[i])
  assert.fail(`${where}: first difference at ${at}: found ${found[at]}, expected ${expected[at]}`)
}

/** Any range inside `size`, with a liking for borders, small and empty ones. */
function someRange(random: Random, size: number): { offset: number; length: number } {
  const border = (value: number): number =>
    Math.min(
      size,
      Math.max(
        0,
        random.pick([512, 4096, 65536].map((unit) => value - (value % unit))) + random.below(3) - 1,
      ),
    )
  let offset = random.below(size + 1)
  if (random.below(3) === 0) offset = border(offset)
  const most = random.pick([1, 600, 9000, size])
  let end = Math.min(size, offset + random.below(most + 1))
  if (random.below(3) === 0) end = Math.max(offset, border(end))
  return { offset, length: end - offset }
}

function outside(size: number): readonly (readonly [offset: number, length: number])[] {
  return [
    [size, 1],
    [size - 1, 2],
    [size + 1, 0],
    [0, size + 1],
    [-1, 1],
    [-1, 0],
    [0.5, 1],
    [Number.NaN, 1],
    [Number.POSITIVE_INFINITY, 1],
    [2 ** 53, 1],
  ]
}
