/** A device without its writing side: to hand a writable one to code that must only read. Borrows it. */
import type { Extent } from '../extents/index.ts'
import { type BlockDevice, checkOpen, type Features } from './block-device.ts'

export class ReadOnlyDevice implements BlockDevice {
  readonly features: Features
  readonly #inner: BlockDevice
  #disposed = false

  constructor(inner: BlockDevice) {
    this.#inner = inner
    this.features = { ...inner.features, write: false, resize: false }
  }

  get size(): number {
    return this.#inner.size
  }

  get blockSize(): number {
    return this.#inner.blockSize
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    await this.#inner.read(offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    return await this.#inner.extents(offset, length, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
  }
}
