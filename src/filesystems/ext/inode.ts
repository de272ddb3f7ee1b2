/**
 * Inodes and where their blocks stand: extent trees (ext4) and the direct/indirect map (ext2, ext3). What journal
 * replay needs for inode 8 and what the audit needs for every inode.
 *
 * Rule: every block number is checked against the file system before it is read or handed out, every tree has a
 * depth bound and strictly ascending logical blocks, so a loop in it ends the walk with an error.
 */
import { Bytes, rawCrc32c, VarveError } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { type GroupDescriptors, has, hasMetadataCsum, type Superblock } from './layout.ts'

export const INODE_FLAG = { extents: 0x80000, eaInode: 0x200000, inlineData: 0x10000000 } as const
export const MODE = {
  mask: 0xf000,
  fifo: 0x1000,
  char: 0x2000,
  dir: 0x4000,
  block: 0x6000,
  file: 0x8000,
  link: 0xa000,
  socket: 0xc000,
} as const

const EXTENT_MAGIC = 0xf30a
const EXTENT_HEADER_BYTES = 12
const EXTENT_ENTRY_BYTES = 12
/** The kernel's own bound (EXT4_MAX_EXTENT_DEPTH). */
const MAX_EXTENT_DEPTH = 5
/** An extent longer than this is an unwritten one of `length - 32768`. */
const MAX_WRITTEN_LENGTH = 32768
const DIRECT_BLOCKS = 12

export interface Inode {
  readonly number: number
  readonly mode: number
  /** Bytes. */
  readonly size: number
  readonly linksCount: number
  readonly dtime: number
  readonly flags: number
  readonly generation: number
  /** Block of extended attributes outside the inode; 0: none. */
  readonly fileAcl: number
  /** The 60 bytes that hold the extent root, the block map, a short link or inline data. */
  readonly iBlock: Uint8Array
}

/** Where an inode stands: the group's table checked, the number counted from 1. */
export function inodePlace(
  sb: Superblock,
  descriptors: GroupDescriptors,
  number: number,
): { readonly group: number; readonly offset: number } {
  if (!(Number.isInteger(number) && number >= 1 && number <= sb.inodesCount)) {
    throw corrupt(`find inode ${number}`, `${sb.inodesCount} inodes`, 'it among them')
  }
  const group = Math.floor((number - 1) / sb.inodesPerGroup)
  const index = (number - 1) % sb.inodesPerGroup
  return { group, offset: descriptors.inodeTable(group) * sb.blockBytes + index * sb.inodeSize }
}

/** Reads one inode and checks its checksum. @throws CORRUPT */
export async function readInode(
  device: BlockDevice,
  sb: Superblock,
  descriptors: GroupDescriptors,
  number: number,
  signal?: AbortSignal,
): Promise<Inode> {
  const { offset } = inodePlace(sb, descriptors, number)
  return decodeInode(sb, number, await readBytes(device, offset, sb.inodeSize, signal))
}

/** Decodes `sb.inodeSize` bytes of an inode table. @throws CORRUPT when its checksum is wrong */
export function decodeInode(sb: Superblock, number: number, raw: Uint8Array): Inode {
  const b = new Bytes(raw, 'little', `inode ${number}`)
  const generation = b.u32(0x64)
  if (hasMetadataCsum(sb) && !inodeChecksumIsRight(sb, number, b)) {
    throw corrupt(`read inode ${number}`, 'a wrong checksum', 'the one that its bytes give')
  }
  const mode = b.u16(0x00)
  // Old kernels kept a directory ACL where the high half of the size is: directories are below 4 GiB there.
  return {
    number,
    mode,
    size: b.u32(0x04) + b.u32(0x6c) * 2 ** 32,
    linksCount: b.u16(0x1a),
    dtime: b.u32(0x14),
    flags: b.u32(0x20),
    generation,
    fileAcl: b.u32(0x68) + b.u16(0x76) * 2 ** 32,
    iBlock: b.sub(0x28, 60).slice(),
  }
}

function inodeChecksumIsRight(sb: Superblock, number: number, b: Bytes): boolean {
  const wide = sb.inodeSize > 128 && b.u16(0x80) >= 4
  const copy = b.bytes.slice()
  copy.fill(0, 0x7c, 0x7e)
  if (wide) copy.fill(0, 0x82, 0x84)
  const crc = rawCrc32c(copy, inodeSeed(sb, number, b.u32(0x64)))
  if (b.u16(0x7c) !== (crc & 0xffff)) return false
  return !wide || b.u16(0x82) === crc >>> 16
}

/** The register from which checksums of an inode's own blocks (extent blocks, directories) go on. */
function inodeSeed(sb: Superblock, number: number, generation: number): number {
  const id = new Bytes(new Uint8Array(8), 'little')
  id.setU32(0, number)
  id.setU32(4, generation)
  return rawCrc32c(id.bytes, sb.csumSeed)
}

/** A run of a file's blocks, or of the tree that maps them. */
export interface BlockRun {
  /** Block of the file; undefined for blocks of the tree itself. */
  readonly logical: number | undefined
  readonly physical: number
  readonly blocks: number
  /** Allocated but reads as zeros. */
  readonly unwritten: boolean
}

/** True when the inode owns no blocks by its map: short links, devices, inline data. */
export function hasNoMap(inode: Inode): boolean {
  const type = inode.mode & MODE.mask
  if (type === MODE.char || type === MODE.block || type === MODE.fifo || type === MODE.socket) return true
  if (has(inode.flags, INODE_FLAG.inlineData)) return true
  // A short link keeps its target in i_block. Its size says so, whatever attribute blocks it has.
  return type === MODE.link && !has(inode.flags, INODE_FLAG.extents) && inode.size < 60
}

/**
 * All runs of an inode whose map fits the inode itself, which is that of nearly every file; undefined when blocks
 * must be read for it.
 * @throws CORRUPT
 */
export function rootRuns(sb: Superblock, inode: Inode): readonly BlockRun[] | undefined {
  if (hasNoMap(inode)) return []
  if (has(inode.flags, INODE_FLAG.extents)) {
    const node = decodeExtentNode(sb, inode, inode.iBlock, undefined, 0)
    return node.depth === 0 ? node.runs : undefined
  }
  const b = new Bytes(inode.iBlock, 'little', `block map of inode ${inode.number}`)
  const runs: BlockRun[] = []
  for (let i = 0; i < DIRECT_BLOCKS + 3; i++) {
    const physical = b.u32(i * 4)
    if (physical === 0) continue
    if (i >= DIRECT_BLOCKS) return undefined
    checkRun(sb, inode, physical, 1)
    runs.push({ logical: i, physical, blocks: 1, unwritten: false })
  }
  return runs
}

/**
 * Every run of blocks that the inode owns, those of its tree too, logical blocks ascending. Attribute blocks are
 * not among them (`fileAcl`).
 * @throws CORRUPT
 */
export async function* blockRuns(
  device: BlockDevice,
  sb: Superblock,
  inode: Inode,
  signal?: AbortSignal,
): AsyncGenerator<BlockRun> {
  if (hasNoMap(inode)) return
  if (has(inode.flags, INODE_FLAG.extents)) {
    yield* extentNode({ device, sb, inode, signal, next: 0 }, inode.iBlock, undefined)
  } else {
    yield* mappedBlocks(device, sb, inode, signal)
  }
}

interface ExtentWalk {
  readonly device: BlockDevice
  readonly sb: Superblock
  readonly inode: Inode
  readonly signal: AbortSignal | undefined
  /** First logical block that may come next: ascending, so a loop in the tree is an error. */
  next: number
}

async function* extentNode(
  walk: ExtentWalk,
  bytes: Uint8Array,
  expectedDepth: number | undefined,
): AsyncGenerator<BlockRun> {
  const { sb, inode } = walk
  const node = decodeExtentNode(sb, inode, bytes, expectedDepth, walk.next)
  if (node.depth === 0) {
    const last = node.runs.at(-1)
    if (last) walk.next = (last.logical ?? 0) + last.blocks
    yield* node.runs
    return
  }
  for (const child of node.runs) {
    if ((child.logical ?? 0) < walk.next) {
      throw corrupt(
        `read extents of inode ${inode.number}`,
        `block ${child.logical} twice`,
        'ascending blocks',
      )
    }
    yield { ...child, logical: undefined }
    const before = walk.next
    const block = await readBytes(walk.device, child.physical * sb.blockBytes, sb.blockBytes, walk.signal)
    yield* extentNode(walk, block, node.depth - 1)
    // An index entry with nothing under it would let a hostile tree visit one block over and over.
    if (walk.next === before) {
      throw corrupt(
        `read extents of inode ${inode.number}`,
        `an empty node at block ${child.physical}`,
        'extents',
      )
    }
  }
}

interface ExtentNode {
  readonly depth: number
  /** Extents (depth 0), or the children with the first block of the file that each maps. */
  readonly runs: readonly BlockRun[]
}

/** `expectedDepth`: of a block below the root; undefined for the root, which has no checksum of its own. */
function decodeExtentNode(
  sb: Superblock,
  inode: Inode,
  bytes: Uint8Array,
  expectedDepth: number | undefined,
  from: number,
): ExtentNode {
  const doing = `read extents of inode ${inode.number}`
  const b = new Bytes(bytes, 'little', `extent block of inode ${inode.number}`)
  const entries = b.u16(2)
  const max = b.u16(4)
  const depth = b.u16(6)
  if (b.u16(0) !== EXTENT_MAGIC) throw corrupt(doing, `magic ${b.u16(0)}`, `${EXTENT_MAGIC}`)
  if (depth !== (expectedDepth ?? depth) || depth > MAX_EXTENT_DEPTH) {
    throw corrupt(doing, `depth ${depth}`, `${expectedDepth ?? `at most ${MAX_EXTENT_DEPTH}`}`)
  }
  if (entries > max || EXTENT_HEADER_BYTES + max * EXTENT_ENTRY_BYTES > bytes.length) {
    throw corrupt(doing, `${entries} of ${max} entries`, `a node of ${bytes.length} bytes`)
  }
  if (expectedDepth !== undefined && hasMetadataCsum(sb)) {
    // The tail stands right after the last place for an entry.
    const tail = EXTENT_HEADER_BYTES + max * EXTENT_ENTRY_BYTES
    const crc = rawCrc32c(bytes.subarray(0, tail), inodeSeed(sb, inode.number, inode.generation))
    if (b.u32(tail) !== crc) throw corrupt(doing, 'a wrong checksum', 'the one that its bytes give')
  }
  const runs: BlockRun[] = []
  let next = from
  for (let entry = 0; entry < entries; entry++) {
    const at = EXTENT_HEADER_BYTES + entry * EXTENT_ENTRY_BYTES
    const logical = b.u32(at)
    if (logical < next) throw corrupt(doing, `block ${logical} after ${next}`, 'ascending blocks')
    if (depth > 0) {
      const physical = b.u32(at + 4) + b.u16(at + 8) * 2 ** 32
      checkRun(sb, inode, physical, 1)
      runs.push({ logical, physical, blocks: 1, unwritten: false })
      next = logical + 1
    } else {
      const stored = b.u16(at + 4)
      const unwritten = stored > MAX_WRITTEN_LENGTH
      const blocks = unwritten ? stored - MAX_WRITTEN_LENGTH : stored
      const physical = b.u32(at + 8) + b.u16(at + 6) * 2 ** 32
      checkRun(sb, inode, physical, blocks)
      runs.push({ logical, physical, blocks, unwritten })
      next = logical + blocks
    }
  }
  return { depth, runs }
}

async function* mappedBlocks(
  device: BlockDevice,
  sb: Superblock,
  inode: Inode,
  signal: AbortSignal | undefined,
): AsyncGenerator<BlockRun> {
  const perBlock = sb.blockBytes / 4
  const root = new Bytes(inode.iBlock, 'little', `block map of inode ${inode.number}`)
  // A tree can name one block again and again; a file cannot own more blocks than there are.
  const budget = { left: sb.blocksCount }

  async function* pointer(block: number, depth: number, logical: number): AsyncGenerator<BlockRun> {
    if (block === 0) return
    checkRun(sb, inode, block, 1)
    if (--budget.left < 0)
      throw corrupt(`read the block map of inode ${inode.number}`, 'more blocks than exist', 'a tree')
    if (depth === 0) {
      yield { logical, physical: block, blocks: 1, unwritten: false }
      return
    }
    yield { logical: undefined, physical: block, blocks: 1, unwritten: false }
    const bytes = await readBytes(device, block * sb.blockBytes, sb.blockBytes, signal)
    const pointers = new Bytes(bytes, 'little', `indirect block of inode ${inode.number}`)
    const step = perBlock ** (depth - 1)
    if (depth > 1) {
      for (let i = 0; i < perBlock; i++) yield* pointer(pointers.u32(i * 4), depth - 1, logical + i * step)
      return
    }
    // The common case, runs joined: one step of the generator for a run, not for each block.
    let run: { logical: number; physical: number; blocks: number } | undefined
    for (let i = 0; i < perBlock; i++) {
      const physical = pointers.u32(i * 4)
      if (run && physical === run.physical + run.blocks) {
        run.blocks++
      } else {
        if (run) yield { ...run, unwritten: false }
        run = physical === 0 ? undefined : { logical: logical + i, physical, blocks: 1 }
      }
      if (physical !== 0) {
        checkRun(sb, inode, physical, 1)
        if (--budget.left < 0)
          throw corrupt(`read the block map of inode ${inode.number}`, 'more blocks than exist', 'a tree')
      }
    }
    if (run) yield { ...run, unwritten: false }
  }

  for (let i = 0; i < DIRECT_BLOCKS; i++) yield* pointer(root.u32(i * 4), 0, i)
  let logical = DIRECT_BLOCKS
  for (let depth = 1; depth <= 3; depth++) {
    yield* pointer(root.u32((DIRECT_BLOCKS + depth - 1) * 4), depth, logical)
    logical += perBlock ** depth
  }
}

function checkRun(sb: Superblock, inode: Inode, physical: number, blocks: number): void {
  if (blocks < 1 || physical < sb.firstDataBlock || physical === 0 || physical + blocks > sb.blocksCount) {
    throw corrupt(
      `read the blocks of inode ${inode.number}`,
      `${blocks} blocks at ${physical}`,
      `them inside ${sb.blocksCount} blocks`,
    )
  }
}

function corrupt(doing: string, found: string, expected: string): VarveError {
  return new VarveError('CORRUPT', `Cannot ${doing}: found ${found}, expected ${expected}`)
}
