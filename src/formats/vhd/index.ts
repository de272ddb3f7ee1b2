/** The format `vhd` (qemu's `vpc`): fixed, dynamic and differencing disks. See docs/formats/vhd.md. */
import type { ImageFormat } from '../image-format.ts'
import { checkVhd } from './check.ts'
import { createVhd } from './create.ts'
import { decodeFooter, FOOTER_BYTES, hasFooterCookie } from './layout.ts'
import { openVhd } from './open.ts'

export const vhdFormat: ImageFormat = {
  name: 'vhd',
  aliases: ['vpc'],
  probe(head, tail) {
    if (hasFooterCookie(head)) return true
    // A fixed disk has its footer at the end only. There the guest could have written one, so all of it must hold.
    return [FOOTER_BYTES, FOOTER_BYTES - 1].some(
      (length) =>
        tail.length >= length && decodeFooter(tail.subarray(tail.length - length)).kind !== 'invalid',
    )
  },
  open: openVhd,
  create: createVhd,
  check: checkVhd,
}
