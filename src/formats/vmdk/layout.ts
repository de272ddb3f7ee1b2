/**
 * VMDK on disk: headers of sparse extents, markers, grain directory and grain table entries. No I/O.
 *
 * Specification: VMware, "Virtual Disk Format 5.0" (hosted sparse, stream-optimized, ESX COWD). seSparse has no
 * published specification; only the one version that is known in the field is taken. Little-endian, sectors of 512.
 *
 * Rule: a decoder returns what the header says, or throws CORRUPT, UNSUPPORTED or LIMIT for what no reader could
 * mean. Whether places lie in the file is the caller's check.
 */
import { Bytes, isPowerOfTwo, isZero, VarveError, within } from '../../base/index.ts'

export const SECTOR = 512
export const HEADER_BYTES: number = SECTOR
/** `gdOffset` of a stream: the header at the end of the file counts. */
export const GD_AT_END: bigint = 0xffffffffffffffffn
/** Sectors of a disk: 2^53 bytes is what an offset can say, 64 TiB what VMware makes; 8 PiB leaves room. */
const MOST_SECTORS = 2 ** 44
/** Largest grain: 64 MiB (qemu-img makes up to that); 8 MiB where one is held in memory to be decoded. */
const MOST_GRAIN_SECTORS = 131_072
const MOST_PACKED_GRAIN_SECTORS = 16_384
/** 64 TiB of seSparse, 128 TiB of hosted sparse extents. */
const MOST_DIRECTORY_ENTRIES = 4_194_304

export const FLAG = {
  newLineTest: 0x1,
  redundantTable: 0x2,
  zeroedGrain: 0x4,
  compressed: 0x10000,
  markers: 0x20000,
} as const

export const MARKER = { endOfStream: 0, grainTable: 1, grainDirectory: 2, footer: 3 } as const

export type ExtentKindName = 'sparse' | 'cowd' | 'sesparse'

export type Magic = ExtentKindName | 'descriptor'

const TEXT_MAGIC = '# disk descriptorfile'
const SE_MAGIC = 0xcafebaben
const SE_VOLATILE_MAGIC = 0xcafecafen
const SE_VERSION = 0x0000000200000001n

/** What the first bytes of a file are; undefined when it is no VMDK. */
export function magicOf(head: Uint8Array): Magic | undefined {
  if (head.length < 4) return undefined
  const bytes = new Bytes(head, 'little', 'VMDK head')
  const text = bytes.text(0, 4)
  if (text === 'KDMV') return 'sparse'
  if (text === 'COWD') return 'cowd'
  if (head.length >= 16 && bytes.u64(0) === SE_MAGIC && bytes.u64(8) === SE_VERSION) return 'sesparse'
  if (head.length < TEXT_MAGIC.length) return undefined
  return bytes.text(0, TEXT_MAGIC.length).toLowerCase() === TEXT_MAGIC ? 'descriptor' : undefined
}

/** What is needed to find grains, whatever the kind of extent. Offsets and sizes in bytes. */
export interface ExtentHeader {
  readonly kind: ExtentKindName
  readonly version: number
  /** Bytes of the disk. */
  readonly capacity: number
  readonly grainBytes: number
  /** Entries of one grain table. */
  readonly tableEntries: number
  readonly entryBytes: 4 | 8
  readonly directoryOffset: number
  /** Entries of the grain directory that are needed for the capacity. */
  readonly directoryEntries: number
  /** Second copy of directory and tables, where there is one. */
  readonly redundantOffset: number | undefined
  readonly compressed: boolean
  /** Entry 1 of a grain table stands for a grain of zeros. */
  readonly zeroedGrains: boolean
  readonly uncleanShutdown: boolean
  /** seSparse: what its entries count from. */
  readonly tablesOffset: number
  readonly tablesEnd: number
  readonly grainsOffset: number
  readonly grainsEnd: number
}

/** The hosted sparse header with what only the opener needs. */
export interface SparseHeader extends ExtentHeader {
  readonly descriptorOffset: number
  readonly descriptorBytes: number
  /** The header is a stub: directory and tables are found by the header at the end of the file. */
  readonly atEnd: boolean
}

/** @throws CORRUPT, UNSUPPORTED, LIMIT */
export function decodeSparseHeader(sector: Uint8Array): SparseHeader {
  const bytes = new Bytes(sector, 'little', 'VMDK sparse header')
  if (bytes.text(0, 4) !== 'KDMV') throw corrupt('header', 'no magic', 'KDMV')
  const version = bytes.u32(4)
  if (version < 1 || version > 3) throw unsupported(`version ${version} of a sparse extent`, '1, 2 or 3')
  const flags = bytes.u32(8)
  // Written as LF, blank, CR LF: an FTP transfer in text mode changes them, and much else with them.
  if (flags & FLAG.newLineTest && bytes.text(73, 4) !== '\n \r\n') {
    throw corrupt('header', 'line ends changed by a transfer in text mode', 'none')
  }
  const compressed = (flags & FLAG.compressed) !== 0
  const algorithm = bytes.u16(77)
  if (algorithm > 1 || compressed !== (algorithm === 1)) {
    throw unsupported(
      `compression algorithm ${algorithm} with flags 0x${flags.toString(16)}`,
      'deflate, or none',
    )
  }
  if (compressed && !(flags & FLAG.markers)) throw unsupported('compressed grains without markers', 'markers')
  const capacitySectors = sectors64(bytes, 12, 'capacity')
  const atEnd = bytes.u64(56) === GD_AT_END
  const grainSectors = grainSize(bytes.size64(20, 'grainSize'), compressed)
  const tableEntries = bytes.u32(44)
  if (tableEntries < 1 || tableEntries > 512) {
    throw corrupt('header', `${tableEntries} entries in a grain table`, '1 to 512')
  }
  return {
    kind: 'sparse',
    version,
    capacity: capacitySectors * SECTOR,
    grainBytes: grainSectors * SECTOR,
    tableEntries,
    entryBytes: 4,
    directoryOffset: atEnd ? 0 : sectors64(bytes, 56, 'gdOffset') * SECTOR,
    directoryEntries: directoryEntries(capacitySectors, grainSectors * tableEntries),
    redundantOffset:
      flags & FLAG.redundantTable && bytes.u64(48) !== GD_AT_END
        ? sectors64(bytes, 48, 'rgdOffset') * SECTOR
        : undefined,
    compressed,
    zeroedGrains: (flags & FLAG.zeroedGrain) !== 0,
    uncleanShutdown: bytes.u8(72) !== 0,
    descriptorOffset: sectors64(bytes, 28, 'descriptorOffset') * SECTOR,
    descriptorBytes: sectors64(bytes, 36, 'descriptorSize') * SECTOR,
    atEnd,
    ...NO_BASES,
  }
}

/** Head of a COWD extent (vmfsSparse). @throws CORRUPT, UNSUPPORTED, LIMIT */
export function decodeCowdHeader(sector: Uint8Array): ExtentHeader {
  const bytes = new Bytes(sector, 'little', 'VMDK COWD header')
  if (bytes.text(0, 4) !== 'COWD') throw corrupt('header', 'no magic', 'COWD')
  const version = bytes.u32(4)
  if (version !== 1) throw unsupported(`version ${version} of a COWD extent`, '1')
  const capacitySectors = bytes.u32(12)
  const grainSectors = grainSize(bytes.u32(16), false)
  const tableEntries = 4096
  const needed = directoryEntries(capacitySectors, grainSectors * tableEntries)
  if (bytes.u32(24) < needed) {
    throw corrupt('header', `${bytes.u32(24)} grain directory entries`, `at least ${needed}`)
  }
  return {
    kind: 'cowd',
    version,
    capacity: capacitySectors * SECTOR,
    grainBytes: grainSectors * SECTOR,
    tableEntries,
    entryBytes: 4,
    directoryOffset: bytes.u32(20) * SECTOR,
    directoryEntries: needed,
    redundantOffset: undefined,
    compressed: false,
    zeroedGrains: false,
    // The field lies in the header's fourth sector; nothing that is read depends on it.
    uncleanShutdown: false,
    ...NO_BASES,
  }
}

export interface SeSparseHeader extends ExtentHeader {
  readonly volatileOffset: number
}

/** @throws UNSUPPORTED for anything but the one version that is known, CORRUPT, LIMIT */
export function decodeSeSparseHeader(sector: Uint8Array): SeSparseHeader {
  const bytes = new Bytes(sector, 'little', 'VMDK seSparse header')
  if (bytes.u64(0) !== SE_MAGIC) throw corrupt('header', 'no magic', 'that of seSparse')
  if (bytes.u64(8) !== SE_VERSION) throw unsupported(`seSparse version 0x${bytes.u64(8).toString(16)}`, '2.1')
  const [grainSectors, tableSectors] = [bytes.u64(24), bytes.u64(32)]
  if (grainSectors !== 8n || tableSectors !== 64n) {
    throw unsupported(`seSparse grains of ${grainSectors} and tables of ${tableSectors} sectors`, '8 and 64')
  }
  if (!isZero(bytes.sub(40, 40)) || !isZero(bytes.sub(208, 304))) {
    throw unsupported('seSparse flags or fields that are not known', 'none set')
  }
  const capacitySectors = sectors64(bytes, 16, 'capacity')
  const tableEntries = 4096
  const needed = directoryEntries(capacitySectors, 8 * tableEntries)
  const directoryBytes = sectors64(bytes, 136, 'grain directory size') * SECTOR
  if (directoryBytes < needed * 8) {
    throw corrupt('header', `a grain directory of ${directoryBytes} bytes`, `at least ${needed * 8}`)
  }
  const place = (at: number, what: string): { start: number; end: number } => {
    const start = sectors64(bytes, at, `${what} offset`) * SECTOR
    return { start, end: start + sectors64(bytes, at + 8, `${what} size`) * SECTOR }
  }
  const tables = place(144, 'grain tables')
  const grains = place(192, 'grains')
  return {
    kind: 'sesparse',
    version: 2,
    capacity: capacitySectors * SECTOR,
    grainBytes: 8 * SECTOR,
    tableEntries,
    entryBytes: 8,
    directoryOffset: sectors64(bytes, 128, 'grain directory') * SECTOR,
    directoryEntries: needed,
    redundantOffset: undefined,
    compressed: false,
    zeroedGrains: true,
    uncleanShutdown: false,
    tablesOffset: tables.start,
    tablesEnd: tables.end,
    grainsOffset: grains.start,
    grainsEnd: grains.end,
    volatileOffset: sectors64(bytes, 80, 'volatile header') * SECTOR,
  }
}

/** @throws CORRUPT without the magic, UNSUPPORTED when a journal waits to be replayed: its layout is not known */
export function checkSeSparseVolatile(sector: Uint8Array): void {
  const bytes = new Bytes(sector, 'little', 'VMDK seSparse volatile header')
  if (bytes.u64(0) !== SE_VOLATILE_MAGIC) throw corrupt('volatile header', 'no magic', 'that of seSparse')
  if (bytes.u64(24) !== 0n) throw unsupported('a seSparse journal to be replayed', 'none')
  if (!isZero(bytes.sub(32, 480))) throw unsupported('seSparse fields that are not known', 'none set')
}

export interface Marker {
  readonly value: number
  readonly size: number
  /** Only when `size` is 0. */
  readonly type: number
}

export const GRAIN_MARKER_BYTES = 12

export function decodeMarker(bytes: Uint8Array): Marker {
  const marker = new Bytes(bytes, 'little', 'VMDK marker')
  const size = marker.u32(8)
  return { value: marker.size64(0, 'value'), size, type: size === 0 ? marker.u32(12) : 0 }
}

/** A grain table entry, decoded: nothing here, zeros, or a byte offset in the file (always above ONE_ZERO). */
export const ABSENT = 0
export const ZEROED = 1

/**
 * Decodes one grain table to ABSENT, ZEROED or byte offsets. Where an entry makes no sense its index is returned
 * in `wrong` and decoding stops.
 */
export function decodeGrainTable(
  header: ExtentHeader,
  table: Uint8Array,
): { readonly places: Float64Array; readonly wrong?: number } {
  const places = new Float64Array(header.tableEntries)
  const view = new DataView(table.buffer, table.byteOffset, table.byteLength)
  if (header.entryBytes === 4) {
    for (let i = 0; i < places.length; i++) {
      const entry = view.getUint32(i * 4, true)
      places[i] = entry === 1 && header.zeroedGrains ? ZEROED : entry * SECTOR
    }
    return { places }
  }
  for (let i = 0; i < places.length; i++) {
    const low = view.getUint32(i * 8, true)
    const high = view.getUint32(i * 8 + 4, true)
    switch (high >>> 28) {
      case 0:
        // Nothing of an entry without a type may be set.
        if (low !== 0 || high !== 0) return { places, wrong: i }
        break
      case 1: // unmapped by the guest
      case 2:
        places[i] = ZEROED
        break
      case 3: {
        // The low 12 bits of the grain's number stand above its other 48.
        const number = ((high >>> 16) & 0xfff) + ((high & 0xffff) * 2 ** 32 + low) * 4096
        places[i] = header.grainsOffset + number * header.grainBytes
        break
      }
      default:
        return { places, wrong: i }
    }
  }
  return { places }
}

/**
 * Byte offset of the grain table that a directory entry names; 0 when there is none, undefined when the entry
 * makes no sense.
 */
export function tableOffset(header: ExtentHeader, directory: DataView, index: number): number | undefined {
  if (header.entryBytes === 4) return directory.getUint32(index * 4, true) * SECTOR
  const low = directory.getUint32(index * 8, true)
  const high = directory.getUint32(index * 8 + 4, true)
  if (low === 0 && high === 0) return 0
  if (high !== 0x10000000) return undefined
  const at = header.tablesOffset + low * tableBytes(header)
  return at + tableBytes(header) <= header.tablesEnd ? at : undefined
}

export function tableBytes(header: ExtentHeader): number {
  return header.tableEntries * header.entryBytes
}

const NO_BASES = {
  tablesOffset: 0,
  tablesEnd: 0,
  grainsOffset: 0,
  grainsEnd: Number.MAX_SAFE_INTEGER,
} as const

function directoryEntries(capacitySectors: number, sectorsPerTable: number): number {
  return within(
    Math.ceil(capacitySectors / sectorsPerTable),
    MOST_DIRECTORY_ENTRIES,
    'entries of a VMDK grain directory',
  )
}

function grainSize(sectors: number, compressed: boolean): number {
  if (!isPowerOfTwo(sectors)) throw corrupt('header', `a grain of ${sectors} sectors`, 'a power of two')
  return within(
    sectors,
    compressed ? MOST_PACKED_GRAIN_SECTORS : MOST_GRAIN_SECTORS,
    'sectors of a VMDK grain',
  )
}

function sectors64(bytes: Bytes, at: number, field: string): number {
  return within(bytes.size64(at, field), MOST_SECTORS, `VMDK ${field}`)
}

export function corrupt(what: string, found: string, expected: string): VarveError {
  return new VarveError('CORRUPT', `Cannot read VMDK ${what}: found ${found}, expected ${expected}`)
}

export function unsupported(found: string, expected: string): VarveError {
  return new VarveError('UNSUPPORTED', `Cannot open VMDK: found ${found}, expected ${expected}`)
}
