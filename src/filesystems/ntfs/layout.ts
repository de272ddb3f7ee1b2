/**
 * NTFS on disk: boot sector, MFT records, attributes, run lists, index blocks, restart pages of $LogFile. Little-endian.
 * Decoding only, no I/O. Field names follow the usual NTFS documentation; docs/formats/ntfs.md has the byte tables.
 *
 * Rule: every multi-sector structure is checked by its update sequence (`applyFixups`) before a field is used.
 */
import { Bytes, isPowerOfTwo, NotTrusted } from '../../base/index.ts'

export const BOOT_BYTES = 512
export const OEM_ID = 'NTFS    '

/** MFT record numbers of the system files that are read. */
export const RECORD = { mft: 0, logFile: 2, volume: 3, root: 5, bitmap: 6 } as const

export const ATTRIBUTE = {
  attributeList: 0x20,
  fileName: 0x30,
  volumeName: 0x60,
  volumeInformation: 0x70,
  data: 0x80,
  indexRoot: 0x90,
  indexAllocation: 0xa0,
  end: 0xffffffff,
} as const

/** The update sequence guards every 512 bytes, whatever the sector size. */
const FIXUP_STRIDE = 512

export interface BootSector {
  readonly sectorBytes: number
  readonly clusterBytes: number
  readonly totalSectors: number
  readonly clusterCount: number
  readonly mftLcn: number
  readonly recordBytes: number
  /** Volume serial number, 16 hex digits, upper case: what blkid shows as the UUID. */
  readonly serial: string
}

export function hasOemId(bytes: Uint8Array): boolean {
  return new Bytes(bytes, 'little').text(3, 8) === OEM_ID && bytes[510] === 0x55 && bytes[511] === 0xaa
}

/** @throws NotTrusted when a field makes no sense. */
export function decodeBoot(bytes: Uint8Array): BootSector {
  const boot = new Bytes(bytes, 'little', 'NTFS boot sector')
  const bad = (what: string): NotTrusted =>
    new NotTrusted('ntfs-boot-invalid', `Cannot use NTFS boot sector: found ${what}`, { kind: 'ntfs' })
  const sectorBytes = boot.u16(0x0b)
  if (!(isPowerOfTwo(sectorBytes) && sectorBytes >= 256 && sectorBytes <= 4096))
    throw bad(`${sectorBytes} bytes per sector`)
  const perCluster = boot.u8(0x0d)
  // Up to 128 sectors as they are (64 KiB clusters); above, 2 to the power of 256 - n.
  const clusterSectors = perCluster <= 0x80 ? perCluster : 2 ** (256 - perCluster)
  const clusterBytes = clusterSectors * sectorBytes
  if (!(isPowerOfTwo(clusterBytes) && clusterBytes <= 2 ** 21)) throw bad(`clusters of ${clusterBytes} bytes`)
  const totalSectors = boot.size64(0x28, 'total sectors')
  const clusterCount = Math.floor(totalSectors / clusterSectors)
  if (clusterCount < 1 || totalSectors * sectorBytes > Number.MAX_SAFE_INTEGER)
    throw bad(`${totalSectors} sectors`)
  const mftLcn = boot.size64(0x30, 'MFT cluster')
  if (mftLcn >= clusterCount) throw bad(`the MFT at cluster ${mftLcn} of ${clusterCount}`)
  const perRecord = (boot.u8(0x40) << 24) >> 24
  const recordBytes = perRecord > 0 ? perRecord * clusterBytes : 2 ** -perRecord
  if (!(isPowerOfTwo(recordBytes) && recordBytes >= 512 && recordBytes <= 65536))
    throw bad(`MFT records of ${recordBytes} bytes`)
  const serial = boot.u64(0x48).toString(16).toUpperCase().padStart(16, '0')
  return { sectorBytes, clusterBytes, totalSectors, clusterCount, mftLcn, recordBytes, serial }
}

/**
 * Checks the magic and the update sequence of a multi-sector structure and puts the saved words back, in place.
 * @throws NotTrusted when the structure was torn or is something else
 */
export function applyFixups(bytes: Uint8Array, magic: string, what: string): Bytes {
  const view = new Bytes(bytes, 'little', what)
  const found = view.text(0, 4)
  if (found !== magic) {
    throw new NotTrusted(
      'ntfs-record-invalid',
      `Cannot use ${what}: found magic ${JSON.stringify(found)}, expected ${magic}`,
    )
  }
  const usaOffset = view.u16(4)
  const usaCount = view.u16(6)
  if (
    usaCount !== bytes.length / FIXUP_STRIDE + 1 ||
    usaOffset % 2 !== 0 ||
    usaOffset + usaCount * 2 > FIXUP_STRIDE - 2
  ) {
    throw new NotTrusted(
      'ntfs-record-invalid',
      `Cannot use ${what}: found ${usaCount} fixups at ${usaOffset}`,
    )
  }
  const sequence = view.u16(usaOffset)
  for (let i = 1; i < usaCount; i++) {
    const at = i * FIXUP_STRIDE - 2
    if (view.u16(at) !== sequence) {
      throw new NotTrusted(
        'ntfs-record-torn',
        `Cannot use ${what}: found a torn write in its sector ${i - 1}`,
      )
    }
    view.setU16(at, view.u16(usaOffset + i * 2))
  }
  return view
}

export interface Attribute {
  readonly type: number
  readonly name: string
  readonly instance: number
  /** Compressed, encrypted or sparse: the low byte, 0x4000, 0x8000. */
  readonly flags: number
  /** Resident attributes carry their value. */
  readonly value?: Uint8Array
  readonly nonResident?: {
    readonly lowestVcn: number
    readonly highestVcn: number
    readonly mappingPairs: Uint8Array
    /** These three are valid in the first piece (lowestVcn 0) only. */
    readonly allocatedBytes: number
    readonly dataBytes: number
    readonly initializedBytes: number
  }
}

export interface MftRecord {
  readonly number: number
  readonly inUse: boolean
  readonly isDirectory: boolean
  /** Record that this one extends; 0 when it is a base record. */
  readonly base: number
  readonly sequence: number
  readonly attributes: readonly Attribute[]
}

/** Decodes a record whose fixups were applied. */
export function decodeRecord(view: Bytes, number: number): MftRecord {
  const what = `MFT record ${number}`
  const invalid = (why: string): NotTrusted =>
    new NotTrusted('ntfs-record-invalid', `Cannot use ${what}: ${why}`)
  const flags = view.u16(22)
  const used = view.u32(24)
  if (used > view.length) throw invalid(`found ${used} bytes in use of ${view.length}`)
  const attributes: Attribute[] = []
  let at = view.u16(20)
  while (at + 4 <= used && view.u32(at) !== ATTRIBUTE.end) {
    const length = view.u32(at + 4)
    if (length < 24 || length % 8 !== 0 || at + length > used)
      throw invalid(`found an attribute of ${length} bytes at ${at}`)
    attributes.push(decodeAttribute(new Bytes(view.sub(at, length), 'little', what)))
    at += length
  }
  if (at + 4 > used) throw invalid('found no end of its attributes')
  return {
    number,
    inUse: (flags & 1) !== 0,
    isDirectory: (flags & 2) !== 0,
    base: recordNumber(view.u64(32)),
    sequence: view.u16(16),
    attributes,
  }
}

function decodeAttribute(view: Bytes): Attribute {
  const nameLength = view.u8(9)
  const common = {
    type: view.u32(0),
    name: nameLength === 0 ? '' : utf16(view.sub(view.u16(10), nameLength * 2)),
    flags: view.u16(12),
    instance: view.u16(14),
  }
  if (view.u8(8) === 0) return { ...common, value: view.sub(view.u16(20), view.u32(16)) }
  const pairs = view.u16(32)
  const first = view.u64(16) === 0n
  return {
    ...common,
    nonResident: {
      lowestVcn: view.size64(16, 'lowest VCN'),
      // An empty attribute has highest VCN -1.
      highestVcn: Number(view.i64(24)),
      mappingPairs: view.sub(pairs, view.length - pairs),
      allocatedBytes: first ? view.size64(40, 'allocated size') : 0,
      dataBytes: first ? view.size64(48, 'data size') : 0,
      initializedBytes: first ? view.size64(56, 'initialized size') : 0,
    },
  }
}

/** Record number of a 64-bit file reference (the upper 16 bits are a sequence number). */
export function recordNumber(reference: bigint): number {
  return Number(reference & 0xffff_ffff_ffffn)
}

export interface Run {
  readonly vcn: number
  /** First cluster on the volume; undefined for a hole. */
  readonly lcn: number | undefined
  readonly clusters: number
}

/**
 * Decodes mapping pairs: a header byte (low nibble: bytes of the length, high: bytes of the LCN delta), then those.
 * @throws NotTrusted when a run leaves the volume or the list has no end
 */
export function decodeRuns(pairs: Uint8Array, lowestVcn: number, clusterCount: number, what: string): Run[] {
  const invalid = (why: string): NotTrusted =>
    new NotTrusted('ntfs-runs-invalid', `Cannot use run list of ${what}: ${why}`)
  const runs: Run[] = []
  let vcn = lowestVcn
  let lcn = 0
  let at = 0
  for (;;) {
    const header = pairs[at++]
    if (header === undefined) throw invalid('found no end')
    if (header === 0) return runs
    const lengthBytes = header & 15
    const lcnBytes = header >> 4
    if (lengthBytes === 0 || lengthBytes > 8 || lcnBytes > 8 || at + lengthBytes + lcnBytes > pairs.length) {
      throw invalid(`found header byte 0x${header.toString(16)}`)
    }
    const clusters = signed(pairs.subarray(at, at + lengthBytes))
    at += lengthBytes
    if (!(clusters > 0 && clusters <= clusterCount)) throw invalid(`found a run of ${clusters} clusters`)
    if (lcnBytes === 0) {
      runs.push({ vcn, lcn: undefined, clusters })
    } else {
      lcn += signed(pairs.subarray(at, at + lcnBytes))
      at += lcnBytes
      if (!(lcn >= 0 && lcn + clusters <= clusterCount))
        throw invalid(`found clusters ${lcn}+${clusters} of ${clusterCount}`)
      runs.push({ vcn, lcn, clusters })
    }
    vcn += clusters
  }
}

function signed(bytes: Uint8Array): number {
  let value = 0n
  for (let i = bytes.length - 1; i >= 0; i--) value = (value << 8n) | BigInt(bytes[i]!)
  return Number(BigInt.asIntN(bytes.length * 8, value))
}

export interface AttributeListEntry {
  readonly type: number
  readonly name: string
  readonly lowestVcn: number
  readonly record: number
  readonly instance: number
}

export function decodeAttributeList(bytes: Uint8Array): AttributeListEntry[] {
  const view = new Bytes(bytes, 'little', 'attribute list')
  const entries: AttributeListEntry[] = []
  for (let at = 0; at + 26 <= bytes.length; ) {
    const length = view.u16(at + 4)
    if (length < 26 || at + length > bytes.length) {
      throw new NotTrusted(
        'ntfs-record-invalid',
        `Cannot use attribute list: found an entry of ${length} bytes at ${at}`,
      )
    }
    entries.push({
      type: view.u32(at),
      name: utf16(view.sub(at + view.u8(at + 7), view.u8(at + 6) * 2)),
      lowestVcn: view.size64(at + 8, 'lowest VCN'),
      record: recordNumber(view.u64(at + 16)),
      instance: view.u16(at + 24),
    })
    at += length
  }
  return entries
}

export interface IndexEntry {
  readonly record: number
  readonly name: string
}

/** Offset of the index header inside the value of $INDEX_ROOT and inside an INDX block. */
export const INDEX_ROOT_HEADER = 16
export const INDEX_BLOCK_HEADER = 24

/** File names of one index node; `header` is where its index header starts. */
export function decodeIndexEntries(view: Bytes, header: number): IndexEntry[] {
  const entries: IndexEntry[] = []
  let at = header + view.u32(header)
  const end = header + view.u32(header + 4)
  while (at + 16 <= end) {
    const length = view.u16(at + 8)
    if ((view.u16(at + 12) & 2) !== 0) break
    if (length < 16 || at + length > end) {
      throw new NotTrusted(
        'ntfs-record-invalid',
        `Cannot use directory index: found an entry of ${length} bytes at ${at}`,
      )
    }
    if (view.u16(at + 10) >= 66) {
      entries.push({
        record: recordNumber(view.u64(at)),
        name: utf16(view.sub(at + 16 + 66, view.u8(at + 16 + 64) * 2)),
      })
    }
    at += length
  }
  return entries
}

export interface RestartPage {
  readonly lsn: bigint
  readonly majorVersion: number
  readonly systemPageBytes: number
  readonly clean: boolean
}

/** A restart page of $LogFile, fixups applied. */
export function decodeRestartPage(view: Bytes): RestartPage {
  const area = view.u16(24)
  return {
    lsn: view.u64(area),
    majorVersion: view.u16(28),
    systemPageBytes: view.u32(16),
    // No client open, or the flag "volume is clean".
    clean: view.u16(area + 12) === 0xffff || (view.u16(area + 14) & 2) !== 0,
  }
}

export function utf16(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('utf16le')
}
