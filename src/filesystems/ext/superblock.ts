/**
 * Reading the superblock and deciding whether it is believed.
 *
 * Rule: whatever later code multiplies, divides, allocates or loops by is checked here once, so that the rest of
 * the folder can count with it. The copies in other groups are not asked: a primary that is wrong makes the
 * region all in use, whatever a copy says.
 */
import { isPowerOfTwo, LIMITS } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { NotTrusted } from '../file-system.ts'
import {
  COMPAT,
  decodeSuperblock,
  gdtBlock,
  has,
  hasMetadataCsum,
  INCOMPAT,
  KNOWN_INCOMPAT,
  KNOWN_RO_COMPAT,
  MAGIC,
  RO_COMPAT,
  STATE,
  SUPERBLOCK_BYTES,
  SUPERBLOCK_OFFSET,
  type Superblock,
} from './layout.ts'

/** True when the device is long enough for a superblock and carries its magic. */
export async function hasMagic(device: BlockDevice): Promise<boolean> {
  if (device.size < SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES) return false
  const raw = await readBytes(device, SUPERBLOCK_OFFSET + 0x38, 2)
  return raw[0] === (MAGIC & 0xff) && raw[1] === MAGIC >> 8
}

/**
 * Reads and judges the superblock.
 * @throws NotTrusted with what is known of the file system all the same
 */
export async function readSuperblock(device: BlockDevice, signal?: AbortSignal): Promise<Superblock> {
  if (device.size < SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES) {
    throw new NotTrusted(
      'ext-superblock',
      `Cannot trust ext file system: found ${device.size} bytes, expected at least 2048`,
    )
  }
  const sb = decodeSuperblock(await readBytes(device, SUPERBLOCK_OFFSET, SUPERBLOCK_BYTES, signal))
  checkSuperblock(sb, device.size)
  return sb
}

/** What can be said of a file system that is not trusted. */
export function aboutOf(sb: Superblock): NotTrusted['about'] {
  return { kind: sb.kind, uuid: sb.uuid, label: sb.label }
}

function checkSuperblock(sb: Superblock, deviceBytes: number): void {
  const about = aboutOf(sb)
  if (hasMetadataCsum(sb) && sb.checksum.stored !== sb.checksum.computed) {
    throw new NotTrusted(
      'ext-superblock',
      `Cannot trust ext superblock: found checksum ${hex(sb.checksum.stored)}, expected ${hex(sb.checksum.computed)}`,
      about,
    )
  }
  if (has(sb.incompat, INCOMPAT.journalDev)) {
    throw new NotTrusted(
      'ext-journal-device',
      'Cannot map ext journal device: found the journal of another file system, expected a file system',
      about,
    )
  }
  const unknown: string[] = []
  if (sb.incompat & ~KNOWN_INCOMPAT) unknown.push(`incompat ${hex(sb.incompat & ~KNOWN_INCOMPAT)}`)
  if (sb.roCompat & ~KNOWN_RO_COMPAT) unknown.push(`ro_compat ${hex(sb.roCompat & ~KNOWN_RO_COMPAT)}`)
  if (sb.revLevel > 1) unknown.push(`revision ${sb.revLevel}`)
  if (hasMetadataCsum(sb) && sb.checksumType !== 1) unknown.push(`checksum type ${sb.checksumType}`)
  if (unknown.length > 0) {
    throw new NotTrusted(
      'ext-features',
      `Cannot trust ${sb.kind}: found unknown features (${unknown.join(', ')})`,
      about,
    )
  }

  const wrong = wrongGeometry(sb)
  if (wrong) {
    throw new NotTrusted('ext-superblock', `Cannot trust ext superblock: found ${wrong}`, about)
  }
  if (sb.blocksCount * sb.blockBytes > deviceBytes) {
    throw new NotTrusted(
      'ext-truncated',
      `Cannot trust ${sb.kind}: found a device of ${deviceBytes} bytes, expected at least ${sb.blocksCount * sb.blockBytes}`,
      about,
    )
  }
  if (sb.groupCount * sb.descBytes > LIMITS.tableBytes) {
    throw new NotTrusted(
      'ext-too-large',
      `Cannot map ${sb.kind}: found ${sb.groupCount} groups, expected at most ${Math.floor(LIMITS.tableBytes / sb.descBytes)}`,
      about,
    )
  }
  if (gdtBlock(sb, sb.gdtBlocks - 1) >= sb.blocksCount) {
    throw new NotTrusted(
      'ext-superblock',
      `Cannot trust ext superblock: found a group descriptor table that ends past block ${sb.blocksCount}`,
      about,
    )
  }
}

/** What is wrong with the sizes and counts; undefined when they fit each other as the kernel asks. */
function wrongGeometry(sb: Superblock): string | undefined {
  const bigalloc = has(sb.roCompat, RO_COMPAT.bigalloc)
  const bits = sb.blockBytes * 8
  if (sb.logBlockSize > 6) return `log_block_size ${sb.logBlockSize}, expected at most 6`
  if (bigalloc) {
    if (sb.logClusterSize < sb.logBlockSize || sb.logClusterSize - sb.logBlockSize > 20) {
      return `log_cluster_size ${sb.logClusterSize} with log_block_size ${sb.logBlockSize}`
    }
    if (sb.blocksPerGroup !== sb.clustersPerGroup * sb.clusterBlocks) {
      return `${sb.blocksPerGroup} blocks and ${sb.clustersPerGroup} clusters of ${sb.clusterBlocks} blocks in a group`
    }
  } else if (sb.clustersPerGroup !== sb.blocksPerGroup) {
    return `${sb.blocksPerGroup} blocks and ${sb.clustersPerGroup} clusters in a group, expected as many`
  }
  if (sb.clustersPerGroup === 0 || sb.clustersPerGroup > bits || sb.clustersPerGroup % 8 !== 0) {
    return `clusters_per_group ${sb.clustersPerGroup}, expected a multiple of 8 up to ${bits}`
  }
  if (sb.firstDataBlock !== (sb.blockBytes === 1024 && !bigalloc ? 1 : 0)) {
    return `first_data_block ${sb.firstDataBlock} with blocks of ${sb.blockBytes} bytes`
  }
  if (!Number.isSafeInteger(sb.blocksCount * sb.blockBytes) || sb.blocksCount <= sb.firstDataBlock + 1) {
    return `blocks_count ${sb.blocksCount}`
  }
  if (sb.freeBlocksCount > sb.blocksCount) return `free_blocks_count ${sb.freeBlocksCount}, more than all`
  if (!isPowerOfTwo(sb.inodeSize) || sb.inodeSize < 128 || sb.inodeSize > sb.blockBytes) {
    return `inode_size ${sb.inodeSize}`
  }
  if (sb.inodesPerGroup === 0 || sb.inodesPerGroup > bits) return `inodes_per_group ${sb.inodesPerGroup}`
  if (sb.itableBlocks >= sb.blocksPerGroup) {
    return `an inode table of ${sb.itableBlocks} blocks in groups of ${sb.blocksPerGroup}`
  }
  if (sb.inodesCount !== sb.groupCount * sb.inodesPerGroup) {
    return `inodes_count ${sb.inodesCount}, expected ${sb.groupCount * sb.inodesPerGroup}`
  }
  if (has(sb.incompat, INCOMPAT.bits64)) {
    if (!isPowerOfTwo(sb.descSize) || sb.descSize < 64 || sb.descSize > 1024)
      return `desc_size ${sb.descSize}`
  }
  if (has(sb.incompat, INCOMPAT.metaBg) && sb.firstMetaBg > sb.gdtBlocks) {
    return `first_meta_bg ${sb.firstMetaBg}, expected at most ${sb.gdtBlocks}`
  }
  if (sb.reservedGdtBlocks > sb.blockBytes / 4) return `reserved_gdt_blocks ${sb.reservedGdtBlocks}`
  if (has(sb.incompat, INCOMPAT.recover) && !has(sb.compat, COMPAT.hasJournal)) {
    return 'a journal to replay and no journal'
  }
  return undefined
}

/**
 * Refuses states in which the block bitmaps need not be true, even with the journal replayed: errors that the
 * kernel noted (ERROR_FS: only e2fsck may say that all is well again), and a file system without a journal that
 * was not unmounted, whose bitmaps the kernel writes in no order.
 * @throws NotTrusted
 */
export function checkState(sb: Superblock): void {
  if (has(sb.state, STATE.error)) {
    throw new NotTrusted(
      'ext-errors',
      `Cannot trust ${sb.kind}: found its error mark set, expected a file system that e2fsck has passed`,
      aboutOf(sb),
    )
  }
  if (!has(sb.state, STATE.valid)) {
    throw new NotTrusted(
      'ext-not-clean',
      `Cannot trust ${sb.kind}: found it not cleanly unmounted${has(sb.compat, COMPAT.hasJournal) ? '' : ' and without a journal'}`,
      aboutOf(sb),
    )
  }
}

function hex(value: number): string {
  return `0x${(value >>> 0).toString(16)}`
}
