/**
 * A device that tells as little as the contract allows: one extent at a time, cut short at odd places. Whoever
 * takes one answer of `extents` for the whole is found out. Borrows the device below.
 */
import {
  asWritable,
  type BlockDevice,
  type Features,
  type WritableBlockDevice,
} from '../../src/device/index.ts'
import { cutExtent, type Extent } from '../../src/extents/index.ts'

export class StutterDevice implements WritableBlockDevice {
  readonly features: Features
  readonly #inner: BlockDevice
  readonly #mostBytes: number

  constructor(inner: BlockDevice, mostBytes = 5003) {
    this.#inner = inner
    this.#mostBytes = mostBytes
    this.features = { ...inner.features, resize: false }
  }

  get size(): number {
    return this.#inner.size
  }

  get blockSize(): number {
    return this.#inner.blockSize
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    await this.#inner.read(offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    const first = (await this.#inner.extents(offset, length, signal))[0]!
    return [cutExtent(first, offset, Math.min(offset + this.#mostBytes, first.offset + first.length))]
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    await asWritable(this.#inner).write(offset, bytes, signal)
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    await asWritable(this.#inner).zero(offset, length, signal)
  }

  async flush(signal?: AbortSignal): Promise<void> {
    await asWritable(this.#inner).flush(signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {}
}
