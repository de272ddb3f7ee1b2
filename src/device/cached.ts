/**
 * Pages of another device in memory, the longest unused dropped first: probing and metadata walks read the same
 * places many times and in small pieces. Borrows the device below.
 *
 * Rules:
 * - What is held is at most `mostBytes`; a read larger than half of that goes past the cache.
 * - Concurrent reads of a page cost one read below. It does not carry the signal of the one who came first: the
 *   others still want it. A caller whose signal fires stops waiting.
 * - A page that fails to be read is not kept, and the reader then gets exactly the bytes that it asked for, or
 *   the error that belongs to those: rounding and read-ahead never make a read fail.
 * - Writes go through and drop what they touch, when they begin and when they end, so that a page read meanwhile
 *   is not kept.
 */
import { alignDown, alignUp, throwIfAborted, VarveError } from '../base/index.ts'
import type { Extent } from '../extents/index.ts'
import {
  asWritable,
  type BlockDevice,
  checkOpen,
  checkRange,
  type Features,
  type WritableBlockDevice,
} from './block-device.ts'

export interface CacheOptions {
  /** Bytes of one page. Default 4096. */
  readonly pageBytes?: number
  /** Bytes held at most. Default 1 MiB. */
  readonly mostBytes?: number
  /** Bytes read further when something has to be read anyway. Default 0. */
  readonly readAheadBytes?: number
}

/** A page: its bytes, or the read that is under way. Pages at the end of the device are shorter. */
interface Page {
  bytes: Uint8Array | undefined
  reading: Promise<void> | undefined
}

export class CachedDevice implements WritableBlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly #inner: BlockDevice
  readonly #pageBytes: number
  readonly #mostPages: number
  readonly #aheadPages: number
  /** In the order of last use. */
  readonly #pages = new Map<number, Page>()
  /** Every read under way below, also of pages that were dropped meanwhile. */
  readonly #readings = new Set<Promise<void>>()
  #disposed = false

  constructor(inner: BlockDevice, options: CacheOptions = {}) {
    this.#inner = inner
    this.size = inner.size
    this.blockSize = inner.blockSize
    this.features = { ...inner.features, resize: false }
    this.#pageBytes = options.pageBytes ?? 4096
    this.#mostPages = Math.max(2, Math.floor((options.mostBytes ?? 1 << 20) / this.#pageBytes))
    this.#aheadPages = Math.min(
      Math.ceil((options.readAheadBytes ?? 0) / this.#pageBytes),
      Math.floor(this.#mostPages / 2),
    )
  }

  /** Bytes held, those being read included. */
  get heldBytes(): number {
    return this.#pages.size * this.#pageBytes
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    checkRange(this.size, offset, into.length)
    throwIfAborted(signal)
    if (into.length === 0) return
    const first = Math.floor(offset / this.#pageBytes)
    const end = Math.ceil((offset + into.length) / this.#pageBytes)
    if (end - first > this.#mostPages / 2) {
      await this.#inner.read(offset, into, signal)
      return
    }
    const pages = this.#take(first, end)
    const readings = new Set(pages.map((page) => page.reading).filter((reading) => reading !== undefined))
    if (readings.size > 0) await waitFor(Promise.allSettled(readings), signal)
    if (pages.some((page) => !page.bytes)) {
      checkOpen(this.#disposed)
      await this.#inner.read(offset, into, signal)
      return
    }
    for (const [index, page] of pages.entries()) {
      const base = (first + index) * this.#pageBytes
      const from = Math.max(offset - base, 0)
      const to = Math.min(offset + into.length - base, this.#pageBytes)
      into.set(page.bytes!.subarray(from, to), base + from - offset)
    }
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    return await this.#inner.extents(offset, length, signal)
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    const inner = asWritable(this.#inner)
    checkRange(this.size, offset, bytes.length)
    this.#drop(offset, bytes.length)
    try {
      await inner.write(offset, bytes, signal)
    } finally {
      this.#drop(offset, bytes.length)
    }
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    const inner = asWritable(this.#inner)
    checkRange(this.size, offset, length)
    this.#drop(offset, length)
    try {
      await inner.zero(offset, length, signal)
    } finally {
      this.#drop(offset, length)
    }
  }

  async flush(signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    await asWritable(this.#inner).flush(signal)
  }

  /** Waits for the reads that are under way: the device below may be disposed of next. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
    const readings = [...this.#readings]
    this.#pages.clear()
    await Promise.allSettled(readings)
  }

  /** The pages `[first, end)`, each held or being read, marked as used last. */
  #take(first: number, end: number): readonly Page[] {
    const pages: Page[] = []
    for (let index = first; index < end; index++) {
      let page = this.#pages.get(index)
      if (page) {
        this.#pages.delete(index)
        this.#pages.set(index, page)
      } else {
        this.#start(index, this.#missingUntil(index, end))
        page = this.#pages.get(index)!
      }
      pages.push(page)
    }
    this.#evict()
    return pages
  }

  /** End of the run of pages from `index` that are not held, up to `end`, with read-ahead past it. */
  #missingUntil(index: number, end: number): number {
    const most = Math.min(end + this.#aheadPages, Math.ceil(this.size / this.#pageBytes))
    let stop = index + 1
    while (stop < most && !this.#pages.has(stop)) stop++
    return stop
  }

  /** Begins one read for the pages `[first, end)`, none of which is held. */
  #start(first: number, end: number): void {
    const offset = first * this.#pageBytes
    const run = new Uint8Array(Math.min(end * this.#pageBytes, this.size) - offset)
    const started = Array.from(
      { length: end - first },
      (): Page => ({ bytes: undefined, reading: undefined }),
    )
    const fill = async (): Promise<void> => {
      try {
        await this.#inner.read(offset, run)
        for (const [i, page] of started.entries()) {
          // A copy each: a view would keep the whole run in memory for one page of it.
          page.bytes = run.slice(i * this.#pageBytes, (i + 1) * this.#pageBytes)
        }
      } catch {
        // The reader asks again for its own bytes alone and reports what becomes of that.
        for (const [i, page] of started.entries()) {
          if (this.#pages.get(first + i) === page) this.#pages.delete(first + i)
        }
      }
      for (const page of started) page.reading = undefined
    }
    for (const [i, page] of started.entries()) this.#pages.set(first + i, page)
    const reading = fill().finally(() => this.#readings.delete(reading))
    this.#readings.add(reading)
    for (const page of started) page.reading = reading
  }

  #evict(): void {
    for (const index of this.#pages.keys()) {
      if (this.#pages.size <= this.#mostPages) return
      this.#pages.delete(index)
    }
  }

  #drop(offset: number, length: number): void {
    const first = alignDown(offset, this.#pageBytes) / this.#pageBytes
    const end = alignUp(offset + length, this.#pageBytes) / this.#pageBytes
    if (end - first <= this.#pages.size) {
      for (let index = first; index < end; index++) this.#pages.delete(index)
    } else {
      for (const index of this.#pages.keys()) if (index >= first && index < end) this.#pages.delete(index)
    }
  }
}

/** Waits for `work`, or rejects with CANCELLED as soon as the signal fires; `work` then goes on by itself. */
async function waitFor(work: Promise<unknown>, signal: AbortSignal | undefined): Promise<void> {
  if (!signal) {
    await work
    return
  }
  const { promise, reject } = Promise.withResolvers<never>()
  const cancel = (): void =>
    reject(new VarveError('CANCELLED', 'Cannot go on: interrupted', { cause: signal.reason }))
  signal.addEventListener('abort', cancel, { once: true })
  try {
    await Promise.race([work, promise])
  } finally {
    signal.removeEventListener('abort', cancel)
  }
}
