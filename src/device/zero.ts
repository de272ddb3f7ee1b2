/** A device of nothing but zeros: a segment that a volume manager or an image declares to be empty. */
import { throwIfAborted } from '../base/index.ts'
import type { Extent } from '../extents/index.ts'
import { type BlockDevice, checkExtentRange, checkOpen, checkRange, type Features } from './block-device.ts'

export class ZeroDevice implements BlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features = { write: false, resize: false, sparse: true, places: false }
  #disposed = false

  constructor(size: number, blockSize = 512) {
    this.size = size
    this.blockSize = blockSize
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    checkRange(this.size, offset, into.length)
    throwIfAborted(signal)
    into.fill(0)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    checkExtentRange(this.size, offset, length)
    throwIfAborted(signal)
    return [{ offset, length, kind: 'zero' }]
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
  }
}
