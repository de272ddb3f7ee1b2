/**
 * Inodes: their layout, the forks that say which blocks they own, and what log recovery would make of one.
 *
 * An inode is a core (100 bytes in v4, 176 in v5), then the data fork, then from `forkoff * 8` on the attribute fork.
 * A fork is local data, a list of extents, or the root of a btree of extents (*bmbt*).
 */
import { Bytes, uuidText } from '../../base/index.ts'
import { crcMatches, LONG, type Superblock } from './layout.ts'

export const INODE_MAGIC = 0x494e // "IN"
const INODE_CRC_AT = 100
const INODE_LSN_AT = 112
const FLAGS2_NREXT64 = 0x10n

export const FORK_FORMAT = { DEV: 0, LOCAL: 1, EXTENTS: 2, BTREE: 3, UUID: 4 } as const

export interface Fork {
  readonly name: 'data' | 'attribute'
  readonly format: number
  /** Extents that the core says it has. */
  readonly extents: number
  readonly bytes: Uint8Array
}

export interface Inode {
  readonly mode: number
  /** Blocks of both forks, their btrees included. */
  readonly nblocks: number
  readonly flags: number
  readonly forks: readonly Fork[]
}

/** True where `bytes` carry an inode of this number and file system; v4 inodes carry neither. */
export function isInode(bytes: Uint8Array, sb: Superblock, ino: number): boolean {
  const b = new Bytes(bytes, 'big', 'inode')
  if (b.u16(0) !== INODE_MAGIC) return false
  if (sb.version === 4) return b.u8(4) === 1 || b.u8(4) === 2
  return b.u8(4) === 3 && b.u64(152) === BigInt(ino) && uuidText(b.sub(160, 16)) === sb.metaUuid
}

export function inodeCrcMatches(bytes: Uint8Array, sb: Superblock): boolean {
  return sb.version === 4 || crcMatches(bytes, INODE_CRC_AT)
}

/** Undefined where the fields contradict each other. */
export function decodeInode(bytes: Uint8Array, sb: Superblock): Inode | undefined {
  const b = new Bytes(bytes, 'big', 'inode')
  const start = literalStart(sb)
  const forkOffset = b.u8(82) * 8
  const room = bytes.length - start
  if (forkOffset >= room) return undefined
  const wide = sb.version === 5 && (b.u64(120) & FLAGS2_NREXT64) !== 0n
  const forks: Fork[] = [
    {
      name: 'data',
      format: b.u8(5),
      extents: wide ? b.size64(24, 'nextents') : b.u32(76),
      bytes: b.sub(start, forkOffset || room),
    },
  ]
  if (forkOffset > 0) {
    forks.push({
      name: 'attribute',
      format: b.u8(83),
      extents: wide ? b.u32(76) : b.u16(80),
      bytes: b.sub(start + forkOffset, room - forkOffset),
    })
  }
  return { mode: b.u16(2), nblocks: b.size64(64, 'nblocks'), flags: b.u16(90), forks }
}

export function literalStart(sb: Superblock): number {
  return sb.version === 5 ? 176 : 100
}

export const EXTENT_BYTES = 16

export interface BmapExtent {
  readonly startoff: number
  readonly fsbno: number
  readonly count: number
}

/** unwritten:1 startoff:54 startblock:52 blockcount:21 */
export function decodeExtent(b: Bytes, at: number): BmapExtent {
  const high = b.u64(at)
  const low = b.u64(at + 8)
  return {
    startoff: Number((high >> 9n) & 0x3f_ffff_ffff_ffffn),
    fsbno: Number(((high & 0x1ffn) << 43n) | (low >> 21n)),
    count: Number(low & 0x1f_ffffn),
  }
}

/** The root of a bmbt as it stands in a fork: level, count, room for keys, pointers. */
export interface BmapRoot {
  readonly level: number
  readonly children: readonly { readonly key: bigint; readonly fsbno: number }[]
}

const ROOT_HEADER_BYTES = 4

export function decodeBmapRoot(fork: Uint8Array): BmapRoot | undefined {
  const b = new Bytes(fork, 'big', 'bmbt root')
  const most = Math.floor((fork.length - ROOT_HEADER_BYTES) / 16)
  const level = b.u16(0)
  const count = b.u16(2)
  if (level === 0 || count === 0 || count > most) return undefined
  const children = Array.from({ length: count }, (_, i) => ({
    key: b.u64(ROOT_HEADER_BYTES + i * 8),
    fsbno: Number(b.u64(ROOT_HEADER_BYTES + most * 8 + i * 8)),
  }))
  return { level, children }
}

// ---- an inode item of the log -----------------------------------------------------------------------------------

const LOGGED = { DDATA: 0x2, DEXT: 0x4, DBROOT: 0x8, ADATA: 0x40, AEXT: 0x80, ABROOT: 0x100 } as const
const LOGGED_DATA_FORK = LOGGED.DDATA | LOGGED.DEXT | LOGGED.DBROOT
const LOGGED_ATTRIBUTE_FORK = LOGGED.ADATA | LOGGED.AEXT | LOGGED.ABROOT

export interface InodePatch {
  readonly lsn: bigint
  readonly ino: number
  /** The buffer it lives in, basic blocks: a CANCEL of that buffer ends this item too. */
  readonly blkno: number
  readonly length: number
  readonly fields: number
  /** In the byte order of the host. */
  readonly core: Uint8Array
  readonly dataFork: Uint8Array | undefined
  readonly attributeFork: Uint8Array | undefined
}

/** From the regions of an inode item; undefined where they contradict each other. */
export function decodeInodeItem(regions: readonly Uint8Array[], lsn: bigint): InodePatch | undefined {
  const [format, core, ...forks] = regions
  // 32-bit hosts leave out the padding after dsize.
  if (!format || !core || (format.length !== 56 && format.length !== 52) || core.length < 96) return undefined
  const b = new Bytes(format, 'little', 'inode log item')
  const shift = format.length - 56
  const fields = b.u32(4)
  const dataFork = (fields & LOGGED_DATA_FORK) !== 0 ? forks.shift() : undefined
  const attributeFork = (fields & LOGGED_ATTRIBUTE_FORK) !== 0 ? forks.shift() : undefined
  if (new Bytes(core, 'little').u16(0) !== INODE_MAGIC) return undefined
  return {
    lsn,
    ino: Number(b.u64(16 + shift)),
    blkno: Number(b.i64(40 + shift)),
    length: b.u32(48 + shift),
    fields,
    core,
    dataFork,
    attributeFork,
  }
}

/** Fields of the core that are looked at here and wider than a byte: [offset, width]. */
const SWAPPED: readonly (readonly [number, number])[] = [
  [0, 2],
  [2, 2],
  [56, 8],
  [64, 8],
  [76, 4],
  [80, 2],
  [90, 2],
]
const SWAPPED_V4: readonly (readonly [number, number])[] = [[30, 2]]
const SWAPPED_V5: readonly (readonly [number, number])[] = [
  [24, 8],
  [120, 8],
  [152, 8],
]
const FLUSH_AT = 30

/**
 * Replays `patch` over the inode `bytes` in place, unless `onDisk` is newer. Only what `decodeInode` reads is made
 * good. False where nothing was done.
 */
export function applyInode(
  bytes: Uint8Array,
  onDisk: Bytes | undefined,
  patch: InodePatch,
  sb: Superblock,
): boolean {
  if (onDisk) {
    if (sb.version === 5) {
      const lsn = onDisk.i64(INODE_LSN_AT)
      if (lsn > 0n && lsn > patch.lsn) return false
    } else {
      const logged = new Bytes(patch.core, 'little').u16(FLUSH_AT)
      const disk = onDisk.u16(FLUSH_AT)
      // The counter starts anew after 0xffff.
      if (logged < disk && !(disk === 0xffff && logged < 0x7fff)) return false
    }
  }
  const core = patch.core.slice(0, Math.min(patch.core.length, literalStart(sb)))
  for (const [at, width] of [...SWAPPED, ...(sb.version === 5 ? SWAPPED_V5 : SWAPPED_V4)]) {
    if (at + width <= core.length) core.subarray(at, at + width).reverse()
  }
  bytes.set(core)
  const start = literalStart(sb)
  const forkOffset = bytes[82]! * 8
  if (forkOffset >= bytes.length - start) return true
  const data = bytes.subarray(start, forkOffset > 0 ? start + forkOffset : bytes.length)
  if (patch.dataFork) putFork(data, patch.dataFork, (patch.fields & LOGGED.DBROOT) !== 0, sb)
  if (patch.attributeFork && forkOffset > 0) {
    putFork(bytes.subarray(start + forkOffset), patch.attributeFork, (patch.fields & LOGGED.ABROOT) !== 0, sb)
  }
  return true
}

function putFork(fork: Uint8Array, logged: Uint8Array, isRoot: boolean, sb: Superblock): void {
  if (!isRoot) {
    fork.set(logged.subarray(0, fork.length))
    return
  }
  // A root is logged as it is in memory: as a whole btree block, with room for as many keys as it has pointers.
  const { headerBytes } = LONG[sb.version]
  const from = Math.floor((logged.length - headerBytes) / 16)
  const to = Math.floor((fork.length - ROOT_HEADER_BYTES) / 16)
  fork.fill(0)
  if (logged.length < headerBytes) return
  fork.set(logged.subarray(4, 8))
  const count = Math.min(new Bytes(logged, 'big').u16(6), from, to)
  fork.set(logged.subarray(headerBytes, headerBytes + count * 8), ROOT_HEADER_BYTES)
  const pointers = headerBytes + from * 8
  fork.set(logged.subarray(pointers, pointers + count * 8), ROOT_HEADER_BYTES + to * 8)
}
