/**
 * Extent: a run of bytes with one kind. The answer of every layer to "what do you know about this range?".
 *
 * Rule: a list of extents is contiguous, ascending and never empty, and no extent is empty. `checkExtents` says
 * so by code; the device conformance suite runs it over every device.
 */
import { assert } from '../base/index.ts'

/** What one layer knows about a range. `absent`: ask my backing layer; with none, it reads as zeros. */
export type ExtentKind = 'data' | 'zero' | 'absent'

/** A file of this host, open for reading, in which bytes can be pointed at (see device/host). */
export interface HostFile {
  /** Absolute path, for people and for map output. */
  readonly path: string
  /** An open file descriptor that stays valid as long as the device that gave the extent. */
  readonly fd: number
}

/** Where the host keeps an extent's bytes, verbatim. */
export interface HostPlace {
  readonly file: HostFile
  readonly offset: number
}

export interface Extent {
  readonly offset: number
  readonly length: number
  readonly kind: ExtentKind
  /** Set only where the bytes stand verbatim in a host file: lets copies, merges and exports skip userland. */
  readonly at?: HostPlace | undefined
}

/** Collects extents in ascending order, joining neighbours of one kind whose places run on. */
export class ExtentList {
  readonly #list: Extent[] = []

  add(offset: number, length: number, kind: ExtentKind, at?: HostPlace): void {
    if (length === 0) return
    const last = this.#list.at(-1)
    if (last && last.offset + last.length === offset && last.kind === kind && runsOn(last, at)) {
      this.#list[this.#list.length - 1] = { ...last, length: last.length + length }
      return
    }
    assert(!last || last.offset + last.length === offset, 'extents are contiguous')
    this.#list.push(at ? { offset, length, kind, at } : { offset, length, kind })
  }

  get count(): number {
    return this.#list.length
  }

  /** The end of what was added, or `undefined` when nothing was. */
  get end(): number | undefined {
    const last = this.#list.at(-1)
    return last && last.offset + last.length
  }

  get last(): Extent | undefined {
    return this.#list.at(-1)
  }

  finish(): readonly Extent[] {
    assert(this.#list.length > 0, 'extents are not empty')
    return this.#list
  }
}

function runsOn(last: Extent, at: HostPlace | undefined): boolean {
  if (!last.at || !at) return last.at === at
  return last.at.file === at.file && last.at.offset + last.length === at.offset
}

/** Cuts an extent to `[start, end)`, which is not empty and lies inside it. */
export function cutExtent(extent: Extent, start: number, end: number): Extent {
  assert(
    extent.offset <= start && start < end && end <= extent.offset + extent.length,
    'cut lies in its extent',
  )
  const skip = start - extent.offset
  const cut = { offset: start, length: end - start, kind: extent.kind }
  return extent.at ? { ...cut, at: { file: extent.at.file, offset: extent.at.offset + skip } } : cut
}

/** Throws INTERNAL unless `list` keeps the contract for a request `[offset, offset + length)`. */
export function checkExtents(list: readonly Extent[], offset: number, length: number): void {
  assert(list.length > 0, 'extents() returned nothing')
  let at = offset
  for (const extent of list) {
    assert(extent.offset === at, `extents() is contiguous at ${at}`)
    assert(extent.length > 0, `extents() has no empty extent at ${at}`)
    at += extent.length
  }
  assert(at <= offset + length, 'extents() stays inside the request')
}
