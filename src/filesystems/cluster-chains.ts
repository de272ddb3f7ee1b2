/**
 * Chains of clusters through a table of 32-, 16- or 12-bit entries, as FAT and exFAT keep them: for the audit,
 * which walks every directory and file.
 *
 * Rules: the table is read in pages, of which a bounded number is kept, so that memory does not grow with the
 * volume; every cluster is visited once, whatever loops or crosses, so that time does not grow with what a hostile
 * directory claims.
 */
import { assert, throwIfAborted } from '../base/index.ts'
import { type BlockDevice, readBytes } from '../device/index.ts'
import { Bitmap, type RangeSet } from '../extents/index.ts'

/** 3 * 2^14, so that no 12-bit entry is cut in two. */
const PAGE_BYTES = 49_152
const PAGES_KEPT = 256
/** Number of the first cluster of the data area. */
const FIRST_CLUSTER = 2

export interface ClusterTable {
  readonly device: BlockDevice
  /** Where entry 0 stands, bytes. */
  readonly start: number
  readonly bits: 12 | 16 | 32
  /** Clusters of the data area; they are numbered from 2. */
  readonly clusters: number
  /** Entries from this one on end a chain. */
  readonly endOfChain: number
  /** What an entry's bits stand for; FAT32 leaves four of them alone. */
  readonly mask: number
  /** What to throw when a chain leads to a number that is no cluster. */
  readonly refuse: (found: number) => Error
}

/** Marks which clusters have an owner. */
export class ChainWalk {
  readonly #table: ClusterTable
  readonly #owned: Bitmap
  readonly #pages = new Map<number, Uint8Array>()

  constructor(table: ClusterTable) {
    this.#table = table
    this.#owned = new Bitmap(table.clusters)
  }

  /** Cluster numbers less 2 that have an owner. */
  get owned(): RangeSet {
    return this.#owned.toRanges()
  }

  /**
   * Clusters of the chain from `first`, up to one that was visited before. An entry of 0 (free) ends the chain after
   * the cluster that it stands for: whether that is in use is what the audit asks.
   * @throws what `refuse` makes, for a number that is no cluster
   */
  async *chain(first: number, signal: AbortSignal | undefined): AsyncGenerator<number> {
    const { endOfChain } = this.#table
    for (let cluster = first; ; ) {
      throwIfAborted(signal)
      if (!this.#take(cluster)) return
      yield cluster
      cluster = await this.#entry(cluster, signal)
      if (cluster >= endOfChain || cluster === 0) return
    }
  }

  /** As `chain`, for `count` clusters that follow each other without asking the table. */
  *run(first: number, count: number): Generator<number> {
    for (let cluster = first; cluster < first + count; cluster++) {
      if (this.#take(cluster)) yield cluster
    }
  }

  /** False when it was taken before. */
  #take(cluster: number): boolean {
    if (cluster < FIRST_CLUSTER || cluster >= this.#table.clusters + FIRST_CLUSTER) {
      throw this.#table.refuse(cluster)
    }
    const index = cluster - FIRST_CLUSTER
    if (this.#owned.get(index)) return false
    this.#owned.set(index)
    return true
  }

  async #entry(cluster: number, signal: AbortSignal | undefined): Promise<number> {
    const { bits, mask } = this.#table
    const at = Math.floor((cluster * bits) / 8)
    const page = await this.#page(Math.floor(at / PAGE_BYTES), signal)
    const i = at % PAGE_BYTES
    const low = page[i]! | (page[i + 1]! << 8)
    if (bits === 12) return (cluster % 2 === 0 ? low : low >>> 4) & mask
    if (bits === 16) return low & mask
    return ((low | (page[i + 2]! << 16) | (page[i + 3]! << 24)) & mask) >>> 0
  }

  async #page(index: number, signal: AbortSignal | undefined): Promise<Uint8Array> {
    let page = this.#pages.get(index)
    if (page) return page
    const { device, start, bits, clusters } = this.#table
    const tableBytes = Math.ceil(((clusters + FIRST_CLUSTER) * bits) / 8)
    const from = index * PAGE_BYTES
    assert(from < tableBytes, 'entries stand in the table')
    page = await readBytes(device, start + from, Math.min(PAGE_BYTES, tableBytes - from), signal)
    if (this.#pages.size >= PAGES_KEPT) this.#pages.delete(this.#pages.keys().next().value!)
    this.#pages.set(index, page)
    return page
  }
}
