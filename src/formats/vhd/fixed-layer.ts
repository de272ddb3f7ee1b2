/** A fixed VHD as a layer: a raw disk with 512 bytes behind it. Never has a parent, so nothing is `absent`. */
import { VarveError } from '../../base/index.ts'
import {
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
  isWritable,
  type WritableBlockDevice,
} from '../../device/index.ts'
import { type Extent, ExtentList } from '../../extents/index.ts'
import type { FormatFacts, WritableImageLayer } from '../image-format.ts'

/** Owns `file`. Write methods throw READ_ONLY unless it was opened with `write`. */
export class FixedVhdLayer implements WritableImageLayer {
  readonly format = 'vhd'
  readonly backing: undefined = undefined
  readonly facts: FormatFacts
  readonly id: string
  readonly size: number
  readonly blockSize = 512
  readonly features: Features
  readonly #file: BlockDevice
  #closed = false

  constructor(
    file: BlockDevice,
    size: number,
    facts: FormatFacts & { readonly uuid: string },
    options: { readonly write: boolean },
  ) {
    this.#file = file
    this.size = size
    this.facts = facts
    this.id = facts.uuid
    this.features = { ...file.features, write: options.write && isWritable(file), resize: false }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, into.length)
    await this.#file.read(offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.size, offset, length)
    const list = new ExtentList()
    for (const extent of await this.#file.extents(offset, length, signal)) {
      list.add(extent.offset, extent.length, extent.kind === 'data' ? 'data' : 'zero', extent.at)
    }
    return list.finish()
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    const file = this.#writable('write')
    checkRange(this.size, offset, bytes.length)
    await file.write(offset, bytes, signal)
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    const file = this.#writable('zero')
    checkRange(this.size, offset, length)
    await file.zero(offset, length, signal)
  }

  async flush(signal?: AbortSignal): Promise<void> {
    await this.#writable('flush').flush(signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    await this.#file[Symbol.asyncDispose]()
  }

  #writable(doing: string): WritableBlockDevice {
    checkOpen(this.#closed)
    const file = this.#file
    if (!this.features.write || !isWritable(file)) {
      throw new VarveError('READ_ONLY', `Cannot ${doing} VHD image: it was opened for reading`)
    }
    return file
  }
}
