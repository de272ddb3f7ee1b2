/**
 * RangeSet: an immutable set of byte (or block) numbers as sorted, disjoint, half-open ranges, touching ones
 * joined. Two Float64 per range in one array, so a million ranges are 16 MB and every operation is one O(n) pass.
 *
 * Rule: bounds[0] < bounds[1] < bounds[2] < … strictly. Every constructor path keeps it; `RangeSetBuilder` is
 * the way to make one from unordered input.
 */
import { assert } from '../base/index.ts'

export interface Range {
  readonly start: number
  /** First number not in the range. */
  readonly end: number
}

export class RangeSet {
  /** start0, end0, start1, end1, … strictly ascending. */
  readonly #bounds: Float64Array

  private constructor(bounds: Float64Array) {
    this.#bounds = bounds
  }

  static readonly empty: RangeSet = new RangeSet(new Float64Array(0))

  /** One range, or the empty set when `start >= end`. Bounds must be safe integers. */
  static of(start: number, end: number): RangeSet {
    assert(Number.isSafeInteger(start) && Number.isSafeInteger(end), 'bounds are safe integers')
    return start < end ? new RangeSet(Float64Array.of(start, end)) : RangeSet.empty
  }

  /** From any ranges, in any order, overlapping or not; empty ones are dropped. */
  static from(ranges: Iterable<Range>): RangeSet {
    const builder = new RangeSetBuilder()
    for (const { start, end } of ranges) builder.add(start, end)
    return builder.build()
  }

  /**
   * From bounds that already keep the rule (checked). The array is taken over, not copied.
   * @throws INTERNAL when they do not.
   */
  static fromBounds(bounds: Float64Array): RangeSet {
    assert(bounds.length % 2 === 0, 'bounds come in pairs')
    for (let i = 1; i < bounds.length; i++) assert(bounds[i - 1]! < bounds[i]!, 'bounds ascend')
    return bounds.length === 0 ? RangeSet.empty : new RangeSet(bounds)
  }

  /** Takes over a merge's result; keeps the unused end of its array only while that is small. */
  static #done({ out, n }: Filled): RangeSet {
    if (n === 0) return RangeSet.empty
    return new RangeSet(n * 2 < out.length ? out.slice(0, n) : out.subarray(0, n))
  }

  /** For results of arithmetic on bounds, which must not leave the safe integers. */
  static #checked(set: RangeSet): RangeSet {
    assert(Number.isSafeInteger(set.first) && Number.isSafeInteger(set.end), 'bounds are safe integers')
    return set
  }

  /** Number of ranges. */
  get count(): number {
    return this.#bounds.length / 2
  }

  /** Sum of the lengths. */
  get size(): number {
    let total = 0
    for (let i = 0; i < this.#bounds.length; i += 2) total += this.#bounds[i + 1]! - this.#bounds[i]!
    return total
  }

  get isEmpty(): boolean {
    return this.#bounds.length === 0
  }

  /** First number in the set; undefined when empty. */
  get first(): number | undefined {
    return this.#bounds[0]
  }

  /** First number after the set; undefined when empty. */
  get end(): number | undefined {
    return this.#bounds.at(-1)
  }

  startAt(index: number): number {
    return this.#bounds[index * 2]!
  }

  endAt(index: number): number {
    return this.#bounds[index * 2 + 1]!
  }

  *[Symbol.iterator](): Generator<Range> {
    for (let i = 0; i < this.#bounds.length; i += 2)
      yield { start: this.#bounds[i]!, end: this.#bounds[i + 1]! }
  }

  has(value: number): boolean {
    const index = this.indexAfter(value)
    return index < this.count && this.startAt(index) <= value
  }

  /** True when all of `[start, end)` is in the set. */
  covers(start: number, end: number): boolean {
    if (start >= end) return true
    const index = this.indexAfter(start)
    return index < this.count && this.startAt(index) <= start && end <= this.endAt(index)
  }

  /** True when any number of `[start, end)` is in the set. */
  touches(start: number, end: number): boolean {
    if (start >= end) return false
    const index = this.indexAfter(start)
    return index < this.count && this.startAt(index) < end
  }

  /** Index of the first range whose end lies after `value` (binary search); `count` when there is none. */
  indexAfter(value: number): number {
    let low = 0
    let high = this.count
    while (low < high) {
      const middle = (low + high) >>> 1
      if (this.#bounds[middle * 2 + 1]! > value) high = middle
      else low = middle + 1
    }
    return low
  }

  union(other: RangeSet): RangeSet {
    if (this.isEmpty) return other
    if (other.isEmpty) return this
    return RangeSet.#done(unionOf(this.#bounds, other.#bounds))
  }

  intersect(other: RangeSet): RangeSet {
    if (this.isEmpty || other.isEmpty) return RangeSet.empty
    return RangeSet.#done(intersectionOf(this.#bounds, other.#bounds))
  }

  /** Members of this set that are not in `other`. */
  subtract(other: RangeSet): RangeSet {
    if (this.isEmpty || other.isEmpty) return this
    return RangeSet.#done(differenceOf(this.#bounds, other.#bounds))
  }

  /** Members of `[start, end)` that are not in this set. */
  complement(start: number, end: number): RangeSet {
    if (start >= end) return RangeSet.empty
    const out = new Float64Array(this.#bounds.length + 2)
    let n = 0
    let at = start
    for (let i = this.indexAfter(start); i < this.count; i++) {
      const from = this.startAt(i)
      if (from >= end) break
      if (from > at) {
        out[n++] = at
        out[n++] = from
      }
      at = this.endAt(i)
    }
    if (at < end) {
      out[n++] = at
      out[n++] = end
    }
    return n === 0 ? RangeSet.empty : new RangeSet(out.slice(0, n))
  }

  /** The part inside `[start, end)`. */
  clip(start: number, end: number): RangeSet {
    if (start >= end || this.isEmpty) return RangeSet.empty
    if (this.first! >= start && this.end! <= end) return this
    const from = this.indexAfter(start)
    let to = this.indexAfter(end - 1)
    if (to < this.count && this.startAt(to) < end) to++
    if (from >= to) return RangeSet.empty
    const out = this.#bounds.slice(from * 2, to * 2)
    out[0] = Math.max(out[0]!, start)
    out[out.length - 1] = Math.min(out[out.length - 1]!, end)
    return new RangeSet(out)
  }

  /** Every bound rounded outward to a multiple of `unit`, as rule 1 asks: never smaller than this set. */
  coarsen(unit: number): RangeSet {
    assert(Number.isSafeInteger(unit) && unit > 0, 'unit is a positive integer')
    const out = new Float64Array(this.#bounds.length)
    let n = 0
    for (let i = 0; i < this.#bounds.length; i += 2) {
      const start = Math.floor(this.#bounds[i]! / unit) * unit
      const end = Math.ceil(this.#bounds[i + 1]! / unit) * unit
      if (n > 0 && start <= out[n - 1]!) out[n - 1] = end
      else {
        out[n++] = start
        out[n++] = end
      }
    }
    return n === 0 ? RangeSet.empty : RangeSet.#checked(new RangeSet(out.slice(0, n)))
  }

  /** Ranges joined over gaps shorter than `gap`: fewer, larger reads. Never smaller than this set. */
  joinGaps(gap: number): RangeSet {
    const out = new Float64Array(this.#bounds.length)
    let n = 0
    for (let i = 0; i < this.#bounds.length; i += 2) {
      if (n > 0 && this.#bounds[i]! - out[n - 1]! < gap) out[n - 1] = this.#bounds[i + 1]!
      else {
        out[n++] = this.#bounds[i]!
        out[n++] = this.#bounds[i + 1]!
      }
    }
    return n === 0 ? RangeSet.empty : new RangeSet(out.slice(0, n))
  }

  /** Every bound moved by `delta`. */
  shift(delta: number): RangeSet {
    if (delta === 0 || this.isEmpty) return this
    return RangeSet.#checked(new RangeSet(this.#bounds.map((bound) => bound + delta)))
  }

  /** Every bound multiplied: block numbers into bytes. */
  scale(factor: number): RangeSet {
    assert(Number.isSafeInteger(factor) && factor > 0, 'factor is a positive integer')
    if (factor === 1 || this.isEmpty) return this
    return RangeSet.#checked(new RangeSet(this.#bounds.map((bound) => bound * factor)))
  }

  equals(other: RangeSet): boolean {
    if (this.#bounds.length !== other.#bounds.length) return false
    for (let i = 0; i < this.#bounds.length; i++) if (this.#bounds[i] !== other.#bounds[i]) return false
    return true
  }

  toString(): string {
    return Array.from(this, ({ start, end }) => `[${start},${end})`).join(' ')
  }
}

// The three merges: one pass over both, each range once. Their results keep the rule by construction; that is
// tested against a model, not checked again on a million bounds.

function unionOf(a: Float64Array, b: Float64Array): Filled {
  const out = new Float64Array(a.length + b.length)
  let n = 0
  let i = 0
  let j = 0
  let end = Number.NEGATIVE_INFINITY
  while (i < a.length || j < b.length) {
    let start: number
    let stop: number
    if (j >= b.length || (i < a.length && a[i]! <= b[j]!)) {
      start = a[i]!
      stop = a[i + 1]!
      i += 2
    } else {
      start = b[j]!
      stop = b[j + 1]!
      j += 2
    }
    if (start > end) {
      out[n] = start
      n += 2
      end = stop
    } else if (stop > end) {
      end = stop
    }
    out[n - 1] = end
  }
  return { out, n }
}

function intersectionOf(a: Float64Array, b: Float64Array): Filled {
  const out = new Float64Array(a.length + b.length)
  let n = 0
  let i = 0
  let j = 0
  while (i < a.length && j < b.length) {
    const endA = a[i + 1]!
    const endB = b[j + 1]!
    const start = Math.max(a[i]!, b[j]!)
    const end = endA < endB ? endA : endB
    if (start < end) {
      out[n++] = start
      out[n++] = end
    }
    if (endA <= endB) i += 2
    if (endB <= endA) j += 2
  }
  return { out, n }
}

function differenceOf(a: Float64Array, b: Float64Array): Filled {
  const out = new Float64Array(a.length + b.length)
  let n = 0
  let j = 0
  for (let i = 0; i < a.length; i += 2) {
    let at = a[i]!
    const end = a[i + 1]!
    while (j < b.length && b[j + 1]! <= at) j += 2
    // The last of these may reach into the next range too, so it stays.
    for (let k = j; k < b.length && b[k]! < end; k += 2) {
      if (b[k]! > at) {
        out[n++] = at
        out[n++] = b[k]!
      }
      at = b[k + 1]!
      if (at < end) j = k + 2
    }
    if (at < end) {
      out[n++] = at
      out[n++] = end
    }
  }
  return { out, n }
}

interface Filled {
  readonly out: Float64Array
  readonly n: number
}

/** Collects ranges in any order. Ascending input (the common case) is never sorted. */
export class RangeSetBuilder {
  #bounds = new Float64Array(64)
  #n = 0
  #sorted = true

  /** Adds `[start, end)`; nothing when it is empty. Bounds must be safe integers. */
  add(start: number, end: number): this {
    if (start >= end) return this
    assert(Number.isSafeInteger(start) && Number.isSafeInteger(end), 'bounds are safe integers')
    const n = this.#n
    if (n > 0) {
      const lastEnd = this.#bounds[n - 1]!
      if (start < this.#bounds[n - 2]!) this.#sorted = false
      else if (start <= lastEnd && this.#sorted) {
        if (end > lastEnd) this.#bounds[n - 1] = end
        return this
      }
    }
    if (n + 2 > this.#bounds.length) {
      const larger = new Float64Array(this.#bounds.length * 2)
      larger.set(this.#bounds)
      this.#bounds = larger
    }
    this.#bounds[n] = start
    this.#bounds[n + 1] = end
    this.#n = n + 2
    return this
  }

  addAll(ranges: RangeSet): this {
    for (let i = 0; i < ranges.count; i++) this.add(ranges.startAt(i), ranges.endAt(i))
    return this
  }

  build(): RangeSet {
    const bounds = this.#bounds.slice(0, this.#n)
    return RangeSet.fromBounds(this.#sorted ? bounds : sortAndJoin(bounds))
  }
}

/**
 * Sorts starts and ends apart, each natively (ten times as fast as pairs by a comparator): walking both, a place
 * is in the set while more ranges have started than ended.
 */
function sortAndJoin(bounds: Float64Array): Float64Array {
  const half = bounds.length / 2
  const starts = new Float64Array(half)
  const ends = new Float64Array(half)
  for (let i = 0; i < half; i++) {
    starts[i] = bounds[i * 2]!
    ends[i] = bounds[i * 2 + 1]!
  }
  starts.sort()
  ends.sort()
  let n = 0
  let open = 0
  let i = 0
  for (let j = 0; j < half; ) {
    if (i < half && starts[i]! <= ends[j]!) {
      if (open++ === 0) bounds[n++] = starts[i]!
      i++
    } else {
      if (--open === 0) bounds[n++] = ends[j]!
      j++
    }
  }
  return bounds.slice(0, n)
}
