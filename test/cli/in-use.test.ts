/** Options around the in-use map as processes: disks together, audit, page files, pictures. */
import assert from 'node:assert/strict'
import { readFile, stat, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { RangeSet } from '../../src/extents/index.ts'
import { must, needs, needsRoot, run, tempDir } from '../kit/index.ts'
import { differences, fillUnused, readTree } from '../poison/index.ts'
import { fails, GOLDEN, ok, okJson, onTerminal } from './varve.ts'

const MIB = 2 ** 20
const DISK = join(GOLDEN, 'disk-gpt-ext4-fat-swap.qcow2')

interface Region {
  kind: string
  state?: string
  trust: string
  inUseBytes: number
  length: number
  reason?: { code: string; text: string }
  children?: Region[]
}

interface Inspected {
  image: { path: string }
  regions: Region[]
  inUseBytes: number
  virtualSize: number
  totals: { inUseBytes: number; freeBytes: number; assumedBytes: number }
}

interface Mapped {
  path: string
  virtualSize: number
  extents: { start: number; length: number; inUse: boolean }[]
}

const leaves = (regions: readonly Region[]): Region[] =>
  regions.flatMap((region) => (region.children ? leaves(region.children) : [region]))

/** Lines `start length [image]` of `map --ranges`. */
function rangesOf(text: string, image?: number): RangeSet {
  return RangeSet.from(
    text
      .trimEnd()
      .split('\n')
      .map((line) => line.split(' ').map(Number))
      .filter((words) => {
        assert.equal(words.length, image === undefined ? 2 : 3)
        return words[2] === image
      })
      .map(([start, length]) => ({ start: start!, end: start! + length! })),
  )
}

/** Images of one Btrfs, with files in it; a third of them removed again. */
async function makeBtrfs(paths: readonly string[], profile: string): Promise<void> {
  for (const path of paths) {
    await writeFile(path, '')
    await truncate(path, 200 * MIB)
  }
  await must('mkfs.btrfs', ['-q', '-f', '-d', profile, '-m', 'raid1', ...paths])
  await withBtrfs(paths, async (folder) => {
    const script = [
      'set -e; cd "$1"; mkdir a',
      'for i in $(seq 60); do head -c $((i * 3777)) /dev/urandom > a/f$i; done; sync',
      'rm a/f*3 a/f*7; sync',
    ]
    await must('sh', ['-c', script.join('\n'), 'sh', folder])
  })
}

async function withBtrfs(paths: readonly string[], work: (folder: string) => Promise<void>): Promise<void> {
  await using dir = await tempDir()
  const loops: string[] = []
  try {
    for (const path of paths) loops.push((await must('losetup', ['-f', '--show', path])).trim())
    await must('btrfs', ['device', 'scan', ...loops])
    const devices = loops.map((loop) => `device=${loop}`).join(',')
    await must('mount', ['-t', 'btrfs', '-o', devices, loops[0]!, dir.path])
    try {
      await work(dir.path)
    } finally {
      await must('umount', [dir.path])
    }
  } finally {
    for (const loop of loops) await run('losetup', ['-d', loop])
    await run('btrfs', ['device', 'scan', '--forget'])
  }
}

describe('disks of one machine', { skip: needs('mkfs.btrfs', 'btrfs', 'losetup') || needsRoot() }, () => {
  for (const profile of ['raid1', 'raid0']) {
    test(`Btrfs ${profile} on two: every file survives when what is unused is overwritten`, async () => {
      await using dir = await tempDir()
      const paths = [dir.file('a.img'), dir.file('b.img')]
      await makeBtrfs(paths, profile)

      const apart = await okJson<Inspected[]>(['inspect', ...paths])
      assert.deepEqual(
        apart.map(({ regions }) => regions[0]!.reason?.code),
        ['btrfs-devices-missing', 'btrfs-devices-missing'],
      )
      assert.deepEqual(
        apart.map(({ totals }) => totals),
        apart.map(({ virtualSize }) => ({
          inUseBytes: virtualSize,
          freeBytes: 0,
          assumedBytes: virtualSize,
        })),
      )
      const together = await okJson<Inspected[]>(['inspect', '--together', '--audit', ...paths])
      assert.deepEqual(
        together.map(({ image }) => image.path),
        paths,
      )
      const text = await ok(['map', '--together', '--ranges', ...paths])
      const mapped = await okJson<Mapped[]>(['map', '--together', ...paths])
      const used = paths.map((_, index) => rangesOf(text, index))
      for (const [index, { regions, totals, inUseBytes, virtualSize }] of together.entries()) {
        assert.deepEqual([regions[0]!.trust, regions[0]!.state], ['exact', 'clean; audited'])
        assert.deepEqual(totals, { inUseBytes, freeBytes: virtualSize - inUseBytes, assumedBytes: 0 })
        assert.ok(inUseBytes < 20 * MIB)
        assert.equal(used[index]!.size, inUseBytes)
        const marked = mapped[index]!.extents.filter(({ inUse }) => inUse)
        assert.equal(mapped[index]!.path, paths[index])
        assert.ok(
          RangeSet.from(marked.map(({ start, length }) => ({ start, end: start + length }))).equals(
            used[index]!,
          ),
        )
      }

      let before: Awaited<ReturnType<typeof readTree>> | undefined
      // Mounting writes: what is compared is what the map was made from.
      const copies = paths.map((path) => `${path}.copy`)
      for (const [index, path] of paths.entries()) await must('cp', ['--sparse=always', path, copies[index]!])
      await withBtrfs(paths, async (folder) => {
        before = await readTree(folder)
      })
      for (const [index, copy] of copies.entries()) {
        assert.ok((await fillUnused(copy, used[index]!)) > 180 * MIB)
      }
      await withBtrfs(copies, async (folder) => {
        const after = await readTree(folder)
        assert.ok(after.size > 40)
        assert.deepEqual(differences(before!, after), [])
        await must('btrfs', ['scrub', 'start', '-B', folder])
      })
    })
  }

  test('an order of their own, an image that is none of them, and one image given alone', async () => {
    await using dir = await tempDir()
    const paths = [dir.file('a.img'), dir.file('b.img')]
    for (const path of paths) {
      await writeFile(path, '')
      await truncate(path, 140 * MIB)
    }
    await must('mkfs.btrfs', ['-q', '-f', '-d', 'raid1', '-m', 'raid1', ...paths])
    const mixed = await okJson<Inspected[]>(['inspect', '--together', paths[1]!, DISK, paths[0]!])
    assert.deepEqual(
      mixed.map(({ regions }) => regions[0]!.kind),
      ['btrfs', 'gpt', 'btrfs'],
    )
    assert.ok(mixed.every(({ totals }) => totals.assumedBytes === 0))
    const alone = await okJson<Inspected[]>(['inspect', '--together', paths[0]!])
    assert.equal(alone.length, 1)
    assert.equal(alone[0]!.regions[0]!.reason?.code, 'btrfs-devices-missing')
  })
})

describe('audit and page files', () => {
  test('every region says what the audit came to, in text and JSON; backup and convert show it', async () => {
    await using dir = await tempDir()
    const { regions } = await okJson<Inspected>(['inspect', '--audit', DISK])
    const states = leaves(regions).flatMap(({ kind, state }) => (state === undefined ? [] : [[kind, state]]))
    assert.deepEqual(states, [
      ['fat12', 'clean; audited'],
      ['ext4', 'clean; audited'],
      ['swap', 'clean; no audit for this file system'],
    ])
    assert.match(await ok(['inspect', '--audit', DISK]), /ext4 "root".* clean; audited\n/)
    const args = ['--in-use', '--audit', DISK]
    const converted = await okJson<{ regions: Region[] }>(['convert', ...args, dir.file('one.raw')])
    assert.equal(leaves(converted.regions).filter(({ state }) => state?.includes('audited')).length, 2)
    assert.match(
      await ok(['convert', ...args, dir.file('two.raw')]),
      /state +32 MiB +ext4 at 5242880: clean; audited\n/,
    )
    await ok(['init', dir.file('repo')])
    assert.match(
      await ok(['backup', '--audit', '--repo', dir.file('repo'), DISK]),
      /ext4 at 5242880: clean; audited\n/,
    )
  })

  test('page files are left out when asked, and the state says how much', {
    skip: needs('mkntfs', 'ntfscp'),
  }, async () => {
    await using dir = await tempDir()
    const image = dir.file('c.img')
    await writeFile(image, '')
    await truncate(image, 64 * MIB)
    await must('mkntfs', ['-q', '-Q', '-F', '-p', '0', '-H', '0', '-S', '0', image])
    await writeFile(dir.file('page'), Buffer.alloc(5 * MIB, 1))
    await must('ntfscp', [image, dir.file('page'), 'pagefile.sys'])
    const all = await okJson<Inspected>(['inspect', image])
    const less = await okJson<Inspected>(['inspect', '--skip-page-files', image])
    assert.equal(all.inUseBytes - less.inUseBytes, 5 * MIB)
    assert.equal(less.regions[0]!.state, `clean; ${5 * MIB} bytes of page files left out`)
    const ranges = async (...args: string[]): Promise<RangeSet> =>
      rangesOf(await ok(['map', '--in-use', '--ranges', ...args, image]))
    assert.equal((await ranges()).subtract(await ranges('--skip-page-files')).size, 5 * MIB)
  })

  test('what would not be applied is refused', async () => {
    const usage = { code: 'USAGE', exit: 2 }
    await fails(['map', '--audit', DISK], usage)
    await fails(['map', '--skip-page-files', DISK], usage)
    await fails(['convert', '--audit', DISK, '/nowhere/x'], usage)
    await fails(['backup', '--all-blocks', '--skip-page-files', '--repo', '/nowhere', DISK], usage)
    await fails(['map', DISK, DISK], usage)
    await fails(['map', '--picture', '--ranges', '--in-use', DISK], usage, { json: false })
    await fails(['map', '--picture', '--json', DISK], usage, { json: false })
    await fails(['map', '--force', DISK], usage)
  })
})

describe('pictures', () => {
  test('in text without colours when nobody looks; as wide as asked, no line longer', async () => {
    const text = await ok(['map', '--picture', DISK])
    assert.ok(!text.includes('\u001b'))
    const lines = text.trimEnd().split('\n')
    assert.ok(lines.every((line) => line.length <= 120))
    const row = (title: string): string => lines.find((line) => line.startsWith(title))!
    assert.match(row('2 ext4 "root"'), /^2 ext4 "root" +[#.*+-]+ +32 MiB +24%$/)
    assert.match(row('gpt'), / #+ +17 KiB +100%$/)
    assert.match(row('3 swap'), / -\.+ +8 MiB +<1%$/)
    assert.equal(lines.at(-1), '# in use   -+* in part   . free   ? assumed in use')
  })

  test('what is assumed looks different', async () => {
    await using dir = await tempDir()
    const image = dir.file('noise.img')
    await writeFile(image, Buffer.alloc(MIB, 0x5a))
    assert.match(await ok(['map', '--picture', image]), /\nwhole disk: unknown +\?+ +1 MiB +100%\n/)
    const svg = await ok(['map', '--svg', '-', image])
    assert.match(svg, /height="22" fill="#e0a100"\/>/)
  })

  test('on a terminal in colour, as wide as it is; NO_COLOR is obeyed', {
    skip: needs('script'),
  }, async () => {
    const { text, raw } = await onTerminal(`bin/varve map --picture ${DISK}`, [], { columns: 72 })
    assert.ok(raw.includes('\u001b[32m█'))
    const strips = text.split('\n').filter((line) => /[█·].*%$/.test(line))
    assert.equal(strips.length, 9)
    for (const strip of strips) assert.ok(strip.length <= 72, strip)
    const plain = await onTerminal(`env NO_COLOR=1 bin/varve map --picture ${DISK}`, [], { columns: 72 })
    assert.ok(!plain.raw.includes('\u001b[3'))
    assert.match(plain.text, /\n1 fat12 "ESP" +#/)
  })

  test('SVG is well-formed and can be drawn, whatever labels and names are', {
    skip: needs('xmllint', 'rsvg-convert', 'mke2fs'),
  }, async () => {
    await using dir = await tempDir()
    const image = dir.file('<a&b>"\'.img')
    await writeFile(image, '')
    await truncate(image, 16 * MIB)
    await must('mke2fs', ['-q', '-t', 'ext4', '-L', ']]><x>&"\x07é', image])
    const svg = dir.file('disk.svg')
    assert.equal(await ok(['map', '--svg', svg, image]), `✓ ${svg}\n`)
    await must('xmllint', ['--noout', svg])
    await must('rsvg-convert', ['-o', dir.file('disk.png'), svg])
    assert.ok((await stat(dir.file('disk.png'))).size > 2000)
    assert.match(await readFile(svg, 'utf8'), /ext4 &quot;\]\]&gt;&lt;x&gt;&amp;&quot;�é&quot;/)
    await fails(['map', '--svg', svg, image], { code: 'EXISTS', exit: 1 })
    await ok(['map', '--svg', svg, '--force', '--together', image, DISK])
    await must('xmllint', ['--noout', svg])
    assert.match(await readFile(svg, 'utf8'), /disk-gpt-ext4-fat-swap\.qcow2/)
  })
})
