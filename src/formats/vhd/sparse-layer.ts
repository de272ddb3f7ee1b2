/**
 * A dynamic or differencing VHD as a layer.
 *
 * Rules:
 * - The sector bitmap decides what this file holds; a block in the table with clear bits is `absent` there. Only
 *   the batmap, where there is one that holds, may stand for a bitmap of ones.
 * - A sector that the bitmap claims must lie in the file, else CORRUPT: it is never made up.
 *
 * Bitmaps lie one per block, megabytes apart, so reading them one after another costs one disk latency each (23 s
 * for 52,000 blocks in vhd-util). They are read a batch at a time, which the kernel is told of first.
 * One byte per block keeps what was learned; bitmaps that are neither empty nor full stay in a bounded cache.
 */
import { mapBounded, throwIfAborted, VarveError } from '../../base/index.ts'
import {
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
} from '../../device/index.ts'
import { Bitmap, type Extent, ExtentList, type HostFile } from '../../extents/index.ts'
import { hostFileOf, readMany } from '../host-place.ts'
import type { BackingReference, FormatFacts, ImageLayer } from '../image-format.ts'
import { bitmapBytes, SECTOR, UNALLOCATED } from './layout.ts'

/** Blocks whose bitmaps are fetched together. */
const BATCH_BLOCKS = 4096
/** Reads under way at once. */
const READS = 16
/** `extents` stops after this many; the caller asks on. */
const MOST_EXTENTS = 65_536
/** Bytes of bitmaps kept; those of a disk of 64 GiB with nothing but partly filled blocks. */
const CACHE_BYTES = 16 * 1024 * 1024

/** What is known of a block, one byte each: 0 is nothing yet, or that its bitmap must be looked at. */
const EMPTY = 1
const FULL = 2

export interface SparseVhdParts {
  readonly file: BlockDevice
  readonly size: number
  readonly header: { readonly blockBytes: number }
  /** First sector of each block's bitmap; checked against the file. */
  readonly table: Uint32Array
  readonly full: Bitmap | undefined
  readonly dataEnd: number
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  readonly id: string
}

/** Owns `file`. Read only. */
export class SparseVhdLayer implements ImageLayer {
  readonly format = 'vhd'
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  readonly id: string
  readonly size: number
  readonly blockSize = 512
  readonly features: Features
  readonly #file: BlockDevice
  readonly #host: HostFile | undefined
  readonly #table: Uint32Array
  readonly #blockBytes: number
  readonly #bitmapBytes: number
  readonly #dataEnd: number
  readonly #state: Uint8Array
  #bitmaps = new Map<number, Bitmap>()
  #oldBitmaps = new Map<number, Bitmap>()
  #closed = false

  constructor(parts: SparseVhdParts) {
    this.#file = parts.file
    this.#host = hostFileOf(parts.file)
    this.#table = parts.table
    this.#blockBytes = parts.header.blockBytes
    this.#bitmapBytes = bitmapBytes(parts.header.blockBytes)
    this.#dataEnd = parts.dataEnd
    this.size = parts.size
    this.backing = parts.backing
    this.facts = parts.facts
    this.id = parts.id
    this.features = { write: false, resize: false, sparse: true, places: this.#host !== undefined }
    this.#state = new Uint8Array(parts.table.length)
    for (let block = 0; block < parts.table.length; block++) {
      if (parts.table[block] === UNALLOCATED) this.#state[block] = EMPTY
      else if (parts.full?.get(block)) this.#state[block] = FULL
    }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, into.length)
    throwIfAborted(signal)
    if (into.length === 0) return
    const runs: { start: number; end: number; from: number }[] = []
    let at = offset
    await this.#eachRun(
      offset,
      offset + into.length,
      (start, end, from) => {
        into.fill(0, at - offset, start - offset)
        runs.push({ start, end, from })
        at = end
      },
      signal,
    )
    into.fill(0, at - offset)
    await mapBounded(runs, READS, ({ start, end, from }) =>
      this.#file.read(from, into.subarray(start - offset, end - offset), signal),
    )
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.size, offset, length)
    throwIfAborted(signal)
    const list = new ExtentList()
    let at = offset
    const host = this.#host
    const stop = await this.#eachRun(
      offset,
      offset + length,
      (start, end, from) => {
        list.add(at, start - at, 'absent')
        list.add(start, end - start, 'data', host && { file: host, offset: from })
        at = end
      },
      signal,
      () => list.count >= MOST_EXTENTS,
    )
    list.add(at, stop - at, 'absent')
    return list.finish()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    this.#bitmaps.clear()
    this.#oldBitmaps.clear()
    await this.#file[Symbol.asyncDispose]()
  }

  /**
   * Calls `visit` for each run of bytes in `[offset, end)` that this file holds: disk offsets `start` and `end`,
   * file offset `from`. Goes on a batch of blocks at a time until `enough`; returns where it stopped.
   */
  async #eachRun(
    offset: number,
    end: number,
    visit: (start: number, end: number, from: number) => void,
    signal: AbortSignal | undefined,
    enough: () => boolean = () => false,
  ): Promise<number> {
    const last = Math.ceil(end / this.#blockBytes)
    let block = Math.floor(offset / this.#blockBytes)
    while (block < last) {
      throwIfAborted(signal)
      const stop = await this.#learn(block, last, signal)
      for (; block < stop.block; block++) {
        const state = this.#state[block]
        if (state === EMPTY) continue
        const base = block * this.#blockBytes
        const [from, to] = [Math.max(offset, base), Math.min(end, base + this.#blockBytes)]
        const data = this.#table[block]! * SECTOR + this.#bitmapBytes
        const add = (start: number, stop: number): void => {
          if (data + stop - base > this.#dataEnd) throw this.#pastEnd(block, data + stop - base)
          visit(start, stop, data + start - base)
        }
        if (state === FULL) {
          add(from, to)
          continue
        }
        const bitmap = stop.bitmaps.get(block)!
        let bit = bitmap.nextSet(Math.floor((from - base) / SECTOR))
        while (base + bit * SECTOR < to && bit < bitmap.length) {
          const clear = bitmap.nextClear(bit)
          add(Math.max(from, base + bit * SECTOR), Math.min(to, base + clear * SECTOR))
          bit = bitmap.nextSet(clear)
        }
      }
      if (enough()) break
    }
    return Math.min(end, block * this.#blockBytes)
  }

  /**
   * Makes the state of blocks from `first` on known, until `most` or a batch of bitmaps is full. `bitmaps` holds
   * those of the partly filled ones.
   */
  async #learn(
    first: number,
    most: number,
    signal: AbortSignal | undefined,
  ): Promise<{ block: number; bitmaps: ReadonlyMap<number, Bitmap> }> {
    const bitmaps = new Map<number, Bitmap>()
    const missing: number[] = []
    let block = first
    for (; block < most && missing.length + bitmaps.size < BATCH_BLOCKS; block++) {
      const state = this.#state[block]
      if (state === EMPTY || state === FULL) continue
      const known = this.#kept(block)
      if (known) bitmaps.set(block, known)
      else missing.push(block)
    }
    if (missing.length > 0) {
      missing.sort((a, b) => this.#table[a]! - this.#table[b]!)
      const bytes = new Uint8Array(missing.length * this.#bitmapBytes)
      const reads = missing.map((each, index) => ({
        offset: this.#table[each]! * SECTOR,
        into: bytes.subarray(index * this.#bitmapBytes, (index + 1) * this.#bitmapBytes),
      }))
      await readMany(this.#file, reads, () => !this.#closed, signal)
      for (const [index, each] of missing.entries()) {
        const sectors = Math.ceil(Math.min(this.#blockBytes, this.size - each * this.#blockBytes) / SECTOR)
        const bitmap = Bitmap.fromBytes(reads[index]!.into, sectors, { msbFirst: true })
        if (bitmap.nextSet(0) === sectors) this.#state[each] = EMPTY
        else if (bitmap.nextClear(0) === sectors) this.#state[each] = FULL
        else {
          bitmaps.set(each, bitmap)
          this.#keep(each, bitmap)
        }
      }
    }
    return { block, bitmaps }
  }

  /** Two generations: when the young one is full the old one goes. Dropping one by one would cost more. */
  #keep(block: number, bitmap: Bitmap): void {
    if (this.#bitmaps.size * this.#bitmapBytes >= CACHE_BYTES / 2) {
      this.#oldBitmaps = this.#bitmaps
      this.#bitmaps = new Map()
    }
    this.#bitmaps.set(block, bitmap)
  }

  #kept(block: number): Bitmap | undefined {
    const young = this.#bitmaps.get(block)
    if (young) return young
    const old = this.#oldBitmaps.get(block)
    if (old) this.#keep(block, old)
    return old
  }

  #pastEnd(block: number, end: number): VarveError {
    return new VarveError(
      'CORRUPT',
      `Cannot read VHD: found data of block ${block} up to byte ${end}, expected it to end before ${this.#dataEnd}`,
      { fields: { block, offset: end } },
    )
  }
}
