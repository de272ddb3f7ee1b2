import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../../test/kit/index.ts'
import type { MapEntry } from '../chain/index.ts'
import { RangeSet } from '../extents/index.ts'
import { type MapRow, mapRows } from './map-rows.ts'

async function* each(entries: readonly MapEntry[]): AsyncGenerator<MapEntry> {
  yield* entries
}

test('mapRows() cuts at bounds of what is in use and moves the place along', async () => {
  const entries: MapEntry[] = [
    { start: 0, length: 100, depth: 0, present: true, zero: false, data: true, offset: 1000, file: 'f' },
    { start: 100, length: 50, depth: 1, present: false, zero: true, data: false },
  ]
  const inUse = RangeSet.from([
    { start: 10, end: 20 },
    { start: 90, end: 110 },
  ])
  const rows = await Array.fromAsync(mapRows(each(entries), { inUse }))
  assert.deepEqual(
    rows.map(({ start, length, inUse, offset }) => [start, length, inUse, offset]),
    [
      [0, 10, false, 1000],
      [10, 10, true, 1010],
      [20, 70, false, 1020],
      [90, 10, true, 1090],
      [100, 10, true, undefined],
      [110, 40, false, undefined],
    ],
  )
})

test('mapRows() joins neighbours that agree and marks what is allocated', async () => {
  const entries: MapEntry[] = [
    { start: 0, length: 10, depth: 0, present: true, zero: true, data: false },
    { start: 10, length: 10, depth: 0, present: true, zero: true, data: false },
    { start: 20, length: 10, depth: 0, present: false, zero: true, data: false },
  ]
  assert.deepEqual(await Array.fromAsync(mapRows(each(entries), { allocated: true })), [
    { start: 0, length: 20, depth: 0, present: true, zero: true, data: false, allocated: true },
    { start: 20, length: 10, depth: 0, present: false, zero: true, data: false, allocated: false },
  ])
})

test('mapRows() agrees with a model byte by byte', async () => {
  const random = new Random()
  for (let round = 0; round < 200; round++) {
    const size = 1 + random.below(200)
    const entries: MapEntry[] = []
    for (let at = 0; at < size; ) {
      const length = Math.min(size - at, 1 + random.below(30))
      const data = random.below(2) === 0
      const placed = data && random.below(2) === 0
      entries.push({
        start: at,
        length,
        depth: random.below(2),
        present: data || random.below(2) === 0,
        zero: !data,
        data,
        ...(placed ? { offset: 5000 + at, file: 'f' } : {}),
      })
      at += length
    }
    const inUse = RangeSet.from(
      Array.from({ length: random.below(6) }, () => {
        const start = random.below(size)
        return { start, end: Math.min(size, start + 1 + random.below(40)) }
      }),
    )
    const rows = await Array.fromAsync(mapRows(each(entries), { inUse }))
    const model = (byte: number): unknown => {
      const { start, length: _, offset, ...entry } = entries.find((e) => byte < e.start + e.length)!
      return {
        ...entry,
        offset: offset === undefined ? undefined : offset + byte - start,
        inUse: inUse.has(byte),
      }
    }
    const found = (row: MapRow, byte: number): unknown => {
      const { start, length: _, offset, ...rest } = row
      return { ...rest, offset: offset === undefined ? undefined : offset + byte - start }
    }
    let at = 0
    for (const row of rows) {
      assert.equal(row.start, at, `seed ${random.seed}`)
      assert.ok(row.length > 0, `seed ${random.seed}`)
      for (; at < row.start + row.length; at++)
        assert.deepEqual(found(row, at), model(at), `seed ${random.seed}`)
      if (at < size) assert.notDeepEqual(found(row, at), model(at), `joined at ${at}, seed ${random.seed}`)
    }
    assert.equal(at, size, `seed ${random.seed}`)
  }
})
