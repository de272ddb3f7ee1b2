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

  /** One range, or the empty set when `start >= end`. */
  static of(start: number, end: number): RangeSet {
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
    return merge(this.#bounds, other.#bounds, 1)
  }

  intersect(other: RangeSet): RangeSet {
    if (this.isEmpty || other.isEmpty) return RangeSet.empty
    return merge(this.#bounds, other.#bounds, 2)
  }

  /** Members of this set that are not in `other`. */
  subtract(other: RangeSet): RangeSet {
    if (this.isEmpty || other.isEmpty) return this
    const end = Math.max(this.end!, other.end!)
    const start = Math.min(this.first!, other.first!)
    return this.intersect(other.complement(start, end))
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
    const out: number[] = []
    for (let i = this.indexAfter(start); i < this.count && this.startAt(i) < end; i++) {
      out.push(Math.max(this.startAt(i), start), Math.min(this.endAt(i), end))
    }
    return out.length === 0 ? RangeSet.empty : new RangeSet(Float64Array.from(out))
  }

  /** Every bound rounded outward to a multiple of `unit`, as rule 1 asks: never smaller than this set. */
  coarsen(unit: number): RangeSet {
    assert(unit > 0, 'unit is positive')
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
    return n === 0 ? RangeSet.empty : new RangeSet(out.slice(0, n))
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
    return delta === 0 || this.isEmpty ? this : new RangeSet(this.#bounds.map((bound) => bound + delta))
  }

  /** Every bound multiplied: block numbers into bytes. */
  scale(factor: number): RangeSet {
    assert(factor > 0, 'factor is positive')
    return factor === 1 || this.isEmpty ? this : new RangeSet(this.#bounds.map((bound) => bound * factor))
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

/** Numbers that lie in at least `need` of the two sets, in one pass over both. */
function merge(a: Float64Array, b: Float64Array, need: 1 | 2): RangeSet {
  const out = new Float64Array(a.length + b.length)
  let n = 0
  let i = 0
  let j = 0
  let depth = 0
  while (i < a.length || j < b.length) {
    const fromA = i < a.length ? a[i]! : Number.POSITIVE_INFINITY
    const fromB = j < b.length ? b[j]! : Number.POSITIVE_INFINITY
    const at = fromA < fromB ? fromA : fromB
    const before = depth
    // An even index is a start, an odd one an end; starts and ends at one place cancel out before they are seen.
    if (fromA === at) depth += i++ % 2 === 0 ? 1 : -1
    if (fromB === at) depth += j++ % 2 === 0 ? 1 : -1
    if (before < need !== depth < need) out[n++] = at
  }
  return n === 0 ? RangeSet.empty : RangeSet.fromBounds(out.slice(0, n))
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

function sortAndJoin(bounds: Float64Array): Float64Array {
  const order = Uint32Array.from({ length: bounds.length / 2 }, (_, i) => i)
  order.sort((x, y) => bounds[x * 2]! - bounds[y * 2]!)
  const out = new Float64Array(bounds.length)
  let n = 0
  for (const index of order) {
    const start = bounds[index * 2]!
    const end = bounds[index * 2 + 1]!
    if (n > 0 && start <= out[n - 1]!) {
      if (end > out[n - 1]!) out[n - 1] = end
    } else {
      out[n++] = start
      out[n++] = end
    }
  }
  return out.slice(0, n)
}
