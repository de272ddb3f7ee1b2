/** A VHDX as a layer, for reading. What it holds and where: block-map.ts. */
import { mapBounded, throwIfAborted } from '../../base/index.ts'
import {
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
} from '../../device/index.ts'
import { type Extent, ExtentList, RangeSet } from '../../extents/index.ts'
import { hostFileOf } from '../host-place.ts'
import type { BackingReference, FormatFacts, ImageLayer } from '../image-format.ts'
import type { BlockMap, BlockRun } from './block-map.ts'

const READS = 16
/** `extents` stops after this many; the caller asks on. */
const MOST_EXTENTS = 65_536

/** Owns `file`. */
export class VhdxLayer implements ImageLayer {
  readonly format = 'vhdx'
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  readonly id: string
  readonly #file: BlockDevice
  readonly #content: BlockDevice
  readonly #patched: RangeSet
  readonly #map: BlockMap
  #closed = false

  /** `content` is `file` with its log replayed; `patched` is what the log changed of it. */
  constructor(parts: {
    readonly file: BlockDevice
    readonly content: BlockDevice
    readonly patched: RangeSet
    readonly map: BlockMap
    readonly backing: BackingReference | undefined
    readonly facts: FormatFacts
    readonly id: string
  }) {
    this.#file = parts.file
    this.#content = parts.content
    // Bytes that only the log gives the file have no place in it either.
    this.#patched = parts.patched.union(RangeSet.of(parts.file.size, parts.content.size))
    this.#map = parts.map
    this.size = parts.map.size
    this.blockSize = parts.map.metadata.logicalSectorBytes
    this.backing = parts.backing
    this.facts = parts.facts
    this.id = parts.id
    this.features = {
      write: false,
      resize: false,
      sparse: true,
      places: hostFileOf(parts.file) !== undefined,
    }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, into.length)
    throwIfAborted(signal)
    if (into.length === 0) return
    const runs: BlockRun[] = []
    await this.#map.eachRun(
      offset,
      offset + into.length,
      (run) => {
        const last = runs.at(-1)
        if (run.kind !== 'data') into.fill(0, run.start - offset, run.end - offset)
        else if (last && last.end === run.start && last.from + last.end - last.start === run.from) {
          runs[runs.length - 1] = { ...last, end: run.end }
        } else runs.push(run)
      },
      signal,
    )
    await mapBounded(runs, READS, ({ start, end, from }) =>
      this.#content.read(from, into.subarray(start - offset, end - offset), signal),
    )
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.size, offset, length)
    throwIfAborted(signal)
    const host = hostFileOf(this.#file)
    const list = new ExtentList()
    await this.#map.eachRun(
      offset,
      offset + length,
      ({ start, end, kind, from }) => {
        const verbatim = kind === 'data' && host && !this.#patched.touches(from, from + end - start)
        list.add(start, end - start, kind, verbatim ? { file: host, offset: from } : undefined)
      },
      signal,
      () => list.count >= MOST_EXTENTS,
    )
    return list.finish()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    this.#map.close()
    await using stack = new AsyncDisposableStack()
    stack.use(this.#file)
    if (this.#content !== this.#file) stack.use(this.#content)
  }
}
