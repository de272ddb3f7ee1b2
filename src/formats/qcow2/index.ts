/** qcow2, versions 2 and 3: docs/formats/qcow2.md. */
import type { BlockDevice, ResizableBlockDevice } from '../../device/index.ts'
import type {
  CreateOptions,
  ImageFormat,
  ImageLayer,
  OpenOptions,
  WritableImageLayer,
} from '../image-format.ts'
import { checkImage } from './check.ts'
import { createImage } from './create.ts'
import { isQcow2 } from './layout.ts'
import { Qcow2Layer } from './qcow2-layer.ts'
import { Qcow2Writer } from './qcow2-writer.ts'

export { BitmapEditor, type BitmapRepair, type NewBitmap, repairBitmaps } from './bitmap-editor.ts'
export {
  readBitmapBits,
  readBitmaps,
  type StoredBitmap,
  type StoredBitmaps,
} from './bitmaps.ts'
export { repairImage } from './check.ts'
export type { Qcow2Settings } from './create.ts'
export type { Snapshot } from './layout.ts'
export type { Qcow2OpenOptions } from './open-image.ts'
export { Qcow2Layer } from './qcow2-layer.ts'
export { Qcow2Writer } from './qcow2-writer.ts'

export const qcow2Format: ImageFormat = {
  name: 'qcow2',
  aliases: [],
  probe: (head) => isQcow2(head),
  async open(file: BlockDevice, options: OpenOptions): Promise<ImageLayer> {
    return options.write ? await Qcow2Writer.open(file, options) : await Qcow2Layer.open(file, options)
  },
  async create(file: ResizableBlockDevice, options: CreateOptions): Promise<WritableImageLayer> {
    await createImage(file, options)
    const { fillAbsent, log, progress, signal } = options
    return await Qcow2Writer.open(file, {
      write: true,
      log,
      progress,
      signal,
      ...(fillAbsent ? { fillAbsent } : {}),
    })
  },
  check: (file, options) => checkImage(file, options),
}
