/**
 * Fast commits: small records at the journal's end, valid only on top of the last transaction of the log, that say
 * what changed since without logging any bitmap. On recovery the kernel gives each file the blocks that the
 * records name, so those blocks are in use though no bitmap says so.
 *
 * Specification: the kernel's Documentation/filesystems/ext4/journal.rst, "Fast commits". Records are
 * `tag u16, length u16, value`, little-endian, and do not cross blocks.
 *
 * Rule: taken in use is every block that any record names up to the first thing that is not a record of this
 * transaction. The kernel stops earlier (at the last tail whose checksum is right) and frees what DEL_RANGE names;
 * both only make its answer smaller than this one. Blocks that its replay allocates anew are not read from disk.
 */
import { Bytes } from '../../base/index.ts'
import { NotTrusted } from '../file-system.ts'
import type { Superblock } from './layout.ts'
import { aboutOf } from './superblock.ts'

const TAG = {
  addRange: 1,
  delRange: 2,
  create: 3,
  link: 4,
  unlink: 5,
  inode: 6,
  pad: 7,
  tail: 8,
  head: 9,
} as const
const LAST_TAG = TAG.head
const TL_BYTES = 4
const EXTENT_MAGIC = 0xf30a
const EXTENTS_FLAG = 0x80000

export interface FastCommitScan {
  /** Tails of this transaction seen. */
  readonly commits: number
  /** Blocks that the records name. */
  readonly blocks: readonly { readonly start: number; readonly end: number }[]
}

/**
 * Reads the fast commits that follow transaction `sequence - 1`.
 * @param read a block of the journal by its index
 * @param area blocks of the journal kept for fast commits
 * @throws NotTrusted (`ext-fast-commit`)
 */
export async function scanFastCommits(
  fs: Superblock,
  read: (index: number) => Promise<Uint8Array>,
  area: { readonly from: number; readonly to: number },
  sequence: number,
): Promise<FastCommitScan> {
  const blocks: { start: number; end: number }[] = []
  let commits = 0
  // Kernels leave the first block of the area unused; look at it all the same.
  let index = area.from
  while (index < area.to && index <= area.from + 1 && !startsWithHead(await read(index), sequence)) index++
  if (index >= area.to || index > area.from + 1) return { commits, blocks }

  for (; index < area.to; index++) {
    const b = new Bytes(await read(index), 'little', 'fast commit block')
    for (let at = 0; at + TL_BYTES <= b.length; ) {
      const tag = b.u16(at)
      const length = b.u16(at + 2)
      const value = at + TL_BYTES
      if (tag === 0 || tag > LAST_TAG || value + length > b.length) return { commits, blocks }
      if (tag === TAG.head) {
        if (length < 8 || b.u32(value + 4) !== sequence) return { commits, blocks }
        if (b.u32(value) !== 0) throw untrusted(fs, `features ${b.u32(value)}`)
      } else if (tag === TAG.tail) {
        if (length < 8 || b.u32(value) !== sequence) return { commits, blocks }
        commits++
      } else if (tag === TAG.addRange) {
        if (length < 16) return { commits, blocks }
        addExtent(fs, blocks, b, value + 4)
      } else if (tag === TAG.inode) {
        if (length < 4 + 128) return { commits, blocks }
        addInode(fs, blocks, b, value + 4)
      }
      at = value + length
    }
  }
  return { commits, blocks }
}

function startsWithHead(block: Uint8Array, sequence: number): boolean {
  const b = new Bytes(block, 'little', 'fast commit block')
  return b.u16(0) === TAG.head && b.u16(2) >= 8 && b.u32(8) === sequence
}

/** An extent as an extent leaf has it. */
function addExtent(fs: Superblock, blocks: { start: number; end: number }[], b: Bytes, at: number): void {
  const stored = b.u16(at + 4)
  const length = stored > 32768 ? stored - 32768 : stored
  add(fs, blocks, b.u32(at + 8) + b.u16(at + 6) * 2 ** 32, length)
}

/** The extents in the inode itself and its attribute block: the kernel sets both from elsewhere, so only more. */
function addInode(fs: Superblock, blocks: { start: number; end: number }[], b: Bytes, at: number): void {
  const acl = b.u32(at + 0x68) + b.u16(at + 0x76) * 2 ** 32
  if (acl !== 0) add(fs, blocks, acl, 1)
  const root = at + 0x28
  if (!(b.u32(at + 0x20) & EXTENTS_FLAG) || b.u16(root) !== EXTENT_MAGIC) return
  const entries = Math.min(b.u16(root + 2), 4)
  for (let i = 0; i < entries; i++) {
    const entry = root + 12 + i * 12
    if (b.u16(root + 6) === 0) addExtent(fs, blocks, b, entry)
    else add(fs, blocks, b.u32(entry + 4) + b.u16(entry + 8) * 2 ** 32, 1)
  }
}

function add(fs: Superblock, blocks: { start: number; end: number }[], start: number, length: number): void {
  if (length === 0 || start < fs.firstDataBlock || start + length > fs.blocksCount) {
    throw untrusted(fs, `${length} blocks at ${start}, outside the file system`)
  }
  blocks.push({ start, end: start + length })
}

function untrusted(fs: Superblock, found: string): NotTrusted {
  return new NotTrusted(
    'ext-fast-commit',
    `Cannot replay the fast commits of ${fs.kind}: found ${found}`,
    aboutOf(fs),
  )
}
