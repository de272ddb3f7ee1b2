import assert from 'node:assert/strict'
import { writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, patternAt, tempDir } from '../../../test/kit/index.ts'
import { blake2b256, xxhash64 } from './checksum.ts'

describe('Btrfs checksums', () => {
  test('xxhash64() equals the published vectors', () => {
    assert.equal(xxhash64(new Uint8Array(0)), 0xef46db3751d8e999n)
    assert.equal(xxhash64(Buffer.from('a')), 0xd24ec4f1a98c6e5bn)
    assert.equal(xxhash64(Buffer.from('abc')), 0x44bc2cf5ad770999n)
    assert.equal(xxhash64(Buffer.from('Nobody inspects the spammish repetition')), 0xfbcea83c8a378bf1n)
  })

  test('blake2b256() equals b2sum at every length around a block', { skip: needs('b2sum') }, async () => {
    await using dir = await tempDir()
    for (const length of [0, 1, 63, 127, 128, 129, 255, 256, 257, 4064, 16352]) {
      const bytes = patternAt(0, length)
      await writeFile(dir.file('x'), bytes)
      const [expected] = (await must('b2sum', ['-l', '256', dir.file('x')])).split(' ')
      assert.equal(Buffer.from(blake2b256(bytes)).toString('hex'), expected, `length ${length}`)
    }
  })
})
