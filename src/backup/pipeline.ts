/**
 * A backup, from a frozen disk to a durable point. The main thread plans and decides, worker threads read, hash,
 * compress, seal and write (engine.ts).
 *
 *   plan page by page -> batches of chunks -> [worker] read, zero what is unused, hash
 *     -> decide: parent's map at the same place, chunks of this run, index -> [worker] store what is new
 *     -> entries -> map pages -> metadata packs -> manifest
 *
 * Write order (docs/formats/repository.md): data packs durable, then metadata packs, then the manifest. Before the
 * manifest nothing refers to what was written; the index may learn of a pack as soon as the pack is durable.
 *
 * Rules:
 * - What is in use is read, or carried over from the parent only where nothing changed and all of it was kept then.
 * - A reused chunk or page stands in a pack whose trailer vouches for it (known-packs.ts).
 * - Memory is bounded by the batches under way, whatever the size of the disk.
 */
import { type Log, type ProgressListener, silentLog, throwIfAborted, VarveError } from '../base/index.ts'
import { allExtents } from '../device/index.ts'
import { type Extent, RangeSet, RangeSetBuilder } from '../extents/index.ts'
import type { ChunkIndex } from './chunk-index.ts'
import type { BackupOptions, BackupResult, BackupSource, RepositorySettings } from './contract.ts'
import { crashPoint } from './crash-points.ts'
import type { DurablePack } from './engine.ts'
import { equalBytes, type RepositoryKeys } from './keys.ts'
import { idKey, KnownPacks } from './known-packs.ts'
import { type ChunkEntry, encodePage, ID_BYTES, type MapPage, type PageReference, SECTOR } from './layout.ts'
import { type Manifest, type ManifestFacts, readManifest, writeManifest } from './manifest.ts'
import { checkDiskName, manifestPath, pointOf } from './names.ts'
import { PackWriter } from './pack-writer.ts'
import { entriesOfPage, readPage } from './pages.ts'
import { manifestPaths } from './points.ts'
import type { Lane, WorkerPool } from './pool.ts'
import type { BlobStore } from './store/blob-store.ts'
import { newUlid } from './ulid.ts'

/** Content of a batch, and batches that a worker has at a time: one being read, one hashed, one stored. */
const BATCH_BYTES = 4_194_304
const BATCHES_PER_WORKER = 3
/** One worker more for so much to read: a small backup makes one small pack and not several. */
const BYTES_PER_WORKER = 33_554_432
/** Gaps between ranges in use are read through when that adds less than this part of what is in use … */
const READ_THROUGH_PART = 0.03
/** … the largest of these that fits. */
const GAPS = [131_072, 65_536, 32_768, 16_384, 8192, 4096]

export interface BackupTools {
  readonly store: BlobStore
  readonly keys: RepositoryKeys
  readonly settings: RepositorySettings
  readonly pool: WorkerPool
  readonly index: ChunkIndex
}

export async function runBackup(
  tools: BackupTools,
  source: BackupSource,
  options: BackupOptions,
): Promise<BackupResult> {
  checkDiskName(source.disk)
  const run = new BackupRun(tools, source, options)
  tools.pool.onPack = (pack) => run.onPack(pack)
  try {
    return await run.run()
  } catch (error) {
    await run.abandon()
    throw error
  } finally {
    tools.pool.onPack = () => {}
  }
}

/** A map page whose entries arrive in any order. */
interface PageBuild {
  readonly page: number
  readonly entries: (ChunkEntry | undefined)[]
  readonly inUse: RangeSet
  readonly parent: MapPage | undefined
  /** Entries that are not there yet, and one more while the page is being planned. */
  missing: number
}

interface PlannedChunk {
  readonly build: PageBuild
  readonly index: number
  readonly inUseBytes: number
}

/** A chunk that this batch stores; others with the same id wait for it. */
interface OwnChunk {
  readonly chunk: PlannedChunk
  readonly id: Uint8Array
  readonly resolve: (entry: ChunkEntry) => void
  readonly reject: (error: unknown) => void
}

interface PlannedBatch {
  readonly chunks: PlannedChunk[]
  /** As in `Batch`. */
  readonly reads: number[]
  readonly zeros: number[]
  /** What the main thread reads through the device: place in the buffer, length, offset on the disk. */
  readonly deviceReads: number[]
}

class BackupRun {
  readonly #tools: BackupTools
  readonly #source: BackupSource
  readonly #signal: AbortSignal | undefined
  readonly #progress: ProgressListener
  readonly #log: Log
  readonly #size: number
  /** What is kept, in whole sectors; may end a part of a sector past the disk. */
  readonly #used: RangeSet
  readonly #usedBytes: number
  readonly #chunkBytes: number
  readonly #pageBytes: number
  readonly #batchChunks: number
  readonly #workers: number
  /** `#used` with small gaps read through. */
  readonly #joined: RangeSet
  readonly #known: KnownPacks

  #parent: Manifest | undefined
  #changed: RangeSet | undefined
  readonly #pages: (PageReference | undefined)[]
  readonly #ownPages = new Map<string, PageReference>()
  #metadata: PackWriter | undefined
  readonly #metadataDone: PackWriter[] = []
  readonly #metadataPacks = new Map<PackWriter, number>()
  #building: Promise<void> = Promise.resolve()
  /** Chunks that are stored in this run and not yet in the index. */
  readonly #pending = new Map<string, Promise<ChunkEntry>>()
  readonly #underWay = new Set<Promise<void>>()
  readonly #spare: ArrayBuffer[] = []
  /** Batches under way on each worker. */
  readonly #loads: number[]
  #failure: { error: unknown } | undefined
  #batches = 0

  #readBytes = 0
  #changedBytes = 0
  #storedBytes = 0
  #newChunks = 0
  #reusedChunks = 0
  #doneBytes = 0

  constructor(tools: BackupTools, source: BackupSource, options: BackupOptions) {
    const { settings } = tools
    this.#tools = tools
    this.#source = source
    this.#signal = options.signal
    this.#progress = options.progress ?? (() => {})
    this.#log = options.log ?? silentLog
    this.#size = source.device.size
    this.#used = source.inUse.clip(0, this.#size).coarsen(SECTOR)
    this.#usedBytes = this.#used.clip(0, this.#size).size
    this.#chunkBytes = settings.chunkBytes
    this.#pageBytes = settings.chunkBytes * settings.pageEntries
    this.#batchChunks = Math.max(1, Math.floor(BATCH_BYTES / settings.chunkBytes))
    const toRead = source.changed ? source.changed.ranges.intersect(this.#used).size : this.#usedBytes
    this.#workers = Math.min(tools.pool.size, Math.ceil(toRead / BYTES_PER_WORKER) || 1)
    this.#loads = Array.from({ length: this.#workers }, () => 0)
    this.#joined = joinSmallGaps(this.#used)
    this.#known = new KnownPacks(tools.store, tools.keys)
    this.#pages = Array.from({ length: Math.ceil(this.#size / this.#pageBytes) }, () => undefined)
  }

  async run(): Promise<BackupResult> {
    const started = performance.now()
    throwIfAborted(this.#signal)
    const { store, keys, pool } = this.#tools
    const previous = (await manifestPaths(store, keys, this.#source.disk)).map(pointOf)
    await this.#chooseParent(previous)
    for (let i = 0; i < this.#workers; i++) pool.lane(i)
    this.#report()

    let batch = emptyBatch()
    for (let page = 0; page < this.#pages.length; page++) {
      batch = await this.#planPage(page, batch)
    }
    if (batch.chunks.length > 0) await this.#dispatch(batch)
    while (this.#underWay.size > 0) await Promise.race(this.#underWay)
    this.#throwIfFailed()
    this.#report()

    await pool.everywhere('flush')
    crashPoint('data-durable')
    await this.#building
    this.#throwIfFailed()
    await this.#finishMetadata()
    for (const pack of this.#metadataDone) {
      await pack.publish()
      const bytes = this.#metadataPacks.get(pack) ?? 0
      this.#storedBytes += bytes
      this.#tools.index.add(
        pack,
        pack.objects.map((object) => object.id),
      )
    }
    crashPoint('metadata-durable')

    throwIfAborted(this.#signal)
    const point = newUlid(Date.now(), previous.at(-1))
    const facts = this.#facts(point, (performance.now() - started) / 1000)
    const manifestBytes = await writeManifest(
      store,
      keys,
      manifestPath(keys, this.#source.disk, point),
      facts,
      this.#pages,
    )
    crashPoint('manifest-durable')
    return {
      disk: facts.disk,
      point,
      virtualSize: facts.virtualSize,
      inUseBytes: facts.inUseBytes,
      readBytes: facts.readBytes,
      changedBytes: facts.changedBytes,
      storedBytes: this.#storedBytes + manifestBytes,
      newChunks: facts.newChunks,
      reusedChunks: facts.reusedChunks,
      seconds: (performance.now() - started) / 1000,
    }
  }

  onPack(pack: DurablePack): void {
    const ids: Uint8Array[] = []
    for (let at = 0; at < pack.ids.length; at += ID_BYTES) ids.push(pack.ids.subarray(at, at + ID_BYTES))
    try {
      this.#tools.index.add(pack, ids)
    } catch (error) {
      this.#failure ??= { error }
    }
    crashPoint('pack-indexed')
    for (const id of ids) this.#pending.delete(idKey(id))
    this.#storedBytes += pack.bytes
  }

  /** Ends everything that is under way and drops what is not durable. Packs that are stay: the next run reuses them. */
  async abandon(): Promise<void> {
    this.#failure ??= { error: new VarveError('CANCELLED', 'Cannot go on: interrupted') }
    while (this.#underWay.size > 0) await Promise.race(this.#underWay)
    await this.#building
    const drops = [this.#metadata, ...this.#metadataDone].filter((pack) => pack !== undefined)
    await Promise.allSettled([this.#tools.pool.everywhere('abort'), ...drops.map((pack) => pack.discard())])
  }

  #facts(point: string, seconds: number): ManifestFacts {
    return {
      disk: this.#source.disk,
      point,
      created: new Date().toISOString(),
      virtualSize: this.#size,
      blockBytes: this.#source.device.blockSize,
      chunkBytes: this.#chunkBytes,
      pageEntries: this.#tools.settings.pageEntries,
      inUseBytes: this.#usedBytes,
      readBytes: this.#readBytes,
      changedBytes: this.#changedBytes,
      storedBytes: this.#storedBytes,
      newChunks: this.#newChunks,
      reusedChunks: this.#reusedChunks,
      seconds: Math.round(seconds * 1000) / 1000,
      parent: this.#parent?.facts.point ?? null,
      regions: this.#source.regions ?? null,
      about: this.#source.about ?? null,
    }
  }

  // -------------------------------------------------------------- parent

  /** The latest point that can be read; for a changed set, the point that it names. */
  async #chooseParent(points: readonly string[]): Promise<void> {
    const { changed, disk } = this.#source
    if (changed) {
      this.#parent = points.includes(changed.parent) ? await this.#tryManifest(changed.parent) : undefined
      if (this.#parent) {
        this.#changed = changed.ranges
        return
      }
      this.#log('warn', 'The point that the changes refer to is not there: all that is in use is read.', {
        disk,
        point: changed.parent,
      })
    }
    for (const point of points.toReversed()) {
      this.#parent = await this.#tryManifest(point)
      if (this.#parent) return
    }
  }

  async #tryManifest(point: string): Promise<Manifest | undefined> {
    const { store, keys, settings } = this.#tools
    try {
      const manifest = await readManifest(store, keys, manifestPath(keys, this.#source.disk, point))
      const { chunkBytes, pageEntries } = manifest.facts
      return chunkBytes === settings.chunkBytes && pageEntries === settings.pageEntries ? manifest : undefined
    } catch (error) {
      this.#log('warn', 'An earlier point cannot be read; the backup goes on without it.', {
        disk: this.#source.disk,
        point,
        error: String(error),
      })
      return undefined
    }
  }

  async #parentPage(page: number): Promise<MapPage | undefined> {
    const reference = this.#parent?.pages[page]
    if (!this.#parent || !reference) return undefined
    const { store, keys, settings } = this.#tools
    try {
      return await readPage(store, keys, reference, {
        framesPerChunk: settings.chunkBytes / settings.frameBytes,
        entries: entriesOfPage(this.#parent.facts.virtualSize, settings, page),
      })
    } catch (error) {
      this.#log('warn', 'A map page of an earlier point cannot be read; the backup goes on without it.', {
        disk: this.#source.disk,
        point: this.#parent.facts.point,
        error: String(error),
      })
      return undefined
    }
  }

  // -------------------------------------------------------------- plan

  /** Fills `batch` with the chunks of one page, sends off full ones, and returns the one that is open. */
  async #planPage(page: number, batch: PlannedBatch): Promise<PlannedBatch> {
    this.#throwIfFailed()
    throwIfAborted(this.#signal)
    const start = page * this.#pageBytes
    const end = Math.min(start + this.#pageBytes, this.#size)
    const used = this.#used.clip(start, start + this.#pageBytes)
    const parent = await this.#parentPage(page)
    if (used.isEmpty && !parent) return batch
    const count = Math.ceil((end - start) / this.#chunkBytes)
    const build: PageBuild = {
      page,
      entries: Array.from({ length: count }, () => undefined),
      inUse: used.shift(-start),
      parent,
      missing: count + 1,
    }
    const extents = used.isEmpty ? [] : await this.#dataExtents(used.first!, Math.min(used.end!, end))
    const data = rangesOf(extents)
    const needed = used.intersect(data)
    const toRead = this.#joined.clip(start, end).intersect(data)
    const keptThen = this.#changed && parent?.inUse().shift(start)

    let open = batch
    let extent = 0
    for (let index = 0; index < count; index++) {
      const from = start + index * this.#chunkBytes
      const to = from + this.#chunkBytes
      const inUseBytes = used.clip(from, Math.min(to, this.#size)).size
      const chunk: PlannedChunk = { build, index, inUseBytes }
      if (inUseBytes === 0) {
        this.#set(chunk, undefined)
        continue
      }
      if (keptThen && !this.#changed!.touches(from, to) && used.clip(from, to).subtract(keptThen).isEmpty) {
        const entry = parent!.entry(index)
        if (!entry || (await this.#known.isSound('data', entry.pack))) {
          if (entry) this.#reusedChunks++
          this.#set(chunk, entry)
          continue
        }
      }
      const here = needed.clip(from, to)
      if (here.isEmpty) {
        this.#set(chunk, undefined)
        continue
      }
      const slot = open.chunks.length * this.#chunkBytes
      open.chunks.push(chunk)
      for (const gap of here.complement(from, to))
        open.zeros.push(slot + gap.start - from, gap.end - gap.start)
      for (const piece of toRead.clip(from, to)) {
        while (extents[extent]!.offset + extents[extent]!.length <= piece.start) extent++
        for (let e = extent, at = piece.start; at < piece.end; e++) {
          const { offset, length, at: place } = extents[e]!
          const stop = Math.min(piece.end, offset + length)
          if (place) {
            addRead(open.reads, slot + at - from, stop - at, place.file.fd, place.offset + at - offset)
          } else {
            addDeviceRead(open.deviceReads, slot + at - from, stop - at, at)
          }
          this.#readBytes += stop - at
          at = stop
        }
      }
      if (open.chunks.length === this.#batchChunks) {
        await this.#dispatch(open)
        open = emptyBatch()
      }
    }
    this.#pageMayBeComplete(build)
    return open
  }

  /** Extents with data in `[from, to)`, ascending. */
  async #dataExtents(from: number, to: number): Promise<readonly Extent[]> {
    const found: Extent[] = []
    for await (const extent of allExtents(this.#source.device, from, to - from, this.#signal)) {
      if (extent.kind === 'data') found.push(extent)
    }
    return found
  }

  // -------------------------------------------------------------- batches

  /** Sends a batch on its way; waits while enough of them are under way. */
  async #dispatch(batch: PlannedBatch): Promise<void> {
    while (this.#underWay.size >= this.#workers * BATCHES_PER_WORKER) await Promise.race(this.#underWay)
    this.#throwIfFailed()
    throwIfAborted(this.#signal)
    const least = this.#loads.indexOf(Math.min(...this.#loads))
    this.#loads[least]!++
    const done = this.#process(batch, this.#tools.pool.lane(least))
      .catch((error: unknown) => {
        this.#failure ??= { error }
      })
      .finally(() => {
        this.#loads[least]!--
        this.#underWay.delete(done)
      })
    this.#underWay.add(done)
  }

  async #process(planned: PlannedBatch, lane: Lane): Promise<void> {
    const mine: OwnChunk[] = []
    try {
      await this.#processChunks(planned, lane, mine)
    } catch (error) {
      for (const { reject } of mine) reject(error)
      throw error
    }
    this.#report()
  }

  async #processChunks(planned: PlannedBatch, lane: Lane, mine: OwnChunk[]): Promise<void> {
    let buffer = this.#spare.pop() ?? new ArrayBuffer(this.#batchChunks * this.#chunkBytes)
    const number = this.#batches++
    await this.#readDevice(planned.deviceReads, buffer)
    this.#throwIfFailed()
    const { ids } = await lane.call(
      'hash',
      {
        batch: number,
        buffer,
        chunks: planned.chunks.length,
        reads: Float64Array.from(planned.reads),
        zeros: Float64Array.from(planned.zeros),
      },
      [buffer],
    )
    const which: number[] = []
    const waiting: Promise<void>[] = []
    for (const [i, chunk] of planned.chunks.entries()) {
      const id = ids.slice(i * ID_BYTES, (i + 1) * ID_BYTES)
      if (isZeroId(id)) {
        this.#set(chunk, undefined)
        continue
      }
      const known = await this.#lookUp(chunk, id)
      if (known) {
        this.#reusedChunks++
        this.#set(chunk, known)
        continue
      }
      // From here to the end of this turn nothing else runs, so two batches never store one chunk.
      const stored = this.#pending.get(idKey(id))
      if (stored) {
        this.#reusedChunks++
        waiting.push(handled(stored.then((entry) => this.#set(chunk, entry))))
        continue
      }
      const { promise, resolve, reject } = Promise.withResolvers<ChunkEntry>()
      this.#pending.set(idKey(id), handled(promise))
      this.#newChunks++
      which.push(i)
      mine.push({ chunk, id, resolve, reject })
    }
    const stored = await lane.call('store', { batch: number, which: Uint32Array.from(which) })
    buffer = stored.buffer
    const frames = this.#chunkBytes / this.#tools.settings.frameBytes
    let at = 0
    for (const { chunk, id, resolve } of mine) {
      const pack = stored.packs[stored.places[at]!]!
      const offset = stored.places[at + 1]!
      const entry = { id, pack, offset, frames: Array.from(stored.places.subarray(at + 2, at + 2 + frames)) }
      at += 2 + frames
      resolve(entry)
      this.#set(chunk, entry)
    }
    this.#spare.push(buffer)
    await Promise.all(waiting)
  }

  async #readDevice(reads: readonly number[], buffer: ArrayBuffer): Promise<void> {
    for (let i = 0; i < reads.length; i += 3) {
      const into = new Uint8Array(buffer, reads[i], reads[i + 1])
      await this.#source.device.read(reads[i + 2]!, into, this.#signal)
    }
  }

  /** The chunk as it stands in the repository already, if it does. */
  async #lookUp(chunk: PlannedChunk, id: Uint8Array): Promise<ChunkEntry | undefined> {
    const before =
      chunk.build.parent && chunk.index < chunk.build.parent.count && chunk.build.parent.entry(chunk.index)
    if (before && equalBytes(before.id, id) && (await this.#known.isSound('data', before.pack))) return before
    if (this.#pending.has(idKey(id))) return undefined
    const hit = this.#tools.index.find(id)
    if (hit?.kind !== 'data') return undefined
    const object = await this.#known.find('data', hit.pack, id)
    if (object?.frames.length === this.#chunkBytes / this.#tools.settings.frameBytes)
      return { id, pack: hit.pack, offset: object.offset, frames: object.frames }
    if (this.#known.unusable.has(hit.pack)) {
      this.#log('warn', 'A pack that the index names is gone or damaged: its chunks are stored again.', {
        pack: hit.pack,
      })
      this.#tools.index.forget(hit.pack)
    }
    return undefined
  }

  // -------------------------------------------------------------- pages

  #set(chunk: PlannedChunk, entry: ChunkEntry | undefined): void {
    const { build, index } = chunk
    build.entries[index] = entry
    const before = build.parent && index < build.parent.count ? build.parent.entry(index) : undefined
    const same =
      before === undefined || entry === undefined ? before === entry : equalBytes(before.id, entry.id)
    if (!same) {
      const from = build.page * this.#pageBytes + index * this.#chunkBytes
      this.#changedBytes += Math.min(this.#chunkBytes, this.#size - from)
    }
    this.#doneBytes += chunk.inUseBytes
    this.#pageMayBeComplete(build)
  }

  #pageMayBeComplete(build: PageBuild): void {
    if (--build.missing > 0) return
    this.#building = this.#building.then(async () => {
      if (this.#failure) return
      try {
        await this.#finishPage(build)
      } catch (error) {
        this.#failure ??= { error }
      }
    })
  }

  async #finishPage(build: PageBuild): Promise<void> {
    if (build.inUse.isEmpty) return
    const { keys, settings, index } = this.#tools
    const content = encodePage(build, settings.chunkBytes / settings.frameBytes)
    const id = keys.pageId(content)
    const dataPacks = [...new Set(build.entries.flatMap((entry) => (entry ? [entry.pack] : [])))]
    const known = this.#ownPages.get(idKey(id)) ?? this.#parent?.pages[build.page]
    if (
      known &&
      equalBytes(known.id, id) &&
      (this.#ownPages.has(idKey(id)) || (await this.#known.isSound('metadata', known.pack)))
    ) {
      this.#pages[build.page] = known
      return
    }
    const hit = index.find(id)
    const object = hit?.kind === 'metadata' ? await this.#known.find('metadata', hit.pack, id) : undefined
    if (hit && object?.frames.length === 1) {
      this.#pages[build.page] = {
        id,
        pack: hit.pack,
        offset: object.offset,
        frame: object.frames[0]!,
        plainLength: object.plainLength,
        dataPacks,
      }
      return
    }
    this.#metadata ??= await PackWriter.create(this.#tools.store, keys, 'metadata')
    const stored = this.#metadata.append(id, content, content.length)
    await this.#metadata.ready()
    const reference = {
      id,
      pack: this.#metadata.name,
      offset: stored.offset,
      frame: stored.frames[0]!,
      plainLength: content.length,
      dataPacks,
    }
    this.#pages[build.page] = reference
    this.#ownPages.set(idKey(id), reference)
    if (this.#metadata.length >= settings.packBytes) await this.#finishMetadata()
  }

  /** Makes the open metadata pack durable. It gets its name once every data pack is durable. */
  async #finishMetadata(): Promise<void> {
    const pack = this.#metadata
    if (!pack) return
    this.#metadataPacks.set(pack, await pack.finish())
    this.#metadataDone.push(pack)
    this.#metadata = undefined
  }

  // -------------------------------------------------------------- ends

  #throwIfFailed(): void {
    if (this.#failure) throw this.#failure.error
  }

  #report(): void {
    this.#progress({ phase: 'backup', doneBytes: this.#doneBytes, totalBytes: this.#usedBytes })
  }
}

function emptyBatch(): PlannedBatch {
  return { chunks: [], reads: [], zeros: [], deviceReads: [] }
}

/** Reads that touch in the buffer and in the file become one. */
function addRead(reads: number[], into: number, length: number, fd: number, offset: number): void {
  const last = reads.length - 4
  if (
    last >= 0 &&
    reads[last + 2] === fd &&
    into === reads[last]! + reads[last + 1]! &&
    offset === reads[last + 3]! + reads[last + 1]!
  ) {
    reads[last + 1]! += length
  } else {
    reads.push(into, length, fd, offset)
  }
}

function addDeviceRead(reads: number[], into: number, length: number, offset: number): void {
  const last = reads.length - 3
  if (
    last >= 0 &&
    into === reads[last]! + reads[last + 1]! &&
    offset === reads[last + 2]! + reads[last + 1]!
  ) {
    reads[last + 1]! += length
  } else {
    reads.push(into, length, offset)
  }
}

function rangesOf(extents: readonly Extent[]): RangeSet {
  const builder = new RangeSetBuilder()
  for (const extent of extents) builder.add(extent.offset, extent.offset + extent.length)
  return builder.build()
}

function joinSmallGaps(used: RangeSet): RangeSet {
  const most = used.size * (1 + READ_THROUGH_PART)
  for (const gap of GAPS) {
    const joined = used.joinGaps(gap + 1)
    if (joined.size <= most) return joined
  }
  return used
}

/** The same promise; a failure that nobody waits for is not an unhandled one. */
function handled<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {})
  return promise
}

function isZeroId(id: Uint8Array): boolean {
  return id.every((byte) => byte === 0)
}
