/**
 * Reads metadata: many places at once, sorted and joined, and puts the log over each as it is read.
 *
 * Rule: bytes that stand on disk as a block of this file system must keep their checksum before anything is laid
 * over them. What a replay has changed has no checksum until the kernel writes it back, so there it is not looked at.
 */
import { mapBounded, NotTrusted, uuidText } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { BB, blockLsn, crcMatches, type Superblock } from './layout.ts'
import type { LogPosition } from './log.ts'
import type { LogReplay } from './replay.ts'

const PARALLEL_READS = 8
/** Places at most this far apart are read together. */
const JOIN_BYTES = 4096
const MOST_JOINED_BYTES = 1 << 20
/** Raw bytes kept for the second look (before and after a replay). */
const MEMO_BYTES = 32 << 20

export interface Loaded {
  readonly offset: number
  readonly bytes: Uint8Array
  /** Some of the bytes come from the log. */
  readonly replayed: boolean
}

/** Where a v5 structure keeps what identifies it. -1: it has no such field. */
export interface Identity {
  readonly crcAt: number
  readonly uuidAt: number
  readonly blknoAt: number
}

export interface Place {
  readonly offset: number
  readonly length: number
}

export class BlockReader {
  readonly sb: Superblock
  readonly signal: AbortSignal | undefined
  readonly #device: BlockDevice
  /** Where the log ends: no block on disk can be younger. */
  readonly #logHead: LogPosition
  readonly #replay: LogReplay | undefined
  readonly #memo: Memo

  constructor(
    device: BlockDevice,
    sb: Superblock,
    options: {
      readonly logHead: LogPosition
      readonly replay?: LogReplay | undefined
      readonly memo?: Memo | undefined
      readonly signal?: AbortSignal | undefined
    },
  ) {
    this.#device = device
    this.sb = sb
    this.signal = options.signal
    this.#logHead = options.logHead
    this.#replay = options.replay
    this.#memo = options.memo ?? new Memo(0)
  }

  /** The bytes at each place, in the order asked for. Places lie in the file system (the caller has checked). */
  async read(places: readonly Place[]): Promise<Loaded[]> {
    const raw = await this.#raw(places)
    return places.map(({ offset }, i) => ({ offset, bytes: raw[i]!, replayed: false }))
  }

  /**
   * Lays the log over one structure, and checks on both sides of that what a checksum and an LSN can tell.
   * `magic`: what it must begin with to be judged on disk; a replay may be what makes it that structure.
   */
  finish(loaded: Loaded, identity: Identity, magic: number, what: string): Loaded {
    const { offset } = loaded
    const place = { offset, identity, magic }
    const wasOne = this.#identifies(loaded.bytes, place)
    if (wasOne && this.sb.version === 5) {
      if (!crcMatches(loaded.bytes, identity.crcAt))
        throw this.refuse('xfs-checksum', `a wrong checksum of ${what} at ${offset}`, 'the CRC-32C of it')
      this.#judgeLsn(loaded, what)
    }
    const bytes = this.#replay ? loaded.bytes.slice() : loaded.bytes
    const replayed = this.#replay?.apply(bytes, offset) ?? false
    if (replayed ? !this.#identifies(bytes, place) : !wasOne) {
      const when = replayed ? ' after the replay' : ''
      throw this.refuse('xfs-structure', `no ${what} at ${offset}${when}`, 'one with its uuid and address')
    }
    return { offset, bytes, replayed }
  }

  /** True where `bytes` say that they are such a structure, of this file system, for this place. */
  #identifies(
    bytes: Uint8Array,
    { offset, identity, magic }: { offset: number; identity: Identity; magic: number },
  ): boolean {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    if (view.getUint32(0) !== magic) return false
    if (this.sb.version === 4) return true
    const { uuidAt, blknoAt } = identity
    return (
      uuidText(bytes.subarray(uuidAt, uuidAt + 16)) === this.sb.metaUuid &&
      (blknoAt < 0 || view.getBigUint64(blknoAt) === BigInt(offset / BB))
    )
  }

  /** Lays the log over a structure that carries nothing to be known by (the AGFL of v4). */
  finishPlain(offset: number, raw: Uint8Array): Uint8Array {
    const bytes = raw.slice()
    this.#replay?.apply(bytes, offset)
    return bytes
  }

  refuse(reason: string, found: string, expected: string): NotTrusted {
    return new NotTrusted(reason, `Cannot use XFS metadata: found ${found}, expected ${expected}`, {
      kind: 'xfs',
      uuid: this.sb.uuid,
      label: this.sb.label || undefined,
    })
  }

  /** A block younger than the log was not frozen together with it, or one of the two was damaged. */
  #judgeLsn(loaded: Loaded, what: string): void {
    const lsn = blockLsn(loaded.bytes, this.sb)
    if (lsn === undefined) return
    const head = (BigInt(this.#logHead.cycle) << 32n) + BigInt(this.#logHead.block)
    if (lsn > head) {
      throw this.refuse(
        'xfs-newer-than-log',
        `${what} at ${loaded.offset} of lsn ${lsn >> 32n}:${lsn & 0xffffffffn}`,
        `at most the log's head ${this.#logHead.cycle}:${this.#logHead.block}`,
      )
    }
  }

  async #raw(places: readonly Place[]): Promise<Uint8Array[]> {
    const out: Uint8Array[] = []
    const missing: number[] = []
    for (const [i, place] of places.entries()) {
      const known = this.#memo.get(place)
      if (known) out[i] = known
      else missing.push(i)
    }
    missing.sort((a, b) => places[a]!.offset - places[b]!.offset)
    const runs: { start: number; end: number; members: number[] }[] = []
    for (const i of missing) {
      const { offset, length } = places[i]!
      const last = runs.at(-1)
      const end = offset + length
      if (last && offset - last.end <= JOIN_BYTES && end - last.start <= MOST_JOINED_BYTES) {
        last.end = Math.max(last.end, end)
        last.members.push(i)
      } else runs.push({ start: offset, end, members: [i] })
    }
    await mapBounded(runs, PARALLEL_READS, async ({ start, end, members }) => {
      const bytes = await readBytes(this.#device, start, end - start, this.signal)
      for (const i of members) {
        const { offset, length } = places[i]!
        out[i] = bytes.subarray(offset - start, offset - start + length)
        this.#memo.set(places[i]!, out[i])
      }
    })
    return out
  }
}

/** Raw bytes by offset, up to a limit; what comes later is not kept. */
export class Memo {
  readonly #most: number
  readonly #held = new Map<number, Uint8Array>()
  #bytes = 0

  constructor(most: number = MEMO_BYTES) {
    this.#most = most
  }

  get(place: Place): Uint8Array | undefined {
    const held = this.#held.get(place.offset)
    return held?.length === place.length ? held : undefined
  }

  set(place: Place, bytes: Uint8Array): void {
    if (this.#bytes + bytes.length > this.#most) return
    this.#held.set(place.offset, bytes)
    this.#bytes += bytes.length
  }
}
