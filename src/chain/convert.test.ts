import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { chmod, lstat, readdir, readFile, stat, symlink, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { must, needs, needsRoot, patternAt, Random, run, tempDir } from '../../test/kit/index.ts'
import { loopDevice } from '../../test/poison/mount.ts'
import { type ErrorCode, isVarveError } from '../base/index.ts'
import { openHostFile, readBytes } from '../device/index.ts'
import { RangeSet } from '../extents/index.ts'
import { convertImage, createImage, openDisk } from './index.ts'

const MIB = 1024 * 1024

async function refuses(code: ErrorCode, work: Promise<unknown>): Promise<void> {
  await assert.rejects(work, (error: unknown) => {
    assert.ok(isVarveError(error), String(error))
    assert.equal(error.code, code, error.message)
    return true
  })
}

function openFiles(): number {
  return process.platform === 'linux' ? readdirSync('/proc/self/fd').length : 0
}

describe('convertImage() against qemu-img', { skip: needs('qemu-img', 'qemu-io') }, () => {
  test('a qcow2 chain, a VHD and a raw file become the raw that qemu-img makes', async () => {
    await using dir = await tempDir()
    const random = new Random()
    const writes = (size: number): string[] =>
      Array.from({ length: 12 }, (_, i) => {
        const at = random.below(size / 512 - 700) * 512
        return ['-c', `write ${i % 5 ? `-P ${i + 1}` : '-z'} ${at} ${(1 + random.below(600)) * 512}`]
      }).flat()
    await must('qemu-img', ['create', '-q', '-f', 'raw', dir.file('base.raw'), '20M'])
    await must('qemu-io', ['-f', 'raw', ...writes(20 * MIB), dir.file('base.raw')])
    await must('qemu-img', [
      'create',
      '-q',
      '-f',
      'qcow2',
      '-b',
      'base.raw',
      '-F',
      'raw',
      dir.file('mid.qcow2'),
      '30M',
    ])
    await must('qemu-io', [...writes(30 * MIB), dir.file('mid.qcow2')])
    await must('qemu-img', [
      'create',
      '-q',
      '-f',
      'qcow2',
      '-b',
      'mid.qcow2',
      '-F',
      'qcow2',
      dir.file('top.qcow2'),
    ])
    await must('qemu-io', [...writes(30 * MIB), dir.file('top.qcow2')])
    await must('qemu-img', ['convert', '-O', 'vpc', dir.file('top.qcow2'), dir.file('top.vhd')])
    await must('qemu-img', [
      'convert',
      '-O',
      'vpc',
      '-o',
      'subformat=fixed',
      dir.file('top.qcow2'),
      dir.file('fixed.vhd'),
    ])
    const before = openFiles()
    for (const [name, format] of [
      ['base.raw', 'raw'],
      ['top.qcow2', 'qcow2'],
      ['top.vhd', 'vpc'],
      ['fixed.vhd', 'vpc'],
    ] as const) {
      const out = dir.file(`${name}.out`)
      const result = await convertImage(dir.file(name), out, { format: 'raw', sourceFormat: format })
      await must('qemu-img', ['compare', '-f', format, '-F', 'raw', dir.file(name), out])
      assert.equal(result.copiedBytes + result.zeroBytes, result.virtualSize)
      const { blocks, size, mode } = await stat(out)
      assert.equal(size, result.virtualSize)
      assert.ok(blocks * 512 <= result.copiedBytes + 64 * 1024, `${name}: what is zero is a hole`)
      assert.equal(mode & 0o777, 0o600)
    }
    assert.equal(openFiles(), before, `seed ${random.seed}`)
    assert.deepEqual(
      (await readdir(dir.path)).filter((name) => name.includes('.tmp')),
      [],
    )
  })

  test('what we make, qemu-img calls identical and whole: qcow2, dynamic and fixed VHD', async () => {
    await using dir = await tempDir()
    await must('qemu-img', ['create', '-q', '-f', 'raw', dir.file('a.raw'), '21000192'])
    await must('qemu-io', [
      '-f',
      'raw',
      ...['write -P 1 0 1M', 'write -P 2 3M 70k', 'write -P 3 10000k 5M', 'write -P 4 20999680 512'].flatMap(
        (command) => ['-c', command],
      ),
      dir.file('a.raw'),
    ])
    for (const [name, format, settings] of [
      ['a.qcow2', 'qcow2', {}],
      ['a.vhd', 'vhd', {}],
      ['fixed.vhd', 'vhd', { type: 'fixed' }],
    ] as const) {
      const result = await convertImage(dir.file('a.raw'), dir.file(name), { format, settings })
      const theirs = format === 'vhd' ? 'vpc' : format
      await must('qemu-img', ['compare', '-f', 'raw', '-F', theirs, dir.file('a.raw'), dir.file(name)])
      if (format === 'qcow2') await must('qemu-img', ['check', dir.file(name)])
      await convertImage(dir.file(name), dir.file(`${name}.raw`), { format: 'raw' })
      assert.ok((await readFile(dir.file('a.raw'))).equals(await readFile(dir.file(`${name}.raw`))), name)
      assert.ok(result.copiedBytes < 7 * MIB, name)
    }
  })

  test('only what is in use is copied; the rest reads as zeros', async () => {
    await using dir = await tempDir()
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', dir.file('a.qcow2'), '8M'])
    await must('qemu-io', ['-c', 'write -P 5 0 8M', dir.file('a.qcow2')])
    const inUse = RangeSet.from([
      { start: 1000, end: 70_001 },
      { start: 5 * MIB, end: 6 * MIB },
    ])
    const result = await convertImage(dir.file('a.qcow2'), dir.file('a.raw'), { format: 'raw', inUse })
    assert.deepEqual([result.copiedBytes, result.skippedBytes], [inUse.size, 8 * MIB - inUse.size])
    const bytes = await readFile(dir.file('a.raw'))
    const expected = Buffer.alloc(8 * MIB)
    for (const { start, end } of inUse) expected.fill(5, start, end)
    assert.ok(bytes.equals(expected))
  })
})

describe('createImage()', () => {
  const raw = { format: 'raw', virtualSize: 10_000 } as const

  test('names the image only when it is whole; a failure leaves nothing', async () => {
    await using dir = await tempDir()
    const before = openFiles()
    await createImage(dir.file('a.raw'), raw, async ({ target, isZero }) => {
      assert.ok(isZero)
      await target.write(0, patternAt(0, 10_000))
      assert.deepEqual(
        (await readdir(dir.path)).filter((name) => !name.endsWith('.tmp')),
        [],
      )
    })
    assert.deepEqual(await readdir(dir.path), ['a.raw'])
    assert.deepEqual(new Uint8Array(await readFile(dir.file('a.raw'))), patternAt(0, 10_000))
    await assert.rejects(
      createImage(dir.file('b.raw'), raw, () => Promise.reject(new Error('mine'))),
      /mine/,
    )
    const aborted = new AbortController()
    await refuses(
      'CANCELLED',
      createImage(dir.file('b.raw'), { ...raw, signal: aborted.signal }, async () => aborted.abort()),
    )
    assert.deepEqual(await readdir(dir.path), ['a.raw'])
    assert.equal(openFiles(), before)
  })

  test('what is there stays without force, is replaced whole with it, its mode and links kept', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('a.raw'), 'old')
    await chmod(dir.file('a.raw'), 0o640)
    await symlink('a.raw', dir.file('link.raw'))
    await symlink('nowhere', dir.file('dangling.raw'))
    const fill = async (): Promise<void> => {}
    await refuses('EXISTS', createImage(dir.file('a.raw'), raw, fill))
    await refuses('EXISTS', createImage(dir.file('link.raw'), raw, fill))
    await refuses('EXISTS', createImage(dir.file('dangling.raw'), raw, fill))
    assert.equal(await readFile(dir.file('a.raw'), 'utf8'), 'old')
    await assert.rejects(
      createImage(dir.file('a.raw'), { ...raw, force: true }, () => Promise.reject(new Error('x'))),
    )
    assert.equal(await readFile(dir.file('a.raw'), 'utf8'), 'old', 'until the new one is whole')
    await createImage(dir.file('link.raw'), { ...raw, force: true }, fill)
    const { size, mode } = await stat(dir.file('a.raw'))
    assert.deepEqual([size, mode & 0o777], [10_000, 0o640])
    assert.ok((await lstat(dir.file('link.raw'))).isSymbolicLink())
    assert.equal((await readdir(dir.path)).length, 3)
  })

  test('does not replace what somebody else made in the meantime', async () => {
    await using dir = await tempDir()
    await refuses(
      'EXISTS',
      createImage(dir.file('a.raw'), raw, async () => {
        await writeFile(dir.file('a.raw'), 'theirs')
      }),
    )
    assert.equal(await readFile(dir.file('a.raw'), 'utf8'), 'theirs')
    assert.deepEqual(await readdir(dir.path), ['a.raw'])
  })

  test('refuses formats that it cannot make, folders that are not there, and folders as targets', async () => {
    await using dir = await tempDir()
    const fill = async (): Promise<void> => {}
    await refuses('USAGE', createImage(dir.file('a'), { ...raw, format: 'tape' }, fill))
    await refuses('NOT_FOUND', createImage(dir.file('gone/a'), raw, fill))
    await refuses('UNSUPPORTED', createImage(dir.path, { ...raw, force: true }, fill))
    await refuses('USAGE', createImage(dir.file('a'), { ...raw, settings: { odd: 1 } }, fill))
    assert.deepEqual(await readdir(dir.path), [])
  })

  test('convertImage() refuses to write over a layer of its source', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('a.raw'), patternAt(0, 4096))
    await symlink('a.raw', dir.file('b.raw'))
    for (const name of ['a.raw', 'b.raw']) {
      await refuses('USAGE', convertImage(dir.file('a.raw'), dir.file(name), { format: 'raw', force: true }))
    }
    assert.deepEqual(new Uint8Array(await readFile(dir.file('a.raw'))), patternAt(0, 4096))
  })

  test('a size that is no multiple of a sector survives', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('a.raw'), patternAt(0, 70_001))
    await convertImage(dir.file('a.raw'), dir.file('b.raw'), { format: 'raw' })
    assert.deepEqual(new Uint8Array(await readFile(dir.file('b.raw'))), patternAt(0, 70_001))
  })
})

test('a block device is written with force only, and nothing old shines through', {
  skip: needsRoot() || needs('losetup'),
}, async () => {
  await using dir = await tempDir()
  await writeFile(dir.file('device'), Buffer.alloc(4 * MIB, 0x5a))
  await writeFile(
    dir.file('a.raw'),
    Buffer.concat([patternAt(0, MIB), Buffer.alloc(MIB), patternAt(2 * MIB, MIB)]),
  )
  await using loop = await loopDevice(dir.file('device'))
  await refuses('EXISTS', convertImage(dir.file('a.raw'), loop.device, { format: 'raw' }))
  for (const inUse of [undefined, RangeSet.of(4096, 2 * MIB + 5000)]) {
    await writeFile(dir.file('device'), Buffer.alloc(4 * MIB, 0x5a))
    await must('blockdev', ['--flushbufs', loop.device])
    await convertImage(dir.file('a.raw'), loop.device, { format: 'raw', force: true, inUse })
    await using device = await openHostFile(loop.device)
    const found = await readBytes(device, 0, 4 * MIB)
    const expected = Buffer.alloc(4 * MIB, 0x5a)
    const source = await readFile(dir.file('a.raw'))
    expected.fill(0, 0, 3 * MIB)
    for (const { start, end } of inUse ?? RangeSet.of(0, 3 * MIB)) source.copy(expected, start, start, end)
    assert.ok(expected.equals(found), 'the disk, and what is behind it untouched')
  }
  await writeFile(dir.file('large.raw'), Buffer.alloc(5 * MIB, 1))
  await refuses('NO_SPACE', convertImage(dir.file('large.raw'), loop.device, { format: 'raw', force: true }))
})

test('blocks are shared where the file system can', {
  skip: needsRoot() || needs('mkfs.xfs', 'losetup'),
}, async () => {
  await using dir = await tempDir()
  await must('truncate', ['-s', '320M', dir.file('fs')])
  await must('mkfs.xfs', ['-q', '-m', 'reflink=1', dir.file('fs')])
  const { mounted } = await import('../../test/poison/mount.ts')
  await using mount = await mounted(dir.file('fs'))
  const path = (name: string): string => `${mount.path}/${name}`
  await using file = await openHostFile(path('a.raw'), { create: true })
  await file.resize(32 * MIB)
  await file.write(MIB, patternAt(MIB, 8 * MIB))
  await file.write(20 * MIB, patternAt(20 * MIB, 8 * MIB))
  await file.flush()
  const inUse = RangeSet.of(4 * MIB, 32 * MIB)
  await convertImage(path('a.raw'), path('b.raw'), { format: 'raw', inUse })
  await using disk = await openDisk(path('b.raw'))
  const expected = Buffer.alloc(32 * MIB)
  expected.set(patternAt(4 * MIB, 5 * MIB), 4 * MIB)
  expected.set(patternAt(20 * MIB, 8 * MIB), 20 * MIB)
  assert.ok(expected.equals(await readBytes(disk, 0, disk.size)))
  const shared = await run('xfs_io', ['-r', '-c', 'fiemap -v', path('b.raw')])
  if (shared.code === 0) assert.match(shared.stdout.toString(), /0x2\d\d\d/, 'extents with the flag "shared"')
})

test('killed at any moment: the new image is not there, or whole', {
  skip: process.platform === 'win32',
}, async () => {
  await using dir = await tempDir()
  const random = new Random()
  const content = Buffer.from(patternAt(0, 48 * MIB))
  await writeFile(dir.file('a.raw'), content)
  const door = new URL('./index.ts', import.meta.url).href
  const program = `import { convertImage } from ${JSON.stringify(door)}
    process.stdout.write('go')
    await convertImage(process.argv[1], process.argv[2], { format: 'raw' })`
  let whole = 0
  for (let round = 0; round < 8; round++) {
    const target = dir.file(`${round}.raw`)
    const child = spawn(process.execPath, ['--input-type=module', '-e', program, dir.file('a.raw'), target], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const ended = new Promise((resolve) => child.on('close', resolve))
    await new Promise((resolve) => child.stdout.once('data', resolve))
    await sleep(random.below(250))
    child.kill('SIGKILL')
    await ended
    const there = await readFile(target).catch(() => undefined)
    if (there) {
      whole++
      assert.ok(there.equals(content), `round ${round}, seed ${random.seed}`)
    }
  }
  const left = (await readdir(dir.path)).filter((name) => name.endsWith('.tmp'))
  assert.ok(whole + left.length <= 9)
  for (const name of left) assert.match(name, /^\.\d\.raw\.varve-[0-9a-f]{12}\.tmp$/)
})
