/**
 * XFS v4 and v5: which bytes are in use, from the free-space btrees, after a replay of the log where it is dirty.
 *
 * In use is everything that no btree record calls free: the tail of the device behind the file system as well.
 */
import { type Context, NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import type { RangeSet } from '../../extents/index.ts'
import type { FileSystem, FileSystemType, UsedMap } from '../file-system.ts'
import { readOwned } from './audit.ts'
import { BlockReader, Memo } from './blocks.ts'
import { readFreeSpace, readFreeSpaceWherePossible } from './free-space.ts'
import { LOG_INCOMPAT_KNOWN, type Superblock } from './layout.ts'
import { type LogState, XfsLog } from './log.ts'
import { LogReplay } from './replay.ts'
import { hasMagic, judgeSuperblock, readSuperblock } from './superblock.ts'

/** Times that a hole may move the head; the kernel never leaves more than one. */
const MOST_HOLES = 8

export const xfsType: FileSystemType = {
  name: 'xfs',

  async probe(device: BlockDevice): Promise<boolean> {
    return device.size >= 512 && hasMagic(await readBytes(device, 0, 512))
  },

  async open(device: BlockDevice, context: Context): Promise<FileSystem> {
    return new XfsFileSystem(device, await readSuperblock(device, context.signal))
  },
}

/** Borrows the device. */
export class XfsFileSystem implements FileSystem {
  readonly kind = 'xfs'
  readonly uuid: string
  readonly label: string | undefined
  readonly size: number
  readonly blockBytes: number
  readonly #device: BlockDevice
  readonly #sb: Superblock

  constructor(device: BlockDevice, sb: Superblock) {
    this.#device = device
    this.#sb = sb
    this.uuid = sb.uuid
    this.label = sb.label || undefined
    this.size = sb.dblocks * sb.blockBytes
    this.blockBytes = sb.blockBytes
  }

  /** @throws NotTrusted `xfs-…` */
  async used(context: Context): Promise<UsedMap> {
    const { signal } = context
    const { state, replay } = await readLog(this.#device, this.#sb, { signal })
    if (!replay) {
      const reader = new BlockReader(this.#device, this.#sb, { logHead: state.head, signal })
      const free = await readFreeSpace(reader)
      return { ranges: free.complement(0, this.#device.size), trust: 'exact', state: 'clean' }
    }
    const memo = new Memo()
    const sb = await this.#replayedSuperblock(replay, signal)
    const after = await readFreeSpace(
      new BlockReader(this.#device, sb, { logHead: state.head, replay, memo, signal }),
    )
    const before = await readFreeSpaceWherePossible(
      new BlockReader(this.#device, this.#sb, { logHead: state.head, memo, signal }),
    )
    // A file system that the log has grown: what is new was not there before.
    const grown = sb.dblocks * sb.blockBytes
    const both = after.clip(0, this.size).intersect(before).union(after.clip(this.size, grown))
    return { ranges: both.complement(0, this.#device.size), trust: 'replayed', state: 'dirty: log replayed' }
  }

  /**
   * What inodes own, read without the free-space trees: each byte of it must be in `used()`, else the map is not to
   * be believed. Reads every inode.
   * @throws NotTrusted `xfs-…`
   */
  async audit(context: Context): Promise<RangeSet> {
    const { signal } = context
    const { state, replay } = await readLog(this.#device, this.#sb, { signal, inodes: true })
    const sb = replay ? await this.#replayedSuperblock(replay, signal) : this.#sb
    const reader = new BlockReader(this.#device, sb, { logHead: state.head, replay, signal })
    return await readOwned(reader, replay)
  }

  async #replayedSuperblock(replay: LogReplay, signal: AbortSignal | undefined): Promise<Superblock> {
    const old = this.#sb
    const sector = await readBytes(this.#device, 0, old.sectorBytes, signal)
    if (!replay.apply(sector, 0)) return old
    const sb = judgeSuperblock(sector, this.#device.size, { checksum: false })
    const same =
      sb.version === old.version &&
      sb.blockBytes === old.blockBytes &&
      sb.sectorBytes === old.sectorBytes &&
      sb.agblocks === old.agblocks &&
      sb.logstart === old.logstart &&
      sb.logblocks === old.logblocks &&
      sb.uuid === old.uuid &&
      sb.metaUuid === old.metaUuid &&
      sb.dblocks >= old.dblocks
    if (!same) {
      throw new NotTrusted(
        'xfs-log-superblock',
        'Cannot replay XFS log: found a superblock of another shape in it, expected the same or a grown one',
        { kind: 'xfs', uuid: old.uuid, label: old.label || undefined },
      )
    }
    return sb
  }
}

/** The log's state, and what it holds where it is dirty. @throws NotTrusted */
export async function readLog(
  device: BlockDevice,
  sb: Superblock,
  options: { readonly signal?: AbortSignal | undefined; readonly inodes?: boolean } = {},
): Promise<{ state: LogState; replay: LogReplay | undefined }> {
  const log = new XfsLog(device, sb, options.signal)
  let state = await log.open()
  for (let holes = 0; holes <= MOST_HOLES; holes++) {
    if (state.clean) return { state, replay: undefined }
    if ((sb.logIncompat & ~LOG_INCOMPAT_KNOWN) !== 0) {
      throw new NotTrusted(
        'xfs-log-feature',
        `Cannot replay XFS log: found log feature bits 0x${sb.logIncompat.toString(16)}, expected known ones only`,
        { kind: 'xfs', uuid: sb.uuid, label: sb.label || undefined },
      )
    }
    const replay = new LogReplay(sb, options)
    const end = await log.walk(state, (record) => replay.take(record))
    if (end.hole === undefined) return { state, replay }
    state = await log.reopen(end.hole)
  }
  throw new NotTrusted('xfs-log-record', 'Cannot read XFS log: found one hole after another, expected one', {
    kind: 'xfs',
    uuid: sb.uuid,
    label: sb.label || undefined,
  })
}
