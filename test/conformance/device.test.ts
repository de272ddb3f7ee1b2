/** Every device and wrapper keeps the contract of the interface in the middle. */
import assert from 'node:assert/strict'
import { open } from 'node:fs/promises'
import { describe, test } from 'node:test'
import * as door from '../../src/device/index.ts'
import {
  type BlockDevice,
  CachedDevice,
  ConcatDevice,
  CountingDevice,
  CrashDevice,
  FaultDevice,
  forceSystemCalls,
  type HostFileDevice,
  MemoryDevice,
  OverlayDevice,
  openHostFile,
  ReadOnlyDevice,
  readBytes,
  SliceDevice,
  ZeroDevice,
} from '../../src/device/index.ts'
import { type DeviceSuiteOptions, type DeviceUnderTest, deviceSuite } from '../kit/device-suite.ts'
import { must, needs, needsRoot, patternAt, tempDir } from '../kit/index.ts'
import { StutterDevice } from '../kit/stutter-device.ts'

const SIZE = 300_000 // no multiple of a sector
const tested = new Set<string>()

/** Content with holes of every kind: whole pages, parts of pages, at both ends. */
function content(size = SIZE): Uint8Array {
  const bytes = new Uint8Array(size)
  for (const [start, end] of [
    [0, 20_000],
    [65_536, 65_537],
    [131_072, 196_608],
    [size - 30_000, size - 10_000],
  ] as const) {
    bytes.set(patternAt(start, end - start), start)
  }
  return bytes
}

/** A sparse file with that content. */
async function hostFile(
  options: { write?: boolean } = {},
): Promise<DeviceUnderTest & { device: HostFileDevice }> {
  const expected = content()
  const dir = await tempDir()
  const path = dir.file('disk.raw')
  const file = await open(path, 'wx')
  await file.truncate(expected.length)
  for (let at = 0; at < expected.length; at += 4096) {
    const piece = expected.subarray(at, at + 4096)
    if (piece.some((byte) => byte !== 0)) await file.write(piece, 0, piece.length, at)
  }
  await file.close()
  const device = await openHostFile(path, options)
  return {
    device,
    expected,
    below: async () => {
      await using again = await openHostFile(path)
      return await readBytes(again, 0, again.size)
    },
    async [Symbol.asyncDispose]() {
      await device[Symbol.asyncDispose]()
      await dir[Symbol.asyncDispose]()
    },
  }
}

/** `make` wraps a fresh device below, whose content is `content()`. */
function wrapper(
  type: new (...args: never[]) => BlockDevice,
  options: DeviceSuiteOptions & { over?: string },
  wrap: (inner: BlockDevice) => BlockDevice | Promise<BlockDevice>,
  view: (expected: Uint8Array) => Uint8Array = (expected) => expected,
): void {
  for (const [over, make] of [
    ['memory', async () => memory(content())],
    ['a sparse host file', () => hostFile({ write: true })],
    ['a device that tells little at a time', () => stuttering()],
  ] as const) {
    const resize = (options.resize ?? false) && !over.startsWith('a device')
    suite(type, `${options.over ?? ''} over ${over}`.trim(), { ...options, resize }, async () => {
      const inner: DeviceUnderTest = await make()
      const device = await wrap(inner.device)
      return {
        device,
        expected: view(inner.expected),
        async [Symbol.asyncDispose]() {
          await device[Symbol.asyncDispose]()
          await inner[Symbol.asyncDispose]()
        },
      }
    })
  }
}

/** Over a host file, so that there is something to tell. */
async function stuttering(): Promise<DeviceUnderTest> {
  const inner = await hostFile({ write: true })
  return { ...inner, device: new StutterDevice(inner.device) }
}

function memory(bytes: Uint8Array): DeviceUnderTest {
  const device = new MemoryDevice(bytes)
  return {
    device,
    expected: bytes.slice(),
    below: async () => device.bytes,
    [Symbol.asyncDispose]: () => device[Symbol.asyncDispose](),
  }
}

function suite(
  type: { readonly name: string; prototype: BlockDevice },
  what: string,
  options: DeviceSuiteOptions,
  make: () => Promise<DeviceUnderTest>,
): void {
  tested.add(type.name)
  deviceSuite(
    `${type.name} ${what}`,
    async () => {
      const under = await make()
      assert.equal(under.device.constructor, type, 'the suite tests the class that it says')
      return under
    },
    options,
  )
}

suite(MemoryDevice, '', { write: true, resize: true }, async () => memory(content()))

suite(ZeroDevice, '', { write: false }, async () => {
  const device = new ZeroDevice(SIZE)
  return {
    device,
    expected: new Uint8Array(SIZE),
    [Symbol.asyncDispose]: () => device[Symbol.asyncDispose](),
  }
})

suite(door.HostFileDevice, 'for reading', { write: false }, () => hostFile())
suite(door.HostFileDevice, 'for writing', { write: true, resize: true }, () => hostFile({ write: true }))

suite(door.HostFileDevice, 'on a host without system calls', { write: true, resize: true }, async () => {
  const forced = forceSystemCalls(undefined)
  const under = await hostFile({ write: true })
  return {
    ...under,
    async [Symbol.asyncDispose]() {
      await under[Symbol.asyncDispose]()
      forced[Symbol.dispose]()
    },
  }
})

for (const sector of [512, 4096]) {
  const skip = needsRoot() || needs('losetup')
  suite(
    door.HostFileDevice,
    `of a loop device with sectors of ${sector}`,
    { write: true, skip },
    async () => {
      const expected = content(327_680)
      const dir = await tempDir()
      const path = dir.file('disk.raw')
      {
        await using file = await open(path, 'wx')
        await file.writeFile(expected)
      }
      const node = (await must('losetup', ['-f', '--show', '-b', String(sector), path])).trim()
      const cleanUp = async (): Promise<void> => {
        await must('losetup', ['-d', node])
        await dir[Symbol.asyncDispose]()
      }
      try {
        const device = await openHostFile(node, { write: true })
        assert.equal(device.blockSize, sector)
        assert.equal(device.kind, 'block')
        return {
          device,
          expected,
          async [Symbol.asyncDispose]() {
            await device[Symbol.asyncDispose]()
            await cleanUp()
          },
        }
      } catch (error) {
        await cleanUp()
        throw error
      }
    },
  )
}

wrapper(
  SliceDevice,
  { write: true },
  (inner) => new SliceDevice(inner, 1001, SIZE - 5000),
  (expected) => expected.slice(1001, SIZE - 3999),
)
wrapper(
  SliceDevice,
  { write: false, over: 'read-only' },
  (inner) => new SliceDevice(new ReadOnlyDevice(inner), 0, SIZE),
)
wrapper(ReadOnlyDevice, { write: false }, (inner) => new ReadOnlyDevice(inner))
wrapper(
  ConcatDevice,
  { write: true, over: 'of five parts' },
  (inner) =>
    new ConcatDevice(
      [
        [0, 10_000],
        [140_000, 80_000],
        [5, 0],
        [230_000, 1],
        [10_000, 100_000],
      ].map(([offset, length]) => new SliceDevice(inner, offset!, length!)),
    ),
  (expected) =>
    Buffer.concat([
      expected.subarray(0, 10_000),
      expected.subarray(140_000, 220_000),
      expected.subarray(230_000, 230_001),
      expected.subarray(10_000, 110_000),
    ]),
)
wrapper(
  ConcatDevice,
  { write: false, over: 'with a part of zeros' },
  (inner) =>
    new ConcatDevice([
      new SliceDevice(inner, 0, 30_000),
      new ZeroDevice(40_000),
      new SliceDevice(inner, 130_000, 50_000),
    ]),
  (expected) =>
    Buffer.concat([
      expected.subarray(0, 30_000),
      new Uint8Array(40_000),
      expected.subarray(130_000, 180_000),
    ]),
)
wrapper(OverlayDevice, { write: false, over: 'without patches' }, (inner) => new OverlayDevice(inner))
{
  // Small, whole-page, page-crossing, repeated and last-byte patches; some over data, some over holes.
  const patches: readonly (readonly [offset: number, length: number])[] = [
    [3, 1],
    [4000, 200],
    [8192, 4096],
    [40_000, 10],
    [40_005, 10],
    [100_000, 30_000],
    [SIZE - 1, 1],
    [8200, 50],
  ]
  wrapper(
    OverlayDevice,
    { write: false, over: 'with patches' },
    (inner) => {
      const overlay = new OverlayDevice(inner)
      for (const [i, [offset, length]] of patches.entries())
        overlay.patch(offset, patternAt(offset, length, 2 + i))
      return overlay
    },
    (expected) => {
      const patched = expected.slice()
      for (const [i, [offset, length]] of patches.entries())
        patched.set(patternAt(offset, length, 2 + i), offset)
      return patched
    },
  )
}
wrapper(CachedDevice, { write: true }, (inner) => new CachedDevice(inner))
wrapper(
  CachedDevice,
  { write: true, over: 'of few odd pages with read-ahead' },
  (inner) => new CachedDevice(inner, { pageBytes: 1536, mostBytes: 20_000, readAheadBytes: 6000 }),
)
wrapper(CountingDevice, { write: true }, (inner) => new CountingDevice(inner, { record: true }))
wrapper(FaultDevice, { write: true, resize: true, over: 'without rules' }, (inner) => new FaultDevice(inner))
wrapper(CrashDevice as never, { write: true, resize: true }, (inner) =>
  CrashDevice.over(door.asWritable(inner)),
)

describe('the list of devices', () => {
  test('is complete: every exported class named …Device is in the suite', () => {
    const classes = Object.entries(door)
      .filter(
        ([name, value]) =>
          name.endsWith('Device') && typeof value === 'function' && String(value).startsWith('class'),
      )
      .map(([name]) => name)
    assert.ok(classes.length >= 10, `only ${classes.length} were found`)
    assert.deepEqual([...tested].sort(), classes.sort())
  })
})
