import assert from 'node:assert/strict'
import { readFile, stat } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { type DeviceUnderTest, deviceSuite, same } from '../../../test/kit/device-suite.ts'
import { must, needs, patternAt, Random, tempDir } from '../../../test/kit/index.ts'
import { makeVhd, RECIPE_UUID, tapLocators } from '../../../test/kit/vhd-recipe.ts'
import { type ErrorCode, isVarveError } from '../../base/index.ts'
import {
  allExtents,
  CrashDevice,
  FaultDevice,
  MemoryDevice,
  openHostFile,
  type ResizableBlockDevice,
  readBytes,
} from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import type { CreateOptions, ImageLayer, WritableImageLayer } from '../image-format.ts'
import { vhdFormat } from './index.ts'

const MIB = 1024 * 1024
const SIZE = 300 * 512

async function create(file: ResizableBlockDevice, options: CreateOptions): Promise<WritableImageLayer> {
  return await vhdFormat.create!(file, options)
}

async function openWritable(bytes: Uint8Array): Promise<{ file: MemoryDevice; layer: WritableImageLayer }> {
  const file = new MemoryDevice(bytes)
  return { file, layer: (await vhdFormat.open(file, { write: true })) as WritableImageLayer }
}

/** A new image as it stands in its file, with nobody having it open. */
async function emptyVhd(options: CreateOptions): Promise<MemoryDevice> {
  const file = new MemoryDevice(0)
  await using _ = await create(file, options)
  return new MemoryDevice(file.bytes.slice())
}

async function holds(layer: ImageLayer): Promise<RangeSet> {
  const ranges = []
  for await (const { offset, length, kind } of allExtents(layer)) {
    if (kind === 'data') ranges.push({ start: offset, end: offset + length })
  }
  return RangeSet.from(ranges)
}

async function refuses(code: ErrorCode, work: Promise<unknown>): Promise<void> {
  await assert.rejects(work, (error: unknown) => {
    assert.ok(isVarveError(error), String(error))
    assert.equal(error.code, code, error.message)
    return true
  })
}

async function made(settings: CreateOptions['settings'], on: 'host' | 'memory'): Promise<DeviceUnderTest> {
  const dir = await tempDir()
  const file = on === 'host' ? await openHostFile(dir.file('a.vhd'), { create: true }) : new MemoryDevice(0)
  const device = await create(file, { virtualSize: SIZE, ...(settings ? { settings } : {}) })
  const expected = new Uint8Array(SIZE)
  expected.set(patternAt(3000, 20_000), 3000)
  await device.write(3000, patternAt(3000, 20_000))
  await device.flush()
  return {
    device,
    expected,
    // A second reader, by what stands in the file.
    below: async () => {
      const bytes =
        file instanceof MemoryDevice ? file.bytes.slice() : new Uint8Array(await readFile(dir.file('a.vhd')))
      await using layer = await vhdFormat.open(new MemoryDevice(bytes), {})
      return await readBytes(layer, 0, layer.size)
    },
    async [Symbol.asyncDispose]() {
      await device[Symbol.asyncDispose]()
      await dir[Symbol.asyncDispose]()
    },
  }
}

deviceSuite('WritableVhdLayer, small blocks', () => made({ blockBytes: 4096 }, 'host'), { write: true })
deviceSuite('WritableVhdLayer, one block, in memory', () => made({}, 'memory'), { write: true })
deviceSuite('FixedVhdLayer, writing', () => made({ type: 'fixed' }, 'host'), { write: true })

describe('a VHD of ours', { skip: needs('qemu-img', 'qemu-io') }, () => {
  for (const [name, settings] of [
    ['dynamic', {}],
    ['dynamic with small blocks', { blockBytes: 65_536 }],
    ['dynamic with room to grow', { reserveBytes: 2 * 1024 ** 4 }],
    ['fixed', { type: 'fixed' }],
  ] as const) {
    test(`${name}: qemu-img reads it, and we read on after qemu-io wrote`, async () => {
      await using dir = await tempDir()
      const size = 37 * MIB + 512
      const model = new Uint8Array(size)
      const random = new Random()
      const path = dir.file('a.vhd')
      {
        await using layer = await create(await openHostFile(path, { create: true }), {
          virtualSize: size,
          settings,
        })
        for (let i = 0; i < 20; i++) {
          const at = random.below(size)
          const bytes = patternAt(at, Math.min(size - at, random.below(600_000)), i + 1)
          model.set(bytes, at)
          await layer.write(at, bytes)
        }
        await layer.flush()
      }
      const info = JSON.parse(await must('qemu-img', ['info', '-f', 'vpc', '--output=json', path])) as {
        'virtual-size': number
      }
      assert.equal(info['virtual-size'], size)
      await must('qemu-img', ['convert', '-f', 'vpc', '-O', 'raw', path, dir.file('a.raw')])
      same(new Uint8Array(await readFile(dir.file('a.raw'))), model, `seed ${random.seed}`)
      await must('qemu-io', ['-f', 'vpc', '-c', 'write -P 0x42 20M 3M', '-c', 'write -P 0x43 100k 4k', path])
      model.fill(0x42, 20 * MIB, 23 * MIB)
      model.fill(0x43, 100 * 1024, 104 * 1024)
      await using layer = await vhdFormat.open(await openHostFile(path), {})
      same(await readBytes(layer, 0, size), model, `seed ${random.seed}`)
    })
  }

  test('writes into one that qemu made', async () => {
    await using dir = await tempDir()
    const path = dir.file('a.vhd')
    await must('qemu-img', ['create', '-q', '-f', 'vpc', '-o', 'force_size=on', path, '21M'])
    await must('qemu-io', ['-f', 'vpc', '-c', 'write -P 1 1M 4M', path])
    {
      const layer = (await vhdFormat.open(await openHostFile(path, { write: true }), {
        write: true,
      })) as WritableImageLayer
      await using _ = layer
      await layer.write(3 * MIB + 7, patternAt(0, 3 * MIB))
      await layer.zero(MIB, 1000)
      await layer.flush()
    }
    await must('qemu-img', ['convert', '-f', 'vpc', '-O', 'raw', path, dir.file('a.raw')])
    const model = new Uint8Array(21 * MIB)
    model.fill(1, MIB, 5 * MIB)
    model.set(patternAt(0, 3 * MIB), 3 * MIB + 7)
    model.fill(0, MIB, MIB + 1000)
    same(new Uint8Array(await readFile(dir.file('a.raw'))), model, 'content')
  })
})

describe('create()', () => {
  test('lays out what tap lays out: 3584 bytes for an empty dynamic disk, 5120 for a differencing one', async () => {
    const dynamic = new MemoryDevice(patternAt(0, 9999))
    await using _ = await create(dynamic, { virtualSize: 64 * MIB })
    assert.equal(dynamic.size, 3584)
    const child = new MemoryDevice(0)
    const backing = { name: 'base.vhd', format: 'vhd', id: RECIPE_UUID }
    await using layer = await create(child, { virtualSize: 64 * MIB, backing })
    assert.equal(child.size, 5120)
    assert.deepEqual(layer.backing, { ...backing, otherNames: [] })
    const expected = makeVhd({
      type: 'differencing',
      size: 64 * MIB,
      batmap: 0x10002,
      parentUuid: RECIPE_UUID,
      parentName: 'base.vhd',
      locators: tapLocators('base.vhd'),
      geometry: [963, 8, 17],
      uuid: layer.id!,
    }).bytes
    // But for the time stamps, and so the checksums, byte for byte the recipe's.
    for (const [at, length] of [
      [24, 4],
      [64, 4],
      [512 + 56, 4],
      [512 + 36, 4],
      [5120 - 512 + 24, 4],
      [5120 - 512 + 64, 4],
    ] as const) {
      expected.set(child.bytes.subarray(at, at + length), at)
    }
    same(child.bytes, new Uint8Array(expected.subarray(0, 5120)), 'differencing')
  })

  test('a raw parent has the null uuid; an absolute or nested one keeps its path', async () => {
    for (const name of ['base.raw', 'a/b/base.raw', '/srv/images/base.raw', 'Grüße €.raw']) {
      await using layer = await create(new MemoryDevice(0), {
        virtualSize: MIB,
        backing: { name, format: 'raw' },
      })
      assert.equal(layer.backing?.name, name)
      assert.equal(layer.backing?.format, 'raw')
      assert.equal(layer.backing?.id, undefined)
    }
  })

  test('the geometry is the specification’s', async () => {
    // From the specification's appendix, worked by hand.
    for (const [size, geometry] of [
      [64 * MIB, '963/8/17'],
      [1024 * MIB, '2080/16/63'],
      [127 * 1024 * MIB, '65278/16/255'],
    ] as const) {
      await using layer = await create(new MemoryDevice(0), { virtualSize: size })
      assert.equal(layer.facts['geometry'], geometry)
    }
  })

  test('refuses what makes no disk', async () => {
    const file = new MemoryDevice(0)
    await refuses('USAGE', create(file, { virtualSize: 0 }))
    await refuses('USAGE', create(file, { virtualSize: 1000 }))
    await refuses('UNSUPPORTED', create(file, { virtualSize: 2041 * 1024 ** 3 }))
    for (const settings of [
      { blockBytes: 1000 },
      { blockBytes: 4 * MIB },
      { type: 'odd' },
      { odd: 1 },
      { uuid: 'x' },
      { type: 'differencing' },
    ]) {
      await refuses('USAGE', create(file, { virtualSize: MIB, settings }))
    }
    for (const backing of [
      { name: 'x', format: 'qcow2' },
      { name: 'x', format: 'vhd' },
      { name: '', format: 'raw' },
      { name: 'a\\b', format: 'raw' },
      { name: 'a\n', format: 'raw' },
      { name: 'x'.repeat(256), format: 'raw' },
    ]) {
      await refuses('USAGE', create(file, { virtualSize: MIB, backing }))
    }
  })
})

describe('writing', () => {
  test('keeps the batmap: full blocks have their bit, checksum right, others not', async () => {
    const file = new MemoryDevice(0)
    {
      await using layer = await create(file, { virtualSize: 8 * MIB })
      await layer.write(2 * MIB, patternAt(0, 2 * MIB))
      await layer.write(4 * MIB, patternAt(0, 2 * MIB - 512))
      await layer.flush()
    }
    const at = file.bytes.findIndex(
      (_, i) => Buffer.from(file.bytes.subarray(i, i + 8)).toString() === 'tdbatmap',
    )
    assert.equal(file.bytes[at + 512], 0x40)
    // Bitmaps of full blocks wiped: the batmap stands for them, so its checksum holds.
    const bytes = file.bytes.slice()
    const first = new DataView(bytes.buffer).getUint32(1536 + 4) * 512
    bytes.fill(0, first, first + 512)
    await using layer = await vhdFormat.open(new MemoryDevice(bytes), {})
    assert.equal(String(await holds(layer)), String(RangeSet.of(2 * MIB, 6 * MIB - 512)))
  })

  test('a process that dies leaves a file that opens, after each single write', async () => {
    const crash = await CrashDevice.over(await emptyVhd({ virtualSize: MIB, settings: { blockBytes: 4096 } }))
    const layer = (await vhdFormat.open(crash, { write: true })) as WritableImageLayer
    for (let i = 0; i < 20; i++) await layer.write(i * 50_000, patternAt(0, 10_000))
    await layer.flush()
    // A process that dies: all writes so far are there, none later.
    for (let tick = 0; tick <= crash.clock.now; tick++) {
      await using found = await vhdFormat.open(new MemoryDevice(crash.contentAfterLoss(tick, 'all')), {})
      assert.equal(found.size, MIB)
      await readBytes(found, 0, MIB)
    }
  })

  test('a differencing disk takes whole sectors only where it holds nothing', async () => {
    const { layer } = await openWritable(
      makeVhd({
        type: 'differencing',
        size: MIB,
        blockBytes: 65_536,
        parentName: 'p.vhd',
        parentUuid: RECIPE_UUID,
        sectors: new Map([[5, patternAt(0, 512)]]),
      }).bytes,
    )
    await using _ = layer
    await refuses('UNSUPPORTED', layer.write(100, new Uint8Array(10)))
    await refuses('UNSUPPORTED', layer.zero(0, 700))
    await layer.write(5 * 512 + 100, new Uint8Array(10))
    await layer.write(8 * 512, patternAt(0, 1024))
    await layer.zero(200 * 512, 512 * 200)
    assert.equal(
      String(await holds(layer)),
      String(
        RangeSet.from([
          { start: 5 * 512, end: 6 * 512 },
          { start: 8 * 512, end: 10 * 512 },
          { start: 200 * 512, end: 400 * 512 },
        ]),
      ),
    )
    assert.deepEqual(
      await readBytes(layer, 200 * 512, 512 * 200),
      new Uint8Array(512 * 200),
      'zeros, not the parent',
    )
  })

  test('is refused for a broken footer, overlapping blocks, a file open for reading', async () => {
    const recipe = {
      type: 'dynamic',
      size: 8 * MIB,
      sectors: new Map([
        [0, patternAt(0, 512)],
        [4096, patternAt(0, 512)],
      ]),
    } as const
    await refuses('UNSUPPORTED', openWritable(makeVhd({ ...recipe, footer: 'killed' }).bytes))
    await refuses('UNSUPPORTED', openWritable(makeVhd({ ...recipe, footer: 'short' }).bytes))
    const image = makeVhd(recipe)
    image.bytes.writeUInt32BE(image.placed.get(0)! + 5, image.tableOffset + 4)
    await refuses('CORRUPT', openWritable(image.bytes))
    await using dir = await tempDir()
    await using _ = await create(await openHostFile(dir.file('a.vhd'), { create: true }), {
      virtualSize: MIB,
    })
    await using file = await openHostFile(dir.file('a.vhd'))
    await refuses('READ_ONLY', vhdFormat.open(file, { write: true }))
  })

  test('a full disk is an error; what was flushed before stays', async () => {
    const file = new MemoryDevice(0)
    await (await create(file, { virtualSize: 4 * MIB, settings: { blockBytes: 65_536 } }))[
      Symbol.asyncDispose
    ]()
    const copy = new MemoryDevice(file.bytes.slice())
    const short = new FaultDevice(copy, { spaceBytes: 200_000 })
    const layer = (await vhdFormat.open(short, { write: true })) as WritableImageLayer
    await layer.write(0, patternAt(0, 65_536))
    await layer.flush()
    await refuses('NO_SPACE', layer.write(65_536, patternAt(65_536, 4 * 65_536)))
    await using found = await vhdFormat.open(new MemoryDevice(copy.bytes.slice()), {})
    same(await readBytes(found, 0, 65_536), patternAt(0, 65_536), 'before')
  })

  test('power loss at any moment: each sector reads as flushed last, or as written since', async () => {
    const random = new Random()
    for (let round = 0; round < 4; round++) {
      const sectors = 200
      const differencing = round % 2 === 1
      const crash = await CrashDevice.over(
        await emptyVhd({
          virtualSize: sectors * 512,
          settings: { blockBytes: 4096 },
          ...(differencing ? { backing: { name: 'p.raw', format: 'raw' } } : {}),
        }),
      )
      const layer = (await vhdFormat.open(crash, { write: true })) as WritableImageLayer
      // Per sector: the tags that it may read as at a tick; 0 is absent.
      const history: { tick: number; may: Set<number>[] }[] = []
      let may = Array.from({ length: sectors }, () => new Set([0]))
      let now = Array.from({ length: sectors }, () => 0)
      const note = (): void =>
        void history.push({ tick: crash.clock.now, may: may.map((set) => new Set(set)) })
      note()
      for (let tag = 1; tag < 50; tag++) {
        if (random.below(5) === 0) {
          await layer.flush()
          may = now.map((value) => new Set([value]))
          note()
          continue
        }
        const first = random.below(sectors)
        const count = Math.min(sectors - first, 1 + random.below(30))
        for (let sector = first; sector < first + count; sector++) may[sector]!.add(tag)
        note()
        const bytes = Buffer.concat(
          Array.from({ length: count }, (_, i) => patternAt((first + i) * 512, 512, tag)),
        )
        await layer.write(first * 512, bytes)
        now = now.map((value, sector) => (sector >= first && sector < first + count ? tag : value))
      }
      for (let tick = 0; tick <= crash.clock.now; tick += 1 + random.below(8)) {
        const known = history.findLast((each) => each.tick <= tick)!
        for (const survival of ['none', 'all', random] as const) {
          const content = crash.contentAfterLoss(tick, survival)
          await using found = await vhdFormat.open(new MemoryDevice(content), {})
          const held = await holds(found)
          const bytes = await readBytes(found, 0, found.size)
          for (let sector = 0; sector < sectors; sector++) {
            const absent = !held.has(sector * 512)
            const there = bytes.subarray(sector * 512, sector * 512 + 512)
            const fits = [...known.may[sector]!].some((tag) =>
              tag === 0 ? absent : !absent && Buffer.compare(there, patternAt(sector * 512, 512, tag)) === 0,
            )
            assert.ok(fits, `round ${round}, tick ${tick}, sector ${sector}, seed ${random.seed}`)
          }
        }
      }
    }
  })

  test('many writers at once, flushes in between: nothing is lost', async () => {
    const random = new Random()
    const file = new MemoryDevice(0)
    const layer = await create(file, { virtualSize: 2000 * 512, settings: { blockBytes: 16_384 } })
    const model = new Uint8Array(2000 * 512)
    for (let round = 0; round < 20; round++) {
      const pieces = Array.from({ length: 50 }, (_, i) => ({
        at: i * 40 * 512 + random.below(3) * 100,
        length: random.below(38 * 512),
      }))
      await Promise.all([
        ...pieces.map(async ({ at, length }, i) => {
          const bytes = patternAt(at, length, round * 50 + i + 1)
          model.set(bytes, at)
          if (i % 7 === 3) await layer.flush()
          await layer.write(at, bytes)
        }),
        layer.flush(),
      ])
    }
    same(await readBytes(layer, 0, layer.size), model, `seed ${random.seed}`)
    await layer.flush()
    await using found = await vhdFormat.open(new MemoryDevice(file.bytes.slice()), {})
    same(await readBytes(found, 0, found.size), model, `from the file, seed ${random.seed}`)
    await layer[Symbol.asyncDispose]()
  })

  test('a large disk in order costs no memory for full blocks and little more than its data', async () => {
    await using dir = await tempDir()
    await using layer = await create(await openHostFile(dir.file('a.vhd'), { create: true }), {
      virtualSize: 2040 * 1024 ** 3,
    })
    const bytes = new Uint8Array(MIB).fill(1)
    for (let i = 0; i < 64; i++) await layer.write(1024 ** 4 + i * MIB, bytes)
    await layer.flush()
    const { blocks } = await stat(dir.file('a.vhd'))
    assert.ok(blocks * 512 < 64 * MIB + 6 * MIB, String(blocks * 512))
    assert.equal((await layer.extents(1024 ** 4, 64 * MIB)).length, 32)
  })
})
