/** Hostile images: one clear error or the truth, never a hang, never memory without bound. */
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { constants, deflateRawSync, zstdCompressSync } from 'node:zlib'
import { patternAt, Random } from '../../../test/kit/index.ts'
import { assertBytes } from '../../../test/kit/qcow2.ts'
import { VarveError } from '../../base/index.ts'
import { allExtents, type BlockDevice, MemoryDevice, readBytes } from '../../device/index.ts'
import type { Extent } from '../../extents/index.ts'
import { decompressCluster, zstdFrameLength } from './compression.ts'
import { Qcow2Layer, Qcow2Writer, qcow2Format, repairImage } from './index.ts'

const CLUSTER = 4096

/** An image with data, zeros, compressed clusters and a backing name, as bytes. */
async function sample(
  settings: Readonly<Record<string, string | number | boolean>> = {},
): Promise<Uint8Array> {
  const medium = new MemoryDevice(0)
  const keep = medium.bytes
  assert.equal(keep.length, 0)
  const layer = await qcow2Format.create!(new Kept(medium), {
    virtualSize: 1 << 20,
    settings: { clusterBytes: CLUSTER, ...settings },
    backing: { name: '../x/base.img', format: 'raw' },
    fillAbsent: async (_, into) => void into.fill(0),
  })
  const cluster = Number(settings['clusterBytes'] ?? CLUSTER)
  await layer.write(0, patternAt(0, 100_000))
  await layer.zero(40_000, 20_000)
  for (let i = 0; i < 6; i++)
    await layer.writeCompressed!(458_752 + i * cluster, new Uint8Array(cluster).fill(i))
  await layer[Symbol.asyncDispose]()
  return medium.bytes
}

/** Passes everything on but dispose. */
class Kept extends MemoryDevice {
  readonly #inner: MemoryDevice
  constructor(inner: MemoryDevice) {
    super(0)
    this.#inner = inner
  }
  override get size(): number {
    return this.#inner.size
  }
  override read(offset: number, into: Uint8Array): Promise<void> {
    return this.#inner.read(offset, into)
  }
  override write(offset: number, bytes: Uint8Array): Promise<void> {
    return this.#inner.write(offset, bytes)
  }
  override zero(offset: number, length: number): Promise<void> {
    return this.#inner.zero(offset, length)
  }
  override resize(size: number): Promise<void> {
    return this.#inner.resize(size)
  }
}

/** A device that claims any size: `head` at its beginning, zeros behind. */
class Claims implements BlockDevice {
  readonly blockSize = 512
  readonly features = { write: false, resize: false, sparse: false, places: false }
  readonly size: number
  readonly #head: Uint8Array
  constructor(head: Uint8Array, size: number) {
    this.#head = head
    this.size = size
  }
  async read(offset: number, into: Uint8Array): Promise<void> {
    into.fill(0)
    if (offset < this.#head.length) into.set(this.#head.subarray(offset, offset + into.length))
  }
  async extents(offset: number, length: number): Promise<readonly Extent[]> {
    return [{ offset, length, kind: 'data' }]
  }
  async [Symbol.asyncDispose](): Promise<void> {}
}

function view(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

/** Everything a reader can ask of an image. Any error but a VarveError goes through. */
async function useAll(bytes: Uint8Array): Promise<string[]> {
  const codes: string[] = []
  const guard = async (work: () => Promise<void>): Promise<void> => {
    try {
      await work()
    } catch (error) {
      if (!(error instanceof VarveError) || error.code === 'INTERNAL') throw error
      assert.ok(
        ['CORRUPT', 'UNSUPPORTED', 'ENCRYPTED', 'LIMIT', 'READ_ONLY', 'NO_SPACE'].includes(error.code),
        error.code,
      )
      codes.push(error.code)
    }
  }
  await guard(async () => {
    await using layer = await Qcow2Layer.open(new MemoryDevice(bytes.slice()))
    const end = Math.min(layer.size, 4 << 20)
    await guard(async () => {
      for await (const extent of allExtents(layer, 0, end)) void extent
    })
    for (let at = 0; at < end; at += 65_536) {
      await guard(async () => void (await readBytes(layer, at, Math.min(65_536, end - at))))
    }
  })
  await guard(async () => void (await qcow2Format.check!(new MemoryDevice(bytes.slice()), {})))
  await guard(async () => {
    await using layer = await Qcow2Writer.open(new MemoryDevice(bytes.slice()), {
      fillAbsent: async (_, into) => void into.fill(0),
    })
    const end = Math.min(layer.size, 1 << 20)
    if (end < 10_000) return
    await guard(async () => await layer.write(100, new Uint8Array(9000)))
    await guard(async () => await layer.zero(0, end))
    await guard(async () => await layer.writeCompressed(0, new Uint8Array(layer.header.clusterBytes)))
    await guard(async () => await layer.flush())
  })
  await guard(async () => void (await repairImage(new MemoryDevice(bytes.slice()))))
  return codes
}

describe('hostile qcow2', () => {
  test('a file cut at any byte of its header is refused', async () => {
    const whole = await sample()
    for (let length = 0; length < 600; length++) {
      await assert.rejects(
        Qcow2Layer.open(new MemoryDevice(whole.slice(0, length))),
        { code: 'CORRUPT' },
        `${length}`,
      )
    }
    for (let length = 600; length < whole.length; length += 500) await useAll(whole.slice(0, length))
  })

  test('header fields at their extremes', async () => {
    const whole = await sample()
    for (const at of [4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104, 112, 116]) {
      for (const value of [0, 1, 0x7fffffff, 0x80000000, 0xffffffff]) {
        for (const at2 of [at, at + 4]) {
          const bytes = whole.slice()
          view(bytes).setUint32(at2, value)
          await useAll(bytes)
        }
      }
      const bytes = whole.slice()
      view(bytes).setBigUint64(at, 0xffff_ffff_ffff_ffffn)
      await useAll(bytes)
    }
  })

  for (const [what, code, change] of [
    ['a size of 2^63', 'CORRUPT', (v) => v.setBigUint64(24, 1n << 63n)],
    ['an L1 table of 4 GiB', 'LIMIT', (v) => v.setUint32(36, 0x2000_0000)],
    ['an L1 table larger than the file', 'CORRUPT', (v) => v.setUint32(36, 0x0030_0000)],
    ['an L1 table too short for the size', 'CORRUPT', (v) => v.setBigUint64(24, 1n << 50n)],
    ['an L1 table on the header', 'CORRUPT', (v) => v.setBigUint64(40, 0n)],
    ['an unaligned L1 table', 'CORRUPT', (v) => v.setBigUint64(40, 4097n)],
    ['too many snapshots', 'LIMIT', (v) => v.setUint32(60, 0xffff_ffff)],
    ['clusters of 4 GiB', 'UNSUPPORTED', (v) => v.setUint32(20, 32)],
    ['clusters of 256 bytes', 'CORRUPT', (v) => v.setUint32(20, 8)],
    ['version 4', 'UNSUPPORTED', (v) => v.setUint32(4, 4)],
    ['AES', 'ENCRYPTED', (v) => v.setUint32(32, 1)],
    ['LUKS', 'ENCRYPTED', (v) => v.setUint32(32, 2)],
    ['a backing name outside its cluster', 'CORRUPT', (v) => v.setBigUint64(8, 4090n)],
    ['a backing name of 4 GiB', 'CORRUPT', (v) => v.setUint32(16, 0xffff_ffff)],
    ['a header extension without end', 'CORRUPT', (v) => v.setUint32(116, 0xffff_fff0)],
    ['compression that the feature bits deny', 'CORRUPT', (v) => v.setUint8(104, 1)],
    ['subclusters in small clusters', 'CORRUPT', (v) => v.setUint8(79, 0x10)],
    ['an external data file without a name', 'UNSUPPORTED', (v) => v.setUint8(79, 0x04)],
  ] as readonly (readonly [string, string, (v: DataView) => void])[]) {
    test(`${what}: ${code}`, async () => {
      const bytes = await sample()
      change(view(bytes))
      await assert.rejects(Qcow2Layer.open(new MemoryDevice(bytes)), { code })
    })
  }

  test('unknown incompatible features are refused by their names', async () => {
    const bytes = await sample()
    view(bytes).setBigUint64(72, (1n << 63n) | 1n | (1n << 40n))
    // The image's own table names bit 40: its entry for bit 4 is changed to that.
    const table = Buffer.from(bytes).indexOf('extended L2 entries')
    bytes[table - 1] = 40
    bytes.set(new TextEncoder().encode('new\u001bfeature\0\0\0\0\0\0\0\0'), table)
    await assert.rejects(Qcow2Layer.open(new MemoryDevice(bytes)), {
      code: 'UNSUPPORTED',
      message: /\(new\?feature, bit 63\)/,
    })
  })

  test('tables that loop or stand on each other are refused where they are used', async () => {
    const whole = await sample()
    const l1 = Number(view(whole).getBigUint64(40))
    const refcounts = view(whole).getBigUint64(48)
    for (const offset of [BigInt(l1), refcounts, 1n << 40n, 0x00ff_ffff_ffff_f000n]) {
      const bytes = whole.slice()
      view(bytes).setBigUint64(l1, offset | (1n << 63n))
      await using layer = await Qcow2Layer.open(new MemoryDevice(bytes))
      await assert.rejects(readBytes(layer, 0, 512), { code: 'CORRUPT' })
      await useAll(bytes)
    }
    // A data cluster on the L1 table, and an L2 table that names itself as data (harmless: its bytes are read).
    const l2 = Number(view(whole).getBigUint64(l1) & 0x00ff_ffff_ffff_fe00n)
    const bytes = whole.slice()
    view(bytes).setBigUint64(l2, BigInt(l1) | (1n << 63n))
    view(bytes).setBigUint64(l2 + 8, BigInt(l2) | (1n << 63n))
    await using layer = await Qcow2Layer.open(new MemoryDevice(bytes))
    await assert.rejects(readBytes(layer, 0, 512), { code: 'CORRUPT' })
    await readBytes(layer, CLUSTER, 512)
  })

  test('one L2 table named by many L1 entries is refused: a small file claims no endless disk', async () => {
    const bytes = new Uint8Array(4096 * 6)
    bytes.set((await sample()).subarray(0, 4096))
    const v = view(bytes)
    v.setBigUint64(24, 512n * 4096n * 100n)
    v.setUint32(36, 100)
    v.setBigUint64(40, 8192n)
    for (let i = 0; i < 100; i++) v.setBigUint64(8192 + i * 8, 12288n | (1n << 63n))
    await assert.rejects(Qcow2Layer.open(new MemoryDevice(bytes)), {
      code: 'CORRUPT',
      message: /two L1 entries/,
    })
    assert.ok(
      (await qcow2Format.check!(new MemoryDevice(bytes), {})).some(({ severity }) => severity === 'error'),
    )
  })

  test('a huge sparse file with huge tables stays within memory', async () => {
    const head = (await sample()).slice(0, 4096)
    const v = view(head)
    v.setUint32(36, 4 << 20)
    v.setBigUint64(40, 1n << 40n)
    v.setBigUint64(24, BigInt(512 * 4096) * BigInt(4 << 20))
    const before = process.memoryUsage().rss
    await using layer = await Qcow2Layer.open(new Claims(head, 2 ** 52))
    let length = 0
    for await (const extent of allExtents(layer)) length += extent.length
    assert.equal(length, layer.size)
    assert.ok(process.memoryUsage().rss - before < 256 << 20)
  })

  test('snapshots that claim what is not there are a fact, not a refusal', async () => {
    const bytes = await sample()
    view(bytes).setUint32(60, 3)
    view(bytes).setBigUint64(64, 1n << 40n)
    await using layer = await Qcow2Layer.open(new MemoryDevice(bytes))
    assert.match(String(layer.facts['snapshotsProblem']), /snapshot table/)
    await readBytes(layer, 0, layer.size)
    await assert.rejects(Qcow2Writer.open(new MemoryDevice(bytes)), { code: 'CORRUPT' })
  })

  test('decompression gives one cluster at most, whatever the input holds', async () => {
    const bomb = new Uint8Array(64 << 20)
    for (const [compression, packed] of [
      ['deflate', deflateRawSync(bomb)],
      ['zstd', zstdCompressSync(bomb)],
    ] as const) {
      if (compression === 'deflate') {
        // The specification stops after one cluster, so a longer stream is no error.
        assert.equal((await decompressCluster(compression, packed, CLUSTER, 0)).length, CLUSTER)
      } else await assert.rejects(decompressCluster(compression, packed, CLUSTER, 0), { code: 'CORRUPT' })
      await assert.rejects(decompressCluster(compression, packed.subarray(0, 3), CLUSTER, 0), {
        code: 'CORRUPT',
      })
      const short =
        compression === 'zstd' ? zstdCompressSync(bomb.subarray(0, 99)) : deflateRawSync(bomb.subarray(0, 99))
      await assert.rejects(decompressCluster(compression, short, CLUSTER, 0), { code: 'CORRUPT' })
      await assert.rejects(decompressCluster(compression, new Random(7).bytes(900), CLUSTER, 0), {
        code: 'CORRUPT',
      })
    }
  })

  test('a zstd frame ends where its blocks end, whatever follows', async () => {
    const random = new Random()
    for (const length of [1, 255, 256, 65_791, 65_792, 300_000]) {
      for (const params of [
        {},
        { [constants.ZSTD_c_checksumFlag]: 1 },
        { [constants.ZSTD_c_contentSizeFlag]: 0 },
      ]) {
        const content = length % 2 ? random.bytes(length) : new Uint8Array(length).fill(7)
        const frame = zstdCompressSync(content, { params })
        const tail = Buffer.concat([frame, random.bytes(40)])
        assert.equal(zstdFrameLength(tail), frame.length, `seed ${random.seed}, ${length}`)
        assert.throws(() => zstdFrameLength(frame.subarray(0, frame.length - 1)))
        const found = await decompressCluster('zstd', Buffer.concat([tail, frame]), length, 0)
        assertBytes(found, content, `seed ${random.seed}, ${length}`)
      }
    }
  })

  for (const settings of [
    {},
    { extendedL2: true, clusterBytes: 16384 },
    { clusterBytes: 512 },
    { compression: 'zstd' },
  ]) {
    test(`bytes changed by the dice: ${JSON.stringify(settings)}`, async () => {
      const random = new Random()
      const whole = await sample(settings)
      const cluster = settings.clusterBytes ?? CLUSTER
      const started = Date.now()
      for (let turn = 0; turn < 250 && Date.now() - started < 6000; turn++) {
        const bytes = whole.slice()
        const changes = 1 + random.below(4)
        for (let i = 0; i < changes; i++) {
          // Tables stand in the first clusters; a few changes go anywhere.
          const range =
            random.next() < 0.4
              ? 200
              : random.next() < 0.8
                ? Math.min(bytes.length, cluster * 8)
                : bytes.length
          bytes[random.below(range)] = random.pick([0, 1, 0x7f, 0x80, 0xff, random.below(256)])
        }
        try {
          await useAll(bytes)
        } catch (error) {
          throw new Error(`seed ${random.seed}, turn ${turn}`, { cause: error })
        }
      }
    })
  }
})
