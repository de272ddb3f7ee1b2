/**
 * The dirty bitmaps that a qcow2 file stores: the directory, and the bits of one bitmap. Reads only.
 *
 * Specification: QEMU's docs/interop/qcow2, "Bitmaps extension", and the further limits that QEMU itself keeps.
 *
 * Rules: what one entry has wrong is a finding in that entry (`problem`), never the end of the list; the end is
 * only where the place of the next entry cannot be known (`problem` of the directory). Bits are read only when the
 * whole table was checked against the file: a table or a cluster behind the file's end would read as zeros, which
 * is as much as to say that nothing changed.
 */
import { Bytes, LIMITS, VarveError } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { Bitmap } from '../../extents/index.ts'
import {
  AUTOCLEAR,
  BITMAP_FLAG,
  checkTable,
  EXTENSION,
  entryOffset,
  type Header,
  MAX_BITMAPS,
} from './layout.ts'
import { readHeader } from './open-image.ts'

export const MIN_GRANULARITY_BITS = 9
export const MAX_GRANULARITY_BITS = 31
export const MAX_BITMAP_NAME_BYTES = 1023
/** QEMU's limits on one bitmap: entries of its table, and its bytes. */
const MAX_TABLE_ENTRIES = 0x800_0000
export const MAX_BITMAP_BYTES = 0x2000_0000
/** The only type there is: dirty tracking. */
export const DIRTY_TRACKING = 1
/** Fixed part of a directory entry. */
export const ENTRY_BYTES = 24
/** Data clusters read at a time when they stand side by side. */
const JOINED_BYTES = 4_194_304

/** One entry of the bitmap directory. */
export interface StoredBitmap {
  /** UTF-8 as stored; bytes that are none are shown as U+FFFD. */
  readonly name: string
  readonly nameBytes: Uint8Array
  readonly tableOffset: number
  /** Entries of its bitmap table. */
  readonly tableSize: number
  readonly flags: number
  readonly type: number
  readonly granularityBits: number
  readonly extraData: Uint8Array
  /** Flag `in_use`: a writer has it in memory, or had it when it died. */
  readonly inUse: boolean
  /** Flag `auto`: it records. */
  readonly enabled: boolean
  /** What makes QEMU refuse the whole image; undefined for a sound entry. */
  readonly problem: string | undefined
}

export interface StoredBitmaps {
  readonly header: Header
  /**
   * `none`: the image stores no bitmaps; `current`; `void`: a program without support for bitmaps wrote to the
   * image (autoclear bit 0 is clear), so nothing of the list is to be believed.
   */
  readonly state: 'none' | 'current' | 'void'
  readonly bitmaps: readonly StoredBitmap[]
  /** What is wrong with the directory itself: entries are missing in the list then. */
  readonly problem: string | undefined
}

/** Bytes of bitmap data that a disk of `virtualSize` bytes needs, and entries of its table. */
export function bitmapShape(
  virtualSize: number,
  granularityBits: number,
  clusterBytes: number,
): { readonly bits: number; readonly bytes: number; readonly tableEntries: number } {
  const bits = Math.ceil(virtualSize / 2 ** granularityBits)
  const bytes = Math.ceil(bits / 8)
  return { bits, bytes, tableEntries: Math.ceil(bytes / clusterBytes) }
}

/**
 * The bitmaps of the image in `file`.
 * @throws CORRUPT, UNSUPPORTED, ENCRYPTED, LIMIT when its header cannot be used
 */
export async function readBitmaps(file: BlockDevice, signal?: AbortSignal): Promise<StoredBitmaps> {
  const header = await readHeader(file, signal)
  const flagged = (header.autoclear & AUTOCLEAR.bitmaps) !== 0n
  if (!header.bitmaps) {
    const problem = flagged
      ? 'the feature bit of bitmaps is set, but there is no bitmaps extension'
      : undefined
    return { header, state: 'none', bitmaps: [], problem }
  }
  const state = flagged ? 'current' : 'void'
  const { nbBitmaps, directoryBytes, directoryOffset } = header.bitmaps
  const refuse = (problem: string): StoredBitmaps => ({ header, state, bitmaps: [], problem })
  if (nbBitmaps === 0) return refuse('its extension counts 0 bitmaps, at least 1 was expected')
  if (nbBitmaps > MAX_BITMAPS)
    return refuse(`its extension counts ${nbBitmaps} bitmaps, at most ${MAX_BITMAPS} were expected`)
  if (directoryBytes > LIMITS.tableBytes)
    return refuse(`it claims ${directoryBytes} bytes, at most ${LIMITS.tableBytes} were expected`)
  try {
    checkTable({
      offset: directoryOffset,
      length: directoryBytes,
      clusterBytes: header.clusterBytes,
      fileBytes: file.size,
      what: 'bitmap directory',
    })
  } catch (error) {
    return refuse(reasonOf(error))
  }
  const bytes = await readBytes(file, directoryOffset, directoryBytes, signal)
  return { header, state, ...decodeDirectory(bytes, nbBitmaps, header) }
}

function decodeDirectory(
  directory: Uint8Array,
  nbBitmaps: number,
  header: Header,
): Pick<StoredBitmaps, 'bitmaps' | 'problem'> {
  const from = new Bytes(directory, 'big', 'qcow2 bitmap directory')
  const bitmaps: StoredBitmap[] = []
  const names = new Set<string>()
  let at = 0
  for (let index = 0; index < nbBitmaps; index++) {
    if (at + ENTRY_BYTES > directory.length) {
      return { bitmaps, problem: `it ends after ${index} entries, ${nbBitmaps} were expected` }
    }
    const nameBytes = from.u16(at + 18)
    const extraBytes = from.u32(at + 20)
    const length = Math.ceil((ENTRY_BYTES + extraBytes + nameBytes) / 8) * 8
    if (at + length > directory.length) {
      return {
        bitmaps,
        problem: `entry ${index} runs over its end: ${extraBytes} bytes of extra data, a name of ${nameBytes}`,
      }
    }
    const rawOffset = from.u64(at)
    const flags = from.u32(at + 12)
    const rawName = from.sub(at + ENTRY_BYTES + extraBytes, nameBytes).slice()
    const key = Buffer.from(rawName).toString('latin1')
    const entry = {
      name: new TextDecoder().decode(rawName),
      nameBytes: rawName,
      // An offset that no file reaches is kept as a place behind every file's end.
      tableOffset: rawOffset > BigInt(Number.MAX_SAFE_INTEGER) ? Number.MAX_SAFE_INTEGER : Number(rawOffset),
      tableSize: from.u32(at + 8),
      flags,
      type: from.u8(at + 16),
      granularityBits: from.u8(at + 17),
      extraData: from.sub(at + ENTRY_BYTES, extraBytes).slice(),
      inUse: (flags & BITMAP_FLAG.inUse) !== 0,
      enabled: (flags & BITMAP_FLAG.auto) !== 0,
    }
    const problem = problemOf(entry, header) ?? (names.has(key) ? 'its name occurs twice' : undefined)
    names.add(key)
    bitmaps.push({ ...entry, problem })
    at += length
  }
  if (at !== directory.length) {
    return { bitmaps, problem: `${directory.length - at} bytes are left behind its ${nbBitmaps} entries` }
  }
  return { bitmaps, problem: undefined }
}

/** What QEMU refuses in an entry, and with it the whole image. */
function problemOf(entry: Omit<StoredBitmap, 'problem'>, header: Header): string | undefined {
  const { clusterBytes, size } = header
  const { extraData, flags, granularityBits, inUse, nameBytes, tableOffset, tableSize, type } = entry
  if (type !== DIRTY_TRACKING) return `type ${type}, expected ${DIRTY_TRACKING}`
  if (flags >>> 2 !== 0) {
    return extraData.length > 0 || flags >>> 3 !== 0
      ? `reserved flags 0x${flags.toString(16)}`
      : 'the flag extra_data_compatible, which QEMU refuses'
  }
  if (granularityBits < MIN_GRANULARITY_BITS || granularityBits > MAX_GRANULARITY_BITS) {
    return `granularity 2^${granularityBits}, expected 2^${MIN_GRANULARITY_BITS} to 2^${MAX_GRANULARITY_BITS}`
  }
  if (nameBytes.length === 0 || nameBytes.length > MAX_BITMAP_NAME_BYTES) {
    return `a name of ${nameBytes.length} bytes, expected 1 to ${MAX_BITMAP_NAME_BYTES}`
  }
  if (extraData.length > 0) return `${extraData.length} bytes of unknown extra data`
  if (tableOffset === 0 || tableOffset % clusterBytes !== 0) {
    return `its table at ${tableOffset}, expected a multiple of ${clusterBytes} other than 0`
  }
  if (
    tableSize === 0 ||
    tableSize > MAX_TABLE_ENTRIES ||
    tableSize * clusterBytes > Math.max(MAX_BITMAP_BYTES, clusterBytes)
  ) {
    return `a table of ${tableSize} entries`
  }
  const { tableEntries } = bitmapShape(size, granularityBits, clusterBytes)
  // QEMU does not look at the size of a bitmap that it will not load.
  if (!inUse && tableSize !== tableEntries) {
    return `a table of ${tableSize} entries, expected ${tableEntries} for a disk of ${size} bytes`
  }
  return undefined
}

/** Place of a bitmap's data in the file, cluster by cluster of the bitmap: an offset, or all clear, or all set. */
export type BitmapCluster = number | 'clear' | 'set'

/** The bitmap table, checked against the file. @throws CORRUPT */
export async function readBitmapTable(
  file: BlockDevice,
  header: Header,
  bitmap: StoredBitmap,
  signal?: AbortSignal,
): Promise<readonly BitmapCluster[]> {
  const { clusterBytes } = header
  const refuse = (found: string): VarveError =>
    new VarveError('CORRUPT', `Cannot read bitmap ${bitmap.name}: found ${found}`, {
      fields: { bitmap: bitmap.name },
    })
  const length = bitmap.tableSize * 8
  if (length > LIMITS.tableBytes)
    throw refuse(`a table of ${length} bytes, expected at most ${LIMITS.tableBytes}`)
  if (bitmap.tableOffset % clusterBytes !== 0 || bitmap.tableOffset < clusterBytes) {
    throw refuse(
      `its table at ${bitmap.tableOffset}, expected a multiple of ${clusterBytes} behind the header`,
    )
  }
  if (bitmap.tableOffset + length > file.size) {
    throw refuse(
      `its table at ${bitmap.tableOffset}+${length}, expected it inside the file of ${file.size} bytes`,
    )
  }
  const bytes = await readBytes(file, bitmap.tableOffset, length, signal)
  const view = new DataView(bytes.buffer)
  const clusters: BitmapCluster[] = []
  for (let index = 0; index < bitmap.tableSize; index++) {
    const hi = view.getUint32(index * 8)
    const lo = view.getUint32(index * 8 + 4)
    const offset = entryOffset(hi, lo)
    if ((hi & 0xff00_0000) !== 0 || (lo & 0x1fe) !== 0 || (offset !== 0 && (lo & 1) !== 0)) {
      throw refuse(`reserved bits in entry ${index} of its table`)
    }
    if (offset === 0) {
      clusters.push((lo & 1) === 0 ? 'clear' : 'set')
      continue
    }
    // The file may end inside the last cluster, but not before the last bit; the whole cluster is asked for.
    if (offset % clusterBytes !== 0 || offset < clusterBytes || offset + clusterBytes > file.size) {
      throw refuse(`its data at ${offset}, expected it aligned and inside the file of ${file.size} bytes`)
    }
    clusters.push(offset)
  }
  return clusters
}

/**
 * The bits of a sound entry that is not in use: bit n is set when something in
 * `[n << granularityBits, (n + 1) << granularityBits)` was written.
 * @throws CORRUPT when its table or data cannot be what they should; LIMIT
 */
export async function readBitmapBits(
  file: BlockDevice,
  header: Header,
  bitmap: StoredBitmap,
  signal?: AbortSignal,
): Promise<Bitmap> {
  if (bitmap.problem !== undefined) {
    throw new VarveError('CORRUPT', `Cannot read bitmap ${bitmap.name}: found ${bitmap.problem}`, {
      fields: { bitmap: bitmap.name },
    })
  }
  const { clusterBytes } = header
  const { bits, bytes, tableEntries } = bitmapShape(header.size, bitmap.granularityBits, clusterBytes)
  if (bytes > MAX_BITMAP_BYTES) {
    throw new VarveError(
      'LIMIT',
      `Cannot read bitmap ${bitmap.name}: found ${bytes} bytes of bits, expected at most ${MAX_BITMAP_BYTES}`,
    )
  }
  const clusters = await readBitmapTable(file, header, bitmap, signal)
  if (clusters.length !== tableEntries) {
    throw new VarveError(
      'CORRUPT',
      `Cannot read bitmap ${bitmap.name}: found a table of ${clusters.length} entries, expected ${tableEntries}`,
    )
  }
  const data = new Uint8Array(tableEntries * clusterBytes)
  for (let index = 0; index < clusters.length; ) {
    const first = clusters[index]!
    if (typeof first !== 'number') {
      if (first === 'set') data.fill(0xff, index * clusterBytes, (index + 1) * clusterBytes)
      index += 1
      continue
    }
    let count = 1
    while (count * clusterBytes < JOINED_BYTES && clusters[index + count] === first + count * clusterBytes)
      count += 1
    const start = index * clusterBytes
    await file.read(first, data.subarray(start, start + count * clusterBytes), signal)
    index += count
  }
  return Bitmap.fromBytes(data, bits)
}

/** Place of the bitmaps extension's own 8 bytes (type and length) in the header; undefined when there is none. */
export function extensionPlace(
  head: Uint8Array,
  header: Header,
  type: number = EXTENSION.bitmaps,
): { readonly at: number; readonly last: boolean } | undefined {
  for (const each of extensionsOf(head, header)) {
    if (each.type === type) return { at: each.at, last: each.nextType === EXTENSION.end }
  }
  return undefined
}

/** Every extension of a header that `decodeHeader` has accepted, in order, the end marker not among them. */
export function* extensionsOf(
  head: Uint8Array,
  header: Header,
): Generator<{
  readonly type: number
  readonly at: number
  readonly length: number
  readonly nextType: number
}> {
  const bytes = new Bytes(head, 'big', 'qcow2 header')
  const nameAt = bytes.size64(8)
  const end = Math.min(nameAt === 0 ? header.clusterBytes : nameAt, head.length)
  for (let at = header.headerLength; at + 8 <= end; ) {
    const type = bytes.u32(at)
    if (type === EXTENSION.end) return
    const length = bytes.u32(at + 4)
    const next = at + 8 + Math.ceil(length / 8) * 8
    yield { type, at, length, nextType: next + 8 <= end ? bytes.u32(next) : EXTENSION.end }
    at = next
  }
}

function reasonOf(error: unknown): string {
  if (!(error instanceof VarveError)) throw error
  return error.message.replace(/^Cannot open qcow2 image: found its bitmap directory/, 'it stands')
}
