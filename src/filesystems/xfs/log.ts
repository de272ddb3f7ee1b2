/**
 * The log as a circular array of 512-byte blocks: where its head and tail are, whether it was closed by an unmount,
 * and its records between tail and head in order.
 *
 * The log is written round and round. The first word of every block is the number of the round (the *cycle*), so
 * the head, where the next record will go, is where the cycle falls from c to c - 1:
 *
 *     block    0                    head                    last
 *     cycle    c   c   c   c   c  | c-1   c-1   c-1   c-1   c-1
 *
 * and is found by bisection. Up to eight records are in flight at a time and may reach the disk in any order, so
 * before the head there can be a hole that still shows c - 1. Whatever follows a hole was never acknowledged, and
 * log recovery takes the hole as the head. We find holes while walking the records from tail to head, instead of
 * scanning the 2 MiB before the head as the kernel does: the tail that a record names is durable before that record
 * is written, so a hole is never before it, and every block between is looked at anyway.
 *
 * A log is clean when its last record holds one operation that says "unmount". That record is written alone, after
 * everything before it is on disk, so in front of it no hole is looked for.
 *
 * Rule: a record that is neither whole nor a hole near the head, or whose checksum is wrong, makes the log useless:
 * NotTrusted.
 */
import { NotTrusted, throwIfAborted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import {
  BB,
  blockCycle,
  decodeOperation,
  decodeRecordHeader,
  LOG_MAGIC,
  MAX_ICLOGS,
  MAX_RECORD_BYTES,
  OP,
  OP_BYTES,
  type RecordHeader,
  recordCrcMatches,
  restoreCycleData,
  type Superblock,
} from './layout.ts'
import { agByte, splitFsbno } from './superblock.ts'

/** A place in the log: block number and the cycle in which that block is (or will be) written. */
export interface LogPosition {
  readonly block: number
  readonly cycle: number
}

export interface LogRecord {
  readonly header: RecordHeader
  readonly block: number
  /** The operations, cycle words restored. */
  readonly data: Uint8Array
}

export type LogState =
  | { readonly clean: true; readonly head: LogPosition }
  | { readonly clean: false; readonly head: LogPosition; readonly tail: LogPosition }

/** What walking the records ended with: done, or a hole at which the log has its true head. */
export type WalkEnd = { readonly hole?: undefined } | { readonly hole: number }

/** The most header blocks a record can have: 256 KiB of data, 64 blocks each. */
const MAX_HEADER_BLOCKS = MAX_RECORD_BYTES[2] / (64 * BB)
const READ_AHEAD_BLOCKS = 1024

export class XfsLog {
  readonly blocks: number
  readonly #device: BlockDevice
  readonly #start: number
  readonly #sb: Superblock
  readonly #signal: AbortSignal | undefined
  #window: { from: number; bytes: Uint8Array } = { from: 0, bytes: new Uint8Array(0) }

  constructor(device: BlockDevice, sb: Superblock, signal?: AbortSignal) {
    const { agno, agbno } = splitFsbno(sb, sb.logstart)
    this.#device = device
    this.#sb = sb
    this.#start = agByte(sb, agno, agbno)
    this.blocks = (sb.logblocks * sb.blockBytes) / BB
    this.#signal = signal
  }

  /** Finds the head, and the tail when the log is not clean. */
  async open(): Promise<LogState> {
    return this.#stateAt(await this.#findHead())
  }

  /** The state when the head is taken to be at `block`: where a walk has met a hole. */
  async reopen(block: number): Promise<LogState> {
    return this.#stateAt(block)
  }

  /**
   * Calls `take` for each record from tail to head. Ends early at a hole; then nothing that was taken counts, and
   * the caller starts again from `reopen(hole)`.
   * @throws NotTrusted
   */
  async walk(
    { head, tail }: { readonly head: LogPosition; readonly tail: LogPosition },
    take: (record: LogRecord) => void,
  ): Promise<WalkEnd> {
    const total = this.#distance(tail.block, head.block)
    let done = 0
    while (done < total) {
      throwIfAborted(this.#signal)
      const block = (tail.block + done) % this.blocks
      const wrapped = tail.block + done >= this.blocks
      const cycle = wrapped ? tail.cycle + 1 : tail.cycle
      const hole = (): WalkEnd => {
        if (total - done > (MAX_ICLOGS * MAX_RECORD_BYTES[2]) / BB) {
          throw this.#refuse('xfs-log-record', `a hole at log block ${block}`, 'none so far before the head')
        }
        return { hole: block }
      }
      const first = await this.#read(block, 1, Math.min(total - done, READ_AHEAD_BLOCKS))
      const found = blockCycle(first)
      if (found === cycle - 1) return hole()
      if (found !== cycle || new DataView(first.buffer, first.byteOffset).getUint32(0) !== LOG_MAGIC) {
        throw this.#refuse('xfs-log-record', `no record at log block ${block}`, `one of cycle ${cycle}`)
      }
      const header = this.#judgeHeader(decodeRecordHeader(first), { block, cycle })
      const length = header.headerBlocks + header.dataBlocks
      if (length > total - done) return hole()
      const record = (await this.#read(block, length, Math.min(total - done, READ_AHEAD_BLOCKS))).slice()
      for (let i = 1; i < length; i++) {
        const expected = block + i >= this.blocks ? cycle + 1 : cycle
        const stands = new DataView(record.buffer, i * BB).getUint32(0)
        if (stands === expected - 1) return hole()
        if (stands !== expected) {
          throw this.#refuse('xfs-log-record', `cycle ${stands} in a record`, `cycle ${expected}`)
        }
      }
      this.#judgeCrc(record, header)
      take({ header, block, data: restoreCycleData(record, header) })
      done += length
    }
    return {}
  }

  async #stateAt(headBlock: number): Promise<LogState> {
    const last = await this.#lastRecord(headBlock)
    const { header, block } = last
    const head = {
      block: headBlock,
      cycle: block >= headBlock ? header.cycle + 1 : header.cycle,
    }
    const end = (block + header.headerBlocks + header.dataBlocks) % this.blocks
    if (end === headBlock && header.opCount === 1) {
      const record = (await this.#read(block, header.headerBlocks + header.dataBlocks)).slice()
      const data = restoreCycleData(record.slice(), header)
      if (data.length >= OP_BYTES && (decodeOperation(data, 0).flags & OP.UNMOUNT) !== 0) {
        // mkfs and xfs_repair write this record without a checksum.
        if (header.crc !== 0) this.#judgeCrc(record, header)
        return { clean: true, head }
      }
    }
    const tail = { block: Number(header.tailLsn & 0xffffffffn), cycle: Number(header.tailLsn >> 32n) }
    const lapped = tail.block >= headBlock
    if (
      tail.block >= this.blocks ||
      tail.block === headBlock ||
      tail.cycle !== head.cycle - (lapped ? 1 : 0)
    ) {
      throw this.#refuse(
        'xfs-log-tail',
        `tail ${tail.cycle}:${tail.block}`,
        `one before ${head.cycle}:${headBlock}`,
      )
    }
    return { clean: false, head, tail }
  }

  /** Bisection for the first block of the older cycle. 0 when all blocks are of one cycle. */
  async #findHead(): Promise<number> {
    const first = await this.#cycleAt(0)
    const last = await this.#cycleAt(this.blocks - 1)
    if (first === 0) throw this.#refuse('xfs-log-zeroed', 'a log of zeros', 'a cycle number')
    if (first === last) return 0
    // A fresh log may be zeros behind its first records.
    if (first !== last + 1) {
      throw this.#refuse('xfs-log-head', `cycles ${first} and ${last}`, 'the last one less than the first')
    }
    let low = 0
    let high = this.blocks - 1
    while (high - low > 1) {
      const middle = (low + high) >>> 1
      if (high - low <= 8) {
        const span = await this.#read(low, high - low + 1)
        let at = 1
        while (blockCycle(span.subarray(at * BB)) !== last) at++
        return low + at
      }
      if ((await this.#cycleAt(middle)) === last) high = middle
      else low = middle
    }
    return high
  }

  async #cycleAt(block: number): Promise<number> {
    return blockCycle(await this.#read(block, 1))
  }

  /** The record whose header is nearest before `head`. */
  async #lastRecord(head: number): Promise<{ header: RecordHeader; block: number }> {
    const most = Math.min(this.blocks - 1, MAX_RECORD_BYTES[2] / BB + MAX_HEADER_BLOCKS)
    for (let seen = 0, step = 8; seen < most; step *= 8) {
      const look = Math.min(step, most - seen)
      const from = (head - seen - look + 2 * this.blocks) % this.blocks
      const bytes = await this.#read(from, look)
      for (let i = look - 1; i >= 0; i--) {
        const one = bytes.subarray(i * BB, (i + 1) * BB)
        if (new DataView(one.buffer, one.byteOffset).getUint32(0) !== LOG_MAGIC) continue
        const block = (from + i) % this.blocks
        const header = decodeRecordHeader(one)
        return { header: this.#judgeHeader(header, { block, cycle: header.cycle }), block }
      }
      seen += look
    }
    throw this.#refuse('xfs-log-head', `no record before log block ${head}`, 'one')
  }

  #judgeHeader(header: RecordHeader, at: LogPosition): RecordHeader {
    const refuse = (found: string, expected: string): never => {
      throw this.#refuse('xfs-log-record', `${found} in the record at log block ${at.block}`, expected)
    }
    if (header.version !== 1 && header.version !== 2) return refuse(`version ${header.version}`, '1 or 2')
    const most = MAX_RECORD_BYTES[header.version]
    if (header.length === 0 || header.length > most) refuse(`length ${header.length}`, `1 to ${most}`)
    if (header.version === 2 && header.iclogBytes > most)
      refuse(`size ${header.iclogBytes}`, `at most ${most}`)
    if (header.dataBlocks > header.headerBlocks * 64)
      refuse(`length ${header.length}`, 'header blocks for all of it')
    if (header.headerBlocks + header.dataBlocks >= this.blocks)
      refuse(`length ${header.length}`, 'less than the log')
    if (header.uuid !== this.#sb.uuid) refuse(`uuid ${header.uuid}`, this.#sb.uuid)
    if (header.lsn !== (BigInt(header.cycle) << 32n) + BigInt(at.block) || header.cycle !== at.cycle)
      refuse(`lsn 0x${header.lsn.toString(16)}`, `${at.cycle}:${at.block}`)
    return header
  }

  /** v4 file systems may leave the checksum out. */
  #judgeCrc(record: Uint8Array, header: RecordHeader): void {
    if (header.crc === 0 && this.#sb.version === 4) return
    if (!recordCrcMatches(record, header)) {
      throw this.#refuse('xfs-log-checksum', 'a wrong checksum of a log record', 'the CRC-32C of it')
    }
  }

  #distance(from: number, to: number): number {
    return (to - from + this.blocks) % this.blocks
  }

  /** `count` blocks from `block` on, around the end; a view that is good until the next call. */
  async #read(block: number, count: number, ahead: number = count): Promise<Uint8Array> {
    const from = this.#window.from
    const held = this.#window.bytes.length / BB
    const skip = this.#distance(from, block)
    if (skip + count > held) {
      const bytes = new Uint8Array(Math.min(Math.max(count, ahead), this.blocks) * BB)
      const first = Math.min(bytes.length, (this.blocks - block) * BB)
      bytes.set(await readBytes(this.#device, this.#start + block * BB, first, this.#signal))
      if (first < bytes.length) {
        bytes.set(await readBytes(this.#device, this.#start, bytes.length - first, this.#signal), first)
      }
      this.#window = { from: block, bytes }
      return bytes.subarray(0, count * BB)
    }
    return this.#window.bytes.subarray(skip * BB, (skip + count) * BB)
  }

  #refuse(reason: string, found: string, expected: string): NotTrusted {
    return new NotTrusted(reason, `Cannot read XFS log: found ${found}, expected ${expected}`, {
      kind: 'xfs',
      uuid: this.#sb.uuid,
      label: this.#sb.label || undefined,
    })
  }
}
