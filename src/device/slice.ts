/** `[offset, offset + length)` of another device, as a device: a partition. Borrows what it cuts from. */
import { type Extent, ExtentList } from '../extents/index.ts'
import { type BlockDevice, checkRange, type Features } from './block-device.ts'

export class SliceDevice implements BlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly #inner: BlockDevice
  readonly #offset: number

  constructor(inner: BlockDevice, offset: number, length: number) {
    checkRange(inner.size, offset, length)
    this.#inner = inner
    this.#offset = offset
    this.size = length
    this.blockSize = inner.blockSize
    this.features = { ...inner.features, write: false, resize: false }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkRange(this.size, offset, into.length)
    await this.#inner.read(this.#offset + offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkRange(this.size, offset, length)
    const list = new ExtentList()
    for (const extent of await this.#inner.extents(this.#offset + offset, length, signal)) {
      list.add(extent.offset - this.#offset, extent.length, extent.kind, extent.at)
    }
    return list.finish()
  }

  async [Symbol.asyncDispose](): Promise<void> {}
}
