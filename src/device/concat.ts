/**
 * Devices one after another, as one: a volume on several pieces, an image split into files. Writes go through when
 * every part takes them. Owns its parts (hand it slices, which borrow, where the pieces belong to somebody else).
 */
import { throwIfAborted } from '../base/index.ts'
import { type Extent, ExtentList } from '../extents/index.ts'
import {
  asWritable,
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
  type WritableBlockDevice,
} from './block-device.ts'

/** The part of a request that falls into one device. */
interface Piece {
  readonly device: BlockDevice
  /** Offset in `device`. */
  readonly offset: number
  /** Offset in the request. */
  readonly done: number
  readonly length: number
}

export class ConcatDevice implements WritableBlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly #parts: readonly BlockDevice[]
  /** Where each part starts; one more at the end: the size. */
  readonly #starts: readonly number[]
  #disposed = false

  /** Parts keep the size that they have now. With unlike sector sizes the largest counts. */
  constructor(parts: readonly BlockDevice[]) {
    const starts = [0]
    for (const part of parts) starts.push(starts.at(-1)! + part.size)
    this.#parts = [...parts]
    this.#starts = starts
    this.size = starts.at(-1)!
    this.blockSize = parts.reduce((most, part) => Math.max(most, part.blockSize), 512)
    this.features = {
      write: parts.every((part) => part.features.write),
      resize: false,
      sparse: parts.some((part) => part.features.sparse),
      places: parts.some((part) => part.features.places),
    }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#use(offset, into.length, signal)
    for (const piece of this.#pieces(offset, into.length)) {
      await piece.device.read(piece.offset, into.subarray(piece.done, piece.done + piece.length), signal)
    }
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    checkExtentRange(this.size, offset, length)
    const list = new ExtentList()
    for (const piece of this.#pieces(offset, length)) {
      const move = offset + piece.done - piece.offset
      for (const extent of await piece.device.extents(piece.offset, piece.length, signal)) {
        list.add(extent.offset + move, extent.length, extent.kind, extent.at)
      }
      // A part that stopped early has to be asked again before the next one's turn.
      if (list.end !== offset + piece.done + piece.length) break
    }
    return list.finish()
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#use(offset, bytes.length, signal)
    for (const part of this.#parts) asWritable(part)
    for (const piece of this.#pieces(offset, bytes.length)) {
      const part = bytes.subarray(piece.done, piece.done + piece.length)
      await asWritable(piece.device).write(piece.offset, part, signal)
    }
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    this.#use(offset, length, signal)
    for (const part of this.#parts) asWritable(part)
    for (const piece of this.#pieces(offset, length)) {
      await asWritable(piece.device).zero(piece.offset, piece.length, signal)
    }
  }

  async flush(signal?: AbortSignal): Promise<void> {
    this.#use(0, 0, signal)
    for (const part of this.#parts) await asWritable(part).flush(signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#disposed) return
    this.#disposed = true
    await using stack = new AsyncDisposableStack()
    for (const part of this.#parts) stack.use(part)
  }

  *#pieces(offset: number, length: number): Generator<Piece> {
    const end = offset + length
    let index = this.#partAt(offset)
    for (let at = offset; at < end; index++) {
      const start = this.#starts[index]!
      const stop = Math.min(this.#starts[index + 1]!, end)
      if (stop === at) continue // an empty part
      yield { device: this.#parts[index]!, offset: at - start, done: at - offset, length: stop - at }
      at = stop
    }
  }

  /** Index of the first part that ends after `offset`. */
  #partAt(offset: number): number {
    let low = 0
    let high = this.#parts.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if (this.#starts[middle + 1]! > offset) high = middle
      else low = middle + 1
    }
    return low
  }

  #use(offset: number, length: number, signal: AbortSignal | undefined): void {
    checkOpen(this.#disposed)
    checkRange(this.size, offset, length)
    throwIfAborted(signal)
  }
}
