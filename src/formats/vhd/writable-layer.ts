/**
 * A dynamic or differencing VHD for writing.
 *
 * What a power loss may leave behind decides the order. Until a flush, the file's table and bitmaps say what they
 * said before it, so the disk reads as it did (each sector that was being overwritten in place: old or new). A
 * flush does, in this order, each step durable before the next:
 *
 *   1. bitmaps of blocks that are not in the file's table yet; data was written when `write` was called  → sync
 *   2. bitmaps of blocks that are in the table, and the changed sectors of the table                      → sync
 *   3. the batmap, then its header with the checksum. It only saves reading: torn, it is ignored.
 *
 * So a bitmap never claims a sector, and the table never names a block, that could be lost. libvhd writes the table
 * first; a crash there shows zeros where the parent's data was.
 *
 * A new block goes behind the last one. The footer is written behind it before the block overwrites the footer that
 * was, so that a process that dies almost always leaves a file with a footer; between making the room and writing
 * it, and after a power loss, readers have the copy at 0, which is never written again.
 *
 * What runs at the same time and what protects it:
 *   write/write, different blocks    nothing shared but the end of the file: `#grow` is one chain of promises
 *   write/write, one block           the bitmap changes without an await in between (BlockMap.mark)
 *   write/write, one sector in part  `#whole` lets one of them at a time complete a sector
 *   write/flush                      a flush takes the sets of what changed with it; later changes make new ones
 *   flush/flush                      one after the other
 *
 * Dispose does not flush: what was not flushed may be lost.
 */
import { alignDown, alignUp, mapBounded, throwIfAborted, VarveError } from '../../base/index.ts'
import {
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
  isResizable,
  type WritableBlockDevice,
} from '../../device/index.ts'
import type { Bitmap, Extent } from '../../extents/index.ts'
import { hostFileOf } from '../host-place.ts'
import type { BackingReference, FormatFacts, WritableImageLayer } from '../image-format.ts'
import type { BlockMap } from './block-map.ts'
import { batmapChecksum, encodeBatmapHeader, FOOTER_BYTES, SECTOR, UNALLOCATED } from './layout.ts'
import { heldExtents, readHeld } from './sparse-layer.ts'

const WRITES = 16
/** Entries in one sector of the table. */
const ENTRIES = SECTOR / 4

export interface WritableVhdParts {
  readonly file: WritableBlockDevice
  readonly map: BlockMap
  readonly backing: BackingReference | undefined
  readonly differencing: boolean
  readonly facts: FormatFacts
  readonly id: string
  /** Encoded, as it stands at both ends of the file. */
  readonly footer: Uint8Array
  readonly tableOffset: number
  /** First byte behind all blocks and metadata: the next block goes there or after. */
  readonly end: number
  readonly batmap: WritableBatmap | undefined
}

export interface WritableBatmap {
  readonly headerAt: number
  readonly offset: number
  readonly sectors: number
  readonly version: number
  /** As much of the map as its checksum covers; changed in place. */
  readonly map: Uint8Array
}

/** Owns `file`. */
export class WritableVhdLayer implements WritableImageLayer {
  readonly format = 'vhd'
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  readonly id: string
  readonly size: number
  readonly blockSize = 512
  readonly features: Features
  readonly #parts: WritableVhdParts
  readonly #file: WritableBlockDevice
  readonly #map: BlockMap
  #end: number
  /** Settles when the footer of the last appended block is in its place. */
  #grow: Promise<void> = Promise.resolve()
  #whole: Promise<void> = Promise.resolve()
  #flushing: Promise<void> = Promise.resolve()
  readonly #appending = new Map<number, Promise<void>>()
  /** Blocks whose bitmap in memory is newer than the file's. */
  #changed = new Set<number>()
  /** Blocks that the file's table does not have, and that no flush under way is about to put there. */
  #added = new Set<number>()
  #batmapChanged = false
  #closed = false

  constructor(parts: WritableVhdParts) {
    this.#parts = parts
    this.#file = parts.file
    this.#map = parts.map
    this.#end = parts.end
    this.size = parts.map.size
    this.backing = parts.backing
    this.facts = parts.facts
    this.id = parts.id
    this.features = { write: true, resize: false, sparse: true, places: hostFileOf(parts.file) !== undefined }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, into.length)
    throwIfAborted(signal)
    await readHeld(this.#map, this.#file, offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.size, offset, length)
    throwIfAborted(signal)
    return await heldExtents(this.#map, hostFileOf(this.#file), offset, length, signal)
  }

  /**
   * @throws UNSUPPORTED for a part of a sector that a differencing disk does not hold: the rest is the parent's,
   * which a layer does not know; NO_SPACE past 2 TiB of file
   */
  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, bytes.length)
    throwIfAborted(signal)
    const end = offset + bytes.length
    await this.#refuseParts(offset, end, signal)
    const first = alignUp(offset, SECTOR)
    const last = alignDown(end, SECTOR)
    if (first <= last) {
      // A piece of a sector at the start, whole sectors, a piece at the end.
      await this.#writePart(offset, bytes.subarray(0, first - offset), signal)
      await this.#writeWhole(first, bytes.subarray(first - offset, last - offset), signal)
      await this.#writePart(last, bytes.subarray(last - offset), signal)
    } else await this.#writePart(offset, bytes, signal)
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, length)
    throwIfAborted(signal)
    if (!this.#parts.differencing) {
      // What is absent reads as zeros here, so only what is held needs anything.
      const runs: { from: number; length: number }[] = []
      await this.#map.eachRun(
        offset,
        offset + length,
        ({ start, end, from }) => runs.push({ from, length: end - start }),
        signal,
      )
      await mapBounded(runs, WRITES, (run) => this.#file.zero(run.from, run.length, signal))
      return
    }
    const end = offset + length
    await this.#refuseParts(offset, end, signal)
    const first = Math.min(alignUp(offset, SECTOR), end)
    const last = Math.max(alignDown(end, SECTOR), first)
    await this.#writePart(offset, new Uint8Array(first - offset), signal)
    await this.#eachBlock(first, last, async (block, start, stop) => {
      await this.#append(block)
      const from = this.#map.dataAt(block) + start - block * this.#map.blockBytes
      await this.#file.zero(from, stop - start, signal)
      await this.#mark(block, start, stop, signal)
    })
    await this.#writePart(last, new Uint8Array(end - last), signal)
  }

  async flush(signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    throwIfAborted(signal)
    const mine = this.#flushing.then(() => this.#flush())
    this.#flushing = mine.catch(() => {})
    await mine
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    this.#map.close()
    await this.#file[Symbol.asyncDispose]()
  }

  /** Whole sectors, of any number of blocks. */
  async #writeWhole(offset: number, bytes: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
    await this.#eachBlock(offset, offset + bytes.length, async (block, start, end) => {
      await this.#append(block)
      const from = this.#map.dataAt(block) + start - block * this.#map.blockBytes
      await this.#file.write(from, bytes.subarray(start - offset, end - offset), signal)
      await this.#mark(block, start, end, signal)
    })
  }

  /** Throws when `[offset, end)` begins or ends inside a sector that is the parent's; before anything is written. */
  async #refuseParts(offset: number, end: number, signal: AbortSignal | undefined): Promise<void> {
    if (!this.#parts.differencing || offset === end) return
    for (const at of [offset, end]) {
      const base = alignDown(at, SECTOR)
      if (base === at) continue
      let held = false
      await this.#map.eachRun(base, base + SECTOR, () => (held = true), signal)
      if (held) continue
      throw new VarveError(
        'UNSUPPORTED',
        `Cannot write VHD: found a piece of a sector at ${at} that is the parent's, expected whole sectors`,
        { fields: { offset: at } },
      )
    }
  }

  /** Less than a sector, inside one. */
  async #writePart(offset: number, bytes: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
    if (bytes.length === 0) return
    const mine = this.#whole.then(async () => {
      const base = alignDown(offset, SECTOR)
      const sector = new Uint8Array(SECTOR)
      await readHeld(this.#map, this.#file, base, sector, signal)
      sector.set(bytes, offset - base)
      await this.#writeWhole(base, sector, signal)
    })
    this.#whole = mine.catch(() => {})
    await mine
  }

  async #eachBlock(
    offset: number,
    end: number,
    work: (block: number, start: number, end: number) => Promise<void>,
  ): Promise<void> {
    const { blockBytes } = this.#map
    if (offset >= end) return
    const first = Math.floor(offset / blockBytes)
    const blocks = Array.from({ length: Math.ceil(end / blockBytes) - first }, (_, i) => first + i)
    await mapBounded(blocks, WRITES, (block) =>
      work(block, Math.max(offset, block * blockBytes), Math.min(end, (block + 1) * blockBytes)),
    )
  }

  /** Gives the block a place behind all others, unless it has one. */
  async #append(block: number): Promise<void> {
    const pending = this.#appending.get(block)
    if (pending) return await pending
    if (this.#map.isAllocated(block)) return
    const { bitmapBytes, blockBytes, table } = this.#map
    // Data starts on 4 KiB of the file, as the field's writers have it.
    let sector = Math.ceil(this.#end / SECTOR)
    while ((sector + bitmapBytes / SECTOR) % 8 !== 0) sector++
    if (sector >= UNALLOCATED) {
      throw new VarveError('NO_SPACE', 'Cannot write VHD: found 2 TiB of blocks, where its table ends')
    }
    const end = sector * SECTOR + bitmapBytes + blockBytes
    this.#end = end
    table[block] = sector
    this.#added.add(block)
    const mine = this.#grow.then(() => this.#moveFooter(end))
    this.#grow = mine.catch(() => {})
    this.#appending.set(block, mine)
    try {
      await mine
    } catch (error) {
      // Nobody has written into it; its place is not given again.
      table[block] = UNALLOCATED
      this.#added.delete(block)
      throw error
    } finally {
      this.#appending.delete(block)
    }
  }

  /** Makes room up to `end` with the footer behind it. On a device of fixed size the footer stands at its end. */
  async #moveFooter(end: number): Promise<void> {
    const file = this.#file
    if (end + FOOTER_BYTES > file.size) {
      if (!isResizable(file)) {
        throw new VarveError(
          'NO_SPACE',
          `Cannot write VHD: found a device of ${file.size} bytes, expected ${end + FOOTER_BYTES}`,
        )
      }
      await file.resize(end + FOOTER_BYTES)
      await file.write(end, this.#parts.footer)
    }
    this.#map.dataEnd = Math.max(this.#map.dataEnd, end)
  }

  /** After the data is written: the bitmap in memory says so. */
  async #mark(block: number, start: number, end: number, signal: AbortSignal | undefined): Promise<void> {
    const base = block * this.#map.blockBytes
    const bitmap = await this.#map.mark(
      block,
      (start - base) / SECTOR,
      Math.ceil((end - base) / SECTOR),
      signal,
    )
    if (!bitmap) return
    this.#changed.add(block)
    if (!this.#map.isFull(block)) return
    this.#setBatmap(block)
    if (this.#added.has(block)) {
      // The table does not name the block yet, so the bitmap may go now and need not be kept until the flush.
      this.#changed.delete(block)
      await this.#writeBitmap(block, bitmap)
      if (!this.#changed.has(block)) this.#map.release(block)
    }
  }

  async #writeBitmap(block: number, bitmap: Bitmap): Promise<void> {
    const bytes = new Uint8Array(this.#map.bitmapBytes)
    bytes.set(bitmap.toBytes({ msbFirst: true }))
    await this.#file.write(this.#map.bitmapAt(block), bytes)
  }

  #setBatmap(block: number): void {
    const batmap = this.#parts.batmap
    if (!batmap || block >= batmap.map.length * 8) return
    batmap.map[block >>> 3]! |= 0x80 >>> (block & 7)
    this.#batmapChanged = true
  }

  async #flush(): Promise<void> {
    // Every block that the table is about to name has its place in the file.
    for (let seen: Promise<void> | undefined; seen !== this.#grow; await seen) seen = this.#grow
    const changed = this.#changed
    const added = this.#added
    this.#changed = new Set()
    this.#added = new Set()
    // What the bitmaps say now is what the first sync makes true.
    const bitmaps = new Map<number, Uint8Array>()
    for (const block of new Set([...changed, ...added])) {
      const bytes = new Uint8Array(this.#map.bitmapBytes)
      const held = this.#map.heldBitmap(block)
      if (held) bytes.set(held.toBytes({ msbFirst: true }))
      // Without one: new and empty, or new, full and written already.
      else if (this.#map.isFull(block)) continue
      bitmaps.set(block, bytes)
    }
    const sectors = new Set(Array.from(added, (block) => Math.floor(block / ENTRIES)))
    const tableBytes = new Map(Array.from(sectors, (sector) => [sector, this.#tableSector(sector)]))
    const batmap = this.#batmapChanged ? this.#parts.batmap?.map.slice() : undefined
    this.#batmapChanged = false
    try {
      const put = (block: number): Promise<void> =>
        this.#file.write(this.#map.bitmapAt(block), bitmaps.get(block)!)
      const [fresh, known] = [
        [...bitmaps.keys()].filter((block) => added.has(block)),
        [...bitmaps.keys()].filter((block) => !added.has(block)),
      ]
      await mapBounded(fresh, WRITES, put)
      await this.#file.flush()
      if (known.length > 0 || tableBytes.size > 0) {
        await mapBounded(known, WRITES, put)
        await mapBounded(tableBytes, WRITES, ([sector, bytes]) =>
          this.#file.write(this.#parts.tableOffset + sector * SECTOR, bytes),
        )
        await this.#file.flush()
      }
      if (batmap) await this.#writeBatmap(batmap)
    } catch (error) {
      for (const block of changed) this.#changed.add(block)
      for (const block of added) this.#added.add(block)
      this.#batmapChanged ||= batmap !== undefined
      throw error
    }
    for (const block of changed) if (!this.#changed.has(block)) this.#map.release(block)
  }

  #tableSector(sector: number): Uint8Array {
    const entries = this.#map.table.subarray(sector * ENTRIES, (sector + 1) * ENTRIES)
    const bytes = Buffer.alloc(entries.length * 4)
    for (let i = 0; i < entries.length; i++) bytes.writeUInt32BE(entries[i]!, i * 4)
    return bytes
  }

  async #writeBatmap(map: Uint8Array): Promise<void> {
    const { headerAt, offset, sectors, version } = this.#parts.batmap!
    await this.#file.write(offset, map)
    const checksum = batmapChecksum(map, version)
    await this.#file.write(headerAt, encodeBatmapHeader({ offset, sectors, version, checksum }))
  }
}
