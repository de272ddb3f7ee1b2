/**
 * Where a VHDX keeps the disk's bytes: BAT and, for differencing disks, sector bitmaps.
 *
 * Rules: the whole BAT is judged when the image is opened, before hours of copying: a block that the file does not
 * hold, or that lies in another structure, is CORRUPT. The bitmap decides in partly present blocks and is not looked
 * at in fully present ones. One MiB of bitmaps serves a whole chunk (4 GiB of disk), so it is read whole and kept.
 */
import { isZero, LIMITS, mapBounded, throwIfAborted, VarveError, within } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import type { RangeSet } from '../../extents/index.ts'
import {
  type BatShape,
  BITMAP_BYTES,
  BITMAP_PRESENT,
  batShape,
  corrupt,
  isReservedClear,
  type Metadata,
  MIB,
  PAYLOAD,
  type Region,
} from './layout.ts'

/** Bitmap blocks kept: those of 64 GiB with nothing but partly present blocks. */
const MOST_BITMAPS = 16
const READS = 8
const BAT_READ: number = 4 * MIB

export interface BlockRun {
  readonly start: number
  readonly end: number
  readonly kind: 'data' | 'zero' | 'absent'
  /** Where `start` of data stands in the file. */
  readonly from: number
}

export class BlockMap {
  readonly size: number
  readonly metadata: Metadata
  readonly shape: BatShape
  readonly #file: BlockDevice
  /** State of each payload block, and its place in MiB. */
  readonly #states: Uint8Array
  readonly #places: Uint32Array
  /** Place of each chunk's bitmap in MiB; 0 for none. */
  readonly #bitmapPlaces: Uint32Array
  readonly #bitmaps = new Map<number, Uint8Array>()

  private constructor(file: BlockDevice, metadata: Metadata, shape: BatShape) {
    this.#file = file
    this.metadata = metadata
    this.shape = shape
    this.size = metadata.virtualDiskSize
    this.#states = new Uint8Array(shape.payloadBlocks)
    this.#places = new Uint32Array(shape.payloadBlocks)
    this.#bitmapPlaces = new Uint32Array(Math.ceil(shape.payloadBlocks / shape.chunkRatio))
  }

  /**
   * Reads and judges the BAT. `taken` is what of the file belongs to headers, log and regions.
   * @throws CORRUPT, LIMIT
   */
  static async read(
    file: BlockDevice,
    parts: { readonly metadata: Metadata; readonly bat: Region; readonly taken: RangeSet },
    signal?: AbortSignal,
  ): Promise<BlockMap> {
    const shape = batShape(parts.metadata)
    const bytes = within(shape.entries * 8, LIMITS.tableBytes, 'bytes of a VHDX BAT')
    if (bytes > parts.bat.length) {
      throw corrupt('BAT', `a region of ${parts.bat.length} bytes`, `at least ${bytes}`)
    }
    const map = new BlockMap(file, parts.metadata, shape)
    for (let done = 0; done < bytes; done += BAT_READ) {
      throwIfAborted(signal)
      const piece = await readBytes(file, parts.bat.offset + done, Math.min(BAT_READ, bytes - done), signal)
      if (isZero(piece)) continue
      map.#judge(done / 8, piece, parts.taken)
    }
    map.#checkBitmaps()
    map.#checkOverlaps()
    return map
  }

  get allocatedBlocks(): number {
    let count = 0
    for (const state of this.#states) if (state >= PAYLOAD.fullyPresent) count++
    return count
  }

  /** Calls `visit` for runs that cover `[offset, end)`, ascending, until `enough`. Returns where it stopped. */
  async eachRun(
    offset: number,
    end: number,
    visit: (run: BlockRun) => void,
    signal: AbortSignal | undefined,
    enough: () => boolean = () => false,
  ): Promise<number> {
    const { blockBytes } = this.metadata
    const { chunkRatio } = this.shape
    const last = Math.ceil(end / blockBytes)
    let block = Math.floor(offset / blockBytes)
    while (block < last) {
      throwIfAborted(signal)
      const batch = Math.min(last, (Math.floor(block / chunkRatio) + MOST_BITMAPS / 2) * chunkRatio)
      const bitmaps = await this.#load(block, batch, signal)
      for (; block < batch; block++) {
        const base = block * blockBytes
        const from = Math.max(offset, base)
        const to = Math.min(end, base + blockBytes)
        const state = this.#states[block]!
        const at = this.#places[block]! * MIB + from - base
        if (state === PAYLOAD.fullyPresent) visit({ start: from, end: to, kind: 'data', from: at })
        else if (state === PAYLOAD.partiallyPresent) {
          this.#eachSector(
            block,
            bitmaps.get(Math.floor(block / chunkRatio))!,
            { start: from, end: to },
            visit,
          )
        } else {
          const kind = state === PAYLOAD.notPresent ? 'absent' : 'zero'
          visit({ start: from, end: to, kind, from: 0 })
        }
        if (enough()) return Math.min(end, (block + 1) * blockBytes)
      }
    }
    return end
  }

  close(): void {
    this.#bitmaps.clear()
  }

  #eachSector(
    block: number,
    bitmap: Uint8Array,
    { start, end }: { readonly start: number; readonly end: number },
    visit: (run: BlockRun) => void,
  ): void {
    const { blockBytes, logicalSectorBytes: sector } = this.metadata
    const base = block * blockBytes
    const place = this.#places[block]! * MIB
    const firstBit = (block % this.shape.chunkRatio) * (blockBytes / sector)
    let at = start
    while (at < end) {
      const bit = firstBit + Math.floor((at - base) / sector)
      const limit = firstBit + Math.ceil((end - base) / sector)
      const set = isSet(bitmap, bit)
      const stop = Math.min(end, base + (runEnd(bitmap, bit, limit, set) - firstBit) * sector)
      visit({ start: at, end: stop, kind: set ? 'data' : 'absent', from: set ? place + at - base : 0 })
      at = stop
    }
  }

  /** Bitmaps of the chunks that have partly present blocks in `[first, end)`. */
  async #load(first: number, end: number, signal: AbortSignal | undefined): Promise<Map<number, Uint8Array>> {
    const chunks = new Set<number>()
    for (let block = first; block < end; block++) {
      if (this.#states[block] === PAYLOAD.partiallyPresent) {
        const chunk = Math.floor(block / this.shape.chunkRatio)
        chunks.add(chunk)
      }
    }
    const found = new Map<number, Uint8Array>()
    await mapBounded(chunks, READS, async (chunk) => {
      const known = this.#bitmaps.get(chunk)
      const place = this.#bitmapPlaces[chunk]! * MIB
      const bitmap = known ?? (await readBytes(this.#file, place, BITMAP_BYTES, signal))
      this.#bitmaps.delete(chunk)
      this.#bitmaps.set(chunk, bitmap)
      found.set(chunk, bitmap)
    })
    for (const oldest of this.#bitmaps.keys()) {
      if (this.#bitmaps.size <= MOST_BITMAPS) break
      this.#bitmaps.delete(oldest)
    }
    return found
  }

  #judge(first: number, piece: Uint8Array, taken: RangeSet): void {
    const view = new DataView(piece.buffer, piece.byteOffset, piece.byteLength)
    const { chunkRatio, payloadBlocks } = this.shape
    const { hasParent, blockBytes } = this.metadata
    for (let i = 0; i < piece.length / 8; i++) {
      const low = view.getUint32(i * 8, true)
      const high = view.getUint32(i * 8 + 4, true)
      if (low === 0 && high === 0) continue
      const index = first + i
      const chunk = Math.floor(index / (chunkRatio + 1))
      const inChunk = index % (chunkRatio + 1)
      const state = low & 7
      const megabytes = high * 4096 + (low >>> 20)
      const wrong = (found: string): VarveError =>
        new VarveError('CORRUPT', `Cannot read VHDX BAT entry ${index}: found ${found}`, {
          fields: { entry: index, state, offset: megabytes * MIB },
        })
      const block = chunk * chunkRatio + inChunk
      if (inChunk === chunkRatio) {
        if (state === 0) continue
        if (state !== BITMAP_PRESENT || !hasParent || !isReservedClear(low)) {
          throw wrong(`state ${state} of a sector bitmap`)
        }
        this.#checkPlace(megabytes, BITMAP_BYTES, taken, wrong)
        this.#bitmapPlaces[chunk] = megabytes
        continue
      }
      if (block >= payloadBlocks) {
        if (state >= PAYLOAD.fullyPresent) throw wrong('a block behind the end of the disk')
        continue
      }
      if (state === 4 || state === 5 || (state === PAYLOAD.partiallyPresent && !hasParent)) {
        throw wrong(`state ${state} of a block`)
      }
      this.#states[block] = state
      if (state < PAYLOAD.fullyPresent) continue
      if (!isReservedClear(low)) throw wrong('reserved bits')
      this.#checkPlace(megabytes, Math.min(blockBytes, this.size - block * blockBytes), taken, wrong)
      this.#places[block] = megabytes
    }
  }

  #checkPlace(
    megabytes: number,
    length: number,
    taken: RangeSet,
    wrong: (found: string) => VarveError,
  ): void {
    const start = megabytes * MIB
    if (megabytes >= 2 ** 32 || start + length > this.#file.size) {
      throw wrong(`a block at ${start}+${length}, expected it in the ${this.#file.size} bytes of the file`)
    }
    if (taken.touches(start, start + length)) {
      throw wrong(`a block at ${start}, expected it outside of headers, log and regions`)
    }
  }

  #checkBitmaps(): void {
    for (let block = 0; block < this.#states.length; block++) {
      if (this.#states[block] !== PAYLOAD.partiallyPresent) continue
      if (this.#bitmapPlaces[Math.floor(block / this.shape.chunkRatio)] === 0) {
        throw corrupt('BAT', `block ${block} partly present without a sector bitmap`, 'one')
      }
    }
  }

  /** Blocks and bitmaps over each other would give one of them the bytes of the other. */
  #checkOverlaps(): void {
    const blockMiB = this.metadata.blockBytes / MIB
    // One number each, so that the sort is one of numbers: place, then length, both in MiB.
    const spans: number[] = []
    for (let block = 0; block < this.#places.length; block++) {
      const place = this.#places[block]!
      const needed = Math.ceil((this.size - block * this.metadata.blockBytes) / MIB)
      if (place !== 0) spans.push(place * 1024 + Math.min(blockMiB, needed))
    }
    for (const place of this.#bitmapPlaces) if (place !== 0) spans.push(place * 1024 + 1)
    const sorted = Float64Array.from(spans).sort()
    let end = 0
    for (const span of sorted) {
      const place = Math.floor(span / 1024)
      if (place < end) throw corrupt('BAT', `two blocks at byte ${place * MIB}`, 'one')
      end = place + (span % 1024)
    }
  }
}

function isSet(bitmap: Uint8Array, bit: number): boolean {
  return (bitmap[bit >>> 3]! & (1 << (bit & 7))) !== 0
}

/** First bit from `bit` on that is not `set`, at most `limit`. */
function runEnd(bitmap: Uint8Array, bit: number, limit: number, set: boolean): number {
  const same = set ? 0xff : 0
  let at = bit
  while (at < limit) {
    if ((at & 7) === 0 && bitmap[at >>> 3] === same) at += 8
    else if (isSet(bitmap, at) === set) at++
    else break
  }
  return Math.min(at, limit)
}
