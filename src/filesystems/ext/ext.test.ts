/** ext2/3/4 against e2fsprogs: the used set of each kind of file system that mke2fs makes, bit for bit. */
import assert from 'node:assert/strict'
import { mkdir, stat, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, Random, run, tempDir } from '../../../test/kit/index.ts'
import { dumpe2fs } from '../../../test/oracle/dumpe2fs.ts'
import { mounted } from '../../../test/poison/mount.ts'
import { CountingDevice, openHostFile } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import type { FileSystem, UsedMap } from '../file-system.ts'
import { extType } from './index.ts'

interface Variant {
  readonly name: string
  readonly kind: 'ext2' | 'ext3' | 'ext4'
  /** Arguments of mke2fs before the image. */
  readonly args: readonly string[]
  /** Size of the image in MiB; sparse. */
  readonly mib: number
  /** MiB that resize2fs makes it afterwards. */
  readonly grownMib?: number
  /** Nothing is deleted: opening for writing takes ten seconds with mmp. */
  readonly untouched?: boolean
}

const VARIANTS: readonly Variant[] = [
  { name: 'ext4 default', kind: 'ext4', args: ['-t', 'ext4'], mib: 512 },
  { name: 'ext4 1k blocks', kind: 'ext4', args: ['-t', 'ext4', '-b', '1024'], mib: 256 },
  { name: 'ext4 2k blocks', kind: 'ext4', args: ['-t', 'ext4', '-b', '2048'], mib: 300 },
  { name: 'ext4 8k blocks', kind: 'ext4', args: ['-t', 'ext4', '-b', '8192'], mib: 1500 },
  { name: 'ext4 64k blocks', kind: 'ext4', args: ['-t', 'ext4', '-b', '65536'], mib: 9000 },
  { name: 'ext4 without 64bit', kind: 'ext4', args: ['-t', 'ext4', '-O', '^64bit'], mib: 512 },
  {
    name: 'ext4 with crc16 descriptors',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', '^metadata_csum,uninit_bg'],
    mib: 1024,
  },
  {
    name: 'ext4 with crc16 descriptors, 32 bit',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', '^metadata_csum,uninit_bg,^64bit'],
    mib: 1024,
  },
  {
    name: 'ext4 without any checksum',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', '^metadata_csum,^uninit_bg'],
    mib: 512,
  },
  { name: 'ext4 without flex_bg', kind: 'ext4', args: ['-t', 'ext4', '-O', '^flex_bg'], mib: 1024 },
  {
    name: 'ext4 meta_bg, 4k',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', 'meta_bg,^resize_inode'],
    mib: 20_000,
  },
  {
    name: 'ext4 meta_bg, 1k',
    kind: 'ext4',
    args: ['-t', 'ext4', '-b', '1024', '-O', 'meta_bg,^resize_inode'],
    mib: 600,
  },
  {
    name: 'ext4 meta_bg, 1k, no flex_bg',
    kind: 'ext4',
    args: ['-t', 'ext4', '-b', '1024', '-O', 'meta_bg,^resize_inode,^flex_bg'],
    mib: 600,
  },
  {
    name: 'ext4 sparse_super2',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', 'sparse_super2,^resize_inode'],
    mib: 2048,
  },
  {
    name: 'ext4 sparse_super2, one copy',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', 'sparse_super2', '-E', 'num_backup_sb=1'],
    mib: 2048,
  },
  {
    name: 'ext4 without sparse_super',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', '^sparse_super,^resize_inode'],
    mib: 1024,
  },
  { name: 'ext4 bigalloc', kind: 'ext4', args: ['-t', 'ext4', '-O', 'bigalloc', '-C', '65536'], mib: 1024 },
  {
    name: 'ext4 bigalloc, 1k blocks',
    kind: 'ext4',
    args: ['-t', 'ext4', '-b', '1024', '-O', 'bigalloc', '-C', '16384'],
    mib: 512,
  },
  {
    name: 'ext4 bigalloc, odd size',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', 'bigalloc', '-C', '32768'],
    mib: 4999,
  },
  { name: 'ext4 without resize_inode', kind: 'ext4', args: ['-t', 'ext4', '-O', '^resize_inode'], mib: 512 },
  { name: 'ext4 without a journal', kind: 'ext4', args: ['-t', 'ext4', '-O', '^has_journal'], mib: 512 },
  {
    name: 'ext4 packed_meta_blocks',
    kind: 'ext4',
    args: ['-t', 'ext4', '-E', 'packed_meta_blocks=1'],
    mib: 4096,
  },
  { name: 'ext4 flex group of 64', kind: 'ext4', args: ['-t', 'ext4', '-G', '64'], mib: 12_000 },
  { name: 'ext4 grown', kind: 'ext4', args: ['-t', 'ext4'], mib: 200, grownMib: 6000 },
  {
    name: 'ext4 grown past its reserve',
    kind: 'ext4',
    args: ['-t', 'ext4', '-b', '1024', '-E', 'resize=300000'],
    mib: 200,
    grownMib: 3000,
  },
  { name: 'ext4 shrunk', kind: 'ext4', args: ['-t', 'ext4'], mib: 2000, grownMib: 700 },
  {
    name: 'ext4 orphan_file, quota, project',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', 'orphan_file,quota,project'],
    mib: 512,
  },
  { name: 'ext4 mmp', kind: 'ext4', args: ['-t', 'ext4', '-O', 'mmp'], mib: 512, untouched: true },
  {
    name: 'ext4 inline_data, large_dir, casefold, ea_inode',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', 'inline_data,large_dir,casefold,ea_inode'],
    mib: 512,
  },
  { name: 'ext4 fast_commit', kind: 'ext4', args: ['-t', 'ext4', '-O', 'fast_commit'], mib: 512 },
  {
    name: 'ext4 metadata_csum_seed',
    kind: 'ext4',
    args: ['-t', 'ext4', '-O', 'metadata_csum_seed'],
    mib: 512,
  },
  { name: 'ext4 128-byte inodes', kind: 'ext4', args: ['-t', 'ext4', '-I', '128'], mib: 512 },
  {
    name: 'ext4 small groups',
    kind: 'ext4',
    args: ['-t', 'ext4', '-g', '2048', '-O', '^resize_inode'],
    mib: 256,
  },
  { name: 'ext3', kind: 'ext3', args: ['-t', 'ext3'], mib: 512 },
  { name: 'ext3 1k blocks', kind: 'ext3', args: ['-t', 'ext3', '-b', '1024'], mib: 128 },
  { name: 'ext2', kind: 'ext2', args: ['-t', 'ext2'], mib: 512 },
  {
    name: 'ext2 revision 0',
    kind: 'ext2',
    args: ['-t', 'ext2', '-r', '0', '-b', '1024', '-O', 'none'],
    mib: 64,
  },
]

/** Bytes past the last whole MiB: the tail behind the file system. */
const TAIL_BYTES = 3 * 512

async function populate(folder: string, random: Random): Promise<string[]> {
  const names: string[] = []
  for (let i = 0; i < 60; i++) {
    const directory = `d${i % 5}`
    await mkdir(join(folder, directory), { recursive: true })
    const name = `${directory}/f${i}`
    const length = random.pick([0, 40, 700, 5000, 70_000, 400_000])
    await writeFile(join(folder, name), Buffer.alloc(length + random.below(3000), `${i}`))
    names.push(name)
  }
  return names
}

async function make(variant: Variant, image: string, tree: string, names: readonly string[]): Promise<void> {
  await writeFile(image, '')
  await truncate(image, variant.mib * 2 ** 20)
  await must('mke2fs', [
    '-q',
    '-F',
    ...variant.args,
    '-U',
    '12345678-1234-5678-9abc-def012345678',
    '-L',
    'a label',
    '-d',
    tree,
    image,
  ])
  if (!variant.untouched) {
    const gone = names.filter((_, i) => i % 3 === 0).map((name) => `rm ${name}`)
    await must('debugfs', ['-w', '-f', '-', image], { input: gone.join('\n') })
  }
  if (variant.grownMib !== undefined) {
    if (variant.grownMib > variant.mib) await truncate(image, variant.grownMib * 2 ** 20)
    else assert.equal((await run('e2fsck', ['-fy', image])).code & ~1, 0)
    await must('resize2fs', [image, `${variant.grownMib}M`])
  }
  const mib = variant.grownMib ?? variant.mib
  await truncate(image, mib * 2 ** 20 + TAIL_BYTES)
}

async function map(
  image: string,
): Promise<{ fs: FileSystem; used: UsedMap; reads: number; bytesRead: number }> {
  await using file = await openHostFile(image)
  await using device = new CountingDevice(file)
  assert.equal(await extType.probe(device), true)
  const fs = await extType.open(device, {})
  const used = await fs.used({})
  return { fs, used, reads: device.reads, bytesRead: device.bytesRead }
}

async function audit(image: string): Promise<RangeSet> {
  await using device = await openHostFile(image)
  const fs = await extType.open(device, {})
  return await fs.audit!({})
}

describe('ext used() is what dumpe2fs says', {
  skip: needs('mke2fs', 'dumpe2fs', 'debugfs', 'resize2fs'),
}, () => {
  for (const variant of VARIANTS) {
    test(variant.name, async () => {
      await using dir = await tempDir()
      const tree = dir.file('tree')
      await mkdir(tree)
      const random = new Random()
      const names = await populate(tree, random)
      const image = dir.file('image')
      await make(variant, image, tree, names)
      const { size } = await stat(image)
      const oracle = await dumpe2fs(image, size)
      const { fs, used } = await map(image)
      assert.equal(fs.kind, variant.kind)
      assert.equal(fs.uuid, '12345678-1234-5678-9abc-def012345678')
      assert.equal(fs.label, 'a label')
      assert.equal(fs.size, oracle.blocksCount * oracle.blockBytes)
      assert.equal(used.trust, 'exact')
      assert.equal(used.state, 'clean')
      assert.ok(used.ranges.size < size / 2, 'something is free')
      assert.equal(used.ranges.subtract(oracle.used).toString(), '', `too much (seed ${random.seed})`)
      assert.equal(oracle.used.subtract(used.ranges).toString(), '', `too little (seed ${random.seed})`)

      // From the other side: nothing is used that nobody owns, nor the reverse. A cluster may be owned in part.
      const owned = (await audit(image)).coarsen(fs.blockBytes).clip(0, fs.size)
      const boot = RangeSet.of(0, oracle.firstBlock * oracle.blockBytes)
      const tail = RangeSet.of(fs.size, size)
      assert.equal(owned.subtract(used.ranges).toString(), '', `owned and not used (seed ${random.seed})`)
      const rest = used.ranges.subtract(owned).subtract(boot).subtract(tail)
      assert.equal(rest.toString(), '', `used and not owned (seed ${random.seed})`)
    })
  }
})

describe('ext I/O cost', { skip: needs('mke2fs') }, () => {
  test('20 GiB with 3 GiB of files: at most 64 reads and 0.3 MB', {
    skip: needsRoot() || needs('perl'),
  }, async (context) => {
    await using dir = await tempDir()
    const image = dir.file('image')
    await writeFile(image, '')
    await truncate(image, 20 * 2 ** 30)
    await must('mke2fs', ['-q', '-F', '-t', 'ext4', image])
    {
      await using mount = await mounted(image)
      const random = new Random(1)
      // Allocated, never written: bitmaps as after 4 GB in 11,000 files of which every fourth is deleted.
      const script: string[] = []
      for (let i = 0; i < 11_000; i++) {
        const name = `d${i % 200}/f${i}`
        script.push(`fallocate -l ${Math.floor(Math.exp(random.next() * 8 + 5.5) * 4) + 1} ${name}`)
        if (random.below(4) === 0) script.push(`gone ${name}`)
      }
      await allocate(mount.path, script)
    }
    const { used, reads, bytesRead } = await map(image)
    assert.ok(
      used.ranges.size > 2.5 * 2 ** 30 && used.ranges.size < 5 * 2 ** 30,
      `${used.ranges.size} in use`,
    )
    assert.ok(used.ranges.count > 500, 'fragmented')
    context.diagnostic(`${reads} reads, ${bytesRead} bytes, ${used.ranges.count} ranges`)
    assert.ok(reads <= 64, `${reads} reads`)
    assert.ok(bytesRead <= 300_000, `${bytesRead} bytes`)
  })

  test('16 TiB: under 3 s and 300 MiB', async (context) => {
    await using dir = await tempDir()
    const image = dir.file('image')
    await writeFile(image, '')
    // ext4, the file system below, ends a file one block short of 16 TiB.
    await truncate(image, 16 * 2 ** 40 - 2 ** 20)
    await must('mke2fs', [
      '-q',
      '-F',
      '-t',
      'ext4',
      '-E',
      'lazy_itable_init=1,lazy_journal_init=1,nodiscard',
      '-J',
      'size=64',
      image,
    ])
    // In a process of its own, so that what it takes is its own.
    const script = `
      import { openHostFile } from ${JSON.stringify(new URL('../../device/index.ts', import.meta.url).href)}
      import { extType } from ${JSON.stringify(new URL('./index.ts', import.meta.url).href)}
      await using device = await openHostFile(process.argv[1])
      const from = performance.now()
      const { ranges } = await (await extType.open(device, {})).used({})
      const rssMiB = process.resourceUsage().maxRSS / 1024
      console.log(JSON.stringify({ ms: performance.now() - from, rssMiB, size: ranges.size }))`
    const facts = JSON.parse(
      await must(process.execPath, ['--input-type=module', '-e', script, image]),
    ) as Record<'ms' | 'rssMiB' | 'size', number>
    context.diagnostic(JSON.stringify(facts))
    assert.ok(facts.size > 100 * 2 ** 30 && facts.size < 200 * 2 ** 30, 'the inode tables are in use')
    assert.ok(facts.ms < 3000, `${facts.ms} ms`)
    assert.ok(facts.rssMiB < 300, `${facts.rssMiB} MiB`)
  })
})

/** Runs `fallocate` lines in one process of perl, which has the system call without a module. */
async function allocate(folder: string, script: readonly string[]): Promise<void> {
  const program = `
    chdir $ARGV[0] or die; mkdir "d$_" for 0 .. 199;
    while (<STDIN>) {
      my ($verb, $a, $b, $c) = split;
      if ($verb eq 'gone') { unlink $a or die "unlink $a: $!"; next }
      open my $f, '>', $c or die "open $c: $!";
      syscall(${process.arch === 'arm64' ? 47 : 285}, fileno($f), 0, 0, $b + 0) == 0 or die "fallocate: $!";
      close $f;
    }`
  await must('perl', ['-e', program, folder], { input: `${script.join('\n')}\n` })
}
