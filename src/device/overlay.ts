/**
 * Byte-range patches in memory over a device that is never written: what a journal replay needs. The newest
 * patch wins. Borrows the device below.
 *
 * Rule: an original is never modified by a read path; whatever a replay changes lives here and dies with it.
 */
import { LIMITS, VarveError } from '../base/index.ts'
import { type Extent, ExtentList, RangeSet } from '../extents/index.ts'
import { type BlockDevice, checkRange, type Features } from './block-device.ts'

/** Patches are kept in pages of this many bytes, so that many small ones cost one look-up. */
const PAGE = 4096

interface Page {
  readonly bytes: Uint8Array
  /** Which of `bytes` are patched. */
  patched: RangeSet
}

export class OverlayDevice implements BlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly #inner: BlockDevice
  readonly #pages = new Map<number, Page>()

  constructor(inner: BlockDevice) {
    this.#inner = inner
    this.size = inner.size
    this.blockSize = inner.blockSize
    this.features = { ...inner.features, write: false, resize: false }
  }

  /** Number of bytes held; at most LIMITS.overlayBytes. */
  get heldBytes(): number {
    return this.#pages.size * PAGE
  }

  /** Every byte that differs in origin from the device below (its value may be the same). */
  get patched(): RangeSet {
    const ranges = []
    for (const [index, page] of this.#pages) ranges.push(...page.patched.shift(index * PAGE))
    return RangeSet.from(ranges)
  }

  patch(offset: number, bytes: Uint8Array): void {
    checkRange(this.size, offset, bytes.length)
    let done = 0
    while (done < bytes.length) {
      const index = Math.floor((offset + done) / PAGE)
      const from = offset + done - index * PAGE
      const length = Math.min(PAGE - from, bytes.length - done)
      const page = this.#page(index)
      page.bytes.set(bytes.subarray(done, done + length), from)
      page.patched = page.patched.union(RangeSet.of(from, from + length))
      done += length
    }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkRange(this.size, offset, into.length)
    await this.#inner.read(offset, into, signal)
    const end = offset + into.length
    for (let index = Math.floor(offset / PAGE); index * PAGE < end; index++) {
      const page = this.#pages.get(index)
      if (!page) continue
      const base = index * PAGE
      for (const { start, end: stop } of page.patched.clip(offset - base, end - base)) {
        into.set(page.bytes.subarray(start, stop), base + start - offset)
      }
    }
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkRange(this.size, offset, length)
    const below = await this.#inner.extents(offset, length, signal)
    if (this.#pages.size === 0) return below
    const patched = this.patched
    const list = new ExtentList()
    for (const extent of below) {
      let at = extent.offset
      const end = extent.offset + extent.length
      const keep = (to: number): void =>
        list.add(
          at,
          to - at,
          extent.kind,
          extent.at && { file: extent.at.file, offset: extent.at.offset + at - extent.offset },
        )
      for (const hit of patched.clip(at, end)) {
        keep(hit.start)
        list.add(hit.start, hit.end - hit.start, 'data')
        at = hit.end
      }
      keep(end)
    }
    return list.finish()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#pages.clear()
  }

  #page(index: number): Page {
    let page = this.#pages.get(index)
    if (!page) {
      if (this.heldBytes >= LIMITS.overlayBytes) {
        throw new VarveError(
          'LIMIT',
          `Cannot replay: found more than ${LIMITS.overlayBytes} bytes of patches`,
        )
      }
      page = { bytes: new Uint8Array(PAGE), patched: RangeSet.empty }
      this.#pages.set(index, page)
    }
    return page
  }
}
