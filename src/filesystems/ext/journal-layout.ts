/**
 * On-disk layout of the journal (JBD2). Big-endian. No I/O: superblock, block headers, tags of a descriptor block,
 * revoke records, and the checksums over them.
 *
 * Specification: the kernel's Documentation/filesystems/ext4/journal.rst; its field names in camel case. The
 * journal's block size is the file system's. docs/formats/ext.md has the byte tables.
 */
import { Bytes, crc32, rawCrc32c } from '../../base/index.ts'

export const JOURNAL_MAGIC = 0xc03b3998
export const HEADER_BYTES = 12
export const BLOCK_TYPE = { descriptor: 1, commit: 2, superblockV1: 3, superblockV2: 4, revoke: 5 } as const
export const JOURNAL_COMPAT = { checksum: 1 } as const
export const JOURNAL_INCOMPAT = {
  revoke: 0x1,
  bits64: 0x2,
  asyncCommit: 0x4,
  csumV2: 0x8,
  csumV3: 0x10,
  fastCommit: 0x20,
} as const
export const KNOWN_JOURNAL_INCOMPAT = 0x3f
/** Blocks at the journal's end for fast commits where the superblock says 0. */
export const DEFAULT_FAST_COMMIT_BLOCKS = 256
/** At least this many blocks are left for transactions beside the fast commits. */
export const MIN_JOURNAL_BLOCKS = 1024

const TAG_FLAG = { escape: 1, sameUuid: 2, lastTag: 8 } as const
const CHECKSUM_TYPE = { crc32: 1, crc32c: 4 } as const

export interface JournalSuperblock {
  readonly magic: number
  readonly blockType: number
  /** Bytes. */
  readonly blockSize: number
  /** Blocks in the journal. */
  readonly maxLen: number
  /** First block of the log. */
  readonly first: number
  /** Sequence of the first transaction expected. */
  readonly sequence: number
  /** Block where the log starts; 0: it is empty. */
  readonly start: number
  readonly errno: number
  readonly compat: number
  readonly incompat: number
  readonly roCompat: number
  readonly checksumType: number
  readonly fastCommitBlocks: number
  readonly csumSeed: number
  readonly checksumIsRight: boolean
}

/** Decodes the first 1024 bytes of the journal. */
export function decodeJournalSuperblock(raw: Uint8Array): JournalSuperblock {
  const b = new Bytes(raw, 'big', 'journal superblock')
  const blockType = b.u32(4)
  // Version 1 has no feature fields: what stands there is not theirs.
  const v2 = blockType === BLOCK_TYPE.superblockV2
  const incompat = v2 ? b.u32(0x28) : 0
  const copy = raw.slice(0, 1024)
  copy.fill(0, 0xfc, 0x100)
  return {
    magic: b.u32(0),
    blockType,
    blockSize: b.u32(0x0c),
    maxLen: b.u32(0x10),
    first: b.u32(0x14),
    sequence: b.u32(0x18),
    start: b.u32(0x1c),
    errno: b.i32(0x20),
    compat: v2 ? b.u32(0x24) : 0,
    incompat,
    roCompat: v2 ? b.u32(0x2c) : 0,
    checksumType: b.u8(0x50),
    fastCommitBlocks: b.u32(0x54),
    csumSeed: rawCrc32c(b.sub(0x30, 16), 0xffffffff),
    checksumIsRight: !hasCsum(incompat) || b.u32(0xfc) === rawCrc32c(copy, 0xffffffff),
  }
}

/** Checksums of version 2 or 3 on every block of the log. */
export function hasCsum(incompat: number): boolean {
  return (incompat & (JOURNAL_INCOMPAT.csumV2 | JOURNAL_INCOMPAT.csumV3)) !== 0
}

export function checksumTypeIsKnown(sb: JournalSuperblock): boolean {
  return !hasCsum(sb.incompat) || sb.checksumType === CHECKSUM_TYPE.crc32c
}

export interface BlockHeader {
  readonly blockType: number
  readonly sequence: number
}

/** The header of a block of the log; undefined where the magic is not there. */
export function decodeHeader(block: Uint8Array): BlockHeader | undefined {
  const b = new Bytes(block, 'big', 'journal block')
  return b.u32(0) === JOURNAL_MAGIC ? { blockType: b.u32(4), sequence: b.u32(8) } : undefined
}

export interface Tag {
  /** Block of the file system that the logged block replaces; may exceed 2^53. */
  readonly block: number
  /** The block starts with the journal's magic, which was zeroed in the log. */
  readonly escape: boolean
  /** As stored: 32 bits in version 3, 16 in version 2, else meaningless. */
  readonly checksum: number
}

/**
 * The tags of a descriptor block. All forms: 8 bytes (plain), 12 (64-bit), 10 and 14 (the same with checksum
 * version 2, whose two further bytes are padding), 16 (version 3); 16 bytes of UUID follow unless SAME_UUID.
 */
export function decodeTags(block: Uint8Array, incompat: number): Tag[] {
  const b = new Bytes(block, 'big', 'journal descriptor block')
  const v3 = (incompat & JOURNAL_INCOMPAT.csumV3) !== 0
  const bits64 = (incompat & JOURNAL_INCOMPAT.bits64) !== 0
  const padding = (incompat & JOURNAL_INCOMPAT.csumV2) !== 0 ? 2 : 0
  const tagBytes = v3 ? 16 : 8 + (bits64 ? 4 : 0) + padding
  const end = block.length - (hasCsum(incompat) ? 4 : 0)
  const tags: Tag[] = []
  for (let at = HEADER_BYTES; at + tagBytes <= end; ) {
    // Version 3 has 32 bits of flags of which the lower half, at the same place as the older 16, has a meaning.
    const flags = b.u16(at + 6)
    tags.push({
      block: b.u32(at) + (bits64 ? b.u32(at + 8) * 2 ** 32 : 0),
      escape: (flags & TAG_FLAG.escape) !== 0,
      checksum: v3 ? b.u32(at + 12) : b.u16(at + 4),
    })
    at += tagBytes + (flags & TAG_FLAG.sameUuid ? 0 : 16)
    if (flags & TAG_FLAG.lastTag) break
  }
  return tags
}

/** Block numbers of a revoke block; undefined when its count cannot be. */
export function decodeRevokes(block: Uint8Array, incompat: number): number[] | undefined {
  const b = new Bytes(block, 'big', 'journal revoke block')
  const bits64 = (incompat & JOURNAL_INCOMPAT.bits64) !== 0
  /** Bytes used, this header among them. */
  const count = b.u32(HEADER_BYTES)
  if (count > block.length - (hasCsum(incompat) ? 4 : 0)) return undefined
  const blocks: number[] = []
  const step = bits64 ? 8 : 4
  for (let at = HEADER_BYTES + 4; at + step <= count; at += step) {
    blocks.push(bits64 ? b.u32(at) * 2 ** 32 + b.u32(at + 4) : b.u32(at))
  }
  return blocks
}

/** True when the tail of a descriptor or revoke block is right, or there is none. */
export function tailIsRight(block: Uint8Array, sb: JournalSuperblock): boolean {
  return !hasCsum(sb.incompat) || fieldIsRight(block, block.length - 4, sb.csumSeed)
}

/** True when a commit block's own checksum (version 2 and 3) is right, or there is none. */
export function commitIsRight(block: Uint8Array, sb: JournalSuperblock): boolean {
  return !hasCsum(sb.incompat) || fieldIsRight(block, 0x10, sb.csumSeed)
}

/** CRC-32C over the block with the checksum's own four bytes as zeros. */
function fieldIsRight(block: Uint8Array, at: number, seed: number): boolean {
  let crc = rawCrc32c(block.subarray(0, at), seed)
  crc = rawCrc32c(FOUR_ZEROS, crc)
  crc = rawCrc32c(block.subarray(at + 4), crc)
  return new Bytes(block, 'big').u32(at) === crc
}

/** True when a logged block has the checksum that its tag says (version 2 and 3), or there is none. */
export function dataIsRight(block: Uint8Array, tag: Tag, sequence: number, sb: JournalSuperblock): boolean {
  if (!hasCsum(sb.incompat)) return true
  const number = new Bytes(new Uint8Array(4), 'big')
  number.setU32(0, sequence)
  const crc = rawCrc32c(block, rawCrc32c(number.bytes, sb.csumSeed))
  return tag.checksum === ((sb.incompat & JOURNAL_INCOMPAT.csumV3) !== 0 ? crc : crc & 0xffff)
}

export interface CommitHeader {
  /** Of the checksum over the whole transaction (compat CHECKSUM); type and size 0: there is none. */
  readonly checksumType: number
  readonly checksumSize: number
  readonly checksum: number
  /** Seconds since 1970 and nanoseconds as one number that only grows. */
  readonly time: bigint
}

export function decodeCommit(block: Uint8Array): CommitHeader {
  const b = new Bytes(block, 'big', 'journal commit block')
  return { checksumType: b.u8(12), checksumSize: b.u8(13), checksum: b.u32(16), time: b.u64(48) }
}

/** True when a transaction's checksum (compat CHECKSUM) is right or was not written. */
export function transactionIsRight(commit: CommitHeader, computed: number): boolean {
  if (commit.checksumType === 0 && commit.checksumSize === 0 && commit.checksum === 0) return true
  return (
    commit.checksumType === CHECKSUM_TYPE.crc32 && commit.checksumSize === 4 && commit.checksum === computed
  )
}

/**
 * CRC-32 most significant bit first, no inversion (compat CHECKSUM). The host has the reflected one: reversing
 * the bits of each byte, of the register before and of the result turns one into the other.
 */
export function crc32MsbFirst(bytes: Uint8Array, register: number): number {
  const reversed = bytes.map((byte) => REVERSED[byte]!)
  return reverse32(~crc32(reversed, ~reverse32(register) >>> 0))
}

function reverse32(value: number): number {
  return (
    ((REVERSED[value & 0xff]! << 24) |
      (REVERSED[(value >>> 8) & 0xff]! << 16) |
      (REVERSED[(value >>> 16) & 0xff]! << 8) |
      REVERSED[value >>> 24]!) >>>
    0
  )
}

const FOUR_ZEROS: Uint8Array = new Uint8Array(4)

const REVERSED: Uint8Array = Uint8Array.from({ length: 256 }, (_, byte) => {
  let out = 0
  for (let bit = 0; bit < 8; bit++) if (byte & (1 << bit)) out |= 0x80 >>> bit
  return out
})
