/**
 * A device that remembers small reads, so that forty probes of the same places cost a handful of reads. Borrows
 * the device below, which must not change while this one lives (a snapshot does not).
 *
 * Rules: it fetches short lines, because most probes look at ten bytes in the middle of nowhere and a whole disk
 * must cost kilobytes; only the start, which holds most signatures, comes at once, and both sides of a page
 * boundary (a swap area signs before it, others after it). Large reads (bitmaps, tables) pass through
 * unremembered. What the device below throws is known again by `failedWith`, so that a caller can tell a failing
 * disk from a reader that refuses what stands on it.
 */
import { type BlockDevice, checkRange, type Features } from '../device/index.ts'
import type { Extent } from '../extents/index.ts'

const LINE = 64
const PAGE_LINES = 64
/** Up to the signatures at 2048, and what follows them in their line. */
const START_LINES = 33
/** Signatures stand on both sides of page boundaries below this line; further on they are few. */
const PAIRED_LINES = 2048
const LARGEST_KEPT = 8192
const MOST_LINES = 16_384

export class ProbeCache implements BlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly #inner: BlockDevice
  readonly #lines = new Map<number, Uint8Array>()
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
    const first = Math.floor(offset / LINE)
    const end = Math.ceil((offset + into.length) / LINE)
    const kept = await this.#fetch(first, end, signal)
    for (let line = first; line < end; line++) {
      const bytes = kept.get(line)!
      const base = line * LINE
      const from = Math.max(offset, base)
      const to = Math.min(offset + into.length, base + bytes.length)
      into.set(bytes.subarray(from - base, to - base), from - offset)
    }
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    return this.#inner.extents(offset, length, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#lines.clear()
  }

  /** Lines `[first, end)`, each run of missing ones by one read. The last of the device may be short. */
  async #fetch(
    first: number,
    end: number,
    signal: AbortSignal | undefined,
  ): Promise<Map<number, Uint8Array>> {
    const lines = Math.ceil(this.size / LINE)
    const found = new Map<number, Uint8Array>()
    for (let line = first; line < end; ) {
      const kept = this.#lines.get(line)
      if (kept) {
        found.set(line, kept)
        line += 1
        continue
      }
      let stop = line + 1
      while (stop < end && !this.#lines.has(stop)) stop += 1
      if (line < START_LINES) {
        line = 0
        stop = Math.max(stop, START_LINES)
      } else if (end - first <= 2 && end < PAIRED_LINES) {
        if (stop % PAGE_LINES === 0) stop += 1
        if (line % PAGE_LINES === 0 && !this.#lines.has(line - 1)) line -= 1
      }
      stop = Math.min(stop, lines)
      const from = line * LINE
      const bytes = new Uint8Array(Math.min(stop * LINE, this.size) - from)
      await this.#below(from, bytes, signal)
      if (this.#lines.size + stop - line > MOST_LINES) this.#lines.clear()
      for (; line < stop; line++) {
        const one = bytes.subarray(line * LINE - from, (line + 1) * LINE - from)
        this.#lines.set(line, one)
        found.set(line, one)
      }
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
