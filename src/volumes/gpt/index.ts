/**
 * GUID partition tables, sectors of 512 or 4096 bytes, whichever the table was written with.
 *
 * Rules: the primary table is used when its header and entries match their checksums, else the backup in the last
 * sector; when neither does, nothing of the disk is believed. A protective (or hybrid) MBR must stand in sector 0,
 * as the guest's kernel asks too. On a hybrid disk GPT wins; a partition that an MBR slot contradicts is doubted.
 * MBR, headers, entries, backup and all gaps are in use.
 */
import { type Context, NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { type Range, RangeSet } from '../../extents/index.ts'
import { BOOT_RECORD_BYTES, decodeBootRecord, isUsed, TYPE_PROTECTIVE } from '../boot-record.ts'
import {
  type Doubt,
  onlyMember,
  type PartitionEntry,
  partitionTable,
  type VolumeScheme,
  type VolumeTable,
} from '../volume.ts'
import {
  decodeEntries,
  decodeHeader,
  type Entry,
  type Header,
  hasHeaderSignature,
  TYPE_LDM_DATA,
  TYPE_LDM_METADATA,
  TYPE_STORAGE_SPACES,
} from './layout.ts'

const SECTOR_SIZES = [512, 4096] as const

export const gpt: VolumeScheme = {
  name: 'gpt',
  scopes: ['disk', 'volume'],

  async probe(device: BlockDevice): Promise<boolean> {
    if (device.size < BOOT_RECORD_BYTES) return false
    const record = decodeBootRecord(await readBytes(device, 0, BOOT_RECORD_BYTES))
    if (record?.slots.some((slot) => slot.type === TYPE_PROTECTIVE)) return true
    for (const sectorBytes of SECTOR_SIZES) {
      if (device.size >= 2 * sectorBytes && hasHeaderSignature(await readBytes(device, sectorBytes, 8)))
        return true
    }
    return false
  },

  async open(members: readonly BlockDevice[], context: Context): Promise<VolumeTable> {
    const disk = onlyMember(members)
    const record = decodeBootRecord(await readBytes(disk, 0, BOOT_RECORD_BYTES))
    if (!record?.slots.some((slot) => slot.type === TYPE_PROTECTIVE)) {
      throw new NotTrusted(
        'gpt-no-protective-mbr',
        'Cannot use the GPT: found no protective MBR in sector 0, so the guest may not use the table either',
        { kind: 'gpt' },
      )
    }
    const { table, sectorBytes, state } = await choose(disk, context)
    const { header } = table
    const backup =
      table.place === 'primary' ? await readTableHeader(disk, sectorBytes, header.alternateLba) : header
    const inHybrid = record.slots
      .filter((slot) => isUsed(slot) && slot.type !== TYPE_PROTECTIVE && slot.type !== 0)
      .map((slot) => ({
        start: slot.firstSector * sectorBytes,
        end: (slot.firstSector + slot.sectors) * sectorBytes,
      }))
    const notes = state === undefined ? [] : [state]
    if (typeof backup === 'string') notes.push(`backup header: ${backup}`)
    else if (backup.entriesCrc !== header.entriesCrc) notes.push('backup table differs from the primary one')
    if (inHybrid.length > 0) notes.push('hybrid MBR')
    return partitionTable(disk, {
      kind: 'gpt',
      uuid: header.diskGuid.toLowerCase(),
      state: notes.length > 0 ? notes.join('; ') : undefined,
      metadata: metadataRanges(header, typeof backup === 'string' ? undefined : backup, sectorBytes),
      entries: table.entries.map((entry) => toPartition(entry, sectorBytes, inHybrid)),
    })
  },
}

interface Table {
  readonly place: 'primary' | 'backup'
  readonly header: Header
  readonly entries: readonly Entry[]
}

/** The table to believe, and the sector size it was written with. @throws NotTrusted when there is none */
async function choose(
  disk: BlockDevice,
  context: Context,
): Promise<{ table: Table; sectorBytes: number; state: string | undefined }> {
  const sizes = SECTOR_SIZES.toSorted(
    (a, b) => Number(b === disk.blockSize) - Number(a === disk.blockSize),
  ).filter((sectorBytes) => disk.size >= 3 * sectorBytes)
  const refusals: string[] = []
  const found: { table: Table; sectorBytes: number; state: string | undefined }[] = []
  for (const sectorBytes of sizes) {
    const table = await readTable(disk, sectorBytes, { lba: 1, place: 'primary' }, context)
    if (typeof table === 'string') refusals.push(`primary (${sectorBytes}-byte sectors): ${table}`)
    else found.push({ table, sectorBytes, state: undefined })
  }
  if (found.length === 0) {
    for (const sectorBytes of sizes) {
      for (const lba of await backupPlaces(disk, sectorBytes)) {
        const table = await readTable(disk, sectorBytes, { lba, place: 'backup' }, context)
        if (typeof table === 'string')
          refusals.push(`backup in sector ${lba} (${sectorBytes} bytes): ${table}`)
        else {
          found.push({ table, sectorBytes, state: 'primary table damaged: backup used' })
          break
        }
      }
    }
  }
  if (found.length > 1) {
    throw new NotTrusted('gpt-two-tables', 'Cannot use the GPT: found one for each sector size', {
      kind: 'gpt',
    })
  }
  const [chosen] = found
  if (!chosen) {
    throw new NotTrusted('gpt-damaged', `Cannot use the GPT: found ${refusals.join('; ')}`, { kind: 'gpt' })
  }
  return chosen
}

/** Where a backup header may stand: the last sector, and where a damaged primary header says. */
async function backupPlaces(disk: BlockDevice, sectorBytes: number): Promise<number[]> {
  const last = Math.floor(disk.size / sectorBytes) - 1
  const primary = await readBytes(disk, sectorBytes, 512)
  const hint = hasHeaderSignature(primary)
    ? Number(new DataView(primary.buffer, primary.byteOffset).getBigUint64(32, true))
    : last
  return hint > 1 && hint < last ? [last, hint] : [last]
}

async function readTableHeader(
  disk: BlockDevice,
  sectorBytes: number,
  lba: number,
): Promise<Header | string> {
  const sectors = Math.floor(disk.size / sectorBytes)
  if (lba < 1 || lba >= sectors) return `sector ${lba} is past the end of the disk`
  // Most of the time there is none for the other sector size: a look at its first bytes is enough.
  if (!hasHeaderSignature(await readBytes(disk, lba * sectorBytes, 8))) return 'no signature'
  return decodeHeader(await readBytes(disk, lba * sectorBytes, sectorBytes), lba, sectors)
}

async function readTable(
  disk: BlockDevice,
  sectorBytes: number,
  at: { readonly lba: number; readonly place: Table['place'] },
  context: Context,
): Promise<Table | string> {
  const header = await readTableHeader(disk, sectorBytes, at.lba)
  if (typeof header === 'string') return header
  // decodeHeader has checked that the array lies on the disk and is at most LIMITS.gptEntries entries of 4 KiB.
  const array = await readBytes(
    disk,
    header.entriesLba * sectorBytes,
    header.entryCount * header.entryBytes,
    context.signal,
  )
  const entries = decodeEntries(array, header)
  return typeof entries === 'string' ? entries : { place: at.place, header, entries }
}

function metadataRanges(header: Header, other: Header | undefined, sectorBytes: number): RangeSet {
  const ranges: Range[] = [
    { start: 0, end: 2 * sectorBytes },
    // Where the other copy stands, even when it cannot be read.
    { start: header.alternateLba * sectorBytes, end: (header.alternateLba + 1) * sectorBytes },
  ]
  for (const { entriesLba, entryCount, entryBytes, myLba } of other ? [header, other] : [header]) {
    const entrySectors = Math.ceil((entryCount * entryBytes) / sectorBytes)
    ranges.push({ start: entriesLba * sectorBytes, end: (entriesLba + entrySectors) * sectorBytes })
    ranges.push({ start: myLba * sectorBytes, end: (myLba + 1) * sectorBytes })
  }
  return RangeSet.from(ranges.filter(({ end }) => Number.isSafeInteger(end)))
}

function toPartition(entry: Entry, sectorBytes: number, inHybrid: readonly Range[]): PartitionEntry {
  if (entry.firstLba > entry.lastLba) {
    throw new NotTrusted(
      'gpt-bad-entry',
      `Cannot use the GPT: found partition ${entry.number} from sector ${entry.firstLba} to ${entry.lastLba}`,
      { kind: 'gpt' },
    )
  }
  // Past 2^53 the numbers lose precision, but then they lie past the end of any disk and are cut there.
  const start = Number(entry.firstLba) * sectorBytes
  const end = (Number(entry.lastLba) + 1) * sectorBytes
  return {
    name: String(entry.number),
    start,
    end,
    uuid: entry.uniqueGuid.toLowerCase(),
    label: entry.name === '' ? undefined : entry.name,
    doubt: doubtOf(entry, { start, end }, inHybrid),
  }
}

function doubtOf(entry: Entry, { start, end }: Range, inHybrid: readonly Range[]): Doubt | undefined {
  switch (entry.typeGuid) {
    case TYPE_LDM_METADATA:
    case TYPE_LDM_DATA:
      return {
        code: 'ldm-dynamic-disk',
        text: 'partition of a Windows dynamic disk (LDM), whose volumes are not read',
      }
    case TYPE_STORAGE_SPACES:
      return {
        code: 'storage-spaces',
        text: 'partition of a Windows storage pool, whose volumes are not read',
      }
    default:
  }
  const contradicts = inHybrid.some(
    (slot) => slot.start < end && start < slot.end && !(slot.start === start && slot.end === end),
  )
  return contradicts
    ? {
        code: 'gpt-hybrid-differs',
        text: 'a slot of the hybrid MBR covers other sectors than the GPT partition',
      }
    : undefined
}
