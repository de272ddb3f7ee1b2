/** A device whose bytes are an array: tests, small metadata, decoded streams. */
import { throwIfAborted } from '../base/index.ts'
import type { Extent } from '../extents/index.ts'
import {
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
  type ResizableBlockDevice,
} from './block-device.ts'

export class MemoryDevice implements ResizableBlockDevice {
  readonly blockSize: number
  readonly features: Features = { write: true, resize: true, sparse: false, places: false }
  #bytes: Uint8Array
  #disposed = false

  /** `content` is taken over, not copied; a number makes that many zeros. */
  constructor(content: Uint8Array | number, blockSize = 512) {
    this.#bytes = typeof content === 'number' ? new Uint8Array(content) : content
    this.blockSize = blockSize
  }

  get size(): number {
    return this.#bytes.length
  }

  /** The bytes themselves, not a copy: for tests. */
  get bytes(): Uint8Array {
    return this.#bytes
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#use(offset, into.length, signal)
    into.set(this.#bytes.subarray(offset, offset + into.length))
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    this.#use(offset, length, signal)
    checkExtentRange(this.#bytes.length, offset, length)
    return [{ offset, length, kind: 'data' }]
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#use(offset, bytes.length, signal)
    this.#bytes.set(bytes, offset)
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    this.#use(offset, length, signal)
    this.#bytes.fill(0, offset, offset + length)
  }

  async flush(signal?: AbortSignal): Promise<void> {
    this.#use(0, 0, signal)
  }

  async resize(size: number, signal?: AbortSignal): Promise<void> {
    this.#use(0, 0, signal)
    if (!Number.isSafeInteger(size) || size < 0) throw new RangeError(`size ${size} is not a size`)
    const bytes = new Uint8Array(size)
    bytes.set(this.#bytes.subarray(0, Math.min(size, this.#bytes.length)))
    this.#bytes = bytes
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
  }

  #use(offset: number, length: number, signal: AbortSignal | undefined): void {
    checkOpen(this.#disposed)
    throwIfAborted(signal)
    checkRange(this.#bytes.length, offset, length)
  }
}
