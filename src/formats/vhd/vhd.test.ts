import assert from 'node:assert/strict'
import { writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, patternAt, Random, tempDir } from '../../../test/kit/index.ts'
import {
  type MadeVhd,
  makeVhd,
  RECIPE_UUID,
  sumInto,
  tapLocators,
  type VhdRecipe,
} from '../../../test/kit/vhd-recipe.ts'
import { isVarveError } from '../../base/index.ts'
import { allExtents, MemoryDevice, openHostFile, readBytes } from '../../device/index.ts'
import { checkExtents, RangeSet } from '../../extents/index.ts'
import type { ImageLayer } from '../image-format.ts'
import { vhdFormat } from './index.ts'

const MIB = 1024 * 1024

async function open(made: MadeVhd | Uint8Array): Promise<ImageLayer> {
  return await vhdFormat.open(new MemoryDevice(new Uint8Array('bytes' in made ? made.bytes : made)), {})
}

async function holds(layer: ImageLayer): Promise<RangeSet> {
  const ranges = []
  for await (const { offset, length, kind } of allExtents(layer)) {
    if (kind === 'data') ranges.push({ start: offset, end: offset + length })
  }
  return RangeSet.from(ranges)
}

function sectors(numbers: Iterable<number>, tag = 1): Map<number, Uint8Array> {
  return new Map(Array.from(numbers, (number) => [number, patternAt(number * 512, 512, tag)]))
}

function span(start: number, end: number): number[] {
  return Array.from({ length: end - start }, (_, i) => start + i)
}

const failsWith =
  (code: string, words: RegExp) =>
  (error: unknown): boolean => {
    assert.ok(isVarveError(error), String(error))
    assert.equal(error.code, code, error.message)
    assert.match(error.message, words)
    return true
  }

describe('VHD against qemu-img', { skip: needs('qemu-img', 'qemu-io') }, () => {
  for (const [name, options] of [
    ['dynamic', []],
    ['dynamic with force_size', ['-o', 'force_size=on']],
    ['fixed', ['-o', 'subformat=fixed']],
    ['fixed with force_size', ['-o', 'subformat=fixed,force_size=on']],
  ] as const) {
    test(`reads ${name} as qemu does, size and content`, async () => {
      await using dir = await tempDir()
      // 10 MiB is no whole number of cylinders: geometry and size field differ in the making.
      await must('qemu-img', ['create', '-q', '-f', 'vpc', ...options, dir.file('a.vhd'), '10M'])
      await must('qemu-io', [
        '-f',
        'vpc',
        '-c',
        'write -P 0x11 0 4k',
        '-c',
        'write -P 0x22 2093056 8k',
        '-c',
        'write -P 0x33 9M 1M',
        dir.file('a.vhd'),
      ])
      await must('qemu-img', ['convert', '-f', 'vpc', '-O', 'raw', dir.file('a.vhd'), dir.file('a.raw')])
      await using expected = await openHostFile(dir.file('a.raw'))
      await using layer = await vhdFormat.open(await openHostFile(dir.file('a.vhd')), {})
      assert.equal(layer.size, expected.size)
      assert.deepEqual(await readBytes(layer, 0, layer.size), await readBytes(expected, 0, expected.size))
      for await (const { kind, at, offset, length } of allExtents(layer)) {
        if (kind !== 'data') continue
        assert.ok(at, 'data of a host file has its place')
        const verbatim = new Uint8Array(length)
        await using file = await openHostFile(at.file.path)
        await file.read(at.offset, verbatim)
        assert.deepEqual(verbatim, await readBytes(expected, offset, length))
      }
    })
  }
})

test('the size of each known creator is qemu’s', { skip: needs('qemu-img') }, async () => {
  await using dir = await tempDir()
  for (const geometry of [
    [15, 4, 17],
    [65_535, 16, 255],
  ] as const) {
    for (const creator of ['vpc ', 'qemu', 'qem2', 'win ', 'd2v ', 'tap\0', 'CTXS']) {
      const made = makeVhd({ type: 'dynamic', size: MIB, creator, geometry, sectors: sectors([1, 2, 3]) })
      await writeFile(dir.file('a.vhd'), made.bytes)
      const info = JSON.parse(
        await must('qemu-img', ['info', '-f', 'vpc', '--output=json', dir.file('a.vhd')]),
      ) as { 'virtual-size': number }
      await using layer = await open(made)
      assert.equal(layer.size, info['virtual-size'], creator)
    }
  }
})

describe('VHD sector bitmaps', () => {
  test('read() takes the sectors with a set bit, zeros for the rest, whatever stands there', async () => {
    const made = makeVhd({ type: 'dynamic', size: 6 * MIB, sectors: sectors([0, 7, 8, 4095, 8191, 8192]) })
    await using layer = await open(made)
    const all = await readBytes(layer, 0, layer.size)
    const expected = new Uint8Array(6 * MIB)
    for (const [sector, bytes] of sectors([0, 7, 8, 4095, 8191, 8192])) expected.set(bytes, sector * 512)
    assert.ok(Buffer.compare(all, expected) === 0)
    assert.equal(
      String(await holds(layer)),
      String(RangeSet.from([0, 7, 8, 4095, 8191, 8192].map((n) => ({ start: n * 512, end: n * 512 + 512 })))),
    )
  })

  test('read() and extents() inside a sector and across blocks', async () => {
    const made = makeVhd({ type: 'dynamic', size: 4 * MIB, sectors: sectors(span(4090, 4100)) })
    await using layer = await open(made)
    const bytes = await readBytes(layer, 4090 * 512 + 100, 9 * 512)
    assert.deepEqual(bytes, patternAt(4090 * 512 + 100, 9 * 512))
    const list = await layer.extents(4089 * 512 + 5, 1024)
    checkExtents(list, 4089 * 512 + 5, 1024)
    assert.deepEqual(
      list.map(({ length, kind }) => [length, kind]),
      [
        [507, 'absent'],
        [517, 'data'],
      ],
    )
  })

  test('an allocated block with an empty bitmap is absent', async () => {
    await using layer = await open(makeVhd({ type: 'dynamic', size: 4 * MIB, emptyBlocks: [0, 1] }))
    assert.ok((await holds(layer)).isEmpty)
    assert.deepEqual(await readBytes(layer, 0, 4 * MIB), new Uint8Array(4 * MIB))
  })

  test('a size that ends inside a block, small blocks, blocks out of order', async () => {
    for (const blockBytes of [512, 4096, 65_536, 4 * MIB]) {
      const size = 4 * MIB + 512 * 3
      const numbers = [1, 2, 3, 1000, 8191, 8192, 8194]
      const order = (list: number[]): number[] => list.sort((a, b) => b - a)
      await using layer = await open(
        makeVhd({ type: 'dynamic', size, blockBytes, sectors: sectors(numbers), order }),
      )
      const expected = new Uint8Array(size)
      for (const [sector, bytes] of sectors(numbers)) expected.set(bytes, sector * 512)
      assert.ok(Buffer.compare(await readBytes(layer, 0, size), expected) === 0, `blocks of ${blockBytes}`)
      assert.equal((await holds(layer)).size, numbers.length * 512)
    }
  })

  test('random ranges agree with a model, cold and warm', async () => {
    const random = new Random()
    for (let round = 0; round < 30; round++) {
      const blockBytes = random.pick([4096, 65_536])
      const total = random.below(600) + 1
      const numbers = span(0, total).filter(() => random.below(3) > 0)
      const recipe: VhdRecipe = {
        type: random.pick(['dynamic', 'differencing']),
        size: total * 512,
        blockBytes,
        sectors: sectors(numbers, round + 1),
        parentName: 'p.vhd',
        ...(random.below(2) ? { batmap: random.pick([0x10001, 0x10002]) } : {}),
      }
      const made = makeVhd(recipe)
      const model = new Uint8Array(recipe.size)
      for (const [sector, bytes] of recipe.sectors!) model.set(bytes, sector * 512)
      await using layer = await open(made)
      for (let i = 0; i < 20; i++) {
        const offset = random.below(recipe.size)
        const length = 1 + random.below(recipe.size - offset)
        assert.deepEqual(
          await readBytes(layer, offset, length),
          model.slice(offset, offset + length),
          `seed ${random.seed}`,
        )
        const list = await layer.extents(offset, length)
        checkExtents(list, offset, length)
        for (const extent of list) {
          for (let at = extent.offset; at < extent.offset + extent.length; at += 512) {
            assert.equal(
              extent.kind === 'data',
              recipe.sectors!.has(Math.floor(at / 512)),
              `seed ${random.seed}`,
            )
          }
        }
      }
    }
  })
})

describe('VHD footers', () => {
  const recipe: VhdRecipe = { type: 'dynamic', size: 4 * MIB, sectors: sectors([3]) }
  for (const [footer, which] of [
    ['whole', 'primary'],
    ['short', 'short'],
    ['killed', 'copy'],
    ['missing', 'copy'],
  ] as const) {
    test(`opens with a ${footer} primary footer`, async () => {
      const made = makeVhd({ ...recipe, footer })
      assert.ok(vhdFormat.probe(made.bytes.subarray(0, 4096), made.bytes.subarray(-4096)))
      await using layer = await open(made)
      assert.equal(layer.facts['footer'], which)
      assert.equal(layer.size, 4 * MIB)
      assert.deepEqual(await readBytes(layer, 1536, 512), patternAt(1536, 512))
    })
  }

  test('opens when the copy is broken and the primary holds', async () => {
    const made = makeVhd(recipe)
    made.bytes.fill(0, 0, 512)
    assert.ok(vhdFormat.probe(made.bytes.subarray(0, 4096), made.bytes.subarray(-4096)))
    await using layer = await open(made)
    assert.equal(layer.facts['footer'], 'primary')
  })

  test('refuses a poisoned one and says what to do', async () => {
    const made = makeVhd({ ...recipe, footer: 'poisoned' })
    await assert.rejects(open(made), failsWith('CORRUPT', /unfinished resize/))
  })

  test('refuses a file without any', async () => {
    const made = makeVhd({ ...recipe, footer: 'killed' })
    made.bytes[20] = 1
    await assert.rejects(open(made), failsWith('CORRUPT', /no valid footer.*checksum/))
    await assert.rejects(open(new Uint8Array(100)), failsWith('CORRUPT', /no valid footer/))
  })

  test('a fixed disk has no copy: sector 0 is the guest’s', async () => {
    const data = makeVhd({ ...recipe, footer: 'killed' }).bytes
    const footer = Buffer.from(data.subarray(0, 512))
    footer.writeUInt32BE(2, 60)
    footer.writeBigUInt64BE(0xffffffffffffffffn, 16)
    footer.writeBigUInt64BE(BigInt(data.length), 48)
    sumInto(footer, 64)
    await using layer = await open(new Uint8Array(Buffer.concat([data, footer])))
    assert.equal(layer.facts['type'], 'fixed')
    assert.equal(layer.size, data.length)
    assert.deepEqual(Buffer.from(await readBytes(layer, 0, data.length)), data)
    await assert.rejects(
      open(new Uint8Array(Buffer.concat([footer, data]))),
      failsWith('CORRUPT', /no footer at its end/),
    )
  })

  test('a fixed disk cut short is refused', async () => {
    const footer = Buffer.from(makeVhd(recipe).bytes.subarray(0, 512))
    footer.writeUInt32BE(2, 60)
    sumInto(footer, 64)
    await assert.rejects(
      open(new Uint8Array(Buffer.concat([Buffer.alloc(MIB), footer]))),
      failsWith('CORRUPT', /disk size/),
    )
  })

  test('tap 1.1 summed without `hidden` and keeps it in the copy', async () => {
    const made = makeVhd({ ...recipe, creatorVersion: 0x10001, hidden: false })
    made.bytes[85] = 1 // the copy, summed with hidden = 0
    await using layer = await open(made)
    assert.equal(layer.facts['hidden'], true)
  })

  test('tap 0.1 is refused by code', async () => {
    await assert.rejects(
      open(makeVhd({ ...recipe, creatorVersion: 1 })),
      failsWith('UNSUPPORTED', /tap 0\.1/),
    )
  })

  test('the size is the geometry’s for Virtual PC and qemu, the size field’s for others', async () => {
    const geometry = [15, 4, 17] as const // 522,240 bytes
    for (const [creator, size] of [
      ['vpc ', 522_240],
      ['qemu', 522_240],
      ['qem2', MIB],
      ['win ', MIB],
      ['d2v ', MIB],
      ['tap\0', MIB],
      ['CTXS', MIB],
      ['vbox', MIB],
    ] as const) {
      await using layer = await open(makeVhd({ type: 'dynamic', size: MIB, creator, geometry }))
      assert.equal(layer.size, size, creator)
    }
    await using capped = await open(makeVhd({ type: 'dynamic', size: MIB, creator: 'qemu' }))
    assert.equal(capped.size, MIB, 'a geometry at its cap says nothing')
    await using larger = await open(
      makeVhd({ type: 'dynamic', size: MIB, creator: 'vpc ', geometry: [1000, 16, 63] }),
    )
    assert.equal(larger.size, MIB, 'a geometry that the table cannot hold is not believed')
  })
})

describe('VHD batmap', () => {
  test('a set bit stands for a full bitmap; absent for creators other than tap', async () => {
    const base: VhdRecipe = {
      type: 'dynamic',
      size: 8 * MIB,
      batmap: 0x10002,
      sectors: sectors(span(0, 4096)),
    }
    const made = makeVhd(base)
    // Bitmaps wiped: who still sees data went by the batmap.
    made.bytes.fill(0, made.placed.get(0)! * 512, made.placed.get(0)! * 512 + 512)
    await using layer = await open(made)
    assert.equal(layer.facts['batmap'], true)
    assert.equal((await holds(layer)).size, 2 * MIB)
    for (const creator of ['vpc ', 'win ', 'qemu']) {
      const other = makeVhd({ ...base, creator })
      other.bytes.fill(0, other.placed.get(0)! * 512, other.placed.get(0)! * 512 + 512)
      await using layer = await open(other)
      assert.equal(layer.facts['batmap'], false)
      assert.ok((await holds(layer)).isEmpty)
    }
  })

  test('a wrong checksum, an odd place or none: the bitmaps decide', async () => {
    for (const spoil of [
      (made: MadeVhd) => made.bytes.writeUInt32BE(1, made.batmapOffset! + 24),
      (made: MadeVhd) => made.bytes.writeBigUInt64BE(2n ** 60n, made.batmapOffset! + 8),
      (made: MadeVhd) => made.bytes.writeBigUInt64BE(BigInt(made.bytes.length), made.batmapOffset! + 8),
      (made: MadeVhd) => made.bytes.writeUInt32BE(0, made.batmapOffset! + 16),
      (made: MadeVhd) => made.bytes.fill(0, made.batmapOffset, made.batmapOffset! + 512),
    ]) {
      const made = makeVhd({
        type: 'dynamic',
        size: 8 * MIB,
        batmap: 0x10002,
        batmapExtra: [0],
        sectors: sectors([5]),
      })
      spoil(made)
      await using layer = await open(made)
      assert.equal((await holds(layer)).size, 512)
    }
  })

  test('version 1.1 sums signed bytes', async () => {
    const made = makeVhd({
      type: 'dynamic',
      size: 8 * MIB,
      creatorVersion: 0x10002,
      batmap: 0x10001,
      sectors: sectors(span(0, 4096)),
    })
    await using layer = await open(made)
    assert.equal(layer.facts['batmap'], true)
  })

  test('bits outside of what libvhd sums (8 GiB * k + 2…14 MiB) count as clear', async () => {
    // 8194 MiB: 4097 blocks, of which libvhd's map covers 4096.
    const made = makeVhd({
      type: 'dynamic',
      size: 8194 * MIB,
      batmap: 0x10002,
      sectors: sectors([4096 * 4096 + 9]),
    })
    const map = made.batmapOffset! + 512
    made.bytes[map + 512] = 0x80
    await using layer = await open(made)
    assert.equal(layer.facts['batmap'], true)
    assert.equal(
      String(await holds(layer)),
      String(RangeSet.of((4096 * 4096 + 9) * 512, (4096 * 4096 + 10) * 512)),
    )
  })

  test('an encrypted disk is refused', async () => {
    const made = makeVhd({ type: 'dynamic', size: 8 * MIB, batmap: 0x10002 })
    made.bytes[made.batmapOffset! + 29] = 1
    await assert.rejects(open(made), failsWith('ENCRYPTED', /key/))
  })
})

describe('VHD parents', () => {
  const diff: VhdRecipe = {
    type: 'differencing',
    size: 4 * MIB,
    parentUuid: RECIPE_UUID,
    parentName: 'base.vhd',
  }

  test('locators come in their order, then the name', async () => {
    await using layer = await open(makeVhd({ ...diff, locators: tapLocators('sub/other.vhd') }))
    assert.deepEqual(layer.backing, {
      name: 'sub/other.vhd',
      otherNames: ['base.vhd'],
      format: 'vhd',
      id: RECIPE_UUID,
    })
  })

  test('only W2ru, space in sectors', async () => {
    const data = Buffer.from('.\\base.vhd', 'utf16le')
    await using layer = await open(
      makeVhd({ ...diff, parentName: '', locators: [{ code: 'W2ru', data, spaceField: 1 }] }),
    )
    assert.equal(layer.backing?.name, 'base.vhd')
  })

  test('a null uuid says that the parent is raw', async () => {
    await using layer = await open(makeVhd({ type: 'differencing', size: 4 * MIB, parentName: 'base.raw' }))
    assert.deepEqual(layer.backing, { name: 'base.raw', otherNames: [], format: 'raw' })
  })

  test('locators that are no text or lie outside the file are passed over', async () => {
    const name = Buffer.from('.\\x.vhd', 'utf16le')
    await using layer = await open(
      makeVhd({
        ...diff,
        locators: [
          { code: 'W2ku', data: Buffer.from([0x00, 0xd8, 0x41, 0x00]) }, // half of a surrogate pair
          { code: 'W2ru', data: name, lengthField: 3 },
          { code: 'MacX', data: Buffer.from([0x66, 0x69, 0x6c, 0x65, 0x3a, 0x2f, 0x2f, 0xff, 0xfe]) },
          { code: 'W2ku', data: name, offset: 2 ** 40 },
          { code: 'W2ru', data: name, spaceField: 700 },
          { code: 'W2ru', data: name, lengthField: 0xffffffff },
          { code: 'Wi2k', data: name },
          { code: 'MacX', data: Buffer.from('file://./a\nb') },
        ],
      }),
    )
    assert.equal(layer.backing?.name, 'base.vhd')
    assert.deepEqual(layer.backing?.otherNames, [])
  })

  test('a disk that names no parent at all is corrupt', async () => {
    await assert.rejects(
      open(makeVhd({ ...diff, parentName: '' })),
      failsWith('CORRUPT', /no locator and no name/),
    )
  })
})

describe('hostile VHD', () => {
  const base: VhdRecipe = { type: 'dynamic', size: 8 * MIB, sectors: sectors([0, 4096]) }

  const cases: readonly (readonly [string, string, RegExp, (made: MadeVhd) => void])[] = [
    [
      'table entry past the end',
      'CORRUPT',
      /block 1/,
      (m) => m.bytes.writeUInt32BE(0xfffffffe, m.tableOffset + 4),
    ],
    [
      'table entry at the footer',
      'CORRUPT',
      /block 0/,
      (m) => m.bytes.writeUInt32BE(m.bytes.length / 512 - 1, m.tableOffset),
    ],
    [
      'table entry in the headers',
      'CORRUPT',
      /dynamic header/,
      (m) => m.bytes.writeUInt32BE(1, m.tableOffset),
    ],
    ['table entry 0', 'CORRUPT', /footer copy/, (m) => m.bytes.writeUInt32BE(0, m.tableOffset)],
  ]
  for (const [name, code, words, spoil] of cases) {
    test(`${name} is refused`, async () => {
      const made = makeVhd(base)
      spoil(made)
      await assert.rejects(open(made), failsWith(code, words))
    })
  }

  const headers: readonly (readonly [string, string, (header: Buffer) => void])[] = [
    ['block size 0', 'CORRUPT', (h) => h.writeUInt32BE(0, 32)],
    ['block size not a power of two', 'CORRUPT', (h) => h.writeUInt32BE(3 * MIB, 32)],
    ['block size 2 GiB', 'CORRUPT', (h) => h.writeUInt32BE(0x80000000, 32)],
    ['table offset past the end', 'CORRUPT', (h) => h.writeBigUInt64BE(2n ** 50n, 16)],
    ['table offset above 2^53', 'CORRUPT', (h) => h.writeBigUInt64BE(2n ** 63n, 16)],
    ['table too small', 'CORRUPT', (h) => h.writeUInt32BE(1, 28)],
    ['header version', 'CORRUPT', (h) => h.writeUInt32BE(0x20000, 24)],
    ['data offset', 'CORRUPT', (h) => h.writeUInt32BE(0, 8)],
  ]
  for (const [name, code, spoil] of headers) {
    test(`${name} is refused`, async () => {
      const made = makeVhd(base)
      const header = made.bytes.subarray(512, 1536)
      spoil(header)
      sumInto(header, 36)
      await assert.rejects(open(made), failsWith(code, /./))
    })
  }

  test('a size of 2^62 with a table to match is refused before anything is allocated', async () => {
    const made = makeVhd(base)
    for (const at of [0, made.bytes.length - 512]) {
      const footer = made.bytes.subarray(at, at + 512)
      footer.writeBigUInt64BE(2n ** 52n, 48)
      sumInto(footer, 64)
    }
    const header = made.bytes.subarray(512, 1536)
    header.writeUInt32BE(0xffffffff, 28)
    sumInto(header, 36)
    await assert.rejects(open(made), failsWith('LIMIT', /table/))
  })

  test('header offset past the end or into nowhere', async () => {
    for (const offset of [2n ** 40n, 2n ** 63n, 0n]) {
      const made = makeVhd(base)
      for (const at of [0, made.bytes.length - 512]) {
        const footer = made.bytes.subarray(at, at + 512)
        footer.writeBigUInt64BE(offset, 16)
        sumInto(footer, 64)
      }
      await assert.rejects(open(made), failsWith('CORRUPT', /./))
    }
  })

  test('data that the bitmap claims past the end is an error, what it does not claim is none', async () => {
    const made = makeVhd({ ...base, sectors: sectors([4096, 4100]), footer: 'missing' })
    // The writer died: the file ends two sectors behind the last one that the bitmap claims.
    const data = made.placed.get(1)! * 512 + 512
    await using layer = await open(new Uint8Array(made.bytes.subarray(0, data + 5 * 512)))
    assert.equal((await holds(layer)).size, 1024)
    await using shorter = await open(new Uint8Array(made.bytes.subarray(0, data + 4 * 512 + 100)))
    await assert.rejects(readBytes(shorter, 2 * MIB, 2 * MIB), failsWith('CORRUPT', /block 1/))
    await assert.rejects(shorter.extents(2 * MIB, 2 * MIB), failsWith('CORRUPT', /block 1/))
    assert.deepEqual(await readBytes(shorter, 0, 2 * MIB), new Uint8Array(2 * MIB), 'other blocks still read')
  })

  test('truncated anywhere: one error or an honest disk', async () => {
    const made = makeVhd({
      ...base,
      size: 512 * 64,
      blockBytes: 4096,
      sectors: sectors([1, 9, 40]),
      batmap: 0x10002,
    })
    for (let length = 0; length < made.bytes.length; length += 256) {
      try {
        await using layer = await open(new Uint8Array(made.bytes.subarray(0, length)))
        await readBytes(layer, 0, layer.size)
      } catch (error) {
        assert.ok(isVarveError(error, 'CORRUPT', 'LIMIT', 'UNSUPPORTED'), String(error))
      }
    }
  })

  test('random bytes over the metadata: one error or an honest disk', async () => {
    const random = new Random()
    for (let round = 0; round < 400; round++) {
      const made = makeVhd({
        type: 'differencing',
        size: 512 * 200,
        blockBytes: 4096,
        batmap: 0x10002,
        parentName: 'p.vhd',
        locators: tapLocators('p.vhd'),
        sectors: sectors([1, 9, 40, 120]),
      })
      for (let i = 0; i <= random.below(6); i++) made.bytes[random.below(8192)] = random.below(256)
      const [footer, header] = [made.bytes.subarray(-512), made.bytes.subarray(512, 1536)]
      if (random.below(2)) footer[random.below(90)] = random.below(256)
      sumInto(footer, 64)
      sumInto(header, 36)
      try {
        await using layer = await open(made)
        await readBytes(layer, 0, Math.min(layer.size, MIB))
      } catch (error) {
        assert.ok(isVarveError(error) && error.code !== 'INTERNAL', `seed ${random.seed}: ${String(error)}`)
      }
    }
  })
})

test('extents of 8,000 blocks far apart are read in bulk', {
  skip: process.platform !== 'linux',
}, async () => {
  await using dir = await tempDir()
  await makeLarge(dir.file('large.vhd'), { blocks: 80_000, allocated: 8000 })
  const file = await openHostFile(dir.file('large.vhd'))
  await using layer = await vhdFormat.open(file, {})
  file.advise('dontneed')
  const started = performance.now()
  let count = 0
  for await (const { kind } of allExtents(layer)) if (kind === 'data') count++
  const seconds = (performance.now() - started) / 1000
  assert.equal(count, 8000)
  // 0.1 s on a quiet machine; a loaded one gets some room, one read after another would not fit.
  assert.ok(seconds < 2, `took ${seconds} s`)
})

/** A sparse VHD on disk: header and table from the recipe, every tenth block with the bitmap's first byte set. */
async function makeLarge(
  path: string,
  { blocks, allocated }: { blocks: number; allocated: number },
): Promise<void> {
  const made = makeVhd({ type: 'dynamic', size: blocks * 2 * MIB })
  const head = made.bytes.subarray(0, made.bytes.length - 512)
  await using file = await openHostFile(path, { create: true })
  const first = Math.ceil(head.length / 4096) * 8 + 7
  await file.resize((first + allocated * 4104) * 512 + 512)
  for (let i = 0; i < allocated; i++) {
    head.writeUInt32BE(first + i * 4104, made.tableOffset + Math.floor((i * blocks) / allocated) * 4)
  }
  await file.write(0, head)
  const bits = Uint8Array.of(0xff)
  for (let i = 0; i < allocated; i += 64) {
    await Promise.all(
      span(i, Math.min(i + 64, allocated)).map((each) => file.write((first + each * 4104) * 512, bits)),
    )
  }
  await file.write(file.size - 512, made.bytes.subarray(-512))
  await file.flush()
}
