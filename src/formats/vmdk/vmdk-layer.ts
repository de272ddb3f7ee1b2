/** A VMDK as a layer: the device that its extents make together, with what the descriptor says of it. */
import type { BlockDevice, Features } from '../../device/index.ts'
import type { Extent } from '../../extents/index.ts'
import type { BackingReference, FormatFacts, ImageLayer } from '../image-format.ts'

/** Owns `content` and the file of the descriptor. */
export class VmdkLayer implements ImageLayer {
  readonly format = 'vmdk'
  readonly size: number
  readonly blockSize = 512
  readonly features: Features
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  readonly id: string
  readonly #content: BlockDevice
  readonly #descriptor: BlockDevice | undefined

  constructor(
    content: BlockDevice,
    about: {
      readonly backing: BackingReference | undefined
      readonly facts: FormatFacts
      readonly id: string
      /** The file of the descriptor, when that is one of its own. */
      readonly descriptor: BlockDevice | undefined
    },
  ) {
    this.#content = content
    this.size = content.size
    this.features = { ...content.features, write: false, resize: false }
    this.backing = about.backing
    this.facts = about.facts
    this.id = about.id
    this.#descriptor = about.descriptor
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    await this.#content.read(offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    return await this.#content.extents(offset, length, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await using stack = new AsyncDisposableStack()
    if (this.#descriptor) stack.use(this.#descriptor)
    stack.use(this.#content)
  }
}
