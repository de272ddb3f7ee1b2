/** NTFS against ntfs-3g's own tools: mkntfs and ntfs-3g write, ntfscat and ntfsinfo judge. */
import assert from 'node:assert/strict'
import { copyFile, mkdir, open, readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, Random, run, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import { MemoryDevice, openHostFile } from '../../device/index.ts'
import { Bitmap, RangeSet } from '../../extents/index.ts'
import { NotTrusted } from '../file-system.ts'
import { decodeRuns } from './layout.ts'
import { type Ntfs, ntfsType } from './ntfs.ts'

const MiB = 2 ** 20
const skip = needs('mkntfs', 'ntfs-3g', 'ntfscat', 'ntfsinfo') || needsRoot()

async function makeVolume(path: string, sizeBytes: number, options: readonly string[]): Promise<void> {
  await writeFile(path, '')
  await truncate(path, sizeBytes)
  await must('mkntfs', ['-F', '-q', '-L', 'varve', ...options, path])
}

/** Mounts, runs `fill` in the folder, unmounts. */
async function withMount(path: string, fill: (folder: string) => Promise<void>): Promise<void> {
  const folder = `${path}.mnt`
  await mkdir(folder, { recursive: true })
  await must('ntfs-3g', [path, folder])
  try {
    await fill(folder)
  } finally {
    await must('umount', [folder])
  }
}

/** Files of random content, a third of them removed again, and one grown in turns with others so that it is fragmented. */
async function fillSeeded(folder: string, seed: number): Promise<void> {
  const random = new Random(seed)
  const script = ['set -e', `cd ${folder}`, 'mkdir a b']
  for (let i = 0; i < 60; i++) {
    script.push(`head -c ${1 + random.below(200_000)} /dev/urandom > ${random.pick(['a', 'b'])}/f${i}`)
    script.push(`head -c 5000 /dev/urandom >> grown`)
  }
  script.push('rm -f a/f1* b/f2* a/f3*')
  await must('sh', ['-c', script.join('\n')])
}

async function usedOf(path: string): Promise<{ used: RangeSet; size: number; fs: Ntfs }> {
  await using file = await openHostFile(path)
  assert.equal(await ntfsType.probe(file), true)
  const fs = (await ntfsType.open(file, {})) as Ntfs
  const map = await fs.used({})
  assert.equal(map.trust, 'exact')
  return { used: map.ranges, size: file.size, fs }
}

/** The map as ntfs-3g sees it: the content of record 6, in clusters. */
async function oracle(path: string, clusterBytes: number, clusters: number, size: number): Promise<RangeSet> {
  const result = await run('ntfscat', ['-f', '-i', '6', path])
  assert.equal(result.code, 0, result.stderr)
  return Bitmap.fromBytes(result.stdout, clusters)
    .toRanges()
    .scale(clusterBytes)
    .union(RangeSet.of(clusters * clusterBytes, size))
}

async function reasonOf(path: string): Promise<string> {
  await using file = await openHostFile(path)
  try {
    await (await ntfsType.open(file, {})).used({})
    return 'trusted'
  } catch (error) {
    if (error instanceof NotTrusted) return error.reason
    throw error
  }
}

describe('NTFS', { skip }, () => {
  const variants: readonly [string, number, readonly string[]][] = [
    ['512-byte clusters', 20 * MiB, ['-c', '512']],
    ['1 KiB clusters', 24 * MiB, ['-c', '1024']],
    ['4 KiB clusters', 40 * MiB, ['-c', '4096']],
    ['4 KiB clusters, odd size', 40 * MiB + 512 * 13, ['-c', '4096']],
    ['64 KiB clusters', 64 * MiB, ['-c', '65536']],
    ['2 MiB clusters', 600 * MiB, ['-c', '2097152']],
    ['4 KiB sectors', 64 * MiB, ['-s', '4096']],
  ]
  for (const [name, size, options] of variants) {
    test(`used() equals $Bitmap as ntfscat reads it: ${name}`, async () => {
      await using dir = await tempDir()
      const path = dir.file('n')
      await makeVolume(path, size, options)
      await withMount(path, (folder) => fillSeeded(folder, size))
      const { used, fs } = await usedOf(path)
      assert.equal(fs.label, 'varve')
      const info = await must('ntfsinfo', ['-f', '-m', path])
      const clusters = Number(info.match(/Volume Size in Clusters: (\d+)/)![1])
      const free = Number(info.match(/Free Clusters: (\d+)/)![1])
      assert.equal(String(used), String(await oracle(path, fs.blockBytes, clusters, size)))
      assert.equal(used.clip(0, clusters * fs.blockBytes).size / fs.blockBytes, clusters - free)
      assert.ok(used.covers(size - 512, size), 'the backup boot sector is in use')
    })
  }

  test('poison: nothing that the map calls unused is missed by ntfs-3g', async () => {
    await using dir = await tempDir()
    const path = dir.file('n')
    await makeVolume(path, 64 * MiB, [])
    const hashes = (folder: string): Promise<string> =>
      must('sh', ['-c', `cd ${folder} && find . -type f -print0 | sort -z | xargs -0 sha256sum`])
    let before = ''
    await withMount(path, async (folder) => {
      await fillSeeded(folder, 7)
      before = await hashes(folder)
    })
    const { used, size } = await usedOf(path)
    const unused = used.complement(0, size)
    assert.ok(unused.size > 30 * MiB)
    const handle = await open(path, 'r+')
    try {
      for (const { start, end } of unused)
        await handle.write(new Uint8Array(end - start).fill(0xa5), 0, end - start, start)
    } finally {
      await handle.close()
    }
    await withMount(path, async (folder) => assert.equal(await hashes(folder), before))
    const check = await run('ntfsfix', ['-n', path])
    assert.equal(check.code, 0, check.stdout.toString())
  })

  test('audit() finds nothing in use that the map lacks', async () => {
    await using dir = await tempDir()
    const path = dir.file('n')
    await makeVolume(path, 48 * MiB, [])
    await withMount(path, (folder) => fillSeeded(folder, 11))
    await using file = await openHostFile(path)
    const fs = (await ntfsType.open(file, {})) as Ntfs
    const { ranges } = await fs.used({})
    const owned = await fs.audit({})
    assert.ok(owned.size > MiB)
    assert.equal(String(owned.subtract(ranges)), '')
    assert.equal(
      String(ranges.clip(0, 48 * MiB - fs.blockBytes).subtract(owned)),
      '',
      'every used cluster has an owner',
    )
  })

  test('a $MFT in many pieces (attribute list) is read', async () => {
    await using dir = await tempDir()
    const path = dir.file('n')
    await makeVolume(path, 24 * MiB, ['-c', '512', '-z', '1'])
    await withMount(path, async (folder) => {
      // The volume full of small files, every second one removed: the table can only grow into the holes, piece by piece.
      const script =
        'mkdir d; i=0; while head -c 6000 /dev/zero > d/x$i 2>/dev/null; do i=$((i+1)); done; rm d/x*[13579]; for i in $(seq 5000); do : > d/$i || break; done; true'
      await must('sh', ['-c', `cd ${folder}; ${script}`])
    })
    assert.match(
      await must('ntfsinfo', ['-f', '-i', '0', path]),
      /ATTRIBUTE_LIST/,
      'the table is in many pieces',
    )
    const { used, size, fs } = await usedOf(path)
    assert.equal(String(used), String(await oracle(path, 512, Math.floor((size - 512) / 512), size)))
    await using file = await openHostFile(path)
    assert.equal(String((await ((await ntfsType.open(file, {})) as Ntfs).audit({})).subtract(used)), '')
    assert.equal(fs.blockBytes, 512)
  })

  test('pageFiles() are the clusters of pagefile.sys, swapfile.sys and hiberfil.sys', async () => {
    await using dir = await tempDir()
    const path = dir.file('n')
    await makeVolume(path, 48 * MiB, ['-c', '4096'])
    await withMount(path, async (folder) => {
      for (const name of ['pagefile.sys', 'hiberfil.sys', 'SwapFile.sys', 'other.sys']) {
        await writeFile(`${folder}/${name}`, new Uint8Array(MiB))
      }
    })
    await using file = await openHostFile(path)
    const fs = (await ntfsType.open(file, {})) as Ntfs
    const pages = await fs.pageFiles()
    assert.equal(pages.size, 3 * MiB - 4096, 'the header of the hibernation file is kept')
    assert.equal(String(pages.subtract((await fs.used({})).ranges)), '')
  })

  test('a volume that is not clean is refused with the exact reason', async () => {
    await using dir = await tempDir()
    const clean = dir.file('clean')
    await makeVolume(clean, 24 * MiB, ['-c', '4096'])
    await withMount(clean, (folder) => fillSeeded(folder, 3))
    const bytes = await readFile(clean)
    const changed = async (change: (bytes: Buffer) => void): Promise<string> => {
      const copy = Buffer.from(bytes)
      change(copy)
      await writeFile(dir.file('changed'), copy)
      return reasonOf(dir.file('changed'))
    }
    assert.equal(await changed(() => {}), 'trusted')
    const mft = bytes.readUInt32LE(0x30) * 4096
    const record = (number: number): number => mft + number * 1024
    const attribute = (number: number, type: number): number => {
      let at = record(number) + bytes.readUInt16LE(record(number) + 20)
      while (bytes.readUInt32LE(at) !== type) at += bytes.readUInt32LE(at + 4)
      return at
    }
    const information = attribute(3, 0x70)
    const flagsAt = information + bytes.readUInt16LE(information + 20) + 10
    assert.equal(await changed((b) => b.writeUInt16LE(1, flagsAt)), 'ntfs-dirty')
    assert.equal(await changed((b) => b.writeUInt16LE(2, flagsAt)), 'ntfs-volume-flags')

    const logData = attribute(2, 0x80)
    const pairs = bytes.subarray(
      logData + bytes.readUInt16LE(logData + 32),
      logData + bytes.readUInt32LE(logData + 4),
    )
    const log = decodeRuns(pairs, 0, 6144, '$LogFile')[0]!.lcn! * 4096
    const restart = (b: Buffer, major: number, client: number, flags: number): void => {
      for (const at of [log, log + 4096]) {
        b.fill(0, at, at + 4096)
        b.write('RSTR', at, 'latin1')
        b.writeUInt16LE(30, at + 4)
        b.writeUInt16LE(9, at + 6)
        b.writeUInt32LE(4096, at + 16)
        b.writeUInt32LE(4096, at + 20)
        b.writeUInt16LE(64, at + 24)
        b.writeUInt16LE(major, at + 28)
        b.writeUInt16LE(client, at + 64 + 12)
        b.writeUInt16LE(flags, at + 64 + 14)
        b.writeUInt16LE(1, at + 30)
        for (let i = 1; i < 9; i++) b.writeUInt16LE(1, at + i * 512 - 2)
      }
    }
    assert.equal(await changed((b) => restart(b, 1, 0xffff, 0)), 'trusted')
    assert.equal(await changed((b) => restart(b, 1, 0, 2)), 'trusted')
    assert.equal(await changed((b) => restart(b, 1, 0, 0)), 'ntfs-log-not-clean')
    assert.equal(await changed((b) => restart(b, 2, 0xffff, 0)), 'ntfs-fast-startup')
    assert.equal(await changed((b) => b.fill(0, log, log + 8192)), 'ntfs-log-invalid')

    await copyFile(clean, dir.file('hibernated'))
    await withMount(dir.file('hibernated'), async (folder) => {
      const image = Buffer.alloc(65536)
      image.write('HIBR', 0, 'latin1')
      await writeFile(`${folder}/hiberfil.sys`, image)
    })
    assert.equal(await reasonOf(dir.file('hibernated')), 'ntfs-hibernated')

    // Structures that contradict each other.
    assert.equal(await changed((b) => b.fill(0, 0, 512)), 'ntfs-boot-damaged')
    assert.equal(await changed((b) => b.writeUInt8(0, record(6))), 'ntfs-record-invalid')
    assert.equal(await changed((b) => b.writeUInt16LE(0x1234, record(6) + 510)), 'ntfs-record-torn')
    assert.equal(await changed((b) => b.writeBigUInt64LE(1n << 40n, 0x28)), 'ntfs-size-mismatch')
    const bitmapData = attribute(6, 0x80)
    const bitmapRuns = bytes.subarray(
      bitmapData + bytes.readUInt16LE(bitmapData + 32),
      bitmapData + bytes.readUInt32LE(bitmapData + 4),
    )
    const bitmapLcn = decodeRuns(bitmapRuns, 0, 6144, '$Bitmap')[0]!.lcn!
    assert.equal(
      await changed((b) => b.fill(0, bitmapLcn * 4096, bitmapLcn * 4096 + 4096)),
      'ntfs-bitmap-invalid',
    )
  })

  test('a bit flipped anywhere in what is read never ends in another exception, a hang or a smaller map', async () => {
    await using dir = await tempDir()
    const path = dir.file('n')
    await makeVolume(path, 8 * MiB, ['-c', '4096'])
    await withMount(path, (folder) => writeFile(`${folder}/f`, new Uint8Array(100_000).fill(7)))
    const bytes = new Uint8Array(await readFile(path))
    const random = new Random()
    const mft = new DataView(bytes.buffer).getUint32(0x30, true) * 4096
    for (let i = 0; i < 3000; i++) {
      const at = random.below(3) === 0 ? random.below(512) : mft + random.below(16 * 1024)
      const old = bytes[at]!
      bytes[at] = random.below(2) === 0 ? old ^ (1 << random.below(8)) : random.pick([0, 0xff, 0x80, 0x7f])
      try {
        await (await ntfsType.open(new MemoryDevice(bytes), {})).used({})
      } catch (error) {
        assert.ok(
          isVarveError(error) && error.code !== 'INTERNAL',
          `seed ${random.seed}, case ${i}, byte ${at}: ${(error as Error).stack}`,
        )
      } finally {
        bytes[at] = old
      }
    }
  })
})

test('decodeRuns() refuses runs outside the volume and lists without an end', () => {
  const refuse = (...bytes: number[]): void => {
    assert.throws(
      () => decodeRuns(Uint8Array.from(bytes), 0, 100, 'test'),
      (error) => error instanceof NotTrusted,
    )
  }
  assert.deepEqual(decodeRuns(Uint8Array.of(0x11, 4, 10, 0x11, 2, 0xfb, 0x01, 3, 0), 5, 100, 'test'), [
    { vcn: 5, lcn: 10, clusters: 4 },
    { vcn: 9, lcn: 5, clusters: 2 },
    { vcn: 11, lcn: undefined, clusters: 3 },
  ])
  refuse(0x11, 4, 10)
  refuse(0x11, 4, 0x80, 0)
  refuse(0x11, 4, 99, 0)
  refuse(0x11, 0xff, 1, 0)
  refuse(0x19, 1)
  refuse(0x10, 0)
})
