/**
 * Mappings: how the bytes of a volume are dealt out over the members of its group. LVM2, md and LDM share them.
 *
 * A mapping answers two questions: where to read a byte (one copy of it), and what must be kept for a set of bytes
 * (every copy; with parity, whole stripe rows: a row with some data in use needs its parity, and parity is computed
 * over all of the row). Mappings nest: what a column of a stripe set is made of is a mapping again, down to members.
 *
 * Rule: `project` never answers less than what a reader of the restored members needs, however degraded the array.
 */
import { assert, NotTrusted } from '../base/index.ts'
import { type BlockDevice, checkRange, type Features } from '../device/index.ts'
import { type Extent, type RangeSet, RangeSetBuilder } from '../extents/index.ts'

export interface Located {
  /** Index of the member; undefined: reads as zeros. */
  readonly member: number | undefined
  readonly offset: number
  /** At most what was asked for; more than 0. */
  readonly length: number
}

export interface Mapping {
  readonly size: number
  /** One copy of the bytes from `at`, `at < size`; at most `most` of them. */
  locate(at: number, most: number): Located
  /** Adds to `into[member]` all that must be kept for the bytes `used` of this mapping. */
  project(used: RangeSet, into: readonly RangeSetBuilder[]): void
}

/** `[start, start + size)` of a member. */
export function onMember(member: number, start: number, size: number): Mapping {
  return {
    size,
    locate: (at, most) => ({ member, offset: start + at, length: Math.min(most, size - at) }),
    project: (used, into) => void into[member]!.addAll(used.clip(0, size).shift(start)),
  }
}

/** `[start, start + size)` of another mapping. */
export function part(inner: Mapping, start: number, size: number): Mapping {
  assert(start >= 0 && start + size <= inner.size, 'a part lies inside its mapping')
  if (start === 0 && size === inner.size) return inner
  return {
    size,
    locate: (at, most) => inner.locate(start + at, Math.min(most, size - at)),
    project: (used, into) => inner.project(used.clip(0, size).shift(start), into),
  }
}

/** Mappings one after another. */
export function concat(parts: readonly Mapping[]): Mapping {
  if (parts.length === 1) return parts[0]!
  const starts: number[] = []
  let size = 0
  for (const one of parts) {
    starts.push(size)
    size += one.size
  }
  return {
    size,
    locate: (at, most) => {
      let low = 0
      let high = parts.length - 1
      while (low < high) {
        const middle = (low + high + 1) >>> 1
        if (starts[middle]! <= at) low = middle
        else high = middle - 1
      }
      return parts[low]!.locate(at - starts[low]!, Math.min(most, starts[low]! + parts[low]!.size - at))
    },
    project: (used, into) => {
      for (const [i, one] of parts.entries())
        one.project(used.clip(starts[i]!, starts[i]! + one.size).shift(-starts[i]!), into)
    },
  }
}

/** The same bytes on every leg; the first is read, so it must be in sync. */
export function mirrored(legs: readonly Mapping[]): Mapping {
  const size = Math.min(...legs.map((leg) => leg.size))
  return {
    size,
    locate: (at, most) => legs[0]!.locate(at, Math.min(most, size - at)),
    project: (used, into) => {
      for (const leg of legs) leg.project(used.clip(0, size), into)
    },
  }
}

/** Chunks dealt out in turn: RAID0 and LVM stripes. */
export function striped(columns: readonly Mapping[], chunkBytes: number): Mapping {
  const depth = Math.min(...columns.map((column) => column.size))
  const size = Math.floor(depth / chunkBytes) * chunkBytes * columns.length
  const place = (chunk: number): { column: number; base: number } => ({
    column: chunk % columns.length,
    base: Math.floor(chunk / columns.length) * chunkBytes,
  })
  return {
    size,
    locate: (at, most) => {
      const { column, base } = place(Math.floor(at / chunkBytes))
      const inside = at % chunkBytes
      return columns[column]!.locate(base + inside, Math.min(most, chunkBytes - inside, size - at))
    },
    project: (used, into) => {
      const builders = columns.map(() => new RangeSetBuilder())
      for (const { start, end } of used.clip(0, size)) {
        for (let at = start; at < end; at += chunkBytes - (at % chunkBytes)) {
          const { column, base } = place(Math.floor(at / chunkBytes))
          const inside = at % chunkBytes
          builders[column]!.add(base + inside, base + Math.min(chunkBytes, inside + end - at))
        }
      }
      for (const [i, column] of columns.entries()) column.project(builders[i]!.build(), into)
    },
  }
}

/** Chunks in `copies` near copies, over any number of members: RAID10, layout near. */
export function striped10(columns: readonly Mapping[], chunkBytes: number, copies: number): Mapping {
  const depth = Math.floor(Math.min(...columns.map((column) => column.size)) / chunkBytes)
  const size = Math.floor((depth * columns.length) / copies) * chunkBytes
  const place = (chunk: number, copy: number): { column: number; base: number } => {
    const slot = chunk * copies + copy
    return { column: slot % columns.length, base: Math.floor(slot / columns.length) * chunkBytes }
  }
  return {
    size,
    locate: (at, most) => {
      const { column, base } = place(Math.floor(at / chunkBytes), 0)
      const inside = at % chunkBytes
      return columns[column]!.locate(base + inside, Math.min(most, chunkBytes - inside, size - at))
    },
    project: (used, into) => {
      const builders = columns.map(() => new RangeSetBuilder())
      for (const { start, end } of used.clip(0, size)) {
        for (let at = start; at < end; at += chunkBytes - (at % chunkBytes)) {
          const inside = at % chunkBytes
          for (let copy = 0; copy < copies; copy++) {
            const { column, base } = place(Math.floor(at / chunkBytes), copy)
            builders[column]!.add(base + inside, base + Math.min(chunkBytes, inside + end - at))
          }
        }
      }
      for (const [i, column] of columns.entries()) column.project(builders[i]!.build(), into)
    },
  }
}

/** Where the parity of a row stands and how data goes around it, as Linux md numbers the layouts. */
export type ParityLayout =
  | 'left-asymmetric'
  | 'right-asymmetric'
  | 'left-symmetric'
  | 'right-symmetric'
  | 'parity-first'
  | 'parity-last'
  | 'zero-restart'
  | 'n-restart'
  | 'n-continue'

/** RAID4, RAID5 (`parity` 1) and RAID6 (2). */
export function parityStriped(
  columns: readonly Mapping[],
  chunkBytes: number,
  parity: 1 | 2,
  layout: ParityLayout,
): Mapping {
  const count = columns.length
  const dataColumns = count - parity
  const rows = Math.floor(Math.min(...columns.map((column) => column.size)) / chunkBytes)
  const rowBytes = dataColumns * chunkBytes
  const size = rows * rowBytes
  return {
    size,
    locate: (at, most) => {
      const row = Math.floor(at / rowBytes)
      const column = dataColumn(row, Math.floor((at % rowBytes) / chunkBytes), count, parity, layout)
      const inside = at % chunkBytes
      return columns[column]!.locate(row * chunkBytes + inside, Math.min(most, chunkBytes - inside))
    },
    project: (used, into) => {
      const rowsUsed = used.clip(0, size).coarsen(rowBytes)
      const builder = new RangeSetBuilder()
      for (const { start, end } of rowsUsed)
        builder.add((start / rowBytes) * chunkBytes, (end / rowBytes) * chunkBytes)
      const ranges = builder.build()
      for (const column of columns) column.project(ranges, into)
    },
  }
}

/** Column of data chunk `index` of a row, as Linux md deals them out; the default is `parity-last`. */
function dataColumn(row: number, index: number, count: number, parity: 1 | 2, layout: ParityLayout): number {
  const last = count - 1
  const around = (p: number): number => {
    // Data in order of the columns, around P at p (and Q behind it).
    if (parity === 1) return index >= p ? index + 1 : index
    if (p === last) return index + 1
    return index >= p ? index + 2 : index
  }
  switch (layout) {
    case 'left-asymmetric':
      return around(last - (row % count))
    case 'right-asymmetric':
    case 'zero-restart':
      return around(row % count)
    case 'n-restart':
      return around(last - ((row + 1) % count))
    case 'left-symmetric':
      return (last - (row % count) + parity + index) % count
    case 'right-symmetric':
      return ((row % count) + parity + index) % count
    case 'n-continue':
      return (last - (row % count) + 1 + index) % count
    case 'parity-first':
      return index + parity
    default:
      return index
  }
}

/** A volume put together from pieces of another one; what no piece covers reads as zeros (thin volumes). */
export function scattered(
  inner: Mapping,
  size: number,
  pieces: readonly { readonly at: number; readonly offset: number; readonly length: number }[],
): Mapping {
  const sorted = [...pieces].sort((a, b) => a.at - b.at)
  for (const [i, piece] of sorted.entries()) {
    const before = sorted[i - 1]
    if ((before && before.at + before.length > piece.at) || piece.offset + piece.length > inner.size) {
      throw new NotTrusted(
        'volume-mapping-invalid',
        `Cannot use the mapping of a volume: found pieces that overlap or leave it at ${piece.at}`,
      )
    }
  }
  const after = (at: number): number => {
    let low = 0
    let high = sorted.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if (sorted[middle]!.at + sorted[middle]!.length > at) high = middle
      else low = middle + 1
    }
    return low
  }
  return {
    size,
    locate: (at, most) => {
      const piece = sorted[after(at)]
      const room = Math.min(most, size - at)
      if (!piece || piece.at > at)
        return { member: undefined, offset: 0, length: Math.min(room, (piece?.at ?? size) - at) }
      const inside = at - piece.at
      return inner.locate(piece.offset + inside, Math.min(room, piece.length - inside))
    },
    project: (used, into) => {
      const builder = new RangeSetBuilder()
      for (const { start, end } of used.clip(0, size)) {
        for (let i = after(start); i < sorted.length && sorted[i]!.at < end; i++) {
          const piece = sorted[i]!
          const from = Math.max(start, piece.at)
          const to = Math.min(end, piece.at + piece.length)
          builder.add(piece.offset + from - piece.at, piece.offset + to - piece.at)
        }
      }
      inner.project(builder.build(), into)
    },
  }
}

/** `front` where `pieces` say so, `back` elsewhere: a snapshot and its origin. */
export function overlaid(back: Mapping, front: Mapping, covered: RangeSet): Mapping {
  const { size } = back
  return {
    size,
    locate: (at, most) => {
      const index = covered.indexAfter(at)
      const start = index < covered.count ? covered.startAt(index) : size
      if (start <= at) return front.locate(at, Math.min(most, covered.endAt(index) - at, size - at))
      return back.locate(at, Math.min(most, start - at, size - at))
    },
    project: (used, into) => {
      back.project(used.subtract(covered), into)
      front.project(used.intersect(covered), into)
    },
  }
}

/** What `used` bytes of a mapping need, one set per member. */
export function projected(mapping: Mapping, used: RangeSet, members: number): readonly RangeSet[] {
  const builders = Array.from({ length: members }, () => new RangeSetBuilder())
  mapping.project(used, builders)
  return builders.map((builder) => builder.build())
}

/** A mapping as a device. Borrows the members. */
export class MappedDevice implements BlockDevice {
  readonly size: number
  readonly blockSize: number
  readonly features: Features = { write: false, resize: false, sparse: false, places: false }
  readonly #mapping: Mapping
  readonly #members: readonly BlockDevice[]

  /** `size`: at most that of the mapping. */
  constructor(mapping: Mapping, members: readonly BlockDevice[], size: number = mapping.size) {
    assert(size <= mapping.size, 'a device is not larger than its mapping')
    this.#mapping = mapping
    this.#members = members
    this.size = size
    this.blockSize = Math.max(512, ...members.map((member) => member.blockSize))
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkRange(this.size, offset, into.length)
    for (let done = 0; done < into.length; ) {
      const { member, offset: at, length } = this.#mapping.locate(offset + done, into.length - done)
      const piece = into.subarray(done, done + length)
      if (member === undefined) piece.fill(0)
      else await this.#members[member]!.read(at, piece, signal)
      done += length
    }
  }

  async extents(offset: number, length: number): Promise<readonly Extent[]> {
    checkRange(this.size, offset, length)
    return [{ offset, length, kind: 'data' }]
  }

  async [Symbol.asyncDispose](): Promise<void> {}
}
