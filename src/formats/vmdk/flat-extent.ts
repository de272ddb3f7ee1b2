/** A flat extent: bytes of the disk as they stand in a file. Nothing of it is `absent`. Owns its file. */
import { throwIfAborted } from '../../base/index.ts'
import {
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
} from '../../device/index.ts'
import { type Extent, ExtentList } from '../../extents/index.ts'
import { corrupt } from './layout.ts'

export class FlatExtent implements BlockDevice {
  readonly size: number
  readonly blockSize = 512
  readonly features: Features
  readonly #file: BlockDevice
  readonly #start: number
  #closed = false

  /** `[start, start + length)` of `file`. @throws CORRUPT when the file ends before it */
  constructor(file: BlockDevice, start: number, length: number) {
    if (start + length > file.size) {
      throw corrupt('flat extent', `a file of ${file.size} bytes`, `at least ${start + length}`)
    }
    this.#file = file
    this.#start = start
    this.size = length
    this.features = { ...file.features, write: false, resize: false }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, into.length)
    throwIfAborted(signal)
    await this.#file.read(this.#start + offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.size, offset, length)
    throwIfAborted(signal)
    const list = new ExtentList()
    for (const extent of await this.#file.extents(this.#start + offset, length, signal)) {
      const kind = extent.kind === 'data' ? 'data' : 'zero'
      list.add(extent.offset - this.#start, extent.length, kind, extent.at)
    }
    return list.finish()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    await this.#file[Symbol.asyncDispose]()
  }
}
