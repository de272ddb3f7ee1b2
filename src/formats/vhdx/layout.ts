/**
 * VHDX on disk: identifier, headers, region and metadata tables, log entries, BAT entries, parent locator. No I/O.
 *
 * Specification: [MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format". Little-endian. GUIDs are decoded to their
 * text in upper case.
 *
 * Rule: a decoder returns what the bytes say, or throws CORRUPT, UNSUPPORTED or LIMIT. Where the format has two
 * copies, or where a damaged piece is a normal find (a log's old entries), it returns undefined instead.
 */
import { Bytes, crc32c, guidText, isPowerOfTwo, VarveError } from '../../base/index.ts'

export const KIB = 1024
export const MIB: number = 1024 * KIB
/** Identifier, two headers, two region tables. */
export const HEADER_SECTION_BYTES: number = MIB
export const HEADER_OFFSETS: readonly number[] = [64 * KIB, 128 * KIB]
export const HEADER_BYTES: number = 4 * KIB
export const REGION_OFFSETS: readonly number[] = [192 * KIB, 256 * KIB]
export const TABLE_BYTES: number = 64 * KIB
const MOST_ENTRIES = 2047
const MOST_DISK_BYTES = 64 * 2 ** 40
export const NIL_GUID = '00000000-0000-0000-0000-000000000000'

export const REGION = {
  bat: '2DC27766-F623-4200-9D64-115E9BFD4A08',
  metadata: '8B7CA206-4790-4B9A-B8FE-575F050F886E',
} as const

const ITEM = {
  fileParameters: 'CAA16737-FA36-4D43-B3B6-33F0AA44E76B',
  virtualDiskSize: '2FA54224-CD1B-4876-B211-5DBED83BF4B8',
  virtualDiskId: 'BECA12AB-B2E6-4523-93EF-C309E000C746',
  logicalSectorSize: '8141BF1D-A96F-4709-BA47-F233A8FAAB5F',
  physicalSectorSize: 'CDA348C7-445D-4471-9CC9-E9885251C556',
  parentLocator: 'A8D35F2D-B30B-454D-ABF7-D3D84834AB0C',
} as const

const LOCATOR_VHDX = 'B04AEFB7-D19E-4A81-B789-25B8E9445913'

export function hasIdentifier(head: Uint8Array): boolean {
  return head.length >= 8 && new Bytes(head, 'little').text(0, 8) === 'vhdxfile'
}

/** CRC-32C of `bytes` with the four bytes of the field at `at` taken as zero. */
export function checksumWithout(bytes: Uint8Array, at: number): number {
  const seed = crc32c(new Uint8Array(4), crc32c(bytes.subarray(0, at)))
  return crc32c(bytes.subarray(at + 4), seed)
}

export interface Header {
  readonly sequenceNumber: bigint
  readonly dataWriteGuid: string
  readonly logGuid: string
  readonly logVersion: number
  readonly version: number
  readonly logLength: number
  readonly logOffset: bigint
}

/** Undefined when signature or checksum do not hold. */
export function decodeHeader(block: Uint8Array): Header | undefined {
  const bytes = new Bytes(block, 'little', 'VHDX header')
  if (bytes.text(0, 4) !== 'head' || bytes.u32(4) !== checksumWithout(block, 4)) return undefined
  return {
    sequenceNumber: bytes.u64(8),
    dataWriteGuid: guidText(bytes.sub(32, 16)),
    logGuid: guidText(bytes.sub(48, 16)),
    logVersion: bytes.u16(64),
    version: bytes.u16(66),
    logLength: bytes.u32(68),
    logOffset: bytes.u64(72),
  }
}

export interface Region {
  readonly guid: string
  readonly offset: number
  readonly length: number
  readonly required: boolean
}

/** Undefined when signature or checksum do not hold. @throws CORRUPT for a table that holds and makes no sense */
export function decodeRegions(table: Uint8Array): Region[] | undefined {
  const bytes = new Bytes(table, 'little', 'VHDX region table')
  if (bytes.text(0, 4) !== 'regi' || bytes.u32(4) !== checksumWithout(table, 4)) return undefined
  const count = bytes.u32(8)
  if (count > MOST_ENTRIES) throw corrupt('region table', `${count} entries`, `at most ${MOST_ENTRIES}`)
  return Array.from({ length: count }, (_, index) => {
    const at = 16 + index * 32
    return {
      guid: guidText(bytes.sub(at, 16)),
      offset: bytes.size64(at + 16, 'FileOffset'),
      length: bytes.u32(at + 24),
      required: (bytes.u32(at + 28) & 1) !== 0,
    }
  })
}

export interface Metadata {
  readonly blockBytes: number
  readonly leaveBlocksAllocated: boolean
  readonly hasParent: boolean
  readonly virtualDiskSize: number
  readonly virtualDiskId: string
  readonly logicalSectorBytes: number
  readonly physicalSectorBytes: number
  readonly parent: ParentLocator | undefined
}

/** `region` is the whole metadata region. @throws CORRUPT, UNSUPPORTED (a required item that is not known), LIMIT */
export function decodeMetadata(region: Uint8Array): Metadata {
  const table = new Bytes(region, 'little', 'VHDX metadata table')
  if (table.text(0, 8) !== 'metadata') throw corrupt('metadata table', 'no signature', '"metadata"')
  const count = table.u16(10)
  if (count > MOST_ENTRIES) throw corrupt('metadata table', `${count} entries`, `at most ${MOST_ENTRIES}`)
  const items = new Map<string, Uint8Array>()
  const names = new Set<string>(Object.values(ITEM))
  for (let index = 0; index < count; index++) {
    const at = 32 + index * 32
    const guid = guidText(table.sub(at, 16))
    const [offset, length, flags] = [table.u32(at + 16), table.u32(at + 20), table.u32(at + 24)]
    const isUser = (flags & 1) !== 0
    if (isUser || !names.has(guid)) {
      if (flags & 4)
        throw unsupported(`the metadata item ${guid} that must be understood`, 'one that is known')
      continue
    }
    if (items.has(guid)) throw corrupt('metadata table', `item ${guid} twice`, 'it once')
    if (length > MIB || (length > 0 && offset < TABLE_BYTES) || offset + length > region.length) {
      throw corrupt('metadata table', `item ${guid} at ${offset}+${length}`, 'it in the region')
    }
    items.set(guid, region.subarray(offset, offset + length))
  }
  const item = (guid: string, what: string, length: number): Bytes => {
    const found = items.get(guid)
    if (!found || found.length < length) {
      throw corrupt('metadata', `${found?.length ?? 'no'} bytes of ${what}`, `${length}`)
    }
    return new Bytes(found, 'little', `VHDX ${what}`)
  }
  const parameters = item(ITEM.fileParameters, 'file parameters', 8)
  const blockBytes = parameters.u32(0)
  const flags = parameters.u32(4)
  if (!isPowerOfTwo(blockBytes) || blockBytes < MIB || blockBytes > 256 * MIB) {
    throw corrupt('file parameters', `a block of ${blockBytes} bytes`, 'a power of two from 1 to 256 MiB')
  }
  if (flags & ~3) throw unsupported(`file parameters 0x${flags.toString(16)}`, 'those that are known')
  const logicalSectorBytes = item(ITEM.logicalSectorSize, 'logical sector size', 4).u32(0)
  const physicalSectorBytes = item(ITEM.physicalSectorSize, 'physical sector size', 4).u32(0)
  for (const bytes of [logicalSectorBytes, physicalSectorBytes]) {
    if (bytes !== 512 && bytes !== 4096) throw corrupt('metadata', `sectors of ${bytes} bytes`, '512 or 4096')
  }
  const virtualDiskSize = item(ITEM.virtualDiskSize, 'virtual disk size', 8).size64(0, 'bytes')
  if (virtualDiskSize > MOST_DISK_BYTES) {
    throw new VarveError(
      'LIMIT',
      `Cannot accept VHDX: found ${virtualDiskSize} bytes, expected at most 64 TiB`,
    )
  }
  if (virtualDiskSize % logicalSectorBytes !== 0) {
    throw corrupt('metadata', `a disk of ${virtualDiskSize} bytes`, `a multiple of ${logicalSectorBytes}`)
  }
  const hasParent = (flags & 2) !== 0
  const locator = items.get(ITEM.parentLocator)
  if (hasParent && !locator) throw corrupt('metadata', 'a differencing disk without a parent locator', 'one')
  return {
    blockBytes,
    leaveBlocksAllocated: (flags & 1) !== 0,
    hasParent,
    virtualDiskSize,
    virtualDiskId: guidText(item(ITEM.virtualDiskId, 'virtual disk id', 16).sub(0, 16)),
    logicalSectorBytes,
    physicalSectorBytes,
    parent: hasParent ? decodeLocator(locator!) : undefined,
  }
}

export interface ParentLocator {
  /** DataWriteGuid of the parent, upper case, no braces. */
  readonly linkage: string
  /** Paths in the order in which they are to be tried, as they stand. */
  readonly paths: readonly string[]
}

function decodeLocator(item: Uint8Array): ParentLocator {
  const bytes = new Bytes(item, 'little', 'VHDX parent locator')
  const type = guidText(bytes.sub(0, 16))
  if (type !== LOCATOR_VHDX) throw unsupported(`a parent of type ${type}`, 'a VHDX file')
  const values = new Map<string, string>()
  for (let index = 0; index < bytes.u16(18); index++) {
    const at = 20 + index * 12
    const key = utf16(bytes.sub(bytes.u32(at), bytes.u16(at + 8)))
    if (values.has(key))
      throw corrupt('parent locator', `${JSON.stringify(key.slice(0, 40))} twice`, 'it once')
    values.set(key, utf16(bytes.sub(bytes.u32(at + 4), bytes.u16(at + 10))))
  }
  const linkage = /^\{?([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\}?$/i.exec(
    values.get('parent_linkage') ?? '',
  )
  if (!linkage) throw corrupt('parent locator', 'no parent_linkage', 'the GUID of the parent')
  const paths = ['relative_path', 'volume_path', 'absolute_win32_path'].flatMap(
    (key) => values.get(key) ?? [],
  )
  if (paths.length === 0) throw corrupt('parent locator', 'no path', 'at least one')
  return { linkage: linkage[1]!.toUpperCase(), paths }
}

function utf16(bytes: Uint8Array): string {
  try {
    const text = new TextDecoder('utf-16le', { fatal: true, ignoreBOM: true }).decode(bytes)
    if (!text.includes('\0')) return text
  } catch {
    // Said below.
  }
  throw corrupt('parent locator', 'bytes that are no UTF-16 text', 'text')
}

export const LOG_SECTOR = 4096
const FIRST_DESCRIPTORS = 126
const FURTHER_DESCRIPTORS = 128

export type LogDescriptor =
  | { readonly kind: 'zero'; readonly offset: number; readonly length: number }
  | { readonly kind: 'data'; readonly offset: number; readonly bytes: Uint8Array }

export interface LogEntry {
  readonly sequenceNumber: bigint
  readonly length: number
  /** Offset in the log of the oldest entry that this one needs. */
  readonly tail: number
  readonly flushedFileOffset: number
  readonly lastFileOffset: number
  /** Decoded on demand: only the entries that are replayed need it. */
  descriptors(): readonly LogDescriptor[]
}

/**
 * The entry that begins at the start of `log` (the whole log, turned so that the entry does not wrap); undefined
 * when it is not a whole and valid one of this `guid`. Signatures are looked at before the checksum: no two entries
 * that pass share a sector, so what all calls over one log sum up is at most the log.
 */
export function decodeLogEntry(
  sector: (index: number) => Uint8Array,
  logSectors: number,
  guid: string,
): LogEntry | undefined {
  const first = sector(0)
  const head = new Bytes(first, 'little', 'VHDX log entry')
  if (head.text(0, 4) !== 'loge') return undefined
  const [length, tail, count] = [head.u32(8), head.u32(12), head.u32(24)]
  const sequenceNumber = head.u64(16)
  const descriptorSectors = 1 + Math.ceil(Math.max(0, count - FIRST_DESCRIPTORS) / FURTHER_DESCRIPTORS)
  const sectors = length / LOG_SECTOR
  if (
    sequenceNumber === 0n ||
    length % LOG_SECTOR !== 0 ||
    sectors < descriptorSectors ||
    sectors > logSectors ||
    sectors > descriptorSectors + count ||
    tail % LOG_SECTOR !== 0 ||
    tail >= logSectors * LOG_SECTOR ||
    head.u32(28) !== 0 ||
    guidText(head.sub(32, 16)) !== guid ||
    head.u64(48) > MOST_FILE_BYTES ||
    head.u64(56) > MOST_FILE_BYTES
  ) {
    return undefined
  }
  const found: { readonly at: Bytes; readonly from: number; readonly data: number | undefined }[] = []
  let dataSectors = 0
  for (let index = 0; index < count; index++) {
    const slot = index + 2
    const bytes = new Bytes(sector(Math.floor(slot / FURTHER_DESCRIPTORS)), 'little', 'VHDX log descriptor')
    const from = (slot % FURTHER_DESCRIPTORS) * 32
    const signature = bytes.text(from, 4)
    const isData = signature === 'desc'
    if ((!isData && signature !== 'zero') || bytes.u64(from + 24) !== sequenceNumber) return undefined
    if (bytes.u64(from + 16) > MOST_FILE_BYTES || bytes.u64(from + 16) % 4096n !== 0n) return undefined
    if (!isData && (bytes.u64(from + 8) > MOST_FILE_BYTES || bytes.u64(from + 8) % 4096n !== 0n))
      return undefined
    found.push({ at: bytes, from, data: isData ? descriptorSectors + dataSectors++ : undefined })
  }
  if (descriptorSectors + dataSectors !== sectors) return undefined
  for (const { data } of found) {
    if (data === undefined) continue
    const bytes = new Bytes(sector(data), 'little', 'VHDX log data')
    const sequence = (BigInt(bytes.u32(4)) << 32n) | BigInt(bytes.u32(4092))
    if (bytes.text(0, 4) !== 'data' || sequence !== sequenceNumber) return undefined
  }
  let sum = crc32c(first.subarray(8), crc32c(new Uint8Array(4), crc32c(first.subarray(0, 4))))
  for (let index = 1; index < sectors; index++) sum = crc32c(sector(index), sum)
  if (sum !== head.u32(4)) return undefined
  return {
    sequenceNumber,
    length,
    tail,
    flushedFileOffset: head.size64(48),
    lastFileOffset: head.size64(56),
    descriptors: () =>
      found.map(({ at, from, data }) => {
        const offset = at.size64(from + 16)
        if (data === undefined) return { kind: 'zero', offset, length: at.size64(from + 8) }
        const bytes = sector(data).slice()
        bytes.set(at.sub(from + 8, 8), 0)
        bytes.set(at.sub(from + 4, 4), 4092)
        return { kind: 'data', offset, bytes }
      }),
  }
}

/** No file reaches this; sums of two such numbers are still exact. */
const MOST_FILE_BYTES = 2n ** 52n

export const PAYLOAD = {
  notPresent: 0,
  undefined: 1,
  zero: 2,
  unmapped: 3,
  fullyPresent: 6,
  partiallyPresent: 7,
} as const
export const BITMAP_PRESENT = 6
/** A sector bitmap block. */
export const BITMAP_BYTES: number = MIB

/** Where the BAT's entries stand: payload blocks with the entry of their sector bitmap after each chunk. */
export interface BatShape {
  readonly payloadBlocks: number
  /** Payload blocks of one sector bitmap block. */
  readonly chunkRatio: number
  /** Entries that the disk needs. */
  readonly entries: number
}

export function batShape(metadata: Metadata): BatShape {
  const payloadBlocks = Math.ceil(metadata.virtualDiskSize / metadata.blockBytes)
  const chunkRatio = (2 ** 23 * metadata.logicalSectorBytes) / metadata.blockBytes
  const entries = metadata.hasParent
    ? Math.ceil(payloadBlocks / chunkRatio) * (chunkRatio + 1)
    : payloadBlocks + Math.floor(Math.max(0, payloadBlocks - 1) / chunkRatio)
  return { payloadBlocks, chunkRatio, entries }
}

export function isReservedClear(low: number): boolean {
  return (low & 0xffff8) === 0
}

/**
 * A locator's path as a name for the path policy: slashes, no `\\?\` and no `.\` in front.
 */
export function cleanPath(path: string): string {
  return path
    .replace(/^\\\\\?\\/, '')
    .replaceAll('\\', '/')
    .replace(/^(?:\.\/)+/, '')
}

export function corrupt(what: string, found: string, expected: string): VarveError {
  return new VarveError('CORRUPT', `Cannot read VHDX ${what}: found ${found}, expected ${expected}`)
}

export function unsupported(found: string, expected: string): VarveError {
  return new VarveError('UNSUPPORTED', `Cannot open VHDX: found ${found}, expected ${expected}`)
}
