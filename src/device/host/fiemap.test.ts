import assert from 'node:assert/strict'
import { open, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, patternAt, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import { FIEMAP_EXTENT, fiemap } from './fiemap.ts'
import { openHostFile } from './open-host-file.ts'
import { forceSystemCalls, systemCalls } from './system-calls.ts'

const noCalls = systemCalls() ? false : 'needs the system calls of Linux'

describe('fiemap()', { skip: noCalls }, () => {
  test('says what filefrag says, over many calls', { skip: needs('filefrag') }, async () => {
    await using dir = await tempDir()
    const path = dir.file('pieces')
    {
      await using file = await open(path, 'wx')
      for (let i = 0; i < 1300; i++) await file.write(patternAt(i, 4096), 0, 4096, i * 12_288)
    }
    await using device = await openHostFile(path)
    const groups = [...fiemap(device.file)]
    const found = groups.flat()
    assert.ok(groups.length >= 3 && groups.every((group) => group.length <= 512))
    const lines = (await must('filefrag', ['-e', '-v', '-b4096', path])).matchAll(
      /^\s*\d+:\s*(\d+)\.\.\s*\d+:\s*(\d+)\.\.\s*\d+:\s*(\d+):/gm,
    )
    const expected = Array.from(lines, ([, logical, physical, length]) =>
      [logical, physical, length].map((value) => Number(value) * 4096),
    )
    assert.ok(expected.length >= 1300)
    assert.deepEqual(
      found.map(({ logical, physical, length }) => [logical, physical, length]),
      expected,
    )
    assert.ok(found.at(-1)!.flags & FIEMAP_EXTENT.last)
  })

  test('of a part', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x'), patternAt(0, 100_000))
    await using device = await openHostFile(dir.file('x'))
    for (const { logical, length } of [...fiemap(device.file, { start: 50_000, length: 10_000 })].flat()) {
      assert.ok(logical < 60_000 && logical + length > 50_000)
    }
    assert.deepEqual([...fiemap(device.file, { start: 50_000, length: 0 })], [])
    assert.throws(
      () => [...fiemap(device.file, { signal: AbortSignal.abort() })],
      (error) => isVarveError(error, 'CANCELLED'),
    )
  })

  test('marks preallocated space as unwritten', { skip: needs('fallocate') }, async () => {
    await using dir = await tempDir()
    await must('fallocate', ['-l', '1M', dir.file('x')])
    await using device = await openHostFile(dir.file('x'))
    const found = [...fiemap(device.file)].flat()
    assert.ok(found.length > 0 && found.every(({ flags }) => flags & FIEMAP_EXTENT.unwritten))
    assert.deepEqual(
      (await device.extents(0, device.size)).map(({ kind }) => kind),
      ['zero'],
      'and SEEK_DATA knows that it holds nothing',
    )
  })

  test('is UNSUPPORTED where there is none', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x'), 'x')
    await using device = await openHostFile(dir.file('x'))
    using _ = forceSystemCalls(undefined)
    assert.throws(
      () => [...fiemap(device.file)],
      (error) => isVarveError(error, 'UNSUPPORTED'),
    )
  })
})
