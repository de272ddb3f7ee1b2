/**
 * Logical to physical: the chunks of a Btrfs, and which bytes of which device a range of logical addresses needs.
 *
 * Profiles: single, DUP, RAID1, RAID1C3, RAID1C4 have whole copies; RAID0 and RAID10 cut a chunk into stripes of
 * `stripeBytes`, dealt out in turn. RAID5/6 would also need parity rows: refused.
 */
import { NotTrusted } from '../../base/index.ts'
import { type RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import { type Chunk, PROFILE } from './layout.ts'

export interface Place {
  readonly devid: bigint
  readonly offset: number
  /** Bytes that run on there, at most what was asked for. */
  readonly length: number
}

export class ChunkMap {
  readonly #chunks: readonly Chunk[]

  /** @throws NotTrusted for chunks that overlap or have a profile that is not read */
  constructor(chunks: readonly Chunk[]) {
    this.#chunks = [...chunks].sort((a, b) => a.start - b.start)
    for (const [i, chunk] of this.#chunks.entries()) {
      const next = this.#chunks[i + 1]
      if (next && chunk.start + chunk.length > next.start) {
        throw new NotTrusted('btrfs-chunk-invalid', `Cannot use Btrfs chunks: found two at ${next.start}`)
      }
      striping(chunk) // throws for a profile that is not known
    }
  }

  get chunks(): readonly Chunk[] {
    return this.#chunks
  }

  /** Every copy of `length` bytes at `logical`; each copy may end early, where its stripe or chunk does. */
  copies(logical: number, length: number): Place[] {
    const chunk = this.#at(logical)
    if (!chunk)
      throw new NotTrusted('btrfs-address-invalid', `Cannot map Btrfs address ${logical}: no chunk holds it`)
    const within = logical - chunk.start
    const inChunk = Math.min(length, chunk.length - within)
    const { columns, copies } = striping(chunk)
    if (columns === 1) {
      return chunk.stripes.map((stripe) => ({
        devid: stripe.devid,
        offset: stripe.offset + within,
        length: inChunk,
      }))
    }
    const number = Math.floor(within / chunk.stripeBytes)
    const inStripe = within % chunk.stripeBytes
    const first = (number % columns) * copies
    const offset = Math.floor(number / columns) * chunk.stripeBytes + inStripe
    const run = Math.min(inChunk, chunk.stripeBytes - inStripe)
    return chunk.stripes
      .slice(first, first + copies)
      .map((stripe) => ({ devid: stripe.devid, offset: stripe.offset + offset, length: run }))
  }

  /** Physical bytes, per device, that hold `logical` ranges in any copy. @throws NotTrusted when no chunk holds some */
  project(logical: RangeSet): Map<bigint, RangeSet> {
    const builders = new Map<bigint, RangeSetBuilder>()
    for (const { start, end } of logical) {
      for (let at = start; at < end; ) {
        const places = this.copies(at, end - at)
        for (const { devid, offset, length } of places) {
          let builder = builders.get(devid)
          if (!builder) {
            builder = new RangeSetBuilder()
            builders.set(devid, builder)
          }
          builder.add(offset, offset + length)
        }
        at += places[0]!.length
      }
    }
    return new Map([...builders].map(([devid, builder]) => [devid, builder.build()]))
  }

  #at(logical: number): Chunk | undefined {
    let low = 0
    let high = this.#chunks.length
    while (low < high) {
      const middle = (low + high) >>> 1
      const chunk = this.#chunks[middle]!
      if (chunk.start + chunk.length > logical) high = middle
      else low = middle + 1
    }
    const chunk = this.#chunks[low]
    return chunk && chunk.start <= logical ? chunk : undefined
  }
}

/** How a chunk is dealt out: `columns` stripes side by side, each in `copies` copies. @throws NotTrusted */
function striping(chunk: Chunk): { columns: number; copies: number } {
  const count = chunk.stripes.length
  const profile = chunk.type & ~PROFILE.types & 0x7ff
  switch (profile) {
    case 0:
    case PROFILE.dup:
    case PROFILE.raid1:
    case PROFILE.raid1c3:
    case PROFILE.raid1c4:
      return { columns: 1, copies: count }
    case PROFILE.raid0:
      return { columns: count, copies: 1 }
    case PROFILE.raid10:
      return { columns: count / chunk.subStripes, copies: chunk.subStripes }
    case PROFILE.raid5:
    case PROFILE.raid6:
      throw new NotTrusted(
        'btrfs-raid56',
        'Cannot trust a Btrfs with RAID5/6 chunks: parity belongs to whole stripes',
      )
    default:
      throw new NotTrusted(
        'btrfs-chunk-invalid',
        `Cannot use Btrfs chunk at ${chunk.start}: found profile 0x${profile.toString(16)}`,
      )
  }
}
