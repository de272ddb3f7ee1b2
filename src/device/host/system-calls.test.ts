import assert from 'node:assert/strict'
import { cp, mkdir, open, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, patternAt, tempDir } from '../../../test/kit/index.ts'
import { FALLOCATE, forceSystemCalls, mayHaveSystemCalls, systemCalls, UMOUNT } from './system-calls.ts'
import { isNotOffered, SystemError } from './system-error.ts'

const calls = systemCalls()
const BAD_FD = 999_999
const bad = (error: unknown): boolean => error instanceof SystemError && error.code === 'EBADF'

describe('the calls of the host', { skip: calls ? false : 'needs the system calls of Linux' }, () => {
  const c = calls!

  test('carry errno, from whichever thread', async () => {
    const call = { fromFd: BAD_FD, fromOffset: 0, toFd: BAD_FD, toOffset: 0, length: 4096 }
    assert.throws(() => c.seekData(BAD_FD, 0), bad)
    assert.throws(() => c.seekHole(BAD_FD, 0), bad)
    assert.throws(() => c.advise(BAD_FD, 0, 0, 'random'), bad)
    assert.throws(() => c.flock(BAD_FD, 'shared'), bad)
    assert.throws(() => c.setLock(BAD_FD, 'shared', { start: 0, length: 1 }), bad)
    assert.throws(() => c.conflictingLock(BAD_FD, 'shared', { start: 0, length: 1 }), bad)
    assert.throws(() => c.blockDeviceBytes(BAD_FD), bad)
    assert.throws(() => c.logicalSectorBytes(BAD_FD), bad)
    assert.throws(() => c.fiemap(BAD_FD, new Uint8Array(32)), bad)
    await assert.rejects(c.fallocate(BAD_FD, 0, 0, 1), bad)
    await assert.rejects(c.copyFileRange(call), bad)
    await assert.rejects(c.cloneRange(call), bad)
    assert.throws(
      () => c.umount('/nowhere/at/all', 0),
      (error) => error instanceof SystemError && error.code === 'ENOENT',
    )
  })

  test('errors of many calls at a time are not mixed up', async () => {
    await using dir = await tempDir()
    await using file = await open(dir.file('x'), 'wx')
    const outcomes = await Promise.all(
      Array.from({ length: 2000 }, async (_, i) => {
        try {
          if (i % 3 === 0) await c.fallocate(BAD_FD, 0, 0, 1)
          else if (i % 3 === 1) await c.fallocate(file.fd, 0, 0, 0)
          else await c.fallocate(file.fd, FALLOCATE.keepSize, 0, 4096)
          return 'done'
        } catch (error) {
          return (error as SystemError).code
        }
      }),
    )
    assert.deepEqual(
      outcomes,
      outcomes.map((_, i) => ['EBADF', 'EINVAL', 'done'][i % 3]),
    )
  })

  test('seekData() and seekHole() walk a file past 4 GiB', async () => {
    await using dir = await tempDir()
    await using file = await open(dir.file('x'), 'wx')
    const far = 2 ** 33
    await file.write(patternAt(0, 4096), 0, 4096, far)
    await file.truncate(far + 65536)
    assert.equal(c.seekData(file.fd, 0), far)
    assert.equal(c.seekHole(file.fd, 0), 0)
    assert.equal(c.seekHole(file.fd, far), far + 4096)
    assert.equal(c.seekData(file.fd, far + 4096), undefined)
    assert.equal(c.seekHole(file.fd, far + 65536), undefined)
  })

  test('a call on the wrong kind of file is "not offered"', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x'), 'x')
    await using file = await open(dir.file('x'), 'r')
    assert.throws(() => c.blockDeviceBytes(file.fd), isNotOffered)
    await using pipe = await open('/dev/null', 'r')
    assert.throws(() => c.fiemap(pipe.fd, new Uint8Array(32)), isNotOffered)
    assert.ok(!isNotOffered(new SystemError('x', 5)) && !isNotOffered(new Error('ENOSYS')))
  })

  test('flock() is one more kind of lock', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x'), 'x')
    await using a = await open(dir.file('x'), 'r')
    await using b = await open(dir.file('x'), 'r')
    c.flock(a.fd, 'exclusive')
    assert.throws(
      () => c.flock(b.fd, 'shared'),
      (error) => error instanceof SystemError && error.code === 'EAGAIN',
    )
    c.flock(a.fd, 'none')
    c.flock(b.fd, 'shared')
    c.flock(a.fd, 'shared')
  })

  test('byte-range locks tell who is in the way', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x'), 'x')
    await using a = await open(dir.file('x'), 'r+')
    await using b = await open(dir.file('x'), 'r+')
    c.setLock(a.fd, 'shared', { start: 100, length: 2 })
    assert.equal(c.conflictingLock(b.fd, 'shared', { start: 0, length: 0 }), undefined)
    assert.equal(c.conflictingLock(b.fd, 'exclusive', { start: 101, length: 1 }), 'shared')
    assert.equal(c.conflictingLock(b.fd, 'exclusive', { start: 102, length: 0 }), undefined)
    assert.equal(c.conflictingLock(a.fd, 'exclusive', { start: 101, length: 1 }), undefined, 'not itself')
    c.setLock(b.fd, 'exclusive', { start: 2 ** 40, length: 1 })
    assert.equal(c.conflictingLock(a.fd, 'shared', { start: 0, length: 0 }), 'exclusive')
  })

  test('advise() takes every advice', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x'), patternAt(0, 65536))
    await using file = await open(dir.file('x'), 'r')
    for (const advice of ['normal', 'random', 'sequential', 'willneed', 'dontneed'] as const) {
      c.advise(file.fd, 0, 0, advice)
    }
  })

  test('umount() ends a mount', { skip: needsRoot() || needs('mount', 'mountpoint') }, async () => {
    await using dir = await tempDir()
    await must('mount', ['-t', 'tmpfs', 'tmpfs', dir.path])
    const busy = await open(dir.file('x'), 'w')
    assert.throws(
      () => c.umount(dir.path, 0),
      (error) => error instanceof SystemError && error.code === 'EBUSY',
    )
    c.umount(dir.path, UMOUNT.detach | UMOUNT.noFollow)
    await busy.close()
    await assert.rejects(must('mountpoint', ['-q', dir.path]))
  })
})

describe('a host without system calls', () => {
  test('can be forced, also inside each other', () => {
    const before = systemCalls()
    {
      using _ = forceSystemCalls(undefined)
      assert.equal(systemCalls(), undefined)
      assert.equal(mayHaveSystemCalls(), false)
      {
        using _ = forceSystemCalls(before)
        assert.equal(systemCalls(), before)
      }
      assert.equal(systemCalls(), undefined)
    }
    assert.equal(systemCalls(), before)
  })

  const script = (folder: string): string => `
    const { openHostFile, systemCalls, readBytes } = await import('${folder}/src/device/index.ts')
    const file = await openHostFile(process.argv[1], { write: true })
    await file.zero(10, 20)
    const extents = await file.extents(0, file.size)
    await file.flush()
    console.log(systemCalls() === undefined, extents.length, extents[0].kind, (await readBytes(file, 0, 40)).join(''))`
  const expected = `true 1 data ${'1'.repeat(10)}${'0'.repeat(20)}${'1'.repeat(10)}`
  const disk = async (path: string): Promise<void> => {
    await writeFile(path, new Uint8Array(40).fill(1))
    await truncate(path, 1 << 20)
  }

  test('VARVE_PLAIN_IO=1 does without them', async () => {
    await using dir = await tempDir()
    await disk(dir.file('disk'))
    const root = join(import.meta.dirname, '../../..')
    const out = await must(process.execPath, ['--input-type=module', '-e', script(root), dir.file('disk')], {
      env: { VARVE_PLAIN_IO: '1' },
    })
    assert.equal(out.trim(), expected)
  })

  test('an installation without koffi works, without holes', async () => {
    await using dir = await tempDir()
    await disk(dir.file('disk'))
    await mkdir(dir.file('src'))
    await writeFile(dir.file('package.json'), '{"type":"module"}')
    for (const room of ['base', 'extents', 'device']) {
      await cp(join(import.meta.dirname, '../..', room), dir.file(`src/${room}`), { recursive: true })
    }
    const out = await must(
      process.execPath,
      ['--input-type=module', '-e', script(dir.path), dir.file('disk')],
      {
        cwd: dir.path,
      },
    )
    assert.equal(out.trim(), expected)
  })
})
