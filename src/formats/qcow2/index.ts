/** qcow2, versions 2 and 3: docs/formats/qcow2.md. */
import { VarveError } from '../../base/index.ts'
import type { BlockDevice } from '../../device/index.ts'
import type { ImageFormat, ImageLayer, OpenOptions } from '../image-format.ts'
import { isQcow2 } from './layout.ts'
import { Qcow2Layer } from './qcow2-layer.ts'

export type { Snapshot } from './layout.ts'
export type { Qcow2OpenOptions } from './open-image.ts'
export { Qcow2Layer } from './qcow2-layer.ts'

export const qcow2Format: ImageFormat = {
  name: 'qcow2',
  aliases: [],
  probe: (head) => isQcow2(head),
  async open(file: BlockDevice, options: OpenOptions): Promise<ImageLayer> {
    if (options.write) throw new VarveError('UNSUPPORTED', 'Cannot open qcow2 image for writing')
    return await Qcow2Layer.open(file, options)
  },
}
