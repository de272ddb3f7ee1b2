/** init, backup, points, restore, verify, reindex as processes, on the example disk. */
import assert from 'node:assert/strict'
import { copyFile, open, readdir, readFile, stat, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, tempDir } from '../kit/index.ts'
import { EXAMPLES, fails, GOLDEN, ok, okJson, varve } from './varve.ts'

const MONDAY = join(EXAMPLES, 'monday.qcow2')
const TUESDAY = join(EXAMPLES, 'tuesday.qcow2')
const MIB = 1024 * 1024

interface Backup {
  disk: string
  point: string
  virtualSize: number
  inUseBytes: number
  readBytes: number
  changedBytes: number
  storedBytes: number
  newChunks: number
  reusedChunks: number
  seconds: number
  regions: { offset: number; length: number; trust: string; inUseBytes: number }[]
}

interface Point {
  disk: string
  point: string
  created: string
  virtualSize: number
  inUseBytes: number
}

async function inUseOf(image: string): Promise<number> {
  return (await okJson<{ inUseBytes: number }>(['inspect', image])).inUseBytes
}

/** Every range that is in use is the same in the image and in the restored raw file, which has no other data. */
async function equalsInUse(
  image: string,
  restored: string,
  dir: { file(name: string): string },
): Promise<void> {
  const used = dir.file('used.raw')
  await ok(['convert', '--in-use', image, used, '--force'])
  assert.equal((await stat(used)).size, (await stat(restored)).size)
  await must('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'raw', used, restored])
}

describe('the repository verbs', () => {
  test('back up twice, list, verify, restore, compare', { skip: needs('qemu-img') }, async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    const made = await okJson<{ path: string; encrypted: boolean }>(['init', dir.file('repo')])
    assert.equal(made.path, dir.file('repo'))
    assert.equal(made.encrypted, false)
    assert.match(await ok(['points', ...repo]), /No restore points yet/)
    assert.deepEqual(await okJson(['points', ...repo]), [])

    const first = await okJson<Backup>(['backup', MONDAY, '--disk', 'web01', ...repo])
    assert.deepEqual(Object.keys(first).sort(), [
      'changedBytes',
      'disk',
      'inUseBytes',
      'newChunks',
      'point',
      'readBytes',
      'regions',
      'reusedChunks',
      'seconds',
      'storedBytes',
      'virtualSize',
    ])
    assert.equal(first.disk, 'web01')
    assert.equal(first.virtualSize, 2048 * MIB)
    assert.equal(first.inUseBytes, await inUseOf(MONDAY))
    assert.ok(first.readBytes <= first.inUseBytes * 1.05 + MIB, 'no more is read than is in use')
    assert.ok(first.newChunks > 0 && first.storedBytes > 0)
    assert.equal(
      first.regions.reduce((sum, region) => sum + region.inUseBytes, 0),
      first.inUseBytes,
    )

    const second = await okJson<Backup>(['backup', TUESDAY, '--disk', 'web01', ...repo])
    assert.equal(second.inUseBytes, await inUseOf(TUESDAY))
    assert.ok(second.newChunks > 0 && second.newChunks < first.newChunks, 'only what is new is stored')
    assert.ok(second.reusedChunks > 0)
    assert.ok(second.changedBytes < first.changedBytes)

    const third = await okJson<Backup>(['backup', TUESDAY, '--disk', 'web01', ...repo])
    assert.deepEqual([third.newChunks, third.changedBytes], [0, 0], 'nothing changed, nothing stored')

    const points = await okJson<Point[]>(['points', ...repo])
    assert.deepEqual(
      points.map(({ disk, point }) => [disk, point]),
      [first, second, third].map(({ point }) => ['web01', point]),
    )
    assert.ok(Math.abs(Date.parse(points[0]!.created) - Date.now()) < 600_000)
    const text = await ok(['points', 'web01', ...repo])
    for (const { point } of points) assert.ok(text.includes(point))
    await fails(['points', 'no-such-disk', ...repo], { code: 'NOT_FOUND', exit: 10 })

    const verified = await okJson<{ ok: boolean; points: number; findings: unknown[] }>(['verify', ...repo])
    assert.deepEqual([verified.ok, verified.points, verified.findings], [true, 3, []])
    assert.match(await ok(['verify', 'web01', ...repo]), /everything is whole: 3 points/)
    assert.match(await ok(['verify', `web01@${first.point}`, ...repo]), /everything is whole: 1 point,/)

    const against = ['verify', 'web01@latest', ...repo, '--against']
    assert.match(await ok([...against, TUESDAY]), /equals the image/)
    const compared = await okJson<{ equal: boolean; comparedBytes: number }>([...against, TUESDAY])
    assert.deepEqual([compared.equal, compared.comparedBytes], [true, second.inUseBytes])
    const error = await fails([...against, MONDAY], { code: 'MISMATCH', exit: 12 }, { json: false })
    assert.equal(error.code, 'MISMATCH')
    const differs = await varve([...against, MONDAY, '--json'])
    assert.equal(differs.code, 12)
    const document = JSON.parse(differs.stdout) as { equal: boolean; differences: { start: number }[] }
    assert.equal(document.equal, false)
    assert.ok(document.differences.length > 0 && document.differences[0]!.start >= 65 * MIB)

    for (const [point, image] of [
      [first.point, MONDAY],
      ['latest', TUESDAY],
    ] as const) {
      const target = dir.file(`${point}.raw`)
      const done = await okJson<Record<string, unknown>>(['restore', `web01@${point}`, target, ...repo])
      assert.equal(done['disk'], 'web01')
      assert.equal(done['virtualSize'], 2048 * MIB)
      await equalsInUse(image, target, dir)
    }
    await fails(['restore', 'web01@latest', dir.file('latest.raw'), ...repo], { code: 'EXISTS', exit: 1 })
    await ok(['restore', 'web01', dir.file('latest.raw'), '--force', ...repo])
    await fails(['restore', 'web01@nothing', dir.file('x'), ...repo], { code: 'NOT_FOUND', exit: 10 })
    await fails(['restore', 'web02@latest', dir.file('x'), ...repo], { code: 'NOT_FOUND', exit: 10 })
    await fails(['restore', 'web01@', dir.file('x'), ...repo], { code: 'USAGE', exit: 2 })

    assert.match(await ok(['reindex', ...repo]), /Indexed \d+ chunks of \d+ packs/)
    const after = await okJson<Backup>(['backup', MONDAY, '--disk', 'again', ...repo])
    assert.equal(after.newChunks, 0, 'the new index knows all that the packs hold')
  })

  test('a restore point is an IMAGE too', { skip: needs('qemu-img') }, async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    await ok(['init', dir.file('repo')])
    const { point } = await okJson<Backup>(['backup', TUESDAY, '--disk', 'web@01', ...repo])
    const image = `repo:web@01@${point}`
    assert.equal(
      await ok(['map', '--in-use', '--ranges', image, ...repo]),
      await ok(['map', '--in-use', '--ranges', TUESDAY]),
    )
    type Inspected = { regions: unknown; image: { format: string; layers: unknown[] } }
    const [mine, its] = [
      await okJson<Inspected>(['inspect', image, ...repo]),
      await okJson<Inspected>(['inspect', TUESDAY]),
    ]
    assert.deepEqual(mine.regions, its.regions)
    assert.equal(mine.image.format, 'point')
    const rows = await okJson<{ start: number; length: number }[]>(['map', image, ...repo])
    assert.equal(
      rows.reduce((at, row) => (assert.equal(row.start, at), at + row.length), 0),
      2048 * MIB,
    )
    await ok(['convert', image, dir.file('c.qcow2'), '-O', 'qcow2', ...repo])
    await ok(['restore', `web@01@${point}`, dir.file('r.qcow2'), '-O', 'qcow2', ...repo])
    await must('qemu-img', ['compare', '-q', dir.file('c.qcow2'), dir.file('r.qcow2')])
    await must('qemu-img', ['check', '-q', dir.file('r.qcow2')])
    await ok(['convert', '--in-use', TUESDAY, dir.file('used.raw')])
    await must('qemu-img', [
      'compare',
      '-q',
      '-f',
      'qcow2',
      '-F',
      'raw',
      dir.file('r.qcow2'),
      dir.file('used.raw'),
    ])
    await fails(['inspect', image, '--format', 'raw', ...repo], { code: 'USAGE', exit: 2 })
    await fails(['backup', image, ...repo], { code: 'USAGE', exit: 2 })
  })

  test('--all-blocks keeps every byte, and verify --against compares every byte', async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    const source = join(GOLDEN, 'disk-gpt-ext4-fat-swap.qcow2')
    await ok(['init', dir.file('repo')])
    const done = await okJson<Backup>(['backup', source, '--all-blocks', ...repo])
    assert.equal(done.disk, 'disk-gpt-ext4-fat-swap', 'named by the file, without its extension')
    assert.equal(done.inUseBytes, done.virtualSize)
    await ok(['restore', done.disk, dir.file('all.raw'), ...repo])
    await ok(['convert', source, dir.file('source.raw')])
    await must('cmp', [dir.file('source.raw'), dir.file('all.raw')])
    const against = ['verify', `${done.disk}@latest`, ...repo, '--against']
    const compared = await okJson<{ comparedBytes: number }>([...against, dir.file('source.raw')])
    assert.equal(compared.comparedBytes, 48 * MIB)
    // One byte that no file system uses: only an all-blocks point cares.
    const free = (await ok(['map', '--in-use', '--ranges', source]))
      .split('\n')
      .map((line) => line.split(' ').map(Number))
    const hole = free[0]![0]! + free[0]![1]!
    const file = await open(dir.file('source.raw'), 'r+')
    await file.write(Buffer.from([0x5a]), 0, 1, hole)
    await file.close()
    await fails([...against, dir.file('source.raw')], { code: 'MISMATCH', exit: 12 }, { json: false })
    await ok(['backup', source, '--disk', 'in-use', ...repo])
    await ok(['verify', 'in-use@latest', '--against', dir.file('source.raw'), ...repo])
  })

  test('restore onto a block device asks for --force, and leaves nothing of what stood there', {
    skip: needsRoot() || needs('losetup'),
  }, async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    const source = join(GOLDEN, 'disk-gpt-ext4-fat-swap.qcow2')
    await ok(['init', dir.file('repo')])
    await ok(['backup', source, '--disk', 'd', ...repo])
    await ok(['convert', '--in-use', source, dir.file('used.raw')])
    await writeFile(dir.file('disk'), Buffer.alloc(48 * MIB, 0xa5))
    await writeFile(dir.file('small'), Buffer.alloc(8 * MIB))
    const loops: string[] = []
    try {
      for (const name of ['disk', 'small']) {
        loops.push((await must('losetup', ['-f', '--show', dir.file(name)])).trim())
      }
      const [disk, small] = loops as [string, string]
      await fails(['restore', 'd', disk, ...repo], { code: 'EXISTS', exit: 1 })
      await fails(['restore', 'd', disk, '--force', '-O', 'qcow2', ...repo], {
        code: 'UNSUPPORTED',
        exit: 13,
      })
      await fails(['restore', 'd', small, '--force', ...repo], { code: 'NO_SPACE', exit: 1 })
      await ok(['restore', 'd', disk, '--force', ...repo])
      await must('cmp', [dir.file('used.raw'), disk])
      await ok(['verify', 'd@latest', '--against', disk, ...repo])
      await ok(['convert', '--in-use', source, disk, '--force'])
      await must('cmp', [dir.file('used.raw'), disk])
    } finally {
      for (const loop of loops) await must('losetup', ['-d', loop])
    }
  })

  test('of several images, one that fails does not stop the others: exit 3', async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    await ok(['init', dir.file('repo')])
    await copyFile(join(GOLDEN, 'disk-ext4-dirty.qcow2'), dir.file('a.qcow2'))
    await writeFile(dir.file('b.qcow2'), 'QFI\xfb\0\0\0\x03', 'latin1')
    const files = [dir.file('b.qcow2'), dir.file('a.qcow2'), dir.file('no-such.qcow2')]
    const { code, stdout, stderr } = await varve(['backup', ...files, ...repo, '--json'])
    assert.equal(code, 3)
    const documents = JSON.parse(stdout) as (Backup & { image?: string; error?: { code: string } })[]
    assert.deepEqual(
      documents.map(({ disk, error }) => [disk, error?.code]),
      [
        ['b', 'CORRUPT'],
        ['a', undefined],
        ['no-such', 'NOT_FOUND'],
      ],
    )
    assert.match(stderr, /^varve: CORRUPT: .*b\.qcow2/m)
    assert.match(stderr, /^varve: PARTIAL: Cannot back up 2 of 3 images/m)
    assert.equal((await okJson<Point[]>(['points', ...repo])).length, 1)
    const all = await varve(['backup', files[0]!, files[2]!, ...repo])
    assert.equal(all.code, 12, 'nothing was done: the first failure decides')

    const two = await okJson<Backup[]>(['backup', files[1]!, MONDAY, ...repo])
    assert.deepEqual(
      two.map(({ disk }) => disk),
      ['a', 'monday'],
    )
    await fails(['backup', MONDAY, TUESDAY, '--disk', 'x', ...repo], { code: 'USAGE', exit: 2 })
    await fails(['backup', MONDAY, dir.file('monday.raw'), ...repo], { code: 'USAGE', exit: 2 })
    // A disk's name is no path, whatever it looks like.
    await fails(['backup', MONDAY, '--disk', 'a\nb', ...repo], { code: 'USAGE', exit: 2 })
    const path = await okJson<Backup>(['backup', files[1]!, '--disk', '../../up', ...repo])
    assert.equal(path.disk, '../../up')
    assert.deepEqual((await readdir(dir.path)).sort(), ['a.qcow2', 'b.qcow2', 'repo'])
    await ok(['restore', '../../up@latest', dir.file('up.raw'), ...repo])
  })

  test('say what backup took whole, and why', async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    await ok(['init', dir.file('repo')])
    await writeFile(dir.file('odd.raw'), Buffer.alloc(MIB, 0x5a))
    const { regions } = await okJson<Backup>(['backup', dir.file('odd.raw'), ...repo])
    const [region] = regions as (Backup['regions'][0] & { reason: { code: string } })[]
    assert.equal(region!.trust, 'assumed')
    assert.match(
      await ok(['backup', dir.file('odd.raw'), ...repo]),
      new RegExp(`whole +1 MiB .*${region!.reason.code}`),
    )
  })

  test('name a flipped bit: exit 12', async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    await ok(['init', dir.file('repo')])
    await ok(['backup', MONDAY, ...repo])
    const packs: { path: string; size: number }[] = []
    for (const entry of await readdir(dir.file('repo'), { recursive: true, withFileTypes: true })) {
      if (!entry.isFile()) continue
      const path = join(entry.parentPath, entry.name)
      packs.push({ path, size: (await stat(path)).size })
    }
    const { path, size } = packs
      .filter((pack) => !pack.path.includes('sqlite'))
      .sort((a, b) => b.size - a.size)[0]!
    const bytes = await readFile(path)
    bytes[Math.floor(size / 2)]! ^= 1
    await must('chmod', ['u+w', path])
    await writeFile(path, bytes)
    const { code, stdout, stderr } = await varve(['verify', ...repo, '--json'])
    assert.equal(code, 12)
    const document = JSON.parse(stdout) as { ok: boolean; findings: { name: string; points: unknown[] }[] }
    assert.equal(document.ok, false)
    assert.ok(
      document.findings.some(
        ({ name, points }) => path.endsWith(name.split('/').at(-1)!) && points.length > 0,
      ),
    )
    assert.match(stderr, /^varve: CORRUPT: Cannot vouch for /)
    const text = await varve(['verify', ...repo])
    assert.equal(text.code, 12)
    assert.match(text.stdout, /✗ .*\n +touches monday@/)
  })

  test('refuse a repository that is not there, is none, or that --repo does not name', async () => {
    await using dir = await tempDir()
    for (const args of [
      ['points'],
      ['verify'],
      ['reindex'],
      ['backup', MONDAY],
      ['restore', 'a@b', dir.file('x')],
    ]) {
      await fails(args, { code: 'USAGE', exit: 2 })
      await fails([...args, '--repo', dir.file('no-such')], { code: 'NOT_FOUND', exit: 10 })
    }
    await writeFile(dir.file('something'), '')
    await fails(['init', dir.path], { code: 'EXISTS', exit: 1 })
    await truncate(dir.file('something'), 0)
    await ok(['init', dir.file('repo')])
    await fails(['init', dir.file('repo')], { code: 'EXISTS', exit: 1 })
    assert.match(await ok(['points'], { env: { VARVE_REPO: dir.file('repo') } }), /No restore points/)
    await fails(['init', dir.file('r2'), '--chunk-size', '77'], { code: 'USAGE', exit: 2 })
    await fails(['init', dir.file('r2'), '--chunk-size', 'x'], { code: 'USAGE', exit: 2 })
  })
})

describe('passwords', () => {
  test('come from a file or the environment; none and a wrong one have their own codes', {
    skip: needs('qemu-img'),
  }, async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    await writeFile(dir.file('password'), 'first line\r\nsecond\n')
    await writeFile(dir.file('empty'), '\n')
    const file = ['--password-file', dir.file('password')]
    await fails(['init', dir.file('repo'), '--encrypt'], { code: 'PASSWORD_NEEDED', exit: 2 })
    await fails(['init', dir.file('repo'), ...file], { code: 'USAGE', exit: 2 })
    await fails(['init', dir.file('repo'), '--encrypt', '--password-file', dir.file('empty')], {
      code: 'USAGE',
      exit: 2,
    })
    await fails(['init', dir.file('repo'), '--encrypt', '--password-file', dir.file('none')], {
      code: 'NOT_FOUND',
      exit: 10,
    })
    const made = await okJson<{ encrypted: boolean }>(['init', dir.file('repo'), '--encrypt', ...file])
    assert.equal(made.encrypted, true)

    await fails(['points', ...repo], { code: 'PASSWORD_NEEDED', exit: 2 })
    await fails(
      ['points', ...repo],
      { code: 'WRONG_PASSWORD', exit: 1 },
      { env: { VARVE_PASSWORD: 'second' } },
    )
    assert.deepEqual(await okJson(['points', ...repo], { env: { VARVE_PASSWORD: 'first line' } }), [])
    // The file goes before the environment.
    await ok(['backup', join(GOLDEN, 'disk-ext4-dirty.qcow2'), ...repo, ...file], {
      env: { VARVE_PASSWORD: 'wrong' },
    })
    await ok(['verify', ...repo, ...file])
    await ok(['restore', 'disk-ext4-dirty', dir.file('x.raw'), ...repo, ...file])
    await equalsInUse(join(GOLDEN, 'disk-ext4-dirty.qcow2'), dir.file('x.raw'), dir)
    for (const name of await readdir(dir.file('repo'), { recursive: true })) {
      const path = join(dir.file('repo'), name)
      if ((await stat(path)).isFile()) assert.ok(!(await readFile(path)).includes('first line'), name)
    }
  })
})
