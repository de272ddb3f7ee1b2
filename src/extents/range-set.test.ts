import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import * as fc from 'fast-check'
import { isVarveError } from '../base/index.ts'
import { type Range, RangeSet, RangeSetBuilder } from './range-set.ts'

/** The model: one bit per block of a small world. */
const WORLD = 96
type Model = readonly boolean[]

const range: fc.Arbitrary<Range> = fc
  .tuple(fc.integer({ min: 0, max: WORLD }), fc.integer({ min: 0, max: 24 }))
  .map(([start, length]) => ({ start, end: Math.min(start + length, WORLD) }))
/** Any order, overlapping, touching and empty ones included. */
const ranges: fc.Arbitrary<Range[]> = fc.array(range, { maxLength: 24 })
const set: fc.Arbitrary<RangeSet> = ranges.map((list) => RangeSet.from(list))
const place: fc.Arbitrary<number> = fc.integer({ min: 0, max: WORLD })

function modelOf(list: Iterable<Range>): Model {
  const bits = Array.from({ length: WORLD }, () => false)
  for (const { start, end } of list) bits.fill(true, start, end)
  return bits
}

function holds(found: RangeSet, expected: Model): void {
  let before = -1
  for (const { start, end } of found) {
    assert.ok(before < start && start < end, `rule broken in ${String(found)}`)
    before = end
  }
  assert.deepEqual(modelOf(found), expected)
  assert.equal(found.size, expected.filter(Boolean).length)
  assert.equal(found.isEmpty, !expected.includes(true))
  assert.equal(found.first, found.isEmpty ? undefined : expected.indexOf(true))
  assert.equal(found.end, found.isEmpty ? undefined : expected.lastIndexOf(true) + 1)
  // What is made without a check passes the check.
  assert.ok(RangeSet.fromBounds(boundsOf(found)).equals(found))
}

function boundsOf(ranges: RangeSet): Float64Array {
  return Float64Array.from([...ranges].flatMap(({ start, end }) => [start, end]))
}

const combine = (a: RangeSet, b: RangeSet, rule: (a: boolean, b: boolean) => boolean): Model => {
  const [left, right] = [modelOf(a), modelOf(b)]
  return left.map((bit, i) => rule(bit, right[i]!))
}

describe('RangeSet agrees with a bit per block:', () => {
  const property = (name: string, body: Parameters<typeof fc.assert>[0]): void =>
    void test(name, () => fc.assert(body, { numRuns: 2000 }))

  property(
    'from any ranges in any order',
    fc.property(ranges, (list) => holds(RangeSet.from(list), modelOf(list))),
  )
  property(
    'from sorted ranges',
    fc.property(ranges, (list) => {
      list.sort((a, b) => a.start - b.start)
      holds(RangeSet.from(list), modelOf(list))
    }),
  )
  property(
    'builder.addAll',
    fc.property(set, ranges, (a, list) => {
      const builder = new RangeSetBuilder()
      for (const { start, end } of list) builder.add(start, end)
      const before = builder.build()
      holds(before, modelOf(list))
      holds(builder.addAll(a).build(), modelOf([...a, ...list]))
      holds(before, modelOf(list))
    }),
  )
  property(
    'union',
    fc.property(set, set, (a, b) =>
      holds(
        a.union(b),
        combine(a, b, (x, y) => x || y),
      ),
    ),
  )
  property(
    'intersect',
    fc.property(set, set, (a, b) =>
      holds(
        a.intersect(b),
        combine(a, b, (x, y) => x && y),
      ),
    ),
  )
  property(
    'subtract',
    fc.property(set, set, (a, b) =>
      holds(
        a.subtract(b),
        combine(a, b, (x, y) => x && !y),
      ),
    ),
  )
  property(
    'complement',
    fc.property(set, place, place, (a, start, end) => {
      const inside = modelOf([{ start, end: Math.max(start, end) }])
      holds(
        a.complement(start, end),
        modelOf(a).map((bit, i) => inside[i]! && !bit),
      )
    }),
  )
  property(
    'clip',
    fc.property(set, place, place, (a, start, end) => {
      const inside = modelOf([{ start, end: Math.max(start, end) }])
      holds(
        a.clip(start, end),
        modelOf(a).map((bit, i) => inside[i]! && bit),
      )
    }),
  )
  property(
    'coarsen rounds outward',
    fc.property(set, fc.constantFrom(1, 2, 3, 4, 8, 32), (a, unit) => {
      const bits = modelOf(a)
      holds(
        a.coarsen(unit),
        bits.map((_, i) => bits.slice(i - (i % unit), i - (i % unit) + unit).includes(true)),
      )
    }),
  )
  property(
    'joinGaps fills the gaps that are shorter, and no others',
    fc.property(set, fc.integer({ min: 0, max: 12 }), (a, gap) => {
      const bits = [...modelOf(a)]
      for (const hole of a.complement(a.first ?? 0, a.end ?? 0)) {
        if (hole.end - hole.start < gap) bits.fill(true, hole.start, hole.end)
      }
      holds(a.joinGaps(gap), bits)
    }),
  )
  property(
    'has, covers, touches',
    fc.property(set, place, place, (a, start, end) => {
      const bits = modelOf(a)
      assert.equal(a.has(start), bits[start] ?? false)
      assert.equal(a.covers(start, end), bits.slice(start, Math.max(start, end)).every(Boolean))
      assert.equal(a.touches(start, end), bits.slice(start, Math.max(start, end)).some(Boolean))
    }),
  )
  property(
    'shift and scale',
    fc.property(
      set,
      fc.integer({ min: -50, max: 50 }),
      fc.integer({ min: 1, max: 5000 }),
      (a, delta, factor) => {
        const moved = [...a].map(({ start, end }) => ({ start: start + delta, end: end + delta }))
        assert.ok(a.shift(delta).equals(RangeSet.from(moved)))
        const scaled = [...a].map(({ start, end }) => ({ start: start * factor, end: end * factor }))
        assert.ok(a.scale(factor).equals(RangeSet.from(scaled)))
      },
    ),
  )
  property(
    'equals',
    fc.property(set, set, (a, b) => {
      assert.equal(
        a.equals(b),
        modelOf(a).every((bit, i) => bit === modelOf(b)[i]),
      )
      assert.ok(a.equals(RangeSet.from(a)))
    }),
  )
})

describe('RangeSet', () => {
  const internal = (error: unknown): boolean => isVarveError(error, 'INTERNAL')

  test('joins touching ranges', () => {
    assert.equal(
      String(
        RangeSet.from([
          { start: 0, end: 5 },
          { start: 5, end: 9 },
        ]),
      ),
      '[0,9)',
    )
    assert.equal(String(RangeSet.of(0, 5).union(RangeSet.of(5, 9))), '[0,9)')
  })

  test('keeps exact bounds up to 2^53 - 1', () => {
    const top = Number.MAX_SAFE_INTEGER
    const set = RangeSet.of(top - 1, top)
    assert.equal(set.union(RangeSet.of(0, 1)).size, 2)
    assert.ok(set.has(top - 1) && !set.has(top - 2))
    assert.ok(set.complement(0, top).equals(RangeSet.of(0, top - 1)))
  })

  test('refuses bounds that are no safe integers, in every way in', () => {
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY, 0.5, 2 ** 53]) {
      assert.throws(() => RangeSet.of(0, bad), internal, `of ${bad}`)
    }
    assert.throws(() => new RangeSetBuilder().add(0.5, 2), internal)
    assert.throws(() => new RangeSetBuilder().add(0, 2 ** 53), internal)
    assert.throws(() => new RangeSetBuilder().add(0, Number.NaN), internal)
    assert.throws(() => RangeSet.of(0, 2 ** 52).scale(2), internal)
    assert.throws(() => RangeSet.of(0, 2 ** 52).shift(2 ** 52), internal)
    assert.throws(() => RangeSet.of(0, Number.MAX_SAFE_INTEGER).coarsen(4096), internal)
    assert.throws(() => RangeSet.of(0, 9).coarsen(0), internal)
    assert.throws(() => RangeSet.of(0, 9).scale(0.5), internal)
  })

  test('fromBounds refuses what breaks the rule', () => {
    for (const bounds of [
      [1],
      [2, 1],
      [1, 1],
      [0, 5, 5, 9],
      [0, 5, 4, 9],
      [Number.NaN, 1],
      [0, Number.NaN],
    ]) {
      assert.throws(() => RangeSet.fromBounds(Float64Array.from(bounds)), internal, String(bounds))
    }
  })

  test('a result does not change when its inputs are used on', () => {
    const builder = new RangeSetBuilder().add(0, 4)
    const first = builder.build()
    builder.add(2, 8).add(100, 200)
    assert.equal(String(first), '[0,4)')
  })

  test('200000 unordered ranges are joined without stepping over each pair', () => {
    const builder = new RangeSetBuilder()
    const n = 200_000
    for (let i = 0; i < n; i++) {
      const j = (i * 61_957) % n
      builder.add(j * 10, j * 10 + 5)
    }
    const started = performance.now()
    const set = builder.build()
    assert.equal(set.count, n)
    assert.equal(set.size, n * 5)
    assert.ok(performance.now() - started < 30_000, 'sorting is not quadratic')
  })
})
