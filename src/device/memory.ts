/** A device whose bytes are an array: tests, small metadata, decoded streams. */
import type { Extent } from '../extents/index.ts'
import { checkRange, type Features, type ResizableBlockDevice } from './block-device.ts'

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

  async read(offset: number, into: Uint8Array): Promise<void> {
    this.#use(offset, into.length)
    into.set(this.#bytes.subarray(offset, offset + into.length))
  }

  async extents(offset: number, length: number): Promise<readonly Extent[]> {
    this.#use(offset, length)
    return [{ offset, length, kind: 'data' }]
  }

  async write(offset: number, bytes: Uint8Array): Promise<void> {
    this.#use(offset, bytes.length)
    this.#bytes.set(bytes, offset)
  }

  async zero(offset: number, length: number): Promise<void> {
    this.#use(offset, length)
    this.#bytes.fill(0, offset, offset + length)
  }

  async flush(): Promise<void> {
    this.#use(0, 0)
  }

  async resize(size: number): Promise<void> {
    this.#use(0, 0)
    const bytes = new Uint8Array(size)
    bytes.set(this.#bytes.subarray(0, Math.min(size, this.#bytes.length)))
    this.#bytes = bytes
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
  }

  #use(offset: number, length: number): void {
    if (this.#disposed) throw new Error('device is disposed')
    checkRange(this.#bytes.length, offset, length)
  }
}
