/**
 * Guest offset -> where its bytes stand: the L1 table (in memory) and the L2 tables (cached), walked into runs.
 *
 * Rules:
 * - A run is checked when it is handed out: reserved bits, alignment, inside the file, not on top of the header,
 *   the L1 table, the refcount table or the snapshot table. What nobody asks for is not judged (that is `check`).
 * - An active L1 table names each L2 table once. A repeated one would let a small file claim endless tables, and
 *   is refused when the map is made.
 * - The work of one call is bounded by the range asked for and by `mostRuns`, its memory by the table cache.
 */
import { throwIfAborted, VarveError } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import {
  COMPRESSED_HI,
  COPIED_HI,
  compressedPlace,
  corrupt,
  entryOffset,
  type Geometry,
  L1_RESERVED_HI,
  L1_RESERVED_LO,
  L2_RESERVED_HI,
  L2_RESERVED_LO,
  ZERO_LO,
} from './layout.ts'
import type { Table, TableCache } from './table-cache.ts'

/** Numbers, not strings: one comparison per cluster in the inner loop. */
export const KIND = { absent: 0, zero: 1, data: 2, compressed: 3 } as const
export type Kind = (typeof KIND)[keyof typeof KIND]

export interface Run {
  /** Guest offset in bytes. */
  readonly offset: number
  length: number
  readonly kind: Kind
  /** data: place in the data file of guest byte `offset`. compressed: where its compressed bytes begin. */
  readonly host: number
  /** compressed: bytes from `host` that may belong to it; the run is inside one cluster. */
  readonly hostLength: number
}

/** A part of the file that holds metadata, so that guest data cannot stand there. */
export interface Reserved {
  readonly what: string
  readonly start: number
  readonly end: number
}

/** L2 tables loaded by one step of a walk, at most; bounded by the cache's capacity too. */
const BATCH_BYTES = 8_388_608

export class ClusterMap {
  readonly geometry: Geometry
  readonly tables: TableCache
  readonly #file: BlockDevice
  /** Where guest data stands: the image itself or its external data file. */
  readonly #data: BlockDevice
  #l1: DataView
  reserved: readonly Reserved[]

  constructor(parts: {
    geometry: Geometry
    file: BlockDevice
    data: BlockDevice
    tables: TableCache
    l1: Uint8Array
    reserved: readonly Reserved[]
  }) {
    this.geometry = parts.geometry
    this.tables = parts.tables
    this.#file = parts.file
    this.#data = parts.data
    this.#l1 = viewOf(parts.l1)
    this.reserved = parts.reserved
    refuseRepeats(parts.l1)
  }

  /** The L1 table as on disk, not a copy. */
  get l1(): DataView {
    return this.#l1
  }

  get l1Size(): number {
    return this.#l1.byteLength / 8
  }

  /** Takes over a larger (or smaller) L1 table after a resize. */
  replaceL1(l1: Uint8Array): void {
    this.#l1 = viewOf(l1)
  }

  /** Place of the L2 table of L1 entry `index`; 0 when there is none. @throws CORRUPT */
  l2Offset(index: number): number {
    const hi = this.#l1.getUint32(index * 8)
    const lo = this.#l1.getUint32(index * 8 + 4)
    if ((hi & 0x7fff_ffff) === 0 && lo === 0) return 0
    const offset = entryOffset(hi, lo)
    const { clusterBytes } = this.geometry
    if ((hi & L1_RESERVED_HI) !== 0 || (lo & L1_RESERVED_LO) !== 0 || offset % clusterBytes !== 0) {
      throw corrupt(`found L1 entry ${index} with reserved bits or an unaligned offset`, { l1Index: index })
    }
    if (offset + clusterBytes > this.#file.size) {
      throw corrupt(
        `found the L2 table of L1 entry ${index} at ${offset}, expected it inside the file of ${this.#file.size}`,
        { l1Index: index, offset },
      )
    }
    this.#refuseReserved(offset, clusterBytes, `L2 table of L1 entry ${index}`)
    return offset
  }

  /**
   * Runs of `[offset, end)`, joined where they go on in the file. Stops early after `mostRuns`, so the last run
   * ends at or before `end`; never empty.
   * @throws CORRUPT where an entry that was asked for is wrong
   */
  async runs(offset: number, end: number, mostRuns: number, signal?: AbortSignal): Promise<Run[]> {
    const { clusterBytes, l2Span } = this.geometry
    const list = new RunList()
    const perBatch = Math.max(
      1,
      Math.min(Math.floor(BATCH_BYTES / clusterBytes), Math.floor(this.tables.capacity / 2)),
    )
    let at = offset
    while (at < end && list.runs.length < mostRuns) {
      throwIfAborted(signal)
      // The next L1 entries: as many as bring a batch of L2 tables, unallocated ones in between for nothing.
      const wanted: number[] = []
      const steps: number[] = []
      let to = at
      for (let index = Math.floor(at / l2Span); to < end; index++) {
        const table = this.l2Offset(index)
        if (table !== 0) {
          if (wanted.length === perBatch) break
          wanted.push(table)
        }
        steps.push(table)
        to = Math.min(end, (index + 1) * l2Span)
      }
      const tables = wanted.length === 0 ? [] : await this.tables.load(wanted, signal)
      let next = 0
      for (const step of steps) {
        const stop = Math.min(end, (Math.floor(at / l2Span) + 1) * l2Span)
        if (step === 0) list.add(KIND.absent, at, stop - at, 0)
        else this.#walk(tables[next++]!, at, stop, list, mostRuns)
        // A table that was cut short by `mostRuns` ends the walk where its last run ends.
        at = list.end
        if (at < stop) break
      }
    }
    for (const run of list.runs) this.#checkRun(run)
    return list.runs
  }

  /** Adds the runs of `[from, to)`, which lie in one L2 table. */
  #walk(table: Table, from: number, to: number, list: RunList, mostRuns: number): void {
    const { clusterBytes, extendedL2, hasDataFile, l2EntryBytes, l2Span, version } = this.geometry
    const { view } = table
    const clusterMask = clusterBytes - 1
    const base = Math.floor(from / l2Span) * l2Span
    const first = Math.floor((from - base) / clusterBytes)
    const end = Math.ceil((to - base) / clusterBytes)
    // Whole numbers below 2^18 count the entries: arithmetic on offsets is several times slower.
    for (let index = first; index < end; index++) {
      if (list.runs.length > mostRuns) return
      const entry = index * l2EntryBytes
      const hi = view.getUint32(entry)
      const lo = view.getUint32(entry + 4)
      const start = base + index * clusterBytes
      const at = index === first ? from : start
      if (hi === 0 && lo === 0 && !extendedL2) {
        while (index + 1 < end && isEmptyEntry(view, (index + 1) * 8)) index += 1
        list.add(KIND.absent, at, Math.min(to, base + (index + 1) * clusterBytes) - at, 0)
        continue
      }
      const stop = Math.min(to, start + clusterBytes)
      if ((hi & COMPRESSED_HI) !== 0) {
        if (hasDataFile) throw wrongEntry(start, 'a compressed cluster beside an external data file')
        const place = compressedPlace(hi, lo, this.geometry)
        list.addCompressed(at, stop - at, place.offset, place.length)
        continue
      }
      if ((hi & L2_RESERVED_HI) !== 0 || (lo & L2_RESERVED_LO) !== 0) {
        throw wrongEntry(start, 'reserved bits')
      }
      if ((lo & clusterMask & 0xffff_fe00) !== 0) throw wrongEntry(start, 'an unaligned host offset')
      const host = entryOffset(hi, lo)
      // Offset 0 is the header's cluster; only an external data file has guest data there.
      const allocated = host !== 0 || (hasDataFile && (hi & COPIED_HI) !== 0)
      if (allocated && hasDataFile && host !== start) {
        throw wrongEntry(start, `host offset ${host} in an external data file`)
      }
      if (extendedL2) {
        if ((lo & ZERO_LO) !== 0) throw wrongEntry(start, 'reserved bits')
        this.#walkSubclusters({ view, entry, start, at, stop, host, allocated }, list)
      } else if ((lo & ZERO_LO) !== 0) {
        if (version === 2) throw wrongEntry(start, 'a zero flag in a version 2 image')
        list.add(KIND.zero, at, stop - at, 0)
      } else if (allocated) list.add(KIND.data, at, stop - at, host + (at - start))
      else list.add(KIND.absent, at, stop - at, 0)
    }
  }

  #walkSubclusters(
    cluster: {
      view: DataView
      entry: number
      start: number
      at: number
      stop: number
      host: number
      allocated: boolean
    },
    list: RunList,
  ): void {
    const { subclusterBytes } = this.geometry
    const { view, entry, start, stop, host, allocated } = cluster
    const zeros = view.getUint32(entry + 8)
    const stored = view.getUint32(entry + 12)
    if ((zeros & stored) !== 0) throw wrongEntry(start, 'a subcluster both allocated and zero')
    if (stored !== 0 && !allocated) throw wrongEntry(start, 'allocated subclusters without a host offset')
    let at = cluster.at
    while (at < stop) {
      const index = Math.floor((at - start) / subclusterBytes)
      const to = Math.min(stop, start + (index + 1) * subclusterBytes)
      if ((stored >>> index) & 1) list.add(KIND.data, at, to - at, host + (at - start))
      else list.add((zeros >>> index) & 1 ? KIND.zero : KIND.absent, at, to - at, 0)
      at = to
    }
  }

  #checkRun(run: Run): void {
    if (run.kind === KIND.compressed) {
      if (run.host >= this.#file.size) {
        throw wrongEntry(
          run.offset,
          `compressed data at ${run.host} behind the file's end ${this.#file.size}`,
        )
      }
      this.#refuseReserved(
        run.host,
        Math.min(run.hostLength, this.#file.size - run.host),
        'compressed cluster',
      )
    } else if (run.kind === KIND.data) {
      // The last cluster may be cut by the end of the file (its rest reads as zeros), a whole one may not lack.
      const lastCluster =
        run.host + run.length - 1 - ((run.host + run.length - 1) % this.geometry.clusterBytes)
      if (lastCluster >= this.#data.size) {
        throw wrongEntry(run.offset, `data up to ${run.host + run.length} behind the end ${this.#data.size}`)
      }
      if (!this.geometry.hasDataFile) this.#refuseReserved(run.host, run.length, 'guest data')
    }
  }

  #refuseReserved(start: number, length: number, what: string): void {
    for (const part of this.reserved) {
      if (start < part.end && part.start < start + length) {
        throw corrupt(`found ${what} at ${start}+${length} on top of the ${part.what}`, { offset: start })
      }
    }
  }
}

function isEmptyEntry(view: DataView, at: number): boolean {
  return view.getUint32(at) === 0 && view.getUint32(at + 4) === 0
}

/** Reads an L1 table whose place has been checked. */
export async function readL1(
  file: BlockDevice,
  table: { readonly l1TableOffset: number; readonly l1Size: number },
  signal?: AbortSignal,
): Promise<Uint8Array> {
  if (table.l1Size === 0) return new Uint8Array(0)
  return await readBytes(file, table.l1TableOffset, table.l1Size * 8, signal)
}

class RunList {
  readonly runs: Run[] = []
  #last: Run | undefined

  get end(): number {
    return this.#last ? this.#last.offset + this.#last.length : 0
  }

  add(kind: Kind, offset: number, length: number, host: number): void {
    const last = this.#last
    if (last && last.kind === kind && (kind !== KIND.data || last.host + last.length === host)) {
      last.length += length
      return
    }
    this.#last = { offset, length, kind, host, hostLength: 0 }
    this.runs.push(this.#last)
  }

  addCompressed(offset: number, length: number, host: number, hostLength: number): void {
    this.#last = { offset, length, kind: KIND.compressed, host, hostLength }
    this.runs.push(this.#last)
  }
}

function refuseRepeats(l1: Uint8Array): void {
  const view = viewOf(l1)
  const offsets = new Float64Array(l1.length / 8)
  let count = 0
  for (let at = 0; at < l1.length; at += 8) {
    const offset = entryOffset(view.getUint32(at), view.getUint32(at + 4))
    if (offset !== 0) offsets[count++] = offset
  }
  const sorted = offsets.subarray(0, count).sort()
  for (let i = 1; i < count; i++) {
    if (sorted[i] === sorted[i - 1]) {
      throw corrupt(`found two L1 entries that name the L2 table at ${sorted[i]}, expected one`, {
        offset: sorted[i]!,
      })
    }
  }
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

function wrongEntry(offset: number, found: string): VarveError {
  return new VarveError('CORRUPT', `Cannot map guest offset ${offset}: found ${found} in its L2 entry`, {
    fields: { offset },
  })
}
