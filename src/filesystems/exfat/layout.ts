/**
 * exFAT on disk: Microsoft "exFAT file system specification" (2019). Little-endian. Layout only;
 * docs/formats/exfat.md.
 */
import { Bytes } from '../../base/index.ts'

export const BOOT_SECTOR_BYTES = 512
const SIGNATURE_AT = 510
const SIGNATURE = 0xaa55
const NAME = 'EXFAT   '
/** Sectors of the boot region that the checksum covers; it stands in the one after them. */
const CHECKED_SECTORS = 11
export const BOOT_REGION_SECTORS = 12
/** Bytes of the boot sector that change in use (VolumeFlags, PercentInUse) and are left out of the checksum. */
const UNCHECKED: ReadonlySet<number> = new Set([106, 107, 112])

export const FIRST_CLUSTER = 2
const MOST_CLUSTERS = 0xfffffff5
export const END_OF_CHAIN = 0xffffffff
export const DIRECTORY_ENTRY_BYTES = 32

export interface BootSector {
  readonly sectorBytes: number
  readonly clusterBytes: number
  readonly volumeBytes: number
  /** Where the FAT that is live starts, bytes. */
  readonly fatStart: number
  readonly fatCount: number
  /** Where cluster FIRST_CLUSTER starts, bytes. */
  readonly heapStart: number
  readonly clusterCount: number
  readonly rootCluster: number
  readonly dirty: boolean
  /** `ABCD-1234` */
  readonly serial: string
}

export function looksLikeExfat(sector: Uint8Array): boolean {
  const bytes = new Bytes(sector, 'little', 'exFAT boot sector')
  return bytes.u16(SIGNATURE_AT) === SIGNATURE && bytes.text(3, NAME.length) === NAME
}

/** Bytes per sector as the boot sector has it; undefined when it makes no sense. */
export function sectorBytesOf(sector: Uint8Array): number | undefined {
  const shift = new Bytes(sector, 'little', 'exFAT boot sector').u8(108)
  return shift >= 9 && shift <= 12 ? 2 ** shift : undefined
}

/** True when the boot region, twelve sectors, matches the checksum in the last of them. */
export function bootChecksumHolds(region: Uint8Array, sectorBytes: number): boolean {
  let sum = 0
  for (let at = 0; at < CHECKED_SECTORS * sectorBytes; at++) {
    if (UNCHECKED.has(at)) continue
    sum = (((sum << 31) | (sum >>> 1)) + region[at]!) >>> 0
  }
  const bytes = new Bytes(region, 'little', 'exFAT boot checksum')
  for (let at = CHECKED_SECTORS * sectorBytes; at < BOOT_REGION_SECTORS * sectorBytes; at += 4) {
    if (bytes.u32(at) !== sum) return false
  }
  return true
}

/** A string says what is wrong. The sector has passed `looksLikeExfat`. */
export function decodeBootSector(sector: Uint8Array): BootSector | string {
  const bytes = new Bytes(sector, 'little', 'exFAT boot sector')
  const sectorBytes = sectorBytesOf(sector)
  const clusterShift = bytes.u8(108) + bytes.u8(109)
  if (sectorBytes === undefined || clusterShift > 25)
    return `sectors of 2^${bytes.u8(108)} bytes, clusters of 2^${clusterShift}`
  if (bytes.u8(105) !== 1) return `revision ${bytes.u8(105)}.${bytes.u8(104)}`
  const volumeSectors = bytes.size64(72, 'volume length')
  const [fatOffset, fatLength, heapOffset, clusterCount] = [80, 84, 88, 92].map((at) => bytes.u32(at)) as [
    number,
    number,
    number,
    number,
  ]
  const fatCount = bytes.u8(110)
  if (fatCount !== 1 && fatCount !== 2) return `${fatCount} FATs`
  if (clusterCount < 1 || clusterCount > MOST_CLUSTERS) return `${clusterCount} clusters`
  const clusterBytes = 2 ** clusterShift
  const flags = bytes.u16(106)
  const activeFat = fatCount === 2 ? flags & 1 : 0
  if (fatOffset < 24 || fatOffset + fatLength * fatCount > heapOffset) return `a FAT at sector ${fatOffset}`
  if (fatLength * sectorBytes < (clusterCount + FIRST_CLUSTER) * 4)
    return `a FAT of ${fatLength} sectors for ${clusterCount} clusters`
  if (heapOffset + clusterCount * (clusterBytes / sectorBytes) > volumeSectors)
    return `${clusterCount} clusters from sector ${heapOffset} in a volume of ${volumeSectors} sectors`
  const serial = bytes.u32(100).toString(16).padStart(8, '0').toUpperCase()
  return {
    sectorBytes,
    clusterBytes,
    volumeBytes: volumeSectors * sectorBytes,
    fatStart: (fatOffset + activeFat * fatLength) * sectorBytes,
    fatCount,
    heapStart: heapOffset * sectorBytes,
    clusterCount,
    rootCluster: bytes.u32(96),
    dirty: (flags & 2) !== 0,
    serial: `${serial.slice(0, 4)}-${serial.slice(4)}`,
  }
}

export type RootEntry =
  | { readonly is: 'end' }
  | { readonly is: 'bitmap'; readonly firstCluster: number; readonly bytes: bigint }
  | { readonly is: 'label'; readonly label: string }
  | { readonly is: 'other' }

/** One entry of the root directory, as far as it matters here. */
export function decodeRootEntry(raw: Uint8Array): RootEntry {
  const bytes = new Bytes(raw, 'little', 'exFAT directory entry')
  switch (bytes.u8(0)) {
    case 0x00:
      return { is: 'end' }
    case 0x81:
      return { is: 'bitmap', firstCluster: bytes.u32(20), bytes: bytes.u64(24) }
    case 0x83:
      return {
        is: 'label',
        label: new TextDecoder('utf-16le').decode(bytes.sub(2, Math.min(bytes.u8(1), 11) * 2)),
      }
    default:
      return { is: 'other' }
  }
}

/** What an entry of a directory owns. */
export interface OwningEntry {
  readonly firstCluster: number
  readonly bytes: number
  /** The clusters follow each other and the FAT says nothing about them. */
  readonly isRun: boolean
  readonly isDirectory: boolean
}

const IN_USE = 0x80
const SECONDARY = 0x40
const TYPE_BITMAP = 0x81
const TYPE_UPCASE = 0x82
const TYPE_FILE = 0x85
const TYPE_STREAM = 0xc0

/** Reads a directory entry by entry; a file's own entry and its stream may stand in different pieces. */
export class DirectoryReader {
  #isDirectory = false

  /** undefined: owns nothing; `end`: no entry follows. */
  next(raw: Uint8Array): OwningEntry | 'end' | undefined {
    const bytes = new Bytes(raw, 'little', 'exFAT directory entry')
    const type = bytes.u8(0)
    if (type === 0) return 'end'
    if ((type & IN_USE) === 0) return undefined
    if (type === TYPE_FILE) this.#isDirectory = (bytes.u16(4) & 0x10) !== 0
    const always = type === TYPE_BITMAP || type === TYPE_UPCASE
    // Every secondary entry says by its flags whether it owns clusters: streams, and what vendors add.
    if (!always && ((type & SECONDARY) === 0 || (bytes.u8(1) & 1) === 0)) return undefined
    const firstCluster = bytes.u32(20)
    if (firstCluster === 0) return undefined
    return {
      firstCluster,
      bytes: bytes.size64(24, 'data length'),
      isRun: !always && (bytes.u8(1) & 2) !== 0,
      isDirectory: type === TYPE_STREAM && this.#isDirectory,
    }
  }
}
