/** VHDX against qemu-img; differencing disks, 4096-byte sectors and logs by recipe. */
import assert from 'node:assert/strict'
import { copyFile, readFile, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { type DeviceUnderTest, deviceSuite } from '../../../test/kit/device-suite.ts'
import { must, needs, patternAt, Random, tempDir } from '../../../test/kit/index.ts'
import {
  LOG_GUID,
  type LogWrite,
  logEntry,
  type MadeVhdx,
  makeVhdx,
  putLog,
  sum,
  type VhdxRecipe,
  WRITE_GUID,
} from '../../../test/kit/vhdx-recipe.ts'
import { isVarveError } from '../../base/index.ts'
import { allExtents, type BlockDevice, MemoryDevice, openHostFile, readBytes } from '../../device/index.ts'
import { checkExtents } from '../../extents/index.ts'
import { vhdxFormat } from './index.ts'

const KIB = 1024
const MIB = 1024 * KIB
const PARENT_GUID = '83ed0ec3-24c8-49a6-a959-5e4bf1288bfb'

const failsWith =
  (code: string, words: RegExp) =>
  (error: unknown): boolean => {
    assert.ok(isVarveError(error), String(error))
    assert.equal(error.code, code, error.message)
    assert.match(error.message, words)
    return true
  }

async function agrees(layer: BlockDevice, expected: Uint8Array): Promise<number> {
  assert.equal(layer.size, expected.length)
  const step = 7_777_777
  for (let at = 0; at < expected.length; at += step) {
    const length = Math.min(step, expected.length - at)
    const bytes = await readBytes(layer, at, length)
    assert.equal(Buffer.compare(bytes, expected.subarray(at, at + length)), 0, `bytes from ${at}`)
  }
  let data = 0
  for await (const { kind, at, offset, length } of allExtents(layer)) {
    const truth = expected.subarray(offset, offset + length)
    if (kind !== 'data')
      assert.ok(Buffer.compare(truth, new Uint8Array(length)) === 0, `${kind} at ${offset}`)
    else data += length
    if (!at) continue
    await using file = await openHostFile(at.file.path)
    assert.equal(Buffer.compare(await readBytes(file, at.offset, length), truth), 0, `place of ${offset}`)
  }
  return data
}

const open = (bytes: Uint8Array): ReturnType<typeof vhdxFormat.open> =>
  vhdxFormat.open(new MemoryDevice(bytes), {})

async function qemuImage(
  block: string,
  subformat: string,
): Promise<DeviceUnderTest & { readonly path: string }> {
  const dir = await tempDir()
  const path = dir.file('a.vhdx')
  const expected = new Uint8Array(9 * MIB)
  for (const [start, length] of [
    [0, 4096],
    [MIB - 512, 1024],
    [5 * MIB, MIB],
    [9 * MIB - 512, 512],
  ] as const)
    expected.set(patternAt(start, length), start)
  await writeFile(dir.file('a.raw'), expected)
  const options = `subformat=${subformat},block_size=${block}`
  await must('qemu-img', ['convert', '-q', '-f', 'raw', '-O', 'vhdx', '-o', options, dir.file('a.raw'), path])
  const device = await vhdxFormat.open(await openHostFile(path), {})
  return {
    device,
    expected,
    path,
    async [Symbol.asyncDispose]() {
      await device[Symbol.asyncDispose]()
      await dir[Symbol.asyncDispose]()
    },
  }
}

describe('VHDX against qemu-img', { skip: needs('qemu-img') }, () => {
  for (const [block, subformat] of [
    ['1M', 'dynamic'],
    ['32M', 'dynamic'],
    ['256M', 'dynamic'],
    ['2M', 'fixed'],
  ] as const) {
    test(`reads ${subformat} with blocks of ${block}`, async () => {
      await using image = await qemuImage(block, subformat)
      const head = (await readFile(image.path)).subarray(0, 4096)
      assert.ok(vhdxFormat.probe(head, head))
      const data = await agrees(image.device, image.expected)
      if (block === '1M') assert.ok(data <= 4 * MIB)
    })
  }

  test('a disk with sector bitmap entries in its BAT: data behind the first chunk', async () => {
    await using dir = await tempDir()
    const path = dir.file('a.vhdx')
    await must('qemu-img', ['create', '-q', '-f', 'vhdx', '-o', 'block_size=1M', path, '20G'])
    const writes = [4095, 4096, 4097, 8192, 16_384].flatMap((at) => [
      '-c',
      `write -P ${(at % 250) + 1} ${at}M 64k`,
    ])
    await must('qemu-io', ['-f', 'vhdx', ...writes, path])
    await using layer = await vhdxFormat.open(await openHostFile(path), {})
    for (const at of [4095, 4096, 4097, 8192, 16_384]) {
      const bytes = await readBytes(layer, at * MIB, 64 * KIB)
      assert.ok(
        bytes.every((byte) => byte === (at % 250) + 1),
        `${at} MiB`,
      )
    }
    assert.equal(layer.facts['blocksAllocated'], 5)
  })

  test('a log by recipe is replayed as qemu-img does', async () => {
    await using dir = await tempDir()
    const made = dirty()
    await writeFile(dir.file('a.vhdx'), made.bytes)
    await copyFile(dir.file('a.vhdx'), dir.file('b.vhdx'))
    await must('qemu-img', ['check', '-q', '-r', 'all', '-f', 'vhdx', dir.file('b.vhdx')])
    await must('qemu-img', ['convert', '-f', 'vhdx', '-O', 'raw', dir.file('b.vhdx'), dir.file('b.raw')])
    await using layer = await vhdxFormat.open(await openHostFile(dir.file('a.vhdx')), {})
    assert.equal(layer.facts['logEntriesReplayed'], 2)
    await agrees(layer, await readFile(dir.file('b.raw')))
    await agrees(layer, made.expected)
    assert.equal(
      Buffer.compare(await readFile(dir.file('a.vhdx')), made.bytes),
      0,
      'the original is as it was',
    )
  })
})

deviceSuite('VhdxLayer', () => qemuImage('1M', 'dynamic'), { write: false, skip: needs('qemu-img') })

/** Blocks 0, 2 and 5 of 8; the log takes block 5 away, gives block 6 its place, and wraps around the ring. */
function dirty(options: { readonly lostTail?: boolean } = {}): MadeVhdx {
  const made = makeVhdx({
    size: 8 * MIB,
    blocks: new Map([0, 2, 5].map((block) => [block, 6])),
    logGuid: LOG_GUID,
  })
  const bat = new Uint8Array(made.bytes.subarray(made.batOffset, made.batOffset + 4096))
  const after = Buffer.from(bat)
  after.writeBigUInt64LE(after.readBigUInt64LE(5 * 8), 6 * 8)
  after.writeBigUInt64LE(0n, 5 * 8)
  const sizes = { flushed: made.bytes.length, last: made.bytes.length }
  const start = MIB - 4096
  const first = logEntry(41n, start, [{ offset: made.batOffset, zero: 8192 }], sizes)
  const second = logEntry(42n, start, [{ offset: made.batOffset, data: after }], sizes)
  putLog(made.bytes, start, first, second)
  // What an older sequence left. A newer entry whose tail is gone is no sequence, but qemu-img takes it for one.
  putLog(made.bytes, 64 * KIB, logEntry(7n, 64 * KIB, [{ offset: made.batOffset, zero: 4096 }], sizes))
  if (options.lostTail) {
    putLog(made.bytes, 128 * KIB, logEntry(99n, 7 * 4096, [{ offset: made.batOffset, zero: 4096 }], sizes))
  }
  const expected = made.expected.slice()
  expected.set(expected.subarray(5 * MIB, 6 * MIB), 6 * MIB)
  expected.fill(0, 5 * MIB, 6 * MIB)
  return { ...made, expected }
}

describe('VHDX by recipe', () => {
  test('4096-byte sectors', async () => {
    const blocks = new Map([
      [0, 6],
      [3, 6],
      [4, 2],
    ])
    const made = makeVhdx({ size: 6 * MIB - 4096, sector: 4096, blocks })
    await using layer = await open(made.bytes)
    assert.equal(layer.blockSize, 4096)
    await agrees(layer, made.expected)
  })

  for (const sector of [512, 4096] as const) {
    test(`differencing, sectors of ${sector}: the bitmap decides in partly present blocks alone`, async () => {
      const random = new Random()
      const [size, blockBytes] = [13 * MIB, 2 * MIB]
      const states = [7, 6, 0, 7, 2, 3, 7]
      const present = (number: number): boolean =>
        number % 7 === 0 || (number % 1000 < 40 && number % 2 === 0)
      const made = makeVhdx({
        size,
        blockBytes,
        sector,
        blocks: new Map(states.entries()),
        present,
        parent: {
          parent_linkage: `{${PARENT_GUID}}`,
          absolute_win32_path: '\\\\?\\d:\\vms\\base.vhdx',
          relative_path: '.\\sub\\base.vhdx',
        },
      })
      await using layer = await open(made.bytes)
      await agrees(layer, made.expected)
      const kindAt = (offset: number): string => {
        const state = states[Math.floor(offset / blockBytes)]!
        if (state === 7) return present(Math.floor(offset / sector)) ? 'data' : 'absent'
        return state === 6 ? 'data' : state === 0 ? 'absent' : 'zero'
      }
      for (let i = 0; i < 60; i++) {
        const offset = random.below(size)
        const length = 1 + random.below(Math.min(size - offset, 300_000))
        const list = await layer.extents(offset, length)
        checkExtents(list, offset, length)
        for (const extent of list) {
          for (let at = extent.offset; at < extent.offset + extent.length; at += sector) {
            assert.equal(extent.kind, kindAt(at), `seed ${random.seed}, ${at}`)
          }
        }
        assert.deepEqual(await readBytes(layer, offset, length), made.expected.slice(offset, offset + length))
      }
      assert.equal(layer.id, WRITE_GUID)
      assert.deepEqual(layer.backing, {
        name: 'sub/base.vhdx',
        otherNames: ['d:/vms/base.vhdx', 'base.vhdx'],
        format: 'vhdx',
        id: PARENT_GUID.toUpperCase(),
      })
    })
  }

  test('headers: the newer one that holds counts; equal numbers only when nothing differs', async () => {
    const made = makeVhdx({ size: 2 * MIB, blocks: new Map([[1, 6]]) })
    made.bytes[128 * KIB + 100] = 1
    {
      await using layer = await open(made.bytes)
      await agrees(layer, made.expected)
    }
    const first = made.bytes.subarray(64 * KIB, 68 * KIB)
    first.copy(made.bytes, 128 * KIB)
    {
      await using layer = await open(made.bytes)
      await agrees(layer, made.expected)
    }
    first[48] = 9
    sum(first)
    await assert.rejects(open(made.bytes), failsWith('CORRUPT', /newer/))
    first.fill(0)
    made.bytes.fill(0, 128 * KIB, 132 * KIB)
    await assert.rejects(open(made.bytes), failsWith('CORRUPT', /headers/))
  })

  test('one damaged region table is made up for by the other', async () => {
    const made = makeVhdx({ size: 2 * MIB, blocks: new Map([[1, 6]]) })
    made.bytes[192 * KIB + 20]! ^= 1
    {
      await using layer = await open(made.bytes)
      await agrees(layer, made.expected)
    }
    made.bytes[256 * KIB + 20]! ^= 1
    await assert.rejects(open(made.bytes), failsWith('CORRUPT', /region tables/))
  })

  const recipe: VhdxRecipe = { size: 4 * MIB, blocks: new Map([[1, 6]]) }
  for (const [what, spoil, code, words] of [
    [
      'a block behind the end',
      (m: MadeVhdx) => m.bytes.writeBigUInt64LE((2n ** 40n) | 6n, m.batOffset),
      'CORRUPT',
      /block at/,
    ],
    [
      'a block in the headers',
      (m: MadeVhdx) => m.bytes.writeBigUInt64LE(6n, m.batOffset),
      'CORRUPT',
      /outside/,
    ],
    [
      'a block in the BAT',
      (m: MadeVhdx) => m.bytes.writeBigUInt64LE(BigInt(3 * MIB) | 6n, m.batOffset),
      'CORRUPT',
      /outside/,
    ],
    [
      'a block in the log',
      (m: MadeVhdx) => m.bytes.writeBigUInt64LE(BigInt(MIB) | 6n, m.batOffset),
      'CORRUPT',
      /outside/,
    ],
    ['state 5', (m: MadeVhdx) => m.bytes.writeBigUInt64LE(5n, m.batOffset), 'CORRUPT', /state 5/],
    [
      'partly present without a parent',
      (m: MadeVhdx) => m.bytes.writeBigUInt64LE(7n, m.batOffset),
      'CORRUPT',
      /state 7/,
    ],
    [
      'blocks of 3 MiB',
      (m: MadeVhdx) => m.bytes.writeUInt32LE(3 * MIB, 2 * MIB + 64 * KIB),
      'CORRUPT',
      /power of two/,
    ],
    [
      'a huge disk',
      (m: MadeVhdx) => m.bytes.writeUInt32LE(2 ** 16, 2 * MIB + 64 * KIB + 12),
      'LIMIT',
      /64 TiB/,
    ],
    [
      'a BAT too small',
      (m: MadeVhdx) => m.bytes.writeUInt32LE(64, 2 * MIB + 64 * KIB + 12),
      'CORRUPT',
      /BAT/,
    ],
    [
      'an unknown required item',
      (m: MadeVhdx) => m.bytes.fill(7, 2 * MIB + 64, 2 * MIB + 80),
      'UNSUPPORTED',
      /item/,
    ],
    ['a missing item', (m: MadeVhdx) => m.bytes.writeUInt16LE(4, 2 * MIB + 10), 'CORRUPT', /physical/],
    [
      'two blocks at one place',
      (m: MadeVhdx) => m.bytes.copy(m.bytes, m.batOffset, m.batOffset + 8, m.batOffset + 16),
      'CORRUPT',
      /two blocks/,
    ],
    [
      'a cut file',
      (m: MadeVhdx) => ({ bytes: m.bytes.subarray(0, m.bytes.length - 512) }),
      'CORRUPT',
      /block at/,
    ],
  ] as const) {
    test(`refuses ${what}`, async () => {
      const made = makeVhdx(recipe)
      const result: unknown = spoil(made)
      const bytes = result instanceof Object && 'bytes' in result ? (result.bytes as Buffer) : made.bytes
      await assert.rejects(open(bytes), failsWith(code, words))
    })
  }
})

describe('VHDX log', () => {
  const sizes = { flushed: 0, last: 0 }
  const base = (more: Partial<VhdxRecipe> = {}): MadeVhdx =>
    makeVhdx({ size: 4 * MIB, blocks: new Map([[1, 6]]), logGuid: LOG_GUID, ...more })

  test('the newest whole sequence is replayed, over the end of the ring; an entry without its tail is none', async () => {
    const made = dirty({ lostTail: true })
    await using layer = await open(made.bytes)
    assert.equal(layer.facts['logEntriesReplayed'], 2)
    await agrees(layer, made.expected)
  })

  test('what cannot be replayed is refused', async () => {
    await assert.rejects(open(base().bytes), failsWith('CORRUPT', /sequence of entries/))
    await assert.rejects(open(base({ logVersion: 1 }).bytes), failsWith('UNSUPPORTED', /log version/))
    const short = base()
    putLog(short.bytes, 0, logEntry(1n, 0, [], { flushed: 2 ** 40, last: 0 }))
    await assert.rejects(open(short.bytes), failsWith('CORRUPT', /at least the/))
    for (const at of [8, 100, 4096 + 2000, 4096 + 4092]) {
      const torn = base()
      putLog(torn.bytes, 0, logEntry(1n, 0, [{ offset: torn.batOffset, data: new Uint8Array(4096) }], sizes))
      torn.bytes[MIB + at]! ^= 1
      await assert.rejects(open(torn.bytes), failsWith('CORRUPT', /sequence of entries/))
    }
    const header = base()
    putLog(header.bytes, 0, logEntry(1n, 0, [{ offset: 64 * KIB, zero: 4096 }], sizes))
    await assert.rejects(open(header.bytes), failsWith('CORRUPT', /headers/))
    const huge = base()
    putLog(huge.bytes, 0, logEntry(1n, 0, [{ offset: 16 * MIB, zero: 2 ** 40 }], sizes))
    await assert.rejects(open(huge.bytes), failsWith('LIMIT', /zeroed/))
  })

  test('an entry of many descriptors, and a file that the log makes longer', async () => {
    const made = base()
    const at = made.bytes.length
    const bat = new Uint8Array(made.bytes.subarray(made.batOffset, made.batOffset + 4096))
    Buffer.from(bat.buffer).writeBigUInt64LE(BigInt(at) | 6n, 0)
    const writes: LogWrite[] = [{ offset: made.batOffset, data: bat }]
    for (let i = 0; i < 200; i++) writes.push({ offset: at + i * 4096, data: patternAt(i * 4096, 4096) })
    putLog(made.bytes, 8192, logEntry(5n, 8192, writes, { flushed: at, last: at + MIB }))
    const expected = made.expected.slice()
    expected.set(patternAt(0, 200 * 4096))
    await using layer = await open(made.bytes)
    await agrees(layer, expected)
    assert.equal(made.bytes.length, at)
  })
})

test('VHDX with a few bytes wrong', async () => {
  const random = new Random()
  const diff = makeVhdx({
    size: 4 * MIB,
    blocks: new Map([
      [0, 7],
      [1, 6],
    ]),
    present: (number) => number % 3 === 0,
    parent: { parent_linkage: PARENT_GUID, relative_path: 'p.vhdx' },
  })
  for (const { bytes } of [dirty(), diff]) {
    for (let round = 0; round < 250; round++) {
      const places = [
        64 * KIB,
        128 * KIB,
        192 * KIB,
        256 * KIB,
        MIB,
        2 * MIB - 4096,
        2 * MIB,
        2 * MIB + 64 * KIB,
        3 * MIB,
      ]
      const saved: [number, number][] = []
      for (let i = 0; i <= random.below(4); i++) {
        const at = random.pick(places) + random.below(random.pick([16, 128, 512]))
        saved.push([at, bytes[at]!])
        bytes[at] = random.pick([0, 0xff, random.below(256)])
      }
      // Half of the time the checksums hold.
      if (random.below(2)) for (const at of [64 * KIB, 128 * KIB]) sum(bytes.subarray(at, at + 4096))
      if (random.below(2)) for (const at of [192 * KIB, 256 * KIB]) sum(bytes.subarray(at, at + 64 * KIB))
      const length = random.below(6) === 0 ? random.below(bytes.length) : bytes.length
      try {
        await using layer = await open(bytes.subarray(0, length))
        let read = 0
        for await (const extent of allExtents(layer)) {
          if (extent.kind !== 'data' || (read += extent.length) > 4 * MIB) continue
          await readBytes(layer, extent.offset, Math.min(extent.length, MIB))
        }
      } catch (error) {
        const known = isVarveError(error) && error.code !== 'INTERNAL'
        assert.ok(known, `seed ${random.seed}, round ${round}: ${error instanceof Error ? error.stack : ''}`)
      }
      for (const [at, value] of saved.reverse()) bytes[at] = value
      for (const at of [64 * KIB, 128 * KIB]) sum(bytes.subarray(at, at + 4096))
      for (const at of [192 * KIB, 256 * KIB]) sum(bytes.subarray(at, at + 64 * KIB))
    }
  }
})
