/**
 * Where a dynamic or differencing VHD keeps the disk's bytes: block allocation table and sector bitmaps.
 *
 * Rules:
 * - The sector bitmap decides what the file holds; a block in the table with clear bits is absent there. Only the
 *   batmap, where there is one that holds, may stand for a bitmap of ones.
 * - A sector that the bitmap claims must lie in the file, else CORRUPT: it is never made up.
 *
 * Bitmaps lie one per block, megabytes apart, so reading them one after another costs one disk latency each (23 s
 * for 52,000 blocks in vhd-util). They are read a batch at a time, which the kernel is told of first. One byte per
 * block keeps what was learned; bitmaps that are neither empty nor full stay in a bounded cache.
 */
import { throwIfAborted, VarveError } from '../../base/index.ts'
import type { BlockDevice } from '../../device/index.ts'
import { Bitmap } from '../../extents/index.ts'
import { readMany } from '../host-place.ts'
import { bitmapBytes, SECTOR, UNALLOCATED } from './layout.ts'

/** Blocks whose bitmaps are fetched together. */
const BATCH_BLOCKS = 4096
/** Bytes of bitmaps kept; those of a disk of 64 GiB with nothing but partly filled blocks. */
const CACHE_BYTES = 16 * 1024 * 1024

/** What is known of a block, one byte each: 0 is nothing yet, or that its bitmap must be looked at. */
const EMPTY = 1
const FULL = 2

export interface BlockMapParts {
  readonly file: BlockDevice
  readonly size: number
  readonly blockBytes: number
  /** First sector of each block's bitmap; checked against the file. Taken over. */
  readonly table: Uint32Array
  /** Blocks that the batmap calls full. */
  readonly full: Bitmap | undefined
  /** No data lies at or behind this byte of the file. */
  readonly dataEnd: number
}

/** A run of bytes that the file holds: offsets on the disk, and where `start` stands in the file. */
export interface HeldRun {
  readonly start: number
  readonly end: number
  readonly from: number
}

export class BlockMap {
  readonly size: number
  readonly blockBytes: number
  readonly bitmapBytes: number
  readonly table: Uint32Array
  /** Moves up when a writer appends blocks. */
  dataEnd: number
  readonly #file: BlockDevice
  readonly #state: Uint8Array
  /** Bitmaps that are newer than the file: a writer's. */
  readonly #held = new Map<number, Bitmap>()
  #young = new Map<number, Bitmap>()
  #old = new Map<number, Bitmap>()
  #releases = 0
  #closed = false

  constructor(parts: BlockMapParts) {
    this.#file = parts.file
    this.size = parts.size
    this.blockBytes = parts.blockBytes
    this.bitmapBytes = bitmapBytes(parts.blockBytes)
    this.table = parts.table
    this.dataEnd = parts.dataEnd
    this.#state = new Uint8Array(parts.table.length)
    for (let block = 0; block < parts.table.length; block++) {
      if (parts.table[block] === UNALLOCATED) this.#state[block] = EMPTY
      else if (parts.full?.get(block)) this.#state[block] = FULL
    }
  }

  isAllocated(block: number): boolean {
    return this.table[block] !== UNALLOCATED
  }

  isFull(block: number): boolean {
    return this.#state[block] === FULL
  }

  /** Sectors of the disk in `block`: fewer in the last one when the size ends inside it. */
  sectorsOf(block: number): number {
    return Math.ceil(Math.min(this.blockBytes, this.size - block * this.blockBytes) / SECTOR)
  }

  /** File offset of an allocated block's bitmap. */
  bitmapAt(block: number): number {
    return this.table[block]! * SECTOR
  }

  /** File offset of an allocated block's data. */
  dataAt(block: number): number {
    return this.table[block]! * SECTOR + this.bitmapBytes
  }

  /**
   * Marks sectors `[first, end)` of an allocated block as held by the file. The block's bitmap is then newer than
   * the file's, and stays in memory until `release`; undefined when all of them were marked before.
   */
  async mark(block: number, first: number, end: number, signal?: AbortSignal): Promise<Bitmap | undefined> {
    const { bitmaps } = this.#held.has(block)
      ? { bitmaps: undefined }
      : await this.#learn(block, block + 1, signal)
    // No await from here on: two writers of one block must not each have a bitmap of their own.
    if (this.#state[block] === FULL) return undefined
    const bitmap =
      this.#held.get(block) ?? this.#kept(block) ?? bitmaps?.get(block) ?? new Bitmap(this.sectorsOf(block))
    if (bitmap.nextClear(first) >= end && !this.#held.has(block)) return undefined
    bitmap.setRange(first, end)
    this.#held.set(block, bitmap)
    this.#state[block] = bitmap.nextClear(0) === bitmap.length ? FULL : 0
    return bitmap
  }

  /** The bitmap in memory of a block that was marked and not released since. */
  heldBitmap(block: number): Bitmap | undefined {
    return this.#held.get(block)
  }

  /** The file's bitmap is as new as the one held. */
  release(block: number): void {
    const bitmap = this.#held.get(block)
    if (!bitmap) return
    this.#releases++
    this.#held.delete(block)
    if (this.#state[block] !== FULL) this.#keep(block, bitmap)
  }

  /**
   * Calls `visit` for each run of `[offset, end)` that the file holds, ascending, a batch of blocks at a time until
   * `enough`. Returns where it stopped. @throws CORRUPT for data past the end of the file
   */
  async eachRun(
    offset: number,
    end: number,
    visit: (run: HeldRun) => void,
    signal: AbortSignal | undefined,
    enough: () => boolean = () => false,
  ): Promise<number> {
    const last = Math.ceil(end / this.blockBytes)
    let block = Math.floor(offset / this.blockBytes)
    while (block < last) {
      throwIfAborted(signal)
      const known = await this.#learn(block, last, signal)
      for (; block < known.end; block++) {
        const state = this.#state[block]
        if (state === EMPTY) continue
        const base = block * this.blockBytes
        const from = Math.max(offset, base)
        const to = Math.min(end, base + this.blockBytes)
        if (state === FULL) {
          this.#visit(block, from, to, visit)
          continue
        }
        const bitmap = this.#held.get(block) ?? known.bitmaps.get(block) ?? this.#kept(block)
        // A writer has been at this block since it was looked at: look again.
        if (!bitmap) break
        let bit = bitmap.nextSet(Math.floor((from - base) / SECTOR))
        while (bit < bitmap.length && base + bit * SECTOR < to) {
          const clear = bitmap.nextClear(bit)
          this.#visit(block, Math.max(from, base + bit * SECTOR), Math.min(to, base + clear * SECTOR), visit)
          bit = bitmap.nextSet(clear)
        }
      }
      if (enough()) break
    }
    return Math.min(end, block * this.blockBytes)
  }

  close(): void {
    this.#closed = true
    this.#held.clear()
    this.#young.clear()
    this.#old.clear()
  }

  #visit(block: number, start: number, end: number, visit: (run: HeldRun) => void): void {
    const from = this.dataAt(block) + start - block * this.blockBytes
    if (from + end - start > this.dataEnd) {
      throw new VarveError(
        'CORRUPT',
        `Cannot read VHD: found data of block ${block} up to byte ${from + end - start}, expected it to end before ${this.dataEnd}`,
        { fields: { block, offset: from + end - start } },
      )
    }
    visit({ start, end, from })
  }

  /**
   * Makes the state of blocks from `first` on known, until `most` or a batch of bitmaps is full. `bitmaps` has
   * those of the partly filled ones.
   */
  async #learn(
    first: number,
    most: number,
    signal: AbortSignal | undefined,
  ): Promise<{ end: number; bitmaps: ReadonlyMap<number, Bitmap> }> {
    const bitmaps = new Map<number, Bitmap>()
    const missing: number[] = []
    let end = first
    for (; end < most && missing.length + bitmaps.size < BATCH_BLOCKS; end++) {
      const state = this.#state[end]
      if (state === EMPTY || state === FULL || this.#held.has(end)) continue
      const known = this.#kept(end)
      if (known) bitmaps.set(end, known)
      else missing.push(end)
    }
    if (missing.length === 0) return { end, bitmaps }
    missing.sort((a, b) => this.table[a]! - this.table[b]!)
    const bytes = new Uint8Array(missing.length * this.bitmapBytes)
    const reads = missing.map((block, index) => ({
      offset: this.bitmapAt(block),
      into: bytes.subarray(index * this.bitmapBytes, (index + 1) * this.bitmapBytes),
    }))
    const releases = this.#releases
    await readMany(this.#file, reads, () => !this.#closed, signal)
    // What was read may be older than what a writer wrote and let go of in the meantime.
    if (this.#releases !== releases) return await this.#learn(first, end, signal)
    for (const [index, block] of missing.entries()) {
      // A writer may have come first; what it holds is newer than what was read here.
      if (this.#held.has(block) || this.#state[block] !== 0) continue
      const bitmap = Bitmap.fromBytes(reads[index]!.into, this.sectorsOf(block), { msbFirst: true })
      if (bitmap.nextSet(0) === bitmap.length) this.#state[block] = EMPTY
      else if (bitmap.nextClear(0) === bitmap.length) this.#state[block] = FULL
      else {
        const kept = this.#kept(block)
        bitmaps.set(block, kept ?? bitmap)
        if (!kept) this.#keep(block, bitmap)
      }
    }
    return { end, bitmaps }
  }

  /** Two generations: when the young one is full the old one goes. Dropping one by one would cost more. */
  #keep(block: number, bitmap: Bitmap): void {
    if (this.#young.size * this.bitmapBytes >= CACHE_BYTES / 2) {
      this.#old = this.#young
      this.#young = new Map()
    }
    this.#young.set(block, bitmap)
  }

  #kept(block: number): Bitmap | undefined {
    const young = this.#young.get(block)
    if (young) return young
    const old = this.#old.get(block)
    if (old) this.#keep(block, old)
    return old
  }
}
