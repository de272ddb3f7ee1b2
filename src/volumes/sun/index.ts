/**
 * Sun disk labels: eight partitions in sector 0, starting at cylinders. Big-endian; Solaris `sys/dklabel.h`, the
 * VTOC as Linux reads it; docs/formats/sun.md.
 *
 * Rules: the label's checksum holds, else the whole is doubted. A partition may start with the label's own cylinder:
 * it is doubted then, because the label is in use whatever stands there.
 */
import { Bytes, type Context, NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import {
  onlyMember,
  type PartitionEntry,
  partitionTable,
  type VolumeScheme,
  type VolumeTable,
} from '../volume.ts'

const LABEL_BYTES = 512
const MAGIC = 0xdabe
const MAGIC_AT = 508
const VTOC_SANITY = 0x600ddeee
const PARTITIONS = 8
/** Sectors of a Sun label have 512 bytes, whatever the disk's are. */
const SECTOR_BYTES = 512
const TAG_WHOLE_DISK = 5

async function readLabel(device: BlockDevice): Promise<Bytes | undefined> {
  if (device.size < LABEL_BYTES) return undefined
  const label = new Bytes(await readBytes(device, 0, LABEL_BYTES), 'big', 'Sun disk label')
  if (label.u16(MAGIC_AT) !== MAGIC) return undefined
  let sum = 0
  for (let at = 0; at < LABEL_BYTES; at += 2) sum ^= label.u16(at)
  // Two bytes of magic are too few to be believed without it.
  return sum === 0 ? label : undefined
}

export const sun: VolumeScheme = {
  name: 'sun',
  scopes: ['disk', 'volume'],

  async probe(device: BlockDevice): Promise<boolean> {
    return (await readLabel(device)) !== undefined
  },

  async open(members: readonly BlockDevice[], _context: Context): Promise<VolumeTable> {
    const disk = onlyMember(members)
    const label = await readLabel(disk)
    if (!label) throw bad('no magic number and checksum')
    // Labels of SunOS 4 have no VTOC: all eight slots count and none has a tag.
    const hasVtoc = label.u32(188) === VTOC_SANITY && label.u32(128) === 1 && label.u16(140) <= PARTITIONS
    const cylinderBytes = label.u16(436) * label.u16(438) * SECTOR_BYTES
    if (cylinderBytes === 0) throw bad('cylinders of no length')
    const entries: PartitionEntry[] = []
    for (let index = 0; index < PARTITIONS; index++) {
      const sectors = label.u32(444 + index * 8 + 4)
      const tag = hasVtoc ? label.u16(142 + index * 4) : index === 2 ? TAG_WHOLE_DISK : 0
      if (sectors === 0 || tag === TAG_WHOLE_DISK) continue
      const start = label.u32(444 + index * 8) * cylinderBytes
      entries.push({ name: String(index + 1), start, end: start + sectors * SECTOR_BYTES })
    }
    const state = hasVtoc ? undefined : 'without VTOC'
    return partitionTable(disk, {
      kind: 'sun',
      ...(state === undefined ? {} : { state }),
      metadata: RangeSet.of(0, LABEL_BYTES).coarsen(disk.blockSize).clip(0, disk.size),
      entries,
    })
  },
}

function bad(found: string): NotTrusted {
  return new NotTrusted('sun-bad-label', `Cannot read the Sun disk label: found ${found}`, { kind: 'sun' })
}
