/**
 * A qcow2 image opened for reading: one layer of a chain.
 *
 * Specification: QEMU's docs/interop/qcow2. Rules:
 * - Only this layer's own bytes: what it does not hold is `absent` and reads as zeros here; asking the backing
 *   file is the chain's business.
 * - A data extent carries the place in the host file where its bytes stand verbatim (not compressed clusters).
 * - Nothing is ever written, whatever the dirty and corrupt bits say. Dirty means stale refcounts, which reading
 *   does not use; corrupt means "do not write".
 */
import { mapBounded, throwIfAborted } from '../../base/index.ts'
import {
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
} from '../../device/index.ts'
import type { Extent, HostFile } from '../../extents/index.ts'
import { hostFileOf } from '../host-place.ts'
import type { BackingReference, FormatFacts, ImageLayer } from '../image-format.ts'
import { KIND, type Run } from './cluster-map.ts'
import { decompressCluster } from './compression.ts'
import type { Header, Snapshot } from './layout.ts'
import { type OpenedImage, openImage, type Qcow2OpenOptions } from './open-image.ts'

/** Extents of one answer. A caller asks on; an answer without bound would not fit into memory. */
const MOST_EXTENTS = 65_536
const PARALLEL_READS = 8
/** Decoding runs on Node's thread pool, which has four threads. */
const PARALLEL_DECODES = 4
/** Compressed clusters that stand closer than this are read in one go, … */
const COMPRESSED_GAP = 65_536
/** … up to this many bytes. */
const COMPRESSED_READ = 2_097_152
const DECODED_BYTES = 4_194_304

export class Qcow2Layer implements ImageLayer {
  readonly format = 'qcow2'
  readonly blockSize = 512
  readonly features: Features
  readonly backing: BackingReference | undefined
  readonly facts: FormatFacts
  readonly header: Header
  readonly snapshots: readonly Snapshot[]
  readonly size: number
  readonly #reader: ClusterReader
  readonly #image: OpenedImage
  #disposed = false

  private constructor(image: OpenedImage) {
    this.#image = image
    this.#reader = new ClusterReader(image)
    this.header = image.header
    this.snapshots = image.snapshots
    this.facts = image.facts
    this.size = image.size
    this.backing = backingOf(image.header)
    this.features = { write: false, resize: false, sparse: true, places: this.#reader.places }
  }

  /** Opens `file`, which the layer then owns; when it throws, the caller still does. */
  static async open(file: BlockDevice, options: Qcow2OpenOptions = {}): Promise<Qcow2Layer> {
    return new Qcow2Layer(await openImage(file, options))
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    checkRange(this.size, offset, into.length)
    await this.#reader.read(offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    checkExtentRange(this.size, offset, length)
    return await this.#reader.extents(offset, offset + length, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#disposed) return
    this.#disposed = true
    await disposeImage(this.#image)
  }
}

export function backingOf(header: Header): BackingReference | undefined {
  return header.backingName === undefined
    ? undefined
    : { name: header.backingName, format: header.backingFormat }
}

export async function disposeImage(image: Pick<OpenedImage, 'file' | 'data' | 'map'>): Promise<void> {
  image.map.tables.clear()
  try {
    if (image.data !== image.file) await image.data[Symbol.asyncDispose]()
  } finally {
    await image.file[Symbol.asyncDispose]()
  }
}

/** Reading and mapping over a cluster map: what the read-only and the writable layer share. */
export class ClusterReader {
  readonly #image: Pick<OpenedImage, 'file' | 'data' | 'map' | 'header'>
  readonly #hostFile: HostFile | undefined
  readonly #decoded: DecodedCache

  constructor(image: Pick<OpenedImage, 'file' | 'data' | 'map' | 'header'>) {
    this.#image = image
    this.#hostFile = hostFileOf(image.data)
    this.#decoded = new DecodedCache(image.header.clusterBytes)
  }

  get places(): boolean {
    return this.#hostFile !== undefined
  }

  async extents(offset: number, end: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    throwIfAborted(signal)
    const runs = await this.#image.map.runs(offset, end, MOST_EXTENTS, signal)
    const file = this.#hostFile
    const dataBytes = this.#image.data.size
    const list: Extent[] = []
    for (const run of runs) {
      if (run.kind === KIND.data) {
        // Cut where the file ends inside a cluster: what lacks there reads as zeros.
        const stored = Math.min(run.length, dataBytes - run.host)
        list.push(
          file
            ? { offset: run.offset, length: stored, kind: 'data', at: { file, offset: run.host } }
            : { offset: run.offset, length: stored, kind: 'data' },
        )
        if (stored < run.length) {
          list.push({ offset: run.offset + stored, length: run.length - stored, kind: 'zero' })
        }
        continue
      }
      const kind = run.kind === KIND.absent ? 'absent' : run.kind === KIND.zero ? 'zero' : 'data'
      const last = list.at(-1)
      if (last && last.kind === kind && !last.at) {
        list[list.length - 1] = { offset: last.offset, length: last.length + run.length, kind }
      } else list.push({ offset: run.offset, length: run.length, kind })
    }
    return list
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    throwIfAborted(signal)
    if (into.length === 0) return
    const runs = await this.#image.map.runs(offset, offset + into.length, Number.POSITIVE_INFINITY, signal)
    await this.readRuns(runs, offset, into, signal)
  }

  /** Fills `into`, which begins at guest `offset`, from runs that cover it. */
  async readRuns(
    runs: readonly Run[],
    offset: number,
    into: Uint8Array,
    signal?: AbortSignal,
  ): Promise<void> {
    const stored: Run[] = []
    const compressed: Run[] = []
    for (const run of runs) {
      if (run.kind === KIND.data) stored.push(run)
      else if (run.kind === KIND.compressed) compressed.push(run)
      else into.fill(0, run.offset - offset, run.offset - offset + run.length)
    }
    const part = (run: Run): Uint8Array =>
      into.subarray(run.offset - offset, run.offset - offset + run.length)
    if (stored.length === 1) await this.#readStored(stored[0]!, part(stored[0]!), signal)
    else if (stored.length > 1) {
      await mapBounded(stored, PARALLEL_READS, (run) => this.#readStored(run, part(run), signal))
    }
    if (compressed.length > 0) await this.#readCompressed(compressed, part, signal)
  }

  /** Forgets decoded clusters: the writer calls it for those that it replaces. */
  forget(clusterOffset: number): void {
    this.#decoded.delete(clusterOffset)
  }

  async #readStored(run: Run, into: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
    const { data } = this.#image
    const length = Math.min(into.length, data.size - run.host)
    await data.read(run.host, into.subarray(0, length), signal)
    into.fill(0, length)
  }

  async #readCompressed(
    runs: readonly Run[],
    part: (run: Run) => Uint8Array,
    signal: AbortSignal | undefined,
  ): Promise<void> {
    const { clusterBytes } = this.#image.header
    const missing: Run[] = []
    await mapBounded(runs, PARALLEL_DECODES, async (run) => {
      const start = run.offset - (run.offset % clusterBytes)
      const cached = this.#decoded.get(start)
      if (cached) part(run).set((await cached).subarray(run.offset - start, run.offset - start + run.length))
      else missing.push(run)
    })
    await mapBounded(groupsOf(missing), PARALLEL_DECODES, async (group) => {
      throwIfAborted(signal)
      const from = group[0]!.host
      const to = Math.min(
        group.reduce((end, run) => Math.max(end, run.host + run.hostLength), 0),
        this.#image.file.size,
      )
      const packed = new Uint8Array(to - from)
      await this.#image.file.read(from, packed, signal)
      await mapBounded(group, PARALLEL_DECODES, async (run) => {
        const start = run.offset - (run.offset % clusterBytes)
        const cluster = decompressCluster(
          this.#image.header.compression,
          packed.subarray(run.host - from, Math.min(run.host - from + run.hostLength, packed.length)),
          clusterBytes,
          start,
        )
        // A whole cluster is not asked for again soon; a part of one is what small sequential reads look like.
        if (run.length < clusterBytes) this.#decoded.set(start, cluster)
        part(run).set((await cluster).subarray(run.offset - start, run.offset - start + run.length))
      })
    })
  }
}

/** Compressed runs sorted by place and joined into reads. */
function groupsOf(runs: Run[]): Run[][] {
  runs.sort((a, b) => a.host - b.host)
  const groups: Run[][] = []
  let start = 0
  let end = 0
  for (const run of runs) {
    const group = groups.at(-1)
    if (group && run.host <= end + COMPRESSED_GAP && run.host + run.hostLength - start <= COMPRESSED_READ) {
      group.push(run)
      end = Math.max(end, run.host + run.hostLength)
    } else {
      groups.push([run])
      start = run.host
      end = run.host + run.hostLength
    }
  }
  return groups
}

/** A few decoded clusters, least recently used dropped first; calls that want the same one share its decoding. */
class DecodedCache {
  readonly #most: number
  readonly #clusters = new Map<number, Promise<Uint8Array>>()

  constructor(clusterBytes: number) {
    this.#most = Math.max(4, Math.floor(DECODED_BYTES / clusterBytes / 4))
  }

  get(offset: number): Promise<Uint8Array> | undefined {
    const cluster = this.#clusters.get(offset)
    if (cluster) {
      this.#clusters.delete(offset)
      this.#clusters.set(offset, cluster)
    }
    return cluster
  }

  set(offset: number, cluster: Promise<Uint8Array>): void {
    this.#clusters.delete(offset)
    this.#clusters.set(offset, cluster)
    cluster.catch(() => this.#clusters.delete(offset))
    if (this.#clusters.size > this.#most) {
      for (const oldest of this.#clusters.keys()) {
        this.#clusters.delete(oldest)
        break
      }
    }
  }

  delete(offset: number): void {
    this.#clusters.delete(offset)
  }
}
