/**
 * Checks a VHD's structure. Sorted, so a full disk of 2 TiB takes about a second where comparing each block with
 * each takes minutes.
 */
import { isVarveError } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import type { CheckFinding, OpenOptions } from '../image-format.ts'
import { BlockMap } from './block-map.ts'
import {
  batmapHeaderOffset,
  bitmapBytes,
  decodeBatmapHeader,
  decodeFooter,
  EPOCH_SECONDS,
  FOOTER_BYTES,
  SECTOR,
  UNALLOCATED,
} from './layout.ts'
import {
  type FoundFooter,
  findFooter,
  overlaps,
  readBacking,
  readTables,
  sizeWithin,
  type Tables,
  wrongEntries,
} from './open.ts'

/** More of one kind than this say nothing new. */
const MOST_FINDINGS = 100
/** vhd-util calls a footer invalid that is from further ahead than this. */
const CLOCK_SECONDS = 1800

/** Does not dispose of `file`. @throws UNSUPPORTED, ENCRYPTED, IO; what is broken is a finding */
export async function checkVhd(file: BlockDevice, options: OpenOptions): Promise<readonly CheckFinding[]> {
  const { signal } = options
  const findings: CheckFinding[] = []
  const add = (severity: CheckFinding['severity'], text: string, offset?: number): void =>
    void findings.push(offset === undefined ? { severity, text } : { severity, text, offset })
  try {
    const found = await findFooter(file, signal)
    await checkFooters(file, found, add, signal)
    if (found.footer.type === 'fixed') {
      if (found.which === 'copy') add('error', 'a fixed disk has no footer at its end')
      else sizeWithin(found.footer, found.at)
      return findings
    }
    const tables = await readTables(file, found, signal)
    if (found.footer.type === 'differencing') await checkParent(file, tables, add, signal)
    const wrong = collect(wrongEntries(found.footer, tables))
    for (const { block, text } of wrong) add('error', text, tables.table[block]! * SECTOR)
    for (const { block, text } of collect(overlaps(tables))) add('error', text, tables.table[block]! * SECTOR)
    checkGaps(tables, add)
    await checkBatmap(file, found, tables, add, signal)
    if (wrong.length === 0) await checkBitmaps(file, tables, add, signal)
  } catch (error) {
    if (!isVarveError(error, 'CORRUPT', 'LIMIT')) throw error
    add('error', error.message)
  }
  return findings
}

type Add = (severity: CheckFinding['severity'], text: string, offset?: number) => void

async function checkFooters(
  file: BlockDevice,
  found: FoundFooter,
  add: Add,
  signal?: AbortSignal,
): Promise<void> {
  const { footer, which, at, why } = found
  if (which === 'copy') add('error', `the footer at the end is not valid: ${why}`, file.size - FOOTER_BYTES)
  if (which === 'short') add('note', 'the footer is the short one of old Microsoft tools', at)
  if (footer.timestamp + EPOCH_SECONDS > Date.now() / 1000 + CLOCK_SECONDS) {
    add('note', 'the footer was written in the future', at)
  }
  if (footer.type === 'fixed' || which === 'copy') return
  const copy = decodeFooter(await readBytes(file, 0, FOOTER_BYTES, signal))
  if (copy.kind === 'poisoned') add('error', 'the footer copy has the cookie of an unfinished resize', 0)
  else if (copy.kind === 'invalid') add('error', `the footer copy is not valid: ${copy.why}`, 0)
  else if (copy.footer.uuid !== footer.uuid || copy.footer.currentSize !== footer.currentSize) {
    add('error', 'the footer and its copy differ in identity or size', 0)
  }
}

async function checkParent(file: BlockDevice, tables: Tables, add: Add, signal?: AbortSignal): Promise<void> {
  const { header } = tables
  const backing = await readBacking(file, header, signal)
  const base = (path: string): string => path.slice(path.lastIndexOf('/') + 1)
  for (const name of [backing.name, ...(backing.otherNames ?? [])]) {
    if (base(name) !== base(header.parentName.replaceAll('\\', '/'))) {
      add(
        'note',
        `a locator leads to ${JSON.stringify(name)}, the header names ${JSON.stringify(header.parentName)}`,
      )
    }
  }
  const codes = header.locators.map(({ code }) => code)
  for (const code of new Set(codes.filter((each, i) => codes.indexOf(each) !== i))) {
    add('note', `there are several locators ${JSON.stringify(code)}`)
  }
}

/** Room for whole blocks that no table entry names is lost: the format has no list of free blocks. */
function checkGaps({ header, table, dataEnd }: Tables, add: Add): void {
  const span = bitmapBytes(header.blockBytes) + header.blockBytes
  const starts = table.filter((entry) => entry !== UNALLOCATED).sort()
  let lost = 0
  for (let i = 0; i < starts.length; i++) {
    const next = i + 1 < starts.length ? starts[i + 1]! * SECTOR : dataEnd
    const gap = next - (starts[i]! * SECTOR + span)
    if (gap >= span) lost += gap
  }
  if (lost > 0) add('leak', `${lost} bytes lie behind or between blocks and belong to none`)
}

async function checkBatmap(
  file: BlockDevice,
  found: FoundFooter,
  tables: Tables,
  add: Add,
  signal?: AbortSignal,
): Promise<void> {
  const at = batmapHeaderOffset(tables.header)
  if (!tables.full) {
    if (!found.footer.creator.startsWith('tap') || at + SECTOR > file.size) return
    if (decodeBatmapHeader(await readBytes(file, at, SECTOR, signal))) {
      add('note', 'the batmap does not hold (place or checksum), so it is not used', at)
    }
    return
  }
  let wrong = 0
  for (
    let block = tables.full.nextSet(0);
    block < tables.table.length;
    block = tables.full.nextSet(block + 1)
  ) {
    if (tables.table[block] === UNALLOCATED && wrong++ < MOST_FINDINGS) {
      add('error', `the batmap calls block ${block} full, which is not there`, at)
    }
  }
}

/** Reads every bitmap: what it claims must lie in the file, and blocks that the batmap calls full must be. */
async function checkBitmaps(
  file: BlockDevice,
  tables: Tables,
  add: Add,
  signal?: AbortSignal,
): Promise<void> {
  const { header, table, full, size } = tables
  const map = new BlockMap({ ...tables, file, blockBytes: header.blockBytes, full: undefined })
  let found = 0
  const compare = (from: number, to: number): void => {
    for (let block = from; block < to; block++) {
      if (!full?.get(block) || table[block] === UNALLOCATED || map.isFull(block)) continue
      found++
      add('error', `the batmap calls block ${block} full, its bitmap does not`, map.bitmapAt(block))
    }
  }
  for (let block = 0; block < table.length && found < MOST_FINDINGS; ) {
    let end: number
    try {
      const stop = await map.eachRun(
        block * header.blockBytes,
        size,
        () => {},
        signal,
        () => true,
      )
      end = Math.ceil(stop / header.blockBytes)
    } catch (error) {
      if (!isVarveError(error, 'CORRUPT')) throw error
      found++
      add('error', error.message)
      end = Math.max(block, Number(error.fields['block'] ?? table.length)) + 1
    }
    compare(block, end)
    block = end
  }
}

function collect<T>(findings: Iterable<T>): T[] {
  const out: T[] = []
  for (const finding of findings) {
    out.push(finding)
    if (out.length >= MOST_FINDINGS) break
  }
  return out
}
