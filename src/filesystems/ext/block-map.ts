/**
 * The block map: which blocks the bitmaps (and, for groups without one, the layout rules) say are allocated.
 *
 * Rules:
 * - A group's bitmap counts when its checksum (metadata_csum) is right and as many of its bits are clear as the
 *   descriptor says are free. The kernel changes both in one transaction, so after a replay they agree; where they
 *   do not, one of them is wrong and nobody can say which. The superblock's total is not asked: the kernel writes
 *   it only now and then.
 * - A BLOCK_UNINIT group has no bitmap: what stands there is garbage. In use are the superblock copy, the
 *   descriptor table's copy and its reserve, and whatever bitmaps and inode tables, of any group, stand in it.
 *   That may be more than the descriptor counts (then more is in use), never less.
 * - All metadata must come out as allocated: a bitmap that says its own file system's bitmaps are free is no
 *   bitmap.
 *
 * No object is made for a block, and none that stays for a group: a 16 TiB file system has 4 billion and 131,072.
 */
import type { BlockDevice } from '../../device/index.ts'
import { Bitmap, RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import { NotTrusted } from '../file-system.ts'
import { readBlocks } from './bulk-read.ts'
import type { MetadataPlaces } from './descriptors.ts'
import {
  type GroupDescriptors,
  groupBaseBlocks,
  groupClusters,
  groupEndBlock,
  groupFirstBlock,
  type Superblock,
} from './layout.ts'
import { aboutOf } from './superblock.ts'

/**
 * Allocated blocks by the metadata on `device`, checked.
 * @throws NotTrusted (`ext-bitmap`)
 */
export async function allocatedBlocks(
  device: BlockDevice,
  sb: Superblock,
  descriptors: GroupDescriptors,
  places: MetadataPlaces,
  signal?: AbortSignal,
): Promise<RangeSet> {
  const fromLayout = new RangeSetBuilder()
  const groups = new Uint32Array(sb.groupCount)
  let withBitmap = 0
  for (let group = 0; group < sb.groupCount; group++) {
    if (!descriptors.blockUninit(group)) {
      groups[withBitmap++] = group
      continue
    }
    const used = layoutOf(sb, group, places.groups)
    const free = groupClusters(sb, group) - clustersOf(sb, used)
    if (free > descriptors.freeBlocksCount(group)) {
      throw untrusted(
        sb,
        group,
        `${free} free clusters by the layout and ${descriptors.freeBlocksCount(group)} in the descriptor`,
      )
    }
    fromLayout.addAll(used)
  }

  // In the order of their place on the device, which is nearly always that of the groups.
  const order = groups.subarray(0, withBitmap)
  const ascending = order.every(
    (group, i) => i === 0 || descriptors.blockBitmap(order[i - 1]!) < descriptors.blockBitmap(group),
  )
  if (!ascending) order.sort((a, b) => descriptors.blockBitmap(a) - descriptors.blockBitmap(b))
  const fromBitmaps = new RangeSetBuilder()
  await readBlocks(
    device,
    sb.blockBytes,
    Float64Array.from(order, (group) => descriptors.blockBitmap(group)),
    (index, bytes) => {
      const group = order[index]!
      if (!descriptors.blockBitmapIsRight(group, bytes)) {
        throw untrusted(sb, group, 'a wrong checksum')
      }
      const free = groupClusters(sb, group) - addBitmap(sb, group, bytes, fromBitmaps)
      if (free !== descriptors.freeBlocksCount(group)) {
        throw untrusted(
          sb,
          group,
          `${free} free clusters in the bitmap and ${descriptors.freeBlocksCount(group)} in the descriptor`,
        )
      }
    },
    signal,
  )

  const used = fromBitmaps.build().union(fromLayout.build())
  const metadata = places.groups.union(places.primary)
  const lost = metadata.subtract(used)
  if (!lost.isEmpty) {
    const group = Math.floor((lost.first! - sb.firstDataBlock) / sb.blocksPerGroup)
    throw untrusted(sb, group, `block ${lost.first!} free, which holds metadata`)
  }
  return used
}

/**
 * Allocated blocks of `groups` by what stands on `device` before a replay, unchecked: bitmap and descriptor may
 * stem from different moments there. Only ever united with checked ones.
 */
export async function uncheckedBlocks(
  device: BlockDevice,
  sb: Superblock,
  descriptors: GroupDescriptors,
  groups: readonly number[],
  places: MetadataPlaces,
  signal?: AbortSignal,
): Promise<RangeSet> {
  const used = new RangeSetBuilder()
  const withBitmap: number[] = []
  for (const group of groups) {
    if (group >= descriptors.count) continue
    const bitmap = descriptors.blockBitmap(group)
    if (descriptors.blockUninit(group)) used.addAll(layoutOf(sb, group, places.groups))
    else if (bitmap >= sb.firstDataBlock && bitmap < sb.blocksCount) withBitmap.push(group)
  }
  withBitmap.sort((a, b) => descriptors.blockBitmap(a) - descriptors.blockBitmap(b))
  await readBlocks(
    device,
    sb.blockBytes,
    Float64Array.from(withBitmap, (group) => descriptors.blockBitmap(group)),
    (index, bytes) => {
      addBitmap(sb, withBitmap[index]!, bytes, used)
    },
    signal,
  )
  return used.build()
}

/** Adds the blocks of set bits; returns how many bits that is. */
function addBitmap(sb: Superblock, group: number, bytes: Uint8Array, into: RangeSetBuilder): number {
  const first = groupFirstBlock(sb, group)
  const end = groupEndBlock(sb, group)
  const ratio = sb.clusterBlocks
  let set = 0
  Bitmap.fromBytes(bytes, groupClusters(sb, group)).eachRun((from, to) => {
    set += to - from
    into.add(first + from * ratio, Math.min(first + to * ratio, end))
  })
  return set
}

/** In-use blocks of a BLOCK_UNINIT group, rounded out to clusters. */
function layoutOf(sb: Superblock, group: number, metadata: RangeSet): RangeSet {
  const first = groupFirstBlock(sb, group)
  const end = groupEndBlock(sb, group)
  const base = RangeSet.of(first, Math.min(first + groupBaseBlocks(sb, group), end))
  const used = metadata.touches(first, end) ? base.union(metadata.clip(first, end)) : base
  if (sb.clusterBlocks === 1) return used
  return used.shift(-first).coarsen(sb.clusterBlocks).shift(first).clip(first, end)
}

function clustersOf(sb: Superblock, used: RangeSet): number {
  return Math.ceil(used.size / sb.clusterBlocks)
}

function untrusted(sb: Superblock, group: number, found: string): NotTrusted {
  return new NotTrusted(
    'ext-bitmap',
    `Cannot trust ${sb.kind}: found ${found} in the block bitmap of group ${group}`,
    aboutOf(sb),
  )
}
