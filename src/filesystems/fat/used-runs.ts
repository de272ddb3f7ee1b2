/**
 * Turns a FAT, fed piece by piece, into runs of used cluster numbers. Pure; the inner loop of every FAT map.
 *
 * Rule: pieces come in order without gap, and no piece but the last ends inside an entry.
 */
import { assert } from '../../base/index.ts'
import { type RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import { type FatBits, FIRST_CLUSTER } from './layout.ts'

export class RunCollector {
  readonly #fatBits: FatBits
  /** First number that is no cluster. */
  readonly #end: number
  readonly #runs = new RangeSetBuilder()
  /** Number of the next entry. */
  #entry = 0
  /** Where the run under way started; -1: none. */
  #start = -1

  constructor(fatBits: FatBits, clusters: number) {
    this.#fatBits = fatBits
    this.#end = clusters + FIRST_CLUSTER
  }

  take(piece: Uint8Array): void {
    const entries = this.#entriesIn(piece.length)
    const from = this.#entry
    let start = this.#start
    for (let i = from < FIRST_CLUSTER ? FIRST_CLUSTER - from : 0; i < entries; i++) {
      if (this.#isUsed(piece, i)) {
        if (start < 0) start = from + i
      } else if (start >= 0) {
        this.#runs.add(start, from + i)
        start = -1
      }
    }
    this.#start = start
    this.#entry = from + entries
  }

  /** As `take`, of a piece whose runs somebody else has collected. */
  skip(pieceBytes: number): void {
    if (this.#start >= 0) this.#runs.add(this.#start, this.#entry)
    this.#start = -1
    this.#entry += this.#entriesIn(pieceBytes)
  }

  /** Runs of cluster numbers, counted from FIRST_CLUSTER. */
  finish(): RangeSet {
    assert(this.#entry === this.#end, 'the whole FAT was taken')
    if (this.#start >= 0) this.#runs.add(this.#start, this.#end)
    return this.#runs.build()
  }

  #entriesIn(bytes: number): number {
    return Math.min(Math.floor((bytes * 8) / this.#fatBits), this.#end - this.#entry)
  }

  #isUsed(piece: Uint8Array, i: number): boolean {
    switch (this.#fatBits) {
      case 32: {
        const at = i * 4
        return (piece[at]! | piece[at + 1]! | piece[at + 2]! | (piece[at + 3]! & 0x0f)) !== 0
      }
      case 16:
        return (piece[i * 2]! | piece[i * 2 + 1]!) !== 0
      default: {
        const at = (i * 3) >>> 1
        return i % 2 === 0
          ? (piece[at]! | (piece[at + 1]! & 0x0f)) !== 0
          : ((piece[at]! & 0xf0) | piece[at + 1]!) !== 0
      }
    }
  }
}
