/** inspect, map, convert, check as processes: text and JSON, judged by qemu-img where it has an opinion. */
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { link, open, readdir, readFile, rm, stat, symlink, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { must, needs, patternAt, tempDir } from '../kit/index.ts'
import { EXAMPLES, fails, GOLDEN, ok, okJson, varve } from './varve.ts'

const MIB = 1024 * 1024
const DISK = join(GOLDEN, 'disk-gpt-ext4-fat-swap.qcow2')

interface MapRow {
  start: number
  length: number
  depth: number
  present: boolean
  zero: boolean
  data: boolean
  offset?: number
  file?: string
  inUse?: boolean
  allocated?: boolean
}

interface Region {
  offset: number
  length: number
  kind: string
  name?: string
  label?: string
  inUseBytes: number
  trust: string
  reason?: { code: string; text: string }
  children?: Region[]
}

interface Inspected {
  image: {
    path: string
    format: string
    virtualSize: number
    layers: {
      path: string
      format: string
      virtualSize: number
      allocatedBytes: number
      depth: number
    }[]
  }
  regions: Region[]
  inUseBytes: number
  virtualSize: number
}

function covers(rows: readonly MapRow[], size: number): void {
  let at = 0
  for (const [index, row] of rows.entries()) {
    assert.equal(row.start, at, `no gap, no overlap at row ${index}`)
    assert.ok(row.length > 0)
    assert.equal(row.data, !row.zero)
    at += row.length
    const next = rows[index + 1]
    if (!next) continue
    const { start: _s, length: _l, offset: _o, ...mine } = row
    const { start: _s2, length: _l2, offset, ...its } = next
    const runsOn = row.offset === undefined ? offset === undefined : row.offset + row.length === offset
    assert.ok(JSON.stringify(mine) !== JSON.stringify(its) || !runsOn, `neighbours at ${at} are merged`)
  }
  assert.equal(at, size)
}

/** Rows as byte ranges of one property. */
function rangesOf(rows: readonly MapRow[], wanted: (row: MapRow) => boolean): string[] {
  const found: [number, number][] = []
  for (const row of rows) {
    if (!wanted(row)) continue
    const last = found.at(-1)
    if (last && last[0] + last[1] === row.start) last[1] += row.length
    else found.push([row.start, row.length])
  }
  return found.map((pair) => pair.join(' '))
}

describe('varve inspect', () => {
  test('--json keeps its contract', async () => {
    const found = await okJson<Inspected>(['inspect', DISK])
    for (const key of ['image', 'inUseBytes', 'regions', 'virtualSize']) assert.ok(key in found, key)
    assert.deepEqual(Object.keys(found.image).sort(), ['format', 'layers', 'path', 'virtualSize'])
    assert.equal(found.image.path, DISK)
    assert.equal(found.image.format, 'qcow2')
    assert.equal(found.virtualSize, 48 * MIB)
    assert.equal(found.image.virtualSize, 48 * MIB)
    for (const layer of found.image.layers) {
      assert.deepEqual(Object.keys(layer).sort(), [
        'allocatedBytes',
        'depth',
        'format',
        'path',
        'virtualSize',
      ])
      assert.ok(layer.allocatedBytes > 0)
    }
    let at = 0
    for (const region of found.regions) {
      assert.equal(region.offset, at)
      at += region.length
      assert.match(region.trust, /^(exact|replayed|assumed)$/)
    }
    assert.equal(at, found.virtualSize)
    assert.equal(
      found.regions.reduce((sum, region) => sum + region.inUseBytes, 0),
      found.inUseBytes,
    )
    const kinds = found.regions.flatMap(({ kind, children }) => [
      kind,
      ...(children ?? []).map((c) => c.kind),
    ])
    for (const kind of ['gpt', 'gap', 'partition', 'ext4', 'fat12', 'swap'])
      assert.ok(kinds.includes(kind), kind)
  })

  test('of several images is an array', async () => {
    const found = await okJson<Inspected[]>(['inspect', DISK, join(GOLDEN, 'image-dynamic.vhd')])
    assert.deepEqual(
      found.map(({ image }) => image.format),
      ['qcow2', 'vhd'],
    )
  })

  test('shows layers, regions, shares and trust to people', async () => {
    const text = await ok(['inspect', join(EXAMPLES, 'tuesday.qcow2')])
    assert.match(text, /tuesday\.qcow2 +qcow2 · 2 GiB · [\d.]+ MiB in use \(3%\)/)
    assert.match(text, /monday\.qcow2 +qcow2 +2 GiB/)
    assert.match(text, /└─ ext4 "root" .* exact/)
    assert.match(text, /└─ fat32 "ESP"/)
    assert.ok(!text.includes('\x1b'), 'no colours into a pipe')
  })

  test('says why a region is taken whole', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x.raw'), patternAt(0, 2 * MIB))
    const found = await okJson<Inspected>(['inspect', dir.file('x.raw')])
    assert.equal(found.inUseBytes, 2 * MIB)
    const region = found.regions.find(({ trust }) => trust === 'assumed')!
    assert.match(region.reason!.code, /^[a-z0-9]+(-[a-z0-9]+)*$/)
    assert.ok(region.reason!.text.length > 10)
    assert.ok((await ok(['inspect', dir.file('x.raw')])).includes(region.reason!.code))
  })

  test('prints a hostile label without its control characters', { skip: needs('mke2fs') }, async () => {
    await using dir = await tempDir()
    await truncate(await touch(dir.file('x.raw')), 8 * MIB)
    await must('mke2fs', ['-q', '-t', 'ext4', dir.file('x.raw')])
    await must('tune2fs', ['-O', '^metadata_csum', dir.file('x.raw')])
    const file = await open(dir.file('x.raw'), 'r+')
    // s_volume_name: clear the screen, set the title
    await file.write(Buffer.from('\x1b[2J\x1b]0;x\x07\r\n'), 0, undefined, 1024 + 0x78)
    await file.close()
    const text = await ok(['inspect', dir.file('x.raw')])
    assert.match(text, /ext4/)
    assert.doesNotMatch(text.replaceAll('\n', ''), /\p{Cc}/u)
  })
})

async function touch(path: string): Promise<string> {
  await writeFile(path, '')
  return path
}

describe('varve map', () => {
  test('--json covers the disk and means what qemu-img map means', { skip: needs('qemu-img') }, async () => {
    await using dir = await tempDir()
    for (const name of (await readdir(GOLDEN)).filter((each) => /\.(qcow2|vhd)$/.test(each))) {
      // Without holes: of images whose file has some, qemu asks the host where inside a cluster the zeros are.
      const path = dir.file(name)
      await writeFile(path, await readFile(join(GOLDEN, name)))
      await must('fallocate', ['-l', String((await stat(path)).size), path])
      const rows = await okJson<MapRow[]>(['map', path])
      const judge = JSON.parse(await must('qemu-img', ['map', '--output=json', path])) as MapRow[]
      const size = judge.at(-1)!.start + judge.at(-1)!.length
      covers(rows, size)
      for (const [word, wanted] of [
        ['data', (row: MapRow) => row.data],
        ['zero', (row: MapRow) => row.zero],
        ['present', (row: MapRow) => row.present],
        // Where a data extent stands; qemu also names the room that it keeps for zeros.
        ['placed', (row: MapRow) => row.data && row.offset !== undefined],
        ['depth', (row: MapRow) => row.depth === 0],
      ] as const) {
        assert.deepEqual(rangesOf(rows, wanted), rangesOf(judge, wanted), `${name}: ${word}`)
      }
    }
  })

  test('of a chain tells the depth and the file of each extent', { skip: needs('qemu-img') }, async () => {
    const path = join(EXAMPLES, 'tuesday.qcow2')
    const rows = await okJson<MapRow[]>(['map', path])
    covers(rows, 2048 * MIB)
    const judge = JSON.parse(await must('qemu-img', ['map', '--output=json', path])) as MapRow[]
    for (const depth of [0, 1]) {
      const wanted = (row: MapRow): boolean => row.data && row.depth === depth
      assert.deepEqual(rangesOf(rows, wanted), rangesOf(judge, wanted), `depth ${depth}`)
    }
  })

  test('--in-use cuts at bounds, --ranges lists the same, --allocated restricts it', async () => {
    const plain = await okJson<MapRow[]>(['map', DISK])
    assert.ok(plain.every((row) => !('inUse' in row) && !('allocated' in row)))
    const rows = await okJson<MapRow[]>(['map', '--in-use', DISK])
    covers(rows, 48 * MIB)
    assert.ok(rows.every((row) => typeof row.inUse === 'boolean'))
    const lines = (await ok(['map', '--in-use', '--ranges', DISK])).trim().split('\n')
    assert.deepEqual(
      lines,
      rangesOf(rows, (row) => row.inUse === true),
    )
    const { inUseBytes } = await okJson<Inspected>(['inspect', DISK])
    assert.equal(
      lines.reduce((sum, line) => sum + Number(line.split(' ')[1]), 0),
      inUseBytes,
    )

    const marked = await okJson<MapRow[]>(['map', '--allocated', DISK])
    covers(marked, 48 * MIB)
    assert.ok(marked.every((row) => row.allocated === row.present))
    const allocated = (await ok(['map', '--allocated', '--ranges', DISK])).trim().split('\n')
    assert.deepEqual(
      allocated,
      rangesOf(plain, (row) => row.present),
    )
    const both = (await ok(['map', '--in-use', '--allocated', '--ranges', DISK])).trim().split('\n')
    assert.deepEqual(
      both,
      rangesOf(rows, (row) => row.present && row.inUse === true),
    )
    assert.ok(both.length > 3 && both.join() !== lines.join() && both.join() !== allocated.join())
  })

  test('prints a table for people, with its sums', async () => {
    const text = await ok(['map', '--in-use', DISK])
    assert.match(text, /^ +START +LENGTH +LAYER +KIND +IN USE\n/)
    assert.match(text, /\n48 MiB disk · .* data \(\d+%\) · .* in use \(\d+%\)\n$/)
    assert.doesNotMatch(await ok(['map', '--allocated', DISK]), /absent/)
  })

  test('refuses options that do not go together', async () => {
    await fails(['map', DISK, '--ranges'], { code: 'USAGE', exit: 2 }, { json: false })
    await fails(['map', DISK, '--ranges', '--in-use', '--json'], { code: 'USAGE', exit: 2 }, { json: false })
  })
})

describe('varve convert', () => {
  test('gives the same disk in another format', { skip: needs('qemu-img') }, async () => {
    await using dir = await tempDir()
    for (const format of ['raw', 'qcow2']) {
      const target = dir.file(`copy.${format}`)
      const done = await okJson<Record<string, number | string>>(['convert', DISK, target, '-O', format])
      assert.deepEqual(Object.keys(done).sort(), [
        'copiedBytes',
        'format',
        'path',
        'seconds',
        'skippedBytes',
        'virtualSize',
        'zeroBytes',
      ])
      assert.equal(done['format'], format)
      assert.equal(done['skippedBytes'], 0)
      await must('qemu-img', ['compare', '-q', '-f', 'qcow2', '-F', format, DISK, target])
    }
    // A chain as one image.
    await ok(['convert', join(EXAMPLES, 'tuesday.qcow2'), dir.file('flat.qcow2'), '-O', 'qcow2'])
    await must('qemu-img', ['compare', '-q', join(EXAMPLES, 'tuesday.qcow2'), dir.file('flat.qcow2')])
    await must('qemu-img', ['check', '-q', dir.file('flat.qcow2')])
  })

  test('--in-use leaves out what nothing needs, and nothing else', async () => {
    await using dir = await tempDir()
    const text = await ok(['convert', '--in-use', DISK, dir.file('used.raw')])
    assert.match(text, /skipped +3\d(\.\d)? MiB +no file system uses it/)
    await ok(['convert', '--all-blocks', DISK, dir.file('all.raw')])
    const ranges = (await ok(['map', '--in-use', '--ranges', DISK])).trim().split('\n')
    const [used, all] = [await open(dir.file('used.raw')), await open(dir.file('all.raw'))]
    try {
      const size = 48 * MIB
      const [mine, its] = [Buffer.alloc(size), Buffer.alloc(size)]
      await used.read(mine, 0, size, 0)
      await all.read(its, 0, size, 0)
      const kept = Buffer.alloc(size)
      for (const line of ranges) {
        const [start = 0, length = 0] = line.split(' ').map(Number)
        its.copy(kept, start, start, start + length)
      }
      assert.ok(kept.equals(mine), 'what is in use is there, all else is zero')
      assert.ok(!its.equals(mine), 'the disk has deleted data, or this test proves nothing')
    } finally {
      await used.close()
      await all.close()
    }
  })

  test('never replaces a file unasked, and never its own source', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('there.raw'), 'precious')
    await fails(['convert', DISK, dir.file('there.raw')], { code: 'EXISTS', exit: 1 })
    await ok(['convert', DISK, dir.file('there.raw'), '--force'])
    await link(dir.file('there.raw'), dir.file('same.raw'))
    for (const name of ['there.raw', 'same.raw']) {
      await fails(['convert', dir.file('there.raw'), dir.file(name), '--force'], { code: 'USAGE', exit: 2 })
    }
    await fails(['convert', DISK, dir.file('a'), '--in-use', '--all-blocks'], { code: 'USAGE', exit: 2 })
    await fails(['convert', DISK, dir.file('a'), '-O', 'no-such-format'], { code: 'USAGE', exit: 2 })
    await fails(['convert', DISK, dir.file('no/such/folder/a')], { code: 'NOT_FOUND', exit: 10 })
    assert.deepEqual((await readdir(dir.path)).sort(), ['same.raw', 'there.raw'])
  })
})

describe('varve check', () => {
  test('says of a format without a check that it has none', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x.raw'), Buffer.alloc(4096))
    await fails(['check', dir.file('x.raw')], { code: 'UNSUPPORTED', exit: 13 })
    await fails(['check', dir.file('no-such')], { code: 'NOT_FOUND', exit: 10 })
  })
})

describe('IMAGE', () => {
  test('that is not there, is a folder, or is truncated: its own code and exit', async () => {
    await using dir = await tempDir()
    for (const verb of ['inspect', 'map']) {
      await fails([verb, dir.file('no-such.qcow2')], { code: 'NOT_FOUND', exit: 10 })
      await fails([verb, dir.path], { code: 'UNSUPPORTED', exit: 13 })
      await fails([verb, 'nbd://host/export'], { code: 'UNSUPPORTED', exit: 13 })
      await fails([verb, DISK, '--format', 'bogus'], { code: 'USAGE', exit: 2 })
      await fails([verb, 'repo:disk@point'], { code: 'USAGE', exit: 2 })
      await writeFile(dir.file('short.qcow2'), Buffer.from('QFI\xfb\0\0\0\x03', 'latin1'))
      await fails([verb, dir.file('short.qcow2')], { code: 'CORRUPT', exit: 12 })
    }
  })

  test('raw that starts with a foreign magic is itself only with --format raw', async () => {
    await using dir = await tempDir()
    const bytes = Buffer.alloc(2 * MIB)
    bytes.write('QFI\xfb\0\0\0\x03', 'latin1')
    await writeFile(dir.file('odd.raw'), bytes)
    assert.notEqual((await varve(['map', dir.file('odd.raw')])).code, 0)
    const found = await okJson<Inspected>(['inspect', '--format', 'raw', dir.file('odd.raw')])
    assert.equal(found.image.format, 'raw')
    assert.equal(found.virtualSize, 2 * MIB)
    await writeFile(dir.file('foreign.raw'), Buffer.concat([Buffer.from('QED\0'), bytes]))
    const error = await fails(['map', dir.file('foreign.raw')], { code: 'UNSUPPORTED', exit: 13 })
    assert.match(error.hint, /--format raw/)
  })

  test('backing files outside its folder need --allow-backing', { skip: needs('qemu-img') }, async () => {
    await using outside = await tempDir()
    await using dir = await tempDir()
    const base = outside.file('base.raw')
    await writeFile(base, patternAt(0, MIB))
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'raw', dir.file('top.qcow2')])
    const error = await fails(['inspect', dir.file('top.qcow2')], { code: 'BACKING_DENIED', exit: 1 })
    assert.match(error.hint, /--allow-backing/)
    const allowed = ['--allow-backing', '/no-such-folder-but-one', '--allow-backing', outside.path]
    await fails(['inspect', dir.file('top.qcow2'), ...allowed], { code: 'NOT_FOUND', exit: 10 })
    const found = await okJson<Inspected>([
      'inspect',
      dir.file('top.qcow2'),
      '--allow-backing',
      dir.path,
      '--allow-backing',
      outside.path,
    ])
    assert.equal(found.image.layers.length, 2)
    // A link in the folder is judged by where it leads.
    await symlink(base, dir.file('link.raw'))
    await must('qemu-img', ['rebase', '-q', '-u', '-b', 'link.raw', '-F', 'raw', dir.file('top.qcow2')])
    await fails(['map', dir.file('top.qcow2')], { code: 'BACKING_DENIED', exit: 1 })
    await rm(base)
    await must('qemu-img', ['rebase', '-q', '-u', '-b', 'gone.raw', '-F', 'raw', dir.file('top.qcow2')])
    await fails(['map', dir.file('top.qcow2')], { code: 'BACKING_MISSING', exit: 10 })
    await must('qemu-img', ['rebase', '-q', '-u', '-b', 'top.qcow2', '-F', 'qcow2', dir.file('top.qcow2')])
    await fails(['map', dir.file('top.qcow2')], { code: 'CHAIN_LOOP', exit: 12 })
  })

  test('that another program writes to: only looked at, with a note; not copied', {
    skip: needs('qemu-io'),
  }, async () => {
    await using dir = await tempDir()
    for (const [name, base] of [
      ['base.qcow2', undefined],
      ['top.qcow2', 'base.qcow2'],
    ] as const) {
      const backing = base === undefined ? [] : ['-b', base, '-F', 'qcow2']
      await must('qemu-img', ['create', '-q', '-f', 'qcow2', ...backing, dir.file(name), '8M'])
    }
    await ok(['init', dir.file('repo')])
    const repo = ['--repo', dir.file('repo')]
    for (const written of ['top.qcow2', 'base.qcow2']) {
      // It says "ready" once it has the image, and ends when its input does.
      const writer = spawn('qemu-io', ['-f', 'qcow2', dir.file(written)], {
        stdio: ['pipe', 'pipe', 'inherit'],
      })
      const ended = new Promise((resolve) => writer.on('close', resolve))
      try {
        writer.stdin.write('length\n')
        await new Promise((resolve) => writer.stdout.once('data', resolve))
        const image = dir.file('top.qcow2')
        await fails(['backup', image, ...repo], { code: 'LOCKED', exit: 11 })
        await fails(['convert', image, dir.file('x.raw')], { code: 'LOCKED', exit: 11 })
        for (const verb of ['inspect', 'map']) {
          const { code, stdout, stderr } = await varve([verb, image, '--json'])
          assert.equal(code, 0, stderr)
          JSON.parse(stdout)
          assert.match(stderr, new RegExp(`^varve: \\S*${written} is being written to by another program`))
        }
      } finally {
        writer.stdin.end()
        await ended
      }
      await ok(['backup', dir.file('top.qcow2'), ...repo])
    }
  })
})
