/**
 * The second opinion: which blocks do the inodes own? Reads every allocated inode through the inode btrees, and for
 * each its extents, in both forks, with the blocks of their btrees. Nothing of it comes from the free-space trees, so
 * a block that is owned here and free there proves one of the two wrong.
 *
 * Not looked for: blocks that belong to no inode and hold nothing a file needs (free lists, reverse map, refcounts,
 * staging of copy-on-write).
 *
 * Rule: memory is bounded by the block map: owned ranges are joined as they come, and one batch of inodes is held.
 */
import { Bytes, mapBounded, throwIfAborted } from '../../base/index.ts'
import { RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import type { BlockReader } from './blocks.ts'
import { readAgHeaders } from './free-space.ts'
import {
  type BmapExtent,
  decodeBmapRoot,
  decodeExtent,
  decodeInode,
  EXTENT_BYTES,
  FORK_FORMAT,
  type Fork,
  type Inode,
  inodeCrcMatches,
  isInode,
} from './inodes.ts'
import { BTREE_MAGIC, decodeBtreeHeader, INCOMPAT, LONG, type Superblock } from './layout.ts'
import type { LogReplay } from './replay.ts'
import { walkShortTree } from './short-btree.ts'
import { agByte, agLength, headerBlocks, splitFsbno } from './superblock.ts'

const CHUNK_INODES = 64
/** One bit of the hole mask of a sparse chunk stands for this many inodes. */
const HOLE_INODES = 4
/** Chunks of 64 inodes read at a time. */
const BATCH_CHUNKS = 64
const PARALLEL_AGS = 4
const PARALLEL_TREES = 8
/** Blocks of one btree level read at a time. */
const BATCH_BLOCKS = 256
/** Ranges collected before they are joined. */
const JOIN_EVERY = 1 << 20
const NULL_FSBNO = 0xffff_ffff_ffff_ffffn

/** Bytes of the device that inodes, their chunks and their trees own. @throws NotTrusted */
export async function readOwned(reader: BlockReader, replay: LogReplay | undefined): Promise<RangeSet> {
  const owned = new OwnedRanges()
  const agnos = Array.from({ length: reader.sb.agcount }, (_, agno) => agno)
  await mapBounded(agnos, PARALLEL_AGS, (agno) => auditAg(reader, replay, agno, owned))
  return owned.finish()
}

/** Ranges in any order, joined every so often. */
class OwnedRanges {
  #joined = RangeSet.empty
  #builder = new RangeSetBuilder()
  #count = 0

  add(start: number, end: number): void {
    this.#builder.add(start, end)
    if (++this.#count >= JOIN_EVERY) this.#join()
  }

  finish(): RangeSet {
    this.#join()
    return this.#joined
  }

  #join(): void {
    this.#joined = this.#joined.union(this.#builder.build())
    this.#builder = new RangeSetBuilder()
    this.#count = 0
  }
}

interface InodeChunk {
  readonly agino: number
  /** Bit i set: inode i is free. */
  readonly free: bigint
  /** Bit i set: inodes 4i to 4i + 3 have no room on disk. */
  readonly holes: number
}

async function auditAg(
  reader: BlockReader,
  replay: LogReplay | undefined,
  agno: number,
  owned: OwnedRanges,
): Promise<void> {
  const { sb } = reader
  const { agi } = await readAgHeaders(reader, agno)
  const sparse = (sb.incompat & INCOMPAT.SPINODES) !== 0
  const chunks: InodeChunk[] = []
  const tree = {
    name: 'inode tree',
    reason: 'xfs-inode-tree',
    magic: BTREE_MAGIC.ino,
    recordBytes: 16,
    keyBytes: 4,
    agno,
    root: agi.root,
    levels: agi.level,
  }
  const blocks = await walkShortTree(reader, tree, (block, at) => {
    chunks.push({
      agino: block.u32(at),
      holes: sparse ? block.u16(at + 4) : 0,
      free: block.u64(at + 8),
    })
  })
  const own = (start: number, count: number): void => {
    const from = agByte(sb, agno, start)
    owned.add(from, from + count * sb.blockBytes)
  }
  own(0, headerBlocks(sb))
  for (const block of blocks) own(block, 1)

  for (let first = 0; first < chunks.length; first += BATCH_CHUNKS) {
    throwIfAborted(reader.signal)
    const batch = chunks.slice(first, first + BATCH_CHUNKS)
    await auditChunks(reader, replay, agno, batch, owned)
  }
}

async function auditChunks(
  reader: BlockReader,
  replay: LogReplay | undefined,
  agno: number,
  batch: readonly InodeChunk[],
  owned: OwnedRanges,
): Promise<void> {
  const { sb } = reader
  const chunkBytes = CHUNK_INODES * sb.inodeBytes
  const agStart = agByte(sb, agno, 0)
  const agEnd = agStart + agLength(sb, agno) * sb.blockBytes
  const places = batch.map(({ agino }) => {
    const offset = agStart + agino * sb.inodeBytes
    if (
      agino % HOLE_INODES !== 0 ||
      offset < agStart + headerBlocks(sb) * sb.blockBytes ||
      offset + chunkBytes > agEnd
    )
      throw reader.refuse('xfs-inode-tree', `a chunk at inode ${agino} of AG ${agno}`, 'one inside the group')
    return { offset, length: chunkBytes }
  })
  const trees: { ino: number; inode: Inode }[] = []
  const loaded = await reader.read(places)
  for (const [i, { agino, free, holes }] of batch.entries()) {
    const { offset, bytes } = loaded[i]!
    for (let index = 0; index < CHUNK_INODES; index++) {
      if (((holes >>> Math.floor(index / HOLE_INODES)) & 1) === 1) continue
      const at = offset + index * sb.inodeBytes
      const block = at - (at % sb.blockBytes)
      owned.add(block, block + sb.blockBytes)
      if (((free >> BigInt(index)) & 1n) === 1n) continue
      const ino = agno * 2 ** (sb.agblklog + sb.inopblog) + agino + index
      const raw = bytes.subarray(index * sb.inodeBytes, (index + 1) * sb.inodeBytes)
      trees.push({ ino, inode: loadInode(reader, replay, ino, raw) })
    }
  }
  await mapBounded(trees, PARALLEL_TREES, ({ ino, inode }) => auditInode(reader, ino, inode, owned))
}

function loadInode(reader: BlockReader, replay: LogReplay | undefined, ino: number, raw: Uint8Array): Inode {
  const { sb } = reader
  const onDisk = isInode(raw, sb, ino)
  if (onDisk && !inodeCrcMatches(raw, sb))
    throw reader.refuse('xfs-checksum', `a wrong checksum of inode ${ino}`, 'the CRC-32C of it')
  const bytes = onDisk ? raw.slice() : new Uint8Array(sb.inodeBytes)
  const replayed = replay?.applyInode(bytes, ino, onDisk ? new Bytes(raw, 'big') : undefined) ?? false
  if (!onDisk && !replayed)
    throw reader.refuse('xfs-inode', `no inode ${ino}`, 'one where the inode tree says')
  const inode = decodeInode(bytes, sb)
  if (!inode || inode.mode === 0)
    throw reader.refuse('xfs-inode', `an inode ${ino} that contradicts itself`, 'a mode and forks')
  return inode
}

async function auditInode(reader: BlockReader, ino: number, inode: Inode, owned: OwnedRanges): Promise<void> {
  let blocks = 0
  for (const fork of inode.forks) {
    const context = { reader, ino, fork, owned, most: inode.nblocks }
    if (fork.format === FORK_FORMAT.EXTENTS) blocks += ownExtents(context)
    else if (fork.format === FORK_FORMAT.BTREE) blocks += await ownTree(context)
    else if (fork.format > FORK_FORMAT.UUID || fork.extents !== 0) {
      throw refuse(context, `format ${fork.format} with ${fork.extents} extents`, 'a known one')
    }
  }
  if (blocks !== inode.nblocks)
    throw reader.refuse('xfs-inode', `${blocks} blocks of inode ${ino}`, `${inode.nblocks} as it says`)
}

interface ForkContext {
  readonly reader: BlockReader
  readonly ino: number
  readonly fork: Fork
  readonly owned: OwnedRanges
  /** Blocks that the inode says it has; a tree of more is none. */
  readonly most: number
}

function refuse({ reader, ino, fork }: ForkContext, found: string, expected: string): Error {
  return reader.refuse('xfs-inode', `${found} in the ${fork.name} fork of inode ${ino}`, expected)
}

function ownExtents(context: ForkContext): number {
  const { fork } = context
  if (fork.extents * EXTENT_BYTES > fork.bytes.length)
    throw refuse(context, `${fork.extents} extents`, 'as many as the fork has room for')
  const b = new Bytes(fork.bytes, 'big', 'extents')
  let blocks = 0
  let after = 0
  for (let i = 0; i < fork.extents; i++) {
    const extent = decodeExtent(b, i * EXTENT_BYTES)
    blocks += ownExtent(context, extent, after)
    after = extent.startoff + extent.count
  }
  return blocks
}

function ownExtent(context: ForkContext, { startoff, fsbno, count }: BmapExtent, after: number): number {
  const { sb } = context.reader
  const { agno, agbno } = splitFsbno(sb, fsbno)
  if (count === 0 || startoff < after || !insideAg(sb, agno, agbno, count))
    throw refuse(context, `an extent of ${count} blocks at ${agno}:${agbno} for ${startoff}`, 'one inside')
  const from = agByte(sb, agno, agbno)
  context.owned.add(from, from + count * sb.blockBytes)
  return count
}

function insideAg(sb: Superblock, agno: number, agbno: number, count: number): boolean {
  return agno < sb.agcount && agbno >= headerBlocks(sb) && agbno + count <= agLength(sb, agno)
}

/** A bmbt below its root in the fork. Returns its blocks and those of its extents. */
async function ownTree(context: ForkContext): Promise<number> {
  const { reader, ino, fork, owned, most } = context
  const { sb } = reader
  const shape = LONG[sb.version]
  const magic = BTREE_MAGIC.bmap[sb.version - 4]!
  const root = decodeBmapRoot(fork.bytes)
  if (!root || root.level > 16) throw refuse(context, 'no root of a tree', 'one')
  const records = Math.floor((sb.blockBytes - shape.headerBytes) / EXTENT_BYTES)
  let blocks = 0
  let extents = 0
  let after = 0
  let level: readonly { readonly key: bigint; readonly fsbno: number }[] = root.children
  for (let height = root.level - 1; height >= 0; height--) {
    const below: { key: bigint; fsbno: number }[] = []
    for (let first = 0; first < level.length; first += BATCH_BLOCKS) {
      throwIfAborted(reader.signal)
      const batch = level.slice(first, first + BATCH_BLOCKS)
      const places = batch.map(({ fsbno }) => {
        const { agno, agbno } = splitFsbno(sb, fsbno)
        if (!insideAg(sb, agno, agbno, 1)) throw refuse(context, `a pointer to ${fsbno}`, 'one inside')
        const offset = agByte(sb, agno, agbno)
        owned.add(offset, offset + sb.blockBytes)
        return { offset, length: sb.blockBytes }
      })
      for (const [i, raw] of (await reader.read(places)).entries()) {
        const index = first + i
        const { bytes } = reader.finish(raw, shape, magic, `a block of the tree of inode ${ino}`)
        const b = new Bytes(bytes, 'big', 'bmbt block')
        const header = decodeBtreeHeader(b, shape)
        const left = level[index - 1]?.fsbno
        const right = level[index + 1]?.fsbno
        const sound =
          header.level === height &&
          header.numrecs >= 1 &&
          header.numrecs <= records &&
          header.leftsib === (left === undefined ? NULL_FSBNO : BigInt(left)) &&
          header.rightsib === (right === undefined ? NULL_FSBNO : BigInt(right)) &&
          (sb.version === 4 || b.u64(shape.ownerAt) === BigInt(ino))
        if (!sound)
          throw refuse(context, `a tree block at ${raw.offset} of another place`, 'level and siblings')
        blocks++
        for (let r = 0; r < header.numrecs; r++) {
          if (height === 0) {
            const extent = decodeExtent(b, shape.headerBytes + r * EXTENT_BYTES)
            blocks += ownExtent(context, extent, after)
            after = extent.startoff + extent.count
            extents++
          } else {
            below.push({
              key: b.u64(shape.headerBytes + r * 8),
              fsbno: Number(b.u64(shape.headerBytes + records * 8 + r * 8)),
            })
          }
        }
        if (blocks + below.length > most) throw refuse(context, 'more blocks', `${most} as the inode says`)
      }
    }
    level = below
  }
  if (extents !== fork.extents)
    throw refuse(context, `${extents} extents`, `${fork.extents} as the inode says`)
  return blocks
}
