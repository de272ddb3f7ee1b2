/**
 * MBR partition tables: four slots in sector 0, and chains of EBRs inside extended partitions.
 *
 * Rules: sector numbers of an EBR's own partition count from that EBR, those of the next EBR from the outermost
 * extended partition; they count in the disk's logical sectors. Every EBR is in use, as is everything between
 * partitions (GRUB keeps its core image in the gap after sector 0). A chain that loops, leaves its extended
 * partition or holds more than LIMITS.logicalPartitions makes the whole extended partition one doubted region.
 */
import { type Context, LIMITS, NotTrusted, throwIfAborted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import {
  BOOT_RECORD_BYTES,
  decodeBootRecord,
  isExtended,
  isUsed,
  type Slot,
  TYPE_LDM,
  TYPE_PROTECTIVE,
} from '../boot-record.ts'
import {
  onlyMember,
  type PartitionEntry,
  partitionTable,
  type VolumeScheme,
  type VolumeTable,
} from '../volume.ts'

export const mbr: VolumeScheme = {
  name: 'mbr',
  scopes: ['disk', 'volume'],

  async probe(device: BlockDevice): Promise<boolean> {
    if (device.size < BOOT_RECORD_BYTES) return false
    const record = decodeBootRecord(await readBytes(device, 0, BOOT_RECORD_BYTES))
    if (!record) return false
    // With a protective slot the disk is GPT's; without any partition the record is a mere boot sector.
    return record.slots.some(isUsed) && !record.slots.some((slot) => slot.type === TYPE_PROTECTIVE)
  },

  async open(members: readonly BlockDevice[], context: Context): Promise<VolumeTable> {
    const disk = onlyMember(members)
    const sectorBytes = disk.blockSize
    const record = decodeBootRecord(await readBytes(disk, 0, BOOT_RECORD_BYTES))
    if (!record) throw new NotTrusted('mbr-bad', 'Cannot read the MBR: found no partition table in sector 0')
    const slots = record.slots.filter(isUsed)
    if (slots.some(({ type }) => type === TYPE_LDM)) {
      throw new NotTrusted(
        'ldm-dynamic-disk',
        'Cannot follow the partition table: found a Windows dynamic disk (LDM), whose volumes are not read',
        { kind: 'ldm' },
      )
    }
    const entries: PartitionEntry[] = []
    const metadata = [{ start: 0, end: sectorBytes }]
    let number = 5
    for (const slot of slots) {
      const start = slot.firstSector * sectorBytes
      const end = start + slot.sectors * sectorBytes
      const uuid = (n: number): string => `${record.diskSignature}-${n.toString(16).padStart(2, '0')}`
      if (!isExtended(slot)) {
        const n = slot.index + 1
        entries.push({ name: String(n), start, end, uuid: uuid(n) })
        continue
      }
      try {
        const chain = await readChain(disk, { start, end, sectorBytes }, context)
        for (const at of chain.records) metadata.push({ start: at, end: at + sectorBytes })
        for (const logical of chain.partitions) {
          entries.push({ name: String(number), uuid: uuid(number), ...logical })
          number += 1
        }
      } catch (error) {
        if (!(error instanceof NotTrusted)) throw error
        const doubt = { code: error.reason, text: error.message }
        entries.push({ name: `${slot.index + 1}`, start, end, doubt })
      }
    }
    return partitionTable(disk, {
      kind: 'mbr',
      uuid: record.diskSignature,
      metadata: RangeSet.from(metadata),
      entries,
    })
  },
}

interface Chain {
  /** Offsets of the EBRs. */
  readonly records: readonly number[]
  readonly partitions: readonly { readonly start: number; readonly end: number }[]
}

/** Follows the EBRs of one extended partition, `[start, end)` in bytes. @throws NotTrusted */
async function readChain(
  disk: BlockDevice,
  extended: { readonly start: number; readonly end: number; readonly sectorBytes: number },
  context: Context,
): Promise<Chain> {
  const { start, end, sectorBytes } = extended
  const records: number[] = []
  const partitions: { start: number; end: number }[] = []
  const seen = new Set<number>()
  for (let at: number | undefined = start; at !== undefined; ) {
    throwIfAborted(context.signal)
    if (seen.has(at)) {
      throw new NotTrusted(
        'mbr-ebr-loop',
        `Cannot follow the extended partition: found the EBR at ${at} twice, expected an end of the chain`,
      )
    }
    if (seen.size >= LIMITS.logicalPartitions) {
      throw new NotTrusted(
        'mbr-ebr-too-many',
        `Cannot follow the extended partition: found more than ${LIMITS.logicalPartitions} logical partitions`,
      )
    }
    if (at < start || at + sectorBytes > Math.min(end, disk.size)) {
      throw new NotTrusted(
        'mbr-ebr-outside',
        `Cannot follow the extended partition: found an EBR at ${at}, expected one in [${start}, ${Math.min(end, disk.size)})`,
      )
    }
    seen.add(at)
    const record = decodeBootRecord(await readBytes(disk, at, BOOT_RECORD_BYTES, context.signal))
    const [own, next, ...rest] = (record?.slots ?? []) as [Slot?, Slot?, ...Slot[]]
    if (!own || !next || rest.some(isUsed) || (isUsed(own) && isExtended(own))) {
      throw new NotTrusted(
        'mbr-ebr-bad',
        `Cannot follow the extended partition: found no EBR of two slots at ${at}`,
      )
    }
    records.push(at)
    if (isUsed(own)) {
      const from = at + own.firstSector * sectorBytes
      const to = from + own.sectors * sectorBytes
      if (to > end) {
        throw new NotTrusted(
          'mbr-ebr-outside',
          `Cannot follow the extended partition: found a logical partition that ends at ${to}, expected at most ${end}`,
        )
      }
      partitions.push({ start: from, end: to })
    }
    if (!isUsed(next)) return { records, partitions }
    if (!isExtended(next)) {
      throw new NotTrusted(
        'mbr-ebr-bad',
        `Cannot follow the extended partition: found type ${next.type} in the second slot of the EBR at ${at}, expected an extended partition`,
      )
    }
    at = start + next.firstSector * sectorBytes
  }
  return { records, partitions }
}
