/**
 * XFS on disk: superblock, allocation group headers, btree blocks, inodes and the log. Constants, offsets and
 * decoding; no I/O and no judgement beyond "is this that structure".
 *
 * Follows the "XFS Algorithms & Data Structures" (3rd edition) and, for the log, the layout that Linux writes.
 * Everything is big-endian but the checksums (little-endian CRC-32C) and the bodies of log items, which are in the
 * byte order of the host that wrote them.
 *
 * Words: a *basic block* (bb) is 512 bytes, the unit of log and buffer addresses (*daddr*). An *agbno* counts file
 * system blocks inside one allocation group (AG), an *fsbno* is `agno << agblklog | agbno`.
 */
import { Bytes, crc32c, uuidText } from '../../base/index.ts'

export const BB = 512

// ---- superblock -------------------------------------------------------------------------------------------------

export const SB_MAGIC = 0x58465342 // "XFSB"
/** Bytes of the superblock that are looked at; it fills one sector, whose rest is zero but for the checksum. */
export const SB_BYTES = 512
const SB_CRC_AT = 224

/** Bits of sb_versionnum above the version nibble. */
export const VERSION_BITS = {
  ATTR: 0x0010,
  NLINK: 0x0020,
  QUOTA: 0x0040,
  ALIGN: 0x0080,
  DALIGN: 0x0100,
  SHARED: 0x0200,
  LOGV2: 0x0400,
  SECTOR: 0x0800,
  EXTFLG: 0x1000,
  DIRV2: 0x2000,
  BORG: 0x4000,
  MOREBITS: 0x8000,
} as const

/** sb_features2 */
/** LAZYSBCOUNT, ATTR2, PARENT, PROJID32, CRC, FTYPE. */
export const FEATURES2_KNOWN: number = 0x02 | 0x08 | 0x10 | 0x80 | 0x100 | 0x200

export const RO_COMPAT = { FINOBT: 1, RMAPBT: 2, REFLINK: 4, INOBTCNT: 8 } as const
export const RO_COMPAT_KNOWN = 0xf

export const INCOMPAT = {
  FTYPE: 0x1,
  SPINODES: 0x2,
  META_UUID: 0x4,
  BIGTIME: 0x8,
  NEEDSREPAIR: 0x10,
  NREXT64: 0x20,
  EXCHRANGE: 0x40,
  PARENT: 0x80,
} as const
/** METADIR (0x100), ZONED (0x200) and ZONE_GAPS (0x400) move the realtime section about: not believed here. */
export const INCOMPAT_KNOWN = 0xff
/** sb_features_log_incompat: extended attribute intents in the log. */
export const LOG_INCOMPAT_KNOWN = 0x1

export interface Superblock {
  readonly version: 4 | 5
  readonly blockBytes: number
  /** Blocks of the data section. */
  readonly dblocks: number
  /** Extents of the realtime section; 0 where there is none. */
  readonly rextents: number
  readonly rblocks: number
  /** What people see. */
  readonly uuid: string
  /** What stands in every metadata block (differs from `uuid` after `xfs_admin -U`). */
  readonly metaUuid: string
  readonly label: string
  /** fsbno of the internal log; 0: the log is on another device. */
  readonly logstart: number
  readonly logblocks: number
  readonly rootino: number
  readonly agblocks: number
  readonly agcount: number
  readonly agblklog: number
  readonly sectorBytes: number
  readonly inodeBytes: number
  readonly inodesPerBlock: number
  readonly inopblog: number
  /** Inode chunks are aligned to this many blocks. */
  readonly inodeAlignment: number
  readonly blockLog: number
  readonly sectorLog: number
  readonly inodeLog: number
  readonly dirBlockLog: number
  readonly inProgress: number
  readonly versionBits: number
  readonly features2: number
  readonly roCompat: number
  readonly incompat: number
  readonly logIncompat: number
}

/**
 * The superblock's fields as they stand; `bytes` begins with it. Only its magic has been looked at, so any number may
 * be nonsense; those above 2^53 are rounded, and too large for every check all the same.
 */
export function decodeSuperblock(bytes: Uint8Array): Superblock {
  const b = new Bytes(bytes, 'big', 'XFS superblock')
  const versionnum = b.u16(100)
  const version = (versionnum & 0xf) === 5 ? 5 : 4
  const v5 = version === 5
  const incompat = v5 ? b.u32(216) : 0
  const uuid = uuidText(b.sub(32, 16))
  return {
    version,
    blockBytes: b.u32(4),
    dblocks: Number(b.u64(8)),
    rblocks: Number(b.u64(16)),
    rextents: Number(b.u64(24)),
    uuid,
    metaUuid: (incompat & INCOMPAT.META_UUID) !== 0 ? uuidText(b.sub(248, 16)) : uuid,
    label: b.cString(108, 12),
    logstart: Number(b.u64(48)),
    rootino: Number(b.u64(56)),
    agblocks: b.u32(84),
    agcount: b.u32(88),
    logblocks: b.u32(96),
    sectorBytes: b.u16(102),
    inodeBytes: b.u16(104),
    inodesPerBlock: b.u16(106),
    blockLog: b.u8(120),
    sectorLog: b.u8(121),
    inodeLog: b.u8(122),
    inopblog: b.u8(123),
    agblklog: b.u8(124),
    inProgress: b.u8(126),
    inodeAlignment: b.u32(180),
    dirBlockLog: b.u8(192),
    versionBits: versionnum & 0xfff0,
    features2: (versionnum & VERSION_BITS.MOREBITS) !== 0 ? b.u32(200) : 0,
    roCompat: v5 ? b.u32(212) : 0,
    incompat,
    logIncompat: v5 ? b.u32(220) : 0,
  }
}

/** The low nibble of sb_versionnum: 1 to 5. */
export function superblockVersion(bytes: Uint8Array): number {
  return new Bytes(bytes, 'big').u16(100) & 0xf
}

/** `sector` is the whole first sector, as long as the superblock says a sector is. */
export function superblockCrcMatches(sector: Uint8Array): boolean {
  return crcMatches(sector, SB_CRC_AT)
}

// ---- checksums --------------------------------------------------------------------------------------------------

const FOUR_ZEROS = new Uint8Array(4)

/** CRC-32C of `bytes` with the four bytes at `crcAt` taken as zero, against the little-endian value stored there. */
export function crcMatches(bytes: Uint8Array, crcAt: number): boolean {
  const before = crc32c(bytes.subarray(0, crcAt))
  const computed = crc32c(bytes.subarray(crcAt + 4), crc32c(FOUR_ZEROS, before))
  return computed === new Bytes(bytes, 'little').u32(crcAt)
}

// ---- allocation group headers -----------------------------------------------------------------------------------

/** Sector of the AG in which each header stands. */
export const AG_SECTOR = { SB: 0, AGF: 1, AGI: 2, AGFL: 3 } as const
export const AG_HEADER_SECTORS = 4

export const AGF_MAGIC = 0x58414746 // "XAGF"
export const AGF_CRC_AT = 216
export const AGF_LSN_AT = 208
export const AGF_UUID_AT = 64

export interface Agf {
  readonly magic: number
  readonly versionnum: number
  readonly seqno: number
  readonly length: number
  readonly bnoRoot: number
  readonly cntRoot: number
  readonly rmapRoot: number
  readonly bnoLevel: number
  readonly cntLevel: number
  readonly rmapLevel: number
  readonly flfirst: number
  readonly fllast: number
  readonly flcount: number
  readonly freeblks: number
  readonly longest: number
  readonly refcountRoot: number
  readonly refcountLevel: number
}

export function decodeAgf(bytes: Uint8Array): Agf {
  const b = new Bytes(bytes, 'big', 'AGF')
  return {
    magic: b.u32(0),
    versionnum: b.u32(4),
    seqno: b.u32(8),
    length: b.u32(12),
    bnoRoot: b.u32(16),
    cntRoot: b.u32(20),
    rmapRoot: b.u32(24),
    bnoLevel: b.u32(28),
    cntLevel: b.u32(32),
    rmapLevel: b.u32(36),
    flfirst: b.u32(40),
    fllast: b.u32(44),
    flcount: b.u32(48),
    freeblks: b.u32(52),
    longest: b.u32(56),
    refcountRoot: b.u32(88),
    refcountLevel: b.u32(92),
  }
}

export const AGFL_MAGIC = 0x5841464c // "XAFL"
export const AGFL_CRC_AT = 32
export const AGFL_LSN_AT = 24
export const AGFL_UUID_AT = 8
/** Bytes before the first entry: the v5 header, nothing in v4. */
export function agflHeaderBytes(version: 4 | 5): number {
  return version === 5 ? 36 : 0
}

export const AGI_MAGIC = 0x58414749 // "XAGI"
export const AGI_CRC_AT = 312
export const AGI_LSN_AT = 320
export const AGI_UUID_AT = 296

export interface Agi {
  readonly magic: number
  readonly seqno: number
  readonly length: number
  readonly count: number
  readonly root: number
  readonly level: number
  readonly freeRoot: number
  readonly freeLevel: number
}

export function decodeAgi(bytes: Uint8Array): Agi {
  const b = new Bytes(bytes, 'big', 'AGI')
  return {
    magic: b.u32(0),
    seqno: b.u32(8),
    length: b.u32(12),
    count: b.u32(16),
    root: b.u32(20),
    level: b.u32(24),
    freeRoot: b.u32(328),
    freeLevel: b.u32(332),
  }
}

// ---- btree blocks -----------------------------------------------------------------------------------------------

/** Magic of each btree, [v4, v5]. */
export const BTREE_MAGIC = {
  bno: [0x41425442, 0x41423342], // "ABTB" "AB3B"
  cnt: [0x41425443, 0x41423343], // "ABTC" "AB3C"
  ino: [0x49414254, 0x49414233], // "IABT" "IAB3"
  fino: [0x46494254, 0x46494233], // "FIBT" "FIB3"
  rmap: [0, 0x524d4233], // "RMB3"
  refcount: [0, 0x52334643], // "R3FC"
  bmap: [0x424d4150, 0x424d4133], // "BMAP" "BMA3"
} as const

export const NULL_AGBNO = 0xffffffff
/** A btree of more levels than this cannot be: the least fan-out still covers 2^32 blocks. */
export const MAX_LEVELS = 12

/** Where the fields of a btree block stand: *short* (32-bit pointers, inside an AG) or *long* (64-bit, bmap). */
export interface BtreeShape {
  readonly headerBytes: number
  readonly siblingBytes: 4 | 8
  /** v5 only; -1 in v4. */
  readonly blknoAt: number
  readonly lsnAt: number
  readonly uuidAt: number
  readonly ownerAt: number
  readonly crcAt: number
}

const NOT_THERE = { blknoAt: -1, lsnAt: -1, uuidAt: -1, ownerAt: -1, crcAt: -1 }

export const SHORT: Readonly<Record<4 | 5, BtreeShape>> = {
  4: { headerBytes: 16, siblingBytes: 4, ...NOT_THERE },
  5: { headerBytes: 56, siblingBytes: 4, blknoAt: 16, lsnAt: 24, uuidAt: 32, ownerAt: 48, crcAt: 52 },
}
export const LONG: Readonly<Record<4 | 5, BtreeShape>> = {
  4: { headerBytes: 24, siblingBytes: 8, ...NOT_THERE },
  5: { headerBytes: 72, siblingBytes: 8, blknoAt: 24, lsnAt: 32, uuidAt: 40, ownerAt: 56, crcAt: 64 },
}

export interface BtreeHeader {
  readonly magic: number
  readonly level: number
  readonly numrecs: number
  readonly leftsib: bigint
  readonly rightsib: bigint
}

export function decodeBtreeHeader(b: Bytes, shape: BtreeShape): BtreeHeader {
  const sibling = (at: number): bigint => (shape.siblingBytes === 4 ? BigInt(b.u32(at)) : b.u64(at))
  return {
    magic: b.u32(0),
    level: b.u16(4),
    numrecs: b.u16(6),
    leftsib: sibling(8),
    rightsib: sibling(8 + shape.siblingBytes),
  }
}

// ---- last log sequence number of a block, as log recovery looks for it -----------------------------------------

const LSN_PLACES: ReadonlyMap<number, { readonly lsnAt: number; readonly uuidAt: number }> = new Map([
  ...[
    ...BTREE_MAGIC.bno,
    ...BTREE_MAGIC.cnt,
    ...BTREE_MAGIC.ino,
    ...BTREE_MAGIC.fino,
    BTREE_MAGIC.rmap[1],
    BTREE_MAGIC.refcount[1],
  ].map((magic) => [magic, { lsnAt: 24, uuidAt: 32 }] as const),
  ...BTREE_MAGIC.bmap.map((magic) => [magic, { lsnAt: 32, uuidAt: 40 }] as const),
  [AGF_MAGIC, { lsnAt: AGF_LSN_AT, uuidAt: AGF_UUID_AT }],
  [AGFL_MAGIC, { lsnAt: AGFL_LSN_AT, uuidAt: AGFL_UUID_AT }],
  [AGI_MAGIC, { lsnAt: AGI_LSN_AT, uuidAt: AGI_UUID_AT }],
  [0x58534c4d, { lsnAt: 48, uuidAt: 16 }], // XSLM: remote symlink
  [0x58444233, { lsnAt: 16, uuidAt: 24 }], // XDB3: directory block
  [0x58444433, { lsnAt: 16, uuidAt: 24 }], // XDD3: directory data
  [0x58444633, { lsnAt: 16, uuidAt: 24 }], // XDF3: directory free index
  [SB_MAGIC, { lsnAt: 240, uuidAt: 32 }],
])
/** Directory and attribute blocks keep a 16-bit magic at 8: LEAF1, LEAFN, NODE of v5, and the attribute leaf. */
const DA_MAGICS: ReadonlySet<number> = new Set([0x3df1, 0x3dff, 0x3ebe, 0x3bee])

/**
 * The LSN stamped into a v5 metadata block when it was last written, or undefined where the bytes are no block of
 * this file system that carries one: such a buffer is replayed whatever it holds.
 */
export function blockLsn(bytes: Uint8Array, sb: Superblock): bigint | undefined {
  if (sb.version !== 5 || bytes.length < 64) return undefined
  const b = new Bytes(bytes, 'big')
  const magic = b.u32(0)
  let place = LSN_PLACES.get(magic)
  if (magic === SB_MAGIC && sb.metaUuid !== sb.uuid) place = { lsnAt: 240, uuidAt: 248 }
  if (!place && DA_MAGICS.has(b.u16(8))) place = { lsnAt: 24, uuidAt: 32 }
  if (!place || bytes.length < place.lsnAt + 8) return undefined
  if (uuidText(b.sub(place.uuidAt, 16)) !== sb.metaUuid) return undefined
  const lsn = b.i64(place.lsnAt)
  return lsn === 0n || lsn === -1n ? undefined : lsn
}

// ---- the log ----------------------------------------------------------------------------------------------------

export const LOG_MAGIC = 0xfeedbabe
/** One header block holds the first words of this many data blocks; every further 64 need one more. */
export const CYCLE_WORDS = 64
/** Largest in-memory log buffer, thus the largest record, of a v2 and a v1 log; there are at most eight of them. */
export const MAX_RECORD_BYTES: Readonly<Record<1 | 2, number>> = { 1: 32 * 1024, 2: 256 * 1024 }
export const MAX_ICLOGS = 8
export const LOG_FORMAT_LINUX_LE = 1

/** Bytes of the record header under its checksum: 64-bit hosts count the trailing padding, i386 does not. */
const HEADER_CRC_BYTES = [328, 324]
const EXTENDED_CRC_BYTES = 4 + 4 * CYCLE_WORDS
const RECORD_CRC_AT = 32

export interface RecordHeader {
  readonly magic: number
  readonly cycle: number
  readonly version: number
  /** Bytes of data after the header blocks. */
  readonly length: number
  readonly lsn: bigint
  readonly tailLsn: bigint
  readonly crc: number
  readonly opCount: number
  readonly format: number
  readonly uuid: string
  readonly iclogBytes: number
  /** Basic blocks of header before the data. */
  readonly headerBlocks: number
  /** Basic blocks of data. */
  readonly dataBlocks: number
}

export function decodeRecordHeader(block: Uint8Array): RecordHeader {
  const b = new Bytes(block, 'big', 'log record header')
  const version = b.u32(8)
  const length = b.u32(12)
  const iclogBytes = b.u32(320)
  return {
    magic: b.u32(0),
    cycle: b.u32(4),
    version,
    length,
    lsn: b.u64(16),
    tailLsn: b.u64(24),
    crc: new Bytes(block, 'little').u32(RECORD_CRC_AT),
    opCount: b.u32(40),
    format: b.u32(300),
    uuid: uuidText(b.sub(304, 16)),
    iclogBytes,
    headerBlocks: (version & 2) !== 0 ? Math.max(1, Math.ceil(iclogBytes / (CYCLE_WORDS * BB))) : 1,
    dataBlocks: Math.ceil(length / BB),
  }
}

/** Cycle number of a log block: its first word, or the second where the first is the magic of a record. */
export function blockCycle(block: Uint8Array): number {
  const b = new Bytes(block, 'big')
  const first = b.u32(0)
  return first === LOG_MAGIC ? b.u32(4) : first
}

/** `record`: header blocks and data as they stand in the log, cycle numbers not yet restored. */
export function recordCrcMatches(record: Uint8Array, header: RecordHeader): boolean {
  const data = record.subarray(header.headerBlocks * BB, header.headerBlocks * BB + header.length)
  const extended = Math.ceil(header.length / (CYCLE_WORDS * BB)) - 1
  return HEADER_CRC_BYTES.some((bytes) => {
    let crc = crc32c(record.subarray(0, RECORD_CRC_AT))
    crc = crc32c(FOUR_ZEROS, crc)
    crc = crc32c(record.subarray(RECORD_CRC_AT + 4, bytes), crc)
    if ((header.version & 2) !== 0) {
      for (let i = 1; i <= extended && i < header.headerBlocks; i++) {
        crc = crc32c(record.subarray(i * BB, i * BB + EXTENDED_CRC_BYTES), crc)
      }
    }
    return crc32c(data, crc) === header.crc
  })
}

/** Puts back the words that the cycle numbers stand in for. Changes `record` in place; returns its data. */
export function restoreCycleData(record: Uint8Array, header: RecordHeader): Uint8Array {
  for (let block = 0; block < header.dataBlocks; block++) {
    const headerBlock = Math.floor(block / CYCLE_WORDS)
    const from = headerBlock === 0 ? 44 + block * 4 : headerBlock * BB + 4 + (block % CYCLE_WORDS) * 4
    record.copyWithin((header.headerBlocks + block) * BB, from, from + 4)
  }
  return record.subarray(header.headerBlocks * BB, header.headerBlocks * BB + header.length)
}

/** Flags and clients of a log operation (12 bytes: tid, len, clientid, flags, reserved). */
export const OP_BYTES = 12
export const OP = { START: 1, COMMIT: 2, CONTINUE: 4, WAS_CONT: 8, END: 0x10, UNMOUNT: 0x20 } as const
export const CLIENT = { TRANSACTION: 0x69, LOG: 0xaa } as const

export interface LogOperation {
  readonly tid: number
  readonly length: number
  readonly client: number
  readonly flags: number
}

export function decodeOperation(data: Uint8Array, at: number): LogOperation {
  const b = new Bytes(data, 'big', 'log operation')
  return { tid: b.u32(at), length: b.u32(at + 4), client: b.u8(at + 8), flags: b.u8(at + 9) }
}

export const TRANSACTION_MAGIC = 0x5452414e // "TRAN", in host order
export const TRANSACTION_HEADER_BYTES = 16
/** Regions of one item: 64 KiB in 128-byte chunks, every other one logged, and the format region. */
export const MAX_REGIONS = 257

export const ITEM = {
  EFI: 0x1236,
  EFD: 0x1237,
  IUNLINK: 0x1238,
  INODE: 0x123b,
  BUF: 0x123c,
  DQUOT: 0x123d,
  QUOTAOFF: 0x123e,
  ICREATE: 0x123f,
  RUI: 0x1240,
  RUD: 0x1241,
  CUI: 0x1242,
  CUD: 0x1243,
  BUI: 0x1244,
  BUD: 0x1245,
  ATTRI: 0x1246,
  ATTRD: 0x1247,
  XMI: 0x1248,
  XMD: 0x1249,
} as const
export const ITEM_TYPES: ReadonlySet<number> = new Set(Object.values(ITEM))

/** Granularity of a logged buffer: one bit of the item's map. */
export const CHUNK = 128
export const BUF_FLAG = { INODE_BUF: 1, CANCEL: 2, UDQUOT: 4, PDQUOT: 8, GDQUOT: 16 } as const
/** What a logged buffer holds, from the top five bits of its flags. */
export const BUF_TYPE = { UNKNOWN: 0, BTREE: 4, AGF: 5, AGFL: 6, AGI: 7, SB: 18 } as const

export interface BufferFormat {
  readonly type: number
  /** Regions of the item, this one included. */
  readonly size: number
  readonly flags: number
  readonly bufferType: number
  /** Length in basic blocks. */
  readonly length: number
  /** Address in basic blocks. */
  readonly blkno: number
  readonly mapWords: number
}

const BUFFER_FORMAT_BYTES = 20
/** A buffer is at most 64 KiB: 512 chunks. One word more is what the kernel's structure has room for. */
const MAX_MAP_WORDS = 17

/** The format region of a buffer item; undefined where it contradicts itself. */
export function decodeBufferFormat(region: Uint8Array): BufferFormat | undefined {
  if (region.length < BUFFER_FORMAT_BYTES) return undefined
  const b = new Bytes(region, 'little', 'buffer log item')
  const mapWords = b.u32(16)
  const blkno = b.i64(8)
  if (mapWords > MAX_MAP_WORDS || region.length < BUFFER_FORMAT_BYTES + mapWords * 4) return undefined
  if (blkno < 0n || blkno > BigInt(2 ** 44)) return undefined
  const flags = b.u16(4)
  return {
    type: b.u16(0),
    size: b.u16(2),
    flags,
    bufferType: flags >>> 11,
    length: b.u16(6),
    blkno: Number(blkno),
    mapWords,
  }
}

/** Runs of dirty chunks [first, end) of a buffer item, ascending. */
export function dirtyRuns(region: Uint8Array, format: BufferFormat): { first: number; end: number }[] {
  const b = new Bytes(region, 'little', 'buffer log item')
  const runs: { first: number; end: number }[] = []
  for (let bit = 0; bit < format.mapWords * 32; bit++) {
    if (((b.u32(BUFFER_FORMAT_BYTES + Math.floor(bit / 32) * 4) >>> (bit % 32)) & 1) === 0) continue
    const last = runs.at(-1)
    if (last?.end === bit) last.end = bit + 1
    else runs.push({ first: bit, end: bit + 1 })
  }
  return runs
}
