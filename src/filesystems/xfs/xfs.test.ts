/** XFS: damaged and hostile file systems, in memory. The maps of sound ones are judged in test/oracle and test/poison. */
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { before, describe, test } from 'node:test'
import { livePages, mutate } from '../../../test/fuzz/mutations.ts'
import { must, needs, needsRoot, Random, tempDir } from '../../../test/kit/index.ts'
import { fillTree, freeByXfsDb, makeManyExtents, makeXfs } from '../../../test/kit/xfs.ts'
import { mounted } from '../../../test/poison/mount.ts'
import { crc32c, NotTrusted, VarveError } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import type { RangeSet } from '../../extents/index.ts'
import type { UsedMap } from '../file-system.ts'
import { XfsFileSystem, xfsType } from './index.ts'
import {
  AGF_CRC_AT,
  AGFL_CRC_AT,
  AGI_CRC_AT,
  type Agf,
  BB,
  decodeAgf,
  decodeSuperblock,
  type Superblock,
} from './layout.ts'
import { XfsLog } from './log.ts'

const ARGS = ['-b', 'size=1k', '-d', 'agcount=2', '-l', 'size=4m']
const MIB = 64
const random = new Random()

async function used(bytes: Uint8Array): Promise<UsedMap> {
  return await (await xfsType.open(new MemoryDevice(bytes), {})).used({})
}

async function audit(bytes: Uint8Array): Promise<RangeSet> {
  const fileSystem = await xfsType.open(new MemoryDevice(bytes), {})
  assert.ok(fileSystem instanceof XfsFileSystem)
  return await fileSystem.audit({})
}

/** The reason that `bytes` are refused for, or the map. */
async function reasonOf(bytes: Uint8Array): Promise<string> {
  try {
    return `map of ${(await used(bytes)).ranges.size} bytes`
  } catch (error) {
    if (error instanceof NotTrusted) return error.reason
    throw error
  }
}

/** Changes `bytes`, looks what comes of it, and changes them back. */
async function withChange(bytes: Uint8Array, at: number, put: Uint8Array): Promise<string> {
  const saved = bytes.slice(at, at + put.length)
  bytes.set(put, at)
  try {
    return await reasonOf(bytes)
  } finally {
    bytes.set(saved, at)
  }
}

function flipped(bytes: Uint8Array, at: number): Uint8Array {
  return Uint8Array.of(bytes[at]! ^ (1 << random.below(8)))
}

/** Sets a big-endian field of a structure and its checksum anew; looks what comes of it. */
async function withField(
  bytes: Uint8Array,
  structure: { readonly at: number; readonly length: number; readonly crcAt: number },
  fields: Readonly<Record<number, number>>,
  bits: 8 | 16 | 32 | 64 = 32,
): Promise<string> {
  const copy = bytes.slice(structure.at, structure.at + structure.length)
  const view = new DataView(copy.buffer)
  for (const [at, value] of Object.entries(fields)) {
    if (bits === 64) view.setBigUint64(Number(at), BigInt(value))
    else if (bits === 32) view.setUint32(Number(at), value)
    else if (bits === 16) view.setUint16(Number(at), value)
    else view.setUint8(Number(at), value)
  }
  seal(copy, structure.crcAt)
  return await withChange(bytes, structure.at, copy)
}

function seal(bytes: Uint8Array, crcAt: number): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  view.setUint32(crcAt, 0)
  view.setUint32(crcAt, crc32c(bytes), true)
}

interface Anatomy {
  readonly sb: Superblock
  readonly agStart: (agno: number) => number
  readonly agf: (agno: number) => { at: number; length: number; crcAt: number }
  readonly agi: (agno: number) => { at: number; length: number; crcAt: number }
  readonly agfl: (agno: number) => { at: number; length: number; crcAt: number }
  readonly block: (agno: number, agbno: number) => { at: number; length: number; crcAt: number }
  /** An AG whose tree has several levels. */
  readonly deep: number
  readonly root: (agno: number) => number
  /** First and second leaf below the root. */
  readonly leaves: (agno: number) => [number, number]
}

function anatomy(bytes: Uint8Array): Anatomy {
  const sb = decodeSuperblock(bytes)
  const agStart = (agno: number): number => agno * sb.agblocks * sb.blockBytes
  const sector =
    (index: number, crcAt: number) =>
    (agno: number): { at: number; length: number; crcAt: number } => ({
      at: agStart(agno) + index * sb.sectorBytes,
      length: sb.sectorBytes,
      crcAt,
    })
  const agf = sector(1, AGF_CRC_AT)
  const block = (agno: number, agbno: number): { at: number; length: number; crcAt: number } => ({
    at: agStart(agno) + agbno * sb.blockBytes,
    length: sb.blockBytes,
    crcAt: 52,
  })
  const header = (agno: number): Agf => decodeAgf(bytes.subarray(agf(agno).at))
  const deep = header(0).bnoLevel > 1 ? 0 : 1
  assert.equal(header(deep).bnoLevel, 2, 'a tree has two levels')
  const root = (agno: number): number => header(agno).bnoRoot
  const leaves = (agno: number): [number, number] => {
    const { at } = block(agno, root(agno))
    const most = Math.floor((sb.blockBytes - 56) / 12)
    const view = new DataView(bytes.buffer, bytes.byteOffset + at)
    return [view.getUint32(56 + most * 8), view.getUint32(56 + most * 8 + 4)]
  }
  return {
    sb,
    agStart,
    deep,
    agf,
    agi: sector(2, AGI_CRC_AT),
    agfl: sector(3, AGFL_CRC_AT),
    block,
    root,
    leaves,
  }
}

describe('XFS hostile', { skip: needs('mkfs.xfs', 'mount', 'setfattr') || needsRoot() }, () => {
  let clean: Uint8Array
  let dirty: Uint8Array
  let oracle: RangeSet
  let dirtyOracle: RangeSet
  let a: Anatomy

  before(async () => {
    await using dir = await tempDir()
    const image = dir.file('xfs')
    await makeXfs(image, { mib: MIB, args: ARGS, small: true })
    {
      await using mount = await mounted(image, { type: 'xfs' })
      fillTree(mount.path, random, 3200)
      await makeManyExtents(mount.path, 500)
    }
    clean = new Uint8Array(await readFile(image))
    {
      await using mount = await mounted(image, { type: 'xfs' })
      fillTree(mount.path, random, 200)
      await must('sync', ['-f', mount.path])
      fillTree(mount.path, random, 100)
      await must('xfs_io', ['-x', '-c', 'shutdown -f', mount.path])
    }
    dirty = new Uint8Array(await readFile(image))
    const map = await used(clean)
    assert.equal(map.trust, 'exact')
    oracle = map.ranges
    assert.equal((await used(dirty)).trust, 'replayed')
    // What the kernel makes of it: our map may have more, for what the log has freed.
    await (await mounted(image, { type: 'xfs' })).unmount()
    const { btree, freeLists } = await freeByXfsDb(image)
    dirtyOracle = btree.union(freeLists).complement(0, dirty.length)
    a = anatomy(clean)
  })

  test('one bit flipped in a structure with a checksum: refused, with the checksum as reason', async () => {
    const [left, right] = a.leaves(a.deep)
    const structures = {
      superblock: { at: 0, length: a.sb.sectorBytes },
      AGF: a.agf(1),
      AGI: a.agi(0),
      AGFL: a.agfl(1),
      'root of the bnobt': a.block(a.deep, a.root(a.deep)),
      'first leaf': a.block(a.deep, left),
      'second leaf': a.block(a.deep, right),
    }
    for (const [name, { at, length }] of Object.entries(structures)) {
      for (let i = 0; i < 12; i++) {
        const place = at + (i === 0 ? 4 : random.below(length))
        const reason = await withChange(clean, place, flipped(clean, place))
        assert.match(
          reason,
          /^xfs-(checksum|structure|superblock|version|truncated)$/,
          `${name} + ${place - at}, seed ${random.seed}`,
        )
      }
    }
  })

  test('one bit flipped in a log record that counts: refused', async () => {
    const log = new XfsLog(new MemoryDevice(dirty), a.sb)
    const state = await log.open()
    assert.ok(!state.clean)
    const records: { block: number; blocks: number }[] = []
    await log.walk(state, ({ header, block }) =>
      records.push({ block, blocks: header.headerBlocks + header.dataBlocks }),
    )
    assert.ok(records.length > 1)
    const start = a.agStart(Math.floor(a.sb.logstart / 2 ** a.sb.agblklog))
    const agbno = a.sb.logstart % 2 ** a.sb.agblklog
    for (let i = 0; i < 60; i++) {
      const record = random.pick(records)
      // Not the first word of a block: a cycle that is one less is what a write that never came looks like.
      const inRecord = random.below(record.blocks) * BB + 4 + random.below(i % 2 === 0 ? 300 : BB - 4)
      const offset = (record.block * BB + inRecord) % (a.sb.logblocks * a.sb.blockBytes)
      const at = start + agbno * a.sb.blockBytes + offset
      const reason = await withChange(dirty, at, flipped(dirty, at))
      const padding = inRecord >= 328 && inRecord < BB
      if (!padding)
        assert.match(reason, /^xfs-log-/, `record ${record.block} + ${inRecord}, seed ${random.seed}`)
    }
  })

  test('superblock fields', async () => {
    const sb = { at: 0, length: a.sb.sectorBytes, crcAt: 224 }
    const cases: [string, Record<number, number>, 8 | 16 | 32 | 64][] = [
      ['xfs-truncated', { 8: a.sb.dblocks * 2, 88: a.sb.agcount * 2 }, 32],
      ['xfs-superblock', { 88: 1 }, 32],
      ['xfs-superblock', { 84: 10 }, 32],
      ['xfs-superblock', { 4: 3000 }, 32],
      ['xfs-superblock', { 48: 2 ** 40 }, 64],
      ['xfs-superblock', { 96: 0x7fffffff }, 32],
      ['xfs-superblock', { 124: 60 }, 8],
      ['xfs-external-log', { 48: 0 }, 64],
      ['xfs-realtime', { 24: 5 }, 64],
      ['xfs-feature', { 216: 0x100 }, 32],
      ['xfs-feature', { 216: 0x8000 }, 32],
      ['xfs-feature', { 212: 0x10 }, 32],
      ['xfs-needs-repair', { 216: 0x10 }, 32],
      ['xfs-mkfs-unfinished', { 126: 1 }, 8],
      ['xfs-version', { 100: 0x4006 }, 16],
    ]
    for (const [reason, fields, bits] of cases) {
      const all: Record<number, number> = { ...fields }
      if (reason === 'xfs-truncated') {
        // dblocks is 64 bits wide; these fit in the low half.
        delete all[8]
        all[12] = a.sb.dblocks * 2
      }
      assert.equal(await withField(clean, sb, all, bits), reason, JSON.stringify(fields))
    }
    assert.equal(
      await withField(clean, sb, { 220: 0x80 }),
      `map of ${oracle.size} bytes`,
      'log bits, log clean',
    )
    assert.equal(await withField(dirty, sb, { 220: 0x80 }), 'xfs-log-feature', 'log bits, log dirty')
    assert.equal(await reasonOf(clean.subarray(0, clean.length - 4096)), 'xfs-truncated')
    assert.equal(await reasonOf(clean.subarray(0, 300)), 'xfs-truncated')
  })

  test('allocation group headers that keep their checksum', async () => {
    const agf = decodeAgf(clean.subarray(a.agf(1).at))
    const agfCases: [string, Record<number, number>][] = [
      ['xfs-ag-header', { 8: 0 }],
      ['xfs-ag-header', { 12: agf.length - 1 }],
      ['xfs-ag-header', { 16: agf.length }],
      ['xfs-ag-header', { 16: 0 }],
      ['xfs-ag-header', { 28: 0 }],
      ['xfs-ag-header', { 28: 200 }],
      ['xfs-ag-header', { 52: agf.length + 1 }],
      ['xfs-ag-header', { 36: 100 }],
      ['xfs-free-count', { 52: agf.freeblks + 1 }],
      ['xfs-free-count', { 56: agf.longest - 1 }],
      ['xfs-free-list', { 40: 119 }],
      ['xfs-free-list', { 44: 5000 }],
      ['xfs-free-list', { 48: 120 }],
      ['xfs-free-list', { 48: agf.flcount + 1 }],
      ['xfs-free-space-tree', { 28: agf.bnoLevel + 1 }],
      ['xfs-structure', { 16: agf.cntRoot }],
    ]
    for (const [reason, fields] of agfCases) {
      if (reason === 'xfs-ag-header' && fields[36] && (a.sb.roCompat & 2) === 0) continue
      assert.equal(await withField(clean, a.agf(1), fields), reason, `AGF ${JSON.stringify(fields)}`)
    }
    const slot = 36 + agf.flfirst * 4
    assert.equal(await withField(clean, a.agfl(1), { [slot]: agf.length }), 'xfs-free-list')
    assert.equal(await withField(clean, a.agfl(1), { [slot]: 0 }), 'xfs-free-list')
    assert.equal(await withField(clean, a.agfl(1), { 4: 0 }), 'xfs-free-list')
    const free = oracle.complement(0, clean.length)
    const someFree = (free.startAt(free.count - 1) - a.agStart(1)) / a.sb.blockBytes
    assert.equal(await withField(clean, a.agfl(1), { [slot]: someFree }), 'xfs-free-overlap')
    assert.equal(await withField(clean, a.agi(1), { 20: someFree }), 'xfs-free-overlap')
  })

  test('free-space tree blocks that keep their checksum', async () => {
    const root = a.root(a.deep)
    const [left, right] = a.leaves(a.deep)
    const most = Math.floor((a.sb.blockBytes - 56) / 12)
    const rootCases: Record<string, Record<number, number>> = {
      'a pointer to the root itself': { [56 + most * 8]: root },
      'one leaf twice': { [56 + most * 8 + 4]: left },
      'pointers swapped': { [56 + most * 8]: right, [56 + most * 8 + 4]: left },
      'a pointer out of the group': { [56 + most * 8]: a.sb.agblocks + 5 },
      'a pointer to the headers': { [56 + most * 8]: 0 },
      'keys that descend': { [56 + 8]: 0 },
      'a right sibling': { 12: left },
    }
    for (const [name, fields] of Object.entries(rootCases)) {
      const reason = await withField(clean, a.block(a.deep, root), fields)
      assert.match(reason, /^xfs-(free-space-tree|structure)$/, name)
    }
    const view = new DataView(clean.buffer, clean.byteOffset + a.block(a.deep, left).at)
    const first = view.getUint32(56)
    const second = view.getUint32(64)
    const leafCases: Record<string, Record<number, number>> = {
      'its own sibling': { 12: left },
      'no right sibling': { 12: 0xffffffff },
      'a record that reaches into the next': { 60: second - first + 1 },
      'a record that touches the next': { 60: second - first },
      'an empty record': { 60: 0 },
      'a record out of the group': { 64: a.sb.agblocks - 1, 68: 10 },
      'a record before the first': { 64: first },
      'a record longer by one': { 60: view.getUint32(60) + 1 },
      'another group as owner': { 48: 1 - a.deep },
      'another address': { 20: 8 },
    }
    for (const [name, fields] of Object.entries(leafCases)) {
      const reason = await withField(clean, a.block(a.deep, left), fields)
      assert.match(reason, /^xfs-(free-space-tree|free-count|structure)$/, name)
    }
    assert.equal(await withField(clean, a.block(a.deep, left), { 4: 1 }, 16), 'xfs-free-space-tree', 'level')
    assert.equal(
      await withField(clean, a.block(a.deep, left), { 6: 0 }, 16),
      'xfs-free-space-tree',
      'no records',
    )
    assert.equal(
      await withField(clean, a.block(a.deep, left), { 6: 5000 }, 16),
      'xfs-free-space-tree',
      'records',
    )
  })

  test('a block younger than the log is refused', async () => {
    const [left] = a.leaves(a.deep)
    assert.equal(await withField(clean, a.block(a.deep, left), { 24: 0x00ffffff }), 'xfs-newer-than-log')
    assert.equal(await withField(clean, a.agf(0), { 208: 0x00ffffff }), 'xfs-newer-than-log')
  })

  test('audit() finds a block that the trees call free and a file owns', async () => {
    const owned = await audit(clean)
    assert.equal(owned.subtract(oracle).size, 0)
    // A free extent takes in the block behind it; the counts and checksums go along.
    const copy = clean.slice()
    const [left] = a.leaves(a.deep)
    const leaf = a.block(a.deep, left)
    const view = new DataView(copy.buffer, leaf.at, leaf.length)
    const agf = new DataView(copy.buffer, a.agf(a.deep).at, a.sb.sectorBytes)
    let stolen = -1
    for (let r = 0; r < view.getUint16(6) - 1 && stolen < 0; r++) {
      const end = view.getUint32(56 + r * 8) + view.getUint32(60 + r * 8)
      const at = a.agStart(a.deep) + end * a.sb.blockBytes
      const room = view.getUint32(56 + (r + 1) * 8) - end
      if (room < 2 || view.getUint32(60 + r * 8) >= agf.getUint32(56) || !owned.has(at)) continue
      view.setUint32(60 + r * 8, view.getUint32(60 + r * 8) + 1)
      agf.setUint32(52, agf.getUint32(52) + 1)
      stolen = at
    }
    assert.ok(stolen > 0)
    for (const { at, length, crcAt } of [leaf, a.agf(a.deep)]) seal(copy.subarray(at, at + length), crcAt)
    const { ranges } = await used(copy)
    assert.ok(!ranges.has(stolen), 'the map has fallen for it')
    assert.equal((await audit(copy)).subtract(ranges).toString(), `[${stolen},${stolen + a.sb.blockBytes})`)
  })

  test('audit() refuses damaged inodes', async () => {
    const inodes = livePages(clean).filter((page) => clean[page] === 0x49 && clean[page + 1] === 0x4e)
    assert.ok(inodes.length > 10)
    for (let i = 0; i < 12; i++) {
      const page = random.pick(inodes)
      const at = page + 104 + random.below(a.sb.inodeBytes - 104)
      const mode = clean[page + 2]! + clean[page + 3]!
      const saved = clean[at]!
      clean[at] = saved ^ 0x10
      try {
        // A free inode is not looked at.
        if (mode !== 0) await assert.rejects(audit(clean), { reason: /^xfs-(checksum|inode)$/ })
      } finally {
        clean[at] = saved
      }
    }
  })

  test('mutated: never a map that calls free what is in use', async (t) => {
    t.diagnostic(`seed ${random.seed}`)
    const logStart =
      a.agStart(Math.floor(a.sb.logstart / 2 ** a.sb.agblklog)) +
      (a.sb.logstart % 2 ** a.sb.agblklog) * a.sb.blockBytes
    const logEnd = logStart + a.sb.logblocks * a.sb.blockBytes
    // In a dirty log a block of an older cycle is a write that did not come: the kernel then forgets it as well.
    const outsideLog = [
      [0, logStart],
      [logEnd, clean.length],
    ] as const
    const metadata = (bytes: Uint8Array): number[] => {
      const near = new Set<number>()
      for (let agno = 0; agno < a.sb.agcount; agno++) {
        for (const page of livePages(bytes.subarray(a.agStart(agno), a.agStart(agno) + 65_536))) {
          near.add(a.agStart(agno) + page)
        }
      }
      return [...near]
    }
    const runs = [
      { bytes: clean, pages: metadata(clean), allowed: undefined, truth: oracle },
      { bytes: clean, pages: livePages(clean), allowed: undefined, truth: oracle },
      {
        bytes: clean,
        pages: livePages(clean.subarray(logStart, logEnd)).map((p) => p + logStart),
        allowed: undefined,
        truth: oracle,
      },
      { bytes: dirty, pages: metadata(dirty), allowed: outsideLog, truth: dirtyOracle },
      {
        bytes: dirty,
        pages: livePages(dirty.subarray(logStart, logEnd)).map((p) => p + logStart),
        allowed: undefined,
        truth: undefined,
      },
    ]
    let refused = 0
    let maps = 0
    for (const { bytes, pages, allowed, truth } of runs) {
      for (let i = 0; i < 80; i++) {
        const mutations = mutate(bytes, pages, random, allowed)
        const saved = mutations.map(({ offset, bytes: put }) => bytes.slice(offset, offset + put.length))
        for (const { offset, bytes: put } of mutations) bytes.set(put, offset)
        try {
          if (i % 8 === 0) await audit(bytes)
          const { ranges } = await used(bytes)
          maps++
          const lost = truth?.subtract(ranges)
          assert.ok(
            !lost || lost.isEmpty,
            `lost ${lost?.size} bytes by ${JSON.stringify(mutations.map((m) => m.offset))}, seed ${random.seed}`,
          )
        } catch (error) {
          if (!(error instanceof VarveError) || error.code === 'INTERNAL') throw error
          refused++
        } finally {
          for (const [j, { offset }] of [...mutations.entries()].reverse()) bytes.set(saved[j]!, offset)
        }
      }
    }
    t.diagnostic(`${refused} refused, ${maps} maps`)
    assert.ok(refused > 50 && maps > 5)
  })

  test('probe() is quiet about short and foreign devices', async () => {
    assert.equal(await xfsType.probe(new MemoryDevice(100)), false)
    assert.equal(await xfsType.probe(new MemoryDevice(4096)), false)
    assert.equal(await xfsType.probe(new MemoryDevice(clean)), true)
  })
})
