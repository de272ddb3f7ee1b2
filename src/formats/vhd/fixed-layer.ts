/** A fixed VHD as a layer: a raw disk with 512 bytes behind it. Never has a parent, so nothing is `absent`. */
import {
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
} from '../../device/index.ts'
import { type Extent, ExtentList } from '../../extents/index.ts'
import type { FormatFacts, ImageLayer } from '../image-format.ts'

/** Owns `file`. */
export class FixedVhdLayer implements ImageLayer {
  readonly format = 'vhd'
  readonly backing: undefined = undefined
  readonly facts: FormatFacts
  readonly id: string
  readonly size: number
  readonly blockSize = 512
  readonly features: Features
  readonly #file: BlockDevice
  #closed = false

  constructor(file: BlockDevice, size: number, facts: FormatFacts & { readonly uuid: string }) {
    this.#file = file
    this.size = size
    this.facts = facts
    this.id = facts.uuid
    this.features = { ...file.features, write: false, resize: false }
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

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    await this.#file[Symbol.asyncDispose]()
  }
}
