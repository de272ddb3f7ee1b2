import assert from 'node:assert/strict'
import { writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, Random, tempDir } from '../../../test/kit/index.ts'
import { NotTrusted, VarveError } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import { hfsplus } from './index.ts'

interface Recipe {
  readonly blockBytes: number
  readonly blocks: number
  /** Pieces that the allocation file is cut into. */
  readonly pieces?: number
  readonly signature?: 'H+' | 'HX'
  readonly tail?: number
}

interface Made {
  readonly bytes: Uint8Array
  readonly view: DataView
  /** Blocks that are used. */
  readonly used: RangeSet
  readonly bitmapAt: number
}

/**
 * A volume after TN1150: header and its copy, an allocation file, and used blocks at random. No tool of Debian makes
 * one; partclone reads it.
 */
function make({ blockBytes, blocks, pieces = 1, signature = 'H+', tail = 0 }: Recipe, random: Random): Made {
  const bytes = new Uint8Array(blocks * blockBytes + tail)
  const view = new DataView(bytes.buffer)
  const used = new Set<number>()
  const use = (block: number): void => void used.add(block)
  for (let at = 0; at < 1536; at += blockBytes) use(Math.floor(at / blockBytes))
  use(Math.floor(1535 / blockBytes))
  for (let at = blocks * blockBytes - 1024; at < blocks * blockBytes; at += 512)
    use(Math.floor(at / blockBytes))
  const bitmapBlocks = Math.ceil(blocks / 8 / blockBytes)
  const extents: { start: number; blocks: number }[] = []
  for (let left = bitmapBlocks, i = 0; left > 0; i++) {
    const length = i === pieces - 1 ? left : Math.max(1, Math.floor(bitmapBlocks / pieces))
    extents.push({ start: 10 + i * (bitmapBlocks + 5), blocks: length })
    left -= length
  }
  for (const extent of extents) for (let i = 0; i < extent.blocks; i++) use(extent.start + i)
  for (let i = 0; i < 40; i++) {
    const start = random.below(blocks - 20)
    for (let block = start; block < start + 1 + random.below(20); block++) use(block)
  }
  const bitmap = new Uint8Array(bitmapBlocks * blockBytes)
  for (const block of used) bitmap[Math.floor(block / 8)]! |= 0x80 >>> (block % 8)
  let done = 0
  for (const extent of extents) {
    bytes.set(bitmap.subarray(done, done + extent.blocks * blockBytes), extent.start * blockBytes)
    done += extent.blocks * blockBytes
  }
  bytes.set(Buffer.from(signature), 1024)
  view.setUint16(1026, signature === 'H+' ? 4 : 5)
  view.setUint32(1028, 0x100)
  view.setUint32(1024 + 40, blockBytes)
  view.setUint32(1024 + 44, blocks)
  view.setUint32(1024 + 48, blocks - used.size)
  view.setBigUint64(1024 + 104, 0x1122334455667788n)
  view.setBigUint64(1024 + 112, BigInt(bitmap.length))
  view.setUint32(1024 + 124, bitmapBlocks)
  for (const [i, extent] of extents.entries()) {
    view.setUint32(1024 + 128 + i * 8, extent.start)
    view.setUint32(1024 + 132 + i * 8, extent.blocks)
  }
  bytes.copyWithin(blocks * blockBytes - 1024, 1024, 1536)
  const ranges = RangeSet.from([...used].map((block) => ({ start: block, end: block + 1 })))
  return { bytes, view, used: ranges, bitmapAt: extents[0]!.start * blockBytes }
}

async function usedOf(bytes: Uint8Array) {
  const device = new MemoryDevice(bytes)
  assert.equal(await hfsplus.probe(device), true)
  const system = await hfsplus.open(device, {})
  return { system, map: await system.used({}) }
}

const refusal = (reason: string) => (error: unknown) => error instanceof NotTrusted && error.reason === reason

const RECIPES: readonly (Recipe & { readonly name: string })[] = [
  { name: '4 KiB blocks', blockBytes: 4096, blocks: 4000 },
  { name: '512-byte blocks, bitmap in eight extents', blockBytes: 512, blocks: 60_001, pieces: 8 },
  { name: 'HFSX, 8 KiB blocks', blockBytes: 8192, blocks: 1500, signature: 'HX' },
]

describe('HFS+', { concurrency: 3 }, () => {
  for (const { name, ...recipe } of RECIPES) {
    test(`${name}: the set that partclone sees`, { skip: needs('partclone.hfsplus') }, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const { bytes, used } = make(recipe, random)
      const { system, map } = await usedOf(bytes)
      assert.deepEqual(
        [system.kind, system.uuid, system.blockBytes],
        ['hfsplus', '1122334455667788', recipe.blockBytes],
      )
      assert.deepEqual([map.trust, map.state], ['exact', 'clean'])
      assert.ok(map.ranges.equals(used.scale(recipe.blockBytes)), `seed ${random.seed}`)
      const image = dir.file('image')
      await writeFile(image, bytes)
      const text = await must('partclone.hfsplus', ['-D', '-s', image, '-O', '-', '-L', '/dev/null', '-q'])
      const judged = [...text.matchAll(/^0x([0-9A-F]+)\s+0x([0-9A-F]+)\s+\+/gim)].map(([, at, length]) => ({
        start: Number.parseInt(at!, 16),
        end: Number.parseInt(at!, 16) + Number.parseInt(length!, 16),
      }))
      assert.ok(judged.length > 3)
      assert.ok(
        RangeSet.from(judged).equals(map.ranges),
        `seed ${random.seed}: ${String(RangeSet.from(judged))} is not ${String(map.ranges)}`,
      )
    })
  }

  test('the ends are in use whatever the bitmap says, and so is the tail', async () => {
    const { bytes } = make({ blockBytes: 512, blocks: 9000, tail: 3000 }, new Random(1))
    const { map } = await usedOf(bytes)
    assert.ok(map.ranges.covers(0, 1536))
    assert.ok(map.ranges.covers(9000 * 512 - 1024, bytes.length))
  })

  test('a volume that was not unmounted is not trusted, but with an empty journal', async () => {
    const { bytes, view } = make({ blockBytes: 4096, blocks: 4000 }, new Random(2))
    view.setUint32(1028, 0)
    await assert.rejects(usedOf(bytes), refusal('hfsplus-dirty'))
    view.setUint32(1028, 0x900)
    await assert.rejects(usedOf(bytes), refusal('hfsplus-dirty'))
    // Journal info in block 1, the journal in block 2.
    view.setUint32(1028, 0x2000)
    view.setUint32(1024 + 12, 1)
    await assert.rejects(usedOf(bytes), refusal('hfsplus-journal'), 'on another device')
    view.setUint32(4096, 5)
    assert.equal((await usedOf(bytes)).map.state, 'journal empty')
    view.setUint32(4096, 1)
    view.setBigUint64(4096 + 36, 8192n)
    await assert.rejects(usedOf(bytes), refusal('hfsplus-journal'), 'no header')
    for (const little of [false, true]) {
      view.setUint32(8192, 0x4a4e4c78, little)
      view.setUint32(8196, 0x12345678, little)
      view.setBigUint64(8200, 512n, little)
      view.setBigUint64(8208, 512n, little)
      assert.equal((await usedOf(bytes)).map.state, 'journal empty')
      view.setBigUint64(8208, 1024n, little)
      await assert.rejects(usedOf(bytes), refusal('hfsplus-journal-not-empty'))
      // Cleanly unmounted, yet with a journal that is not empty: somebody did not replay it.
      view.setUint32(1028, 0x2100)
      await assert.rejects(usedOf(bytes), refusal('hfsplus-journal-not-empty'))
      view.setUint32(1028, 0x2000)
    }
    for (const at of [BigInt(bytes.length), 2n ** 63n]) {
      view.setBigUint64(4096 + 36, at)
      await assert.rejects(usedOf(bytes), refusal('hfsplus-journal'))
    }
    view.setUint32(1024 + 12, 0xffffffff)
    await assert.rejects(usedOf(bytes), refusal('hfsplus-journal'))
  })

  test('damage is refused: a bit of the bitmap, extents that leave, fields at their extremes, cut volumes', async () => {
    const { bytes, view, bitmapAt } = make({ blockBytes: 4096, blocks: 4000 }, new Random(3))
    const good = bytes.slice()
    bytes[bitmapAt + 200]! ^= 1
    await assert.rejects(usedOf(bytes), refusal('hfsplus-bitmap'))
    bytes.set(good)
    // Its own block freed, and the count made right.
    bytes[bitmapAt + 1]! &= ~(0x80 >>> 2)
    view.setUint32(1024 + 48, view.getUint32(1024 + 48) + 1)
    await assert.rejects(usedOf(bytes), refusal('hfsplus-bitmap'))
    for (const [at, values] of [
      [40, [0, 1, 511, 513, 2 ** 31, 0xffffffff]],
      [44, [0, 4001, 0xffffffff]],
      [48, [4001, 0xffffffff]],
      [116, [0, 100]],
      [128, [4000, 0xffffffff]],
      [132, [0, 0xffffffff]],
    ] as const) {
      for (const value of values) {
        bytes.set(good)
        view.setUint32(1024 + at, value)
        await assert.rejects(
          usedOf(bytes),
          (error) => error instanceof VarveError && error.code !== 'INTERNAL',
          `${value} at ${at}`,
        )
      }
    }
    for (const length of [1536, 10_000, good.length - 1]) {
      await assert.rejects(usedOf(good.slice(0, length)), refusal('hfsplus-size-mismatch'))
    }
    assert.equal(await hfsplus.probe(new MemoryDevice(good.slice(0, 1535))), false)
  })
})
