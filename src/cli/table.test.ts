import assert from 'node:assert/strict'
import { test } from 'node:test'
import { styleText } from 'node:util'
import { table, width } from './table.ts'

test('table() aligns columns, leaves nothing trailing and drops columns without content', () => {
  assert.deepEqual(
    table(
      [{ title: 'NAME' }, { title: 'SIZE', align: 'right' }, { title: 'EMPTY' }, { title: 'NOTE' }],
      [
        ['a', '1', '', 'x'],
        ['longer', '1000', '', ''],
      ],
    ),
    ['NAME    SIZE  NOTE', 'a          1  x', 'longer  1000'],
  )
})

test('table() keeps its titles when there is no row', () => {
  assert.deepEqual(table([{ title: 'A' }, { title: 'B' }], []), ['A  B'])
})

test('width() counts what a terminal shows', () => {
  assert.equal(width('abc'), 3)
  assert.equal(width(styleText('red', 'abc', { validateStream: false })), 3)
  assert.equal(width('ディスク'), 8)
  assert.equal(width('e\u0301'), 1)
  assert.equal(width('─├│'), 3)
})
