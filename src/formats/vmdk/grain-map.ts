/**
 * Where a sparse extent keeps the disk's bytes: grain directory and grain tables, loaded in bulk, in bounded memory.
 *
 * Rules:
 * - Every entry stands for its own grain and no other: one emptied grain says nothing about its neighbours.
 * - A place that does not lie in the file, or lies in the extent's own tables, is CORRUPT: it is never made up.
 * - Tables come from the primary directory. One that makes no sense is taken from the redundant copy, if the extent
 *   has one and that copy makes sense; the caller is told.
 */
import { type Log, mapBounded, throwIfAborted, VarveError } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { type RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import {
  ABSENT,
  corrupt,
  decodeGrainTable,
  type ExtentHeader,
  GRAIN_MARKER_BYTES,
  HEADER_BYTES,
  tableBytes,
  tableOffset,
  ZEROED,
} from './layout.ts'

/** Decoded tables kept, in bytes: those of 256 GiB with grains of 64 KiB. */
const CACHE_BYTES = 32 * 1024 * 1024
/** Tables of one batch, and bytes of one read. */
const BATCH_BYTES = 4 * 1024 * 1024
const JOINED_BYTES = 1024 * 1024
/** Tables that stand closer than this are read in one go. */
const GAP_BYTES = 16_384
const READS = 8

/** Grains of one table that follow each other on the disk, alike, and in the file when they are data. */
export interface GrainRun {
  readonly start: number
  readonly end: number
  readonly kind: 'data' | 'zero' | 'absent'
  /** Where `start` stands in the file; for compressed grains where the grain's marker stands, one grain a run. */
  readonly from: number
}

export interface Directory {
  /** Byte offset of each grain table in the file, 0 for none. */
  readonly tables: Float64Array
  readonly redundant: Float64Array | undefined
  /** Byte offsets of the directories that hold. */
  readonly offsets: readonly number[]
}

export class GrainMap {
  readonly header: ExtentHeader
  readonly size: number
  readonly #file: BlockDevice
  readonly #directory: Directory
  readonly #metadata: RangeSet
  readonly #metadataEnd: number
  readonly #log: Log | undefined
  readonly #cache = new Map<number, Float64Array>()
  readonly #mostCached: number

  constructor(parts: {
    readonly file: BlockDevice
    readonly header: ExtentHeader
    readonly directory: Directory
    readonly size: number
    readonly metadata: RangeSet
    readonly log: Log | undefined
  }) {
    this.header = parts.header
    this.size = parts.size
    this.#file = parts.file
    this.#directory = parts.directory
    this.#metadata = parts.metadata
    this.#metadataEnd = parts.metadata.end ?? 0
    this.#log = parts.log
    this.#mostCached = Math.max(8, Math.floor(CACHE_BYTES / (parts.header.tableEntries * 8)))
  }

  /** Calls `visit` for runs that cover `[offset, end)`, ascending, until `enough`. Returns where it stopped. */
  async eachRun(
    offset: number,
    end: number,
    visit: (run: GrainRun) => void,
    signal: AbortSignal | undefined,
    enough: () => boolean = () => false,
  ): Promise<number> {
    const { grainBytes, tableEntries, compressed } = this.header
    const span = grainBytes * tableEntries
    const last = Math.ceil(end / span)
    let index = Math.floor(offset / span)
    while (index < last) {
      throwIfAborted(signal)
      const loaded = await this.#load(index, last, signal)
      for (; index < loaded.end; index++) {
        const base = index * span
        const to = Math.min(end, base + span)
        let at = Math.max(offset, base)
        const table = loaded.tables.get(index)
        if (!table) {
          visit({ start: at, end: to, kind: 'absent', from: 0 })
          continue
        }
        while (at < to) {
          const first = Math.floor((at - base) / grainBytes)
          const place = table[first]!
          let next = first + 1
          if (place <= ZEROED) {
            while (next < tableEntries && table[next] === place) next++
          } else if (!compressed) {
            while (next < tableEntries && table[next] === place + (next - first) * grainBytes) next++
          }
          const stop = Math.min(to, base + next * grainBytes)
          if (place <= ZEROED) {
            visit({ start: at, end: stop, kind: place === ABSENT ? 'absent' : 'zero', from: 0 })
          } else {
            const inGrain = compressed ? 0 : at - base - first * grainBytes
            visit({ start: at, end: stop, kind: 'data', from: place + inGrain })
          }
          at = stop
        }
        if (enough()) {
          index++
          break
        }
      }
      if (enough()) break
    }
    return Math.min(end, index * span)
  }

  close(): void {
    this.#cache.clear()
  }

  /** Tables from `first` on, until `most` or a batch is full. Those that are not there are not in `tables`. */
  async #load(
    first: number,
    most: number,
    signal: AbortSignal | undefined,
  ): Promise<{ readonly end: number; readonly tables: ReadonlyMap<number, Float64Array> }> {
    const bytes = tableBytes(this.header)
    const tables = new Map<number, Float64Array>()
    const missing: number[] = []
    let end = first
    for (; end < most && (missing.length + tables.size) * bytes < BATCH_BYTES; end++) {
      const known = this.#cache.get(end)
      if (known) {
        tables.set(end, known)
        this.#cache.delete(end)
        this.#cache.set(end, known)
      } else if (this.#directory.tables[end] !== 0) {
        missing.push(end)
      }
    }
    if (missing.length === 0) return { end, tables }
    const at = (index: number): number => this.#directory.tables[index]!
    missing.sort((a, b) => at(a) - at(b))
    const groups: number[][] = []
    for (const index of missing) {
      const group = groups.at(-1)
      const close =
        group &&
        at(index) - (at(group.at(-1)!) + bytes) <= GAP_BYTES &&
        at(index) + bytes - at(group[0]!) <= JOINED_BYTES
      if (close) group.push(index)
      else groups.push([index])
    }
    await mapBounded(groups, READS, async (group) => {
      const start = at(group[0]!)
      const raw = await readBytes(this.#file, start, at(group.at(-1)!) + bytes - start, signal)
      for (const index of group) {
        const from = at(index) - start
        tables.set(index, await this.#decode(index, raw.subarray(from, from + bytes), signal))
      }
    })
    for (const index of missing) this.#cache.set(index, tables.get(index)!)
    for (const oldest of this.#cache.keys()) {
      if (this.#cache.size <= this.#mostCached) break
      this.#cache.delete(oldest)
    }
    return { end, tables }
  }

  async #decode(index: number, raw: Uint8Array, signal: AbortSignal | undefined): Promise<Float64Array> {
    const primary = this.#checked(index, raw)
    if (primary instanceof Float64Array) return primary
    const second = this.#directory.redundant?.[index] ?? 0
    if (second !== 0 && second !== this.#directory.tables[index]) {
      const redundant = this.#checked(
        index,
        await readBytes(this.#file, second, tableBytes(this.header), signal),
      )
      if (redundant instanceof Float64Array) {
        this.#log?.('warn', 'A grain table of the VMDK makes no sense; its redundant copy is used.', {
          table: index,
          why: primary.message,
        })
        return redundant
      }
    }
    throw primary
  }

  /** The table's places, or what is wrong with them. */
  #checked(index: number, raw: Uint8Array): Float64Array | VarveError {
    const { header } = this
    const { places, wrong } = decodeGrainTable(header, raw)
    const first = index * header.tableEntries
    // Of a grain that the disk's end cuts, the file needs to hold what the disk has of it.
    const grains = Math.min(places.length, Math.ceil(this.size / header.grainBytes) - first)
    if (wrong !== undefined && wrong < grains) {
      return corrupt(
        `grain table ${index}`,
        `an entry of no known type for grain ${first + wrong}`,
        'one that is known',
      )
    }
    for (let i = 0; i < grains; i++) {
      const place = places[i]!
      if (place <= ZEROED) continue
      const needed = header.compressed
        ? GRAIN_MARKER_BYTES + 1
        : Math.min(header.grainBytes, this.size - (first + i) * header.grainBytes)
      if (
        place < HEADER_BYTES ||
        place + needed > Math.min(this.#file.size, header.grainsEnd) ||
        (place < this.#metadataEnd && this.#metadata.touches(place, place + needed))
      ) {
        return new VarveError(
          'CORRUPT',
          `Cannot read VMDK grain ${first + i}: found it at byte ${place}, expected a place among the data of a file of ${this.#file.size} bytes`,
          { fields: { grain: first + i, offset: place } },
        )
      }
    }
    return places
  }
}

/**
 * Reads the grain directory, and the redundant one where there is one. A primary directory that makes no sense is
 * replaced by the redundant one. @throws CORRUPT when neither makes sense
 */
export async function readDirectory(
  file: BlockDevice,
  header: ExtentHeader,
  log: Log | undefined,
  signal: AbortSignal | undefined,
): Promise<Directory> {
  const primary = await directoryAt(file, header, header.directoryOffset, signal)
  const redundant =
    header.redundantOffset === undefined
      ? undefined
      : await directoryAt(file, header, header.redundantOffset, signal)
  const second = redundant instanceof Float64Array ? redundant : undefined
  if (primary instanceof Float64Array) {
    const offsets = second ? [header.directoryOffset, header.redundantOffset!] : [header.directoryOffset]
    return { tables: primary, redundant: second, offsets }
  }
  if (!second) throw primary
  log?.('warn', 'The grain directory of the VMDK makes no sense; its redundant copy is used.', {
    why: primary.message,
  })
  return { tables: second, redundant: undefined, offsets: [header.redundantOffset!] }
}

async function directoryAt(
  file: BlockDevice,
  header: ExtentHeader,
  offset: number,
  signal: AbortSignal | undefined,
): Promise<Float64Array | VarveError> {
  const length = header.directoryEntries * header.entryBytes
  if (offset < HEADER_BYTES || offset + length > file.size) {
    return corrupt(
      'grain directory',
      `it at ${offset}+${length} of a file of ${file.size} bytes`,
      'it in the file',
    )
  }
  const bytes = await readBytes(file, offset, length, signal)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const tables = new Float64Array(header.directoryEntries)
  for (let index = 0; index < tables.length; index++) {
    const at = tableOffset(header, view, index)
    if (at === undefined || (at !== 0 && (at < HEADER_BYTES || at + tableBytes(header) > file.size))) {
      return corrupt('grain directory', `grain table ${index} at ${at ?? 'no known place'}`, 'it in the file')
    }
    tables[index] = at
  }
  return tables
}

/** Everything of the file that holds no data of the disk. */
export function metadataOf(
  header: ExtentHeader,
  directory: Directory,
  more: readonly { readonly start: number; readonly end: number }[],
): RangeSet {
  const bytes = tableBytes(header)
  const builder = new RangeSetBuilder()
  builder.add(0, HEADER_BYTES)
  for (const { start, end } of more) builder.add(start, end)
  for (const start of directory.offsets) {
    builder.add(start, start + header.directoryEntries * header.entryBytes)
  }
  for (const tables of [directory.tables, directory.redundant]) {
    if (!tables) continue
    for (const start of tables) if (start !== 0) builder.add(start, start + bytes)
  }
  return builder.build()
}
