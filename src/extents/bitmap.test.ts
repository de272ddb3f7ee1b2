import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import * as fc from 'fast-check'
import { isVarveError } from '../base/index.ts'
import { Bitmap } from './bitmap.ts'
import { RangeSet } from './range-set.ts'

type Step = readonly [kind: 'set' | 'clear' | 'setRange' | 'clearRange', a: number, b: number]

/** Lengths around word borders, and the steps that fill a bitmap of that length. */
const world: fc.Arbitrary<{ length: number; steps: Step[] }> = fc
  .oneof(fc.constantFrom(0, 1, 31, 32, 33, 63, 64, 65, 96), fc.integer({ min: 0, max: 200 }))
  .chain((length) =>
    fc.record({
      length: fc.constant(length),
      steps: fc.array(
        fc.tuple(
          fc.constantFrom('set', 'clear', 'setRange', 'clearRange'),
          fc.integer({ min: 0, max: length }),
          fc.integer({ min: 0, max: length }),
        ),
        { maxLength: length === 0 ? 0 : 20 },
      ),
    }),
  )

function build({ length, steps }: { length: number; steps: readonly Step[] }): {
  bitmap: Bitmap
  model: boolean[]
} {
  const bitmap = new Bitmap(length)
  const model = Array.from({ length }, () => false)
  for (const [kind, a, b] of steps) {
    if (kind === 'set' || kind === 'clear') {
      const bit = Math.min(a, length - 1)
      bitmap[kind](bit)
      model[bit] = kind === 'set'
    } else {
      const [start, end] = a < b ? [a, b] : [b, a]
      bitmap[kind](start, end)
      model.fill(kind === 'setRange', start, end)
    }
  }
  return { bitmap, model }
}

const bitsOf = (bitmap: Bitmap): boolean[] =>
  Array.from({ length: bitmap.length }, (_, bit) => bitmap.get(bit))

describe('Bitmap agrees with an array of booleans:', () => {
  const property = (name: string, check: (bitmap: Bitmap, model: boolean[], extra: number) => void): void =>
    void test(name, () =>
      fc.assert(
        fc.property(world, fc.nat(220), (input, extra) => {
          const { bitmap, model } = build(input)
          check(bitmap, model, extra)
        }),
        { numRuns: 2000 },
      ),
    )

  property('set, clear, ranges and get', (bitmap, model) => assert.deepEqual(bitsOf(bitmap), model))
  property('get outside is clear', (bitmap, _, extra) => {
    assert.equal(bitmap.get(bitmap.length + extra), false)
    assert.equal(bitmap.get(-1), false)
  })
  property('count', (bitmap, model) => assert.equal(bitmap.count, model.filter(Boolean).length))
  property('nextSet and nextClear', (bitmap, model, from) => {
    const next = (wanted: boolean): number => {
      const found = model.indexOf(wanted, from)
      return found < 0 || from >= model.length ? model.length : found
    }
    assert.equal(bitmap.nextSet(from), next(true))
    assert.equal(bitmap.nextClear(from), next(false))
  })
  property('toRanges and fromRanges', (bitmap, model, base) => {
    const ranges = bitmap.toRanges(base)
    assert.equal(ranges.size, bitmap.count)
    for (const [bit, value] of model.entries()) assert.equal(ranges.has(base + bit), value)
    assert.deepEqual(bitsOf(Bitmap.fromRanges(ranges, bitmap.length, base)), model)
  })
  property('fromRanges leaves out what lies outside', (bitmap, model, extra) => {
    const shifted = bitmap.toRanges(100)
    const cut = Bitmap.fromRanges(shifted, extra, 90)
    assert.deepEqual(
      bitsOf(cut),
      Array.from({ length: extra }, (_, bit) => model[bit - 10] ?? false),
    )
  })
  for (const msbFirst of [false, true]) {
    property(
      `toBytes and fromBytes, ${msbFirst ? 'most' : 'least'} significant bit first`,
      (bitmap, model) => {
        const bytes = bitmap.toBytes({ msbFirst })
        assert.equal(bytes.length, Math.ceil(model.length / 8))
        for (const [bit, value] of model.entries()) {
          const mask = msbFirst ? 0x80 >> (bit % 8) : 1 << (bit % 8)
          assert.equal((bytes[Math.floor(bit / 8)]! & mask) !== 0, value)
        }
        assert.deepEqual(bitsOf(Bitmap.fromBytes(bytes, model.length, { msbFirst })), model)
      },
    )
    property(`fromBytes drops bits past the length (${msbFirst ? 'msb' : 'lsb'})`, (_, model, extra) => {
      const bitmap = Bitmap.fromBytes(new Uint8Array(64).fill(0xff), Math.min(extra, 512), { msbFirst })
      assert.equal(bitmap.count, Math.min(extra, 512))
      assert.equal(bitmap.nextClear(0), bitmap.length)
      assert.ok(model.length >= 0)
    })
  }
  property('eachRun visits maximal runs', (bitmap, model) => {
    const seen = Array.from({ length: model.length }, () => false)
    let last = -1
    bitmap.eachRun((start, end) => {
      assert.ok(start > last && end > start)
      last = end
      seen.fill(true, start, end)
    })
    assert.deepEqual(seen, model)
  })

  test('or', () => {
    fc.assert(
      fc.property(world, world, (a, b) => {
        const left = build(a)
        const right = build({ ...b, length: a.length, steps: a.length === 0 ? [] : fit(b.steps, a.length) })
        left.bitmap.or(right.bitmap)
        assert.deepEqual(
          bitsOf(left.bitmap),
          left.model.map((bit, i) => bit || right.model[i]!),
        )
      }),
    )
  })
})

const fit = (steps: readonly Step[], length: number): Step[] =>
  steps.map(([kind, a, b]) => [kind, Math.min(a, length), Math.min(b, length)])

describe('Bitmap', () => {
  const internal = (error: unknown): boolean => isVarveError(error, 'INTERNAL')

  test('bytes that are missing are clear', () => {
    assert.equal(Bitmap.fromBytes(Uint8Array.of(0xff), 64).count, 8)
  })

  test('refuses places outside', () => {
    const bitmap = new Bitmap(40)
    for (const [start, end] of [
      [-1, 3],
      [0, 41],
      [5, 4],
      [Number.NaN, 4],
    ] as const) {
      assert.throws(() => bitmap.setRange(start, end), internal)
      assert.throws(() => bitmap.clearRange(start, end), internal)
    }
    assert.throws(() => bitmap.set(40), internal)
    assert.throws(() => bitmap.nextSet(-1), internal)
    assert.throws(() => bitmap.or(new Bitmap(41)), internal)
    assert.throws(() => new Bitmap(-1), internal)
    assert.throws(() => new Bitmap(2 ** 40), internal)
  })

  test('finds the last bit of a large, empty bitmap by words', () => {
    const bitmap = new Bitmap(2 ** 28)
    bitmap.set(2 ** 28 - 1)
    const started = performance.now()
    assert.equal(bitmap.nextSet(0), 2 ** 28 - 1)
    assert.ok(performance.now() - started < 20_000)
    assert.ok(bitmap.toRanges().equals(RangeSet.of(2 ** 28 - 1, 2 ** 28)))
  })
})
