import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { isVarveError } from '../base/index.ts'
import { checkExtents, cutExtent, type Extent, ExtentList } from './extent.ts'

const internal = (error: unknown): boolean => isVarveError(error, 'INTERNAL')
const file = { path: '/a', fd: 3 }
const other = { path: '/b', fd: 4 }

describe('ExtentList', () => {
  test('joins neighbours of one kind whose places run on, and no others', () => {
    const list = new ExtentList()
    list.add(10, 5, 'data', { file, offset: 100 })
    list.add(15, 5, 'data', { file, offset: 105 })
    list.add(20, 5, 'data', { file, offset: 111 }) // does not run on
    list.add(25, 5, 'data', { file: other, offset: 116 })
    list.add(30, 5, 'data') // no place
    list.add(35, 0, 'zero') // empty
    list.add(35, 5, 'data')
    list.add(40, 5, 'zero')
    list.add(45, 5, 'zero')
    list.add(50, 5, 'absent')
    assert.equal(list.end, 55)
    assert.deepEqual(list.finish(), [
      { offset: 10, length: 10, kind: 'data', at: { file, offset: 100 } },
      { offset: 20, length: 5, kind: 'data', at: { file, offset: 111 } },
      { offset: 25, length: 5, kind: 'data', at: { file: other, offset: 116 } },
      { offset: 30, length: 10, kind: 'data' },
      { offset: 40, length: 10, kind: 'zero' },
      { offset: 50, length: 5, kind: 'absent' },
    ])
  })

  test('refuses gaps, overlaps and to be empty', () => {
    const list = new ExtentList()
    assert.throws(() => list.finish(), internal)
    assert.equal(list.end, undefined)
    list.add(0, 5, 'data')
    assert.throws(() => list.add(6, 1, 'data'), internal)
    assert.throws(() => list.add(4, 1, 'data'), internal)
    assert.throws(() => list.add(6, 1, 'zero'), internal)
  })

  test('joining does not change the extents that were given', () => {
    const list = new ExtentList()
    list.add(0, 5, 'zero')
    const first = list.last
    list.add(5, 5, 'zero')
    assert.deepEqual(first, { offset: 0, length: 5, kind: 'zero' })
  })
})

test('cutExtent() moves the place with the start', () => {
  const extent: Extent = { offset: 100, length: 50, kind: 'data', at: { file, offset: 7 } }
  assert.deepEqual(cutExtent(extent, 110, 120), {
    offset: 110,
    length: 10,
    kind: 'data',
    at: { file, offset: 17 },
  })
  assert.deepEqual(cutExtent({ offset: 0, length: 9, kind: 'zero' }, 3, 9), {
    offset: 3,
    length: 6,
    kind: 'zero',
  })
  assert.throws(() => cutExtent(extent, 99, 120), internal)
  assert.throws(() => cutExtent(extent, 110, 151), internal)
  assert.throws(() => cutExtent(extent, 120, 120), internal)
})

describe('checkExtents()', () => {
  const one: Extent = { offset: 10, length: 5, kind: 'data' }
  const two: Extent = { offset: 15, length: 5, kind: 'zero' }
  test('accepts a list that stops early or at the end', () => {
    checkExtents([one, two], 10, 10)
    checkExtents([one], 10, 10)
  })
  test('refuses every breach', () => {
    const breaches: readonly (readonly Extent[])[] = [
      [],
      [two],
      [one, one],
      [one, { ...two, offset: 16 }],
      [one, { ...two, length: 0 }],
      [one, { ...two, length: 6 }],
      [one, { ...two, length: Number.NaN }],
    ]
    for (const list of breaches)
      assert.throws(() => checkExtents(list, 10, 10), internal, JSON.stringify(list))
  })
})
