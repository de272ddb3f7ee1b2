/**
 * Clusters that hold tables (L2 tables, refcount blocks), read in bulk and kept in bounded memory.
 *
 * Rules:
 * - One load call sorts what is missing by its place in the file, joins neighbours into large reads and runs
 *   several of them at a time. Two calls that miss the same table share one read.
 * - A clean table may be dropped at any moment, a dirty one never: whoever changes a table marks it, and the
 *   writer's checkpoint writes it and marks it clean. So a table that was changed is found here until it is
 *   on disk, and a reader never sees an older state than a writer left.
 */
import { assert, LIMITS, mapBounded } from '../../base/index.ts'
import type { BlockDevice, WritableBlockDevice } from '../../device/index.ts'

/** Reads are joined up to this many bytes. */
const JOINED_BYTES = 2_097_152
const PARALLEL_READS = 8
/** The L1 table may take the other half of what a layer may hold. */
export const TABLE_CACHE_BYTES: number = LIMITS.tableCacheBytes / 2

export interface Table {
  /** Place in the file, in bytes. */
  readonly offset: number
  readonly bytes: Uint8Array
  readonly view: DataView
  dirty: boolean
}

export function tableOf(offset: number, bytes: Uint8Array, dirty = false): Table {
  return { offset, bytes, view: new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), dirty }
}

export class TableCache {
  readonly #file: BlockDevice
  readonly #tableBytes: number
  readonly #limit: number
  /** Least recently used first: a hit is put back at the end. */
  readonly #tables = new Map<number, Table>()
  readonly #underWay = new Map<number, Promise<Table>>()
  #dirty = new Set<Table>()

  constructor(file: BlockDevice, tableBytes: number, limit: number = TABLE_CACHE_BYTES) {
    this.#file = file
    this.#tableBytes = tableBytes
    this.#limit = Math.max(8, Math.floor(limit / tableBytes))
  }

  /** Tables that one `load` may ask for without pushing out its own. */
  get capacity(): number {
    return this.#limit
  }

  get dirtyBytes(): number {
    return this.#dirty.size * this.#tableBytes
  }

  /** Dirty tables in the order of their places. */
  get dirtyTables(): Table[] {
    return [...this.#dirty].sort((a, b) => a.offset - b.offset)
  }

  /** A table that is in memory, without asking the file. */
  peek(offset: number): Table | undefined {
    const table = this.#tables.get(offset)
    if (table) {
      this.#tables.delete(offset)
      this.#tables.set(offset, table)
    }
    return table
  }

  async get(offset: number, signal?: AbortSignal): Promise<Table> {
    return this.peek(offset) ?? (await this.load([offset], signal))[0]!
  }

  /** The tables at `offsets` (checked by the caller: aligned, inside the file), in the same order. */
  async load(offsets: readonly number[], signal?: AbortSignal): Promise<Table[]> {
    const missing: number[] = []
    const waits = new Map<number, Promise<Table>>()
    const found = new Map<number, Table>()
    for (const offset of offsets) {
      const table = this.peek(offset)
      if (table) found.set(offset, table)
      else {
        const underWay = this.#underWay.get(offset)
        if (underWay) waits.set(offset, underWay)
        else missing.push(offset)
      }
    }
    if (missing.length > 0) await this.#read(missing, found, signal)
    for (const [offset, wait] of waits) {
      found.set(offset, await wait.catch(() => this.get(offset, signal)))
    }
    return offsets.map((offset) => found.get(offset)!)
  }

  /** Puts a new table in; nothing of it is on disk yet. */
  add(offset: number): Table {
    const table = tableOf(offset, new Uint8Array(this.#tableBytes))
    this.#tables.delete(offset)
    this.#tables.set(offset, table)
    this.markDirty(table)
    return table
  }

  markDirty(table: Table): void {
    const present = this.#tables.get(table.offset)
    assert(!present || present === table, 'one copy of a table is in memory')
    if (!present) this.#tables.set(table.offset, table)
    table.dirty = true
    this.#dirty.add(table)
  }

  markClean(table: Table): void {
    table.dirty = false
    this.#dirty.delete(table)
    this.#trim()
  }

  /** Forgets a table whose cluster is given back. */
  drop(offset: number): void {
    const table = this.#tables.get(offset)
    if (table) this.#dirty.delete(table)
    this.#tables.delete(offset)
  }

  clear(): void {
    this.#tables.clear()
    this.#dirty = new Set()
  }

  async #read(missing: number[], found: Map<number, Table>, signal: AbortSignal | undefined): Promise<void> {
    const bytes = this.#tableBytes
    missing.sort((a, b) => a - b)
    const groups: number[][] = []
    for (const offset of missing) {
      const group = groups.at(-1)
      const last = group?.at(-1)
      if (last === offset) continue
      if (group && last! + bytes === offset && group.length * bytes < JOINED_BYTES) group.push(offset)
      else groups.push([offset])
    }
    const whole = mapBounded(groups, PARALLEL_READS, async (group) => {
      const into = new Uint8Array(group.length * bytes)
      await this.#file.read(group[0]!, into, signal)
      return group.map((offset, index) => {
        // Copied out of a joined read: a view would keep all of it in memory as long as one table lives.
        const own = group.length === 1 ? into : into.slice(index * bytes, (index + 1) * bytes)
        const table = this.#tables.get(offset) ?? tableOf(offset, own)
        this.#tables.set(offset, table)
        found.set(offset, table)
        return table
      })
    })
    for (const offset of missing) {
      const mine = whole.then(() => found.get(offset)!)
      mine.catch(() => {})
      this.#underWay.set(offset, mine)
    }
    try {
      await whole
    } finally {
      for (const offset of missing) this.#underWay.delete(offset)
    }
    this.#trim()
  }

  #trim(): void {
    if (this.#tables.size <= this.#limit) return
    for (const [offset, table] of this.#tables) {
      if (table.dirty) continue
      this.#tables.delete(offset)
      if (this.#tables.size <= this.#limit) return
    }
  }
}

/** Writes every dirty table of `cache`, neighbours in one go, and marks them clean. */
export async function writeTables(
  file: WritableBlockDevice,
  cache: TableCache,
  signal?: AbortSignal,
): Promise<void> {
  const groups: Table[][] = []
  for (const table of cache.dirtyTables) {
    const group = groups.at(-1)
    const last = group?.at(-1)
    if (
      last &&
      last.offset + last.bytes.length === table.offset &&
      group!.length * table.bytes.length < JOINED_BYTES
    ) {
      group!.push(table)
    } else groups.push([table])
  }
  await mapBounded(groups, PARALLEL_READS, async (group) => {
    const bytes = group.length === 1 ? group[0]!.bytes : Buffer.concat(group.map((table) => table.bytes))
    await file.write(group[0]!.offset, bytes, signal)
    for (const table of group) cache.markClean(table)
  })
}
