/**
 * Byte-range patches in memory over a device that is never written: what a journal replay needs. The newest
 * patch wins. Borrows the device below.
 *
 * Rule: an original is never modified by a read path; whatever a replay changes lives here and dies with it.
 *
 * Patches are kept in pages, so that a later one over an earlier one takes no further memory, and the limit on
 * what is held (LIMITS.overlayBytes) is a limit on memory. What is patched in a page is a RangeSet, undefined
 * once all of it is: a journal of whole blocks, the usual one, never makes one.
 */
import { LIMITS, throwIfAborted, VarveError } from '../base/index.ts'
import { type Extent, ExtentList, RangeSet, RangeSetBuilder } from '../extents/index.ts'
import { type BlockDevice, checkExtentRange, checkOpen, checkRange, type Features } from './block-device.ts'

const PAGE = 4096

interface Page {
  readonly bytes: Uint8Array
  /** Which of `bytes` are patched; undefined: all. */
  patched: RangeSet | undefined
}

const ALL: RangeSet = RangeSet.of(0, PAGE)

export class OverlayDevice implements BlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly #inner: BlockDevice
  readonly #mostBytes: number
  readonly #pages = new Map<number, Page>()
  /** Of all pages, in bytes of the device; undefined after a patch. */
  #patched: RangeSet | undefined = RangeSet.empty
  #disposed = false

  constructor(inner: BlockDevice, options: { readonly mostBytes?: number } = {}) {
    this.#inner = inner
    this.#mostBytes = options.mostBytes ?? LIMITS.overlayBytes
    this.size = inner.size
    this.blockSize = inner.blockSize
    this.features = { ...inner.features, write: false, resize: false }
  }

  /** Number of bytes held, in whole pages; at most `mostBytes` (LIMITS.overlayBytes). */
  get heldBytes(): number {
    return this.#pages.size * PAGE
  }

  /** Every byte that differs in origin from the device below (its value may be the same). */
  get patched(): RangeSet {
    if (!this.#patched) {
      const builder = new RangeSetBuilder()
      for (const [index, page] of this.#pages) {
        const base = index * PAGE
        const patched = page.patched ?? ALL
        for (let i = 0; i < patched.count; i++)
          builder.add(base + patched.startAt(i), base + patched.endAt(i))
      }
      this.#patched = builder.build()
    }
    return this.#patched
  }

  /** Copies `bytes` over what stands at `offset`. @throws LIMIT when too much would be held in memory */
  patch(offset: number, bytes: Uint8Array): void {
    checkOpen(this.#disposed)
    checkRange(this.size, offset, bytes.length)
    this.#patched = undefined
    for (let done = 0; done < bytes.length; ) {
      const index = Math.floor((offset + done) / PAGE)
      const from = offset + done - index * PAGE
      const length = Math.min(PAGE - from, bytes.length - done)
      const page = this.#page(index)
      page.bytes.set(bytes.subarray(done, done + length), from)
      if (length === PAGE) page.patched = undefined
      else if (page.patched && !page.patched.covers(from, from + length)) {
        const patched = page.patched.union(RangeSet.of(from, from + length))
        page.patched = patched.covers(0, PAGE) ? undefined : patched
      }
      done += length
    }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    checkRange(this.size, offset, into.length)
    throwIfAborted(signal)
    const end = offset + into.length
    if (into.length === 0 || !this.#covers(offset, end)) {
      await this.#inner.read(offset, into, signal)
      // Disposed of meanwhile, the patches are gone: what was read is not what this device holds.
      checkOpen(this.#disposed)
    }
    const first = Math.floor(offset / PAGE)
    const last = Math.ceil(end / PAGE)
    if (last - first <= this.#pages.size) {
      for (let index = first; index < last; index++) {
        const page = this.#pages.get(index)
        if (page) copyPatched(page, index * PAGE, offset, into)
      }
    } else {
      for (const [index, page] of this.#pages) {
        if (index >= first && index < last) copyPatched(page, index * PAGE, offset, into)
      }
    }
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    checkExtentRange(this.size, offset, length)
    const below = await this.#inner.extents(offset, length, signal)
    checkOpen(this.#disposed)
    const { patched } = this
    const list = new ExtentList()
    for (const extent of below) {
      const { kind, at: place } = extent
      const end = extent.offset + extent.length
      let at = extent.offset
      const keep = (to: number): void =>
        list.add(at, to - at, kind, place && { ...place, offset: place.offset + at - extent.offset })
      for (let i = patched.indexAfter(at); i < patched.count && patched.startAt(i) < end; i++) {
        const start = Math.max(patched.startAt(i), at)
        const stop = Math.min(patched.endAt(i), end)
        keep(start)
        list.add(start, stop - start, 'data')
        at = stop
      }
      keep(end)
    }
    return list.finish()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
    this.#pages.clear()
    this.#patched = RangeSet.empty
  }

  /** True when every byte of `[offset, end)` is patched: then the device below is not asked at all. */
  #covers(offset: number, end: number): boolean {
    for (let index = Math.floor(offset / PAGE); index * PAGE < end; index++) {
      const page = this.#pages.get(index)
      if (!page) return false
      const base = index * PAGE
      if (page.patched && !page.patched.covers(Math.max(offset - base, 0), Math.min(end - base, PAGE)))
        return false
    }
    return true
  }

  #page(index: number): Page {
    let page = this.#pages.get(index)
    if (!page) {
      if (this.heldBytes + PAGE > this.#mostBytes) {
        throw new VarveError('LIMIT', `Cannot replay: found more than ${this.#mostBytes} bytes of patches`)
      }
      page = { bytes: new Uint8Array(PAGE), patched: RangeSet.empty }
      this.#pages.set(index, page)
    }
    return page
  }
}

/** Copies what `page`, which stands at `base`, has for a read of `into` at `offset`. */
function copyPatched(page: Page, base: number, offset: number, into: Uint8Array): void {
  const from = Math.max(offset - base, 0)
  const to = Math.min(offset + into.length - base, PAGE)
  const patched = page.patched ?? ALL
  for (let i = patched.indexAfter(from); i < patched.count && patched.startAt(i) < to; i++) {
    const start = Math.max(patched.startAt(i), from)
    into.set(page.bytes.subarray(start, Math.min(patched.endAt(i), to)), base + start - offset)
  }
}
