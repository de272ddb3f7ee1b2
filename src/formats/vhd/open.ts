/**
 * Opens a VHD: finds its footer, reads header, BAT, batmap and locators in bulk, and judges all of them against
 * the file before anything is believed.
 *
 * Rules: the primary footer (end of file) comes first, then the short one of 511 bytes, then the copy at 0, as
 * every reader in the field does; a live writer breaks the primary on purpose. A BAT entry that does not lie
 * between the headers and the end of the file is CORRUPT here, before hours of copying.
 */
import { LIMITS, VarveError, within } from '../../base/index.ts'
import { type BlockDevice, isWritable, readBytes, type WritableBlockDevice } from '../../device/index.ts'
import { Bitmap } from '../../extents/index.ts'
import type { BackingReference, FormatFacts, ImageLayer, OpenOptions } from '../image-format.ts'
import { BlockMap } from './block-map.ts'
import { FixedVhdLayer } from './fixed-layer.ts'
import {
  BATMAP_VERSION,
  batmapChecksum,
  batmapCoveredBytes,
  batmapHeaderOffset,
  bitmapBytes,
  cleanPath,
  type DynamicHeader,
  decodeBatmapHeader,
  decodeFooter,
  decodeHeader,
  decodeLocator,
  EPOCH_SECONDS,
  FOOTER_BYTES,
  type Footer,
  guestSize,
  HEADER_BYTES,
  isTap,
  MOST_LOCATOR_BYTES,
  NIL_UUID,
  SECTOR,
  UNALLOCATED,
} from './layout.ts'
import { SparseVhdLayer } from './sparse-layer.ts'
import { type WritableBatmap, WritableVhdLayer } from './writable-layer.ts'

/** Opens `file`, which the layer then owns. @throws CORRUPT, UNSUPPORTED, ENCRYPTED, LIMIT, READ_ONLY */
export async function openVhd(file: BlockDevice, options: OpenOptions): Promise<ImageLayer> {
  const { signal } = options
  const found = await findFooter(file, signal)
  if (found.which === 'copy') {
    options.log?.(
      'warn',
      'The VHD footer at the end of the file is invalid; its copy at the start is used.',
      {
        why: found.why,
      },
    )
  }
  const { footer } = found
  if (footer.type === 'fixed') {
    if (found.which === 'copy') {
      throw new VarveError('CORRUPT', `Cannot open fixed VHD: found no footer at its end (${found.why})`)
    }
    if (options.write) checkWritable(file, found)
    const size = sizeWithin(footer, found.at)
    return new FixedVhdLayer(file, size, footerFacts(footer, found.which), { write: options.write ?? false })
  }
  const tables = await readTables(file, found, signal)
  for (const { block, text } of wrongEntries(footer, tables)) {
    throw new VarveError('CORRUPT', `Cannot open VHD: ${text}`, {
      fields: { block, sector: tables.table[block]! },
    })
  }
  const backing = footer.type === 'differencing' ? await readBacking(file, tables.header, signal) : undefined
  const parts = {
    backing,
    facts: {
      ...footerFacts(footer, found.which),
      blockBytes: tables.header.blockBytes,
      blocks: tables.table.length,
      blocksReserved: tables.header.maxTableEntries,
      blocksAllocated: countAllocated(tables.table),
      batmap: tables.batmap !== undefined,
      ...(backing ? { parentUuid: tables.header.parentUuid, parentName: tables.header.parentName } : {}),
    },
    id: footer.uuid,
  }
  const map = new BlockMap({ ...tables, file, blockBytes: tables.header.blockBytes })
  if (!options.write) return new SparseVhdLayer({ ...parts, file, map })
  const writable = checkWritable(file, found)
  const [overlap] = overlaps(tables)
  if (overlap) throw new VarveError('CORRUPT', `Cannot open VHD for writing: ${overlap.text}`)
  return new WritableVhdLayer({
    ...parts,
    map,
    file: writable,
    differencing: footer.type === 'differencing',
    footer: await readBytes(file, found.at, FOOTER_BYTES, signal),
    tableOffset: tables.header.tableOffset,
    end: endOfData(footer, tables),
    batmap: tables.batmap,
  })
}

/** Writing needs the footer at its place: a broken one says that somebody else writes, or died writing. */
function checkWritable(file: BlockDevice, found: FoundFooter): WritableBlockDevice {
  if (!isWritable(file)) {
    throw new VarveError('READ_ONLY', 'Cannot open VHD for writing: its file is open for reading')
  }
  if (found.which !== 'primary') {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open VHD for writing: found its ${found.which} footer, expected a whole one at the end`,
      {
        hint: 'Somebody may have it open; if nobody has, `vhd-util repair` writes the footer anew.',
      },
    )
  }
  return file
}

export interface FoundFooter {
  readonly footer: Footer
  readonly which: 'primary' | 'short' | 'copy'
  /** Byte offset of the footer in use. */
  readonly at: number
  /** First byte behind everything that may be data: the footer at the end, or the end when that one is broken. */
  readonly dataEnd: number
  /** Why the footers that come first were passed over. */
  readonly why: string
}

/** @throws CORRUPT when no footer holds, or when the one that counts is poisoned */
export async function findFooter(file: BlockDevice, signal?: AbortSignal): Promise<FoundFooter> {
  const why: string[] = []
  const places = [
    { which: 'primary' as const, at: file.size - FOOTER_BYTES, length: FOOTER_BYTES },
    { which: 'short' as const, at: file.size - FOOTER_BYTES + 1, length: FOOTER_BYTES - 1 },
    { which: 'copy' as const, at: 0, length: FOOTER_BYTES },
  ]
  for (const { which, at, length } of places) {
    if (at < 0 || length > file.size) continue
    const verdict = decodeFooter(await readBytes(file, at, length, signal))
    if (verdict.kind === 'poisoned') {
      throw new VarveError('CORRUPT', `Cannot open VHD: found the cookie of an unfinished resize at ${at}`, {
        fields: { offset: at },
        hint: 'Undo the resize with `vhd-util revert` and its journal file, then try again.',
      })
    }
    if (verdict.kind === 'invalid') {
      if (which !== 'short') why.push(`${which} footer: ${verdict.why}`)
      continue
    }
    let { footer } = verdict
    if (isTap(footer.creator) && footer.creatorVersion === 0x00000001) {
      throw new VarveError(
        'UNSUPPORTED',
        'Cannot open VHD: found creator tap 0.1, whose bitmaps are unlike all others',
      )
    }
    if (which !== 'copy' && isTap(footer.creator) && footer.creatorVersion === 0x00010001) {
      // tap 1.1 kept `hidden` in the copy alone.
      const copy = decodeFooter(await readBytes(file, 0, FOOTER_BYTES, signal))
      if (copy.kind === 'valid' && copy.footer.uuid === footer.uuid) {
        footer = { ...footer, hidden: copy.footer.hidden }
      }
    }
    return { footer, which, at, dataEnd: which === 'copy' ? file.size : at, why: why.join('; ') }
  }
  throw new VarveError(
    'CORRUPT',
    `Cannot open VHD: found no valid footer (${why.join('; ') || 'file too short'})`,
  )
}

export interface Tables {
  readonly size: number
  readonly header: DynamicHeader
  /** First sector of each block's bitmap, UNALLOCATED where there is no block; as many as the size needs. */
  readonly table: Uint32Array
  /** Blocks that hold every sector, as the batmap says; undefined without a batmap that can be trusted. */
  readonly full: Bitmap | undefined
  readonly batmap: WritableBatmap | undefined
  readonly dataEnd: number
}

/** Reads header, table and batmap; where the table points is not judged here. @throws CORRUPT, LIMIT, ENCRYPTED */
export async function readTables(
  file: BlockDevice,
  found: FoundFooter,
  signal?: AbortSignal,
): Promise<Tables> {
  const { footer } = found
  const headerAt = footer.dataOffset!
  if (headerAt + HEADER_BYTES > file.size) {
    throw corrupt('dynamic header', `offset ${headerAt}`, `at most ${file.size - HEADER_BYTES}`)
  }
  const header = decodeHeader(await readBytes(file, headerAt, HEADER_BYTES, signal))
  const size = sizeWithin(footer, header.maxTableEntries * header.blockBytes)
  const entries = Math.ceil(size / header.blockBytes)
  within(entries * 4, LIMITS.tableBytes, 'size of the VHD block allocation table')
  if (header.tableOffset + entries * 4 > file.size) {
    throw corrupt(
      'block allocation table',
      `${entries} entries at ${header.tableOffset}`,
      `all inside ${file.size} bytes`,
    )
  }
  const table = decodeTable(await readBytes(file, header.tableOffset, entries * 4, signal))
  const batmap = await readBatmap(file, footer, header, signal)
  const full = batmap && Bitmap.fromBytes(batmap.map, entries, { msbFirst: true })
  return { size, header, table, full, batmap, dataEnd: found.dataEnd }
}

/**
 * Table entries that point into the headers or past the end. The bitmap must lie in the file; of the data only
 * what the bitmap claims must (a writer that died may leave the rest out), which reading checks.
 */
export function* wrongEntries(footer: Footer, tables: Tables): Generator<{ block: number; text: string }> {
  const { header, table, full, size, dataEnd } = tables
  const taken = [
    { start: 0, end: FOOTER_BYTES, what: 'the footer copy' },
    { start: footer.dataOffset!, end: footer.dataOffset! + HEADER_BYTES, what: 'the dynamic header' },
    {
      start: header.tableOffset,
      end: header.tableOffset + table.length * 4,
      what: 'the block allocation table',
    },
  ]
  const bitmap = bitmapBytes(header.blockBytes)
  for (let block = 0; block < table.length; block++) {
    const entry = table[block]!
    if (entry === UNALLOCATED) continue
    const at = entry * SECTOR
    const end = at + bitmap + header.blockBytes
    const needed =
      at + bitmap + (full?.get(block) ? Math.min(header.blockBytes, size - block * header.blockBytes) : 0)
    if (needed > dataEnd) {
      yield { block, text: `found block ${block} at byte ${at}, expected it to end before ${dataEnd}` }
      continue
    }
    const hit = taken.find((region) => at < region.end && region.start < end)
    if (hit) yield { block, text: `found block ${block} at byte ${at}, where ${hit.what} stands` }
  }
}

function decodeTable(bytes: Uint8Array): Uint32Array {
  const swapped = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (LITTLE_ENDIAN_HOST) swapped.swap32()
  return new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
}

const LITTLE_ENDIAN_HOST = new Uint8Array(Uint32Array.of(1).buffer)[0] === 1

/** The guest's size, when the image holds it. @throws CORRUPT */
export function sizeWithin(footer: Footer, capacity: number): number {
  let { size } = guestSize(footer)
  // A geometry that promises more than there is was rounded up; the size field is exact.
  if (size > capacity) size = footer.currentSize
  if (size > capacity || size % SECTOR !== 0 || size === 0) {
    throw corrupt('disk size', `${size} bytes`, `a multiple of ${SECTOR} up to ${capacity}`)
  }
  return size
}

/**
 * The batmap is announced nowhere: creators `tap` from 1.2 on have one, 1.1 may. It only saves reading bitmaps, so
 * one that does not hold (checksum, place, a bit for a block that is not there) is left aside.
 */
async function readBatmap(
  file: BlockDevice,
  footer: Footer,
  header: DynamicHeader,
  signal: AbortSignal | undefined,
): Promise<WritableBatmap | undefined> {
  if (!isTap(footer.creator) || footer.creatorVersion < 0x00010001) return undefined
  const headerAt = batmapHeaderOffset(header)
  if (headerAt + SECTOR > file.size) return undefined
  const batmap = decodeBatmapHeader(await readBytes(file, headerAt, SECTOR, signal))
  if (!batmap) return undefined
  if (batmap.keyed) {
    throw new VarveError('ENCRYPTED', 'Cannot open VHD: found the hash of an encryption key in its batmap')
  }
  const { offset, sectors, version, checksum } = batmap
  const covered = batmapCoveredBytes(footer.currentSize)
  if (version > BATMAP_VERSION || covered > sectors * SECTOR || offset + covered > file.size) return undefined
  const map = await readBytes(file, offset, covered, signal)
  return batmapChecksum(map, version) === checksum ? { headerAt, offset, sectors, version, map } : undefined
}

/** First byte behind all metadata at the start of the file and all blocks. */
function endOfData(footer: Footer, tables: Tables): number {
  const { header, table, batmap } = tables
  const blockSpan = bitmapBytes(header.blockBytes) + header.blockBytes
  let end = Math.max(
    footer.dataOffset! + HEADER_BYTES,
    batmapHeaderOffset(header),
    batmap ? batmap.headerAt + SECTOR : 0,
    batmap ? batmap.offset + batmap.sectors * SECTOR : 0,
    ...header.locators.map(({ dataOffset, spaceBytes }) => dataOffset + spaceBytes),
  )
  for (let block = 0; block < table.length; block++) {
    if (table[block] !== UNALLOCATED) end = Math.max(end, table[block]! * SECTOR + blockSpan)
  }
  return end
}

/** Blocks of the file that share bytes; sorted, so in O(n log n). */
export function* overlaps(
  tables: Pick<Tables, 'header' | 'table'>,
): Generator<{ block: number; text: string }> {
  const { header, table } = tables
  const span = (bitmapBytes(header.blockBytes) + header.blockBytes) / SECTOR
  const order = new Uint32Array(table.length)
  let count = 0
  for (let block = 0; block < table.length; block++) if (table[block] !== UNALLOCATED) order[count++] = block
  const sorted = order.subarray(0, count).sort((a, b) => table[a]! - table[b]!)
  for (let i = 1; i < sorted.length; i++) {
    const [below, block] = [sorted[i - 1]!, sorted[i]!]
    if (table[below]! + span > table[block]!) {
      yield {
        block,
        text: `found block ${block} at sector ${table[block]}, inside block ${below} at ${table[below]}`,
      }
    }
  }
}

/** @throws CORRUPT when the disk names no parent in any of the ways */
export async function readBacking(
  file: BlockDevice,
  header: DynamicHeader,
  signal: AbortSignal | undefined,
): Promise<BackingReference> {
  const names: string[] = []
  for (const { code, spaceBytes, dataLength, dataOffset } of header.locators) {
    if (dataLength === 0 || dataLength > Math.min(spaceBytes, MOST_LOCATOR_BYTES)) continue
    if (dataOffset + dataLength > file.size) continue
    const name = decodeLocator(code, await readBytes(file, dataOffset, dataLength, signal))
    if (name !== undefined) names.push(name)
  }
  const own = cleanPath(header.parentName.replaceAll('\\', '/'))
  if (own !== undefined) names.push(own)
  const [name, ...otherNames] = new Set(names)
  if (name === undefined) throw corrupt('parent', 'no locator and no name', 'at least one that is text')
  return header.parentUuid === NIL_UUID
    ? { name, otherNames, format: 'raw' }
    : { name, otherNames, format: 'vhd', id: header.parentUuid }
}

export function footerFacts(
  footer: Footer,
  which: FoundFooter['which'],
): FormatFacts & { readonly uuid: string } {
  const { cylinders, heads, sectors } = footer.geometry
  return {
    type: footer.type,
    creator: footer.creator.replace(/[^\x21-\x7e]+$/, ''),
    creatorVersion: `${footer.creatorVersion >>> 16}.${footer.creatorVersion & 0xffff}`,
    uuid: footer.uuid,
    created: new Date((footer.timestamp + EPOCH_SECONDS) * 1000).toISOString(),
    geometry: `${cylinders}/${heads}/${sectors}`,
    sizeFrom: guestSize(footer).from,
    footer: which,
    hidden: footer.hidden,
  }
}

function countAllocated(table: Uint32Array): number {
  let count = 0
  for (let i = 0; i < table.length; i++) if (table[i] !== UNALLOCATED) count++
  return count
}

function corrupt(what: string, found: string, expected: string): VarveError {
  return new VarveError('CORRUPT', `Cannot open VHD: found ${what} ${found}, expected ${expected}`)
}
