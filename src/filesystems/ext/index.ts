/**
 * ext2, ext3 and ext4: which blocks they use.
 *
 * Clean: the block bitmaps decide (`block-map.ts`). With a journal to replay: its newest copies of superblock,
 * group descriptors and block bitmaps are put over the device in memory first, and in use is the union of before
 * and after: after is what the next mount will see, before is what a reader sees that does not replay. Everything
 * outside the bitmaps (the boot area, the tail of the device) is in use.
 *
 * docs/formats/ext.md: what is read, in which order, and when the answer is "all in use".
 */
import { type Context, VarveError } from '../../base/index.ts'
import { type BlockDevice, OverlayDevice } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import { type FileSystem, type FileSystemType, NotTrusted, type UsedMap } from '../file-system.ts'
import { ownedBlocks } from './audit.ts'
import { allocatedBlocks, uncheckedBlocks } from './block-map.ts'
import { checkDescriptors, checkInodeTableOf, gdtBlocks, readDescriptors, type View } from './descriptors.ts'
import { Journal, type Recovery } from './journal.ts'
import { COMPAT, type GroupDescriptors, has, INCOMPAT, SUPERBLOCK_OFFSET, type Superblock } from './layout.ts'
import { aboutOf, checkState, hasMagic, readSuperblock } from './superblock.ts'

export const extType: FileSystemType = {
  name: 'ext',
  probe: hasMagic,
  async open(device, context) {
    return new ExtFileSystem(device, await readSuperblock(device, context.signal))
  },
}

class ExtFileSystem implements FileSystem {
  readonly kind: string
  readonly uuid: string
  readonly label: string
  readonly size: number
  readonly blockBytes: number
  readonly #device: BlockDevice
  readonly #sb: Superblock

  constructor(device: BlockDevice, sb: Superblock) {
    this.#device = device
    this.#sb = sb
    this.kind = sb.kind
    this.uuid = sb.uuid
    this.label = sb.label
    this.size = sb.blocksCount * sb.blockBytes
    this.blockBytes = sb.blockBytes * sb.clusterBlocks
  }

  /** @throws NotTrusted, CORRUPT, LIMIT, IO */
  async used(context: Context): Promise<UsedMap> {
    const { signal } = context
    const sb = this.#sb
    const { descriptors, marked, recovery } = await this.#look(signal)
    if (!recovery) {
      const used = await allocated(this.#asItStands(descriptors), signal)
      return {
        ranges: this.#bytes(sb, used),
        trust: 'exact',
        state: marked ? 'dirty: journal empty' : 'clean',
      }
    }

    const after = await this.#replay(recovery, signal)
    let used = await allocated(after, signal)
    used = used.union(RangeSet.from(recovery.fastCommits.blocks))
    if (marked) {
      used = used.union(await this.#before(after, recovery, descriptors, signal))
    } else {
      // Not marked, yet not empty: the kernel drops such a journal, e2fsck replays it. Both must be right.
      used = used.union(await allocated(this.#asItStands(descriptors), signal))
    }
    return { ranges: this.#bytes(after.sb, used), trust: 'replayed', state: 'dirty: journal replayed' }
  }

  /** @throws NotTrusted, CORRUPT, LIMIT, IO */
  async audit(context: Context): Promise<RangeSet> {
    const { signal } = context
    const { descriptors, recovery } = await this.#look(signal)
    if (!recovery) {
      return (await ownedBlocks(this.#asItStands(descriptors), signal)).scale(this.#sb.blockBytes)
    }
    const after = await this.#replay(recovery, signal)
    await recovery.apply(after.device, recovery.blocks)
    return (await ownedBlocks(after, signal)).scale(after.sb.blockBytes)
  }

  /** Descriptors as they stand on the device, and what the journal would change; undefined when that is nothing. */
  async #look(
    signal: AbortSignal | undefined,
  ): Promise<{ descriptors: GroupDescriptors; marked: boolean; recovery: Recovery | undefined }> {
    const sb = this.#sb
    checkState(sb)
    const descriptors = await readDescriptors(this.#device, sb, signal)
    const marked = has(sb.incompat, INCOMPAT.recover)
    const journal = has(sb.compat, COMPAT.hasJournal)
      ? await this.#openJournal(descriptors, signal)
      : undefined
    if (!journal || !(marked || !journal.isEmpty)) return { descriptors, marked, recovery: undefined }
    const recovery = await this.#trusting(() => journal.recover())
    const nothing = recovery.blocks.size === 0 && recovery.fastCommits.blocks.length === 0
    return { descriptors, marked, recovery: nothing ? undefined : recovery }
  }

  #asItStands(descriptors: GroupDescriptors): View {
    const sb = this.#sb
    return { device: this.#device, sb, descriptors, places: checkDescriptors(sb, descriptors) }
  }

  async #openJournal(descriptors: GroupDescriptors, signal: AbortSignal | undefined): Promise<Journal> {
    const sb = this.#sb
    if (sb.journalInum !== 0) {
      checkInodeTableOf(sb, descriptors, Math.floor((sb.journalInum - 1) / sb.inodesPerGroup) % sb.groupCount)
    }
    return this.#trusting(() => Journal.open(this.#device, sb, descriptors, signal))
  }

  /** Superblock, descriptors and bitmaps as the next mount will see them. */
  async #replay(
    recovery: Recovery,
    signal: AbortSignal | undefined,
  ): Promise<View & { device: OverlayDevice }> {
    const overlay = new OverlayDevice(this.#device)
    // First the superblock, because it says where the descriptors are; then these, because they say where the
    // bitmaps are. The group count may have grown.
    await recovery.apply(overlay, [Math.floor(SUPERBLOCK_OFFSET / this.#sb.blockBytes)])
    const sb = await readSuperblock(overlay, signal)
    checkState(sb)
    if (!isSameFileSystem(this.#sb, sb)) {
      throw new NotTrusted(
        'ext-journal',
        `Cannot replay the journal of ${sb.kind}: found a superblock of another file system in it`,
        aboutOf(this.#sb),
      )
    }
    await recovery.apply(overlay, gdtBlocks(sb))
    const descriptors = await readDescriptors(overlay, sb, signal)
    const places = checkDescriptors(sb, descriptors)
    const bitmaps = new Float64Array(sb.groupCount)
    for (let group = 0; group < sb.groupCount; group++) bitmaps[group] = descriptors.blockBitmap(group)
    await recovery.apply(overlay, bitmaps)
    return { device: overlay, sb, descriptors, places }
  }

  /** What was allocated before the replay, in the groups that the replay changes. */
  async #before(
    after: View,
    recovery: Recovery,
    descriptors: GroupDescriptors,
    signal: AbortSignal | undefined,
  ): Promise<RangeSet> {
    const groups: number[] = []
    for (let group = 0; group < Math.min(descriptors.count, after.descriptors.count); group++) {
      if (
        recovery.covers(after.descriptors.blockBitmap(group)) ||
        descriptors.blockBitmap(group) !== after.descriptors.blockBitmap(group) ||
        descriptors.flags(group) !== after.descriptors.flags(group)
      ) {
        groups.push(group)
      }
    }
    return uncheckedBlocks(this.#device, this.#sb, descriptors, groups, after.places, signal)
  }

  /** Allocated blocks as bytes of the device, with the boot area and the tail. */
  #bytes(sb: Superblock, blocks: RangeSet): RangeSet {
    return blocks
      .scale(sb.blockBytes)
      .union(RangeSet.of(0, sb.firstDataBlock * sb.blockBytes))
      .union(RangeSet.of(sb.blocksCount * sb.blockBytes, this.#device.size))
  }

  /** What is wrong with inode 8 or a block of the log is wrong with the journal. */
  async #trusting<T>(work: () => Promise<T>): Promise<T> {
    try {
      return await work()
    } catch (error) {
      if (!(error instanceof VarveError) || error instanceof NotTrusted || error.code !== 'CORRUPT')
        throw error
      throw new NotTrusted(
        'ext-journal',
        `Cannot replay the journal of ${this.kind}: ${error.message}`,
        aboutOf(this.#sb),
      )
    }
  }
}

function allocated(view: View, signal: AbortSignal | undefined): Promise<RangeSet> {
  return allocatedBlocks(view.device, view.sb, view.descriptors, view.places, signal)
}

/** A replayed superblock may have grown and have other counts; nothing else. */
function isSameFileSystem(a: Superblock, b: Superblock): boolean {
  return (
    a.uuid === b.uuid &&
    a.blockBytes === b.blockBytes &&
    a.clusterBlocks === b.clusterBlocks &&
    a.blocksPerGroup === b.blocksPerGroup &&
    a.inodesPerGroup === b.inodesPerGroup &&
    a.inodeSize === b.inodeSize &&
    a.firstDataBlock === b.firstDataBlock &&
    a.descBytes === b.descBytes &&
    a.blocksCount <= b.blocksCount
  )
}
