/** A dynamic or differencing VHD as a layer, for reading. What it holds and where: block-map.ts. */
import { mapBounded, throwIfAborted } from '../../base/index.ts'
import {
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
} from '../../device/index.ts'
import { type Extent, ExtentList, type HostFile } from '../../extents/index.ts'
import { hostFileOf } from '../host-place.ts'
import type { BackingReference, FormatFacts, ImageLayer } from '../image-format.ts'
import type { BlockMap, HeldRun } from './block-map.ts'

/** Reads under way at once. */
const READS = 16
/** `extents` stops after this many; the caller asks on. */
const MOST_EXTENTS = 65_536

export interface SparseVhdParts {
  readonly file: BlockDevice
  readonly map: BlockMap
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  readonly id: string
}

/** Owns `file`. */
export class SparseVhdLayer implements ImageLayer {
  readonly format = 'vhd'
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  readonly id: string
  readonly size: number
  readonly blockSize = 512
  readonly features: Features
  readonly #file: BlockDevice
  readonly #map: BlockMap
  #closed = false

  constructor(parts: SparseVhdParts) {
    this.#file = parts.file
    this.#map = parts.map
    this.size = parts.map.size
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
    await readHeld(this.#map, this.#file, offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.size, offset, length)
    throwIfAborted(signal)
    return await heldExtents(this.#map, hostFileOf(this.#file), offset, length, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    this.#map.close()
    await this.#file[Symbol.asyncDispose]()
  }
}

/** Fills `into` from the disk's `offset`: what the file holds, zeros elsewhere. */
export async function readHeld(
  map: BlockMap,
  file: BlockDevice,
  offset: number,
  into: Uint8Array,
  signal: AbortSignal | undefined,
): Promise<void> {
  if (into.length === 0) return
  const runs: HeldRun[] = []
  let at = offset
  await map.eachRun(
    offset,
    offset + into.length,
    (run) => {
      into.fill(0, at - offset, run.start - offset)
      runs.push(run)
      at = run.end
    },
    signal,
  )
  into.fill(0, at - offset)
  await mapBounded(runs, READS, ({ start, end, from }) =>
    file.read(from, into.subarray(start - offset, end - offset), signal),
  )
}

/** `data` with its place for what the file holds, `absent` elsewhere. */
export async function heldExtents(
  map: BlockMap,
  host: HostFile | undefined,
  offset: number,
  length: number,
  signal: AbortSignal | undefined,
): Promise<readonly Extent[]> {
  const list = new ExtentList()
  let at = offset
  const stop = await map.eachRun(
    offset,
    offset + length,
    ({ start, end, from }) => {
      list.add(at, start - at, 'absent')
      list.add(start, end - start, 'data', host && { file: host, offset: from })
      at = end
    },
    signal,
    () => list.count >= MOST_EXTENTS,
  )
  list.add(at, stop - at, 'absent')
  return list.finish()
}
