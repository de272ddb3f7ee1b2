/**
 * The one model of what is known about the dirty bitmaps of a chain, whoever told it: the image files themselves
 * (file-facts.ts) or a running QEMU (node-facts.ts). The judge and the plans see nothing else.
 */

/** One bitmap in one image. */
export interface BitmapFacts {
  readonly name: string
  /** It records writes: flag `auto` on disk, `recording` of a running QEMU. */
  readonly recording: boolean
  /** It missed writes, or may have. */
  readonly inconsistent: boolean
  /** It is stored in the image when that is closed. */
  readonly persistent: boolean
  /** An operation of the running QEMU holds it. */
  readonly busy: boolean
  /** Bytes that one bit stands for. */
  readonly granularity: number
  /** Bytes that it marks as changed, whole granules; undefined when that is not known. */
  readonly dirtyBytes: number | undefined
  /** The bits cannot be read from the file: why. */
  readonly unreadable?: string
}

/** Something wrong with the list of bitmaps itself, and so with every bitmap of the image. */
export interface ImageProblem {
  readonly code: 'autoclear-cleared' | 'unreadable-entry' | 'unreadable-directory'
  readonly text: string
}

/** One image of a chain. */
export interface ImageFacts {
  /** Name of the QEMU node, or path of the file: what output calls it. */
  readonly id: string
  readonly kind: 'node' | 'path'
  /** `qcow2`, `raw` …; undefined when nobody told. */
  readonly format: string | undefined
  /** Bytes; undefined when nobody told. */
  readonly virtualSize: number | undefined
  /** In the order in which the source lists them. */
  readonly bitmaps: readonly BitmapFacts[]
  readonly problems: readonly ImageProblem[]
  /** A program has the file open for writing: what the file says of its bitmaps is not the truth. */
  readonly heldByWriter: boolean
}

/** Top first. */
export type ChainFacts = readonly ImageFacts[]

export function findBitmap(image: ImageFacts, name: string): BitmapFacts | undefined {
  return image.bitmaps.find((bitmap) => bitmap.name === name)
}

/** Names of all bitmaps of the chain: as the top lists them, then what only deeper images have. */
export function bitmapNames(chain: ChainFacts): string[] {
  return [...new Set(chain.flatMap(({ bitmaps }) => bitmaps.map(({ name }) => name)))]
}
