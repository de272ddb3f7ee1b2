/**
 * Bitmap: one bit per block, bit n in word n/32, least significant first, which on little-endian hosts is also
 * the byte order of ext, NTFS, FAT and qcow2 bitmaps (bit n = byte n/8, bit n%8).
 *
 * Rule: bits at and past `length` are always clear, so counting and searching need no special end.
 */
import { assert } from '../base/index.ts'
import { RangeSet, RangeSetBuilder } from './range-set.ts'

export class Bitmap {
  /** Number of bits. */
  readonly length: number
  readonly #words: Uint32Array

  constructor(length: number) {
    assert(Number.isSafeInteger(length) && length >= 0 && length <= 2 ** 36, 'bitmap length is sane')
    this.length = length
    this.#words = new Uint32Array(Math.ceil(length / 32))
  }

  /**
   * From bytes as a file system stores them. `msbFirst`: bit 0 is 0x80 of byte 0 (VHD). Bits past `length` are
   * dropped; bytes that are missing are clear.
   */
  static fromBytes(bytes: Uint8Array, length: number, options: { msbFirst?: boolean } = {}): Bitmap {
    const bitmap = new Bitmap(length)
    const into = new Uint8Array(bitmap.#words.buffer)
    const wanted = Math.ceil(length / 8)
    into.set(bytes.subarray(0, wanted))
    if (options.msbFirst) for (let i = 0; i < wanted; i++) into[i] = REVERSED[into[i]!]!
    if (!LITTLE_ENDIAN_HOST) swapWords(bitmap.#words)
    bitmap.#trim()
    return bitmap
  }

  /** As many bytes as the bits need, least significant bit first (or most, for VHD). */
  toBytes(options: { msbFirst?: boolean } = {}): Uint8Array {
    const words = this.#words.slice()
    if (!LITTLE_ENDIAN_HOST) swapWords(words)
    const bytes = new Uint8Array(words.buffer, 0, Math.ceil(this.length / 8))
    if (options.msbFirst) for (let i = 0; i < bytes.length; i++) bytes[i] = REVERSED[bytes[i]!]!
    return bytes
  }

  /** Bit n stands for number `base + n` of the set; members outside are ignored. */
  static fromRanges(ranges: RangeSet, length: number, base = 0): Bitmap {
    const bitmap = new Bitmap(length)
    for (let i = ranges.indexAfter(base); i < ranges.count && ranges.startAt(i) < base + length; i++) {
      bitmap.setRange(Math.max(ranges.startAt(i) - base, 0), Math.min(ranges.endAt(i) - base, length))
    }
    return bitmap
  }

  /** Set bits as ranges, bit n being number `base + n`. */
  toRanges(base = 0): RangeSet {
    const builder = new RangeSetBuilder()
    this.eachRun((start, end) => builder.add(base + start, base + end))
    return builder.build()
  }

  /** Calls `visit(start, end)` for each run of set bits, ascending. */
  eachRun(visit: (start: number, end: number) => void): void {
    let at = this.nextSet(0)
    while (at < this.length) {
      const end = this.nextClear(at)
      visit(at, end)
      at = this.nextSet(end)
    }
  }

  get(bit: number): boolean {
    return ((this.#words[Math.floor(bit / 32)] ?? 0) >>> (bit % 32)) % 2 === 1
  }

  set(bit: number): void {
    this.setRange(bit, bit + 1)
  }

  clear(bit: number): void {
    this.clearRange(bit, bit + 1)
  }

  setRange(start: number, end: number): void {
    this.#fill(start, end, true)
  }

  clearRange(start: number, end: number): void {
    this.#fill(start, end, false)
  }

  /** Number of set bits. */
  get count(): number {
    let total = 0
    const words = this.#words
    for (let i = 0; i < words.length; i++) total += popcount(words[i]!)
    return total
  }

  /** First set bit at or after `from`; `length` when there is none. */
  nextSet(from: number): number {
    return this.#next(from, 0)
  }

  /** First clear bit at or after `from`; `length` when there is none. */
  nextClear(from: number): number {
    return this.#next(from, 0xffffffff)
  }

  /** Sets every bit that is set in `other`; both have the same length. */
  or(other: Bitmap): void {
    assert(this.length === other.length, 'bitmaps have one length')
    for (let i = 0; i < this.#words.length; i++) this.#words[i]! |= other.#words[i]!
  }

  /** `skip` is the word that holds nothing of interest: 0 when looking for set bits, ~0 for clear ones. */
  #next(from: number, skip: 0 | 0xffffffff): number {
    assert(from >= 0, 'search starts inside the bitmap')
    if (from >= this.length) return this.length
    const words = this.#words
    let index = Math.floor(from / 32)
    let word = ((words[index]! ^ skip) >>> (from % 32)) << (from % 32)
    while (word === 0) {
      if (++index >= words.length) return this.length
      word = words[index]! ^ skip
    }
    return Math.min(index * 32 + 31 - Math.clz32(word & -word), this.length)
  }

  #fill(start: number, end: number, value: boolean): void {
    assert(start >= 0 && start <= end && end <= this.length, 'bit range lies inside the bitmap')
    if (start === end) return
    const words = this.#words
    const first = Math.floor(start / 32)
    const last = Math.floor((end - 1) / 32)
    const head = (0xffffffff << (start % 32)) >>> 0
    const tail = 0xffffffff >>> (31 - ((end - 1) % 32))
    if (first === last) {
      apply(words, first, head & tail, value)
      return
    }
    apply(words, first, head, value)
    words.fill(value ? 0xffffffff : 0, first + 1, last)
    apply(words, last, tail, value)
  }

  #trim(): void {
    const rest = this.length % 32
    if (rest !== 0) this.#words[this.#words.length - 1]! &= 0xffffffff >>> (32 - rest)
  }
}

function apply(words: Uint32Array, index: number, mask: number, value: boolean): void {
  if (value) words[index]! |= mask
  else words[index]! &= ~mask
}

function popcount(word: number): number {
  let v = word - ((word >>> 1) & 0x55555555)
  v = (v & 0x33333333) + ((v >>> 2) & 0x33333333)
  return Math.imul((v + (v >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24
}

const LITTLE_ENDIAN_HOST = new Uint8Array(Uint32Array.of(1).buffer)[0] === 1

function swapWords(words: Uint32Array): void {
  for (let i = 0; i < words.length; i++) {
    const w = words[i]!
    words[i] = (w >>> 24) | ((w >>> 8) & 0xff00) | ((w << 8) & 0xff0000) | (w << 24)
  }
}

const REVERSED: Uint8Array = Uint8Array.from({ length: 256 }, (_, byte) => {
  let out = 0
  for (let bit = 0; bit < 8; bit++) if (byte & (1 << bit)) out |= 0x80 >>> bit
  return out
})
