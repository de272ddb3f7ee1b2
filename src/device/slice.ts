/**
 * `[offset, offset + length)` of another device, as a device: a partition. Writes go through where the device
 * below takes them. Borrows what it cuts from.
 */
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

export class SliceDevice implements WritableBlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly #inner: BlockDevice
  readonly #offset: number
  #disposed = false

  constructor(inner: BlockDevice, offset: number, length: number) {
    checkRange(inner.size, offset, length)
    this.#inner = inner
    this.#offset = offset
    this.size = length
    this.blockSize = inner.blockSize
    this.features = { ...inner.features, resize: false }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#use(offset, into.length)
    await this.#inner.read(this.#offset + offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    checkExtentRange(this.size, offset, length)
    const list = new ExtentList()
    for (const extent of await this.#inner.extents(this.#offset + offset, length, signal)) {
      list.add(extent.offset - this.#offset, extent.length, extent.kind, extent.at)
    }
    return list.finish()
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#use(offset, bytes.length)
    await asWritable(this.#inner).write(this.#offset + offset, bytes, signal)
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    this.#use(offset, length)
    await asWritable(this.#inner).zero(this.#offset + offset, length, signal)
  }

  /** Flushes the whole device below. */
  async flush(signal?: AbortSignal): Promise<void> {
    this.#use(0, 0)
    await asWritable(this.#inner).flush(signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
  }

  #use(offset: number, length: number): void {
    checkOpen(this.#disposed)
    checkRange(this.size, offset, length)
  }
}
