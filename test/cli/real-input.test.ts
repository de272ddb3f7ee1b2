/**
 * A disk as people have it: parts of the running system's /usr on ext4, an ESP and swap in a GPT disk, files written
 * and deleted again; as raw, qcow2, compressed qcow2, a chain three deep, and VHD. The map must be the same through
 * all of them and be dumpe2fs's; every backup must come back as the same disk, by e2fsck and file by file.
 */
import assert from 'node:assert/strict'
import { mkdir, open, readdir, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { must, needs, Random, run, tempDir } from '../kit/index.ts'
import { ok, okJson } from './varve.ts'

const MIB = 1024 * 1024
const SECTOR = 512
const ESP = { start: 1 * MIB, length: 64 * MIB }
const ROOT = { start: 65 * MIB, length: 1024 * MIB }
const SWAP = { start: 1089 * MIB, length: 128 * MIB }
const DISK_BYTES = 1280 * MIB
const CLUSTER = 65_536

/** Copied until there is enough of them; what a system lacks is passed over. */
const PARTS = [
  '/usr/sbin',
  '/usr/bin',
  '/usr/share/perl',
  '/usr/share/zoneinfo',
  '/usr/share/doc',
  '/usr/lib/git-core',
]
const ENOUGH_BYTES = 220 * MIB

type Dir = Awaited<ReturnType<typeof tempDir>>

const SKIP = needs(
  'mke2fs',
  'debugfs',
  'dumpe2fs',
  'e2fsck',
  'sfdisk',
  'mkfs.vfat',
  'mcopy',
  'mkswap',
  'qemu-img',
  'qemu-io',
)

test('a Debian-like disk through every format, map, backup and restore', {
  skip: SKIP,
  timeout: 600_000,
}, async () => {
  await using dir = await tempDir()
  const tree = dir.file('tree')
  await makeTree(tree)
  const raw = dir.file('disk.raw')
  await makeDisk(raw, tree, dir)

  // A chain three deep: each state of the disk is a layer that holds what changed.
  await must('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, dir.file('base.qcow2')])
  let below = 'base.qcow2'
  for (const layer of ['middle.qcow2', 'top.qcow2']) {
    await must('cp', ['--sparse=always', raw, dir.file('before.raw')])
    await change(raw, tree, layer, dir)
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', below, '-F', 'qcow2', dir.file(layer)])
    await writeChanges(dir.file('before.raw'), raw, dir.file(layer), dir)
    below = layer
  }
  await must('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'qcow2', raw, dir.file('top.qcow2')])
  const convert = ['convert', '-f', 'raw', raw]
  await must('qemu-img', [...convert, '-O', 'qcow2', dir.file('plain.qcow2')])
  await must('qemu-img', [...convert, '-O', 'qcow2', '-c', dir.file('compressed.qcow2')])
  await must('qemu-img', [...convert, '-O', 'vpc', '-o', 'force_size=on', dir.file('disk.vhd')])
  const images = ['disk.raw', 'plain.qcow2', 'compressed.qcow2', 'top.qcow2', 'disk.vhd']

  // One map, whatever holds the disk, and dumpe2fs's word on what is free.
  const ranges = await ok(['map', '--in-use', '--ranges', raw])
  const regions = (await inspect(raw)).regions
  for (const name of images.slice(1)) {
    assert.equal(await ok(['map', '--in-use', '--ranges', dir.file(name)]), ranges, name)
    assert.deepEqual((await inspect(dir.file(name))).regions, regions, name)
  }
  assert.equal((await inspect(dir.file('top.qcow2'))).image.layers.length, 3)
  assert.deepEqual(unusedBlocks(ranges), await freeBlocks(raw))

  // The same content is stored once, however it is wrapped; what is not in use is not read.
  const repo = ['--repo', dir.file('repo')]
  await ok(['init', dir.file('repo')])
  interface Done {
    inUseBytes: number
    readBytes: number
    newChunks: number
    reusedChunks: number
  }
  for (const [index, name] of images.entries()) {
    const done = await okJson<Done>(['backup', dir.file(name), '--disk', name, ...repo])
    assert.ok(
      done.readBytes <= done.inUseBytes * 1.05,
      `${name}: read ${done.readBytes} of ${done.inUseBytes}`,
    )
    assert.ok(done.inUseBytes < DISK_BYTES / 2)
    if (index > 0) assert.equal(done.newChunks, 0, `${name} brings nothing new`)
    await ok(['verify', `${name}@latest`, '--against', dir.file(name), ...repo])
  }
  await ok(['verify', ...repo])

  // Back again: equal to the source where it is in use, zero elsewhere, whole to e2fsck, file by file.
  await ok(['convert', '--in-use', raw, dir.file('used.raw')])
  for (const [name, format] of [
    ['disk.raw', 'raw'],
    ['top.qcow2', 'qcow2'],
    ['disk.vhd', 'raw'],
  ] as const) {
    const restored = dir.file(`restored.${format}`)
    await ok(['restore', `${name}@latest`, restored, '-O', format, '--force', ...repo])
    await must('qemu-img', ['compare', '-q', '-f', 'raw', '-F', format, dir.file('used.raw'), restored])
  }
  await must('qemu-img', ['check', '-q', dir.file('restored.qcow2')])
  await must('e2fsck', ['-fn', at(dir.file('restored.raw'))])
  await must('debugfs', ['-R', `rdump / ${await made(dir.file('out'))}`, at(dir.file('restored.raw'))])
  await rm(dir.file('out/lost+found'), { recursive: true, force: true })
  const [mine, its] = [await hashes(dir.file('out')), await hashes(tree)]
  assert.ok(its.length > 500, `${its.length} files`)
  assert.deepEqual(mine, its)
  const loader = await run('mtype', [
    '-i',
    `${dir.file('restored.raw')}@@${ESP.start}`,
    '::EFI/BOOT/BOOTX64.EFI',
  ])
  assert.equal(loader.code, 0)
  assert.ok(loader.stdout.equals(Buffer.alloc(700_000, 'loader')))
})

async function made(folder: string): Promise<string> {
  await mkdir(folder)
  return folder
}

async function inspect(path: string): Promise<{ image: { layers: unknown[] }; regions: unknown }> {
  return await okJson(['inspect', path])
}

/** The file system at ROOT inside a disk, as e2fsprogs name it. */
function at(disk: string): string {
  return `${disk}?offset=${ROOT.start}`
}

async function makeTree(tree: string): Promise<void> {
  await mkdir(join(tree, 'usr'), { recursive: true })
  let bytes = 0
  for (const part of PARTS) {
    if (bytes > ENOUGH_BYTES || !(await stat(part).catch(() => undefined))) continue
    // -a would keep owners, which only root can; what this user cannot read is left out.
    await run('cp', ['-r', '-P', '--preserve=mode,links,timestamps', part, join(tree, 'usr')])
    bytes = Number((await must('du', ['-sb', tree])).split('\t')[0])
  }
  assert.ok(bytes > ENOUGH_BYTES / 4, `this system has ${bytes} bytes to copy`)
  await mkdir(join(tree, 'deleted'))
  const random = new Random(7)
  for (let i = 0; i < 40; i++) {
    await writeFile(
      join(tree, 'deleted', `file${i}`),
      random.bytes(MIB).map((byte) => byte | 1),
    )
  }
}

async function makeDisk(raw: string, tree: string, dir: Dir): Promise<void> {
  await truncateFile(raw, DISK_BYTES)
  const line = ({ start, length }: typeof ESP, type: string): string =>
    `start=${start / SECTOR}, size=${length / SECTOR}, type=${type}\n`
  await must('sfdisk', ['-q', raw], {
    input: `label: gpt\n${line(ESP, 'U')}${line(ROOT, 'L')}${line(SWAP, 'S')}`,
  })

  await truncateFile(dir.file('esp'), ESP.length)
  await must('mkfs.vfat', ['-F', '32', dir.file('esp')])
  await writeFile(dir.file('loader'), Buffer.alloc(700_000, 'loader'))
  await must('mmd', ['-i', dir.file('esp'), '::EFI', '::EFI/BOOT'])
  await must('mcopy', ['-i', dir.file('esp'), dir.file('loader'), '::EFI/BOOT/OLD.EFI'])
  await must('mcopy', ['-i', dir.file('esp'), dir.file('loader'), '::EFI/BOOT/BOOTX64.EFI'])
  await must('mdel', ['-i', dir.file('esp'), '::EFI/BOOT/OLD.EFI'])

  await truncateFile(dir.file('root'), ROOT.length)
  await must('mke2fs', ['-q', '-t', 'ext4', '-J', 'size=16', '-d', tree, dir.file('root')])
  const gone = (await readdir(join(tree, 'deleted'))).map((name) => `rm /deleted/${name}`)
  await must('debugfs', ['-w', '-f', '-', dir.file('root')], {
    input: `${gone.join('\n')}\nrmdir /deleted\n`,
  })
  await rm(join(tree, 'deleted'), { recursive: true })

  await truncateFile(dir.file('swap'), SWAP.length)
  await must('mkswap', ['-q', dir.file('swap')])
  for (const [name, { start }] of [
    ['esp', ESP],
    ['root', ROOT],
    ['swap', SWAP],
  ] as const) {
    const part = dir.file(name)
    await must('dd', [
      `if=${part}`,
      `of=${raw}`,
      'bs=1M',
      `seek=${start / MIB}`,
      'conv=notrunc,sparse',
      'status=none',
    ])
    await rm(part)
  }
}

async function truncateFile(path: string, length: number): Promise<void> {
  const file = await open(path, 'w')
  await file.truncate(length)
  await file.close()
}

/** Some files go, one comes, in the tree and in the disk. */
async function change(raw: string, tree: string, name: string, dir: Dir): Promise<void> {
  const folder = join(tree, 'usr/sbin')
  const gone = (await readdir(folder, { withFileTypes: true })).filter((entry) => entry.isFile()).slice(0, 20)
  for (const entry of gone) await rm(join(folder, entry.name))
  const bytes = new Random(name.length).bytes(3 * MIB + 77)
  await writeFile(join(tree, name), bytes)
  await writeFile(dir.file('new'), bytes)
  const commands = [
    ...gone.map((entry) => `rm "/usr/sbin/${entry.name}"`),
    `write ${dir.file('new')} /${name}`,
  ]
  await must('debugfs', ['-w', '-f', '-', at(raw)], { input: `${commands.join('\n')}\n` })
  await must('e2fsck', ['-fn', at(raw)])
}

/** Writes the clusters in which `after` differs from `before` into the layer. */
async function writeChanges(before: string, after: string, layer: string, dir: Dir): Promise<void> {
  const [old, now] = [await open(before), await open(after)]
  const commands: string[] = []
  try {
    const [a, b] = [Buffer.alloc(CLUSTER * 64), Buffer.alloc(CLUSTER * 64)]
    for (let start = 0; start < DISK_BYTES; start += a.length) {
      await old.read(a, 0, a.length, start)
      await now.read(b, 0, b.length, start)
      if (a.equals(b)) continue
      for (let offset = 0; offset < a.length; offset += CLUSTER) {
        const cluster = b.subarray(offset, offset + CLUSTER)
        if (cluster.equals(a.subarray(offset, offset + CLUSTER))) continue
        const file = dir.file(`cluster${start + offset}`)
        await writeFile(file, cluster)
        commands.push('-c', `write -s ${file} ${start + offset} ${CLUSTER}`)
      }
    }
  } finally {
    await old.close()
    await now.close()
  }
  assert.ok(commands.length > 20, 'the layer holds something')
  await must('qemu-io', [...commands, layer])
  for (const name of await readdir(dir.path)) if (name.startsWith('cluster')) await rm(dir.file(name))
}

/** Blocks of the root file system that the map does not call in use. */
function unusedBlocks(ranges: string): string[] {
  const unused: string[] = []
  let free = ROOT.start
  const add = (to: number): void => {
    const [first, end] = [Math.ceil((free - ROOT.start) / 4096), Math.floor((to - ROOT.start) / 4096)]
    if (first < end) unused.push(first === end - 1 ? `${first}` : `${first}-${end - 1}`)
  }
  for (const line of ranges.trim().split('\n')) {
    const [start = 0, length = 0] = line.split(' ').map(Number)
    if (start + length <= ROOT.start || start >= ROOT.start + ROOT.length) continue
    add(Math.min(start, ROOT.start + ROOT.length))
    free = start + length
  }
  add(ROOT.start + ROOT.length)
  return unused
}

/** As dumpe2fs lists them, runs joined over the bounds of groups. */
async function freeBlocks(raw: string): Promise<string[]> {
  const text = await must('dumpe2fs', [at(raw)])
  const runs: [number, number][] = []
  for (const match of text.matchAll(/^ {2}Free blocks: (.*)$/gm)) {
    for (const piece of match[1]!.split(', ').filter(Boolean)) {
      const [first = 0, last = first] = piece.split('-').map(Number)
      const before = runs.at(-1)
      if (before && before[1] + 1 === first) before[1] = last
      else runs.push([first, last])
    }
  }
  assert.ok(runs.length > 3)
  return runs.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`))
}

/** `hash  path` of every file, and the target of every link. */
async function hashes(folder: string): Promise<string[]> {
  const files = await must('sh', [
    '-c',
    'cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum',
    'sh',
    folder,
  ])
  const links = await must('sh', [
    '-c',
    'cd "$1" && find . -type l -printf "%p -> %l\\n" | sort',
    'sh',
    folder,
  ])
  return [...files.split('\n'), ...links.split('\n')]
}
