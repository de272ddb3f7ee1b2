/**
 * Checks a whole image: every table, every reference, every stored count against the references found.
 *
 * Specification: QEMU's docs/interop/qcow2. What is found:
 * - error: the image contradicts its format, so that data is (or will be, by the next write) damaged: entries with
 *   reserved bits or outside the file, clusters used twice, counts lower than the references, wrong COPIED flags;
 * - leak: a count is higher than the references: space is lost, nothing else;
 * - note: nothing wrong, but worth knowing.
 *
 * Rules: reads only (`repairImage` writes); memory and work are bounded whatever the image claims; damage in one
 * place does not end the check of the others.
 */
import { LIMITS, throwIfAborted, VarveError } from '../../base/index.ts'
import { asWritable, type BlockDevice, readBytes } from '../../device/index.ts'
import type { CheckFinding } from '../image-format.ts'
import {
  AT,
  AUTOCLEAR,
  BITMAP_FLAG,
  COMPRESSED_HI,
  COPIED_HI,
  checkTable,
  compressedPlace,
  entryOffset,
  type Geometry,
  geometryOf,
  type Header,
  INCOMPATIBLE,
  L1_RESERVED_HI,
  L1_RESERVED_LO,
  L2_RESERVED_HI,
  L2_RESERVED_LO,
  ZERO_LO,
} from './layout.ts'
import { type Qcow2OpenOptions, readBitmapDirectory, readHeader, readSnapshots } from './open-image.ts'
import { getCount, mostCount, Refcounts } from './refcounts.ts'
import { TableCache } from './table-cache.ts'

/** Findings of one kind that are told one by one; the rest is summed up. */
const MOST_TOLD = 200
/** L2 entries looked at in one check: bounds the work when tables are shared without end. */
const MOST_ENTRIES = 2 ** 32
/** L2 tables read ahead at a time, in bytes. */
const BATCH_BYTES = 8_388_608

/** What a host cluster was found to be; a bit set, for one cluster may wrongly be several. */
const USE = { metadata: 1, l2: 2, data: 4, compressed: 8, active: 16 } as const

export interface Mismatch {
  readonly cluster: number
  readonly stored: number
  readonly expected: number
}

interface CheckResult {
  readonly header: Header
  readonly findings: readonly CheckFinding[]
  /** Errors that counting anew would not heal. */
  readonly structuralErrors: number
  readonly mismatches: readonly Mismatch[]
  /** Places of active L1 and L2 entries whose COPIED flag is wrong. */
  readonly wrongFlags: readonly number[]
  readonly refcountTable: Float64Array
}

/** @throws CORRUPT, UNSUPPORTED, ENCRYPTED, LIMIT when not even the header can be used */
export async function checkImage(
  file: BlockDevice,
  options: Qcow2OpenOptions = {},
): Promise<readonly CheckFinding[]> {
  return (await inspect(file, options)).findings
}

/**
 * Sets every count to the references that there are, corrects COPIED flags and clears the dirty bit. Order: counts
 * that are too low, flush, flags, flush, counts that are too high, flush, dirty bit, flush: a crash in between
 * leaves leaks. Returns what was found before.
 * @throws CORRUPT, unchanged, when there are errors that counting anew does not heal
 */
export async function repairImage(
  file: BlockDevice,
  options: Qcow2OpenOptions = {},
): Promise<readonly CheckFinding[]> {
  const writable = asWritable(file)
  const result = await inspect(file, options)
  const { header, mismatches, refcountTable, structuralErrors, wrongFlags } = result
  if (structuralErrors > 0) {
    throw new VarveError(
      'CORRUPT',
      `Cannot repair qcow2 image: found ${structuralErrors} errors that its references do not tell how to heal`,
      { fields: { errors: structuralErrors } },
    )
  }
  if (mismatches.length === 0 && wrongFlags.length === 0 && !header.dirty) return result.findings
  const refcounts = new Refcounts({
    file: writable,
    header,
    table: refcountTable,
    grow: async () => {
      throw new VarveError('CORRUPT', 'Cannot repair qcow2 image: found no room for its refcounts')
    },
    holds: () => undefined,
  })
  const setAll = async (list: readonly Mismatch[]): Promise<void> => {
    for (const { cluster, expected } of list) await refcounts.set(cluster, expected)
    await refcounts.writeBlocks(options.signal)
    await writable.flush()
  }
  await setAll(mismatches.filter((each) => each.stored < each.expected))
  for (const place of wrongFlags) {
    const byte = await readBytes(file, place, 1)
    await writable.write(place, Uint8Array.of(byte[0]! ^ 0x80))
  }
  await writable.flush()
  await setAll(mismatches.filter((each) => each.stored > each.expected))
  if (header.dirty) {
    const field = new DataView(new ArrayBuffer(8))
    field.setBigUint64(0, header.incompatible & ~INCOMPATIBLE.dirty)
    await writable.write(AT.incompatible, new Uint8Array(field.buffer))
    await writable.flush()
  }
  return result.findings
}

async function inspect(file: BlockDevice, options: Qcow2OpenOptions): Promise<CheckResult> {
  const header = await readHeader(file, options.signal)
  const check = new Check(file, header, options.signal)
  await check.run()
  return {
    header,
    findings: check.report(),
    structuralErrors: check.structuralErrors,
    mismatches: check.mismatches,
    wrongFlags: check.wrongFlags,
    refcountTable: check.refcountTable,
  }
}

class Check {
  readonly mismatches: Mismatch[] = []
  readonly wrongFlags: number[] = []
  structuralErrors = 0
  refcountTable: Float64Array = new Float64Array(0)
  readonly #file: BlockDevice
  readonly #header: Header
  readonly #geometry: Geometry
  readonly #signal: AbortSignal | undefined
  readonly #tables: TableCache
  readonly #references: References
  readonly #findings: CheckFinding[] = []
  readonly #untold = { error: 0, leak: 0, note: 0 }
  readonly #told = { error: 0, leak: 0, note: 0 }
  #entries = 0
  #activeFits = false
  /** Stored counts that differ from the references. */
  readonly #stored = new Map<number, number>()

  constructor(file: BlockDevice, header: Header, signal: AbortSignal | undefined) {
    this.#file = file
    this.#header = header
    this.#geometry = geometryOf(header)
    this.#signal = signal
    this.#tables = new TableCache(file, header.clusterBytes)
    this.#references = new References()
  }

  async run(): Promise<void> {
    const header = this.#header
    const { clusterBytes } = header
    if (header.dirty) this.#add('note', 'marked dirty: refcounts may be stale until they are repaired')
    if (header.corrupt) this.#error('marked corrupt by the program that last wrote it')
    this.#useRange(0, clusterBytes, USE.metadata, 'header')
    await this.#walkRefcountTable()
    await this.#walkL1({
      offset: header.l1TableOffset,
      entries: header.l1Size,
      what: 'L1 table',
      active: true,
    })
    await this.#walkSnapshots()
    await this.#walkBitmaps()
    await this.#compare()
    await this.#walkFlags()
  }

  report(): readonly CheckFinding[] {
    const more = (['error', 'leak', 'note'] as const)
      .filter((severity) => this.#untold[severity] > 0)
      .map((severity) => ({ severity, text: `${this.#untold[severity]} more of this kind` }))
    return [...this.#findings, ...more]
  }

  // Tables ---------------------------------------------------------------------------------------------------

  async #walkRefcountTable(): Promise<void> {
    const { clusterBytes, refcountTableClusters, refcountTableOffset } = this.#header
    const length = refcountTableClusters * clusterBytes
    if (!this.#tableFits(refcountTableOffset, length, 'refcount table')) return
    this.#useRange(refcountTableOffset, length, USE.metadata, 'refcount table')
    const bytes = await readBytes(this.#file, refcountTableOffset, length, this.#signal)
    const view = new DataView(bytes.buffer)
    this.refcountTable = new Float64Array(length / 8)
    for (let index = 0; index < this.refcountTable.length; index++) {
      const offset = view.getUint32(index * 8) * 0x1_0000_0000 + view.getUint32(index * 8 + 4)
      if (offset === 0) continue
      if (!this.#tableFits(offset, clusterBytes, `refcount block ${index}`)) continue
      if (this.#references.uses(offset / clusterBytes) !== 0) {
        this.#error(`refcount block ${index} stands on another table`, offset)
        continue
      }
      this.#references.add(offset / clusterBytes, USE.metadata)
      this.refcountTable[index] = offset
    }
  }

  async #walkL1(table: { offset: number; entries: number; what: string; active: boolean }): Promise<void> {
    const { clusterBytes } = this.#geometry
    if (table.entries === 0) return
    const length = table.entries * 8
    if (!this.#tableFits(table.offset, length, table.what)) return
    if (table.active) this.#activeFits = true
    this.#useRange(table.offset, length, USE.metadata, table.what)
    const bytes = await readBytes(this.#file, table.offset, length, this.#signal)
    const view = new DataView(bytes.buffer)
    const perBatch = Math.max(1, Math.min(Math.floor(BATCH_BYTES / clusterBytes), this.#tables.capacity >> 1))
    let batch: { index: number; offset: number }[] = []
    const walkBatch = async (): Promise<void> => {
      throwIfAborted(this.#signal)
      const tables = await this.#tables.load(
        batch.map((each) => each.offset),
        this.#signal,
      )
      batch.forEach(({ index }, i) => this.#walkL2(tables[i]!.view, tables[i]!.offset, index, table))
      batch = []
    }
    for (let index = 0; index < table.entries; index++) {
      const hi = view.getUint32(index * 8)
      const lo = view.getUint32(index * 8 + 4)
      if (hi === 0 && lo === 0) continue
      const what = `L2 table of entry ${index} of the ${table.what}`
      if ((hi & L1_RESERVED_HI) !== 0 || (lo & L1_RESERVED_LO) !== 0) {
        this.#error(`reserved bits in entry ${index} of the ${table.what}`, table.offset + index * 8)
      }
      const offset = entryOffset(hi, lo)
      if (offset === 0) continue
      if (!this.#tableFits(offset, clusterBytes, what)) continue
      if (!this.#use(offset, USE.l2, what, table.active)) continue
      batch.push({ index, offset })
      if (batch.length === perBatch) await walkBatch()
    }
    if (batch.length > 0) await walkBatch()
  }

  #walkL2(
    view: DataView,
    tableOffset: number,
    l1Index: number,
    table: { what: string; active: boolean },
  ): void {
    const { clusterBytes, extendedL2, hasDataFile, l2Entries, l2EntryBytes, l2Span, version } = this.#geometry
    this.#entries += l2Entries
    if (this.#entries > MOST_ENTRIES) {
      throw new VarveError('LIMIT', `Cannot check qcow2 image: found more than ${MOST_ENTRIES} L2 entries`)
    }
    for (let index = 0; index < l2Entries; index++) {
      const at = index * l2EntryBytes
      const hi = view.getUint32(at)
      const lo = view.getUint32(at + 4)
      const place = tableOffset + at
      const guest = (): string => `guest offset ${l1Index * l2Span + index * clusterBytes} (${table.what})`
      if ((hi & COMPRESSED_HI) !== 0) {
        if (hasDataFile) this.#error(`a compressed cluster beside an external data file at ${guest()}`, place)
        if ((hi & COPIED_HI) !== 0) this.#error(`a compressed cluster marked as COPIED at ${guest()}`, place)
        const { offset, length } = compressedPlace(hi, lo, this.#geometry)
        // The descriptor counts whole sectors; the file may end inside the last one.
        if (offset >= this.#file.size) {
          this.#error(`compressed data behind the file's end at ${guest()}`, place)
          continue
        }
        const end = Math.min(offset + length, Math.ceil(this.#file.size / clusterBytes) * clusterBytes)
        for (let cluster = Math.floor(offset / clusterBytes); cluster * clusterBytes < end; cluster++) {
          this.#use(cluster * clusterBytes, USE.compressed, guest(), false)
        }
        continue
      }
      const zeros = extendedL2 ? view.getUint32(at + 8) : 0
      const stored = extendedL2 ? view.getUint32(at + 12) : 0
      if (hi === 0 && lo === 0 && stored === 0) continue
      if (
        (hi & L2_RESERVED_HI) !== 0 ||
        (lo & L2_RESERVED_LO) !== 0 ||
        ((lo & ZERO_LO) !== 0 && (version === 2 || extendedL2))
      ) {
        this.#error(`reserved bits in the L2 entry of ${guest()}`, place)
      }
      if ((zeros & stored) !== 0) this.#error(`a subcluster both allocated and zero at ${guest()}`, place)
      const offset = entryOffset(hi, lo)
      if (hasDataFile) {
        if ((offset !== 0 || (hi & COPIED_HI) !== 0) && offset !== l1Index * l2Span + index * clusterBytes) {
          this.#error(`host offset ${offset} in the external data file at ${guest()}`, place)
        }
        continue
      }
      if (offset === 0) {
        if ((hi & COPIED_HI) !== 0 || stored !== 0) {
          this.#error(`an allocated cluster without a host offset at ${guest()}`, place)
        }
        continue
      }
      if (offset % clusterBytes !== 0) {
        this.#error(`an unaligned host offset ${offset} at ${guest()}`, place)
        continue
      }
      if (offset >= this.#file.size) {
        this.#error(`host offset ${offset} behind the file's end at ${guest()}`, place)
        continue
      }
      this.#use(offset, USE.data, guest, table.active)
    }
  }

  async #walkSnapshots(): Promise<void> {
    const header = this.#header
    if (header.nbSnapshots === 0) return
    const { snapshots, tableBytes, problem } = await readSnapshots(this.#file, header, this.#signal)
    if (problem) return this.#error(`the snapshot table cannot be read: ${problem.message}`)
    this.#useRange(header.snapshotsOffset, tableBytes, USE.metadata, 'snapshot table')
    for (const snapshot of snapshots) {
      await this.#walkL1({
        offset: snapshot.l1TableOffset,
        entries: snapshot.l1Size,
        what: `L1 table of snapshot ${snapshot.id}`,
        active: false,
      })
    }
  }

  async #walkBitmaps(): Promise<void> {
    const header = this.#header
    const consistent = (header.autoclear & AUTOCLEAR.bitmaps) !== 0n
    if (!header.bitmaps) {
      if (consistent) this.#error('the bitmaps feature bit is set, but there is no bitmaps extension')
      return
    }
    if (!consistent) {
      this.#add('note', 'a program without support for bitmaps wrote to the image: its bitmaps are void')
      return
    }
    const { clusterBytes } = header
    try {
      const entries = (await readBitmapDirectory(this.#file, header, this.#signal)) ?? []
      const { directoryBytes, directoryOffset } = header.bitmaps
      this.#useRange(directoryOffset, directoryBytes, USE.metadata, 'bitmap directory')
      for (const entry of entries) {
        const what = `table of bitmap ${entry.name}`
        if (entry.flags & BITMAP_FLAG.inUse) this.#add('note', `bitmap ${entry.name} is marked in use`)
        const length = entry.tableSize * 8
        if (length > LIMITS.tableBytes || !this.#tableFits(entry.tableOffset, length, what)) {
          if (length > LIMITS.tableBytes) this.#error(`the ${what} claims ${length} bytes`)
          continue
        }
        this.#useRange(entry.tableOffset, length, USE.metadata, what)
        const bytes = await readBytes(this.#file, entry.tableOffset, length, this.#signal)
        const view = new DataView(bytes.buffer)
        for (let at = 0; at < length; at += 8) {
          const hi = view.getUint32(at)
          const lo = view.getUint32(at + 4)
          const offset = entryOffset(hi, lo)
          if ((hi & 0xff00_0000) !== 0 || (lo & 0x1fe) !== 0 || (offset !== 0 && (lo & 1) !== 0)) {
            this.#error(`reserved bits in the ${what}`, entry.tableOffset + at)
          }
          if (offset !== 0 && this.#tableFits(offset, clusterBytes, `data of bitmap ${entry.name}`)) {
            this.#use(offset, USE.metadata, `data of bitmap ${entry.name}`, false)
          }
        }
      }
    } catch (error) {
      if (!(error instanceof VarveError) || !['CORRUPT', 'LIMIT'].includes(error.code)) throw error
      this.#error(`the bitmap directory cannot be read: ${error.message}`)
    }
  }

  // Counts ---------------------------------------------------------------------------------------------------

  async #compare(): Promise<void> {
    const { clusterBytes, refcountOrder } = this.#header
    const perBlock = (clusterBytes * 8) / 2 ** refcountOrder
    const blocks = new TableCache(this.#file, clusterBytes)
    for (const [index, offset] of this.refcountTable.entries()) {
      if (offset === 0) continue
      throwIfAborted(this.#signal)
      const { view } = await blocks.get(offset, this.#signal)
      for (let i = 0; i < perBlock; i++) {
        const stored = getCount(view, refcountOrder, i)
        const cluster = index * perBlock + i
        const expected = this.#references.count(cluster)
        if (stored !== expected) this.#mismatch(cluster, stored, expected)
      }
    }
    for (const cluster of this.#references) {
      if ((this.refcountTable[Math.floor(cluster / perBlock)] ?? 0) !== 0) continue
      // No block counts it, so this is not healed by setting a count.
      this.#error(`no refcount block for cluster ${cluster}, which is in use`, cluster * clusterBytes)
    }
  }

  #mismatch(cluster: number, stored: number, expected: number): void {
    const place = cluster * this.#header.clusterBytes
    if (expected > mostCount(this.#header.refcountOrder)) {
      return this.#error(
        `cluster ${cluster} is used ${expected} times, more than its refcount can say`,
        place,
      )
    }
    this.mismatches.push({ cluster, stored, expected })
    this.#stored.set(cluster, stored)
    if (this.mismatches.length > MOST_MISMATCHES) {
      throw new VarveError(
        'LIMIT',
        `Cannot check qcow2 image: found more than ${MOST_MISMATCHES} wrong refcounts`,
      )
    }
    if (stored > expected)
      this.#add('leak', `cluster ${cluster}: refcount ${stored}, references ${expected}`, place)
    else this.#add('error', `cluster ${cluster}: refcount ${stored}, references ${expected}`, place)
  }

  /** COPIED in the active tables has to say whether a cluster is used exactly once. */
  async #walkFlags(): Promise<void> {
    const { clusterBytes, hasDataFile, l2Entries, l2EntryBytes } = this.#geometry
    const { l1Size, l1TableOffset } = this.#header
    if (!this.#activeFits || l1Size === 0) return
    const bytes = await readBytes(this.#file, l1TableOffset, l1Size * 8, this.#signal)
    const l1 = new DataView(bytes.buffer)
    for (let index = 0; index < l1Size; index++) {
      const offset = this.#judgeFlag(l1, index * 8, l1TableOffset)
      if (offset === 0 || offset % clusterBytes !== 0 || offset + clusterBytes > this.#file.size) continue
      if (hasDataFile) continue
      throwIfAborted(this.#signal)
      const { view } = await this.#tables.get(offset, this.#signal)
      for (let entry = 0; entry < l2Entries; entry++) {
        if ((view.getUint32(entry * l2EntryBytes) & COMPRESSED_HI) === 0) {
          this.#judgeFlag(view, entry * l2EntryBytes, offset)
        }
      }
    }
  }

  /** Returns the offset in the entry. */
  #judgeFlag(view: DataView, at: number, tableOffset: number): number {
    const hi = view.getUint32(at)
    const offset = entryOffset(hi, view.getUint32(at + 4))
    if (offset === 0) return 0
    const cluster = Math.floor(offset / this.#header.clusterBytes)
    const expected = this.#references.count(cluster)
    if (expected === 0) return offset
    const copied = (hi & COPIED_HI) !== 0
    const place = tableOffset + at
    // A writer trusts the flag as it trusts the stored count; repair goes by the references.
    const stored = this.#stored.get(cluster) ?? expected
    if (copied !== (expected === 1)) this.wrongFlags.push(place)
    if (copied !== (stored === 1)) {
      this.#add(
        'error',
        `the COPIED flag at ${place} contradicts refcount ${stored} of cluster ${cluster}`,
        place,
      )
    }
    return offset
  }

  // Helpers --------------------------------------------------------------------------------------------------

  #tableFits(offset: number, length: number, what: string): boolean {
    try {
      const { clusterBytes } = this.#header
      checkTable({ offset, length, clusterBytes, fileBytes: this.#file.size, what })
      return true
    } catch (error) {
      if (!(error instanceof VarveError)) throw error
      this.#error(error.message.replace(/^Cannot open qcow2 image: /, ''), offset)
      return false
    }
  }

  #useRange(offset: number, length: number, use: number, what: string): void {
    const { clusterBytes } = this.#header
    for (let at = offset; at < offset + length; at += clusterBytes) this.#use(at, use, what, false)
  }

  /** Counts one reference. False when the cluster is something else already, which is told. */
  #use(offset: number, use: number, what: string | (() => string), active: boolean): boolean {
    const cluster = offset / this.#header.clusterBytes
    const before = this.#references.uses(cluster)
    this.#references.add(cluster, use | (active ? USE.active : 0))
    const kinds = before & (USE.metadata | USE.l2 | USE.data | USE.compressed)
    const twice = active && (before & USE.active) !== 0
    if (kinds === 0 || (kinds === use && use !== USE.metadata && !twice)) return true
    const name = typeof what === 'string' ? what : what()
    this.#error(`${name}: host cluster at ${offset} is used by something else as well`, offset)
    return false
  }

  #error(text: string, offset?: number): void {
    this.structuralErrors += 1
    this.#add('error', text, offset)
  }

  #add(severity: CheckFinding['severity'], text: string, offset?: number): void {
    if (this.#told[severity] >= MOST_TOLD) {
      this.#untold[severity] += 1
      return
    }
    this.#told[severity] += 1
    this.#findings.push(offset === undefined ? { severity, text } : { severity, text, offset })
  }
}

/** Wrong counts kept for repair. */
const MOST_MISMATCHES = 4_194_304
/** Clusters of one page of counts: small, so that scattered references cost little. */
const PAGE = 512
/** Pages at a time: 256 MiB. */
const MOST_PAGES = 100_000

interface Page {
  readonly counts: Uint32Array
  readonly uses: Uint8Array
}

/** References to host clusters: count and uses of each, in pages that exist where something is referred to. */
class References {
  readonly #pages = new Map<number, Page>()
  #lastIndex = -1
  #lastPage: Page | undefined

  add(cluster: number, uses: number): void {
    let page = this.#page(cluster)
    if (!page) {
      if (this.#pages.size >= MOST_PAGES) {
        throw new VarveError('LIMIT', 'Cannot check qcow2 image: found its clusters scattered too widely')
      }
      page = { counts: new Uint32Array(PAGE), uses: new Uint8Array(PAGE) }
      this.#pages.set(Math.floor(cluster / PAGE), page)
      this.#lastPage = page
    }
    page.counts[cluster % PAGE]! += 1
    page.uses[cluster % PAGE]! |= uses
  }

  count(cluster: number): number {
    return this.#page(cluster)?.counts[cluster % PAGE] ?? 0
  }

  uses(cluster: number): number {
    return this.#page(cluster)?.uses[cluster % PAGE] ?? 0
  }

  #page(cluster: number): Page | undefined {
    const index = Math.floor(cluster / PAGE)
    if (index !== this.#lastIndex) {
      this.#lastIndex = index
      this.#lastPage = this.#pages.get(index)
    }
    return this.#lastPage
  }

  /** Every cluster that is referred to. */
  *[Symbol.iterator](): Generator<number> {
    for (const [index, page] of this.#pages) {
      for (let i = 0; i < PAGE; i++) if (page.counts[i]! > 0) yield index * PAGE + i
    }
  }
}
