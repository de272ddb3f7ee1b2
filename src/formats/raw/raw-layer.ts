/**
 * A raw image as a layer: every method goes straight to the file.
 *
 * Rule: raw never has a backing file, so nothing of it is `absent`. What the host file does not hold is `zero`,
 * which is what it reads as.
 */
import { VarveError } from '../../base/index.ts'
import {
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
  isResizable,
  isWritable,
  type ResizableBlockDevice,
} from '../../device/index.ts'
import { type Extent, ExtentList } from '../../extents/index.ts'
import type { CreateOptions, FormatFacts, OpenOptions, WritableImageLayer } from '../image-format.ts'

/** Owns `file`. Write methods throw READ_ONLY unless it was opened with `write`. */
export class RawLayer implements WritableImageLayer, ResizableBlockDevice {
  readonly format = 'raw'
  readonly backing: undefined = undefined
  readonly facts: FormatFacts = {}
  readonly blockSize: number
  readonly features: Features
  readonly #file: BlockDevice
  #closed = false

  constructor(file: BlockDevice, options: { readonly write: boolean }) {
    this.#file = file
    this.blockSize = file.blockSize
    this.features = {
      ...file.features,
      write: options.write && isWritable(file),
      resize: options.write && isResizable(file),
    }
  }

  get size(): number {
    return this.#file.size
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, into.length)
    await this.#file.read(offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.size, offset, length)
    const below = await this.#file.extents(offset, length, signal)
    if (below.every((extent) => extent.kind !== 'absent')) return below
    const list = new ExtentList()
    for (const extent of below) {
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

  async resize(size: number, signal?: AbortSignal): Promise<void> {
    const file = this.#writable('resize')
    if (!isResizable(file)) {
      throw new VarveError('UNSUPPORTED', 'Cannot resize raw image: what it stands on has a fixed size')
    }
    await file.resize(size, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    await this.#file[Symbol.asyncDispose]()
  }

  #writable(doing: string): BlockDevice & Pick<ResizableBlockDevice, 'write' | 'zero' | 'flush'> {
    checkOpen(this.#closed)
    const file = this.#file
    if (!this.features.write || !isWritable(file)) {
      throw new VarveError('READ_ONLY', `Cannot ${doing} raw image: it was opened for reading`)
    }
    return file
  }
}

export async function openRaw(file: BlockDevice, options: OpenOptions): Promise<RawLayer> {
  if (options.write && !isWritable(file)) {
    throw new VarveError('READ_ONLY', 'Cannot open raw image for writing: its file is read-only')
  }
  return new RawLayer(file, { write: options.write ?? false })
}

/** @throws USAGE for a backing file or any setting: raw has neither */
export async function createRaw(file: ResizableBlockDevice, options: CreateOptions): Promise<RawLayer> {
  if (options.backing) {
    throw new VarveError('USAGE', 'Cannot create raw image: raw has no backing file')
  }
  const unknown = Object.keys(options.settings ?? {})[0]
  if (unknown !== undefined) {
    throw new VarveError('USAGE', `Cannot create raw image: found setting ${unknown}, expected none`)
  }
  if (file.features.resize) {
    await file.resize(0, options.signal)
    await file.resize(options.virtualSize, options.signal)
  } else if (file.size >= options.virtualSize) {
    await file.zero(0, options.virtualSize, options.signal)
  } else {
    throw new VarveError(
      'NO_SPACE',
      `Cannot create raw image: found a device of ${file.size} bytes, expected ${options.virtualSize}`,
    )
  }
  return new RawLayer(file, { write: true })
}
