import assert from 'node:assert/strict'
import { mkdir, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, patternAt, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import { readBytes } from '../block-device.ts'
import { copyRange } from './copy-range.ts'
import { FIEMAP_EXTENT, fiemap } from './fiemap.ts'
import { openHostFile } from './open-host-file.ts'
import { forceSystemCalls, systemCalls } from './system-calls.ts'
import { SystemError } from './system-error.ts'

const real = systemCalls()
const SIZE = 1_000_000
const noCalls = real ? false : 'needs the system calls of Linux'

async function pair(folder: string): Promise<AsyncDisposable & { from: Device; to: Device }> {
  await writeFile(`${folder}/from`, patternAt(0, SIZE))
  await using stack = new AsyncDisposableStack()
  const from = stack.use(await openHostFile(`${folder}/from`))
  const to = stack.use(await openHostFile(`${folder}/to`, { create: true }))
  await to.resize(SIZE)
  const owned = stack.move()
  return { from, to, [Symbol.asyncDispose]: () => owned.disposeAsync() }
}
type Device = Awaited<ReturnType<typeof openHostFile>>

async function holds(to: Device, fromOffset: number, offset: number, length: number): Promise<void> {
  const expected = new Uint8Array(SIZE)
  expected.set(patternAt(fromOffset, length), offset)
  assert.equal(Buffer.compare(await readBytes(to, 0, SIZE), expected), 0)
}

describe('copyRange()', { skip: noCalls }, () => {
  for (const [fromOffset, offset, length] of [
    [0, 0, SIZE],
    [4096, 8192, 100_000],
    [1, 7, 333_333],
    [5, 4096, 1],
    [0, 0, 0],
  ] as const) {
    test(`copies ${length} bytes from ${fromOffset} to ${offset} and nothing beside them`, async () => {
      await using dir = await tempDir()
      await using both = await pair(dir.path)
      const copied = await copyRange({
        from: { file: both.from.file, offset: fromOffset },
        to: both.to,
        offset,
        length,
      })
      assert.equal(copied, length)
      await holds(both.to, fromOffset, offset, length)
    })
  }

  test('says 0 where the host can do neither, and how far it came', async () => {
    await using dir = await tempDir()
    await using both = await pair(dir.path)
    const from = { file: both.from.file, offset: 0 }
    const no = async (): Promise<never> => {
      throw new SystemError('made on purpose', 38)
    }
    for (const calls of [undefined, { ...real!, copyFileRange: no, cloneRange: no }]) {
      using _ = forceSystemCalls(calls)
      assert.equal(await copyRange({ from, to: both.to, offset: 0, length: SIZE }), 0)
    }
    let turns = 0
    using _ = forceSystemCalls({
      ...real!,
      cloneRange: no,
      copyFileRange: async (call) =>
        turns++ < 2 ? await real!.copyFileRange({ ...call, length: 1000 }) : await no(),
    })
    assert.equal(await copyRange({ from, to: both.to, offset: 0, length: SIZE }), 2000)
    await holds(both.to, 0, 0, 2000)
  })

  test('a source that ends early does not spin', async () => {
    await using dir = await tempDir()
    await using both = await pair(dir.path)
    await truncate(both.from.path, 5000)
    const copied = await copyRange({
      from: { file: both.from.file, offset: 1000 },
      to: both.to,
      offset: 0,
      length: 10_000,
    })
    assert.equal(copied, 4000)
  })

  test('a true failure is thrown', async () => {
    await using dir = await tempDir()
    await using both = await pair(dir.path)
    using _ = forceSystemCalls({
      ...real!,
      cloneRange: async () => {
        throw new SystemError('made on purpose', 95)
      },
      copyFileRange: async () => {
        throw new SystemError('made on purpose', 28)
      },
    })
    const run = copyRange({ from: { file: both.from.file, offset: 0 }, to: both.to, offset: 0, length: 10 })
    await assert.rejects(
      run,
      (error) => isVarveError(error, 'NO_SPACE') && error.fields['path'] === both.to.path,
    )
  })

  test('keeps to the range, to a writable target and to the signal', async () => {
    await using dir = await tempDir()
    await using both = await pair(dir.path)
    const from = { file: both.from.file, offset: 0 }
    await assert.rejects(copyRange({ from, to: both.to, offset: SIZE - 5, length: 6 }), RangeError)
    await assert.rejects(copyRange({ from, to: both.from, offset: 0, length: 6 }), (error) =>
      isVarveError(error, 'READ_ONLY'),
    )
    await assert.rejects(
      copyRange({ from, to: both.to, offset: 0, length: 6, signal: AbortSignal.abort() }),
      (error) => isVarveError(error, 'CANCELLED'),
    )
  })

  test('from another file system', { skip: needsRoot() || needs('mount') }, async () => {
    await using dir = await tempDir()
    await mkdir(dir.file('other'))
    await must('mount', ['-t', 'tmpfs', 'tmpfs', dir.file('other')])
    try {
      await writeFile(dir.file('other/from'), patternAt(0, 10_000))
      await using from = await openHostFile(dir.file('other/from'))
      await using to = await openHostFile(dir.file('to'), { create: true })
      await to.resize(SIZE)
      const copied = await copyRange({ from: { file: from.file, offset: 0 }, to, offset: 0, length: 10_000 })
      await holds(to, 0, 0, copied) // 0 where the kernel refuses, all where it copies
    } finally {
      await must('umount', [dir.file('other')])
    }
  })

  test('shares the blocks on XFS', {
    skip: needsRoot() || needs('mkfs.xfs', 'mount', 'losetup'),
  }, async () => {
    await using dir = await tempDir()
    await mkdir(dir.file('xfs'))
    await using image = await openHostFile(dir.file('image'), { create: true })
    await image.resize(320 << 20)
    await must('mkfs.xfs', ['-q', '-m', 'reflink=1', dir.file('image')])
    await must('mount', ['-o', 'loop', dir.file('image'), dir.file('xfs')])
    try {
      await using both = await pair(dir.file('xfs'))
      // Whole blocks are shared; the rest at the end, which is none, is copied.
      const copied = await copyRange({
        from: { file: both.from.file, offset: 8192 },
        to: both.to,
        offset: 4096,
        length: 500_000,
      })
      assert.equal(copied, 500_000)
      await holds(both.to, 8192, 4096, 500_000)
      const extents = [...fiemap(both.to.file)].flat()
      const shared = extents.filter(({ flags }) => flags & FIEMAP_EXTENT.shared)
      const sharedBytes = shared.reduce((sum, { length }) => sum + length, 0)
      assert.ok(sharedBytes >= 495_616, `only ${sharedBytes} bytes are shared`)
    } finally {
      await must('umount', [dir.file('xfs')])
    }
  })
})
