import assert from 'node:assert/strict'
import { closeSync, openSync } from 'node:fs'
import { mkdir, open, readFile, stat, symlink, truncate, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, patternAt, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import type { Extent } from '../../extents/index.ts'
import { allExtents, readBytes } from '../block-device.ts'
import { openHostFile } from './open-host-file.ts'
import { forceSystemCalls, type SystemCalls, systemCalls } from './system-calls.ts'
import { SystemError } from './system-error.ts'

const real = systemCalls()
const noCalls = real ? false : 'needs the system calls of Linux'
const EIO = 5
const EINVAL = 22
const ENOSPC = 28
const ENOSYS = 38
const EOPNOTSUPP = 95

const fails = (errno: number) => (): never => {
  throw new SystemError('made on purpose', errno)
}
const failsLater = (errno: number) => async (): Promise<never> => fails(errno)()

describe('openHostFile()', () => {
  test('refuses by code what is no disk, without waiting', async () => {
    await using dir = await tempDir()
    await must('mkfifo', [dir.file('fifo')])
    await using server = createServer()
    await new Promise<void>((resolve) => server.listen(dir.file('socket'), resolve))
    for (const [path, kind] of [
      [dir.path, 'folder'],
      [dir.file('fifo'), 'fifo'],
      [dir.file('socket'), 'socket'],
      ['/dev/zero', 'character device'],
    ] as const) {
      for (const write of [false, true]) {
        await assert.rejects(
          openHostFile(path, { write }),
          (error) => isVarveError(error, 'UNSUPPORTED') && error.fields['kind'] === kind,
          path,
        )
      }
    }
  })

  test('says what is wrong with a path', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('there'), 'x')
    await symlink(dir.file('there'), dir.file('link'))
    await symlink(dir.file('nowhere'), dir.file('dangling'))
    const cases = [
      ['NOT_FOUND', () => openHostFile(dir.file('missing'))],
      ['NOT_FOUND', () => openHostFile(dir.file('missing'), { write: true })],
      ['NOT_FOUND', () => openHostFile(dir.file('there/below'))],
      ['NOT_FOUND', () => openHostFile(dir.file('dangling'))],
      ['EXISTS', () => openHostFile(dir.file('there'), { create: true, exclusive: true })],
      ['ACCESS_DENIED', () => openHostFile(dir.file('link'), { noFollow: true })],
    ] as const
    for (const [code, opens] of cases)
      await assert.rejects(opens(), (error) => isVarveError(error, code), code)
    await assert.rejects(openHostFile('/tmp/a\0b'), TypeError)
    await assert.rejects(openHostFile(dir.file('there'), { blockSize: 100 }), RangeError)
    await using through = await openHostFile(dir.file('link'))
    assert.equal(through.size, 1)
  })

  test('makes a file for its owner alone, and keeps what is there', async () => {
    await using dir = await tempDir()
    {
      await using made = await openHostFile(dir.file('new'), { create: true, exclusive: true })
      assert.deepEqual([made.size, made.features.write, made.features.resize], [0, true, true])
      await made.resize(10)
      await made.write(3, Uint8Array.of(1, 2))
      await made.flush()
    }
    assert.equal((await stat(dir.file('new'))).mode & 0o777, 0o600)
    await using again = await openHostFile(dir.file('new'), { create: true })
    assert.deepEqual([...(await readBytes(again, 0, 10))], [0, 0, 0, 1, 2, 0, 0, 0, 0, 0])
    assert.equal(again.path, dir.file('new'))
  })

  test('gives an absolute path for a relative one', async () => {
    await using file = await openHostFile('package.json')
    assert.equal(file.path, `${process.cwd()}/package.json`)
  })

  test('koffi is not loaded before something needs it', async () => {
    const script = `
      import { createRequire } from 'node:module'
      const { openHostFile } = await import('${new URL('../index.ts', import.meta.url).href}')
      const loaded = () => Object.keys(createRequire(import.meta.url).cache).some((path) => path.includes('koffi'))
      const file = await openHostFile('/etc/hostname')
      await file.read(0, new Uint8Array(1))
      const before = loaded()
      await file.extents(0, 1)
      console.log(before, loaded())`
    const out = await must(process.execPath, ['--input-type=module', '-e', script])
    assert.equal(out.trim(), `false ${real !== undefined}`)
  })
})

describe('HostFileDevice', () => {
  test('holes are zero, data has its place, and nothing in between is lost', { skip: noCalls }, async () => {
    await using dir = await tempDir()
    const path = dir.file('sparse')
    const count = 10_000 // more than one answer holds
    {
      await using file = await open(path, 'wx')
      await file.truncate(count * 8192)
      for (let i = 0; i < count; i += 2) await file.write(patternAt(i * 8192, 100), 0, 100, i * 8192)
    }
    await using device = await openHostFile(path)
    const first = await device.extents(0, device.size)
    assert.ok(first.length <= 4097, `one answer has ${first.length}`)
    const all: Extent[] = await Array.fromAsync(allExtents(device))
    assert.equal(all.filter(({ kind }) => kind === 'data').length, count / 2)
    for (const extent of all) {
      if (extent.kind !== 'data') continue
      assert.equal(extent.offset % 16384, 0)
      assert.equal(extent.length, 4096)
      assert.deepEqual(extent.at, { file: { path, fd: device.file.fd }, offset: extent.offset })
    }
  })

  test('a file that got shorter is an I/O error, neither data nor a hole', async () => {
    await using dir = await tempDir()
    const path = dir.file('short')
    await writeFile(path, patternAt(0, 65536))
    await using device = await openHostFile(path)
    await truncate(path, 10_000)
    const io = (error: unknown): boolean => isVarveError(error, 'IO') && error.fields['path'] === path
    await assert.rejects(readBytes(device, 0, 65536), io)
    await assert.rejects(readBytes(device, 20_000, 1), io)
    if (real) await assert.rejects(device.extents(0, 65536), io)
    if (real) await assert.rejects(device.extents(20_000, 5000), io)
    assert.equal((await readBytes(device, 0, 10_000)).length, 10_000)
  })

  test('zero() gives the space back', { skip: noCalls }, async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('full'), patternAt(0, 1 << 20))
    await using device = await openHostFile(dir.file('full'), { write: true })
    const before = await device.allocatedBytes()
    assert.ok(before >= 1 << 20)
    await device.zero(4000, 900_000)
    assert.ok((await device.allocatedBytes()) <= before - 890_000)
    assert.equal(device.size, 1 << 20)
    const found = await readBytes(device, 0, 1 << 20)
    const expected = patternAt(0, 1 << 20).fill(0, 4000, 904_000)
    assert.equal(Buffer.compare(found, expected), 0)
  })

  test('takes the plain path where the host lacks a call', { skip: noCalls }, async () => {
    const lacking: Record<string, Partial<SystemCalls>> = {
      'no fallocate': { fallocate: failsLater(EOPNOTSUPP) },
      'no SEEK_DATA': { seekData: fails(EINVAL), seekHole: fails(EINVAL) },
      nothing: {
        fallocate: failsLater(ENOSYS),
        seekData: fails(ENOSYS),
        seekHole: fails(ENOSYS),
        copyFileRange: failsLater(ENOSYS),
        cloneRange: failsLater(EOPNOTSUPP),
        advise: fails(ENOSYS),
      },
    }
    for (const [what, calls] of Object.entries(lacking)) {
      await using dir = await tempDir()
      await writeFile(dir.file('disk'), patternAt(0, 200_000))
      await truncate(dir.file('disk'), 3_000_000)
      using _ = forceSystemCalls({ ...real!, ...calls })
      await using device = await openHostFile(dir.file('disk'), { write: true })
      await device.zero(1000, 2_500_000)
      device.advise('sequential')
      const expected = new Uint8Array(3_000_000)
      expected.set(patternAt(0, 1000))
      assert.equal(Buffer.compare(await readBytes(device, 0, device.size), expected), 0, what)
      for await (const extent of allExtents(device)) {
        if (extent.kind === 'data') continue
        assert.ok(
          expected.subarray(extent.offset, extent.offset + extent.length).every((byte) => byte === 0),
          what,
        )
      }
      if (calls.seekData) assert.equal((await device.extents(0, device.size))[0]?.length, device.size, what)
      else assert.ok((await device.allocatedBytes()) < 300_000, `${what}: holes stay holes`)
    }
  })

  test('a true failure of a call is reported, never taken for a missing one', { skip: noCalls }, async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('disk'), patternAt(0, 100_000))
    using _ = forceSystemCalls({ ...real!, fallocate: failsLater(ENOSPC), seekData: fails(EIO) })
    await using device = await openHostFile(dir.file('disk'), { write: true })
    await assert.rejects(device.zero(0, 100_000), (error) => isVarveError(error, 'NO_SPACE'))
    await assert.rejects(device.extents(0, 100_000), (error) => isVarveError(error, 'IO'))
  })

  test('a flush that failed stays failed', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('disk'), 'x')
    const device = await openHostFile(dir.file('disk'), { write: true })
    const { fd } = device.file
    closeSync(fd)
    await assert.rejects(device.flush(), (error) => isVarveError(error, 'IO'))
    const others: number[] = []
    do others.push(openSync(dir.file('disk'), 'r+'))
    while (others.at(-1) !== fd)
    // The descriptor is good again, and fdatasync would succeed now.
    await assert.rejects(device.flush(), (error) => isVarveError(error, 'IO'))
    await device[Symbol.asyncDispose]()
    for (const other of others) if (other !== fd) closeSync(other)
  })

  test('dispose waits for what is under way', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('disk'), patternAt(0, 8 << 20))
    for (let round = 0; round < 5; round++) {
      const device = await openHostFile(dir.file('disk'))
      const reads = Array.from({ length: 8 }, (_, i) => readBytes(device, i << 20, 1 << 20))
      await device[Symbol.asyncDispose]()
      for (const [i, bytes] of (await Promise.all(reads)).entries()) {
        assert.equal(Buffer.compare(bytes, patternAt(i << 20, 1 << 20)), 0)
      }
    }
  })

  test('a failed read names the file', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('disk'), 'x')
    await using device = await openHostFile(dir.file('disk'))
    await assert.rejects(device.write(0, Uint8Array.of(1)), (error) => isVarveError(error, 'READ_ONLY'))
    assert.equal(await readFile(dir.file('disk'), 'utf8'), 'x')
  })

  test('writes past 4 GiB, at the offset that was asked for', async () => {
    await using dir = await tempDir()
    await using device = await openHostFile(dir.file('large'), { create: true })
    const far = 2 ** 40 + 12_345
    await device.resize(2 ** 40 + 100_000)
    await device.write(far, patternAt(far, 5000))
    assert.deepEqual(await readBytes(device, far, 5000), new Uint8Array(patternAt(far, 5000)))
    const data = (await Array.fromAsync(allExtents(device))).filter(({ kind }) => kind === 'data')
    if (real) assert.deepEqual([data.length, data[0]!.offset], [1, far - (far % 4096)])
    assert.ok((await device.allocatedBytes()) <= 65536)
  })

  test('a full file system is NO_SPACE', { skip: needsRoot() || needs('mount') }, async () => {
    await using dir = await tempDir()
    await mkdir(dir.file('small'))
    await must('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', dir.file('small')])
    try {
      await using device = await openHostFile(dir.file('small/disk'), { create: true })
      await device.resize(4 << 20)
      await assert.rejects(device.write(0, new Uint8Array(4 << 20).fill(1)), (error) =>
        isVarveError(error, 'NO_SPACE'),
      )
      assert.equal((await readBytes(device, 0, 4096))[0], 1, 'what was written before can be read')
    } finally {
      await must('umount', [dir.file('small')])
    }
  })
})

describe('a block device', { skip: needsRoot() || needs('losetup') }, () => {
  const withLoop = async (sector: number, work: (node: string) => Promise<void>): Promise<void> => {
    await using dir = await tempDir()
    await writeFile(dir.file('disk'), patternAt(0, 1 << 20))
    const node = (await must('losetup', ['-f', '--show', '-b', String(sector), dir.file('disk')])).trim()
    try {
      await work(node)
    } finally {
      await must('losetup', ['-d', node])
    }
  }

  for (const sector of [512, 4096]) {
    test(`tells its size and sectors of ${sector}, also without system calls`, async () => {
      await withLoop(sector, async (node) => {
        for (const calls of [systemCalls(), undefined]) {
          using _ = forceSystemCalls(calls)
          await using device = await openHostFile(node)
          assert.deepEqual([device.size, device.blockSize, device.kind], [1 << 20, sector, 'block'])
          assert.deepEqual([device.features.resize, device.features.sparse], [false, false])
          assert.equal(await device.allocatedBytes(), 1 << 20)
        }
      })
    })
  }

  test('is not opened for writing while something else holds it', async () => {
    await withLoop(512, async (node) => {
      await using first = await openHostFile(node, { write: true })
      await assert.rejects(openHostFile(node, { write: true }), (error) => isVarveError(error, 'LOCKED'))
      await using reader = await openHostFile(node)
      await using knowsBetter = await openHostFile(node, { write: true, exclusive: false })
      assert.deepEqual([first.size, reader.size, knowsBetter.size], [1 << 20, 1 << 20, 1 << 20])
      await assert.rejects(first.resize(1 << 21), (error) => isVarveError(error, 'UNSUPPORTED'))
    })
  })
})
