/** XFS for tests: make and fill an image; what xfs_db says is free in it. */
import {
  closeSync,
  fsyncSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  rmSync,
  writeSync,
} from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { RangeSet } from '../../src/extents/index.ts'
import { must, type Random } from './index.ts'

/**
 * mkfs.xfs refuses file systems below 300 MB and logs below 64 MB, but lets the people who test XFS itself have
 * them: small ones fill, wrap and copy quickly.
 */
const SMALL = { TEST_DIR: '/', TEST_DEV: '/', QA_CHECK_FS: '1' }

export async function makeXfs(
  path: string,
  options: { readonly mib?: number; readonly args?: readonly string[]; readonly small?: boolean } = {},
): Promise<void> {
  const file = await open(path, 'w')
  await file.truncate((options.mib ?? 320) * 2 ** 20)
  await file.close()
  await must('mkfs.xfs', ['-q', '-f', ...(options.args ?? []), path], { env: options.small ? SMALL : {} })
}

/** Files of odd sizes, a third of them removed again, some with holes: many free extents of many sizes. */
export function fillTree(at: string, random: Random, files: number): void {
  const content = random.bytes(200_000)
  const folders = 8
  for (let folder = 0; folder < folders; folder++) mkdirSync(join(at, `d${folder}`), { recursive: true })
  for (let i = 0; i < files; i++) {
    const path = join(at, `d${i % folders}`, `f${i}`)
    const fd = openSync(path, 'w')
    const length = random.below(10) === 0 ? random.below(200_000) : random.below(12_000)
    writeSync(fd, content, 0, length)
    if (i % 50 === 0) {
      ftruncateSync(fd, 2_000_000)
      writeSync(fd, content, 0, 5000, 1_500_000)
    }
    if (i % 97 === 0) fsyncSync(fd)
    closeSync(fd)
  }
  for (let folder = 0; folder < folders; folder++) {
    for (const name of readdirSync(join(at, `d${folder}`))) {
      if (random.below(3) === 0) rmSync(join(at, `d${folder}`, name))
    }
  }
}

/** A file of so many extents that its extent tree has levels, and attributes that fill blocks of their own. */
export async function makeManyExtents(at: string, extents: number): Promise<void> {
  const path = join(at, 'extents')
  const fd = openSync(path, 'w')
  const block = new Uint8Array(4096).fill(7)
  for (let i = 0; i < extents; i++) writeSync(fd, block, 0, block.length, i * 8192)
  closeSync(fd)
  for (let i = 0; i < 20; i++) await must('setfattr', ['-n', `user.a${i}`, '-v', 'v'.repeat(i * 100), path])
}

export interface XfsFree {
  /** Bytes that the by-block-number btrees call free. */
  readonly btree: RangeSet
  /** Bytes on the free lists: `freesp` counts them as free, varve does not. */
  readonly freeLists: RangeSet
}

/** What xfs_db reads from a cleanly unmounted image. */
export async function freeByXfsDb(path: string): Promise<XfsFree> {
  const db = (commands: readonly string[]): Promise<string> =>
    must('xfs_db', ['-r', '-f', ...commands.flatMap((command) => ['-c', command]), path])
  const field = (text: string, name: string): number =>
    Number(new RegExp(`^${name} = (\\d+)`, 'm').exec(text)?.[1])
  const sb = await db(['sb 0', 'p blocksize', 'p agblocks', 'p agcount'])
  const blockBytes = field(sb, 'blocksize')
  const agblocks = field(sb, 'agblocks')
  const agcount = field(sb, 'agcount')
  const bytes = (agno: number, start: number, count: number): { start: number; end: number } => {
    const first = (agno * agblocks + start) * blockBytes
    return { start: first, end: first + count * blockBytes }
  }
  const all = []
  for (const line of (await db(['freesp -d'])).split('\n')) {
    const fields = line.trim().split(/\s+/)
    if (fields.length !== 3 || !fields.every((one) => /^\d+$/.test(one))) continue
    const [agno, start, count] = fields.map(Number) as [number, number, number]
    all.push(bytes(agno, start, count))
  }
  const lists = []
  for (let agno = 0; agno < agcount; agno++) {
    const agf = await db([`agf ${agno}`, 'p flfirst', 'p flcount'])
    const agfl = await db([`agfl ${agno}`, 'p bno'])
    const slots = [...agfl.matchAll(/(\d+):(\d+|null)/g)]
    const first = field(agf, 'flfirst')
    for (let i = 0; i < field(agf, 'flcount'); i++) {
      lists.push(bytes(agno, Number(slots[(first + i) % slots.length]![2]), 1))
    }
  }
  const freeLists = RangeSet.from(lists)
  return { btree: RangeSet.from(all).subtract(freeLists), freeLists }
}
