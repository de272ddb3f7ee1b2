/**
 * On-disk layout of ext2, ext3 and ext4: superblock, group descriptors, where the copies of both stand, and the
 * checksums over them. Little-endian. No I/O, no judgement: `superblock.ts` decides what is believed.
 *
 * Specification: the kernel's Documentation/filesystems/ext4 ("Data Structures and Algorithms"). Field names are
 * the specification's without their `s_`/`bg_` prefix, in camel case. docs/formats/ext.md has the byte tables.
 *
 * "Block" is the file system's block, "cluster" the unit of its block bitmap (equal without BIGALLOC). Block
 * numbers are counted from the start of the device.
 */
import { Bytes, rawCrc16, rawCrc32c, uuidText } from '../../base/index.ts'

/** Bytes from the start of the device to the superblock, and the superblock's length. */
export const SUPERBLOCK_OFFSET = 1024
export const SUPERBLOCK_BYTES = 1024
export const MAGIC = 0xef53

export const STATE = { valid: 1, error: 2, orphans: 4 } as const

export const COMPAT = {
  hasJournal: 0x4,
  resizeInode: 0x10,
  sparseSuper2: 0x200,
  fastCommit: 0x400,
  orphanFile: 0x1000,
} as const

export const INCOMPAT = {
  filetype: 0x2,
  recover: 0x4,
  journalDev: 0x8,
  metaBg: 0x10,
  extents: 0x40,
  bits64: 0x80,
  mmp: 0x100,
  flexBg: 0x200,
  eaInode: 0x400,
  csumSeed: 0x2000,
  largeDir: 0x4000,
  inlineData: 0x8000,
  encrypt: 0x10000,
  casefold: 0x20000,
} as const

export const RO_COMPAT = {
  sparseSuper: 0x1,
  largeFile: 0x2,
  btreeDir: 0x4,
  hugeFile: 0x8,
  gdtCsum: 0x10,
  dirNlink: 0x20,
  extraIsize: 0x40,
  quota: 0x100,
  bigalloc: 0x200,
  metadataCsum: 0x400,
  readonly: 0x1000,
  project: 0x2000,
  verity: 0x8000,
  orphanPresent: 0x10000,
} as const

/**
 * Every incompat bit whose meaning for the block bitmaps is known. COMPRESSION (0x1) and DIRDATA (0x1000) are left
 * out on purpose: no mainline kernel reads them.
 */
export const KNOWN_INCOMPAT: number = Object.values(INCOMPAT).reduce<number>((all, bit) => all | bit, 0)

/**
 * A reader may ignore unknown ro_compat bits, but only because the kernel then never writes: BIGALLOC itself is one
 * of them and changes what a bit of the bitmap means. So an unknown one (also HAS_SNAPSHOT 0x80, REPLICA 0x800,
 * SHARED_BLOCKS 0x4000) is not believed either.
 */
export const KNOWN_RO_COMPAT: number = Object.values(RO_COMPAT).reduce<number>((all, bit) => all | bit, 0)

/** Features that ext3 and ext2 have; any other makes an ext4, as blkid says. */
const EXT3_INCOMPAT: number = INCOMPAT.filetype | INCOMPAT.recover | INCOMPAT.metaBg
const EXT3_RO_COMPAT: number = RO_COMPAT.sparseSuper | RO_COMPAT.largeFile | RO_COMPAT.btreeDir

/** Group descriptor: bit of `bg_flags`. Flags count only with GDT_CSUM or METADATA_CSUM. */
export const GROUP_FLAG = { inodeUninit: 1, blockUninit: 2, itableZeroed: 4 } as const

export interface Superblock {
  readonly kind: 'ext2' | 'ext3' | 'ext4'
  readonly uuid: string
  readonly label: string
  readonly compat: number
  readonly incompat: number
  readonly roCompat: number
  readonly state: number
  readonly revLevel: number
  readonly blocksCount: number
  readonly freeBlocksCount: number
  readonly firstDataBlock: number
  readonly logBlockSize: number
  readonly logClusterSize: number
  readonly blocksPerGroup: number
  readonly clustersPerGroup: number
  readonly inodesCount: number
  readonly inodesPerGroup: number
  readonly inodeSize: number
  readonly reservedGdtBlocks: number
  readonly firstMetaBg: number
  readonly backupBgs: readonly [number, number]
  readonly journalInum: number
  readonly journalDev: number
  readonly journalUuidIsSet: boolean
  /** Block of the multiple mount protection; 0 without it. */
  readonly mmpBlock: number
  /** `s_desc_size` as stored; `descBytes` is what counts. */
  readonly descSize: number
  readonly checksumType: number
  /** The checksum stored, and the one computed over the same bytes. */
  readonly checksum: { readonly stored: number; readonly computed: number }
  /** The register that every metadata_csum checksum goes on from. */
  readonly csumSeed: number
  readonly uuidBytes: Uint8Array

  // From here on derived; meaningful once `checkSuperblock` has passed.
  readonly blockBytes: number
  /** Blocks in a cluster: 1 without BIGALLOC. */
  readonly clusterBlocks: number
  readonly groupCount: number
  /** Bytes of one group descriptor. */
  readonly descBytes: number
  readonly descsPerBlock: number
  /** Blocks of the group descriptor table. */
  readonly gdtBlocks: number
  /** Blocks of the inode table of one group. */
  readonly itableBlocks: number
}

/** Decodes 1024 bytes. Never throws for their content; a nonsense block size gives nonsense derived fields. */
export function decodeSuperblock(raw: Uint8Array): Superblock {
  const b = new Bytes(raw, 'little', 'ext superblock')
  const compat = b.u32(0x5c)
  const incompat = b.u32(0x60)
  const roCompat = b.u32(0x64)
  const revLevel = b.u32(0x4c)
  const bits64 = (incompat & INCOMPAT.bits64) !== 0
  const wide = (low: number, high: number): number => b.u32(low) + (bits64 ? b.u32(high) * 2 ** 32 : 0)
  const logBlockSize = b.u32(0x18)
  const logClusterSize = b.u32(0x1c)
  const blockBytes = logBlockSize <= 6 ? 1024 * 2 ** logBlockSize : 1024
  const bigalloc = (roCompat & RO_COMPAT.bigalloc) !== 0
  const clusterBlocks =
    bigalloc && logClusterSize >= logBlockSize && logClusterSize - logBlockSize <= 20
      ? 2 ** (logClusterSize - logBlockSize)
      : 1
  const blocksCount = wide(0x04, 0x150)
  const firstDataBlock = b.u32(0x14)
  const blocksPerGroup = b.u32(0x20)
  const inodesPerGroup = b.u32(0x28)
  const inodeSize = revLevel === 0 ? 128 : b.u16(0x58)
  const groupCount =
    blocksPerGroup > 0 ? Math.max(0, Math.ceil((blocksCount - firstDataBlock) / blocksPerGroup)) : 0
  const descBytes = bits64 ? b.u16(0xfe) : 32
  const descsPerBlock = Math.floor(blockBytes / Math.max(1, descBytes))
  const uuidBytes = b.sub(0x68, 16)
  return {
    kind:
      (incompat & ~EXT3_INCOMPAT) !== 0 || (roCompat & ~EXT3_RO_COMPAT) !== 0
        ? 'ext4'
        : compat & COMPAT.hasJournal
          ? 'ext3'
          : 'ext2',
    uuid: uuidText(uuidBytes),
    label: b.cString(0x78, 16),
    compat,
    incompat,
    roCompat,
    state: b.u16(0x3a),
    revLevel,
    blocksCount,
    freeBlocksCount: wide(0x0c, 0x158),
    firstDataBlock,
    logBlockSize,
    logClusterSize,
    blocksPerGroup,
    clustersPerGroup: b.u32(0x24),
    inodesCount: b.u32(0x00),
    inodesPerGroup,
    inodeSize,
    reservedGdtBlocks: b.u16(0xce),
    firstMetaBg: b.u32(0x104),
    backupBgs: [b.u32(0x24c), b.u32(0x250)],
    journalInum: b.u32(0xe0),
    journalDev: b.u32(0xe4),
    journalUuidIsSet: b.sub(0xd0, 16).some((byte) => byte !== 0),
    mmpBlock: incompat & INCOMPAT.mmp ? b.u32(0x168) + b.u32(0x16c) * 2 ** 32 : 0,
    descSize: b.u16(0xfe),
    checksumType: b.u8(0x175),
    checksum: { stored: b.u32(0x3fc), computed: rawCrc32c(b.sub(0, 0x3fc), 0xffffffff) },
    csumSeed: incompat & INCOMPAT.csumSeed ? b.u32(0x270) : rawCrc32c(uuidBytes, 0xffffffff),
    uuidBytes,
    blockBytes,
    clusterBlocks,
    groupCount,
    descBytes,
    descsPerBlock,
    gdtBlocks: Math.ceil(groupCount / Math.max(1, descsPerBlock)),
    itableBlocks: Math.ceil((inodesPerGroup * inodeSize) / blockBytes),
  }
}

export function has(flags: number, bit: number): boolean {
  return (flags & bit) !== 0
}

/** Metadata carries CRC-32C. Wins over GDT_CSUM where both are set, as in the kernel. */
export function hasMetadataCsum(sb: Superblock): boolean {
  return has(sb.roCompat, RO_COMPAT.metadataCsum)
}

/** Group descriptors carry a checksum, so their flags count. */
export function hasGroupCsum(sb: Superblock): boolean {
  return has(sb.roCompat, RO_COMPAT.metadataCsum | RO_COMPAT.gdtCsum)
}

export function groupFirstBlock(sb: Superblock, group: number): number {
  return sb.firstDataBlock + group * sb.blocksPerGroup
}

/** First block after the group. */
export function groupEndBlock(sb: Superblock, group: number): number {
  return Math.min(groupFirstBlock(sb, group) + sb.blocksPerGroup, sb.blocksCount)
}

/** Clusters that exist in the group: bits of its bitmap that count. */
export function groupClusters(sb: Superblock, group: number): number {
  return Math.ceil((groupEndBlock(sb, group) - groupFirstBlock(sb, group)) / sb.clusterBlocks)
}

/** True when the group starts with a copy of the superblock. */
export function groupHasSuper(sb: Superblock, group: number): boolean {
  if (group === 0) return true
  if (has(sb.compat, COMPAT.sparseSuper2)) return group === sb.backupBgs[0] || group === sb.backupBgs[1]
  if (group === 1 || !has(sb.roCompat, RO_COMPAT.sparseSuper)) return true
  return isPowerOf(group, 3) || isPowerOf(group, 5) || isPowerOf(group, 7)
}

function isPowerOf(value: number, base: number): boolean {
  let power = base
  while (power < value) power *= base
  return power === value
}

/** Block that holds block `index` of the (primary) group descriptor table. */
export function gdtBlock(sb: Superblock, index: number): number {
  // With 1 KiB blocks the superblock is block 1, even where first_data_block is 0 (BIGALLOC).
  const superblockBlock = sb.blockBytes === 1024 ? 1 : 0
  if (!has(sb.incompat, INCOMPAT.metaBg) || index < sb.firstMetaBg) return superblockBlock + 1 + index
  const group = index * sb.descsPerBlock
  let skip = groupHasSuper(sb, group) ? 1 : 0
  if (index === 0 && sb.blockBytes === 1024 && sb.firstDataBlock === 0) skip++
  return groupFirstBlock(sb, group) + skip
}

/**
 * Blocks at the start of a group that hold its copies of the superblock and of the group descriptor table, and
 * the blocks reserved for that table's growth. Where the kernel and e2fsprogs disagree (reserved blocks together
 * with META_BG) the larger answer is given.
 */
export function groupBaseBlocks(sb: Superblock, group: number): number {
  const hasSuper = groupHasSuper(sb, group) ? 1 : 0
  const metaGroup = Math.floor(group / sb.descsPerBlock)
  const metaBg = has(sb.incompat, INCOMPAT.metaBg)
  if (metaBg && metaGroup >= sb.firstMetaBg) {
    const place = group % sb.descsPerBlock
    return hasSuper + (place <= 1 || place === sb.descsPerBlock - 1 ? 1 : 0)
  }
  return hasSuper ? 1 + (metaBg ? sb.firstMetaBg : sb.gdtBlocks) + sb.reservedGdtBlocks : 0
}

/**
 * The group descriptor table as bytes, read by index: no object for each group, because a 16 TiB file system has
 * 131,072 of them.
 */
export class GroupDescriptors {
  readonly count: number
  readonly bytes: Uint8Array
  readonly #view: DataView
  readonly #size: number
  readonly #wide: boolean
  readonly #sb: Superblock

  /** `bytes`: the blocks of the table one after another, at least `sb.groupCount` descriptors. */
  constructor(sb: Superblock, bytes: Uint8Array) {
    this.#sb = sb
    this.count = sb.groupCount
    this.bytes = bytes
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    this.#size = sb.descBytes
    this.#wide = sb.descBytes >= 64
  }

  blockBitmap(group: number): number {
    return this.#block(group, 0x00, 0x20)
  }
  inodeBitmap(group: number): number {
    return this.#block(group, 0x04, 0x24)
  }
  inodeTable(group: number): number {
    return this.#block(group, 0x08, 0x28)
  }
  /** In clusters. */
  freeBlocksCount(group: number): number {
    return this.#count(group, 0x0c, 0x2c)
  }
  /** Inodes at the end of the group's table that were never used; counts only with a group checksum. */
  itableUnused(group: number): number {
    return this.#count(group, 0x1c, 0x32)
  }
  /** 0 unless descriptors carry a checksum. */
  flags(group: number): number {
    return hasGroupCsum(this.#sb) ? this.#view.getUint16(group * this.#size + 0x12, true) : 0
  }
  blockUninit(group: number): boolean {
    return has(this.flags(group), GROUP_FLAG.blockUninit)
  }
  inodeUninit(group: number): boolean {
    return has(this.flags(group), GROUP_FLAG.inodeUninit)
  }

  raw(group: number): Uint8Array {
    return this.bytes.subarray(group * this.#size, (group + 1) * this.#size)
  }

  /** True when the descriptor's own checksum is right, or there is none to check. */
  checksumIsRight(group: number): boolean {
    const sb = this.#sb
    if (!hasGroupCsum(sb)) return true
    const at = group * this.#size
    const stored = this.#view.getUint16(at + 0x1e, true)
    const number = Uint8Array.of(group, group >>> 8, group >>> 16, group >>> 24)
    const head = this.bytes.subarray(at, at + 0x1e)
    const tail = this.bytes.subarray(at + 0x20, at + this.#size)
    if (hasMetadataCsum(sb)) {
      let crc = rawCrc32c(head, rawCrc32c(number, sb.csumSeed))
      crc = rawCrc32c(tail, rawCrc32c(TWO_ZEROS, crc))
      return (crc & 0xffff) === stored
    }
    let crc = rawCrc16(head, rawCrc16(number, rawCrc16(sb.uuidBytes, 0xffff)))
    if (has(sb.incompat, INCOMPAT.bits64)) crc = rawCrc16(tail, crc)
    return crc === stored
  }

  /** True when `bitmap`, the group's block bitmap, has the checksum that the descriptor says, or there is none. */
  blockBitmapIsRight(group: number, bitmap: Uint8Array): boolean {
    return this.#bitmapIsRight(group, bitmap.subarray(0, this.#sb.clustersPerGroup / 8), 0x18, 0x38)
  }

  /** The same for the group's inode bitmap. */
  inodeBitmapIsRight(group: number, bitmap: Uint8Array): boolean {
    return this.#bitmapIsRight(group, bitmap.subarray(0, this.#sb.inodesPerGroup / 8), 0x1a, 0x3a)
  }

  #bitmapIsRight(group: number, bitmap: Uint8Array, low: number, high: number): boolean {
    if (!hasMetadataCsum(this.#sb)) return true
    const at = group * this.#size
    const crc = rawCrc32c(bitmap, this.#sb.csumSeed)
    if (this.#view.getUint16(at + low, true) !== (crc & 0xffff)) return false
    return !this.#wide || this.#view.getUint16(at + high, true) === crc >>> 16
  }

  #block(group: number, low: number, high: number): number {
    const at = group * this.#size
    const bottom = this.#view.getUint32(at + low, true)
    return this.#wide ? bottom + this.#view.getUint32(at + high, true) * 2 ** 32 : bottom
  }

  #count(group: number, low: number, high: number): number {
    const at = group * this.#size
    const bottom = this.#view.getUint16(at + low, true)
    return this.#wide ? bottom + this.#view.getUint16(at + high, true) * 2 ** 16 : bottom
  }
}

const TWO_ZEROS: Uint8Array = new Uint8Array(2)
