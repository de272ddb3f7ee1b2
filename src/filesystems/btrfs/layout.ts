/**
 * Btrfs on disk: super block, tree nodes, the items that tell what is allocated. Little-endian. Decoding only, no I/O.
 * Names follow the on-disk format documentation; docs/formats/btrfs.md has the byte tables.
 */
import { Bytes, isPowerOfTwo, LIMITS, NotTrusted, uuidText, within } from '../../base/index.ts'

export const SUPER_OFFSET = 65536
export const SUPER_BYTES = 4096
/** Further copies, where the device is that large. */
export const SUPER_MIRRORS: readonly number[] = [SUPER_OFFSET, 64 * 2 ** 20, 256 * 2 ** 30]
/** What the allocator keeps clear for each copy: one stripe. */
export const SUPER_RESERVED = 65536
/** Never allocated: boot loaders live there. */
export const FIRST_BYTES = 1_048_576
export const MAGIC = '_BHRfS_M'

export const TREE = {
  extent: 2n,
  freeSpace: 10n,
  /** A copy that a balance works on: -8. */
  relocation: 0xfffffffffffffff8n,
} as const

export const ITEM = {
  inode: 1,
  extentData: 108,
  root: 132,
  extent: 168,
  metadata: 169,
  blockGroup: 192,
  freeSpaceInfo: 198,
  freeSpaceExtent: 199,
  freeSpaceBitmap: 200,
  chunk: 228,
} as const

const INCOMPAT = {
  /** Everything up to RAID1C34, and simple quotas. */
  known: 0x10fff,
  metadataUuid: 0x400,
  zoned: 0x1000,
  stripeTree: 0x4000,
} as const

const COMPAT_RO = { freeSpaceTree: 1, freeSpaceTreeValid: 2, known: 15 } as const

/** Flags of the super block that a complete, unshared file system may carry: written, relocated. */
const SUPER_FLAGS = 3n

export const PROFILE = {
  raid0: 8,
  raid1: 16,
  dup: 32,
  raid10: 64,
  raid5: 128,
  raid6: 256,
  raid1c3: 512,
  raid1c4: 1024,
  /** Data, system, metadata. */
  types: 7,
} as const

export interface SuperBlock {
  readonly fsid: string
  /** The id that tree nodes carry; differs from `fsid` after `btrfstune -m`. */
  readonly metadataUuid: string
  readonly label: string
  readonly generation: bigint
  readonly root: number
  readonly rootLevel: number
  readonly chunkRoot: number
  readonly chunkRootLevel: number
  readonly chunkRootGeneration: bigint
  /** 0 when nothing was fsync'ed since the last commit. */
  readonly logRoot: number
  readonly logRootLevel: number
  readonly totalBytes: number
  readonly bytesUsed: number
  readonly numDevices: number
  readonly sectorBytes: number
  readonly nodeBytes: number
  readonly checksumType: number
  readonly hasFreeSpaceTree: boolean
  readonly devid: bigint
  readonly deviceBytes: number
  readonly systemChunks: Uint8Array
}

export function isSuperBlock(bytes: Uint8Array): boolean {
  return new Bytes(bytes, 'little').text(0x40, 8) === MAGIC
}

/** @throws NotTrusted for features that change what allocation means, or fields that make no sense */
export function decodeSuper(bytes: Uint8Array): SuperBlock {
  const sb = new Bytes(bytes, 'little', 'Btrfs super block')
  const fsid = uuidText(sb.sub(0x20, 16))
  const label = sb.cString(0x12b, 256)
  const about = { kind: 'btrfs', uuid: fsid, label: label === '' ? undefined : label }
  const invalid = (why: string): NotTrusted =>
    new NotTrusted('btrfs-super-invalid', `Cannot use Btrfs super block: ${why}`, about)
  const incompat = sb.u64(0xbc)
  if ((incompat & BigInt(INCOMPAT.zoned)) !== 0n) {
    throw new NotTrusted(
      'btrfs-zoned',
      'Cannot trust a zoned Btrfs: what lies before the write pointer is not in its trees',
      about,
    )
  }
  if ((incompat & BigInt(INCOMPAT.stripeTree)) !== 0n) {
    throw new NotTrusted(
      'btrfs-stripe-tree',
      'Cannot trust a Btrfs with a RAID stripe tree: its placement is not read',
      about,
    )
  }
  const compatRo = sb.u64(0xb4)
  if ((incompat & ~BigInt(INCOMPAT.known)) !== 0n || (compatRo & ~BigInt(COMPAT_RO.known)) !== 0n) {
    throw new NotTrusted(
      'btrfs-unknown-feature',
      `Cannot trust a Btrfs with features incompat 0x${incompat.toString(16)}, compat_ro 0x${compatRo.toString(16)}`,
      about,
    )
  }
  const flags = sb.u64(0x38)
  if ((flags & ~SUPER_FLAGS) !== 0n) {
    throw new NotTrusted(
      'btrfs-super-flags',
      `Cannot trust a Btrfs with super block flags 0x${flags.toString(16)}`,
      about,
    )
  }
  const sectorBytes = sb.u32(0x90)
  const nodeBytes = sb.u32(0x94)
  if (!(isPowerOfTwo(sectorBytes) && sectorBytes >= 512 && sectorBytes <= 65536))
    throw invalid(`sectors of ${sectorBytes} bytes`)
  if (!(isPowerOfTwo(nodeBytes) && nodeBytes >= sectorBytes && nodeBytes <= 65536))
    throw invalid(`nodes of ${nodeBytes} bytes`)
  const systemBytes = within(sb.u32(0xa0), 2048, 'bytes of system chunks')
  return {
    fsid,
    metadataUuid: (incompat & BigInt(INCOMPAT.metadataUuid)) !== 0n ? uuidText(sb.sub(0x23b, 16)) : fsid,
    label,
    generation: sb.u64(0x48),
    root: sb.size64(0x50, 'root'),
    rootLevel: sb.u8(0xc6),
    chunkRoot: sb.size64(0x58, 'chunk root'),
    chunkRootLevel: sb.u8(0xc7),
    chunkRootGeneration: sb.u64(0xa4),
    logRoot: sb.size64(0x60, 'log root'),
    logRootLevel: sb.u8(0xc8),
    totalBytes: sb.size64(0x70, 'total bytes'),
    bytesUsed: sb.size64(0x78, 'bytes used'),
    numDevices: within(sb.size64(0x88, 'devices'), 1024, 'devices'),
    sectorBytes,
    nodeBytes,
    checksumType: sb.u16(0xc4),
    hasFreeSpaceTree: (Number(compatRo) & 3) === (COMPAT_RO.freeSpaceTree | COMPAT_RO.freeSpaceTreeValid),
    devid: sb.u64(0xc9),
    deviceBytes: sb.size64(0xc9 + 8, 'bytes of the device'),
    systemChunks: sb.sub(0x32b, systemBytes),
  }
}

export interface Key {
  readonly objectid: bigint
  readonly type: number
  readonly offset: bigint
}

export function compareKeys(a: Key, b: Key): number {
  if (a.objectid !== b.objectid) return a.objectid < b.objectid ? -1 : 1
  if (a.type !== b.type) return a.type - b.type
  return a.offset === b.offset ? 0 : a.offset < b.offset ? -1 : 1
}

function decodeKey(view: Bytes, at: number): Key {
  return { objectid: view.u64(at), type: view.u8(at + 8), offset: view.u64(at + 9) }
}

const NODE_HEADER = 101
const ITEM_BYTES = 25
const POINTER_BYTES = 33

export interface NodePointer {
  readonly key: Key
  readonly bytenr: number
  readonly generation: bigint
}

export interface Item {
  readonly key: Key
  readonly data: Bytes
}

export interface Node {
  readonly bytenr: number
  readonly generation: bigint
  readonly level: number
  readonly owner: bigint
  readonly fsid: string
  /** Inner nodes. */
  readonly pointers: readonly NodePointer[]
  /** Leaves. */
  readonly items: readonly Item[]
}

/** Decodes a node whose checksum holds. Keys must ascend and items lie inside. @throws NotTrusted */
export function decodeNode(bytes: Uint8Array): Node {
  const view = new Bytes(bytes, 'little', 'Btrfs node')
  const bytenr = view.size64(48, 'address')
  const level = view.u8(100)
  const count = view.u32(96)
  const invalid = (why: string): NotTrusted =>
    new NotTrusted('btrfs-node-invalid', `Cannot use Btrfs node ${bytenr}: ${why}`)
  const unit = level === 0 ? ITEM_BYTES : POINTER_BYTES
  if (level > 7 || count > (bytes.length - NODE_HEADER) / unit)
    throw invalid(`found ${count} entries at level ${level}`)
  const pointers: NodePointer[] = []
  const items: Item[] = []
  let last: Key | undefined
  for (let i = 0; i < count; i++) {
    const at = NODE_HEADER + i * unit
    const key = decodeKey(view, at)
    if (last && compareKeys(last, key) >= 0) throw invalid('found keys that do not ascend')
    last = key
    if (level === 0) {
      const offset = view.u32(at + 17)
      const size = view.u32(at + 21)
      if (NODE_HEADER + offset + size > bytes.length) throw invalid('found an item outside it')
      items.push({
        key,
        data: new Bytes(view.sub(NODE_HEADER + offset, size), 'little', `Btrfs item in ${bytenr}`),
      })
    } else {
      pointers.push({ key, bytenr: view.size64(at + 17, 'pointer'), generation: view.u64(at + 25) })
    }
  }
  return {
    bytenr,
    level,
    generation: view.u64(80),
    owner: view.u64(88),
    fsid: uuidText(view.sub(32, 16)),
    pointers,
    items,
  }
}

export interface RootItem {
  readonly bytenr: number
  readonly level: number
  readonly generation: bigint
}

/** True while a deleted subvolume is taken apart: some of what its tree points to is free already. */
export function isBeingDropped(rootItem: Bytes): boolean {
  return rootItem.u32(216) === 0
}

export function decodeRootItem(data: Bytes): RootItem {
  return { generation: data.u64(160), bytenr: data.size64(176, 'root'), level: data.u8(238) }
}

export interface Stripe {
  readonly devid: bigint
  readonly offset: number
}

/** A run of logical addresses and where its copies and stripes are. */
export interface Chunk {
  readonly start: number
  readonly length: number
  readonly stripeBytes: number
  readonly type: number
  readonly subStripes: number
  readonly stripes: readonly Stripe[]
}

const CHUNK_HEADER = 48
const STRIPE_BYTES = 32

export function decodeChunk(key: Key, data: Bytes): Chunk {
  const count = data.u16(44)
  const stripes: Stripe[] = []
  for (let i = 0; i < within(count, 4096, 'stripes of a chunk'); i++) {
    const at = CHUNK_HEADER + i * STRIPE_BYTES
    stripes.push({ devid: data.u64(at), offset: data.size64(at + 8, 'stripe offset') })
  }
  const start = Number(key.offset)
  const chunk = {
    start,
    length: data.size64(0, 'chunk length'),
    stripeBytes: data.size64(16, 'stripe length'),
    type: Number(data.u64(24) & 0xffffn),
    subStripes: data.u16(46),
    stripes,
  }
  const mirrored =
    chunk.subStripes < 1 || (chunk.type & PROFILE.raid10) === 0 || count % chunk.subStripes === 0
  if (
    !(
      count > 0 &&
      chunk.length > 0 &&
      isPowerOfTwo(chunk.stripeBytes) &&
      chunk.stripeBytes >= 4096 &&
      mirrored &&
      Number.isSafeInteger(start + chunk.length)
    )
  ) {
    throw new NotTrusted(
      'btrfs-chunk-invalid',
      `Cannot use Btrfs chunk at ${start}: found ${count} stripes of ${chunk.length} bytes`,
    )
  }
  return chunk
}

/** The chunks that the super block itself carries, so that the chunk tree can be found: key, item, key, item … */
export function decodeSystemChunks(bytes: Uint8Array): Chunk[] {
  const view = new Bytes(bytes, 'little', 'Btrfs system chunks')
  const chunks: Chunk[] = []
  for (let at = 0; at < bytes.length; ) {
    const key = decodeKey(view, at)
    const rest = new Bytes(view.sub(at + 17, bytes.length - at - 17), 'little', 'Btrfs system chunk')
    const chunk = decodeChunk(key, rest)
    chunks.push(chunk)
    at += 17 + CHUNK_HEADER + chunk.stripes.length * STRIPE_BYTES
  }
  return chunks
}

/** Most nodes that a walk may visit before the trees are taken for a loop. */
export function nodeLimit(sb: SuperBlock): number {
  return Math.max(
    1024,
    Math.min(Math.ceil(sb.totalBytes / sb.nodeBytes), (LIMITS.treeNodesPerMiB * sb.totalBytes) / 2 ** 20),
  )
}
