/** Btrfs against btrfs-progs and the kernel: dump-tree and mount judge. */
import assert from 'node:assert/strict'
import { mkdir, open, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, Random, run, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import { type BlockDevice, OverlayDevice, openHostFile, readBytes } from '../../device/index.ts'
import { RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import { NotTrusted } from '../file-system.ts'
import { btrfsType, openBtrfs } from './btrfs.ts'

const MiB = 2 ** 20
const skip = needs('mkfs.btrfs', 'btrfs', 'losetup') || needsRoot()

async function makeImages(
  paths: readonly string[],
  sizeBytes: number,
  options: readonly string[],
): Promise<void> {
  for (const path of paths) {
    await writeFile(path, '')
    await truncate(path, sizeBytes)
  }
  await must('mkfs.btrfs', ['-q', '-f', '-L', 'varve', ...options, ...paths])
}

/** Mounts the file system on `paths` through loop devices, runs `fill` in it, unmounts. */
async function withMount(
  paths: readonly string[],
  fill: (folder: string) => Promise<void>,
  options = 'defaults',
): Promise<void> {
  const folder = `${paths[0]}.mnt`
  await mkdir(folder, { recursive: true })
  const loops: string[] = []
  try {
    for (const path of paths) loops.push((await must('losetup', ['-f', '--show', path])).trim())
    if (loops.length > 1) await must('btrfs', ['device', 'scan', ...loops])
    const devices = loops.map((loop) => `device=${loop}`).join(',')
    await must('mount', [
      '-t',
      'btrfs',
      '-o',
      loops.length > 1 ? `${options},${devices}` : options,
      loops[0]!,
      folder,
    ])
    try {
      await fill(folder)
    } finally {
      await must('umount', [folder])
    }
  } finally {
    for (const loop of loops) await run('losetup', ['-d', loop])
    if (loops.length > 1) await run('btrfs', ['device', 'scan', '--forget'])
  }
}

/** Large, small, inline and compressible files; a third removed; a snapshot whose origin moves on. */
async function fillSeeded(folder: string, seed: number): Promise<void> {
  const random = new Random(seed)
  const script = ['set -e', `cd ${folder}`, 'btrfs -q subvolume create sub', 'mkdir a']
  for (let i = 0; i < 80; i++)
    script.push(
      `head -c ${random.pick([100, 3000, 20_000, 300_000, 2_000_000])} /dev/urandom > ${random.pick(['a', 'sub'])}/f${i}`,
    )
  script.push(
    'sync',
    'btrfs -q subvolume snapshot sub snap',
    'rm -f a/f1* sub/f2* a/f3*',
    'head -c 400000 /dev/urandom > a/late',
    'sync',
  )
  await must('sh', ['-c', script.join('\n')])
}

interface Opened extends AsyncDisposable {
  readonly files: readonly BlockDevice[]
  /** Used ranges per device, what the reader adds for super blocks and tails included. */
  readonly used: readonly RangeSet[]
  readonly trust: string
}

async function openAll(paths: readonly string[]): Promise<Opened> {
  const files = await Promise.all(paths.map((path) => openHostFile(path)))
  const systems = await openBtrfs(files, {})
  const maps = await Promise.all(systems.map((fs) => fs.used({})))
  return {
    files,
    used: maps.map((map) => map.ranges),
    trust: maps[0]!.trust,
    [Symbol.asyncDispose]: async () => {
      for (const file of files) await file[Symbol.asyncDispose]()
    },
  }
}

/**
 * What btrfs-progs prints, put together independently: extent items through the chunk tree's stripes, per device.
 * Written for one-column profiles, RAID0 and RAID10 by walking 64 KiB at a time.
 */
async function oracle(path: string, sizes: ReadonlyMap<number, number>): Promise<Map<number, RangeSet>> {
  const dump = (tree: string): Promise<string> =>
    must('btrfs', ['inspect-internal', 'dump-tree', '-t', tree, path])
  const chunks: {
    start: number
    length: number
    type: string
    sub: number
    stripes: { devid: number; offset: number }[]
  }[] = []
  for (const line of (await dump('chunk')).split('\n')) {
    const key = line.match(/key \(FIRST_CHUNK_TREE CHUNK_ITEM (\d+)\)/)
    if (key) chunks.push({ start: Number(key[1]), length: 0, type: '', sub: 1, stripes: [] })
    const head = line.match(/^\s+length (\d+) owner \d+ stripe_len 65536 type (\S+)/)
    if (head) Object.assign(chunks.at(-1)!, { length: Number(head[1]), type: head[2] })
    const sub = line.match(/num_stripes \d+ sub_stripes (\d+)/)
    if (sub) chunks.at(-1)!.sub = Number(sub[1])
    const stripe = line.match(/stripe \d+ devid (\d+) offset (\d+)/)
    if (stripe) chunks.at(-1)!.stripes.push({ devid: Number(stripe[1]), offset: Number(stripe[2]) })
  }
  const nodeBytes = Number(
    (await must('btrfs', ['inspect-internal', 'dump-super', path])).match(/^nodesize\s+(\d+)/m)![1],
  )
  const out = new Map([...sizes.keys()].map((devid) => [devid, new RangeSetBuilder().add(0, MiB)]))
  for (const [devid, size] of sizes) {
    if (size > 64 * MiB + 4096) out.get(devid)!.add(64 * MiB, 64 * MiB + 65536)
  }
  for (const match of (await dump('extent')).matchAll(/key \((\d+) (EXTENT_ITEM|METADATA_ITEM) (\d+)\)/g)) {
    const start = Number(match[1])
    const length = match[2] === 'EXTENT_ITEM' ? Number(match[3]) : nodeBytes
    for (let at = start; at < start + length; at += 4096) {
      const chunk = chunks.find((one) => at >= one.start && at < one.start + one.length)!
      const inside = at - chunk.start
      const columns = /RAID0/.test(chunk.type)
        ? chunk.stripes.length
        : /RAID10/.test(chunk.type)
          ? chunk.stripes.length / chunk.sub
          : 1
      const row = Math.floor(inside / 65536)
      const copies = chunk.stripes.length / columns
      const offset = columns === 1 ? inside : Math.floor(row / columns) * 65536 + (inside % 65536)
      const first = columns === 1 ? 0 : (row % columns) * copies
      for (const stripe of chunk.stripes.slice(first, first + copies))
        out.get(stripe.devid)!.add(stripe.offset + offset, stripe.offset + offset + 4096)
    }
  }
  return new Map([...out].map(([devid, builder]) => [devid, builder.build()]))
}

describe('Btrfs', { skip }, () => {
  const variants: readonly [string, number, number, readonly string[], string?][] = [
    ['single data, DUP metadata', 1, 160, ['-d', 'single', '-m', 'dup']],
    ['all single', 1, 140, ['-d', 'single', '-m', 'single']],
    ['DUP data', 1, 256, ['-d', 'dup', '-m', 'dup']],
    ['mixed block groups, 4 KiB nodes', 1, 160, ['--mixed', '-n', '4096']],
    ['no free space tree', 1, 160, ['-R', '^free-space-tree'], 'space_cache=v1'],
    ['no holes off, 64 KiB nodes', 1, 160, ['-O', '^no-holes', '-n', '65536']],
    ['quota groups', 1, 160, ['-R', 'quota']],
    ['xxhash', 1, 140, ['--csum', 'xxhash']],
    ['sha256', 1, 140, ['--csum', 'sha256']],
    ['blake2b', 1, 140, ['--csum', 'blake2']],
    ['RAID0 on two devices', 2, 160, ['-d', 'raid0', '-m', 'raid1']],
    ['RAID1C3 on three devices', 3, 140, ['-d', 'raid1c3', '-m', 'raid1c3']],
    ['RAID10 on four devices', 4, 140, ['-d', 'raid10', '-m', 'raid10']],
  ]
  for (const [name, count, mib, options, mountOptions] of variants) {
    test(`used() equals the extent tree through the chunk tree: ${name}`, async () => {
      await using dir = await tempDir()
      const paths = Array.from({ length: count }, (_, i) => dir.file(`b${i + 1}`))
      await makeImages(paths, mib * MiB, options)
      await withMount(paths, (folder) => fillSeeded(folder, mib + count), mountOptions)
      await using opened = await openAll(paths)
      assert.equal(opened.trust, 'exact')
      const loops: string[] = []
      try {
        // dump-tree finds the other devices by itself once they are block devices that were scanned.
        for (const path of paths) loops.push((await must('losetup', ['-r', '-f', '--show', path])).trim())
        if (count > 1) await must('btrfs', ['device', 'scan', ...loops])
        const expected = await oracle(loops[0]!, new Map(paths.map((_, i) => [i + 1, mib * MiB])))
        for (const [i, used] of opened.used.entries()) {
          assert.equal(
            String(used),
            String(expected.get(i + 1)!.union(RangeSet.of(opened.files[i]!.size, opened.files[i]!.size))),
            `device ${i + 1}`,
          )
        }
      } finally {
        for (const loop of loops) await run('losetup', ['-d', loop])
        if (count > 1) await run('btrfs', ['device', 'scan', '--forget'])
      }
      const systems = await openBtrfs(opened.files, {})
      const audited = await (systems[0] as unknown as { audit(c: object): Promise<RangeSet> }).audit({})
      assert.equal(String(audited.subtract(opened.used[0]!)), '')
    })
  }

  test('one device of several, and RAID5, are refused with the reason', async () => {
    await using dir = await tempDir()
    const pair = [dir.file('a'), dir.file('b')]
    await makeImages(pair, 140 * MiB, ['-d', 'raid1', '-m', 'raid1'])
    await using one = await openHostFile(pair[0]!)
    await assert.rejects(
      btrfsType.open(one, {}),
      (error) => error instanceof NotTrusted && error.reason === 'btrfs-devices-missing',
    )
    const three = [dir.file('c'), dir.file('d'), dir.file('e')]
    await makeImages(three, 140 * MiB, ['-d', 'raid5', '-m', 'raid1'])
    await assert.rejects(
      openAll(three),
      (error) => error instanceof NotTrusted && error.reason === 'btrfs-raid56',
    )
  })

  for (const seed of [1, 2]) {
    test(`poison: copied while mounted, log trees walked, no file differs (seed ${seed})`, async () => {
      await using dir = await tempDir()
      const path = dir.file('live')
      const copy = dir.file('copy')
      const poisoned = dir.file('poisoned')
      await makeImages([path], 300 * MiB, ['-d', 'single', '-m', 'dup'])
      let synced = ''
      await withMount([path], async (folder) => {
        await fillSeeded(folder, seed)
        // fsync outside a commit goes into the log trees; dd conv=fsync does nothing else.
        const script = `cd ${folder}; for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=fsynced$i bs=100k count=$((i * 3)) conv=fsync status=none; done; rm -f a/f4*; dd if=/dev/urandom of=a/late bs=64k count=9 conv=notrunc,fsync status=none; sha256sum fsynced* a/late`
        synced = await must('sh', ['-c', script])
        await must('cp', ['--sparse=always', path, copy])
      })
      await must('cp', ['--sparse=always', copy, poisoned])
      await using opened = await openAll([copy])
      assert.equal(opened.trust, 'replayed', 'the copy has log trees')
      const unused = opened.used[0]!.complement(0, opened.files[0]!.size)
      assert.ok(unused.size > 100 * MiB)
      const handle = await open(poisoned, 'r+')
      try {
        for (const { start, end } of unused) {
          for (let at = start; at < end; at += 4 * MiB) {
            const length = Math.min(4 * MiB, end - at)
            await handle.write(new Uint8Array(length).fill(0xa5), 0, length, at)
          }
        }
      } finally {
        await handle.close()
      }
      const hashes = (folder: string): Promise<string> =>
        must('sh', ['-c', `cd ${folder} && find . -type f -print0 | sort -z | xargs -0 sha256sum`])
      const [plain, after] = ['', '']
      const results = [plain, after]
      await withMount([copy], async (folder) => {
        results[0] = await hashes(folder)
        assert.equal(await must('sh', ['-c', `cd ${folder} && sha256sum fsynced* a/late`]), synced)
      })
      await withMount([poisoned], async (folder) => {
        results[1] = await hashes(folder)
        await must('btrfs', ['scrub', 'start', '-B', folder])
      })
      assert.equal(results[1], results[0])
      await must('btrfs', ['check', '--readonly', poisoned])
    })
  }

  test('a damaged node is read from its second copy; with both damaged nothing is trusted', async () => {
    await using dir = await tempDir()
    const path = dir.file('b')
    await makeImages([path], 160 * MiB, ['-d', 'single', '-m', 'dup'])
    await withMount([path], (folder) => fillSeeded(folder, 5))
    await using opened = await openAll([path])
    const file = opened.files[0]!
    const text = await must('btrfs', ['inspect-internal', 'dump-super', path])
    const root = Number(text.match(/^root\s+(\d+)/m)![1])
    const map = await must('btrfs-map-logical', ['-l', String(root), path])
    const copies = [...map.matchAll(/physical (\d+)/g)].map((match) => Number(match[1]))
    assert.equal(copies.length, 2)
    const damage = async (offsets: readonly number[]): Promise<OverlayDevice> => {
      const overlay = new OverlayDevice(file)
      for (const at of offsets)
        overlay.patch(at + 200, Uint8Array.of((await readBytes(file, at + 200, 1))[0]! ^ 4))
      return overlay
    }
    const fs = await btrfsType.open(await damage([copies[0]!]), {})
    assert.equal(String((await fs.used({})).ranges), String(opened.used[0]!))
    const both = await btrfsType.open(await damage(copies), {})
    await assert.rejects(
      both.used({}),
      (error) => error instanceof NotTrusted && error.reason === 'btrfs-checksum',
    )
    await assert.rejects(
      btrfsType.open(await damage([65536]), {}),
      (error) => error instanceof NotTrusted && error.reason === 'btrfs-checksum',
    )
  })

  test('fields at their extremes, checksums made right again, end in one clear error or a map that holds everything', async () => {
    await using dir = await tempDir()
    const path = dir.file('b')
    await makeImages([path], 140 * MiB, ['-d', 'single', '-m', 'single', '-n', '4096'])
    await withMount([path], (folder) => must('sh', ['-c', `echo x > ${folder}/x`]).then(() => {}))
    await using file = await openHostFile(path)
    const { crc32c } = await import('../../base/index.ts')
    const random = new Random()
    const sb = await readBytes(file, 65536, 4096)
    for (let i = 0; i < 400; i++) {
      const changed = sb.slice()
      const view = new DataView(changed.buffer)
      const at = random.pick([
        0x30,
        0x38,
        0x48,
        0x50,
        0x58,
        0x60,
        0x70,
        0x78,
        0x88,
        0x90,
        0x94,
        0xa0,
        0xb4,
        0xbc,
        0xc4,
        0xc6,
        0xc9,
        0x32b + random.below(200),
      ])
      view.setBigUint64(
        at,
        random.pick([
          0n,
          1n,
          0xffn,
          0xffff_ffffn,
          1n << 40n,
          1n << 62n,
          1n << 63n,
          (1n << 64n) - 1n,
          BigInt(random.below(2 ** 30)),
        ]),
        true,
      )
      view.setUint32(0, crc32c(changed.subarray(32)), true)
      const overlay = new OverlayDevice(file)
      overlay.patch(65536, changed)
      try {
        if (!(await btrfsType.probe(overlay))) continue
        await (await btrfsType.open(overlay, {})).used({})
      } catch (error) {
        assert.ok(
          isVarveError(error) && error.code !== 'INTERNAL',
          `seed ${random.seed}, case ${i}, field 0x${at.toString(16)}: ${(error as Error).stack}`,
        )
      }
    }
  })
})
