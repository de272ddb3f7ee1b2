/** The format `vmdk`: flat, sparse, stream-optimized, vmfs, COWD and seSparse disks, for reading. See docs/formats/vmdk.md. */
import type { ImageFormat } from '../image-format.ts'
import { magicOf } from './layout.ts'
import { openVmdk } from './open.ts'

export const vmdkFormat: ImageFormat = {
  name: 'vmdk',
  aliases: [],
  probe: (head) => magicOf(head) !== undefined,
  open: openVmdk,
}
