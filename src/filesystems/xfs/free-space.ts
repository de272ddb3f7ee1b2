/**
 * The free extents of every allocation group, from its by-block-number btree (bnobt).
 *
 * An AG begins with four sectors: superblock copy, AGF (roots of the free-space trees, counts), AGI (roots of the
 * inode trees), AGFL (a small ring of blocks kept back for the trees themselves). The bnobt holds one record per
 * free extent, ascending, apart from each other. Everything else of the AG is in use.
 *
 * Blocks on the AGFL are called in use. They hold nothing, so leaving them out would be right as well (`xfs_db
 * freesp` counts them as free); but they are few, the kernel's own fsmap reports them as owned, and a crash makes
 * the ring the first thing to be wrong.
 *
 * Rule: the tree must agree with itself (levels, siblings, key order), with the AGF (sum and longest), and with every
 * other structure whose place is known (headers, AGFL, roots, tree blocks, log): none of those may be free.
 */
import { Bytes, mapBounded, throwIfAborted } from '../../base/index.ts'
import { RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import type { BlockReader, Identity, Loaded } from './blocks.ts'
import {
  AG_HEADER_SECTORS,
  AG_SECTOR,
  AGF_CRC_AT,
  AGF_MAGIC,
  AGF_UUID_AT,
  AGFL_CRC_AT,
  AGFL_MAGIC,
  AGFL_UUID_AT,
  AGI_CRC_AT,
  AGI_MAGIC,
  AGI_UUID_AT,
  type Agf,
  type Agi,
  agflHeaderBytes,
  BTREE_MAGIC,
  decodeAgf,
  decodeAgi,
  MAX_LEVELS,
  RO_COMPAT,
  type Superblock,
} from './layout.ts'
import { walkShortTree } from './short-btree.ts'
import { agByte, agLength, headerBlocks, splitFsbno } from './superblock.ts'

/** AGs worked on at a time. */
const PARALLEL_AGS = 16

const AGF_IDENTITY: Identity = { crcAt: AGF_CRC_AT, uuidAt: AGF_UUID_AT, blknoAt: -1 }
const AGI_IDENTITY: Identity = { crcAt: AGI_CRC_AT, uuidAt: AGI_UUID_AT, blknoAt: -1 }
const AGFL_IDENTITY: Identity = { crcAt: AGFL_CRC_AT, uuidAt: AGFL_UUID_AT, blknoAt: -1 }

export interface AgHeaders {
  readonly agno: number
  readonly length: number
  readonly agf: Agf
  readonly agi: Agi
  /** agbnos on the free list, in ring order. */
  readonly freeList: readonly number[]
}

/** Free extents in bytes of the device. @throws NotTrusted */
export async function readFreeSpace(reader: BlockReader): Promise<RangeSet> {
  const { sb } = reader
  const perAg = await mapBounded(agNumbers(sb), PARALLEL_AGS, (agno) => readAgFreeSpace(reader, agno))
  const all = new RangeSetBuilder()
  for (const free of perAg) all.addAll(free)
  return all.build()
}

/**
 * Like `readFreeSpace`, but an AG that cannot be read gives its whole self: for the state *before* a replay, which
 * may be half written back and is only looked at to call more in use.
 */
export async function readFreeSpaceWherePossible(reader: BlockReader): Promise<RangeSet> {
  const { sb } = reader
  const perAg = await mapBounded(agNumbers(sb), PARALLEL_AGS, async (agno) => {
    try {
      return await readAgFreeSpace(reader, agno)
    } catch (error) {
      throwIfAborted(reader.signal)
      if (!(error instanceof Error) || !('reason' in error)) throw error
      const from = agByte(sb, agno, 0)
      return RangeSet.of(from, from + agLength(sb, agno) * sb.blockBytes)
    }
  })
  const all = new RangeSetBuilder()
  for (const free of perAg) all.addAll(free)
  return all.build()
}

function* agNumbers(sb: Superblock): Generator<number> {
  for (let agno = 0; agno < sb.agcount; agno++) yield agno
}

async function readAgFreeSpace(reader: BlockReader, agno: number): Promise<RangeSet> {
  throwIfAborted(reader.signal)
  const { sb } = reader
  const headers = await readAgHeaders(reader, agno)
  const { free, blocks } = await walkBnobt(reader, headers)
  const { agf, agi, freeList } = headers
  const where = (): string => `AG ${agno}`

  let longest = 0
  for (let i = 0; i < free.count; i++) longest = Math.max(longest, free.endAt(i) - free.startAt(i))
  if (free.size !== agf.freeblks || longest !== agf.longest) {
    throw reader.refuse(
      'xfs-free-count',
      `${free.size} free blocks, the longest extent ${longest}, in ${where()}`,
      `${agf.freeblks} and ${agf.longest} as the AGF says`,
    )
  }
  const neverFree = (start: number, end: number, what: string): void => {
    if (free.touches(start, end))
      throw reader.refuse('xfs-free-overlap', `${what} called free in ${where()}`, 'it to be in use')
  }
  neverFree(0, headerBlocks(sb), 'the AG headers')
  for (const block of freeList) neverFree(block, block + 1, 'a block of the free list')
  for (const block of blocks) neverFree(block, block + 1, 'a block of the free-space tree')
  neverFree(agf.cntRoot, agf.cntRoot + 1, 'the by-size tree')
  neverFree(agi.root, agi.root + 1, 'the inode tree')
  if (sb.version === 5) {
    if ((sb.roCompat & RO_COMPAT.RMAPBT) !== 0) neverFree(agf.rmapRoot, agf.rmapRoot + 1, 'the rmap tree')
    if ((sb.roCompat & RO_COMPAT.REFLINK) !== 0)
      neverFree(agf.refcountRoot, agf.refcountRoot + 1, 'the refcount tree')
    if ((sb.roCompat & RO_COMPAT.FINOBT) !== 0)
      neverFree(agi.freeRoot, agi.freeRoot + 1, 'the free inode tree')
  }
  const log = splitFsbno(sb, sb.logstart)
  if (log.agno === agno) neverFree(log.agbno, log.agbno + sb.logblocks, 'the log')
  return free.shift(agno * sb.agblocks).scale(sb.blockBytes)
}

/** AGF, AGI and AGFL of an AG, checked. One read. @throws NotTrusted */
export async function readAgHeaders(reader: BlockReader, agno: number): Promise<AgHeaders> {
  const { sb } = reader
  const base = agByte(sb, agno, 0)
  const sector = sb.sectorBytes
  const [all] = await reader.read([{ offset: base, length: AG_HEADER_SECTORS * sector }])
  const part = (index: number, identity: Identity, magic: number, what: string): Loaded =>
    reader.finish(
      {
        offset: base + index * sector,
        bytes: all!.bytes.subarray(index * sector, (index + 1) * sector),
        replayed: false,
      },
      identity,
      magic,
      `${what} of AG ${agno}`,
    )
  const length = agLength(sb, agno)
  const refuse = (what: string, expected: string): never => {
    throw reader.refuse('xfs-ag-header', `${what} in AG ${agno}`, expected)
  }

  const agf = decodeAgf(part(AG_SECTOR.AGF, AGF_IDENTITY, AGF_MAGIC, 'AGF').bytes)
  if (agf.versionnum !== 1) refuse(`AGF version ${agf.versionnum}`, '1')
  if (agf.seqno !== agno) refuse(`an AGF of AG ${agf.seqno}`, String(agno))
  if (agf.length !== length) refuse(`an AGF of ${agf.length} blocks`, String(length))
  if (agf.freeblks > length || agf.longest > agf.freeblks) {
    refuse(`${agf.freeblks} free blocks and a longest extent of ${agf.longest}`, `at most ${length}`)
  }
  const root = (name: string, block: number, level: number): void => {
    if (block < headerBlocks(sb) || block >= length || level < 1 || level > MAX_LEVELS)
      refuse(`the root of the ${name} at ${block} with ${level} levels`, 'one inside')
  }
  root('bnobt', agf.bnoRoot, agf.bnoLevel)
  root('cntbt', agf.cntRoot, agf.cntLevel)
  if ((sb.roCompat & RO_COMPAT.RMAPBT) !== 0) root('rmapbt', agf.rmapRoot, agf.rmapLevel)
  if ((sb.roCompat & RO_COMPAT.REFLINK) !== 0) root('refcountbt', agf.refcountRoot, agf.refcountLevel)

  const agi = decodeAgi(part(AG_SECTOR.AGI, AGI_IDENTITY, AGI_MAGIC, 'AGI').bytes)
  if (agi.seqno !== agno) refuse(`an AGI of AG ${agi.seqno}`, String(agno))
  if (agi.length !== length) refuse(`an AGI of ${agi.length} blocks`, String(length))
  root('inobt', agi.root, agi.level)
  if ((sb.roCompat & RO_COMPAT.FINOBT) !== 0) root('finobt', agi.freeRoot, agi.freeLevel)

  const freeList = readFreeList(reader, agno, agf, () =>
    sb.version === 5
      ? part(AG_SECTOR.AGFL, AGFL_IDENTITY, AGFL_MAGIC, 'AGFL').bytes
      : reader.finishPlain(base + AG_SECTOR.AGFL * sector, all!.bytes.subarray(3 * sector, 4 * sector)),
  )
  return { agno, length, agf, agi, freeList }
}

function readFreeList(reader: BlockReader, agno: number, agf: Agf, load: () => Uint8Array): number[] {
  const { sb } = reader
  const bytes = load()
  const from = agflHeaderBytes(sb.version)
  const size = Math.floor((sb.sectorBytes - from) / 4)
  const refuse = (found: string, expected: string): never => {
    throw reader.refuse('xfs-free-list', `${found} in AG ${agno}`, expected)
  }
  const { flfirst, fllast, flcount } = agf
  if (flfirst >= size || fllast >= size || flcount > size)
    refuse(`a free list of ${flcount} from ${flfirst} to ${fllast}`, `indexes below ${size}`)
  const span = (fllast - flfirst + size) % size
  // An empty ring has its last index one before its first.
  if (flcount % size !== (span + 1) % size) refuse(`a free list of ${flcount}`, `${span + 1}`)
  const b = new Bytes(bytes, 'big', 'AGFL')
  if (sb.version === 5 && b.u32(4) !== agno) refuse(`an AGFL of AG ${b.u32(4)}`, String(agno))
  const list: number[] = []
  const length = agLength(sb, agno)
  for (let i = 0; i < flcount; i++) {
    const block = b.u32(from + ((flfirst + i) % size) * 4)
    if (block < headerBlocks(sb) || block >= length) refuse(`block ${block} on the free list`, 'one inside')
    list.push(block)
  }
  if (new Set(list).size !== list.length) refuse('a block twice on the free list', 'each once')
  return list
}

interface Walk {
  /** In blocks of the AG. */
  readonly free: RangeSet
  /** Every block of the tree. */
  readonly blocks: readonly number[]
}

async function walkBnobt(reader: BlockReader, headers: AgHeaders): Promise<Walk> {
  const { agno, length, agf } = headers
  const free = new RangeSetBuilder()
  let lastEnd = 0
  const tree = {
    name: 'free-space tree',
    reason: 'xfs-free-space-tree',
    magic: BTREE_MAGIC.bno,
    recordBytes: 8,
    keyBytes: 8,
    agno,
    root: agf.bnoRoot,
    levels: agf.bnoLevel,
  }
  const blocks = await walkShortTree(reader, tree, (block, at) => {
    const start = block.u32(at)
    const end = start + block.u32(at + 4)
    // Free extents that touch are one extent.
    if (end === start || end > length || (lastEnd > 0 && start <= lastEnd)) {
      throw reader.refuse(
        'xfs-free-space-tree',
        `a free extent [${start}, ${end}) in AG ${agno}`,
        `one after ${lastEnd} and inside ${length} blocks`,
      )
    }
    free.add(start, end)
    lastEnd = end
  })
  return { free: free.build(), blocks }
}
