/**
 * What an image format is to the rest of varve: it recognises its files and opens one as a layer.
 *
 * Rules: a layer never opens its backing file (the room `chain` does, under one path policy); every image is
 * hostile, so no field is believed before it is checked against the file; opening never writes unless asked to.
 */
import type { Context } from '../base/index.ts'
import type { BlockDevice, ResizableBlockDevice, WritableBlockDevice } from '../device/index.ts'

export interface BackingReference {
  /** As the image names it: relative to the image's folder, absolute, or a URI. Never trusted here. */
  readonly name: string
  /** Format as the image names it; undefined when it does not (then nothing may be probed). */
  readonly format: string | undefined
  /** Further names that the image gives for the same file, to be tried in this order after `name`. */
  readonly otherNames?: readonly string[]
  /** Identity (`ImageLayer.id`) that the backing image had when this one was made; another one is MISMATCH. */
  readonly id?: string
}

/** A fact of the format for `varve inspect`: cluster size, version, creator. */
export type FormatFacts = Readonly<Record<string, string | number | boolean>>

/** One image of a chain. Ranges that this layer does not hold are `absent`, with or without a backing file. */
export interface ImageLayer extends BlockDevice {
  readonly format: string
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  /** The image's own identity, where the format has one (the uuid of a VHD). */
  readonly id?: string
}

export interface WritableImageLayer extends ImageLayer, WritableBlockDevice {
  /**
   * Writes one allocation unit compressed, where the format can: `offset` is aligned to it, `bytes` are the whole
   * unit (shorter only at the disk's end). Calls may overlap: compression runs in parallel. Same rules as `write`.
   */
  writeCompressed?(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void>
}

/**
 * Gives what stands below a layer in a range that the layer does not hold: a write of less than one allocation
 * unit needs the rest of it. Fills `into` completely; zeros where there is nothing below.
 */
export type FillAbsent = (offset: number, into: Uint8Array, signal?: AbortSignal) => Promise<void>

export interface OpenOptions extends Context {
  /** Open for writing; the format throws UNSUPPORTED when it cannot. Default false. */
  readonly write?: boolean
  /**
   * Opens a further file that this image itself is made of (qcow2 external data file, VMDK extent), by the name
   * in the image, under the chain's path policy. The layer owns what it gets. Absent: such images are refused.
   */
  readonly openPart?: (name: string) => Promise<BlockDevice>
  /**
   * For layers with a backing file that are open for writing; the chain supplies it. Without it, a write that
   * needs bytes of the backing file is refused (UNSUPPORTED).
   */
  readonly fillAbsent?: FillAbsent
}

export interface CreateOptions extends Context {
  readonly virtualSize: number
  readonly backing?: BackingReference
  /** As in OpenOptions. */
  readonly fillAbsent?: FillAbsent
  /** Format's own settings, e.g. `clusterBytes` for qcow2. Unknown ones are a USAGE error. */
  readonly settings?: Readonly<Record<string, string | number | boolean>>
}

export interface CheckFinding {
  readonly severity: 'error' | 'leak' | 'note'
  readonly text: string
  readonly offset?: number
}

export interface ImageFormat {
  /** Name in print and for --format; `aliases` are other names that are understood (qemu's `vpc`). */
  readonly name: string
  readonly aliases: readonly string[]
  /**
   * True when the bytes are this format's, by its magic alone (a file's name is at most a hint). `head` is the
   * first and `tail` the last 4096 bytes of the file, shorter when the file is.
   */
  probe(head: Uint8Array, tail: Uint8Array): boolean
  /** Opens `file`, which the layer then owns. @throws CORRUPT, UNSUPPORTED, ENCRYPTED, LIMIT */
  open(file: BlockDevice, options: OpenOptions): Promise<ImageLayer>
  /** Writes an empty image into `file` (any former content is dropped) and opens it for writing. */
  create?(file: ResizableBlockDevice, options: CreateOptions): Promise<WritableImageLayer>
  check?(file: BlockDevice, options: OpenOptions): Promise<readonly CheckFinding[]>
}
