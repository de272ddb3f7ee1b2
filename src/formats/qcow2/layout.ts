/**
 * qcow2 on disk: constants, header, header extensions, table entries, snapshot table, bitmap directory. No I/O.
 *
 * Specification: QEMU's docs/interop/qcow2 (versions 2 and 3). All numbers are big-endian.
 *
 * Rule: every function here judges bytes that an attacker may have written. What contradicts the specification
 * is CORRUPT, what claims more than a real image can need is LIMIT, what we do not know is UNSUPPORTED.
 */
import { Bytes, type ErrorFields, LIMITS, narrow, VarveError, within } from '../../base/index.ts'

/** "QFI\xfb" */
export const MAGIC = 0x514649fb
export const HEADER_BYTES_V2 = 72
/** Shortest version 3 header: everything up to and including `header_length`. */
export const HEADER_BYTES_V3 = 104
/** What we write for version 3: with `compression_type` and its padding. */
export const HEADER_BYTES_WRITTEN = 112

export const MIN_CLUSTER_BITS = 9
/** The specification sets no upper bound; QEMU stops at 2 MiB and so does everybody else. */
export const MAX_CLUSTER_BITS = 21
export const MIN_EXTENDED_CLUSTER_BITS = 14
/** QEMU's limit, and ours: 4 Mi entries. */
export const MAX_L1_BYTES = 33_554_432
/** QEMU's limit on the refcount table. */
export const MAX_REFCOUNT_TABLE_BYTES = 8_388_608
export const MAX_BACKING_NAME_BYTES = 1023
export const MAX_SNAPSHOTS = 65_536
export const MAX_SNAPSHOT_EXTRA_BYTES = 1024
export const MAX_BITMAPS = 65_535
export const SUBCLUSTERS = 32

/** Byte offsets of the header fields that are rewritten in place. */
export const AT = {
  size: 24,
  l1Size: 36,
  l1TableOffset: 40,
  refcountTableOffset: 48,
  refcountTableClusters: 56,
  nbSnapshots: 60,
  snapshotsOffset: 64,
  incompatible: 72,
  compatible: 80,
  autoclear: 88,
  refcountOrder: 96,
  headerLength: 100,
  compressionType: 104,
} as const

/** Incompatible feature bits. */
export const INCOMPATIBLE = {
  dirty: 0x1n,
  corrupt: 0x2n,
  dataFile: 0x4n,
  compressionType: 0x8n,
  extendedL2: 0x10n,
} as const
const KNOWN_INCOMPATIBLE = 0x1fn

/** Compatible feature bits. */
export const COMPATIBLE = { lazyRefcounts: 0x1n } as const

/** Autoclear feature bits. */
export const AUTOCLEAR = { bitmaps: 0x1n, rawExternalData: 0x2n } as const

/** Header extension types. */
export const EXTENSION = {
  end: 0,
  backingFormat: 0xe2792aca,
  featureNames: 0x6803f857,
  bitmaps: 0x23852875,
  encryption: 0x0537be77,
  dataFile: 0x44415441,
} as const

/** Names of the bits that we know, for the feature name table of images that we write. */
export const FEATURE_NAMES: readonly (readonly [type: number, bit: number, name: string])[] = [
  [0, 0, 'dirty bit'],
  [0, 1, 'corrupt bit'],
  [0, 2, 'external data file'],
  [0, 3, 'compression type'],
  [0, 4, 'extended L2 entries'],
  [1, 0, 'lazy refcounts'],
  [2, 0, 'bitmaps'],
  [2, 1, 'raw external data'],
]
const FEATURE_NAME_BYTES = 48

export type Compression = 'deflate' | 'zstd'

export interface BitmapsExtension {
  readonly nbBitmaps: number
  readonly directoryBytes: number
  readonly directoryOffset: number
}

export interface Header {
  readonly version: 2 | 3
  readonly clusterBits: number
  readonly clusterBytes: number
  /** Virtual disk size in bytes. */
  readonly size: number
  /** Entries of the active L1 table. */
  readonly l1Size: number
  readonly l1TableOffset: number
  readonly refcountTableOffset: number
  readonly refcountTableClusters: number
  readonly nbSnapshots: number
  readonly snapshotsOffset: number
  readonly incompatible: bigint
  readonly compatible: bigint
  readonly autoclear: bigint
  /** refcount_bits = 1 << refcountOrder. */
  readonly refcountOrder: number
  readonly headerLength: number
  readonly compression: Compression
  readonly extendedL2: boolean
  readonly dirty: boolean
  readonly corrupt: boolean
  readonly backingName: string | undefined
  readonly backingFormat: string | undefined
  readonly hasDataFile: boolean
  readonly dataFileName: string | undefined
  readonly rawExternalData: boolean
  /** Undefined when there is no such extension; consistent only if `autoclear` bit 0 is set too. */
  readonly bitmaps: BitmapsExtension | undefined
}

/** How a version's tables are shaped: derived from the header once, used everywhere. */
export interface Geometry {
  readonly version: 2 | 3
  readonly clusterBits: number
  readonly clusterBytes: number
  readonly extendedL2: boolean
  readonly hasDataFile: boolean
  /** Bytes of one L2 entry: 8, or 16 with extended L2 entries. */
  readonly l2EntryBytes: number
  readonly l2Entries: number
  /** Guest bytes that one L2 table describes. */
  readonly l2Span: number
  /** A cluster's 32nd part with extended L2 entries, else the cluster. */
  readonly subclusterBytes: number
  /** Lowest bit of the sector count in a compressed cluster descriptor. */
  readonly compressedShift: number
}

export function geometryOf(
  header: Pick<Header, 'version' | 'clusterBits' | 'extendedL2' | 'hasDataFile'>,
): Geometry {
  const clusterBytes = 2 ** header.clusterBits
  const l2EntryBytes = header.extendedL2 ? 16 : 8
  const l2Entries = clusterBytes / l2EntryBytes
  return {
    version: header.version,
    clusterBits: header.clusterBits,
    clusterBytes,
    extendedL2: header.extendedL2,
    hasDataFile: header.hasDataFile,
    l2EntryBytes,
    l2Entries,
    l2Span: l2Entries * clusterBytes,
    subclusterBytes: header.extendedL2 ? clusterBytes / SUBCLUSTERS : clusterBytes,
    compressedShift: 62 - (header.clusterBits - 8),
  }
}

export function isQcow2(head: Uint8Array): boolean {
  return head.length >= 8 && new Bytes(head, 'big').u32(0) === MAGIC
}

/** `cluster_bits` of a header, checked: says how much of the file `decodeHeader` needs. */
export function clusterBitsOf(head: Uint8Array): number {
  const bytes = new Bytes(head, 'big', 'qcow2 header')
  if (head.length < HEADER_BYTES_V2) {
    throw corrupt(`found ${head.length} bytes, expected a header of at least ${HEADER_BYTES_V2}`)
  }
  if (bytes.u32(0) !== MAGIC) throw corrupt('found another magic, expected QFI\\xfb')
  const clusterBits = bytes.u32(20)
  if (clusterBits < MIN_CLUSTER_BITS) {
    throw corrupt(`found cluster_bits ${clusterBits}, expected at least ${MIN_CLUSTER_BITS}`, { clusterBits })
  }
  if (clusterBits > MAX_CLUSTER_BITS) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open qcow2 image: found cluster_bits ${clusterBits}, expected at most ${MAX_CLUSTER_BITS}`,
      { fields: { clusterBits } },
    )
  }
  return clusterBits
}

/**
 * The header with its extensions. `head` is the file's first cluster, or the whole file when that is shorter;
 * `fileBytes` the file's size, against which every offset is checked.
 * @throws CORRUPT, LIMIT, UNSUPPORTED (with the names of unknown incompatible features), ENCRYPTED
 */
export function decodeHeader(head: Uint8Array, fileBytes: number): Header {
  const clusterBits = clusterBitsOf(head)
  const bytes = new Bytes(head, 'big', 'qcow2 header')
  const clusterBytes = 2 ** clusterBits
  const version = bytes.u32(4)
  if (version !== 2 && version !== 3) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open qcow2 image: found version ${version}, expected 2 or 3`,
      { fields: { version } },
    )
  }
  if (version === 3 && head.length < HEADER_BYTES_V3) {
    throw corrupt(`found ${head.length} bytes, expected a header of at least ${HEADER_BYTES_V3}`)
  }
  const headerLength = version === 2 ? HEADER_BYTES_V2 : bytes.u32(AT.headerLength)
  if (version === 3 && (headerLength < HEADER_BYTES_V3 || headerLength > clusterBytes || headerLength % 8)) {
    throw corrupt(
      `found header_length ${headerLength}, expected a multiple of 8 from ${HEADER_BYTES_V3} to ${clusterBytes}`,
      { headerLength },
    )
  }
  if (headerLength > head.length) {
    throw corrupt(`found header_length ${headerLength}, expected at most the file's ${head.length} bytes`)
  }
  const backingFileOffset = bytes.u64(8)
  if (backingFileOffset > BigInt(clusterBytes)) {
    throw corrupt(`found backing_file_offset ${backingFileOffset}, expected it inside the first cluster`)
  }
  const nameAt = Number(backingFileOffset)
  if (nameAt !== 0 && nameAt < headerLength) {
    throw corrupt(`found backing_file_offset ${nameAt}, expected it behind the header of ${headerLength}`)
  }
  const extensionsEnd = Math.min(nameAt === 0 ? clusterBytes : nameAt, head.length)
  const extensions = decodeExtensions(bytes, headerLength, extensionsEnd)

  // Unknown features first: they may change the meaning of everything below.
  const incompatible = version === 2 ? 0n : bytes.u64(AT.incompatible)
  refuseUnknown(incompatible & ~KNOWN_INCOMPATIBLE, extensions.get(EXTENSION.featureNames))
  refuseEncryption(bytes.u32(32))

  const extendedL2 = (incompatible & INCOMPATIBLE.extendedL2) !== 0n
  if (extendedL2 && clusterBits < MIN_EXTENDED_CLUSTER_BITS) {
    throw corrupt(
      `found cluster_bits ${clusterBits} with extended L2 entries, expected at least ${MIN_EXTENDED_CLUSTER_BITS}`,
    )
  }
  const hasDataFile = (incompatible & INCOMPATIBLE.dataFile) !== 0n
  const compression = decodeCompression(bytes, headerLength, incompatible)
  const refcountOrder = version === 2 ? 4 : bytes.u32(AT.refcountOrder)
  if (refcountOrder > 6) throw corrupt(`found refcount_order ${refcountOrder}, expected at most 6`)
  const autoclear = version === 2 ? 0n : bytes.u64(AT.autoclear)

  const size = bytes.size64(AT.size, 'size')
  const l2Span = geometryOf({ version, clusterBits, extendedL2, hasDataFile }).l2Span
  const l1Size = bytes.u32(AT.l1Size)
  within(l1Size * 8, MAX_L1_BYTES, 'qcow2 L1 table bytes')
  if (l1Size < Math.ceil(size / l2Span)) {
    throw corrupt(`found ${l1Size} L1 entries, expected at least ${Math.ceil(size / l2Span)} for its size`, {
      l1Size,
      size,
    })
  }
  const l1TableOffset = l1Size === 0 ? 0 : table(bytes, AT.l1TableOffset, l1Size * 8, 'L1 table')
  const refcountTableClusters = bytes.u32(AT.refcountTableClusters)
  within(refcountTableClusters * clusterBytes, MAX_REFCOUNT_TABLE_BYTES, 'qcow2 refcount table bytes')
  const nbSnapshots = within(bytes.u32(AT.nbSnapshots), MAX_SNAPSHOTS, 'number of qcow2 snapshots')

  return {
    version,
    clusterBits,
    clusterBytes,
    size,
    l1Size,
    l1TableOffset,
    // The refcount table and the snapshot table are checked where they are used: a reader needs neither.
    refcountTableOffset: bytes.size64(AT.refcountTableOffset, 'refcount_table_offset'),
    refcountTableClusters,
    nbSnapshots,
    snapshotsOffset: nbSnapshots === 0 ? 0 : bytes.size64(AT.snapshotsOffset, 'snapshots_offset'),
    incompatible,
    compatible: version === 2 ? 0n : bytes.u64(AT.compatible),
    autoclear,
    refcountOrder,
    headerLength,
    compression,
    extendedL2,
    dirty: (incompatible & INCOMPATIBLE.dirty) !== 0n,
    corrupt: (incompatible & INCOMPATIBLE.corrupt) !== 0n,
    backingName: decodeBackingName(bytes, nameAt, clusterBytes),
    backingFormat: decodeName(extensions.get(EXTENSION.backingFormat), 'backing format'),
    hasDataFile,
    dataFileName: decodeName(extensions.get(EXTENSION.dataFile), 'external data file'),
    rawExternalData: hasDataFile && (autoclear & AUTOCLEAR.rawExternalData) !== 0n,
    bitmaps: decodeBitmapsExtension(extensions.get(EXTENSION.bitmaps), clusterBytes),
  }

  function table(from: Bytes, at: number, length: number, what: string): number {
    const offset = from.size64(at, `${what} offset`)
    checkTable({ offset, length, clusterBytes, fileBytes, what })
    return offset
  }
}

/**
 * Throws CORRUPT unless the table stands cluster-aligned behind the header and inside the file. The file may
 * end right behind a table's last byte, inside its last cluster.
 */
export function checkTable(table: {
  readonly offset: number
  readonly length: number
  readonly clusterBytes: number
  readonly fileBytes: number
  readonly what: string
}): void {
  const { offset, length, clusterBytes, fileBytes, what } = table
  if (offset % clusterBytes !== 0 || offset < clusterBytes) {
    throw corrupt(
      `found its ${what} at ${offset}, expected a multiple of ${clusterBytes} behind the header`,
      {
        offset,
      },
    )
  }
  if (offset + length > fileBytes) {
    throw corrupt(`found its ${what} at ${offset}+${length}, expected it inside the file of ${fileBytes}`, {
      offset,
      length,
    })
  }
}

/** Extension data by type. An extension that occurs twice counts once: the first, as QEMU reads it. */
function decodeExtensions(bytes: Bytes, from: number, end: number): ReadonlyMap<number, Uint8Array> {
  const found = new Map<number, Uint8Array>()
  let at = from
  while (at + 8 <= end) {
    const type = bytes.u32(at)
    const length = bytes.u32(at + 4)
    if (type === EXTENSION.end) break
    if (length > end - at - 8) {
      throw corrupt(
        `found a header extension 0x${type.toString(16)} of ${length} bytes at ${at}, expected it to end before ${end}`,
        { offset: at },
      )
    }
    if (!found.has(type)) found.set(type, bytes.sub(at + 8, length))
    at += 8 + Math.ceil(length / 8) * 8
  }
  return found
}

function refuseUnknown(unknown: bigint, names: Uint8Array | undefined): void {
  if (unknown === 0n) return
  const found: string[] = []
  for (let bit = 0; bit < 64; bit++) {
    if ((unknown >> BigInt(bit)) & 1n) found.push(featureName(names, bit) ?? `bit ${bit}`)
  }
  throw new VarveError(
    'UNSUPPORTED',
    `Cannot open qcow2 image: found unknown incompatible features (${found.join(', ')}), expected none`,
    { fields: { features: found.join(', ') } },
  )
}

/** Name of incompatible feature `bit` as the image's own table gives it, with control characters left out. */
function featureName(table: Uint8Array | undefined, bit: number): string | undefined {
  if (!table) return undefined
  for (let at = 0; at + FEATURE_NAME_BYTES <= table.length; at += FEATURE_NAME_BYTES) {
    if (table[at] !== 0 || table[at + 1] !== bit) continue
    const name = new Bytes(table, 'big').cString(at + 2, FEATURE_NAME_BYTES - 2)
    return name.replace(/[^\x20-\x7e]/g, '?') || undefined
  }
  return undefined
}

function refuseEncryption(method: number): void {
  if (method === 0) return
  const name = method === 1 ? 'AES' : method === 2 ? 'LUKS' : `method ${method}`
  throw new VarveError(
    method <= 2 ? 'ENCRYPTED' : 'UNSUPPORTED',
    `Cannot open qcow2 image: found encryption (${name}), expected none`,
    { fields: { cryptMethod: method } },
  )
}

function decodeCompression(bytes: Bytes, headerLength: number, incompatible: bigint): Compression {
  const type = headerLength > AT.compressionType ? bytes.u8(AT.compressionType) : 0
  const flagged = (incompatible & INCOMPATIBLE.compressionType) !== 0n
  if (flagged !== (type !== 0)) {
    throw corrupt(`found compression_type ${type}, expected it to agree with its incompatible feature bit`)
  }
  if (type > 1) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open qcow2 image: found compression_type ${type}, expected 0 (deflate) or 1 (zstd)`,
      { fields: { compressionType: type } },
    )
  }
  return type === 1 ? 'zstd' : 'deflate'
}

function decodeBackingName(bytes: Bytes, at: number, clusterBytes: number): string | undefined {
  if (at === 0) return undefined
  const length = bytes.u32(16)
  if (length > MAX_BACKING_NAME_BYTES || at + length > clusterBytes || at + length > bytes.length) {
    throw corrupt(`found a backing file name at ${at}+${length}, expected it inside the first cluster`, {
      offset: at,
      length,
    })
  }
  return decodeName(bytes.sub(at, length), 'backing file')
}

function decodeName(raw: Uint8Array | undefined, what: string): string | undefined {
  if (!raw || raw.length === 0) return undefined
  if (raw.length > MAX_BACKING_NAME_BYTES || raw.includes(0)) {
    throw corrupt(`found a ${what} name of ${raw.length} bytes with NUL or too long`)
  }
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(raw)
  } catch (cause) {
    throw new VarveError('CORRUPT', `Cannot open qcow2 image: found a ${what} name that is not UTF-8`, {
      cause,
    })
  }
}

function decodeBitmapsExtension(
  raw: Uint8Array | undefined,
  clusterBytes: number,
): BitmapsExtension | undefined {
  if (!raw) return undefined
  const bytes = new Bytes(raw, 'big', 'qcow2 bitmaps extension')
  if (raw.length !== 24) throw corrupt(`found a bitmaps extension of ${raw.length} bytes, expected 24`)
  const directoryOffset = bytes.size64(16, 'bitmap_directory_offset')
  if (directoryOffset % clusterBytes !== 0) {
    throw corrupt(`found its bitmap directory at ${directoryOffset}, expected a multiple of ${clusterBytes}`)
  }
  return {
    nbBitmaps: bytes.u32(0),
    directoryBytes: bytes.size64(8, 'bitmap_directory_size'),
    directoryOffset,
  }
}

// Table entries ----------------------------------------------------------------------------------------------
// An entry is read as two 32-bit halves: bigint is ten times slower and a map decodes millions of entries.

/** L1 and L2: "refcount is exactly one", bit 63. */
export const COPIED_HI = 0x8000_0000
/** L2: compressed cluster, bit 62. */
export const COMPRESSED_HI = 0x4000_0000
/** L2: cluster reads as zeros, bit 0. */
export const ZERO_LO = 1
/** L1 reserved: bits 56-62 in the high half. */
export const L1_RESERVED_HI = 0x7f00_0000
/** L2 reserved in standard descriptors: bits 56-61. */
export const L2_RESERVED_HI = 0x3f00_0000
/** Bits 1-8 of standard descriptors. */
export const L2_RESERVED_LO = 0x0000_01fe
/** L1 reserved: bits 0-8. */
export const L1_RESERVED_LO = 0x0000_01ff

/** Bits 9-55 of an entry: an offset. At most 2^56, so the caller checks it against the file. */
export function entryOffset(hi: number, lo: number): number {
  return (hi & 0x00ff_ffff) * 0x1_0000_0000 + ((lo & 0xffff_fe00) >>> 0)
}

/** Where a compressed cluster stands: from byte `offset`, at most `length` bytes, ending on a sector. */
export interface CompressedPlace {
  readonly offset: number
  readonly length: number
}

export function compressedPlace(hi: number, lo: number, geometry: Geometry): CompressedPlace {
  // The shift is 49 to 61, so the sector count and the offset's upper part share the high half.
  const shift = geometry.compressedShift - 32
  const offsetHi = hi & (2 ** shift - 1)
  const sectors = ((hi & 0x3fff_ffff) >>> shift) + 1
  const offset = offsetHi * 0x1_0000_0000 + (lo >>> 0)
  return { offset, length: sectors * 512 - (offset % 512) }
}

/** High and low half of a compressed cluster's descriptor. `length` is the compressed data's, in bytes. */
export function compressedEntry(place: CompressedPlace, geometry: Geometry): { hi: number; lo: number } {
  const shift = geometry.compressedShift - 32
  const first = Math.floor(place.offset / 512)
  const last = Math.floor((place.offset + place.length - 1) / 512)
  const offsetHi = Math.floor(place.offset / 0x1_0000_0000)
  return { hi: (COMPRESSED_HI | ((last - first) << shift) | offsetHi) >>> 0, lo: place.offset >>> 0 }
}

// Snapshots --------------------------------------------------------------------------------------------------

export interface Snapshot {
  readonly id: string
  readonly name: string
  readonly l1TableOffset: number
  readonly l1Size: number
  /** Virtual disk size in bytes when it was taken. */
  readonly size: number
  /** Milliseconds since the epoch. */
  readonly takenMs: number
  readonly vmStateBytes: number
}

/**
 * The snapshot table. `bytes` begins at snapshots_offset and holds at least the whole table (its length is not
 * stored); entries that run out of it are CORRUPT.
 */
export function decodeSnapshots(
  bytes: Uint8Array,
  header: Header,
): { snapshots: Snapshot[]; tableBytes: number } {
  const from = new Bytes(bytes, 'big', 'qcow2 snapshot table')
  const snapshots: Snapshot[] = []
  let at = 0
  for (let i = 0; i < header.nbSnapshots; i++) {
    const idBytes = from.u16(at + 12)
    const nameBytes = from.u16(at + 14)
    const extraBytes = from.u32(at + 36)
    within(extraBytes, MAX_SNAPSHOT_EXTRA_BYTES, 'qcow2 snapshot extra data bytes')
    const extra = at + 40
    const l1Size = from.u32(at + 8)
    within(l1Size * 8, MAX_L1_BYTES, 'qcow2 snapshot L1 table bytes')
    snapshots.push({
      l1TableOffset: from.size64(at, 'L1 table offset'),
      l1Size,
      takenMs: from.u32(at + 16) * 1000 + Math.floor(from.u32(at + 20) / 1e6),
      vmStateBytes: extraBytes >= 8 ? from.size64(extra, 'VM state size') : from.u32(at + 32),
      size: extraBytes >= 16 ? from.size64(extra + 8, 'virtual disk size') : header.size,
      id: utf8(from.sub(extra + extraBytes, idBytes)),
      name: utf8(from.sub(extra + extraBytes + idBytes, nameBytes)),
    })
    at += Math.ceil((40 + extraBytes + idBytes + nameBytes) / 8) * 8
    if (at > LIMITS.tableBytes) within(at, LIMITS.tableBytes, 'qcow2 snapshot table bytes')
  }
  return { snapshots, tableBytes: at }
}

// Bitmaps ----------------------------------------------------------------------------------------------------

export const BITMAP_FLAG = { inUse: 1, auto: 2, extraDataCompatible: 4 } as const

export interface BitmapEntry {
  /** Place of this entry in the directory, in bytes. */
  readonly at: number
  readonly name: string
  readonly tableOffset: number
  /** Entries of its bitmap table. */
  readonly tableSize: number
  readonly flags: number
  readonly type: number
  readonly granularityBits: number
  readonly extraBytes: number
}

/** The bitmap directory; `bytes` is exactly `bitmap_directory_size` long. @throws CORRUPT */
export function decodeBitmapDirectory(bytes: Uint8Array, nbBitmaps: number): BitmapEntry[] {
  const from = new Bytes(bytes, 'big', 'qcow2 bitmap directory')
  const entries: BitmapEntry[] = []
  let at = 0
  for (let i = 0; i < nbBitmaps; i++) {
    const nameBytes = from.u16(at + 18)
    const extraBytes = from.u32(at + 20)
    entries.push({
      at,
      tableOffset: from.size64(at, 'bitmap_table_offset'),
      tableSize: from.u32(at + 8),
      flags: from.u32(at + 12),
      type: from.u8(at + 16),
      granularityBits: from.u8(at + 17),
      extraBytes,
      name: utf8(from.sub(at + 24 + extraBytes, nameBytes)),
    })
    at += Math.ceil((24 + extraBytes + nameBytes) / 8) * 8
  }
  return entries
}

/** Bytes of a feature name table with every bit that we know. */
export function encodeFeatureNames(): Uint8Array {
  const out = new Bytes(new Uint8Array(FEATURE_NAMES.length * FEATURE_NAME_BYTES), 'big')
  FEATURE_NAMES.forEach(([type, bit, name], index) => {
    out.setU8(index * FEATURE_NAME_BYTES, type)
    out.setU8(index * FEATURE_NAME_BYTES + 1, bit)
    out.setText(index * FEATURE_NAME_BYTES + 2, name)
  })
  return out.bytes
}

function utf8(raw: Uint8Array): string {
  return new TextDecoder().decode(raw)
}

/** An offset field of a table entry that was read as a bigint. */
export function tableOffset(value: bigint, what: string): number {
  return narrow(value, `qcow2 ${what}`)
}

export function corrupt(found: string, fields: ErrorFields = {}): VarveError {
  return new VarveError('CORRUPT', `Cannot open qcow2 image: ${found}`, { fields })
}
