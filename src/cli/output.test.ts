import assert from 'node:assert/strict'
import { test } from 'node:test'
import { printable } from './output.ts'

test('printable() leaves no way for an image to steer the terminal', () => {
  assert.equal(printable('root'), 'root')
  assert.equal(printable('Größe 日本'), 'Größe 日本')
  assert.equal(printable('a\x1b[31mred\x1b[0m'), 'ared')
  assert.equal(printable('a\nb\rc\0d\x07'), 'a\ufffdb\ufffdc\ufffdd\ufffd')
  assert.equal(printable('\u202eexe.txt'), '\ufffdexe.txt')
  assert.equal(printable('a\u0085b\u2028c'), 'a\ufffdb\ufffdc')
  for (let code = 0; code < 0x20; code++) {
    assert.doesNotMatch(printable(`x${String.fromCharCode(code)}y`), /\p{Cc}/u, `character ${code}`)
  }
})
