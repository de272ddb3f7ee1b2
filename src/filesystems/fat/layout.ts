/**
 * FAT12, FAT16 and FAT32 on disk: Microsoft "FAT: General Overview of On-Disk Format" 1.03 and ECMA-107, where they
 * differ read as Linux and dosfstools do. Little-endian. Layout only; docs/formats/fat.md.
 */
import { Bytes, isPowerOfTwo } from '../../base/index.ts'

export const BOOT_SECTOR_BYTES = 512
export const DIRECTORY_ENTRY_BYTES = 32
const SIGNATURE_AT = 510
const SIGNATURE = 0xaa55
/** BitLocker To Go wears a FAT32 boot sector; this GUID gives it away. */
const BITLOCKER_GUID_AT = 424
const BITLOCKER_GUID = '3bd66749292ed84a8399f6a339e3d001'

/** Most clusters that each width can number. */
const FAT12_MAX_CLUSTERS = 4084
const FAT16_MAX_CLUSTERS = 65524
const FAT32_MAX_CLUSTERS = 0x0ffffff5
/** Number of the first cluster of the data area. */
export const FIRST_CLUSTER = 2

export type FatBits = 12 | 16 | 32

export interface BootSector {
  readonly fatBits: FatBits
  readonly sectorBytes: number
  readonly clusterBytes: number
  /** All in bytes from the start of the volume. */
  readonly fatStart: number
  readonly fatBytes: number
  readonly fatCount: number
  readonly rootStart: number
  readonly rootBytes: number
  readonly dataStart: number
  /** Number of clusters of the data area; they are numbered from FIRST_CLUSTER. */
  readonly clusters: number
  /** What the volume says it is long, sectors after the last cluster included. */
  readonly volumeBytes: number
  /** Media descriptor; FAT[0] repeats it in its low byte. */
  readonly media: number
  /** The FAT that alone is live when mirroring is off (FAT32); undefined when all copies are kept equal. */
  readonly activeFat: number | undefined
  /** FAT32's root directory; 0 otherwise. */
  readonly rootCluster: number
  /** Set by Linux and Windows while mounted for writing. */
  readonly dirty: boolean
  /** `ABCD-1234`; undefined when the boot sector has no extended signature. */
  readonly serial: string | undefined
  /** Label of the boot sector; the root directory's, where there is one, is the better one. */
  readonly label: string | undefined
}

/** True when the sector can only be a FAT boot sector: the fields that every driver insists on are in range. */
export function looksLikeFat(sector: Uint8Array): boolean {
  const bytes = new Bytes(sector, 'little', 'FAT boot sector')
  const sectorBytes = bytes.u16(11)
  const media = bytes.u8(21)
  const fatSectors = bytes.u16(22) || bytes.u32(36)
  return (
    bytes.u16(SIGNATURE_AT) === SIGNATURE &&
    (bytes.u8(0) === 0xe9 || (bytes.u8(0) === 0xeb && bytes.u8(2) === 0x90)) &&
    isPowerOfTwo(sectorBytes) &&
    sectorBytes >= 512 &&
    sectorBytes <= 4096 &&
    isPowerOfTwo(bytes.u8(13)) &&
    bytes.u16(14) > 0 &&
    bytes.u8(16) > 0 &&
    (media === 0xf0 || media >= 0xf8) &&
    fatSectors > 0 &&
    (bytes.u16(19) || bytes.u32(32)) > 0 &&
    Buffer.from(bytes.sub(BITLOCKER_GUID_AT, 16)).toString('hex') !== BITLOCKER_GUID
  )
}

/** Where the first FAT starts, bytes; for the probe, which compares FAT[0] with the media descriptor. */
export function firstFatAt(sector: Uint8Array): number {
  const bytes = new Bytes(sector, 'little', 'FAT boot sector')
  return bytes.u16(14) * bytes.u16(11)
}

/** A string says what is wrong. The sector has passed `looksLikeFat`. */
export function decodeBootSector(sector: Uint8Array): BootSector | string {
  const bytes = new Bytes(sector, 'little', 'FAT boot sector')
  const sectorBytes = bytes.u16(11)
  const clusterBytes = bytes.u8(13) * sectorBytes
  const fatCount = bytes.u8(16)
  if (fatCount > 4) return `${fatCount} FATs`
  const fatSectors16 = bytes.u16(22)
  // As Linux and dosfstools decide it; the number of clusters alone would misread small FAT32 volumes.
  const isFat32 = fatSectors16 === 0
  const fatBytes = (isFat32 ? bytes.u32(36) : fatSectors16) * sectorBytes
  const volumeBytes = (bytes.u16(19) || bytes.u32(32)) * sectorBytes
  const fatStart = bytes.u16(14) * sectorBytes
  const rootStart = fatStart + fatCount * fatBytes
  const rootEntryBytes = bytes.u16(17) * DIRECTORY_ENTRY_BYTES
  if (rootEntryBytes % sectorBytes !== 0) return `a root directory of ${bytes.u16(17)} entries`
  const dataStart = rootStart + rootEntryBytes
  const clusters = Math.floor((volumeBytes - dataStart) / clusterBytes)
  if (clusters < 1) return `a data area that starts at ${dataStart} in a volume of ${volumeBytes} bytes`
  const fatBits: FatBits = isFat32 ? 32 : clusters <= FAT12_MAX_CLUSTERS ? 12 : 16
  const most = { 12: FAT12_MAX_CLUSTERS, 16: FAT16_MAX_CLUSTERS, 32: FAT32_MAX_CLUSTERS }[fatBits]
  if (clusters > most) return `${clusters} clusters, which FAT${fatBits} cannot number`
  if (fatEntriesBytes(fatBits, clusters + FIRST_CLUSTER) > fatBytes)
    return `a FAT of ${fatBytes} bytes for ${clusters} clusters`
  const extFlags = isFat32 ? bytes.u16(40) : 0
  const activeFat = extFlags & 0x80 ? extFlags & 0x0f : undefined
  if (activeFat !== undefined && activeFat >= fatCount)
    return `FAT ${activeFat} of ${fatCount} as the live one`
  const extended = isFat32 ? 64 : 36
  const signature = bytes.u8(extended + 2)
  return {
    fatBits,
    sectorBytes,
    clusterBytes,
    fatStart,
    fatBytes,
    fatCount,
    rootStart,
    rootBytes: rootEntryBytes,
    dataStart,
    clusters,
    volumeBytes,
    media: bytes.u8(21),
    activeFat,
    rootCluster: isFat32 ? bytes.u32(44) : 0,
    dirty: (bytes.u8(extended + 1) & 1) !== 0,
    serial: signature === 0x29 || signature === 0x28 ? serialText(bytes.u32(extended + 3)) : undefined,
    label: signature === 0x29 ? labelText(bytes.sub(extended + 7, 11)) : undefined,
  }
}

/** Bytes that the first `entries` entries of a FAT take. */
export function fatEntriesBytes(fatBits: FatBits, entries: number): number {
  return Math.ceil((entries * fatBits) / 8)
}

/** Label of a root directory, from the part of it in `bytes`; undefined when it has none there. */
export function labelOfDirectory(bytes: Uint8Array): string | undefined {
  for (let at = 0; at + DIRECTORY_ENTRY_BYTES <= bytes.length; at += DIRECTORY_ENTRY_BYTES) {
    const first = bytes[at]!
    const attributes = bytes[at + 11]!
    if (first === 0) return undefined
    const isLongName = (attributes & 0x3f) === 0x0f
    if (first !== 0xe5 && !isLongName && (attributes & 0x18) === 0x08) {
      return labelText(bytes.subarray(at, at + 11))
    }
  }
  return undefined
}

/** What a directory entry owns. */
export interface OwningEntry {
  readonly firstCluster: number
  readonly isDirectory: boolean
}

/**
 * Entries of a directory that own clusters, from the part of it in `bytes`, without `.` and `..`. `ended`: no entry
 * follows.
 */
export function decodeDirectory(
  bytes: Uint8Array,
  fatBits: FatBits,
): { readonly entries: readonly OwningEntry[]; readonly ended: boolean } {
  const view = new Bytes(bytes, 'little', 'FAT directory')
  const entries: OwningEntry[] = []
  for (let at = 0; at + DIRECTORY_ENTRY_BYTES <= bytes.length; at += DIRECTORY_ENTRY_BYTES) {
    const first = bytes[at]!
    const attributes = bytes[at + 11]!
    if (first === 0) return { entries, ended: true }
    // Deleted, a volume label, or a part of a long name.
    if (first === 0xe5 || (attributes & 0x08) !== 0) continue
    const isDirectory = (attributes & 0x10) !== 0
    if (isDirectory && first === 0x2e) continue
    // The upper half is OS/2's business on FAT12 and FAT16.
    const firstCluster = view.u16(at + 26) + (fatBits === 32 ? view.u16(at + 20) * 65_536 : 0)
    if (firstCluster !== 0) entries.push({ firstCluster, isDirectory })
  }
  return { entries, ended: false }
}

function serialText(serial: number): string | undefined {
  if (serial === 0) return undefined
  const hex = serial.toString(16).padStart(8, '0').toUpperCase()
  return `${hex.slice(0, 4)}-${hex.slice(4)}`
}

/** Labels are in the guest's OEM code page, which nothing names; what is not ASCII is shown as `?`. */
function labelText(bytes: Uint8Array): string | undefined {
  const text = Array.from(bytes, (byte) => (byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : '?'))
  const label = text.join('').trimEnd()
  return label === '' || label === 'NO NAME' || /^\?+$/.test(label) ? undefined : label
}
