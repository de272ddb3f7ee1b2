/**
 * The second opinion: every block that something owns, found by walking the inodes and not the block bitmaps.
 *
 * Owned are the superblock and descriptor copies, bitmaps and inode tables, the multiple mount protection block,
 * and of every inode that the inode bitmaps list (orphans and the reserved ones too) its data, the tree that maps
 * it and its attribute block.
 *
 * Rules:
 * - No block but an attribute block has two owners, so all owners together claim no more blocks than exist. That
 *   bounds the walk whatever the image says.
 * - Memory is that of the result's ranges (which join up to about those of the block map) and of one batch.
 */
import { isZero, mapBounded, throwIfAborted, VarveError } from '../../base/index.ts'
import { Bitmap, RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import { readBlocks } from './bulk-read.ts'
import type { View } from './descriptors.ts'
import { blockRuns, decodeInode, type Inode, rootRuns } from './inode.ts'
import { groupBaseBlocks, groupEndBlock, groupFirstBlock, type Superblock } from './layout.ts'

/** Groups whose inode bitmaps and tables are read together. */
const BATCH_GROUPS = 32
/** Ranges collected before they are joined into the result. */
const JOIN_RANGES = 1_000_000
/** Inodes whose trees are read at a time. */
const PARALLEL_TREES = 8

/**
 * Blocks that have an owner. Reads the inode bitmaps, the part of the inode tables that is in use, and every
 * extent or indirect block.
 * @throws CORRUPT
 */
export async function ownedBlocks(view: View, signal?: AbortSignal): Promise<RangeSet> {
  const { device, sb, descriptors } = view
  const owned = new Owned(sb)
  const pending: Inode[] = []
  const inodesPerBlock = sb.blockBytes / sb.inodeSize

  for (let batch = 0; batch < sb.groupCount; batch += BATCH_GROUPS) {
    throwIfAborted(signal)
    const groups: number[] = []
    for (let group = batch; group < Math.min(batch + BATCH_GROUPS, sb.groupCount); group++) {
      if (!descriptors.inodeUninit(group)) groups.push(group)
    }
    groups.sort((a, b) => descriptors.inodeBitmap(a) - descriptors.inodeBitmap(b))
    const bitmaps = new Map<number, Bitmap>()
    await readBlocks(
      device,
      sb.blockBytes,
      Float64Array.from(groups, (group) => descriptors.inodeBitmap(group)),
      (index, bytes) => {
        const group = groups[index]!
        if (!descriptors.inodeBitmapIsRight(group, bytes)) {
          throw corrupt(
            `read inode bitmap of group ${group}`,
            'a wrong checksum',
            'the one that its bytes give',
          )
        }
        bitmaps.set(group, Bitmap.fromBytes(bytes, sb.inodesPerGroup))
      },
      signal,
    )

    const wanted: { readonly block: number; readonly group: number; readonly first: number }[] = []
    for (const [group, bitmap] of bitmaps) {
      for (let index = bitmap.nextSet(0); index < bitmap.length; ) {
        const first = index - (index % inodesPerBlock)
        wanted.push({ block: descriptors.inodeTable(group) + first / inodesPerBlock, group, first })
        index = bitmap.nextSet(first + inodesPerBlock)
      }
    }
    wanted.sort((a, b) => a.block - b.block)
    await readBlocks(
      device,
      sb.blockBytes,
      Float64Array.from(wanted, ({ block }) => block),
      (at, bytes) => {
        const { group, first } = wanted[at]!
        const bitmap = bitmaps.get(group)!
        for (let i = 0; i < inodesPerBlock; i++) {
          if (first + i >= sb.inodesPerGroup || !bitmap.get(first + i)) continue
          const raw = bytes.subarray(i * sb.inodeSize, (i + 1) * sb.inodeSize)
          // Reserved inodes that were never written have no checksum either.
          if (isZero(raw)) continue
          const inode = decodeInode(sb, group * sb.inodesPerGroup + first + i + 1, raw)
          owned.attributes(inode)
          const runs = rootRuns(sb, inode)
          if (runs) for (const run of runs) owned.run(run.physical, run.blocks)
          else pending.push(inode)
        }
      },
      signal,
    )

    await mapBounded(pending.splice(0), PARALLEL_TREES, async (inode) => {
      for await (const run of blockRuns(device, sb, inode, signal)) owned.run(run.physical, run.blocks)
    })
  }

  return owned.finish().union(metadataBlocks(view))
}

class Owned {
  readonly #sb: Superblock
  #all = RangeSet.empty
  #builder = new RangeSetBuilder()
  #ranges = 0
  #claimed = 0

  constructor(sb: Superblock) {
    this.#sb = sb
  }

  run(start: number, blocks: number): void {
    this.#claimed += blocks
    if (this.#claimed > this.#sb.blocksCount) {
      throw corrupt('audit', 'blocks that belong to two files', 'each to one')
    }
    this.#add(start, blocks)
  }

  /** Files with equal attributes share one block. */
  attributes(inode: Inode): void {
    if (inode.fileAcl === 0) return
    if (inode.fileAcl < this.#sb.firstDataBlock || inode.fileAcl >= this.#sb.blocksCount) {
      throw corrupt(
        `read inode ${inode.number}`,
        `attributes at block ${inode.fileAcl}`,
        'a block that exists',
      )
    }
    this.#add(inode.fileAcl, 1)
  }

  finish(): RangeSet {
    this.#all = this.#all.union(this.#builder.build())
    this.#builder = new RangeSetBuilder()
    this.#ranges = 0
    return this.#all
  }

  #add(start: number, blocks: number): void {
    this.#builder.add(start, start + blocks)
    if (++this.#ranges >= JOIN_RANGES) this.finish()
  }
}

function metadataBlocks({ sb, places }: View): RangeSet {
  const builder = new RangeSetBuilder()
  // What is reserved for the descriptor table belongs to inode 7; without that inode it is not reserved.
  const bare = { ...sb, reservedGdtBlocks: 0 }
  for (let group = 0; group < sb.groupCount; group++) {
    const first = groupFirstBlock(sb, group)
    builder.add(first, Math.min(first + groupBaseBlocks(bare, group), groupEndBlock(sb, group)))
  }
  if (sb.mmpBlock > 0 && sb.mmpBlock < sb.blocksCount) builder.add(sb.mmpBlock, sb.mmpBlock + 1)
  return builder.build().union(places.groups).union(places.primary)
}

function corrupt(doing: string, found: string, expected: string): VarveError {
  return new VarveError('CORRUPT', `Cannot ${doing}: found ${found}, expected ${expected}`)
}
