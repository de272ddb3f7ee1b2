/**
 * Magics of image formats that varve does not read. Their files must not be taken for raw disks in silence: the
 * backup of a VDI's container bytes would look like success and restore to nothing that boots.
 *
 * A guest can write such a magic into the first sector of its own raw disk; `--format raw` is the answer there.
 */

interface Foreign {
  readonly name: string
  readonly offset: number
  readonly magic: string
  readonly where: 'head' | 'tail'
}

/** `offset` counts from the start of `head`, or back from the end of the file for `tail`. */
const FOREIGN: readonly Foreign[] = [
  { name: 'vdi', where: 'head', offset: 64, magic: '\x7f\x10\xda\xbe' },
  { name: 'qed', where: 'head', offset: 0, magic: 'QED\0' },
  { name: 'parallels', where: 'head', offset: 0, magic: 'WithoutFreeSpace' },
  { name: 'parallels', where: 'head', offset: 0, magic: 'WithouFreSpacExt' },
  { name: 'bochs', where: 'head', offset: 0, magic: 'Bochs Virtual HD Image' },
  { name: 'dmg', where: 'tail', offset: 512, magic: 'koly' },
]

/** The name of a foreign image format whose magic the bytes carry; undefined when there is none. */
export function foreignFormat(head: Uint8Array, tail: Uint8Array): string | undefined {
  return FOREIGN.find(({ where, offset, magic }) => {
    const bytes = where === 'head' ? head : tail
    const at = where === 'head' ? offset : bytes.length - offset
    if (at < 0 || at + magic.length > bytes.length) return false
    for (let i = 0; i < magic.length; i++) if (bytes[at + i] !== magic.charCodeAt(i)) return false
    return true
  })?.name
}
