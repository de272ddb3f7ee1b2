/**
 * BSD disk labels: a table of up to 22 partitions in one sector, on a whole disk or inside a partition of an MBR.
 * 4.4BSD `sys/disklabel.h`; docs/formats/bsd.md. In the byte order of the machine that wrote it; little-endian ones
 * are read.
 *
 * Rules: the label's checksum holds and its two magic numbers stand, else the whole is doubted. On a disk, sectors
 * count from its start. Inside a partition (a slice) some systems count from the start of the disk and some from the
 * slice; the raw partition `c` shows which: it is the slice. Without it, or when it does not fit, nothing is believed.
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

const MAGIC = 0x82564557
/** Behind the boot sector (i386), or inside it (Alpha and others). */
const PLACES = [512, 64] as const
const ENTRIES_AT = 148
const ENTRY_BYTES = 16
/** As many as fit the sector; systems use 8 or 16. */
const MOST_PARTITIONS = 22
/** Partition `c`: the whole slice, or the whole disk. */
const RAW_PARTITION = 2
const LABEL_BYTES = ENTRIES_AT + MOST_PARTITIONS * ENTRY_BYTES
const TYPE_UNUSED = 0

/** Where the label stands, when its first magic number does. */
async function placeOfLabel(device: BlockDevice): Promise<number | undefined> {
  for (const at of PLACES) {
    if (at + ENTRIES_AT > device.size) continue
    const label = new Bytes(await readBytes(device, at, ENTRIES_AT), 'little', 'BSD disk label')
    if (label.u32(0) === MAGIC && label.u32(132) === MAGIC) return at
  }
  return undefined
}

/** On a whole disk. */
export const bsd: VolumeScheme = {
  name: 'bsd',
  scopes: ['disk', 'volume'],
  probe: async (device) => (await placeOfLabel(device)) !== undefined,
  open: (members, context) => readLabel(onlyMember(members), { isSlice: false }, context),
}

/** Inside a partition. */
export const bsdSlice: VolumeScheme = {
  name: 'bsd',
  scopes: ['partition'],
  probe: async (device) => (await placeOfLabel(device)) !== undefined,
  open: (members, context) => readLabel(onlyMember(members), { isSlice: true }, context),
}

async function readLabel(
  disk: BlockDevice,
  { isSlice }: { readonly isSlice: boolean },
  { signal }: Context,
): Promise<VolumeTable> {
  const at = await placeOfLabel(disk)
  if (at === undefined) throw bad('no magic number')
  const raw = await readBytes(disk, at, Math.min(LABEL_BYTES, disk.size - at), signal)
  const label = new Bytes(raw, 'little', 'BSD disk label')
  const sectorBytes = label.u32(40)
  const count = label.u16(138)
  if (![512, 1024, 2048, 4096].includes(sectorBytes)) throw bad(`sectors of ${sectorBytes} bytes`)
  const labelEnd = ENTRIES_AT + count * ENTRY_BYTES
  if (count < 1 || count > MOST_PARTITIONS || labelEnd > raw.length) throw bad(`${count} partitions`)
  let sum = 0
  for (let i = 0; i < labelEnd; i += 2) sum ^= label.u16(i)
  if (sum !== 0) throw bad('a checksum that does not match')

  const slots = Array.from({ length: count }, (_, index) => {
    const entry = ENTRIES_AT + index * ENTRY_BYTES
    const start = label.u32(entry + 4) * sectorBytes
    return {
      name: String.fromCharCode('a'.charCodeAt(0) + index),
      type: label.u8(entry + 12),
      start,
      end: start + label.u32(entry) * sectorBytes,
    }
  })
  const slice = slots[RAW_PARTITION]
  if (isSlice && (!slice || slice.end - slice.start <= 0 || slice.end - slice.start > disk.size)) {
    throw bad('no partition c that fits the slice, so where its sectors count from cannot be told')
  }
  const base = isSlice ? slice!.start : 0
  const entries: PartitionEntry[] = []
  for (const [index, { name, type, start, end }] of slots.entries()) {
    // `d` of some systems covers the whole disk as `c` does the slice.
    const isRaw =
      index === RAW_PARTITION ||
      (slice !== undefined && slice.start < slice.end && start <= slice.start && end >= slice.end)
    if (type === TYPE_UNUSED || start >= end || isRaw) continue
    if (start < base) throw bad(`partition ${name} before the start of its slice`)
    entries.push({ name, start: start - base, end: end - base })
  }
  const metadata = RangeSet.of(at, at + labelEnd)
    .coarsen(disk.blockSize)
    .clip(0, disk.size)
  return partitionTable(disk, { kind: 'bsd', metadata, entries })
}

function bad(found: string): NotTrusted {
  return new NotTrusted('bsd-bad-label', `Cannot read the BSD disk label: found ${found}`, { kind: 'bsd' })
}
