/** Rank 3: image formats. The registry is this explicit list; test/architecture.test.ts proves it complete. */
import { VarveError } from '../base/index.ts'
import { type BlockDevice, readBytes } from '../device/index.ts'
import { foreignFormat } from './foreign.ts'
import type { ImageFormat } from './image-format.ts'
import { qcow2Format } from './qcow2/index.ts'
import { rawFormat } from './raw/index.ts'
import { vhdFormat } from './vhd/index.ts'
import { vhdxFormat } from './vhdx/index.ts'
import { vmdkFormat } from './vmdk/index.ts'

export * from './image-format.ts'
export {
  BitmapEditor,
  type BitmapRepair,
  type NewBitmap,
  readBitmapBits,
  readBitmaps,
  repairBitmaps,
  type StoredBitmap,
  type StoredBitmaps,
} from './qcow2/index.ts'

/** In the order of probing; raw, which has no magic, is last. */
export const FORMATS: readonly ImageFormat[] = [qcow2Format, vhdFormat, vhdxFormat, vmdkFormat, rawFormat]

/** The format of this name or alias, in any case of letters; undefined when there is none. */
export function formatByName(name: string): ImageFormat | undefined {
  const wanted = name.toLowerCase()
  return FORMATS.find((format) => format.name === wanted || format.aliases.includes(wanted))
}

/** How many bytes at each end of a file `ImageFormat.probe` is shown. */
const PROBE_BYTES = 4096

/**
 * The format of `file` by its magic alone; raw when no magic is known. For the image that the user named only: a
 * backing file is never probed.
 * @throws UNSUPPORTED when the bytes are those of an image format that varve does not read
 */
export async function probeFormat(file: BlockDevice, signal?: AbortSignal): Promise<ImageFormat> {
  const length = Math.min(PROBE_BYTES, file.size)
  const head = await readBytes(file, 0, length, signal)
  const tail = await readBytes(file, file.size - length, length, signal)
  const known = FORMATS.find((format) => format.probe(head, tail))
  if (known) return known
  const foreign = foreignFormat(head, tail)
  if (foreign !== undefined) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open image: found the magic of ${foreign}, expected one of ${FORMATS.map((f) => f.name).join(', ')}`,
      { fields: { format: foreign }, hint: 'If these bytes are a raw disk, say so with --format raw.' },
    )
  }
  return rawFormat
}
