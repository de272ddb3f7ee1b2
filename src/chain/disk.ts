/**
 * A chain as one disk: the guest's view, with depth and host place of every extent.
 *
 * How it plans: top down and a whole window at a time. The top layer tells what it holds of the window; only what
 * is absent there is asked of the layer below, in spans joined over short gaps, and so on to the root. Then all
 * pieces are put in order. So the work grows with the number of extents, not with clusters times depth.
 *
 * Rules:
 * - A layer is asked for data only where it holds it.
 * - A layer that ends early ends the chain there: what lies behind reads as zeros, even if a lower layer is longer.
 *   What a lower layer holds behind the end of the top is cut off.
 * - The layers are not written while the disk is open; so plans may be kept.
 */
import { mapBounded, throwIfAborted } from '../base/index.ts'
import {
  allExtents,
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
} from '../device/index.ts'
import { cutExtent, type Extent, type HostPlace, RangeSet, RangeSetBuilder } from '../extents/index.ts'
import type { BackingReference, FormatFacts, ImageLayer } from '../formats/index.ts'

export interface LayerInfo {
  /** Absolute path with links followed; the top as it was named. */
  readonly path: string
  readonly format: string
  readonly virtualSize: number
  /** What the host holds for the layer's file, bytes (st_blocks). */
  readonly allocatedBytes: number
  /** 0 is the top. */
  readonly depth: number
  readonly facts: FormatFacts
  readonly backing?: BackingReference
}

export interface DiskExtent extends Extent {
  /** The layer that decides: it holds the range, or the chain ends with it. */
  readonly depth: number
  /** False where no layer holds the range; it reads as zeros then, and `kind` is `zero`. */
  readonly present: boolean
}

/** A disk never answers `absent`: there is nothing below it. */
export interface Disk extends BlockDevice {
  /** Top first. */
  readonly layers: readonly LayerInfo[]
  extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly DiskExtent[]>
  /** As `extents` (contract and answer): under this name for those who want depth and presence. */
  mapExtents(offset: number, length: number, signal?: AbortSignal): Promise<readonly DiskExtent[]>
}

export interface OpenLayer {
  readonly layer: ImageLayer
  readonly path: string
  readonly allocatedBytes: number
}

/** One layer contributes at most this many extents to a plan; the window then ends there. */
const MOST_EXTENTS = 65_536
/** Gaps shorter than this are asked over: one question instead of two. */
const GAP_BYTES = 16 * 1024 * 1024
/** What a read plans at least, so that the next small read finds it. */
const READ_WINDOW_BYTES = 2 * 1024 * 1024
const READS = 16
const MOST_PLANS = 64
/** Extents kept in all plans together. */
const MOST_KEPT = 200_000

interface Plan {
  readonly start: number
  readonly end: number
  readonly extents: readonly DiskExtent[]
}

/** Owns the layers, top first. */
export class ChainDisk implements Disk {
  readonly size: number
  readonly blockSize: number
  readonly features: Features
  readonly layers: readonly LayerInfo[]
  readonly #layers: readonly ImageLayer[]
  #plans: Plan[] = []
  #closed = false

  constructor(layers: readonly OpenLayer[]) {
    const top = layers[0]
    if (!top) throw new TypeError('a chain has a layer')
    this.#layers = layers.map(({ layer }) => layer)
    this.size = top.layer.size
    this.blockSize = top.layer.blockSize
    this.features = {
      write: false,
      resize: false,
      sparse: layers.length > 1 || top.layer.features.sparse,
      places: layers.some(({ layer }) => layer.features.places),
    }
    this.layers = layers.map(({ layer, path, allocatedBytes }, depth) => ({
      path,
      format: layer.format,
      virtualSize: layer.size,
      allocatedBytes,
      depth,
      facts: layer.facts,
      ...(layer.backing ? { backing: layer.backing } : {}),
    }))
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, into.length)
    throwIfAborted(signal)
    if (into.length === 0) return
    if (this.#layers.length === 1) {
      await this.#layers[0]!.read(offset, into, signal)
      return
    }
    const reads: { depth: number; start: number; end: number }[] = []
    for (const { offset: start, length, kind, depth } of await this.#planned(offset, into.length, signal)) {
      const end = start + length
      const last = reads.at(-1)
      if (kind === 'zero') into.fill(0, start - offset, end - offset)
      else if (last && last.depth === depth && last.end === start) last.end = end
      else reads.push({ depth, start, end })
    }
    await mapBounded(reads, READS, ({ depth, start, end }) =>
      this.#layers[depth]!.read(start, into.subarray(start - offset, end - offset), signal),
    )
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly DiskExtent[]> {
    return await this.mapExtents(offset, length, signal)
  }

  async mapExtents(offset: number, length: number, signal?: AbortSignal): Promise<readonly DiskExtent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.size, offset, length)
    throwIfAborted(signal)
    const kept = this.#find(offset, 1)
    if (kept) return cutPlan(kept, offset, Math.min(kept.end, offset + length))
    const plan = await planChain(this.#layers, offset, offset + length, signal)
    this.#keep(plan)
    return plan.extents
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    this.#plans = []
    await disposeAll(this.#layers)
  }

  /** The extents of exactly `[offset, offset + length)`. */
  async #planned(
    offset: number,
    length: number,
    signal: AbortSignal | undefined,
  ): Promise<readonly DiskExtent[]> {
    const kept = this.#find(offset, length)
    if (kept) return cutPlan(kept, offset, offset + length)
    const parts: DiskExtent[] = []
    const end = offset + length
    let at = offset
    while (at < end) {
      const most = Math.min(Math.max(end, at + READ_WINDOW_BYTES), this.size)
      const plan = await planChain(this.#layers, at, most, signal)
      this.#keep(plan)
      const stop = Math.min(plan.end, end)
      for (const extent of cutPlan(plan, at, stop)) parts.push(extent)
      at = stop
    }
    return parts
  }

  #find(offset: number, length: number): Plan | undefined {
    return this.#plans.find((plan) => plan.start <= offset && offset + length <= plan.end)
  }

  #keep(plan: Plan): void {
    this.#plans.unshift(plan)
    let total = 0
    const most = this.#plans.findIndex(
      (each, index) => index === MOST_PLANS || (index > 0 && (total += each.extents.length) > MOST_KEPT),
    )
    if (most >= 0) this.#plans.length = most
  }
}

/** Disposes of all, whatever one of them throws; the first failure is thrown at the end. */
export async function disposeAll(devices: Iterable<AsyncDisposable>): Promise<void> {
  const results = await Promise.allSettled(Array.from(devices, (device) => device[Symbol.asyncDispose]()))
  const failed = results.find((result) => result.status === 'rejected')
  if (failed) throw failed.reason
}

/** Plans `[offset, end)`, or a first part of it when there are very many extents. */
async function planChain(
  layers: readonly ImageLayer[],
  offset: number,
  end: number,
  signal: AbortSignal | undefined,
): Promise<Plan> {
  const pieces: DiskExtent[] = []
  let wanted = RangeSet.of(offset, end)
  let stop = end
  for (const [depth, layer] of layers.entries()) {
    throwIfAborted(signal)
    if (depth > 0) {
      // Behind the end of this layer the chain ends with the one above.
      for (const hole of wanted.clip(layer.size, stop)) {
        pieces.push(zeroAt(hole.start, hole.end, depth - 1))
      }
      wanted = wanted.clip(0, Math.min(layer.size, stop))
    }
    if (wanted.isEmpty) break
    const absent = new RangeSetBuilder()
    let seen = 0
    asking: for (const span of wanted.joinGaps(GAP_BYTES)) {
      let index = wanted.indexAfter(span.start)
      for await (const extent of allExtents(layer, span.start, span.end - span.start, signal)) {
        const extentEnd = extent.offset + extent.length
        for (; index < wanted.count && wanted.startAt(index) < extentEnd; index++) {
          const from = Math.max(wanted.startAt(index), extent.offset)
          const to = Math.min(wanted.endAt(index), extentEnd)
          if (from < to) {
            seen++
            if (extent.kind === 'absent') absent.add(from, to)
            else pieces.push({ ...cutExtent(extent, from, to), depth, present: true })
          }
          if (wanted.endAt(index) > extentEnd) break
        }
        if (seen > MOST_EXTENTS) {
          stop = Math.min(stop, extentEnd)
          break asking
        }
      }
    }
    wanted = absent.build().clip(offset, stop)
    if (wanted.isEmpty) break
    if (depth === layers.length - 1) {
      for (const { start, end } of wanted) pieces.push(zeroAt(start, end, depth))
    }
  }
  return { start: offset, end: stop, extents: putInOrder(pieces, stop) }
}

function zeroAt(start: number, end: number, depth: number): DiskExtent {
  return { offset: start, length: end - start, kind: 'zero', depth, present: false }
}

/** Sorts disjoint pieces, drops what starts at or behind `stop`, cuts there, and joins neighbours that agree. */
function putInOrder(pieces: DiskExtent[], stop: number): readonly DiskExtent[] {
  pieces.sort((a, b) => a.offset - b.offset)
  const out: DiskExtent[] = []
  for (const piece of pieces) {
    if (piece.offset >= stop) break
    const last = out.at(-1)
    const length = Math.min(piece.length, stop - piece.offset)
    if (last && agrees(last, piece)) out[out.length - 1] = { ...last, length: last.length + length }
    else out.push(length === piece.length ? piece : { ...piece, length })
  }
  return out
}

function agrees(a: DiskExtent, b: DiskExtent): boolean {
  return (
    a.offset + a.length === b.offset &&
    a.kind === b.kind &&
    a.depth === b.depth &&
    a.present === b.present &&
    runsOn(a.at, a.length, b.at)
  )
}

function runsOn(a: HostPlace | undefined, length: number, b: HostPlace | undefined): boolean {
  if (!a || !b) return a === b
  return a.file === b.file && a.offset + length === b.offset
}

function cutPlan(plan: Plan, start: number, end: number): readonly DiskExtent[] {
  if (plan.start === start && plan.end === end) return plan.extents
  const { extents } = plan
  let low = 0
  let high = extents.length
  while (low < high) {
    const middle = (low + high) >>> 1
    if (extents[middle]!.offset + extents[middle]!.length > start) high = middle
    else low = middle + 1
  }
  const out: DiskExtent[] = []
  for (let index = low; index < extents.length && extents[index]!.offset < end; index++) {
    const extent = extents[index]!
    const from = Math.max(extent.offset, start)
    const to = Math.min(extent.offset + extent.length, end)
    out.push(
      to - from === extent.length
        ? extent
        : { ...cutExtent(extent, from, to), depth: extent.depth, present: extent.present },
    )
  }
  return out
}
