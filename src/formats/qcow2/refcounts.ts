/**
 * Reference counts and the allocation of host clusters.
 *
 * Specification: QEMU's docs/interop/qcow2, "Host cluster management". Rules:
 * - In memory a count is changed at once; on disk only `writeBlocks` and `writeTable` change it, in the order
 *   that the writer's checkpoint gives (see qcow2-writer.ts). So on disk a count is never below the references
 *   that are there: a crash leaks clusters, it never shares them.
 * - Counts go up here at any time, but down only through `release`, which the writer calls when nothing on disk
 *   refers to the cluster any more.
 * - A missing refcount block is made in the first free cluster of its own range, where it counts itself; a
 *   refcount table that is too short is written anew behind everything it can count.
 */
import { VarveError } from '../../base/index.ts'
import { readBytes, type WritableBlockDevice } from '../../device/index.ts'
import { AT, checkTable, corrupt, type Header, MAX_REFCOUNT_TABLE_BYTES } from './layout.ts'
import { type Table, TableCache, writeTables } from './table-cache.ts'

const BLOCK_CACHE_BYTES = 8_388_608

/** A run of host clusters, in clusters. */
export interface ClusterRun {
  readonly start: number
  readonly count: number
}

/** Reads and sets one count in a refcount block: entries of 1 to 64 bits, below a byte from the low bit up. */
export function getCount(view: DataView, order: number, index: number): number {
  switch (order) {
    case 3:
      return view.getUint8(index)
    case 4:
      return view.getUint16(index * 2)
    case 5:
      return view.getUint32(index * 4)
    case 6: {
      const value = view.getBigUint64(index * 8)
      return value > BigInt(Number.MAX_SAFE_INTEGER) ? Number.MAX_SAFE_INTEGER : Number(value)
    }
    default: {
      const bits = 1 << order
      const at = index * bits
      return (view.getUint8(at >>> 3) >>> (at & 7)) & ((1 << bits) - 1)
    }
  }
}

export function setCount(view: DataView, order: number, index: number, count: number): void {
  switch (order) {
    case 3:
      return view.setUint8(index, count)
    case 4:
      return view.setUint16(index * 2, count)
    case 5:
      return view.setUint32(index * 4, count)
    case 6:
      return view.setBigUint64(index * 8, BigInt(count))
    default: {
      const bits = 1 << order
      const at = index * bits
      const mask = ((1 << bits) - 1) << (at & 7)
      view.setUint8(at >>> 3, (view.getUint8(at >>> 3) & ~mask) | (count << (at & 7)))
    }
  }
}

/** Largest count that an entry of `1 << order` bits holds. */
export function mostCount(order: number): number {
  return order === 6 ? Number.MAX_SAFE_INTEGER : 2 ** (1 << order) - 1
}

/** Refcount blocks' places by index; 0 where there is none. @throws CORRUPT */
export async function readRefcountTable(
  file: WritableBlockDevice | Parameters<typeof readBytes>[0],
  header: Pick<Header, 'refcountTableOffset' | 'refcountTableClusters' | 'clusterBytes'>,
  signal?: AbortSignal,
): Promise<Float64Array> {
  const { clusterBytes, refcountTableClusters, refcountTableOffset } = header
  const length = refcountTableClusters * clusterBytes
  checkTable({
    offset: refcountTableOffset,
    length,
    clusterBytes,
    fileBytes: file.size,
    what: 'refcount table',
  })
  const bytes = await readBytes(file, refcountTableOffset, length, signal)
  const view = new DataView(bytes.buffer)
  const table = new Float64Array(length / 8)
  for (let index = 0; index < table.length; index++) {
    const offset = view.getUint32(index * 8) * 0x1_0000_0000 + view.getUint32(index * 8 + 4)
    if (offset === 0) continue
    if (offset % clusterBytes !== 0 || offset < clusterBytes || offset + clusterBytes > file.size) {
      throw corrupt(`found refcount block ${index} at ${offset}, expected it aligned and inside the file`, {
        offset,
      })
    }
    table[index] = offset
  }
  return table
}

export class Refcounts {
  readonly #file: WritableBlockDevice
  readonly #clusterBytes: number
  readonly #order: number
  /** Counts in one block. */
  readonly #perBlock: number
  readonly #blocks: TableCache
  #table: Float64Array
  #tableOffset: number
  #tableDirty = false
  /** No cluster below this one is free, as far as we know. */
  #hint = 0
  /** Grows the file so that it holds this many bytes. */
  readonly #grow: (bytes: number) => Promise<void>
  /** What the writer knows to stand in a cluster, whatever its count says. */
  readonly #holds: (cluster: number) => string | undefined
  /** Clusters that are refcount blocks. */
  readonly #blockClusters = new Set<number>()
  /** Clusters of a former refcount table, for the writer to release after its next checkpoint. */
  readonly replaced: ClusterRun[] = []

  constructor(parts: {
    file: WritableBlockDevice
    header: Header
    table: Float64Array
    grow: (bytes: number) => Promise<void>
    holds: (cluster: number) => string | undefined
  }) {
    this.#file = parts.file
    this.#clusterBytes = parts.header.clusterBytes
    this.#order = parts.header.refcountOrder
    this.#perBlock = (this.#clusterBytes * 8) / 2 ** this.#order
    this.#blocks = new TableCache(parts.file, this.#clusterBytes, BLOCK_CACHE_BYTES)
    this.#table = parts.table
    this.#tableOffset = parts.header.refcountTableOffset
    this.#grow = parts.grow
    this.#holds = parts.holds
    for (const offset of parts.table) if (offset !== 0) this.#blockClusters.add(offset / this.#clusterBytes)
  }

  get dirtyBytes(): number {
    return this.#blocks.dirtyBytes
  }

  get most(): number {
    return mostCount(this.#order)
  }

  get tableOffset(): number {
    return this.#tableOffset
  }

  get tableClusters(): number {
    return (this.#table.length * 8) / this.#clusterBytes
  }

  async get(cluster: number): Promise<number> {
    const block = await this.#block(cluster)
    return block ? getCount(block.view, this.#order, cluster % this.#perBlock) : 0
  }

  /**
   * Up to `want` free clusters that stand side by side, at least one; their counts are 1 now.
   * @throws NO_SPACE, IO, CORRUPT
   */
  async allocate(want: number): Promise<ClusterRun> {
    const run = await this.#freeRun(want, 1)
    await this.#grow((run.start + run.count) * this.#clusterBytes)
    await this.#setRun(run, 1)
    this.#hint = run.start + run.count
    return run
  }

  /** Exactly `count` clusters side by side: tables that have to be contiguous. */
  async allocateContiguous(count: number): Promise<ClusterRun> {
    const run = await this.#freeRun(count, count)
    await this.#grow((run.start + run.count) * this.#clusterBytes)
    await this.#setRun(run, 1)
    return run
  }

  /** One more reference. @throws LIMIT when the entry is too narrow to count it */
  async add(cluster: number): Promise<void> {
    const count = await this.get(cluster)
    if (count >= this.most) {
      throw new VarveError('LIMIT', `Cannot count one more reference to cluster ${cluster}: found ${count}`)
    }
    await this.#setRun({ start: cluster, count: 1 }, count + 1)
  }

  /** One reference less. Returns what is left. @throws CORRUPT when there was none */
  async release(cluster: number): Promise<number> {
    const count = await this.get(cluster)
    if (count === 0) {
      throw new VarveError(
        'CORRUPT',
        `Cannot free cluster ${cluster}: found refcount 0, expected at least 1`,
        {
          fields: { cluster },
          hint: 'Run `varve check`; the image refers to a cluster that it counts as free.',
        },
      )
    }
    await this.#setRun({ start: cluster, count: 1 }, count - 1)
    if (count === 1) this.#hint = Math.min(this.#hint, cluster)
    return count - 1
  }

  /** Sets a count to what it has to be: repair. */
  async set(cluster: number, count: number): Promise<void> {
    await this.#setRun({ start: cluster, count: 1 }, count)
    if (count === 0) this.#hint = Math.min(this.#hint, cluster)
  }

  /** Checkpoint: the changed blocks. */
  async writeBlocks(signal?: AbortSignal): Promise<void> {
    await writeTables(this.#file, this.#blocks, signal)
  }

  /** True when blocks were added that the table on disk does not name yet. */
  get tableDirty(): boolean {
    return this.#tableDirty
  }

  /** Checkpoint: the table; every block that it names is on disk by then. */
  async writeTable(): Promise<void> {
    await this.#file.write(this.#tableOffset, this.#encodeTable())
    this.#tableDirty = false
  }

  /** The first run of free clusters with at least `least` and at most `most`; its blocks exist. */
  async #freeRun(most: number, least: number): Promise<ClusterRun> {
    let at = this.#hint
    let start = at
    let count = 0
    for (;;) {
      const index = Math.floor(at / this.#perBlock)
      if (index >= this.#table.length) {
        if (count >= least) return { start, count }
        await this.#growTable()
        count = 0
        continue
      }
      const block = await this.#block(at)
      if (!block) {
        if (count >= least) return { start, count }
        if (count > 0) {
          // In the middle of a run that has to go on: the new block takes the run's first cluster instead.
          await this.#addBlock(index, start)
          start += 1
          count -= 1
          continue
        }
        // The new block takes the first cluster of its own range: all of it is free.
        await this.#addBlock(index, at)
        at += 1
        continue
      }
      const end = (index + 1) * this.#perBlock
      while (at < end) {
        if (getCount(block.view, this.#order, at % this.#perBlock) === 0) {
          this.#refuseHeld(at)
          if (count === 0) start = at
          count += 1
          at += 1
          if (count === most) return { start, count }
        } else {
          if (count >= least) return { start, count }
          count = 0
          at += 1
        }
      }
    }
  }

  /** A table whose cluster is counted as free would be overwritten: such an image is not written to. */
  #refuseHeld(cluster: number): void {
    const what = this.#blockClusters.has(cluster) ? 'a refcount block' : this.#holds(cluster)
    if (what === undefined) return
    throw new VarveError(
      'CORRUPT',
      `Cannot allocate cluster ${cluster}: found ${what} in it, expected what its refcount 0 says`,
      { fields: { cluster }, hint: 'Run `varve check --repair` before the image is written to again.' },
    )
  }

  async #block(cluster: number): Promise<Table | undefined> {
    const offset = this.#table[Math.floor(cluster / this.#perBlock)] ?? 0
    if (offset === 0) return undefined
    return await this.#blocks.get(offset)
  }

  async #addBlock(index: number, cluster: number): Promise<void> {
    this.#refuseHeld(cluster)
    await this.#grow((cluster + 1) * this.#clusterBytes)
    this.#blockClusters.add(cluster)
    this.#blocks.add(cluster * this.#clusterBytes)
    this.#table[index] = cluster * this.#clusterBytes
    this.#tableDirty = true
    await this.#setRun({ start: cluster, count: 1 }, 1)
  }

  async #setRun(run: ClusterRun, count: number): Promise<void> {
    let at = run.start
    while (at < run.start + run.count) {
      const index = Math.floor(at / this.#perBlock)
      const block = await this.#block(at)
      if (!block) throw corrupt(`found no refcount block for cluster ${at}`, { cluster: at })
      const end = Math.min(run.start + run.count, (index + 1) * this.#perBlock)
      for (; at < end; at++) setCount(block.view, this.#order, at % this.#perBlock, count)
      this.#blocks.markDirty(block)
    }
  }

  /**
   * A longer refcount table, behind everything that the present one can count: first the blocks that count it,
   * then its own clusters. Written and switched to at once: blocks -> flush -> table -> flush -> header -> flush.
   */
  async #growTable(): Promise<void> {
    const oldEntries = this.#table.length
    const first = oldEntries * this.#perBlock
    const perCluster = this.#clusterBytes / 8
    let blocks = 1
    let tableClusters = 0
    for (;;) {
      const entries = Math.max(oldEntries + blocks, Math.ceil(oldEntries * 1.5))
      tableClusters = Math.ceil(entries / perCluster)
      const needed = Math.ceil((blocks + tableClusters) / this.#perBlock)
      if (needed <= blocks) break
      blocks = needed
    }
    if (tableClusters * this.#clusterBytes > MAX_REFCOUNT_TABLE_BYTES) {
      throw new VarveError(
        'LIMIT',
        `Cannot grow qcow2 image: found a refcount table of ${oldEntries * 8} bytes, expected at most ${MAX_REFCOUNT_TABLE_BYTES}`,
        { hint: 'Convert the image to one with larger clusters.' },
      )
    }
    const end = first + blocks + tableClusters
    await this.#grow(end * this.#clusterBytes)
    const table = new Float64Array(tableClusters * perCluster)
    table.set(this.#table)
    for (let i = 0; i < blocks; i++) {
      const place = (first + i) * this.#clusterBytes
      this.#blocks.add(place)
      this.#blockClusters.add(first + i)
      table[oldEntries + i] = place
    }
    const old: ClusterRun = {
      start: this.#tableOffset / this.#clusterBytes,
      count: this.tableClusters,
    }
    this.#table = table
    await this.#setRun({ start: first, count: end - first }, 1)
    await this.writeBlocks()
    await this.#file.flush()
    const offset = (first + blocks) * this.#clusterBytes
    await this.#file.write(offset, this.#encodeTable())
    await this.#file.flush()
    const header = new DataView(new ArrayBuffer(12))
    header.setBigUint64(0, BigInt(offset))
    header.setUint32(8, tableClusters)
    await this.#file.write(AT.refcountTableOffset, new Uint8Array(header.buffer))
    await this.#file.flush()
    this.#tableOffset = offset
    this.#tableDirty = false
    this.replaced.push(old)
  }

  #encodeTable(): Uint8Array {
    const view = new DataView(new ArrayBuffer(this.#table.length * 8))
    this.#table.forEach((offset, index) => view.setBigUint64(index * 8, BigInt(offset)))
    return new Uint8Array(view.buffer)
  }
}
