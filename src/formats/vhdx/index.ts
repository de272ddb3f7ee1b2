/** The format `vhdx`: fixed, dynamic and differencing disks of Hyper-V, for reading. See docs/formats/vhdx.md. */
import type { ImageFormat } from '../image-format.ts'
import { hasIdentifier } from './layout.ts'
import { openVhdx } from './open.ts'

export const vhdxFormat: ImageFormat = {
  name: 'vhdx',
  aliases: [],
  probe: hasIdentifier,
  open: openVhdx,
}
