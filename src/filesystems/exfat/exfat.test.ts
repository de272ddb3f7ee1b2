import assert from 'node:assert/strict'
import { readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, Random, tempDir } from '../../../test/kit/index.ts'
import { NotTrusted, VarveError } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import { exfat } from './index.ts'

const KIB = 1024

/** Fields of the boot sector, by hand: the tests must not lean on the reader's own decoding. */
class Volume {
  readonly bytes: Uint8Array
  readonly view: DataView

  constructor(bytes: Uint8Array) {
    this.bytes = bytes
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  }
  get sectorBytes(): number {
    return 2 ** this.bytes[108]!
  }
  get clusterBytes(): number {
    return 2 ** (this.bytes[108]! + this.bytes[109]!)
  }
  get fat(): number {
    return this.view.getUint32(80, true) * this.sectorBytes
  }
  get heap(): number {
    return this.view.getUint32(88, true) * this.sectorBytes
  }
  get clusters(): number {
    return this.view.getUint32(92, true)
  }
  get root(): number {
    return this.at(this.view.getUint32(96, true))
  }
  at(cluster: number): number {
    return this.heap + (cluster - 2) * this.clusterBytes
  }
  /** Root directory entry of `type`; its offset. */
  entry(type: number): number {
    let at = this.root
    while (this.bytes[at] !== type) {
      assert.notEqual(this.bytes[at], 0, `no entry of type ${type}`)
      at += 32
    }
    return at
  }
  get bitmap(): number {
    return this.at(this.view.getUint32(this.entry(0x81) + 20, true))
  }
  isFree(cluster: number): boolean {
    return (this.bytes[this.bitmap + Math.floor((cluster - 2) / 8)]! & (1 << ((cluster - 2) % 8))) === 0
  }
  /** Makes the boot checksum right again, in both boot regions. */
  seal(): void {
    const { sectorBytes, bytes, view } = this
    let sum = 0
    for (let at = 0; at < 11 * sectorBytes; at++) {
      if (at === 106 || at === 107 || at === 112) continue
      sum = ((sum & 1) * 2 ** 31 + Math.floor(sum / 2) + bytes[at]!) % 2 ** 32
    }
    for (let at = 11 * sectorBytes; at < 12 * sectorBytes; at += 4) view.setUint32(at, sum, true)
    bytes.copyWithin(12 * sectorBytes, 0, 12 * sectorBytes)
  }
}

async function format(bytes: number, args: readonly string[]): Promise<Volume> {
  await using dir = await tempDir()
  const image = dir.file('image')
  await writeFile(image, '')
  await truncate(image, bytes)
  await must('mkfs.exfat', ['-L', 'größe', ...args, image])
  return new Volume(new Uint8Array(await readFile(image)))
}

/**
 * Puts files of scattered clusters into the root directory, as a driver writes them: entry sets with checksums and
 * name hashes, chains in the FAT or contiguous without, bits in the bitmap. Returns where their content lies.
 */
function addFiles(volume: Volume, random: Random): RangeSet {
  const { bytes, view, clusterBytes } = volume
  const free: number[] = []
  for (let cluster = 2; cluster < volume.clusters + 2; cluster++)
    if (volume.isFree(cluster)) free.push(cluster)
  const content = []
  let slot = volume.root
  while (bytes[slot] !== 0) slot += 32
  const end = volume.root + clusterBytes
  for (let file = 0; file < 12 && slot + 4 * 32 <= end; file++) {
    const contiguous = random.below(2) === 0
    const length = 1 + random.below(6)
    const from = random.below(free.length - 2 * length)
    const chain = contiguous
      ? free.splice(from, length)
      : Array.from({ length }, () => free.splice(random.below(free.length), 1)[0]!)
    if (contiguous && chain.at(-1)! - chain[0]! !== length - 1) continue
    for (const [i, cluster] of chain.entries()) {
      if (!contiguous) view.setUint32(volume.fat + cluster * 4, chain[i + 1] ?? 0xffffffff, true)
      bytes[volume.bitmap + Math.floor((cluster - 2) / 8)]! |= 1 << ((cluster - 2) % 8)
      bytes.fill(file + 1, volume.at(cluster), volume.at(cluster) + clusterBytes)
      content.push({ start: volume.at(cluster), end: volume.at(cluster) + clusterBytes })
    }
    const name = `FILE${file}.BIN`
    bytes.fill(0, slot, slot + 96)
    bytes.set([0x85, 2], slot)
    view.setUint16(slot + 4, 0x20, true)
    for (const at of [8, 12, 16]) view.setUint32(slot + at, 0x5a210000, true)
    bytes.set([0xc0, contiguous ? 3 : 1, 0, name.length], slot + 32)
    let hash = 0
    for (const byte of Buffer.from(name, 'utf16le')) hash = (((hash << 15) | (hash >>> 1)) + byte) & 0xffff
    view.setUint16(slot + 36, hash, true)
    view.setBigUint64(slot + 40, BigInt(length * clusterBytes - 7), true)
    view.setUint32(slot + 52, chain[0]!, true)
    view.setBigUint64(slot + 56, BigInt(length * clusterBytes - 7), true)
    bytes[slot + 64] = 0xc1
    bytes.set(Buffer.from(name, 'utf16le'), slot + 66)
    let sum = 0
    for (let i = 0; i < 96; i++) {
      if (i !== 2 && i !== 3) sum = (((sum << 15) | (sum >>> 1)) + bytes[slot + i]!) & 0xffff
    }
    view.setUint16(slot + 2, sum, true)
    // Only now: an entry of zeros in between would end the directory.
    slot += 96
  }
  return RangeSet.from(content)
}

async function usedOf(bytes: Uint8Array) {
  const device = new MemoryDevice(bytes)
  assert.equal(await exfat.probe(device), true)
  const system = await exfat.open(device, {})
  return { system, map: await system.used({}) }
}

/** Used ranges as partclone sees them. */
async function byPartclone(image: string): Promise<RangeSet> {
  const text = await must('partclone.exfat', ['-D', '-s', image, '-O', '-', '-L', '/dev/null', '-q'])
  const ranges = []
  for (const [, at, length] of text.matchAll(/^0x([0-9A-F]+)\s+0x([0-9A-F]+)\s+\+/gim)) {
    ranges.push({
      start: Number.parseInt(at!, 16),
      end: Number.parseInt(at!, 16) + Number.parseInt(length!, 16),
    })
  }
  return RangeSet.from(ranges)
}

const refusal = (reason?: string) => (error: unknown) =>
  error instanceof NotTrusted && (reason === undefined || error.reason === reason)

const VARIANTS: readonly {
  readonly name: string
  readonly bytes: number
  readonly args: readonly string[]
}[] = [
  { name: '512-byte clusters', bytes: 8192 * KIB, args: ['-c', '512'] },
  { name: '4 KiB clusters', bytes: 65_536 * KIB, args: [] },
  { name: '32 KiB clusters, odd size', bytes: 30_001 * KIB + 512, args: ['-c', '32K'] },
  { name: '128 KiB clusters', bytes: 65_536 * KIB, args: ['-c', '128K'] },
  { name: 'packed bitmap', bytes: 16_384 * KIB, args: ['--pack-bitmap'] },
  { name: '1 KiB clusters, 64 KiB boundary', bytes: 20_000 * KIB, args: ['-c', '1K', '-b', '64K'] },
]

describe('exFAT', {
  concurrency: 3,
  skip: needs('mkfs.exfat', 'fsck.exfat', 'dump.exfat', 'partclone.exfat'),
}, () => {
  for (const { name, bytes, args } of VARIANTS) {
    test(`${name}: the set that partclone sees, as many free as dump.exfat counts; the rest may be anything`, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const volume = await format(bytes, args)
      const content = addFiles(volume, random)
      const image = dir.file('image')
      await writeFile(image, volume.bytes)
      await must('fsck.exfat', ['-n', image])
      const { system, map } = await usedOf(volume.bytes)
      assert.equal(system.kind, 'exfat')
      assert.equal(system.label, 'größe')
      assert.match(system.uuid!, /^[0-9A-F]{4}-[0-9A-F]{4}$/)
      assert.deepEqual([map.trust, map.state], ['exact', 'clean'])
      assert.ok(content.count > 3 && content.subtract(map.ranges).isEmpty, `seed ${random.seed}`)
      const free = map.ranges.complement(0, bytes)
      const counted = (await must('dump.exfat', [image])).match(/Free Clusters:\s+(\d+)/)
      assert.equal(free.size / volume.clusterBytes, Number(counted![1]), `seed ${random.seed}`)
      // partclone knows nothing of the tail behind the last cluster.
      const tail = RangeSet.of(volume.at(volume.clusters + 2), bytes)
      const judged = (await byPartclone(image)).union(tail).clip(0, bytes)
      // Near the end of the volume it keeps one free cluster now and then; dump.exfat, above, counts as we do.
      const more = judged.subtract(map.ranges)
      assert.ok(
        more.size <= volume.clusterBytes,
        `seed ${random.seed}: partclone keeps ${more.toString()} more`,
      )
      assert.equal(String(map.ranges.subtract(judged)), '', `seed ${random.seed}: partclone keeps less`)
      for (const { start, end } of free) volume.bytes.fill(0xa5, start, end)
      await writeFile(image, volume.bytes)
      await must('fsck.exfat', ['-n', image])
      // The bitmap and the entries of directories, each from its own side.
      const owned = await system.audit!({})
      const heap = RangeSet.of(volume.heap, volume.at(volume.clusters + 2))
      const wanted = map.ranges.intersect(heap)
      assert.equal(String(wanted.subtract(owned)), '', `seed ${random.seed}: in use without an owner`)
      assert.equal(String(owned.subtract(wanted)), '', `seed ${random.seed}: owned and not in use`)
    })
  }

  test('audit: an owned cluster that the bitmap calls free is found; a run out of the volume is refused', async () => {
    const volume = await format(8192 * KIB, ['-c', '4K'])
    const { bytes, view } = volume
    const content = addFiles(volume, new Random(5))
    const cluster = (content.first! - volume.heap) / volume.clusterBytes
    bytes[volume.bitmap + Math.floor(cluster / 8)]! &= ~(1 << (cluster % 8))
    const { system, map } = await usedOf(bytes)
    const missing = (await system.audit!({})).subtract(map.ranges)
    assert.equal(String(missing), String(RangeSet.of(content.first!, content.first! + volume.clusterBytes)))
    const stream = volume.entry(0xc0)
    for (const [at, value] of [
      [20, 1],
      [20, 0xfffffff0],
      [24, 0xffffffff],
      [28, 0xffffffff],
    ] as const) {
      const before = view.getUint32(stream + at, true)
      const flags = bytes[stream + 1]!
      bytes[stream + 1] = 3
      view.setUint32(stream + at, value, true)
      await assert.rejects((await usedOf(bytes)).system.audit!({}), (error) => error instanceof VarveError)
      view.setUint32(stream + at, before, true)
      bytes[stream + 1] = flags
    }
    assert.equal((await system.audit!({})).subtract(map.ranges).size, volume.clusterBytes)
  })

  test('a dirty volume keeps its map and says so', async () => {
    const volume = await format(8192 * KIB, [])
    const clean = await usedOf(volume.bytes)
    volume.bytes[106]! |= 2
    const dirty = await usedOf(volume.bytes)
    assert.equal(dirty.map.state, 'dirty: no journal to replay')
    assert.ok(dirty.map.ranges.equals(clean.map.ranges))
  })

  test('TexFAT: the chains of the live FAT, the union of both bitmaps', async () => {
    const volume = await format(8192 * KIB, ['-c', '512'])
    const { view, bytes } = volume
    const before = await usedOf(bytes)
    // A second FAT behind the first, and a second bitmap in free clusters.
    const fatSectors = view.getUint32(84, true)
    const fatBytes = fatSectors * volume.sectorBytes
    assert.ok(view.getUint32(80, true) + 2 * fatSectors <= view.getUint32(88, true), 'there is room')
    bytes[110] = 2
    const bitmapBytes = Number(view.getBigUint64(volume.entry(0x81) + 24, true))
    const length = Math.ceil(bitmapBytes / volume.clusterBytes)
    assert.ok(length > 1)
    const second = volume.clusters - length
    const own = Array.from({ length }, (_, i) => second + i)
    for (const cluster of [...own, second - 3]) {
      bytes[volume.bitmap + Math.floor((cluster - 2) / 8)]! |= 1 << ((cluster - 2) % 8)
    }
    for (const cluster of own) {
      view.setUint32(volume.fat + cluster * 4, cluster === own.at(-1) ? 0xffffffff : cluster + 1, true)
    }
    bytes.copyWithin(volume.fat + fatBytes, volume.fat, volume.fat + fatBytes)
    bytes.copyWithin(volume.at(second), volume.bitmap, volume.bitmap + bitmapBytes)
    // Set in the second alone, and in the first alone.
    bytes[volume.at(second) + Math.floor((second - 7) / 8)]! |= 1 << ((second - 7) % 8)
    bytes[volume.at(second) + Math.floor((second - 5) / 8)]! &= ~(1 << ((second - 5) % 8))
    let slot = volume.root
    while (bytes[slot] !== 0) slot += 32
    bytes.set([0x81, 1], slot)
    view.setUint32(slot + 20, second, true)
    view.setBigUint64(slot + 24, BigInt(bitmapBytes), true)
    volume.seal()
    const added = RangeSet.from(
      [...own, second - 3, second - 5].map((cluster) => ({
        start: volume.at(cluster),
        end: volume.at(cluster + 1),
      })),
    )
    for (const active of [0, 1]) {
      bytes[106] = active
      const { map } = await usedOf(bytes)
      assert.ok(map.ranges.equals(before.map.ranges.union(added)), String(map.ranges))
    }
    // The live FAT is the one that is followed: without its chains nothing is found.
    bytes.fill(0, volume.fat + fatBytes, volume.fat + 2 * fatBytes)
    await assert.rejects(usedOf(bytes), refusal('exfat-chain'))
    bytes[106] = 0
    await usedOf(bytes)
    // One bitmap for two FATs.
    bytes[slot] = 0
    await assert.rejects(usedOf(bytes), refusal('exfat-bitmap'))
  })

  test('damage is refused: a bit of the boot region, chains that loop or leave, bitmaps of something else', async () => {
    const volume = await format(8192 * KIB, ['-c', '512'])
    const { view, bytes } = volume
    const good = bytes.slice()
    for (const at of [3 + 8, 72, 80, 92, 96, 100, 104, 108, 200, 512, 11 * 512, 12 * 512 - 1]) {
      bytes[at]! ^= 16
      if (at === 108) await assert.rejects(usedOf(bytes), refusal())
      else await assert.rejects(usedOf(bytes), refusal('exfat-checksum'), `bit at ${at}`)
      bytes[at]! ^= 16
    }
    const bitmapCluster = view.getUint32(volume.entry(0x81) + 20, true)
    for (const next of [bitmapCluster, 0, 1, volume.clusters + 2, 0xfffffff7, 0xfffffffe]) {
      view.setUint32(volume.fat + bitmapCluster * 4, next, true)
      await assert.rejects(usedOf(bytes), refusal(), `next cluster ${next}`)
      bytes.set(good)
    }
    view.setUint32(volume.fat + bitmapCluster * 4, 0xffffffff, true)
    await assert.rejects(usedOf(bytes), refusal('exfat-bitmap'), 'chain too short')
    bytes.set(good)
    for (const [field, value] of [
      [20, 1],
      [20, volume.clusters + 2],
      [24, 1],
    ] as const) {
      view.setUint32(volume.entry(0x81) + field, value, true)
      await assert.rejects(usedOf(bytes), refusal())
      bytes.set(good)
    }
    bytes[volume.bitmap] = 0
    await assert.rejects(usedOf(bytes), refusal('exfat-bitmap'), 'its own cluster is free')
    bytes.set(good)
    bytes[volume.entry(0x81)] = 0x01
    await assert.rejects(usedOf(bytes), refusal('exfat-bitmap'), 'no bitmap')
    bytes.set(good)
    await usedOf(bytes)
  })

  test('extremes of every field, and cut volumes, are refused', async () => {
    const volume = await format(8192 * KIB, [])
    const good = volume.bytes.slice()
    for (const [at, bits] of [
      [72, 64],
      [80, 32],
      [84, 32],
      [88, 32],
      [92, 32],
      [96, 32],
      [104, 16],
      [108, 8],
      [109, 8],
      [110, 8],
    ] as const) {
      for (const value of [
        0n,
        1n,
        2n,
        0x7fn,
        0xffn,
        0x7fffn,
        0xffffn,
        0x7fffffffn,
        0xffffffffn,
        2n ** 63n,
        2n ** 64n - 1n,
      ]) {
        volume.bytes.set(good)
        const { view } = volume
        if (bits === 64) view.setBigUint64(at, value, true)
        else if (bits === 32) view.setUint32(at, Number(value & 0xffffffffn), true)
        else if (bits === 16) view.setUint16(at, Number(value & 0xffffn), true)
        else view.setUint8(at, Number(value & 0xffn))
        const { sectorBytes } = volume
        if (sectorBytes >= 512 && sectorBytes <= 4096) volume.seal()
        try {
          const { map } = await usedOf(volume.bytes)
          assert.ok(map.ranges.end! <= good.length)
        } catch (error) {
          assert.ok(
            error instanceof VarveError && error.code !== 'INTERNAL',
            `field ${at} = ${value}: ${String(error)}`,
          )
        }
      }
    }
    for (const length of [512, 1000, 6144, 100_000, good.length - 512]) {
      await assert.rejects(usedOf(good.slice(0, length)), refusal(), `${length} bytes`)
    }
    assert.equal(await exfat.probe(new MemoryDevice(good.slice(0, 511))), false)
  })
})
