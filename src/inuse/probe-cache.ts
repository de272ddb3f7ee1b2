/**
 * A device that remembers small reads, so that forty probes of the same sectors cost a handful of reads. Borrows
 * the device below, which must not change while this one lives (a snapshot does not).
 *
 * Rules: it fetches whole sectors, not more: on a 20 GiB disk probing must cost kilobytes. Large reads (bitmaps,
 * tables) pass through unremembered. What the device below throws is known again by `failedWith`, so that a caller
 * can tell a failing disk from a reader that refuses what stands on it.
 */
import { type BlockDevice, checkRange, type Features } from '../device/index.ts'
import type { Extent } from '../extents/index.ts'

const SECTOR = 512
/** The first page holds most signatures: fetched in one read. */
const FIRST_PAGE = 4096
const LARGEST_KEPT = 8192
const MOST_SECTORS = 2048

export class ProbeCache implements BlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly #inner: BlockDevice
  readonly #sectors = new Map<number, Uint8Array>()
  readonly #failures = new WeakSet<Error>()

  constructor(inner: BlockDevice) {
    this.#inner = inner
    this.size = inner.size
    this.blockSize = inner.blockSize
    this.features = { ...inner.features, write: false, resize: false }
  }

  /** True when `error`, or what caused it, was thrown by the device below. */
  failedWith(error: unknown): boolean {
    let cause = error
    while (cause instanceof Error) {
      if (this.#failures.has(cause)) return true
      cause = cause.cause
    }
    return false
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkRange(this.size, offset, into.length)
    if (into.length > LARGEST_KEPT) {
      await this.#below(offset, into, signal)
      return
    }
    const first = Math.floor(offset / SECTOR)
    const end = Math.ceil((offset + into.length) / SECTOR)
    const kept = await this.#fetch(first, end, signal)
    for (let sector = first; sector < end; sector++) {
      const bytes = kept.get(sector)!
      const base = sector * SECTOR
      const from = Math.max(offset, base)
      const to = Math.min(offset + into.length, base + bytes.length)
      into.set(bytes.subarray(from - base, to - base), from - offset)
    }
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    return this.#inner.extents(offset, length, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#sectors.clear()
  }

  /** Sectors `[first, end)`, each run of missing ones by one read. The last of the device may be short. */
  async #fetch(
    first: number,
    end: number,
    signal: AbortSignal | undefined,
  ): Promise<Map<number, Uint8Array>> {
    const found = new Map<number, Uint8Array>()
    for (let sector = first; sector < end; ) {
      const kept = this.#sectors.get(sector)
      if (kept) {
        found.set(sector, kept)
        sector += 1
        continue
      }
      let stop = sector + 1
      while (stop < end && !this.#sectors.has(stop)) stop += 1
      if (stop * SECTOR <= FIRST_PAGE) stop = FIRST_PAGE / SECTOR
      const from = sector * SECTOR
      const bytes = new Uint8Array(Math.min(stop * SECTOR, this.size) - from)
      await this.#below(from, bytes, signal)
      if (this.#sectors.size + stop - sector > MOST_SECTORS) this.#sectors.clear()
      for (; sector < stop && sector * SECTOR < this.size; sector++) {
        const one = bytes.subarray(sector * SECTOR - from, (sector + 1) * SECTOR - from)
        this.#sectors.set(sector, one)
        if (sector < end) found.set(sector, one)
      }
      sector = Math.min(stop, end)
    }
    return found
  }

  async #below(offset: number, into: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
    try {
      await this.#inner.read(offset, into, signal)
    } catch (error) {
      if (error instanceof Error) this.#failures.add(error)
      throw error
    }
  }
}
