/**
 * Btrfs: used ranges from the free space tree or the extent tree, through the chunk map, plus the log trees.
 *
 * Copy on write makes the trees of the last commit always consistent: there is no journal to replay. Only fsync writes
 * outside a commit, into log trees under `log_root`: what those reference is not in the extent tree yet, so they are
 * walked and their nodes and file extents added.
 *
 * Rules:
 * - The free space tree is used when it is marked valid (a few reads); what it says must add up to the super block's
 *   `bytes_used`, else the extent tree is read; when that does not add up either, nothing is trusted.
 * - Records of deleted block groups may stay in the free space tree: only chunks that exist count.
 * - All devices of a file system must be at hand; a lone one of several is taken as in use.
 */
import { type Context, NotTrusted, throwIfAborted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { Bitmap, RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import type { FileSystem, FileSystemType, UsedMap } from '../file-system.ts'
import { CHECKSUM_TYPES, checksumHolds } from './checksum.ts'
import { ChunkMap } from './chunk-map.ts'
import {
  type Chunk,
  decodeChunk,
  decodeRootItem,
  decodeSuper,
  decodeSystemChunks,
  FIRST_BYTES,
  ITEM,
  isBeingDropped,
  isSuperBlock,
  type RootItem,
  SUPER_BYTES,
  SUPER_MIRRORS,
  SUPER_OFFSET,
  SUPER_RESERVED,
  type SuperBlock,
  TREE,
} from './layout.ts'
import { Trees } from './trees.ts'

export const btrfsType: FileSystemType = {
  name: 'btrfs',

  async probe(device) {
    if (device.size < SUPER_OFFSET + SUPER_BYTES) return false
    // As far as the magic number: a probe is paid for on every disk.
    return isSuperBlock(await readBytes(device, SUPER_OFFSET, 0x48))
  },

  async open(device, context) {
    const [fs] = await openBtrfs([device], context)
    return fs!
  },

  together: {
    async group(device) {
      const sb = await readSuper(device)
      return sb.numDevices > 1 ? sb.fsid : undefined
    },
    open: openBtrfs,
  },
}

/** A super block as it stands, its checksum held. @throws NotTrusted */
async function readSuper(device: BlockDevice): Promise<SuperBlock> {
  const bytes = await readBytes(device, SUPER_OFFSET, SUPER_BYTES)
  const type = bytes[0xc4]! | (bytes[0xc5]! << 8)
  if (type >= CHECKSUM_TYPES.length) {
    throw new NotTrusted('btrfs-unknown-feature', `Cannot trust a Btrfs with checksum type ${type}`, {
      kind: 'btrfs',
    })
  }
  if (!checksumHolds(type, bytes)) {
    throw new NotTrusted('btrfs-checksum', 'Cannot use Btrfs super block: its checksum is wrong', {
      kind: 'btrfs',
    })
  }
  return decodeSuper(bytes)
}

/**
 * Opens the one Btrfs that lies on `devices` (borrowed), in any order; one result per device, in the order given.
 * @throws NotTrusted when some device is missing, or belongs to another file system or another moment
 */
export async function openBtrfs(devices: readonly BlockDevice[], _context: Context): Promise<FileSystem[]> {
  const supers = await Promise.all(devices.map(readSuper))
  const sb = supers[0]!
  const about = { kind: 'btrfs', uuid: sb.fsid, label: sb.label === '' ? undefined : sb.label }
  if (sb.numDevices !== devices.length) {
    throw new NotTrusted(
      'btrfs-devices-missing',
      `Cannot trust one of several devices: found ${devices.length}, expected ${sb.numDevices}`,
      about,
    )
  }
  const byId = new Map<bigint, BlockDevice>()
  for (const [i, other] of supers.entries()) {
    if (
      other.fsid !== sb.fsid ||
      other.generation !== sb.generation ||
      other.root !== sb.root ||
      byId.has(other.devid)
    ) {
      throw new NotTrusted(
        'btrfs-devices-differ',
        'Cannot trust devices of one Btrfs from different moments',
        about,
      )
    }
    if (other.deviceBytes > devices[i]!.size) {
      throw new NotTrusted(
        'btrfs-size-mismatch',
        `Cannot use Btrfs: found ${devices[i]!.size} bytes of device, expected ${other.deviceBytes}`,
        about,
      )
    }
    byId.set(other.devid, devices[i]!)
  }
  const shared = new SharedBtrfs(sb, byId)
  return supers.map((one, i) => new BtrfsDevice(shared, one, devices[i]!))
}

class BtrfsDevice implements FileSystem {
  readonly kind = 'btrfs'
  readonly uuid: string
  readonly label: string | undefined
  readonly size: number
  readonly blockBytes: number
  readonly #shared: SharedBtrfs
  readonly #devid: bigint
  readonly #device: BlockDevice

  constructor(shared: SharedBtrfs, sb: SuperBlock, device: BlockDevice) {
    this.#shared = shared
    this.#devid = sb.devid
    this.#device = device
    this.uuid = sb.fsid
    this.label = sb.label === '' ? undefined : sb.label
    this.size = sb.deviceBytes
    this.blockBytes = sb.sectorBytes
  }

  async used(context: Context): Promise<UsedMap> {
    const { perDevice, logWalked } = await this.#shared.used(context)
    return {
      ranges: this.#whole(perDevice.get(this.#devid) ?? RangeSet.empty),
      trust: logWalked ? 'replayed' : 'exact',
      state: logWalked ? 'dirty: log trees walked' : 'clean',
    }
  }

  /** Bytes that some extent item names: the second opinion, from the extent tree and every log tree. */
  async audit(context: Context): Promise<RangeSet> {
    const perDevice = await this.#shared.audit(context)
    return perDevice.get(this.#devid) ?? RangeSet.empty
  }

  /** Adds what no tree names: the first MiB, the super blocks, the tail. */
  #whole(ranges: RangeSet): RangeSet {
    const fixed = new RangeSetBuilder().add(0, Math.min(FIRST_BYTES, this.#device.size))
    for (const at of SUPER_MIRRORS) {
      if (at + SUPER_BYTES <= this.size) fixed.add(at, Math.min(at + SUPER_RESERVED, this.#device.size))
    }
    fixed.add(this.size, this.#device.size)
    return ranges.union(fixed.build())
  }
}

interface SharedUsed {
  readonly perDevice: ReadonlyMap<bigint, RangeSet>
  readonly logWalked: boolean
}

/** What the devices of one file system have in common; computed once, whoever asks first. */
class SharedBtrfs {
  readonly #sb: SuperBlock
  readonly #devices: ReadonlyMap<bigint, BlockDevice>
  #used: Promise<SharedUsed> | undefined

  constructor(sb: SuperBlock, devices: ReadonlyMap<bigint, BlockDevice>) {
    this.#sb = sb
    this.#devices = devices
  }

  used(context: Context): Promise<SharedUsed> {
    this.#used ??= this.#computeUsed(context)
    return this.#used
  }

  async audit(context: Context): Promise<ReadonlyMap<bigint, RangeSet>> {
    const trees = await this.#openTrees()
    const { used } = await this.#fromExtentTree(trees, context)
    const log = this.#sb.logRoot === 0 ? RangeSet.empty : await this.#fromLogTrees(trees, context)
    return trees.chunks.project(used.union(log).union(await this.#fromEveryTree(trees, context)))
  }

  /** Nodes of every tree but the logs, and the extents that files own; the extent tree is not asked. */
  async #fromEveryTree(trees: Trees, context: Context): Promise<RangeSet> {
    const sb = this.#sb
    const used = new RangeSetBuilder()
    const seen = new Set<number>()
    const mark = (node: { bytenr: number }): void => void used.add(node.bytenr, node.bytenr + sb.nodeBytes)
    const roots: RootItem[] = [
      { bytenr: sb.chunkRoot, level: sb.chunkRootLevel, generation: sb.chunkRootGeneration },
    ]
    const top = { bytenr: sb.root, level: sb.rootLevel, generation: sb.generation }
    for await (const { key, data } of trees.items(top, mark, seen)) {
      if (key.type !== ITEM.root || key.objectid === TREE.relocation || isBeingDropped(data)) continue
      roots.push(decodeRootItem(data))
    }
    for (const root of roots) {
      for await (const { key, data } of trees.items(root, mark, seen)) {
        throwIfAborted(context.signal)
        // Type 0 is inline; of the others, address 0 is a hole.
        if (key.type !== ITEM.extentData || data.u8(20) === 0) continue
        const start = data.size64(21, 'extent address')
        if (start !== 0) used.add(start, start + data.size64(29, 'extent length'))
      }
    }
    return used.build()
  }

  async #computeUsed(context: Context): Promise<SharedUsed> {
    const trees = await this.#openTrees()
    const logical = await this.#allocated(trees, context)
    const logWalked = this.#sb.logRoot !== 0
    const log = logWalked ? await this.#fromLogTrees(trees, context) : RangeSet.empty
    const perDevice = trees.chunks.project(logical.union(log))
    for (const [devid, ranges] of perDevice) {
      const device = this.#devices.get(devid)
      if (!device || (ranges.end ?? 0) > device.size) {
        throw new NotTrusted(
          'btrfs-chunk-invalid',
          `Cannot use Btrfs chunks: found some after the end of device ${devid}`,
        )
      }
    }
    return { perDevice, logWalked }
  }

  /** Logical addresses in use by the last commit, from the cheaper source that adds up. */
  async #allocated(trees: Trees, context: Context): Promise<RangeSet> {
    const { bytesUsed } = this.#sb
    if (this.#sb.hasFreeSpaceTree) {
      const used = await this.#fromFreeSpaceTree(trees, context)
      if (used && used.size === bytesUsed) return used
    }
    const { used, itemBytes } = await this.#fromExtentTree(trees, context)
    if (used.size !== itemBytes || itemBytes !== bytesUsed) {
      throw new NotTrusted(
        'btrfs-extents-invalid',
        `Cannot trust the Btrfs extent tree: found ${used.size} bytes in ${itemBytes} bytes of extents, expected ${bytesUsed}`,
      )
    }
    return used
  }

  async #openTrees(): Promise<Trees> {
    const sb = this.#sb
    const trees = new Trees(sb, this.#devices, new ChunkMap(decodeSystemChunks(sb.systemChunks)))
    const chunks: Chunk[] = []
    const root = { bytenr: sb.chunkRoot, level: sb.chunkRootLevel, generation: sb.chunkRootGeneration }
    for await (const { key, data } of trees.items(root))
      if (key.type === ITEM.chunk) chunks.push(decodeChunk(key, data))
    trees.chunks = new ChunkMap(chunks)
    return trees
  }

  async #root(trees: Trees, id: bigint): Promise<RootItem | undefined> {
    const sb = this.#sb
    const top = { bytenr: sb.root, level: sb.rootLevel, generation: sb.generation }
    const item = await trees.find(top, { objectid: id, type: ITEM.root, offset: 0n })
    return item && decodeRootItem(item.data)
  }

  /** undefined when the tree is not there. */
  async #fromFreeSpaceTree(trees: Trees, context: Context): Promise<RangeSet | undefined> {
    const root = await this.#root(trees, TREE.freeSpace)
    if (!root) return undefined
    const free = new RangeSetBuilder()
    const described = new Set<number>()
    for await (const { key, data } of trees.items(root)) {
      throwIfAborted(context.signal)
      const start = Number(key.objectid)
      const length = Number(key.offset)
      if (key.type === ITEM.freeSpaceInfo) described.add(start)
      else if (key.type === ITEM.freeSpaceExtent) free.add(start, start + length)
      else if (key.type === ITEM.freeSpaceBitmap) {
        const unit = this.#sb.sectorBytes
        const bits = Math.min(Math.floor(length / unit), data.length * 8)
        Bitmap.fromBytes(data.bytes, bits).eachRun((from, to) =>
          free.add(start + from * unit, start + to * unit),
        )
      }
    }
    const all = new RangeSetBuilder()
    for (const chunk of trees.chunks.chunks) {
      if (!described.has(chunk.start)) return undefined
      all.add(chunk.start, chunk.start + chunk.length)
    }
    return all.build().subtract(free.build())
  }

  async #fromExtentTree(trees: Trees, context: Context): Promise<{ used: RangeSet; itemBytes: number }> {
    const root = await this.#root(trees, TREE.extent)
    if (!root) throw new NotTrusted('btrfs-extents-invalid', 'Cannot trust Btrfs: found no extent tree')
    const used = new RangeSetBuilder()
    let itemBytes = 0
    for await (const { key } of trees.items(root)) {
      throwIfAborted(context.signal)
      if (key.type !== ITEM.extent && key.type !== ITEM.metadata) continue
      const start = Number(key.objectid)
      const length = key.type === ITEM.extent ? Number(key.offset) : this.#sb.nodeBytes
      if (!Number.isSafeInteger(start + length))
        throw new NotTrusted('btrfs-extents-invalid', `Cannot use Btrfs extent at ${key.objectid}`)
      used.add(start, start + length)
      itemBytes += length
    }
    return { used: used.build(), itemBytes }
  }

  /** Nodes of every log tree and the file extents that they name. */
  async #fromLogTrees(trees: Trees, context: Context): Promise<RangeSet> {
    const sb = this.#sb
    const used = new RangeSetBuilder()
    const mark = (node: { bytenr: number }): void => void used.add(node.bytenr, node.bytenr + sb.nodeBytes)
    // The log belongs to the transaction after the last commit.
    const top = { bytenr: sb.logRoot, level: sb.logRootLevel, generation: sb.generation + 1n }
    const roots: RootItem[] = []
    for await (const { key, data } of trees.items(top, mark))
      if (key.type === ITEM.root) roots.push(decodeRootItem(data))
    for (const root of roots) {
      for await (const { key, data } of trees.items(root, mark)) {
        throwIfAborted(context.signal)
        // Type 0 is inline; of the others, address 0 is a hole.
        if (key.type !== ITEM.extentData || data.u8(20) === 0) continue
        const start = data.size64(21, 'extent address')
        if (start !== 0) used.add(start, start + data.size64(29, 'extent length'))
      }
    }
    return used.build()
  }
}
