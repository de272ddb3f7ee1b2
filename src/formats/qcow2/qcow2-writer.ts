/**
 * A qcow2 image opened for writing.
 *
 * Specification: QEMU's docs/interop/qcow2. The write order, which no failure of power or process can turn into a
 * damaged image (at worst clusters leak):
 *
 *   1. guest data goes to clusters that nothing on disk refers to, or in place where the cluster is ours alone;
 *   2. refcount blocks (all counts that went up), and when blocks are new: flush, refcount table;   flush
 *   3. L2 tables;                                                                                   flush
 *   4. L1 entries;                                                                                  flush
 *   5. counts that go down: only now is the former cluster given back and may be used again.
 *
 * Steps 2 to 5 are one checkpoint: `flush`, dispose, or when changed tables take much memory. Between two of them
 * tables change in memory only, where every reader of this layer sees them.
 *
 * What runs at the same time:
 *
 *   | pair                      | protected by                                                                  |
 *   | write, write, same range  | RangeLock over whole clusters                                                 |
 *   | write, write, elsewhere   | tables under the mutex; data moves outside it                                 |
 *   | write, checkpoint         | the mutex; data of a write that is under way is not referred to yet           |
 *   | read, write               | an entry changes after its data is written; a reader sees before or after     |
 *   | read, a cluster freed     | step 5 waits for the reads that were under way                                |
 */
import { alignDown, alignUp, assert, mapBounded, throwIfAborted, VarveError } from '../../base/index.ts'
import {
  asWritable,
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
  isResizable,
  type WritableBlockDevice,
} from '../../device/index.ts'
import type { Extent } from '../../extents/index.ts'
import type { BackingReference, FillAbsent, FormatFacts, WritableImageLayer } from '../image-format.ts'
import { type ClusterMap, KIND } from './cluster-map.ts'
import { compressCluster } from './compression.ts'
import {
  AT,
  AUTOCLEAR,
  BITMAP_FLAG,
  COMPRESSED_HI,
  COPIED_HI,
  compressedEntry,
  compressedPlace,
  corrupt,
  entryOffset,
  type Geometry,
  type Header,
  MAX_L1_BYTES,
  type Snapshot,
  ZERO_LO,
} from './layout.ts'
import { Mutex, RangeLock } from './locks.ts'
import {
  type OpenedImage,
  openImage,
  type Qcow2OpenOptions,
  readBitmapDirectory,
  reservedParts,
} from './open-image.ts'
import { backingOf, ClusterReader, disposeImage } from './qcow2-layer.ts'
import { type ClusterRun, Refcounts, readRefcountTable } from './refcounts.ts'
import { type Table, writeTables } from './table-cache.ts'

/** Changed tables in memory; above it a checkpoint is made. */
const MOST_DIRTY_BYTES = 8_388_608
const MOST_EXTENTS_READ = Number.POSITIVE_INFINITY
const PARALLEL_WRITES = 8
/** The file grows by at least this much at a time, and is cut to what is used when the layer is disposed of. */
const GROW_BYTES = 4_194_304
/** Clusters planned, written and entered in one go: bounds the memory of one large write. */
const BATCH_BYTES = 16_777_216

/** One L2 entry, taken apart. */
interface Entry {
  readonly hi: number
  readonly lo: number
  /** Extended L2 entries: the two halves of the subcluster bitmap. */
  readonly zeros: number
  readonly stored: number
}

const NO_ENTRY: Entry = { hi: 0, lo: 0, zeros: 0, stored: 0 }

/** What a write does to one cluster. */
interface ClusterPlan {
  /** Guest offset of the cluster. */
  readonly guest: number
  /** Where its data goes. */
  readonly host: number
  /** `host` was allocated for this write. */
  readonly fresh: boolean
  /** Guest range that is written: at least what the caller gave, rounded out to what has to be whole. */
  readonly from: number
  readonly to: number
  /** The entry changes, so the data must be there first. */
  readonly enter: boolean
}

export class Qcow2Writer implements WritableImageLayer {
  readonly format = 'qcow2'
  readonly blockSize = 512
  readonly features: Features
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  readonly header: Header
  readonly snapshots: readonly Snapshot[]
  readonly #file: WritableBlockDevice
  readonly #data: WritableBlockDevice
  readonly #image: OpenedImage
  readonly #geometry: Geometry
  readonly #map: ClusterMap
  readonly #refcounts: Refcounts
  readonly #reader: ClusterReader
  readonly #fillAbsent: FillAbsent | undefined
  readonly #mutex = new Mutex()
  readonly #ranges = new RangeLock()
  readonly #reads = new Set<Promise<void>>()
  /** Clusters that are L2 tables of the active L1 table, or were until the next checkpoint. */
  readonly #l2Clusters = new Set<number>()
  /** Sectors of the L1 table that changed. */
  readonly #dirtyL1 = new Set<number>()
  #l1Offset: number
  #size: number
  /** Behind the last cluster in use, as far as we know. */
  #usedBytes: number
  /** Clusters to give back once nothing on disk refers to them, one element per reference. */
  #pendingFrees: number[] = []
  /** Where the next compressed cluster goes: the free rest of a host cluster. */
  #pack: { at: number; end: number } | undefined
  #started: Promise<void> | undefined
  #disposed = false
  #failed: unknown

  private constructor(parts: {
    image: OpenedImage
    file: WritableBlockDevice
    data: WritableBlockDevice
    table: Float64Array
    fillAbsent: FillAbsent | undefined
  }) {
    const { image, file } = parts
    this.#image = image
    this.#file = file
    this.#data = parts.data
    this.#geometry = image.geometry
    this.#map = image.map
    this.#reader = new ClusterReader(image)
    this.#fillAbsent = parts.fillAbsent
    this.#size = image.size
    this.#l1Offset = image.header.l1TableOffset
    this.#usedBytes = alignUp(file.size, image.geometry.clusterBytes)
    this.#refcounts = new Refcounts({
      file,
      header: image.header,
      table: parts.table,
      grow: (bytes) => this.#growFile(bytes),
      holds: (cluster) => this.#holds(cluster),
    })
    for (let index = 0; index < image.map.l1Size; index++) {
      const offset = entryOffset(image.map.l1.getUint32(index * 8), image.map.l1.getUint32(index * 8 + 4))
      if (offset !== 0) this.#l2Clusters.add(Math.floor(offset / image.geometry.clusterBytes))
    }
    this.header = image.header
    this.snapshots = image.snapshots
    this.facts = image.facts
    this.backing = backingOf(image.header)
    this.features = {
      write: true,
      resize: isResizable(file),
      sparse: true,
      places: this.#reader.places,
    }
  }

  /**
   * Opens `file` for writing; the layer then owns it, but not when this throws. Nothing is written before the
   * first `write`, `zero` or `resize`.
   * @throws READ_ONLY; CORRUPT, also for an image that is marked corrupt or dirty
   */
  static async open(file: BlockDevice, options: Qcow2OpenOptions = {}): Promise<Qcow2Writer> {
    const writable = asWritable(file)
    if (options.snapshot !== undefined) {
      throw new VarveError(
        'READ_ONLY',
        `Cannot write to internal snapshot ${options.snapshot}: it is read-only`,
      )
    }
    const image = await openImage(file, options)
    try {
      if (image.header.corrupt) {
        throw corrupt('found it marked as corrupt, expected it to be repaired before it is written to')
      }
      if (image.header.dirty) {
        throw corrupt('found its refcounts marked as stale (dirty), expected them to be repaired first')
      }
      if (typeof image.facts['snapshotsProblem'] === 'string') throw corrupt(image.facts['snapshotsProblem'])
      const table = await readRefcountTable(file, image.header, options.signal)
      return new Qcow2Writer({
        image,
        file: writable,
        data: image.data === file ? writable : asWritable(image.data),
        table,
        fillAbsent: options.fillAbsent,
      })
    } catch (error) {
      if (image.data !== file) await image.data[Symbol.asyncDispose]()
      throw error
    }
  }

  get size(): number {
    return this.#size
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    checkRange(this.#size, offset, into.length)
    const reading = this.#reader.read(offset, into, signal)
    this.#reads.add(reading)
    try {
      await reading
    } finally {
      this.#reads.delete(reading)
    }
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    checkExtentRange(this.#size, offset, length)
    return await this.#reader.extents(offset, offset + length, signal)
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#use(offset, bytes.length)
    if (bytes.length === 0) return throwIfAborted(signal)
    await this.#start(signal)
    const { clusterBytes } = this.#geometry
    const end = offset + bytes.length
    const step = Math.max(clusterBytes, BATCH_BYTES)
    for (let at = offset; at < end; ) {
      const to = Math.min(end, alignDown(at, clusterBytes) + step)
      const part = bytes.subarray(at - offset, to - offset)
      await this.#ranges.run(alignDown(at, clusterBytes), alignUp(to, clusterBytes), async () => {
        checkRange(this.#size, at, part.length)
        await this.#writeLocked(at, part, signal)
      })
      at = to
    }
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    this.#use(offset, length)
    throwIfAborted(signal)
    if (length === 0) return
    await this.#start(signal)
    await this.#zeroRange(offset, offset + length, signal)
  }

  /** Durable when it resolves: one checkpoint (see the head of this file). */
  async flush(signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    throwIfAborted(signal)
    await this.#mutex.run(() => this.#checkpoint())
  }

  /** See WritableImageLayer. A cluster that is allocated already, or does not shrink, is written plainly. */
  async writeCompressed(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    const { clusterBytes, hasDataFile } = this.#geometry
    this.#use(offset, bytes.length)
    if (
      offset % clusterBytes !== 0 ||
      (bytes.length !== clusterBytes &&
        !(bytes.length < clusterBytes && offset + bytes.length === this.#size))
    ) {
      throw new RangeError(`${offset}+${bytes.length} is not one cluster of ${clusterBytes} bytes`)
    }
    if (hasDataFile) return await this.write(offset, bytes, signal)
    throwIfAborted(signal)
    let cluster = bytes
    if (bytes.length < clusterBytes) {
      cluster = new Uint8Array(clusterBytes)
      cluster.set(bytes)
    }
    const packed = await compressCluster(this.header.compression, cluster)
    if (!packed) return await this.write(offset, bytes, signal)
    await this.#start(signal)
    const done = await this.#ranges.run(offset, offset + clusterBytes, () =>
      this.#writePacked(offset, packed, signal),
    )
    if (!done) await this.write(offset, bytes, signal)
  }

  /**
   * New virtual size in bytes (QEMU counts in sectors: of a last part below 512 bytes it sees nothing). What is
   * added reads as zeros, also over a larger backing file; what is cut off is given back.
   * @throws UNSUPPORTED with internal snapshots or dirty bitmaps, LIMIT when the L1 table would be too large
   */
  async resize(size: number, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    if (!Number.isSafeInteger(size) || size < 0) throw new RangeError(`size ${size} is not a size`)
    throwIfAborted(signal)
    if (this.snapshots.length > 0 || this.header.bitmaps) {
      throw new VarveError(
        'UNSUPPORTED',
        `Cannot resize qcow2 image: found ${this.header.bitmaps ? 'dirty bitmaps' : 'internal snapshots'}, expected none`,
      )
    }
    if (size === this.#size) return
    await this.#start(signal)
    await this.#ranges.run(0, Number.MAX_SAFE_INTEGER, async () => {
      if (size > this.#size) await this.#growDisk(size, signal)
      else if (size < this.#size) await this.#shrinkDisk(size, signal)
    })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#disposed) return
    this.#disposed = true
    try {
      await this.#mutex.run(async () => {
        if (this.#failed === undefined && this.#started) {
          await this.#checkpoint()
          if (isResizable(this.#file) && this.#file.size > this.#usedBytes) {
            await this.#file.resize(this.#usedBytes)
          }
        }
      })
    } finally {
      await disposeImage(this.#image)
    }
  }

  #use(offset: number, length: number): void {
    checkOpen(this.#disposed)
    checkRange(this.#size, offset, length)
    if (this.#failed !== undefined) throw this.#failed
  }

  // Writing --------------------------------------------------------------------------------------------------

  async #writeLocked(offset: number, bytes: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
    const end = offset + bytes.length
    const plans = await this.#mutex.run(() => this.#plan(offset, end, signal))
    try {
      const writes: { host: number; bytes: Uint8Array }[] = []
      for (const plan of plans) {
        const from = Math.max(plan.from, offset)
        const to = Math.min(plan.to, end)
        const given = bytes.subarray(from - offset, to - offset)
        if (plan.from === from && plan.to === to) {
          addWrite(writes, plan.host + (from - plan.guest), given)
          continue
        }
        const whole = new Uint8Array(plan.to - plan.from)
        await this.#readOld(plan.from, from, whole, signal)
        whole.set(given, from - plan.from)
        await this.#readOld(to, plan.to, whole.subarray(to - plan.from), signal)
        addWrite(writes, plan.host + (plan.from - plan.guest), whole)
      }
      await mapBounded(writes, PARALLEL_WRITES, (write) => this.#data.write(write.host, write.bytes, signal))
    } catch (error) {
      await this.#mutex.run(() => this.#takeBack(plans))
      throw error
    }
    await this.#mutex.run(() => this.#enter(plans))
  }

  /** Where each cluster of `[offset, end)` goes; allocates what is needed. Under the mutex. */
  async #plan(offset: number, end: number, signal: AbortSignal | undefined): Promise<ClusterPlan[]> {
    const { clusterBytes, extendedL2, hasDataFile, subclusterBytes } = this.#geometry
    // Checks every entry of the range, and loads the tables.
    await this.#map.runs(alignDown(offset, clusterBytes), end, MOST_EXTENTS_READ, signal)
    // A raw data file is as long as the disk: the last cluster is cut there. In the image clusters are whole.
    const most = hasDataFile ? this.#size : Number.POSITIVE_INFINITY
    const plans: ClusterPlan[] = []
    const lacking: Omit<ClusterPlan, 'host' | 'fresh'>[] = []
    for (let guest = alignDown(offset, clusterBytes); guest < end; guest += clusterBytes) {
      const from = Math.max(offset, guest)
      const to = Math.min(end, guest + clusterBytes)
      const entry = await this.#entry(guest)
      const kind = hostOf(entry, hasDataFile)
      if (kind.own) {
        // Ours alone: in place. What this write touches for the first time has to be made whole.
        if (extendedL2) {
          const touched = subclusterMask(from - guest, to - guest, subclusterBytes)
          const enter = (entry.stored & touched) !== touched
          plans.push({
            guest,
            host: kind.offset,
            fresh: false,
            from: enter ? alignDown(from, subclusterBytes) : from,
            to: enter ? Math.min(alignUp(to, subclusterBytes), most) : to,
            enter,
          })
        } else {
          const enter = (entry.lo & ZERO_LO) !== 0
          plans.push({
            guest,
            host: kind.offset,
            fresh: false,
            from: enter ? guest : from,
            to: enter ? Math.min(guest + clusterBytes, most) : to,
            enter,
          })
        }
        continue
      }
      // A new host cluster. Subclusters that were stored elsewhere have to come along.
      const part = extendedL2 && entry.stored === 0 && (entry.hi & COMPRESSED_HI) === 0
      const whole = {
        guest,
        from: part ? alignDown(from, subclusterBytes) : guest,
        to: Math.min(part ? alignUp(to, subclusterBytes) : guest + clusterBytes, most),
        enter: true,
      }
      if (hasDataFile) plans.push({ ...whole, host: guest, fresh: false })
      else lacking.push(whole)
    }
    if (hasDataFile) await this.#growData(Math.min(alignUp(end, clusterBytes), this.#size))
    try {
      await this.#checkFillable(offset, end, [...plans, ...lacking])
      for (let next = 0; next < lacking.length; ) {
        const run = await this.#refcounts.allocate(lacking.length - next)
        for (let i = 0; i < run.count; i++) {
          plans.push({ ...lacking[next++]!, host: (run.start + i) * clusterBytes, fresh: true })
        }
      }
      for (const index of this.#l1Indexes(offset, end)) await this.#ownL2(index)
    } catch (error) {
      await this.#takeBack(plans)
      throw error
    }
    return plans.sort((a, b) => a.guest - b.guest)
  }

  /** Refuses before anything is allocated when the backing file's bytes are needed and nobody gives them. */
  async #checkFillable(
    offset: number,
    end: number,
    plans: readonly Pick<ClusterPlan, 'from' | 'to'>[],
  ): Promise<void> {
    if (!this.backing || this.#fillAbsent) return
    for (const plan of plans) {
      for (const [from, to] of [
        [plan.from, Math.min(offset, plan.to)],
        [Math.max(end, plan.from), Math.min(plan.to, this.#size)],
      ] as const) {
        if (from >= to) continue
        const runs = await this.#map.runs(from, to, MOST_EXTENTS_READ)
        if (!runs.some((run) => run.kind === KIND.absent)) continue
        throw new VarveError(
          'UNSUPPORTED',
          `Cannot write part of the cluster at ${plan.from}: its rest is in the backing file, which a layer alone cannot read`,
          { fields: { offset: plan.from } },
        )
      }
    }
  }

  /** Fills `into` with what guest range `[from, to)` holds now, the backing file's bytes included. */
  async #readOld(from: number, to: number, into: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
    if (from >= to) return
    const part = into.subarray(0, to - from)
    const runs = await this.#map.runs(from, to, MOST_EXTENTS_READ, signal)
    await this.#reader.readRuns(runs, from, part, signal)
    if (!this.backing) return
    for (const run of runs) {
      const end = Math.min(run.offset + run.length, this.#size)
      if (run.kind !== KIND.absent || run.offset >= end) continue
      assert(this.#fillAbsent, 'somebody gives the bytes of the backing file')
      await this.#fillAbsent(run.offset, part.subarray(run.offset - from, end - from), signal)
    }
  }

  /** The plans' data is written: their entries may point there. Under the mutex. */
  async #enter(plans: readonly ClusterPlan[]): Promise<void> {
    const { extendedL2, subclusterBytes } = this.#geometry
    for (const plan of plans) {
      this.#reader.forget(plan.guest)
      if (!plan.enter) continue
      const entry = await this.#entry(plan.guest)
      const hi = (COPIED_HI | Math.floor(plan.host / 0x1_0000_0000)) >>> 0
      const lo = plan.host >>> 0
      if (plan.fresh) this.#freeOld(entry)
      if (extendedL2) {
        const written = subclusterMask(plan.from - plan.guest, plan.to - plan.guest, subclusterBytes)
        const kept = plan.fresh ? 0 : entry.stored
        const zeros = (entry.hi & COMPRESSED_HI) !== 0 ? 0 : entry.zeros
        await this.#setEntry(plan.guest, { hi, lo, stored: kept | written, zeros: zeros & ~written })
      } else await this.#setEntry(plan.guest, { hi, lo, zeros: 0, stored: 0 })
    }
    await this.#checkpointIfLarge()
  }

  /** A write failed before its entries were made: what it allocated is free again. Under the mutex. */
  async #takeBack(plans: readonly ClusterPlan[]): Promise<void> {
    for (const plan of plans) {
      if (plan.fresh) await this.#refcounts.release(plan.host / this.#geometry.clusterBytes)
    }
  }

  /** Host clusters that `entry` refers to are given back at the end of the next checkpoint. */
  #freeOld(entry: Entry): void {
    const { clusterBytes, hasDataFile } = this.#geometry
    if (hasDataFile) return
    let first: number
    let last: number
    if ((entry.hi & COMPRESSED_HI) !== 0) {
      const place = compressedPlace(entry.hi, entry.lo, this.#geometry)
      first = Math.floor(place.offset / clusterBytes)
      last = Math.floor((place.offset + place.length - 1) / clusterBytes)
    } else {
      const offset = entryOffset(entry.hi, entry.lo)
      if (offset === 0) return
      first = last = offset / clusterBytes
    }
    for (let cluster = first; cluster <= last; cluster++) this.#pendingFrees.push(cluster)
  }

  // Compressed -----------------------------------------------------------------------------------------------

  /** False when the cluster cannot be compressed in place: it is allocated, or no descriptor can say where. */
  async #writePacked(guest: number, packed: Uint8Array, signal: AbortSignal | undefined): Promise<boolean> {
    const place = await this.#mutex.run(async () => {
      await this.#map.runs(guest, guest + 1, 1, signal)
      const entry = await this.#entry(guest)
      if ((entry.hi & COMPRESSED_HI) !== 0 || entryOffset(entry.hi, entry.lo) !== 0) return undefined
      const offset = await this.#packInto(packed.length)
      if (offset === undefined) return undefined
      try {
        for (const index of this.#l1Indexes(guest, guest + 1)) await this.#ownL2(index)
      } catch (error) {
        await this.#releasePacked(offset, packed.length)
        throw error
      }
      return offset
    })
    if (place === undefined) return false
    try {
      await this.#file.write(place, packed, signal)
    } catch (error) {
      await this.#mutex.run(() => this.#releasePacked(place, packed.length))
      throw error
    }
    await this.#mutex.run(async () => {
      this.#reader.forget(guest)
      const { hi, lo } = compressedEntry({ offset: place, length: packed.length }, this.#geometry)
      await this.#setEntry(guest, { hi, lo, zeros: 0, stored: 0 })
      await this.#checkpointIfLarge()
    })
    return true
  }

  /** A place for `length` compressed bytes, counted; undefined when it lies too far for a descriptor. */
  async #packInto(length: number): Promise<number | undefined> {
    const { clusterBytes, compressedShift } = this.#geometry
    let offset: number | undefined
    if (this.#pack) {
      const { at, end } = this.#pack
      const shared = Math.floor(at / clusterBytes)
      const room = (await this.#refcounts.get(shared)) < this.#refcounts.most
      if (room && at + length <= end) {
        await this.#refcounts.add(shared)
        offset = at
      } else if (room) {
        // Goes on in the next cluster when that one is free; otherwise the rest of this one stays unused.
        const run = await this.#refcounts.allocate(1)
        const start = run.start * clusterBytes
        if (start === end) {
          await this.#refcounts.add(shared)
          offset = at
          this.#pack = { at, end: start + clusterBytes }
        } else {
          offset = start
          this.#pack = { at: start, end: start + clusterBytes }
        }
      }
    }
    if (offset === undefined) {
      const run = await this.#refcounts.allocate(1)
      offset = run.start * clusterBytes
      this.#pack = { at: offset, end: offset + clusterBytes }
    }
    const next = offset + length
    this.#pack = next < this.#pack!.end ? { at: next, end: this.#pack!.end } : undefined
    if (next > Math.min(2 ** compressedShift, 2 ** 56)) {
      await this.#releasePacked(offset, length)
      return undefined
    }
    return offset
  }

  async #releasePacked(offset: number, length: number): Promise<void> {
    const { clusterBytes } = this.#geometry
    const last = Math.floor((offset + length - 1) / clusterBytes)
    for (let cluster = Math.floor(offset / clusterBytes); cluster <= last; cluster++) {
      await this.#release(cluster)
    }
  }

  /** One reference less; a cluster that is free must not be packed into any more. */
  async #release(cluster: number): Promise<number> {
    const left = await this.#refcounts.release(cluster)
    if (left === 0 && this.#pack && Math.floor(this.#pack.at / this.#geometry.clusterBytes) === cluster) {
      this.#pack = undefined
    }
    return left
  }

  // Zeros ----------------------------------------------------------------------------------------------------

  async #zeroRange(offset: number, end: number, signal: AbortSignal | undefined): Promise<void> {
    const { clusterBytes, l2Span, subclusterBytes } = this.#geometry
    // The rest of the last cluster, behind the disk's end, may go with it.
    const stop = end === this.#size ? alignUp(end, subclusterBytes) : end
    const first = alignUp(offset, subclusterBytes)
    const last = alignDown(stop, subclusterBytes)
    if (first >= last) return await this.#writeZeros(offset, end, signal)
    await this.#writeZeros(offset, first, signal)
    await this.#writeZeros(last, end, signal)
    for (let at = first; at < last; ) {
      throwIfAborted(signal)
      const to = Math.min(last, alignDown(at, l2Span) + l2Span)
      const left = await this.#ranges.run(alignDown(at, clusterBytes), alignUp(to, clusterBytes), () =>
        this.#mutex.run(async () => {
          const rest = await this.#zeroEntries(at, to, signal)
          await this.#checkpointIfLarge()
          return rest
        }),
      )
      // What has no zero flag: version 2 over a backing file, subclusters of a compressed cluster.
      for (const [start, stop] of left) await this.#writeZeros(start, Math.min(stop, this.#size), signal)
      if (this.#geometry.hasDataFile) await this.#zeroData(at, Math.min(to, end), signal)
      at = to
    }
  }

  /** Sets the entries of `[at, to)`, inside one L2 table, to zero; returns what has to be written instead. */
  async #zeroEntries(
    at: number,
    to: number,
    signal: AbortSignal | undefined,
  ): Promise<[start: number, stop: number][]> {
    const { clusterBytes, extendedL2, hasDataFile, l2Span, subclusterBytes, version } = this.#geometry
    const left: [number, number][] = []
    const index = Math.floor(at / l2Span)
    const keepsAbsent = !this.backing
    if (this.#map.l2Offset(index) === 0) {
      if (keepsAbsent) return left
      if (version === 2) return [[at, to]]
    }
    await this.#map.runs(at, to, MOST_EXTENTS_READ, signal)
    if (version === 3 || keepsAbsent) await this.#ownL2(index)
    const table = await this.#table(at)
    assert(table, 'the L2 table has been made')
    for (let guest = alignDown(at, clusterBytes); guest < to; guest += clusterBytes) {
      const from = Math.max(at, guest)
      const stop = Math.min(to, guest + clusterBytes)
      const entry = this.#entryIn(table, guest)
      const { hi, lo } = entry
      const isPacked = (hi & COMPRESSED_HI) !== 0
      const isAllocated = isPacked || hostOf(entry, hasDataFile).allocated
      if (!isAllocated && (extendedL2 ? entry.zeros === 0 : (lo & ZERO_LO) === 0) && keepsAbsent) continue
      if (version === 2) {
        if (!isAllocated && keepsAbsent) continue
        if (keepsAbsent) {
          this.#reader.forget(guest)
          this.#freeOld(entry)
          this.#setEntryIn(table, guest, NO_ENTRY)
        } else left.push([from, stop])
        continue
      }
      const whole = stop - from === clusterBytes
      if (!whole && isPacked) {
        left.push([from, stop])
        continue
      }
      this.#reader.forget(guest)
      if (!extendedL2) {
        if (!hasDataFile) this.#freeOld(entry)
        this.#setEntryIn(table, guest, {
          ...NO_ENTRY,
          ...(hasDataFile ? { hi, lo: (lo | ZERO_LO) >>> 0 } : { lo: ZERO_LO }),
        })
        continue
      }
      const mask = subclusterMask(from - guest, stop - guest, subclusterBytes)
      const stored = isPacked ? 0 : (entry.stored & ~mask) >>> 0
      const zeros = isPacked ? 0xffff_ffff : (entry.zeros | mask) >>> 0
      if (stored !== 0 || hasDataFile) this.#setEntryIn(table, guest, { hi, lo, stored, zeros })
      else {
        this.#freeOld(entry)
        this.#setEntryIn(table, guest, { hi: 0, lo: 0, stored: 0, zeros })
      }
    }
    return left
  }

  /** Zeros in `[from, to)` where there is anything else. */
  async #writeZeros(from: number, to: number, signal: AbortSignal | undefined): Promise<void> {
    const { clusterBytes } = this.#geometry
    for (let at = from; at < to; ) {
      const stop = Math.min(to, alignDown(at, clusterBytes) + clusterBytes)
      const part = { from: at, stop }
      await this.#ranges.run(alignDown(at, clusterBytes), alignUp(stop, clusterBytes), async () => {
        const runs = await this.#mutex.run(() =>
          this.#map.runs(part.from, part.stop, MOST_EXTENTS_READ, signal),
        )
        const isZero = runs.every(
          (run) => run.kind === KIND.zero || (run.kind === KIND.absent && !this.backing),
        )
        if (!isZero) await this.#writeLocked(part.from, new Uint8Array(part.stop - part.from), signal)
      })
      at = stop
    }
  }

  async #zeroData(from: number, to: number, signal: AbortSignal | undefined): Promise<void> {
    const stop = Math.min(to, this.#data.size)
    if (from < stop) await this.#data.zero(from, stop - from, signal)
  }

  // Size -----------------------------------------------------------------------------------------------------

  async #growDisk(target: number, signal: AbortSignal | undefined): Promise<void> {
    const { clusterBytes, hasDataFile, l2Span } = this.#geometry
    const former = this.#size
    const entries = Math.ceil(target / l2Span)
    if (entries * 8 > MAX_L1_BYTES) {
      throw new VarveError(
        'LIMIT',
        `Cannot resize qcow2 image to ${target} bytes: found clusters of ${clusterBytes}, expected larger ones`,
        { fields: { size: target } },
      )
    }
    // Bytes of the last cluster behind the former end were nobody's; now they are the disk's.
    const inLast = Math.min(target, alignUp(former, clusterBytes))
    await this.#mutex.run(async () => {
      if (entries > this.#map.l1Size) await this.#growL1(entries)
    })
    this.#size = target
    try {
      if (hasDataFile) await this.#mutex.run(() => this.#growData(target))
      await this.#zeroTail(former, inLast, signal)
      if (this.backing && inLast < target) await this.#zeroLocked(inLast, target, signal)
      await this.#mutex.run(async () => {
        await this.#checkpoint()
        await this.#writeSize(target)
      })
    } catch (error) {
      this.#size = former
      throw error
    }
  }

  async #shrinkDisk(target: number, signal: AbortSignal | undefined): Promise<void> {
    const { clusterBytes, hasDataFile, l2Span } = this.#geometry
    const former = this.#size
    const last = alignUp(former, clusterBytes)
    this.#size = target
    await this.#mutex.run(async () => {
      // The size first: a disk that is shorter than its tables is sound, the reverse is not.
      await this.#checkpoint()
      await this.#writeSize(target)
      for (let at = alignUp(target, clusterBytes); at < last; ) {
        throwIfAborted(signal)
        const to = Math.min(last, alignDown(at, l2Span) + l2Span)
        await this.#dropEntries(at, to)
        await this.#checkpointIfLarge()
        at = to
      }
      await this.#checkpoint()
    })
    if (hasDataFile && isResizable(this.#data)) await this.#data.resize(target)
  }

  /** Gives back every cluster of `[at, to)`, inside one L2 table, and the table itself when all of it goes. */
  async #dropEntries(at: number, to: number): Promise<void> {
    const { clusterBytes, l2Span } = this.#geometry
    const index = Math.floor(at / l2Span)
    const offset = this.#map.l2Offset(index)
    if (offset === 0) return
    await this.#ownL2(index)
    const table = await this.#table(at)
    assert(table, 'the L2 table is there')
    for (let guest = at; guest < to; guest += clusterBytes) {
      const entry = this.#entryIn(table, guest)
      this.#reader.forget(guest)
      this.#freeOld(entry)
      this.#setEntryIn(table, guest, NO_ENTRY)
    }
    if (at % l2Span === 0) {
      this.#pendingFrees.push(this.#map.l2Offset(index) / clusterBytes)
      this.#setL1(index, 0)
    }
  }

  /** Bytes `[from, to)` of the disk's former last cluster become zeros where they are stored. */
  async #zeroTail(from: number, to: number, signal: AbortSignal | undefined): Promise<void> {
    if (from < to) await this.#zeroLocked(from, to, signal)
  }

  /** As `zero`, for a caller that holds the range lock of the whole disk already. */
  async #zeroLocked(from: number, to: number, signal: AbortSignal | undefined): Promise<void> {
    const { clusterBytes, l2Span, subclusterBytes } = this.#geometry
    const pieces: [number, number][] = []
    const first = Math.min(to, alignUp(from, subclusterBytes))
    const last = to === this.#size ? alignUp(to, subclusterBytes) : alignDown(to, subclusterBytes)
    if (from < first) pieces.push([from, first])
    const stopAt = first < to ? last : first
    for (let at = first; at < stopAt; ) {
      const stop = Math.min(stopAt, alignDown(at, l2Span) + l2Span)
      const left = await this.#mutex.run(async () => {
        const rest = await this.#zeroEntries(at, stop, signal)
        await this.#checkpointIfLarge()
        return rest
      })
      pieces.push(...left)
      at = stop
    }
    if (Math.max(last, first) < to) pieces.push([Math.max(last, first), to])
    for (const [start, end] of pieces) {
      const stop = Math.min(end, this.#size)
      for (let at = start; at < stop; at = alignDown(at, clusterBytes) + clusterBytes) {
        const length = Math.min(stop, alignDown(at, clusterBytes) + clusterBytes) - at
        const runs = await this.#map.runs(at, at + length, MOST_EXTENTS_READ, signal)
        if (runs.some((run) => run.kind !== KIND.zero && (run.kind !== KIND.absent || this.backing))) {
          await this.#writeLocked(at, new Uint8Array(length), signal)
        }
      }
    }
    if (this.#geometry.hasDataFile) await this.#zeroData(from, to, signal)
  }

  /** A longer L1 table elsewhere: written whole, flushed, then the header points to it in one sector. */
  async #growL1(entries: number): Promise<void> {
    const { clusterBytes } = this.#geometry
    await this.#checkpoint()
    const run = await this.#refcounts.allocateContiguous(Math.ceil((entries * 8) / clusterBytes))
    await this.#checkpoint()
    const bytes = new Uint8Array(run.count * clusterBytes)
    const old = this.#map.l1
    bytes.set(new Uint8Array(old.buffer, old.byteOffset, old.byteLength))
    const offset = run.start * clusterBytes
    await this.#file.write(offset, bytes)
    await this.#barrier(this.#file)
    const header = new DataView(new ArrayBuffer(12))
    header.setUint32(0, entries)
    header.setBigUint64(4, BigInt(offset))
    await this.#file.write(AT.l1Size, new Uint8Array(header.buffer))
    await this.#barrier(this.#file)
    const oldClusters = Math.ceil(old.byteLength / clusterBytes)
    for (let i = 0; i < oldClusters; i++) this.#pendingFrees.push(this.#l1Offset / clusterBytes + i)
    this.#l1Offset = offset
    this.#map.replaceL1(bytes.subarray(0, entries * 8))
    this.#updateReserved()
  }

  async #writeSize(size: number): Promise<void> {
    const field = new DataView(new ArrayBuffer(8))
    field.setBigUint64(0, BigInt(size))
    await this.#file.write(AT.size, new Uint8Array(field.buffer))
    await this.#barrier(this.#file)
  }

  // Tables ---------------------------------------------------------------------------------------------------

  #l1Indexes(offset: number, end: number): number[] {
    const { l2Span } = this.#geometry
    const first = Math.floor(offset / l2Span)
    const last = Math.floor((end - 1) / l2Span)
    return Array.from({ length: last - first + 1 }, (_, i) => first + i)
  }

  /** Makes the L2 table of L1 entry `index` ours alone: new, or a copy when a snapshot shares it. */
  async #ownL2(index: number): Promise<void> {
    const { clusterBytes } = this.#geometry
    const offset = this.#map.l2Offset(index)
    if (offset !== 0 && (this.#map.l1.getUint32(index * 8) & COPIED_HI) !== 0) return
    const shared = offset === 0 ? undefined : await this.#map.tables.get(offset)
    const run = await this.#refcounts.allocate(1)
    const table = this.#map.tables.add(run.start * clusterBytes)
    this.#l2Clusters.add(run.start)
    if (shared) {
      table.bytes.set(shared.bytes)
      this.#pendingFrees.push(offset / clusterBytes)
    }
    this.#setL1(index, run.start * clusterBytes)
  }

  #setL1(index: number, offset: number): void {
    const hi = Math.floor(offset / 0x1_0000_0000)
    this.#map.l1.setUint32(index * 8, offset === 0 ? 0 : (COPIED_HI | hi) >>> 0)
    this.#map.l1.setUint32(index * 8 + 4, offset >>> 0)
    this.#dirtyL1.add(Math.floor((index * 8) / 512))
  }

  async #entry(guest: number): Promise<Entry> {
    const table = await this.#table(guest)
    return table ? this.#entryIn(table, guest) : NO_ENTRY
  }

  async #setEntry(guest: number, entry: Entry): Promise<void> {
    const table = await this.#table(guest)
    assert(table, 'the L2 table has been made')
    this.#setEntryIn(table, guest, entry)
  }

  #entryIn(table: Table, guest: number): Entry {
    const { view } = table
    const at = this.#entryAt(guest)
    return this.#geometry.extendedL2
      ? {
          hi: view.getUint32(at),
          lo: view.getUint32(at + 4),
          zeros: view.getUint32(at + 8),
          stored: view.getUint32(at + 12),
        }
      : { hi: view.getUint32(at), lo: view.getUint32(at + 4), zeros: 0, stored: 0 }
  }

  #setEntryIn(table: Table, guest: number, entry: Entry): void {
    const { view } = table
    const at = this.#entryAt(guest)
    view.setUint32(at, entry.hi)
    view.setUint32(at + 4, entry.lo)
    if (this.#geometry.extendedL2) {
      view.setUint32(at + 8, entry.zeros)
      view.setUint32(at + 12, entry.stored)
    }
    this.#map.tables.markDirty(table)
  }

  /** Place of a guest cluster's entry in its L2 table, in bytes. */
  #entryAt(guest: number): number {
    const { clusterBytes, l2EntryBytes, l2Span } = this.#geometry
    return ((guest % l2Span) / clusterBytes) * l2EntryBytes
  }

  async #table(guest: number): Promise<Table | undefined> {
    const offset = this.#map.l2Offset(Math.floor(guest / this.#geometry.l2Span))
    if (offset === 0) return undefined
    return this.#map.tables.peek(offset) ?? (await this.#map.tables.get(offset))
  }

  // Checkpoint -----------------------------------------------------------------------------------------------

  async #checkpointIfLarge(): Promise<void> {
    const dirty = this.#map.tables.dirtyBytes + this.#refcounts.dirtyBytes + this.#pendingFrees.length * 8
    if (dirty > MOST_DIRTY_BYTES) await this.#checkpoint()
  }

  /**
   * Steps 2 to 5 of the head of this file. A write that fails leaves its table in memory, to be tried again. A
   * flush that fails is final: what the device below lost then, nobody knows.
   */
  async #checkpoint(): Promise<void> {
    if (this.#failed !== undefined) throw this.#failed
    await this.#writeRefcounts()
    if (this.#data !== this.#file) await this.#barrier(this.#data)
    await this.#barrier(this.#file)
    if (this.#map.tables.dirtyBytes > 0) {
      await writeTables(this.#file, this.#map.tables)
      await this.#barrier(this.#file)
    }
    if (this.#dirtyL1.size > 0) {
      await this.#writeL1()
      await this.#barrier(this.#file)
    }
    for (const run of this.#refcounts.replaced.splice(0)) {
      for (let i = 0; i < run.count; i++) this.#pendingFrees.push(run.start + i)
    }
    if (this.#pendingFrees.length === 0) return
    await Promise.allSettled(this.#reads)
    await this.#applyFrees()
    await this.#writeRefcounts()
    this.#updateReserved()
  }

  async #barrier(device: WritableBlockDevice): Promise<void> {
    try {
      await device.flush()
    } catch (error) {
      this.#failed = error
      throw error
    }
  }

  async #writeRefcounts(): Promise<void> {
    await this.#refcounts.writeBlocks()
    if (!this.#refcounts.tableDirty) return
    await this.#barrier(this.#file)
    await this.#refcounts.writeTable()
  }

  async #applyFrees(): Promise<void> {
    const { clusterBytes } = this.#geometry
    // The lowest at the end, taken one by one: a failure costs one cluster and leaves the rest in the list.
    this.#pendingFrees.sort((a, b) => b - a)
    let run: ClusterRun | undefined
    const freed: ClusterRun[] = []
    for (
      let cluster = this.#pendingFrees.at(-1);
      cluster !== undefined;
      cluster = this.#pendingFrees.at(-1)
    ) {
      this.#pendingFrees.pop()
      if ((await this.#release(cluster)) > 0) continue
      this.#l2Clusters.delete(cluster)
      this.#map.tables.drop(cluster * clusterBytes)
      if (run && run.start + run.count === cluster) run = { start: run.start, count: run.count + 1 }
      else {
        if (run) freed.push(run)
        run = { start: cluster, count: 1 }
      }
    }
    if (run) freed.push(run)
    // Gives the space back to a host that has holes; nothing refers to it any more.
    if (!this.#file.features.sparse) return
    for (const { start, count } of freed) {
      const end = Math.min((start + count) * clusterBytes, this.#file.size)
      if (start * clusterBytes < end) await this.#file.zero(start * clusterBytes, end - start * clusterBytes)
    }
  }

  async #writeL1(): Promise<void> {
    const { l1 } = this.#map
    for (const sector of [...this.#dirtyL1].sort((a, b) => a - b)) {
      const length = Math.min(512, l1.byteLength - sector * 512)
      const bytes = new Uint8Array(l1.buffer, l1.byteOffset + sector * 512, length)
      await this.#file.write(this.#l1Offset + sector * 512, bytes)
      this.#dirtyL1.delete(sector)
    }
  }

  #updateReserved(): void {
    this.#map.reserved = reservedParts({
      ...this.header,
      l1TableOffset: this.#l1Offset,
      l1Size: this.#map.l1Size,
      refcountTableOffset: this.#refcounts.tableOffset,
      refcountTableClusters: this.#refcounts.tableClusters,
    })
  }

  // The file -------------------------------------------------------------------------------------------------

  async #growFile(bytes: number): Promise<void> {
    if (bytes > this.#file.size) {
      if (!isResizable(this.#file)) {
        throw new VarveError(
          'NO_SPACE',
          `Cannot grow qcow2 image: found a device of ${this.#file.size} bytes, expected ${bytes}`,
          { fields: { size: this.#file.size, needed: bytes } },
        )
      }
      await this.#file.resize(Math.max(bytes, alignUp(bytes, GROW_BYTES)))
    }
    this.#usedBytes = Math.max(this.#usedBytes, bytes)
  }

  #holds(cluster: number): string | undefined {
    if (this.#l2Clusters.has(cluster)) return 'an L2 table'
    const start = cluster * this.#geometry.clusterBytes
    const end = start + this.#geometry.clusterBytes
    return this.#map.reserved.find((part) => start < part.end && part.start < end)?.what
  }

  async #growData(bytes: number): Promise<void> {
    if (bytes <= this.#data.size) return
    if (!isResizable(this.#data)) {
      throw new VarveError(
        'NO_SPACE',
        `Cannot grow external data file: found a device of ${this.#data.size} bytes, expected ${bytes}`,
      )
    }
    await this.#data.resize(bytes)
  }

  /**
   * Before the first change: dirty bitmaps that should record it are marked as not in step (in_use), for we do
   * not keep them; autoclear bits that we do not know are cleared. Both are durable before any guest data is.
   */
  #start(signal: AbortSignal | undefined): Promise<void> {
    throwIfAborted(signal)
    this.#started ??= this.#markStarted().catch((error: unknown) => {
      this.#started = undefined
      throw error
    })
    return this.#started
  }

  async #markStarted(): Promise<void> {
    const { header } = this
    if (header.version === 2) return
    let keep = header.autoclear & (AUTOCLEAR.bitmaps | AUTOCLEAR.rawExternalData)
    if (!header.hasDataFile) keep &= ~AUTOCLEAR.rawExternalData
    if ((header.autoclear & AUTOCLEAR.bitmaps) !== 0n && !(await this.#markBitmaps()))
      keep &= ~AUTOCLEAR.bitmaps
    if (keep !== header.autoclear) {
      const field = new DataView(new ArrayBuffer(8))
      field.setBigUint64(0, keep)
      await this.#file.write(AT.autoclear, new Uint8Array(field.buffer))
    }
    await this.#file.flush()
  }

  /** Sets in_use in every bitmap that records (auto). False when the directory cannot be read. */
  async #markBitmaps(): Promise<boolean> {
    let entries: Awaited<ReturnType<typeof readBitmapDirectory>>
    try {
      entries = await readBitmapDirectory(this.#file, this.header)
    } catch (error) {
      if (error instanceof VarveError && (error.code === 'CORRUPT' || error.code === 'LIMIT')) return false
      throw error
    }
    if (!entries || !this.header.bitmaps) return false
    for (const entry of entries) {
      if ((entry.flags & BITMAP_FLAG.auto) === 0 || (entry.flags & BITMAP_FLAG.inUse) !== 0) continue
      const flags = new DataView(new ArrayBuffer(4))
      flags.setUint32(0, (entry.flags | BITMAP_FLAG.inUse) >>> 0)
      await this.#file.write(
        this.header.bitmaps.directoryOffset + entry.at + 12,
        new Uint8Array(flags.buffer),
      )
    }
    return true
  }
}

/** The host cluster of a standard entry: is there one, and is it ours alone? */
function hostOf(
  entry: Entry,
  hasDataFile: boolean,
): { readonly allocated: boolean; readonly own: boolean; readonly offset: number } {
  if ((entry.hi & COMPRESSED_HI) !== 0) return { allocated: false, own: false, offset: 0 }
  const offset = entryOffset(entry.hi, entry.lo)
  const copied = (entry.hi & COPIED_HI) !== 0
  const allocated = offset !== 0 || (hasDataFile && copied)
  return { allocated, own: allocated && (copied || hasDataFile), offset }
}

/** Bits of the subclusters that `[from, to)`, in bytes of one cluster, touches. */
function subclusterMask(from: number, to: number, subclusterBytes: number): number {
  const first = Math.floor(from / subclusterBytes)
  const last = Math.floor((to - 1) / subclusterBytes)
  return ((0xffff_ffff << first) & (0xffff_ffff >>> (31 - last))) >>> 0
}

/** Adds a write, joined with the one before where the buffers and the places both go on. */
function addWrite(writes: { host: number; bytes: Uint8Array }[], host: number, bytes: Uint8Array): void {
  const last = writes.at(-1)
  if (
    last &&
    last.host + last.bytes.length === host &&
    last.bytes.buffer === bytes.buffer &&
    last.bytes.byteOffset + last.bytes.length === bytes.byteOffset
  ) {
    last.bytes = new Uint8Array(bytes.buffer, last.bytes.byteOffset, last.bytes.length + bytes.length)
    return
  }
  writes.push({ host, bytes })
}
