/**
 * A restore point as a device. Borrows the repository's store, keys, pages and workers; disposing of it closes nothing.
 *
 * Large reads are decoded by the worker threads, a chunk each; small ones decode the frames that they touch here, and
 * the frames used last are kept. What the point does not hold reads as zeros and is `zero` in the extents.
 */
import { throwIfAborted } from '../base/index.ts'
import { checkExtentRange, checkOpen, checkRange, type Features } from '../device/index.ts'
import { type Extent, ExtentList, type RangeSet, RangeSetBuilder } from '../extents/index.ts'
import type { PointDevice, PointInfo, RepositorySettings } from './contract.ts'
import type { RepositoryKeys } from './keys.ts'
import { type ChunkEntry, type MapPage, METHOD, methodOf } from './layout.ts'
import type { Manifest } from './manifest.ts'
import { type ObjectPlace, readFrames } from './pack-reader.ts'
import { entriesOfPage, type PageCache, readPage } from './pages.ts'
import { pointInfo } from './points.ts'
import type { WorkerPool } from './pool.ts'
import type { BlobStore } from './store/blob-store.ts'

/** Decoded frames kept for small reads. */
const FRAME_CACHE_BYTES = 16_777_216
/** Pages that one call of `extents` looks at. */
const PAGES_PER_ANSWER = 4

export interface PointTools {
  readonly store: BlobStore
  readonly keys: RepositoryKeys
  readonly settings: RepositorySettings
  readonly pool: WorkerPool
  readonly pages: PageCache
}

export class RepositoryPointDevice implements PointDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features = { write: false, resize: false, sparse: true, places: false }
  readonly info: PointInfo
  readonly #tools: PointTools
  readonly #manifest: Manifest
  readonly #pageBytes: number
  /** By pack and place. The promise is shared by all who wait for the frame. */
  readonly #frames = new Map<string, Promise<Uint8Array>>()
  #disposed = false

  constructor(tools: PointTools, manifest: Manifest) {
    this.#tools = tools
    this.#manifest = manifest
    this.info = pointInfo(manifest.facts)
    this.size = manifest.facts.virtualSize
    this.blockSize = manifest.facts.blockBytes
    this.#pageBytes = tools.settings.chunkBytes * tools.settings.pageEntries
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#use(offset, into.length)
    const { chunkBytes } = this.#tools.settings
    const parts: Promise<void>[] = []
    for (let done = 0; done < into.length; ) {
      const at = offset + done
      const from = at % chunkBytes
      const length = Math.min(chunkBytes - from, into.length - done)
      parts.push(this.#readChunk(at, from, into.subarray(done, done + length), signal))
      done += length
    }
    // All of them are awaited before a failure is thrown: nobody writes to `into` afterwards.
    const results = await Promise.allSettled(parts)
    for (const result of results) if (result.status === 'rejected') throw result.reason
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    checkExtentRange(this.size, offset, length)
    const { chunkBytes, frameBytes } = this.#tools.settings
    const list = new ExtentList()
    const end = offset + length
    let at = offset
    let looked = 0
    while (at < end && looked < PAGES_PER_ANSWER) {
      throwIfAborted(signal)
      const number = Math.floor(at / this.#pageBytes)
      const pageEnd = Math.min((number + 1) * this.#pageBytes, end)
      const page = await this.#page(number)
      if (!page) {
        list.add(at, pageEnd - at, 'zero')
        at = pageEnd
        continue
      }
      looked++
      while (at < pageEnd) {
        const index = Math.floor((at - number * this.#pageBytes) / chunkBytes)
        const chunkAt = number * this.#pageBytes + index * chunkBytes
        const entry = page.entry(index)
        if (!entry) {
          const stop = Math.min(chunkAt + chunkBytes, pageEnd)
          list.add(at, stop - at, 'zero')
          at = stop
          continue
        }
        for (
          let frame = Math.floor((at - chunkAt) / frameBytes);
          frame < entry.frames.length && at < pageEnd;
          frame++
        ) {
          const stop = Math.min(chunkAt + (frame + 1) * frameBytes, pageEnd)
          list.add(at, stop - at, methodOf(entry.frames[frame]!) === METHOD.zeros ? 'zero' : 'data')
          at = stop
        }
      }
    }
    return list.finish()
  }

  async inUse(start = 0, end: number = this.size): Promise<RangeSet> {
    this.#use(start, end - start)
    const builder = new RangeSetBuilder()
    for (let number = Math.floor(start / this.#pageBytes); number * this.#pageBytes < end; number++) {
      const page = await this.#page(number)
      if (page) builder.addAll(page.inUse().shift(number * this.#pageBytes))
    }
    return builder.build().clip(start, end)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
    this.#frames.clear()
  }

  async #readChunk(
    at: number,
    from: number,
    into: Uint8Array,
    signal: AbortSignal | undefined,
  ): Promise<void> {
    throwIfAborted(signal)
    const { chunkBytes, frameBytes } = this.#tools.settings
    const number = Math.floor(at / this.#pageBytes)
    const page = await this.#page(number)
    const entry = page?.entry(Math.floor((at - number * this.#pageBytes) / chunkBytes))
    if (!entry) {
      into.fill(0)
      return
    }
    const first = Math.floor(from / frameBytes)
    const end = Math.ceil((from + into.length) / frameBytes)
    if (into.length >= frameBytes && end - first > 1)
      await this.#decodeElsewhere(entry, first, end, from, into)
    else await this.#decodeHere(entry, first, end, from, into)
  }

  /** A worker reads, opens and decompresses; the main thread copies. */
  async #decodeElsewhere(
    entry: ChunkEntry,
    first: number,
    end: number,
    from: number,
    into: Uint8Array,
  ): Promise<void> {
    const { settings, pool } = this.#tools
    const length = (end - first) * settings.frameBytes
    const buffer = pool.takeBuffer(settings.chunkBytes)
    const { buffer: filled } = await pool
      .idlest()
      .call('decode', { place: this.#place(entry), first, end, length, buffer }, [buffer])
    const skip = from - first * settings.frameBytes
    into.set(new Uint8Array(filled, skip, into.length))
    pool.giveBuffer(filled)
  }

  async #decodeHere(
    entry: ChunkEntry,
    first: number,
    end: number,
    from: number,
    into: Uint8Array,
  ): Promise<void> {
    const { frameBytes } = this.#tools.settings
    for (let frame = first; frame < end; frame++) {
      const frameAt = frame * frameBytes
      const start = Math.max(from, frameAt)
      const stop = Math.min(from + into.length, frameAt + frameBytes)
      const content = await this.#frame(entry, frame)
      into.set(content.subarray(start - frameAt, stop - frameAt), start - from)
    }
  }

  #frame(entry: ChunkEntry, frame: number): Promise<Uint8Array> {
    const { store, keys, settings } = this.#tools
    const key = `${entry.pack} ${entry.offset} ${frame}`
    let content = this.#frames.get(key)
    if (content) {
      this.#frames.delete(key)
    } else {
      const into = new Uint8Array(settings.frameBytes)
      content = readFrames(store, keys, this.#place(entry), frame, frame + 1, into).then(() => into)
      content.catch(() => this.#frames.delete(key))
      if ((this.#frames.size + 1) * settings.frameBytes > FRAME_CACHE_BYTES)
        this.#frames.delete(this.#frames.keys().next().value!)
    }
    this.#frames.set(key, content)
    return content
  }

  #place(entry: ChunkEntry): ObjectPlace {
    const { chunkBytes, frameBytes } = this.#tools.settings
    return { ...entry, kind: 'data', frameBytes, plainLength: chunkBytes }
  }

  async #page(number: number): Promise<MapPage | undefined> {
    const reference = this.#manifest.pages[number]
    if (!reference) return undefined
    const { store, keys, settings, pages } = this.#tools
    const shape = {
      framesPerChunk: settings.chunkBytes / settings.frameBytes,
      entries: entriesOfPage(this.size, settings, number),
    }
    const key = `${reference.pack} ${reference.offset} ${shape.entries}`
    return await pages.get(key, () => readPage(store, keys, reference, shape))
  }

  #use(offset: number, length: number): void {
    checkOpen(this.#disposed)
    checkRange(this.size, offset, length)
  }
}
