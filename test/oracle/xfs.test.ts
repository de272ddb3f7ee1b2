/** XFS: the used map of filled and unmounted file systems, against xfs_db, bit for bit. */
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { zstdDecompressSync } from 'node:zlib'
import { VarveError } from '../../src/base/index.ts'
import { CountingDevice, MemoryDevice, openHostFile } from '../../src/device/index.ts'
import { RangeSet } from '../../src/extents/index.ts'
import { XfsFileSystem, xfsType } from '../../src/filesystems/xfs/index.ts'
import { decodeSuperblock } from '../../src/filesystems/xfs/layout.ts'
import { livePages, mutate } from '../fuzz/mutations.ts'
import { must, needs, needsRoot, patternAt, Random, tempDir } from '../kit/index.ts'
import { fillTree, freeByXfsDb, makeManyExtents, makeXfs } from '../kit/xfs.ts'
import { mounted } from '../poison/mount.ts'

const skip = needs('mkfs.xfs', 'xfs_db', 'mount', 'setfattr') || needsRoot()

interface Variant {
  readonly args: readonly string[]
  readonly files?: number
  readonly mib?: number
  readonly small?: boolean
  /** Grown to this size while mounted. */
  readonly growMib?: number
}

const VARIANTS: Readonly<Record<string, Variant>> = {
  'as mkfs makes it': { args: [] },
  '1k blocks, trees of several levels': { args: ['-b', 'size=1k'], files: 2500 },
  '2k blocks, reverse map': { args: ['-b', 'size=2k', '-m', 'rmapbt=1'] },
  '512-byte inodes and blocks of 16k read as metadata': { args: ['-b', 'size=4k', '-n', 'size=16k'] },
  '4k sectors': { args: ['-s', 'size=4k'] },
  'no reflink': { args: ['-m', 'reflink=0'] },
  'reverse map and reflink': { args: ['-m', 'rmapbt=1,reflink=1'] },
  'no free inode tree, no sparse inodes': {
    args: ['-m', 'finobt=0,inobtcount=0,reflink=0,bigtime=0', '-i', 'sparse=0'],
  },
  'big extent counters': { args: ['-i', 'nrext64=1'] },
  'one allocation group': { args: ['-d', 'agcount=1'], small: true },
  'sixteen allocation groups': { args: ['-d', 'agcount=16'], small: true },
  'log stripe of 256k': { args: ['-l', 'su=256k'] },
  'a last group shorter than the others': { args: ['-d', 'agsize=90m'], mib: 340 },
  'grown while mounted': { args: [], growMib: 800 },
}

describe('XFS used map of an unmounted file system', { skip }, () => {
  for (const [name, variant] of Object.entries(VARIANTS)) {
    test(name, async (t) => {
      const random = new Random()
      await using dir = await tempDir()
      const image = dir.file('xfs')
      await makeXfs(image, variant)
      {
        await using mount = await mounted(image, { type: 'xfs' })
        fillTree(mount.path, random, variant.files ?? 600)
        await makeManyExtents(mount.path, 700)
        if (variant.growMib) {
          await truncate(image, variant.growMib * 2 ** 20)
          await must('losetup', ['--set-capacity', mount.device])
          await must('xfs_growfs', ['-d', mount.path])
          fillTree(mount.path, random, 300)
        }
      }
      await compare(image, `seed ${random.seed}`)
      t.diagnostic(`seed ${random.seed}`)
    })
  }

  // Kernels of today mount no v4, so files come in by mkfs itself.
  for (const args of [
    ['-l', 'version=1'],
    ['-l', 'version=2,su=64k'],
    ['-b', 'size=1k'],
    ['-s', 'size=4k'],
  ]) {
    test(`version 4, ${args.join(' ')}`, async () => {
      await using dir = await tempDir()
      await writeFile(dir.file('content'), patternAt(0, 30_000))
      const files = Array.from({ length: 400 }, (_, i) => `f${i} ---644 0 0 ${dir.file('content')}`)
      await writeFile(dir.file('proto'), ['/', '0 0', 'd--755 0 0', ...files, '$', ''].join('\n'))
      const image = dir.file('xfs')
      await makeXfs(image, { args: ['-m', 'crc=0', '-p', dir.file('proto'), ...args] })
      await compare(image, args.join(' '))
    })
  }

  test('the tail behind the file system is in use', async () => {
    await using dir = await tempDir()
    const image = dir.file('xfs')
    await makeXfs(image, {})
    await truncate(image, 400 * 2 ** 20)
    await using device = await openHostFile(image)
    const { ranges } = await (await xfsType.open(device, {})).used({})
    assert.ok(ranges.covers(320 * 2 ** 20, 400 * 2 ** 20))
  })
})

describe('XFS version 4 with a dirty log, written by a guest of the time', () => {
  const folder = join(import.meta.dirname, 'fixtures/xfs-v4')
  const image = new Uint8Array(zstdDecompressSync(readFileSync(join(folder, 'dirty.img.zst'))))
  const free = RangeSet.from(
    (JSON.parse(readFileSync(join(folder, 'recovered.json'), 'utf8')) as [number, number][]).map(
      ([start, end]) => ({ start, end }),
    ),
  )
  const truth = free.complement(0, image.length)

  test('used() has all that the kernel has after its recovery, and little more', async () => {
    const fileSystem = await xfsType.open(new MemoryDevice(image), {})
    assert.ok(fileSystem instanceof XfsFileSystem)
    const { ranges, trust } = await fileSystem.used({})
    assert.equal(trust, 'replayed')
    assert.equal(truth.subtract(ranges).toString(), '')
    assert.ok(ranges.subtract(truth).size < 2 ** 20)
    assert.equal((await fileSystem.audit({})).subtract(ranges).toString(), '')
  })

  test('mutated outside of the log: never a map that calls free what is in use', async (t) => {
    const random = new Random()
    t.diagnostic(`seed ${random.seed}`)
    const sb = decodeSuperblock(image)
    const agno = Math.floor(sb.logstart / 2 ** sb.agblklog)
    const logStart = (agno * sb.agblocks + (sb.logstart % 2 ** sb.agblklog)) * sb.blockBytes
    const allowed = [
      [0, logStart],
      [logStart + sb.logblocks * sb.blockBytes, image.length],
    ] as const
    const headers = (at: number): number[] =>
      livePages(image.subarray(at, at + 32_768)).map((page) => at + page)
    const pages = [...headers(0), ...headers(sb.agblocks * sb.blockBytes)]
    let refused = 0
    for (let i = 0; i < 200; i++) {
      const mutations = mutate(image, pages, random, allowed)
      const saved = mutations.map(({ offset, bytes: put }) => image.slice(offset, offset + put.length))
      for (const { offset, bytes: put } of mutations) image.set(put, offset)
      try {
        const { ranges } = await (await xfsType.open(new MemoryDevice(image), {})).used({})
        assert.equal(truth.subtract(ranges).toString(), '', `seed ${random.seed}, mutation ${i}`)
      } catch (error) {
        if (!(error instanceof VarveError) || error.code === 'INTERNAL') throw error
        refused++
      } finally {
        for (const [j, { offset }] of [...mutations.entries()].reverse()) image.set(saved[j]!, offset)
      }
    }
    assert.ok(refused > 10, `${refused} refused`)
  })
})

describe('XFS reads', { skip: needs('mkfs.xfs') }, () => {
  test('a 20 GiB file system costs at most 60 KiB and 64 reads', async () => {
    await using dir = await tempDir()
    await makeXfs(dir.file('xfs'), { mib: 20 * 1024 })
    await using device = await openHostFile(dir.file('xfs'))
    const counting = new CountingDevice(device)
    await (await xfsType.open(counting, {})).used({})
    assert.ok(counting.counts.bytesRead <= 60 * 1024, `${counting.counts.bytesRead} bytes`)
    assert.ok(counting.counts.reads <= 64, `${counting.counts.reads} reads`)
  })

  test('a 16 TiB sparse file system takes under 3 s', async () => {
    await using dir = await tempDir()
    // ext4 as the host's file system stops one block short of 16 TiB.
    await makeXfs(dir.file('xfs'), { mib: 16 * 2 ** 20 - 1 })
    await using device = await openHostFile(dir.file('xfs'))
    const start = performance.now()
    const { ranges } = await (await xfsType.open(device, {})).used({})
    assert.ok(performance.now() - start < 3000)
    assert.ok(ranges.size < 3 * 2 ** 30)
  })
})

async function compare(image: string, what: string): Promise<void> {
  await using device = await openHostFile(image)
  const fileSystem = await xfsType.open(device, {})
  assert.ok(fileSystem instanceof XfsFileSystem)
  const used = await fileSystem.used({})
  assert.equal(used.trust, 'exact', what)
  const { btree } = await freeByXfsDb(image)
  const expected = btree.complement(0, device.size)
  assert.equal(expected.subtract(used.ranges).toString(), '', `in use and not in the map (${what})`)
  assert.equal(used.ranges.subtract(expected).toString(), '', `in the map and free (${what})`)

  // The other way round: what inodes own is all of it but the log and the trees of the groups.
  const owned = await fileSystem.audit({})
  assert.equal(owned.subtract(expected).toString(), '', `owned and free (${what})`)
  const log = /log.*bsize=(\d+) +blocks=(\d+)/.exec(await must('xfs_info', [image]))
  const tail = device.size - fileSystem.size
  const rest = expected.subtract(owned).size - Number(log?.[1]) * Number(log?.[2]) - tail
  assert.ok(rest < 2 ** 21, `${rest} bytes in use and not owned (${what})`)
}
