/**
 * GUID partition table on disk: UEFI Specification 2.10, chapter 5. Little-endian. Layout only; docs/formats/gpt.md.
 */
import { Bytes, crc32, guidText, LIMITS } from '../../base/index.ts'

const SIGNATURE = 'EFI PART'
const HEADER_MIN_BYTES = 92
const ENTRY_MIN_BYTES = 128
const ENTRY_MAX_BYTES = 4096
const NAME_AT = 56
const NAME_BYTES = 72

/** Partition types that say what a partition's content cannot: it belongs to something spread over disks. */
export const TYPE_LDM_METADATA = '5808C8AA-7E8F-42E0-85D2-E1E90434CFB3'
export const TYPE_LDM_DATA = 'AF9B60A0-1431-4F62-BC68-3311714A69AD'
export const TYPE_STORAGE_SPACES = 'E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D'

export interface Header {
  /** Where this header says it stands, in sectors. */
  readonly myLba: number
  readonly alternateLba: number
  readonly firstUsableLba: number
  readonly lastUsableLba: number
  readonly diskGuid: string
  readonly entriesLba: number
  readonly entryCount: number
  readonly entryBytes: number
  readonly entriesCrc: number
}

export interface Entry {
  /** 1-based, as Linux counts. */
  readonly number: number
  readonly typeGuid: string
  readonly uniqueGuid: string
  readonly firstLba: bigint
  /** Inclusive, as the specification has it. */
  readonly lastLba: bigint
  readonly name: string
}

export function hasHeaderSignature(sector: Uint8Array): boolean {
  return new Bytes(sector, 'little', 'GPT header').text(0, SIGNATURE.length) === SIGNATURE
}

/**
 * Decodes a header that stands in sector `lba` of a disk of `diskSectors`, or says what is wrong with it. Every
 * number in what it returns has been checked against the disk.
 */
export function decodeHeader(sector: Uint8Array, lba: number, diskSectors: number): Header | string {
  const bytes = new Bytes(sector, 'little', 'GPT header')
  if (!hasHeaderSignature(sector)) return 'no signature'
  const headerBytes = bytes.u32(12)
  if (headerBytes < HEADER_MIN_BYTES || headerBytes > sector.length) return `header size ${headerBytes}`
  const summed = sector.slice(0, headerBytes)
  summed.fill(0, 16, 20)
  if (crc32(summed) !== bytes.u32(16)) return 'header checksum does not match'
  const lbas = [24, 32, 40, 48, 72].map((at) => bytes.u64(at))
  if (lbas.some((value) => value > BigInt(Number.MAX_SAFE_INTEGER))) return 'a sector number over 2^53'
  const [myLba, alternateLba, firstUsableLba, lastUsableLba, entriesLba] = lbas.map(Number) as [
    number,
    number,
    number,
    number,
    number,
  ]
  const header: Header = {
    myLba,
    alternateLba,
    firstUsableLba,
    lastUsableLba,
    diskGuid: guidText(bytes.sub(56, 16)),
    entriesLba,
    entryCount: bytes.u32(80),
    entryBytes: bytes.u32(84),
    entriesCrc: bytes.u32(88),
  }
  if (myLba !== lba) return `header of sector ${myLba} in sector ${lba}`
  if (header.entryCount > LIMITS.gptEntries) return `${header.entryCount} entries`
  const { entryBytes } = header
  if (entryBytes < ENTRY_MIN_BYTES || entryBytes > ENTRY_MAX_BYTES || entryBytes % ENTRY_MIN_BYTES !== 0) {
    return `entries of ${entryBytes} bytes`
  }
  const entrySectors = Math.ceil((header.entryCount * entryBytes) / sector.length)
  if (entriesLba < 1 || entriesLba + entrySectors > diskSectors) return `entries at sector ${entriesLba}`
  return header
}

/** The entries that are not empty; a string when the array's checksum does not match. */
export function decodeEntries(array: Uint8Array, header: Header): readonly Entry[] | string {
  if (crc32(array) !== header.entriesCrc) return 'checksum of the partition entries does not match'
  const entries: Entry[] = []
  for (let index = 0; index < header.entryCount; index++) {
    const at = index * header.entryBytes
    const bytes = new Bytes(array.subarray(at, at + header.entryBytes), 'little', 'GPT entry')
    const type = bytes.sub(0, 16)
    if (type.every((byte) => byte === 0)) continue
    entries.push({
      number: index + 1,
      typeGuid: guidText(type),
      uniqueGuid: guidText(bytes.sub(16, 16)),
      firstLba: bytes.u64(32),
      lastLba: bytes.u64(40),
      name: utf16(bytes.sub(NAME_AT, NAME_BYTES)),
    })
  }
  return entries
}

function utf16(bytes: Uint8Array): string {
  const text = new TextDecoder('utf-16le').decode(bytes)
  const end = text.indexOf('\0')
  return end < 0 ? text : text.slice(0, end)
}
