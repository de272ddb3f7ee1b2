import assert from 'node:assert/strict'
import { stat, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { tempDir } from '../../../test/kit/index.ts'
import { makeFolder } from './make-folder.ts'

describe('makeFolder()', () => {
  test('makes parents, and is content with what is there', async () => {
    await using dir = await tempDir()
    await makeFolder(dir.file('a/b/c'))
    await makeFolder(dir.file('a/b/c'))
    assert.ok((await stat(dir.file('a/b/c'))).isDirectory())
    await Promise.all(Array.from({ length: 8 }, () => makeFolder(dir.file('x/y/z'))))
  })

  test('ends with an error where no folder can be made', { timeout: 10_000 }, async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('file'), '')
    await assert.rejects(makeFolder(dir.file('file/below')))
    await assert.rejects(makeFolder(dir.file('file')))
    await assert.rejects(makeFolder('/proc/varve/below'))
  })
})
