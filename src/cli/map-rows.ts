/**
 * Rows of `varve map`: the disk's extents, cut at the bounds of what is in use and marked, neighbours that agree
 * joined again.
 *
 * Rule: whatever goes in covers `[0, size)`, and what comes out covers the same, without gap or overlap.
 */
import type { MapEntry } from '../chain/index.ts'
import type { RangeSet } from '../extents/index.ts'

export interface MapRow extends MapEntry {
  /** Needed by the guest's file systems; set when asked for. */
  readonly inUse?: boolean
  /** Some layer holds it, as data or as zeros; set when asked for. */
  readonly allocated?: boolean
}

export interface RowMarks {
  readonly inUse?: RangeSet | undefined
  readonly allocated?: boolean | undefined
}

export async function* mapRows(entries: AsyncIterable<MapEntry>, marks: RowMarks): AsyncGenerator<MapRow> {
  let held: MapRow | undefined
  for await (const entry of entries) {
    for (const row of cut(entry, marks)) {
      if (held && agrees(held, row)) {
        held = { ...held, length: held.length + row.length }
        continue
      }
      if (held) yield held
      held = row
    }
  }
  if (held) yield held
}

function* cut(entry: MapEntry, { inUse, allocated }: RowMarks): Generator<MapRow> {
  const whole: MapRow = allocated ? { ...entry, allocated: entry.present } : entry
  if (!inUse) {
    yield whole
    return
  }
  const end = entry.start + entry.length
  let at = entry.start
  for (let i = inUse.indexAfter(at); i < inUse.count && inUse.startAt(i) < end; i++) {
    const from = Math.max(inUse.startAt(i), at)
    const to = Math.min(inUse.endAt(i), end)
    if (at < from) yield part(whole, at, from, false)
    yield part(whole, from, to, true)
    at = to
  }
  if (at < end) yield part(whole, at, end, false)
}

function part(row: MapRow, start: number, end: number, inUse: boolean): MapRow {
  const cut = { ...row, start, length: end - start, inUse }
  return row.offset === undefined ? cut : { ...cut, offset: row.offset + (start - row.start) }
}

function agrees(a: MapRow, b: MapRow): boolean {
  return (
    a.depth === b.depth &&
    a.present === b.present &&
    a.zero === b.zero &&
    a.data === b.data &&
    a.inUse === b.inUse &&
    a.file === b.file &&
    (a.offset === undefined ? b.offset === undefined : a.offset + a.length === b.offset)
  )
}
