/**
 * Loads the group descriptor table and checks it against the superblock and against itself.
 *
 * Rule: after `checkDescriptors` every block number in the table lies inside the file system, no two groups claim
 * one metadata block, and every checksum is right.
 */
import type { BlockDevice } from '../../device/index.ts'
import { RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import { NotTrusted } from '../file-system.ts'
import { readBlocks } from './bulk-read.ts'
import {
  GroupDescriptors,
  gdtBlock,
  groupEndBlock,
  groupFirstBlock,
  has,
  INCOMPAT,
  type Superblock,
} from './layout.ts'
import { aboutOf } from './superblock.ts'

/** Numbers of the blocks of the primary group descriptor table, ascending. */
export function gdtBlocks(sb: Superblock): Float64Array {
  return Float64Array.from({ length: sb.gdtBlocks }, (_, index) => gdtBlock(sb, index))
}

/** The whole table, unchecked. Memory: `groupCount * descBytes`, bounded by `readSuperblock`. */
export async function readDescriptors(
  device: BlockDevice,
  sb: Superblock,
  signal?: AbortSignal,
): Promise<GroupDescriptors> {
  const blocks = gdtBlocks(sb)
  const table = new Uint8Array(sb.gdtBlocks * sb.blockBytes)
  await readBlocks(
    device,
    sb.blockBytes,
    blocks,
    (index, bytes) => table.set(bytes, index * sb.blockBytes),
    signal,
  )
  return new GroupDescriptors(sb, table)
}

/** Where each kind of metadata stands, as sets of block numbers. */
export interface MetadataPlaces {
  /** Block bitmaps, inode bitmaps and inode tables of all groups. */
  readonly groups: RangeSet
  /** The primary superblock and group descriptor table. */
  readonly primary: RangeSet
}

/** What the metadata says at one moment, checked: as it stands on the device, or after the replay. */
export interface View {
  readonly device: BlockDevice
  readonly sb: Superblock
  readonly descriptors: GroupDescriptors
  readonly places: MetadataPlaces
}

/** @throws NotTrusted (`ext-descriptors`) */
export function checkDescriptors(sb: Superblock, descriptors: GroupDescriptors): MetadataPlaces {
  const anywhere = has(sb.incompat, INCOMPAT.flexBg)
  const blockBitmaps = new RangeSetBuilder()
  const inodeBitmaps = new RangeSetBuilder()
  const inodeTables = new RangeSetBuilder()
  for (let group = 0; group < sb.groupCount; group++) {
    if (!descriptors.checksumIsRight(group)) throw wrong(sb, group, 'a wrong checksum')
    const first = anywhere ? sb.firstDataBlock : groupFirstBlock(sb, group)
    const end = anywhere ? sb.blocksCount : groupEndBlock(sb, group)
    const inside = (block: number, blocks: number): boolean => block >= first && block + blocks <= end
    const blockBitmap = descriptors.blockBitmap(group)
    const inodeBitmap = descriptors.inodeBitmap(group)
    const inodeTable = descriptors.inodeTable(group)
    if (!inside(blockBitmap, 1)) throw wrong(sb, group, `its block bitmap at block ${blockBitmap}`)
    if (!inside(inodeBitmap, 1)) throw wrong(sb, group, `its inode bitmap at block ${inodeBitmap}`)
    if (!inside(inodeTable, sb.itableBlocks)) throw wrong(sb, group, `its inode table at block ${inodeTable}`)
    if (group === 0 && descriptors.blockUninit(0)) throw wrong(sb, group, 'BLOCK_UNINIT')
    blockBitmaps.add(blockBitmap, blockBitmap + 1)
    inodeBitmaps.add(inodeBitmap, inodeBitmap + 1)
    inodeTables.add(inodeTable, inodeTable + sb.itableBlocks)
  }
  const groups = blockBitmaps.build().union(inodeBitmaps.build()).union(inodeTables.build())
  const primary = primaryMetadata(sb)
  // Joined ranges hide overlaps, the sum of their lengths does not.
  if (groups.size !== sb.groupCount * (2 + sb.itableBlocks) || !groups.intersect(primary).isEmpty) {
    throw new NotTrusted(
      'ext-descriptors',
      `Cannot trust ${sb.kind}: found two groups that claim one metadata block`,
      aboutOf(sb),
    )
  }
  return { groups, primary }
}

/** One descriptor, as `checkDescriptors` judges it, for use before the journal is replayed. */
export function checkInodeTableOf(sb: Superblock, descriptors: GroupDescriptors, group: number): void {
  if (!descriptors.checksumIsRight(group)) throw wrong(sb, group, 'a wrong checksum')
  const inodeTable = descriptors.inodeTable(group)
  if (inodeTable < sb.firstDataBlock || inodeTable + sb.itableBlocks > sb.blocksCount) {
    throw wrong(sb, group, `its inode table at block ${inodeTable}`)
  }
}

function primaryMetadata(sb: Superblock): RangeSet {
  const builder = new RangeSetBuilder()
  const superblock = sb.blockBytes === 1024 ? 1 : 0
  builder.add(superblock, superblock + 1)
  for (const block of gdtBlocks(sb)) builder.add(block, block + 1)
  return builder.build()
}

function wrong(sb: Superblock, group: number, what: string): NotTrusted {
  return new NotTrusted(
    'ext-descriptors',
    `Cannot trust ${sb.kind}: found ${what} in the descriptor of group ${group}`,
    aboutOf(sb),
  )
}
