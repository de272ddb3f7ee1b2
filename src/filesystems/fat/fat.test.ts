import assert from 'node:assert/strict'
import { mkdir, open, readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, Random, tempDir } from '../../../test/kit/index.ts'
import { NotTrusted } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import type { FileSystem } from '../file-system.ts'
import { fat } from './index.ts'
import { RunCollector } from './used-runs.ts'

const MTOOLS = { MTOOLS_SKIP_CHECK: '1' }
const KIB = 1024

interface Variant {
  readonly name: string
  readonly bytes: number
  readonly args: readonly string[]
  readonly kind: string
}

const VARIANTS: readonly Variant[] = [
  { name: '1.44 MB floppy', bytes: 1440 * KIB, args: [], kind: 'fat12' },
  {
    name: 'FAT12, odd size with a tail',
    bytes: 777 * 512,
    args: ['-F', '12', '-s', '8', '-a'],
    kind: 'fat12',
  },
  { name: 'FAT12, 4 KiB clusters', bytes: 8192 * KIB, args: ['-F', '12', '-s', '8'], kind: 'fat12' },
  {
    name: 'FAT12, the most clusters there can be',
    bytes: 2065 * KIB,
    args: ['-F', '12', '-s', '1'],
    kind: 'fat12',
  },
  { name: 'FAT16', bytes: 16_384 * KIB, args: ['-F', '16'], kind: 'fat16' },
  { name: 'FAT16, one FAT', bytes: 16_384 * KIB, args: ['-F', '16', '-f', '1'], kind: 'fat16' },
  { name: 'FAT16, 2 KiB sectors', bytes: 32_768 * KIB, args: ['-F', '16', '-S', '2048'], kind: 'fat16' },
  {
    name: 'FAT16, small root, many reserved',
    bytes: 16_383 * KIB,
    args: ['-F', '16', '-R', '7', '-r', '32', '-a'],
    kind: 'fat16',
  },
  { name: 'FAT32', bytes: 65_536 * KIB, args: ['-F', '32', '-s', '1'], kind: 'fat32' },
]

/** FAT32 with fewer clusters than Microsoft allows, as mkfs.fat makes and Linux reads them; mtools cannot. */
const SMALL_FAT32: readonly Variant[] = [
  { name: 'FAT32 of few clusters', bytes: 12_345 * KIB, args: ['-F', '32', '-s', '1', '-a'], kind: 'fat32' },
  { name: 'FAT32, 4 KiB sectors', bytes: 65_536 * KIB, args: ['-F', '32', '-S', '4096'], kind: 'fat32' },
  {
    name: 'FAT32, 8 KiB clusters',
    bytes: 65_000 * KIB,
    args: ['-F', '32', '-s', '16'],
    kind: 'fat32',
  },
]

/** A volume with files, some of them deleted again, so that free clusters lie between used ones. */
async function makeVolume(
  dir: { path: string; file(name: string): string },
  { args, bytes }: Pick<Variant, 'args' | 'bytes'>,
  random: Random,
): Promise<{ image: string; kept: Map<string, Uint8Array> }> {
  const image = dir.file('image')
  await writeFile(image, '')
  await truncate(image, bytes)
  await must('mkfs.fat', ['-i', '1234ABCD', '-n', 'LAB EL', ...args, image])
  await mkdir(dir.file('d'))
  const kept = new Map<string, Uint8Array>()
  const names = Array.from({ length: 24 }, (_, i) => `file${i}.bin`)
  for (const name of names) {
    const content = random.bytes(100 + random.below(Math.min(60_000, bytes / 60)))
    await writeFile(dir.file(`d/${name}`), content)
    kept.set(name, content)
  }
  const mtools = { env: MTOOLS }
  await must('mmd', ['-i', image, '::d'], mtools)
  await must(
    'mcopy',
    ['-i', image, ...names.slice(0, 16).map((name) => dir.file(`d/${name}`)), '::d'],
    mtools,
  )
  const gone = names.slice(0, 16).filter(() => random.below(3) === 0)
  if (gone.length > 0) await must('mdel', ['-i', image, ...gone.map((name) => `::d/${name}`)], mtools)
  await must('mcopy', ['-i', image, ...names.slice(16).map((name) => dir.file(`d/${name}`)), '::d'], mtools)
  // Two that are never the last one, so that holes stay between used clusters.
  const late = [names[17]!, names[20]!]
  await must('mdel', ['-i', image, ...late.map((name) => `::d/${name}`)], mtools)
  for (const name of [...gone, ...late]) kept.delete(name)
  return { image, kept }
}

/** Puts files of scattered clusters into the root directory of a fresh FAT32; returns where their content lies. */
function addFiles(bytes: Uint8Array, random: Random): RangeSet {
  const view = new DataView(bytes.buffer)
  const sectorBytes = view.getUint16(11, true)
  const clusterBytes = bytes[13]! * sectorBytes
  const reserved = view.getUint16(14, true) * sectorBytes
  const fatBytes = view.getUint32(36, true) * sectorBytes
  const dataStart = reserved + bytes[16]! * fatBytes
  const clusters = Math.floor((bytes.length - dataStart) / clusterBytes)
  const order = Array.from({ length: clusters - 1 }, (_, i) => ({ cluster: i + 3, key: random.next() }))
    .toSorted((a, b) => a.key - b.key)
    .map(({ cluster }) => cluster)
  const content = []
  for (let file = 0; file < Math.min(14, clusterBytes / 32 - 2); file++) {
    const chain = order.splice(0, 1 + random.below(8))
    for (const [i, cluster] of chain.entries()) {
      for (let copy = 0; copy < bytes[16]!; copy++) {
        view.setUint32(reserved + copy * fatBytes + cluster * 4, chain[i + 1] ?? 0x0fffffff, true)
      }
      const at = dataStart + (cluster - 2) * clusterBytes
      bytes.fill(file + 1, at, at + clusterBytes)
      content.push({ start: at, end: at + clusterBytes })
    }
    const entry = dataStart + (view.getUint32(44, true) - 2) * clusterBytes + 32 * (file + 1)
    bytes.set(new TextEncoder().encode(`F${String(file).padEnd(7)}BIN\x20`), entry)
    view.setUint16(entry + 20, chain[0]! >>> 16, true)
    view.setUint16(entry + 24, 0x5a21, true)
    view.setUint16(entry + 26, chain[0]! & 0xffff, true)
    view.setUint32(entry + 28, chain.length * clusterBytes, true)
  }
  // The free-cluster count of FSInfo is a hint; "unknown" keeps fsck.fat from comparing it.
  view.setUint32(view.getUint16(48, true) * sectorBytes + 488, 0xffffffff, true)
  return RangeSet.from(content)
}

async function usedOf(bytes: Uint8Array, context = {}) {
  const device = new MemoryDevice(bytes)
  assert.equal(await fat.probe(device), true)
  const system = await fat.open(device, context)
  return { system, map: await system.used(context) }
}

/** Every used cluster has an owner, and nothing else has one: what is left is before the first and after the last. */
async function assertOwned(system: FileSystem, used: RangeSet, size: number): Promise<void> {
  const owned = await system.audit!({})
  assert.ok(!owned.isEmpty && owned.subtract(used).isEmpty, 'what has an owner is in use')
  const rest = [...used.subtract(owned)]
  const [head, tail, ...more] = rest
  assert.deepEqual([head!.start, more.length], [0, 0], `no owner: ${String(used.subtract(owned))}`)
  assert.ok(head!.end <= owned.first!)
  // Sectors that make no whole cluster, and what lies behind the volume.
  if (tail) assert.ok(tail.end === size && tail.start >= owned.end!)
}

/** What fsck.fat counts: used and all clusters. */
async function counted(image: string): Promise<{ used: number; all: number }> {
  const text = await must('fsck.fat', ['-n', '-v', image])
  const found = text.match(/(\d+) files, (\d+)\/(\d+) clusters/)
  assert.ok(found, text)
  return { used: Number(found[2]), all: Number(found[3]) }
}

describe('FAT', { skip: needs('mkfs.fat', 'fsck.fat', 'mcopy') }, () => {
  for (const variant of VARIANTS) {
    test(`${variant.name}: as many clusters used as fsck.fat counts; the rest may be anything`, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const { image, kept } = await makeVolume(dir, variant, random)
      const bytes = new Uint8Array(await readFile(image))
      const { system, map } = await usedOf(bytes)
      assert.equal(system.kind, variant.kind)
      assert.equal(system.uuid, '1234-ABCD')
      assert.equal(system.label, 'LAB EL')
      assert.equal(map.trust, 'exact')
      assert.equal(map.state, 'clean')
      const { used, all } = await counted(image)
      const free = map.ranges.complement(0, bytes.length)
      assert.equal(free.size / system.blockBytes, all - used, `seed ${random.seed}`)
      assert.ok(free.count > 1, `free clusters lie between used ones (seed ${random.seed})`)
      // Poison.
      for (const { start, end } of free) bytes.fill(0xa5, start, end)
      await writeFile(image, bytes)
      assert.deepEqual(await counted(image), { used, all })
      await assertOwned(system, map.ranges, bytes.length)
      await mkdir(dir.file('out'))
      await must('mcopy', ['-i', image, '::d/*', dir.file('out')], { env: MTOOLS })
      for (const [name, content] of kept) {
        const found = new Uint8Array(await readFile(dir.file(`out/${name}`)))
        assert.deepEqual(found, content, `${name} (seed ${random.seed})`)
      }
    })
  }

  for (const variant of SMALL_FAT32) {
    test(`${variant.name}: as many clusters used as fsck.fat counts`, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const image = dir.file('image')
      await writeFile(image, '')
      await truncate(image, variant.bytes)
      await must('mkfs.fat', ['-n', 'SMALL', ...variant.args, image])
      const bytes = new Uint8Array(await readFile(image))
      const content = addFiles(bytes, random)
      await writeFile(image, bytes)
      const { system, map } = await usedOf(bytes)
      assert.equal(system.kind, 'fat32')
      assert.equal(system.label, 'SMALL')
      const { used, all } = await counted(image)
      const free = map.ranges.complement(0, bytes.length)
      assert.equal(free.size / system.blockBytes, all - used, `seed ${random.seed}`)
      assert.ok(free.count > 10)
      assert.ok(content.subtract(map.ranges).isEmpty, `seed ${random.seed}`)
      for (const { start, end } of free) bytes.fill(0xa5, start, end)
      await writeFile(image, bytes)
      assert.deepEqual(await counted(image), { used, all })
      await assertOwned(system, map.ranges, bytes.length)
    })
  }

  test('bad clusters are in use', async () => {
    await using dir = await tempDir()
    const image = dir.file('image')
    await writeFile(image, '')
    await truncate(image, 16_384 * KIB)
    await must('mkfs.fat', ['-F', '16', '-s', '4', image])
    const clean = await usedOf(new Uint8Array(await readFile(image)))
    await writeFile(dir.file('bad'), '5000\n5001\n9000\n')
    await must('mkfs.fat', ['-F', '16', '-s', '4', '-l', dir.file('bad'), image])
    const { map, system } = await usedOf(new Uint8Array(await readFile(image)))
    assert.equal(map.ranges.covers(5000 * KIB, 5002 * KIB), true)
    assert.equal(map.ranges.covers(9000 * KIB, 9001 * KIB), true)
    const more = map.ranges.subtract(clean.map.ranges)
    assert.ok(more.size === 2 * system.blockBytes || more.size === 3 * system.blockBytes, String(more))
  })

  test('audit: an owned cluster that the table calls free is found; a chain out of the volume is refused', async () => {
    await using dir = await tempDir()
    const { image } = await makeVolume(dir, { args: ['-F', '16'], bytes: 16_384 * KIB }, new Random(11))
    const bytes = new Uint8Array(await readFile(image))
    const view = new DataView(bytes.buffer)
    const sectorBytes = view.getUint16(11, true)
    const table = view.getUint16(14, true) * sectorBytes
    const fatBytes = view.getUint16(22, true) * sectorBytes
    // The first cluster of a chain of at least two, as only a file's is: nothing else points to it.
    const next = (cluster: number): number => view.getUint16(table + cluster * 2, true)
    const pointed = new Set(Array.from({ length: 2000 }, (_, cluster) => next(cluster)))
    const first = Array.from({ length: 2000 }, (_, i) => i + 2).find(
      (cluster) => !pointed.has(cluster) && next(cluster) > 2 && next(cluster) < 0xfff0,
    )!
    const set = (value: number): void => {
      for (const copy of [0, 1]) view.setUint16(table + copy * fatBytes + first * 2, value, true)
    }
    const before = next(first)
    set(0)
    const { system, map } = await usedOf(bytes)
    const missing = (await system.audit!({})).subtract(map.ranges)
    assert.equal(missing.size, system.blockBytes)
    for (const value of [1, 0xffe0]) {
      set(value)
      await assert.rejects((await usedOf(bytes)).system.audit!({}), isRefusal('fat-chain'))
    }
    // A loop and a crossing have an end.
    set(first)
    assert.ok((await (await usedOf(bytes)).system.audit!({})).subtract(map.ranges).size <= system.blockBytes)
    set(before)
    await assertOwned((await usedOf(bytes)).system, (await usedOf(bytes)).map.ranges, bytes.length)
  })

  test('a dirty volume keeps its map and says so', async () => {
    await using dir = await tempDir()
    for (const [args, at] of [
      [['-F', '16'], 0x25],
      [['-F', '32', '-s', '1'], 0x41],
    ] as const) {
      const image = dir.file(`image${at}`)
      await writeFile(image, '')
      await truncate(image, 40_000 * KIB)
      await must('mkfs.fat', [...args, image])
      const bytes = new Uint8Array(await readFile(image))
      const clean = await usedOf(bytes)
      bytes[at]! |= 1
      const dirty = await usedOf(bytes)
      assert.equal(dirty.map.state, 'dirty: no journal to replay')
      assert.ok(dirty.map.ranges.equals(clean.map.ranges))
    }
  })

  test('copies of the FAT that differ give their union; without mirroring only the live one counts', async () => {
    await using dir = await tempDir()
    const { image } = await makeVolume(
      dir,
      { args: ['-F', '32', '-s', '1'], bytes: 40_000 * KIB },
      new Random(7),
    )
    const bytes = new Uint8Array(await readFile(image))
    const view = new DataView(bytes.buffer)
    const before = await usedOf(bytes)
    const reserved = view.getUint16(14, true) * 512
    const fatBytes = view.getUint32(36, true) * 512
    const lastCluster = view.getUint32(32, true) - (reserved + 2 * fatBytes) / 512 + 1
    const free = before.map.ranges.complement(0, bytes.length)
    // The last cluster, marked in the second copy alone.
    view.setUint32(reserved + fatBytes + lastCluster * 4, 0x0fffffff, true)
    const union = await usedOf(bytes)
    assert.match(union.map.state, /copies of the FAT differ/)
    assert.equal(union.map.ranges.size, before.map.ranges.size + 512)
    // Free in the second copy alone: still in use.
    view.setUint32(reserved + fatBytes + lastCluster * 4, 0, true)
    bytes.fill(0, reserved + fatBytes + 12, reserved + fatBytes + 600)
    assert.ok((await usedOf(bytes)).map.ranges.equals(before.map.ranges))
    // Mirroring off, the first copy live: the second is not looked at; the second live: only it is.
    view.setUint16(40, 0x80, true)
    const first = await usedOf(bytes)
    assert.equal(first.map.state, 'clean')
    assert.ok(first.map.ranges.equals(before.map.ranges))
    view.setUint16(40, 0x81, true)
    assert.ok((await usedOf(bytes)).map.ranges.size < before.map.ranges.size)
    view.setUint16(40, 0x82, true)
    await assert.rejects(usedOf(bytes), isRefusal('fat-bad-boot-sector'))
    assert.ok(free.size > 0)
  })

  test('a volume larger than its partition is refused, a smaller one has a tail in use', async () => {
    await using dir = await tempDir()
    const { image } = await makeVolume(dir, { args: ['-F', '16'], bytes: 16_384 * KIB }, new Random(3))
    const bytes = new Uint8Array(await readFile(image))
    await assert.rejects(usedOf(bytes.subarray(0, bytes.length - 512)), isRefusal('fat-size-mismatch'))
    const longer = new Uint8Array(bytes.length + 5000)
    longer.set(bytes)
    const { map } = await usedOf(longer)
    assert.ok(map.ranges.covers(bytes.length, longer.length))
    assert.ok(map.ranges.clip(0, bytes.length).equals((await usedOf(bytes)).map.ranges))
  })

  test('hostile boot sectors are refused or not recognized, truncated ones too', async () => {
    await using dir = await tempDir()
    const { image } = await makeVolume(
      dir,
      { args: ['-F', '32', '-s', '1'], bytes: 40_000 * KIB },
      new Random(5),
    )
    const bytes = new Uint8Array(await readFile(image))
    const { map } = await usedOf(bytes)
    const extremes: [at: number, size: 1 | 2 | 4][] = [
      [11, 2],
      [13, 1],
      [14, 2],
      [16, 1],
      [17, 2],
      [19, 2],
      [21, 1],
      [22, 2],
      [32, 4],
      [36, 4],
      [40, 2],
      [44, 4],
    ]
    let refused = 0
    const boot = bytes.slice(0, 512)
    for (const [at, size] of extremes) {
      for (const value of [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0xffffffff]) {
        const copy = bytes
        copy.set(boot)
        const view = new DataView(copy.buffer)
        if (size === 1) view.setUint8(at, value)
        else if (size === 2) view.setUint16(at, value, true)
        else view.setUint32(at, value, true)
        const device = new MemoryDevice(copy)
        if (!(await fat.probe(device))) {
          refused += 1
          continue
        }
        try {
          const system = await fat.open(device, {})
          const used = await system.used({})
          assert.ok(used.ranges.end! <= copy.length)
        } catch (error) {
          assert.ok(error instanceof NotTrusted, `field ${at} = ${value}: ${String(error)}`)
          refused += 1
        }
      }
    }
    bytes.set(boot)
    assert.ok(refused > 50, `${refused} refused`)
    for (const length of [0, 1, 511, 512, 513, 4096, 20_000]) {
      const device = new MemoryDevice(bytes.subarray(0, length))
      if (await fat.probe(device)) await assert.rejects(usedOf(bytes.subarray(0, length)), isRefusal())
    }
    assert.ok(map.ranges.size > 0)
  })

  test('it reads the FAT in bulk', async () => {
    await using dir = await tempDir()
    const image = dir.file('image')
    await writeFile(image, '')
    await truncate(image, 512 * 1024 * KIB)
    await must('mkfs.fat', ['-F', '32', '-s', '1', image])
    await using handle = await open(image)
    let reads = 0
    let bytes = 0
    const { size } = await handle.stat()
    const inner = new MemoryDevice(0)
    const device = {
      size,
      blockSize: 512,
      features: inner.features,
      async read(offset: number, into: Uint8Array): Promise<void> {
        reads += 1
        bytes += into.length
        const { bytesRead } = await handle.read(into, 0, into.length, offset)
        assert.equal(bytesRead, into.length)
      },
      extents: inner.extents.bind(inner),
      [Symbol.asyncDispose]: async (): Promise<void> => {},
    }
    const system = await fat.open(device, {})
    const { ranges } = await system.used({})
    assert.ok(reads <= 20, `${reads} reads`)
    assert.ok(bytes <= 8.3 * 1024 * KIB, `${bytes} bytes`)
    assert.ok(ranges.size < 20 * 1024 * KIB)
  })
})

function isRefusal(reason?: string) {
  return (error: unknown): boolean =>
    error instanceof NotTrusted && (reason === undefined || error.reason === reason)
}

describe('RunCollector', () => {
  test('agrees with one entry at a time, at every width, however the FAT is cut into pieces', () => {
    const random = new Random()
    for (const bits of [12, 16, 32] as const) {
      for (let round = 0; round < 30; round++) {
        const clusters = 1 + random.below(400)
        const entries = Array.from({ length: clusters + 2 }, () =>
          random.below(3) === 0 ? 0 : random.pick([1, 0xff7, 0xfff, 2 + random.below(90)]),
        )
        // The top four bits of a FAT32 entry are not part of its value.
        const raw = encode(entries, bits, () => (random.below(2) === 0 ? 0xf0000000 : 0))
        const whole = new RunCollector(bits, clusters)
        whole.take(raw)
        const pieces = new RunCollector(bits, clusters)
        for (let at = 0; at < raw.length; at += 12) pieces.take(raw.subarray(at, at + 12))
        const expected = RangeSet.from(
          entries.flatMap((value, i) => (i >= 2 && value !== 0 ? [{ start: i, end: i + 1 }] : [])),
        )
        const found = whole.finish()
        assert.ok(found.equals(expected), `seed ${random.seed}: ${String(found)} is not ${String(expected)}`)
        assert.ok(pieces.finish().equals(expected), `seed ${random.seed}`)
      }
    }
  })
})

function encode(entries: readonly number[], bits: 12 | 16 | 32, junk: () => number): Uint8Array {
  const raw = new Uint8Array(Math.ceil((entries.length * bits) / 8))
  const view = new DataView(raw.buffer)
  for (const [i, value] of entries.entries()) {
    if (bits === 32) view.setUint32(i * 4, (value | junk()) >>> 0, true)
    else if (bits === 16) view.setUint16(i * 2, value, true)
    else {
      const at = Math.floor(i * 1.5)
      if (i % 2 === 0) {
        raw[at] = value & 0xff
        if (at + 1 < raw.length) raw[at + 1]! |= value >> 8
      } else {
        raw[at]! |= (value & 0x0f) << 4
        raw[at + 1] = value >> 4
      }
    }
  }
  return raw
}
