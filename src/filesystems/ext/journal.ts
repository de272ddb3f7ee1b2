/**
 * The journal (JBD2) of ext3 and ext4: found, scanned as the kernel's recovery does, and its newest copies of
 * chosen blocks put over a device.
 *
 * Rules:
 * - What recovery would write is decided exactly as in the kernel: a transaction counts when its commit block is
 *   there with the next sequence; the newest copy of a block wins; a revoke record of sequence s cancels copies of
 *   sequence <= s. The log ends at the first block that is not the next one expected.
 * - Where the kernel would refuse to mount (a checksum wrong inside a committed transaction, an impossible
 *   superblock) the file system is not trusted, whatever could be saved.
 * - Only blocks that are asked for are held in memory (`apply`); of the others the log's tags are kept, 32 bytes
 *   each, and its live part is bounded by LIMITS.journalBytes.
 * - The whole live log is read once, in large pieces, where its blocks carry checksums; without checksums only the
 *   descriptors and the blocks asked for are.
 */
import { LIMITS, throwIfAborted, VarveError, within } from '../../base/index.ts'
import { type BlockDevice, type OverlayDevice, readBytes } from '../../device/index.ts'
import { NotTrusted } from '../file-system.ts'
import { type FastCommitScan, scanFastCommits } from './fast-commit.ts'
import { blockRuns, MODE, readInode } from './inode.ts'
import {
  BLOCK_TYPE,
  checksumTypeIsKnown,
  commitIsRight,
  crc32MsbFirst,
  DEFAULT_FAST_COMMIT_BLOCKS,
  dataIsRight,
  decodeCommit,
  decodeHeader,
  decodeJournalSuperblock,
  decodeRevokes,
  decodeTags,
  hasCsum,
  JOURNAL_COMPAT,
  JOURNAL_INCOMPAT,
  JOURNAL_MAGIC,
  type JournalSuperblock,
  KNOWN_JOURNAL_INCOMPAT,
  MIN_JOURNAL_BLOCKS,
  type Tag,
  tailIsRight,
  transactionIsRight,
} from './journal-layout.ts'
import { type GroupDescriptors, has, hasMetadataCsum, INCOMPAT, type Superblock } from './layout.ts'
import { aboutOf } from './superblock.ts'

const READ_BYTES = 262_144
/** The largest that mke2fs makes. */
const MAX_JOURNAL_BLOCKS = 10_240_000
/** How far past the end of the log signs of damage are looked for: the largest transaction of a small journal. */
const LOOK_AHEAD_BLOCKS = 256

/** Blocks of the journal that stand one after another on the device. */
interface LogRun {
  /** Index of the first in the journal. */
  readonly logical: number
  readonly physical: number
  readonly blocks: number
}

/** The blocks of the journal in order, as runs of blocks of the device. */
class LogReader {
  readonly #device: BlockDevice
  readonly #blockBytes: number
  readonly #signal: AbortSignal | undefined
  /** Ascending, without a gap. */
  readonly #runs: readonly LogRun[]
  #cached: Uint8Array = new Uint8Array(0)
  #cachedFrom = 0

  constructor(
    device: BlockDevice,
    blockBytes: number,
    runs: readonly LogRun[],
    signal: AbortSignal | undefined,
  ) {
    this.#device = device
    this.#blockBytes = blockBytes
    this.#runs = runs
    this.#signal = signal
  }

  /** Whole blocks of the device that the file system (and its journal) stands on. */
  get deviceBlocks(): number {
    return Math.floor(this.#device.size / this.#blockBytes)
  }

  /** Block `index` of the journal; valid until the next call. Reads ahead, not past `end`. */
  async block(index: number, end: number): Promise<Uint8Array> {
    const size = this.#blockBytes
    if (index < this.#cachedFrom || (index - this.#cachedFrom + 1) * size > this.#cached.length) {
      throwIfAborted(this.#signal)
      const run = this.#runs.find(({ logical, blocks }) => index >= logical && index < logical + blocks)
      if (!run) {
        throw new VarveError('CORRUPT', `Cannot read journal: found no block ${index}, expected it mapped`)
      }
      const skip = index - run.logical
      const blocks = Math.max(1, Math.min(run.blocks - skip, end - index, Math.floor(READ_BYTES / size)))
      this.#cached = await readBytes(this.#device, (run.physical + skip) * size, blocks * size, this.#signal)
      this.#cachedFrom = index
    }
    const at = (index - this.#cachedFrom) * size
    return this.#cached.subarray(at, at + size)
  }
}

/** Where the newest logged copy of a block stands. */
interface LoggedBlock {
  /** Block of the journal. */
  readonly at: number
  readonly sequence: number
  readonly escape: boolean
}

/** What recovery would write. */
export interface Recovery {
  readonly transactions: number
  /** Blocks that recovery would write, those whose newest copy is revoked left out; in no order. */
  readonly blocks: { readonly size: number } & Iterable<number>
  /** True when recovery would write this block of the file system. */
  covers(block: number): boolean
  /** Puts the newest logged copy of each of `blocks` that has one over `overlay`. Idempotent. */
  apply(overlay: OverlayDevice, blocks: Iterable<number>): Promise<void>
  /** Blocks that fast commits after the last transaction give to files; empty without them. */
  readonly fastCommits: FastCommitScan
}

export class Journal {
  readonly superblock: JournalSuperblock
  readonly #fs: Superblock
  readonly #log: LogReader
  /** First block after the part of the journal that holds transactions. */
  readonly #end: number

  private constructor(fs: Superblock, superblock: JournalSuperblock, log: LogReader, end: number) {
    this.#fs = fs
    this.superblock = superblock
    this.#log = log
    this.#end = end
  }

  /**
   * Finds the journal of `fs` and judges its superblock.
   * @throws NotTrusted (`ext-external-journal`, `ext-journal`, `ext-errors`), CORRUPT
   */
  static async open(
    device: BlockDevice,
    fs: Superblock,
    descriptors: GroupDescriptors,
    signal?: AbortSignal,
  ): Promise<Journal> {
    if (fs.journalInum === 0) {
      throw new NotTrusted(
        'ext-external-journal',
        `Cannot trust ${fs.kind}: found its journal on another device, expected it in inode 8`,
        aboutOf(fs),
      )
    }
    const inode = await readInode(device, fs, descriptors, fs.journalInum, signal)
    if (inode.linksCount === 0 || (inode.mode & MODE.mask) !== MODE.file) {
      throw untrusted(fs, `inode ${fs.journalInum} which is no file`)
    }
    const blocks = Math.floor(inode.size / fs.blockBytes)
    if (blocks > MAX_JOURNAL_BLOCKS) throw untrusted(fs, `a journal of ${blocks} blocks`)
    const runs: LogRun[] = []
    let mapped = 0
    for await (const run of blockRuns(device, fs, inode, signal)) {
      if (run.logical === undefined) continue
      // A hole would be a block of the journal that is nowhere.
      if (run.logical !== mapped || run.unwritten) break
      runs.push({ logical: run.logical, physical: run.physical, blocks: run.blocks })
      mapped += run.blocks
      if (mapped >= blocks) break
    }
    const first = runs[0]
    if (!first) throw untrusted(fs, 'a journal without blocks')
    const sb = decodeJournalSuperblock(await readBytes(device, first.physical * fs.blockBytes, 1024, signal))
    const end = checkJournalSuperblock(fs, sb, Math.min(mapped, blocks))
    return new Journal(fs, sb, new LogReader(device, fs.blockBytes, runs, signal), end)
  }

  /** Nothing to replay. */
  get isEmpty(): boolean {
    return this.superblock.start === 0
  }

  /**
   * Scans the log. Reads all of its live part once (see the head of this file).
   * @throws NotTrusted (`ext-journal`, `ext-fast-commit`)
   */
  async recover(): Promise<Recovery> {
    const scan = new Scan(this.#fs, this.superblock, this.#log, this.#end)
    if (!this.isEmpty) await scan.run()
    const fastCommits = has(this.superblock.incompat, JOURNAL_INCOMPAT.fastCommit)
      ? await scanFastCommits(
          this.#fs,
          (index) => this.#log.block(index, this.superblock.maxLen),
          { from: this.#end, to: this.superblock.maxLen },
          scan.sequence,
        )
      : { commits: 0, blocks: [] }
    const { latest } = scan
    const log = this.#log
    const end = this.#end
    const fs = this.#fs
    return {
      transactions: scan.transactions,
      blocks: new Set(latest.keys()),
      fastCommits,
      covers: (block) => latest.has(block),
      async apply(overlay, blocks) {
        const wanted: { readonly block: number; readonly copy: LoggedBlock }[] = []
        for (const block of blocks) {
          const copy = latest.get(block)
          if (copy) wanted.push({ block, copy })
        }
        wanted.sort((a, b) => a.copy.at - b.copy.at)
        for (const { block, copy } of wanted) {
          const bytes = (await log.block(copy.at, end)).slice()
          if (copy.escape) new DataView(bytes.buffer).setUint32(0, JOURNAL_MAGIC)
          overlay.patch(block * fs.blockBytes, bytes)
        }
      },
    }
  }
}

/** Returns the end of the part that holds transactions. */
function checkJournalSuperblock(fs: Superblock, sb: JournalSuperblock, blocks: number): number {
  const v2 = sb.blockType === BLOCK_TYPE.superblockV2
  if (sb.magic !== JOURNAL_MAGIC || !(v2 || sb.blockType === BLOCK_TYPE.superblockV1)) {
    throw untrusted(fs, 'no journal superblock')
  }
  if (sb.incompat & ~KNOWN_JOURNAL_INCOMPAT || sb.roCompat !== 0) {
    throw untrusted(fs, `unknown journal features (incompat ${sb.incompat}, ro_compat ${sb.roCompat})`)
  }
  if (!sb.checksumIsRight) throw untrusted(fs, 'a wrong checksum in the journal superblock')
  const both = JOURNAL_INCOMPAT.csumV2 | JOURNAL_INCOMPAT.csumV3
  if (
    (sb.incompat & both) === both ||
    (hasCsum(sb.incompat) && has(sb.compat, JOURNAL_COMPAT.checksum)) ||
    !checksumTypeIsKnown(sb)
  ) {
    throw untrusted(fs, 'journal checksums of two kinds or of an unknown one')
  }
  // Every mount for writing gives the journal of a file system with checksums checksums too. Only a journal that
  // was never mounted has none; one that is needed and has none has lost its feature bits.
  const needed = sb.start !== 0 || has(fs.incompat, INCOMPAT.recover)
  if (needed && hasMetadataCsum(fs) && !hasCsum(sb.incompat)) {
    throw untrusted(fs, 'a log without checksums, expected them as on all other metadata')
  }
  if (sb.blockSize !== fs.blockBytes) throw untrusted(fs, `journal blocks of ${sb.blockSize} bytes`)
  if (sb.maxLen > blocks) {
    throw untrusted(fs, `a journal of ${sb.maxLen} blocks in a file of ${blocks}`)
  }
  let end = sb.maxLen
  if (has(sb.incompat, JOURNAL_INCOMPAT.fastCommit)) {
    const reserved = sb.fastCommitBlocks === 0 ? DEFAULT_FAST_COMMIT_BLOCKS : sb.fastCommitBlocks
    if (sb.maxLen - reserved < MIN_JOURNAL_BLOCKS) throw untrusted(fs, `${reserved} blocks for fast commits`)
    end = sb.maxLen - reserved
  }
  if (sb.first < 1 || sb.first >= end) throw untrusted(fs, `a log that starts at block ${sb.first}`)
  if (sb.start !== 0 && (sb.start < sb.first || sb.start >= end)) {
    throw untrusted(fs, `a log whose tail is block ${sb.start}, expected ${sb.first} to ${end - 1}`)
  }
  if (sb.errno !== 0) {
    throw new NotTrusted(
      'ext-errors',
      `Cannot trust ${fs.kind}: found error ${sb.errno} noted in its journal, expected none`,
      aboutOf(fs),
    )
  }
  return end
}

/** One pass over the log: what the kernel's scan and revoke passes find, and the checksums of its replay pass. */
class Scan {
  readonly latest: Map<number, LoggedBlock> = new Map()
  transactions = 0
  /** Sequence of the transaction looked for; after `run`, the first that does not count. */
  sequence: number
  readonly #fs: Superblock
  readonly #sb: JournalSuperblock
  readonly #log: LogReader
  readonly #end: number
  readonly #deviceBlocks: number
  readonly #revoked = new Map<number, number>()
  /** Blocks of the log gone over: more than it has means that it leads back into itself. */
  #seen = 0
  #at: number

  // Of the transaction that is not committed yet.
  #tags: { readonly block: number; readonly copy: LoggedBlock; readonly isRight: boolean }[] = []
  #revokes: number[] = []
  #crc = 0xffffffff
  /** What makes the transaction impossible, should its commit block be there. */
  #flaw: string | undefined

  constructor(fs: Superblock, sb: JournalSuperblock, log: LogReader, end: number) {
    this.#fs = fs
    this.#sb = sb
    this.#log = log
    this.#end = end
    this.#deviceBlocks = log.deviceBlocks
    this.#at = sb.start
    this.sequence = sb.sequence
  }

  async run(): Promise<void> {
    const sb = this.#sb
    const withChecksum = has(sb.compat, JOURNAL_COMPAT.checksum)
    /** Place of a descriptor or revoke block with a wrong checksum: left over from earlier, or damaged. */
    let staleAt: number | undefined
    let lastCommitTime = 0n
    /** The transaction whose commit failed its checksum under async commit. */
    let failed: number | undefined
    const wrongTags: { readonly block: number; readonly sequence: number }[] = []

    let end = this.#at
    for (;;) {
      end = this.#at
      // The block is valid until the next is read: everything is taken out of it at once.
      const block = await this.#next()
      const header = decodeHeader(block)
      if (!header || header.sequence !== this.sequence) break
      if (header.blockType === BLOCK_TYPE.descriptor) {
        const good = tailIsRight(block, sb)
        if (!good) staleAt ??= end
        const tags = decodeTags(block, sb.incompat)
        if (withChecksum) this.#crc = crc32MsbFirst(block, this.#crc)
        if (good) await this.#takeTags(tags, header.sequence, withChecksum)
        else this.#skip(tags.length)
      } else if (header.blockType === BLOCK_TYPE.revoke) {
        if (!tailIsRight(block, sb)) staleAt ??= end
        const revokes = decodeRevokes(block, sb.incompat)
        if (revokes) this.#revokes.push(...revokes)
        else this.#flaw ??= 'a revoke block that is longer than a block'
      } else if (header.blockType === BLOCK_TYPE.commit) {
        const commit = decodeCommit(block)
        const good = commitIsRight(block, sb) && !(withChecksum && !transactionIsRight(commit, this.#crc))
        // A commit that is older than the one before it is left over from an earlier use of these blocks.
        if ((staleAt !== undefined || !good) && commit.time < lastCommitTime) break
        if (staleAt !== undefined) throw this.#untrusted(`a wrong checksum in transaction ${this.sequence}`)
        if (failed !== undefined) {
          throw this.#untrusted(`transaction ${failed} damaged and later ones committed`)
        }
        if (!good) {
          if (!has(sb.incompat, JOURNAL_INCOMPAT.asyncCommit)) {
            throw this.#untrusted(`a wrong checksum in the commit of transaction ${this.sequence}`)
          }
          // Its blocks need not have reached the disk before its commit block did: an interrupted commit, if it
          // is the last one.
          failed = this.sequence
          this.#forget()
        } else {
          if (this.#flaw) throw this.#untrusted(this.#flaw)
          wrongTags.push(...this.#commit())
          lastCommitTime = commit.time
        }
        this.sequence = (this.sequence + 1) >>> 0
      } else {
        break
      }
    }
    if (failed !== undefined) this.sequence = failed
    if (failed === undefined) await this.#checkAhead(staleAt ?? end, lastCommitTime)

    for (const [block, revokedAt] of this.#revoked) {
      const copy = this.latest.get(block)
      if (copy && !isAfter(copy.sequence, revokedAt)) this.latest.delete(block)
    }
    for (const { block, sequence } of wrongTags) {
      const revokedAt = this.#revoked.get(block)
      if (revokedAt === undefined || isAfter(sequence, revokedAt)) {
        throw this.#untrusted(`a wrong checksum on the logged copy of block ${block}`)
      }
    }
  }

  async #takeTags(tags: readonly Tag[], sequence: number, withChecksum: boolean): Promise<void> {
    const readAll = withChecksum || hasCsum(this.#sb.incompat)
    for (const tag of tags) {
      const at = this.#at
      let isRight = true
      if (readAll) {
        const data = await this.#next()
        if (withChecksum) this.#crc = crc32MsbFirst(data, this.#crc)
        isRight = dataIsRight(data, tag, sequence, this.#sb)
      } else {
        this.#skip(1)
      }
      // Not blocks_count: a growth of the file system in this very log may have raised it.
      if (!(tag.block < this.#deviceBlocks)) {
        this.#flaw ??= `a logged copy of block ${tag.block}, past the device's ${this.#deviceBlocks}`
      }
      this.#tags.push({ block: tag.block, copy: { at, sequence, escape: tag.escape }, isRight })
    }
  }

  /**
   * A log that was cut off has older blocks after its end, never younger ones: a block of a later transaction, or
   * the commit of this one, says that a block between was damaged. Asked only where a checksum proves that the
   * block belongs to this journal, and only of the blocks at and soon after `from`. (What no reader can
   * know: a last transaction whose commit block lost its magic or sequence was never committed.)
   */
  async #checkAhead(from: number, lastCommitTime: bigint): Promise<void> {
    const sb = this.#sb
    if (!hasCsum(sb.incompat)) return
    const asynchronous = has(sb.incompat, JOURNAL_INCOMPAT.asyncCommit)
    const logBlocks = this.#end - sb.first
    for (let i = 0; i < Math.min(LOOK_AHEAD_BLOCKS, logBlocks); i++) {
      const block = await this.#log.block(sb.first + ((from - sb.first + i) % logBlocks), this.#end)
      const header = decodeHeader(block)
      if (!header) continue
      const isCommit = header.blockType === BLOCK_TYPE.commit
      const later = isAfter(header.sequence, this.sequence)
      const ours =
        isCommit &&
        header.sequence === this.sequence &&
        !asynchronous &&
        decodeCommit(block).time >= lastCommitTime
      if ((later || ours) && (isCommit ? commitIsRight(block, sb) : tailIsRight(block, sb))) {
        throw this.#untrusted(`transaction ${header.sequence} after a gap in transaction ${this.sequence}`)
      }
    }
  }

  /** Takes the transaction in; returns its logged blocks whose checksum is wrong. */
  #commit(): { readonly block: number; readonly sequence: number }[] {
    const wrong = []
    for (const { block, copy, isRight } of this.#tags) {
      this.latest.set(block, copy)
      if (!isRight) wrong.push({ block, sequence: copy.sequence })
    }
    for (const block of this.#revokes) {
      const before = this.#revoked.get(block)
      if (before === undefined || isAfter(this.sequence, before)) this.#revoked.set(block, this.sequence)
    }
    this.transactions++
    this.#forget()
    return wrong
  }

  #forget(): void {
    this.#tags = []
    this.#revokes = []
    this.#crc = 0xffffffff
    this.#flaw = undefined
  }

  async #next(): Promise<Uint8Array> {
    const block = await this.#log.block(this.#at, this.#end)
    this.#skip(1)
    return block
  }

  #skip(blocks: number): void {
    this.#seen += blocks
    if (this.#seen > this.#end - this.#sb.first) {
      throw this.#untrusted('a log that leads back into itself')
    }
    within(this.#seen * this.#fs.blockBytes, LIMITS.journalBytes, 'the live part of a journal')
    this.#at += blocks
    if (this.#at >= this.#end) this.#at -= this.#end - this.#sb.first
  }

  #untrusted(found: string): NotTrusted {
    return untrusted(this.#fs, found)
  }
}

/** Sequence numbers wrap at 2^32: `a` is after `b` when it is less than half of that ahead. */
function isAfter(a: number, b: number): boolean {
  return ((a - b) | 0) > 0
}

function untrusted(fs: Superblock, found: string): NotTrusted {
  return new NotTrusted('ext-journal', `Cannot replay the journal of ${fs.kind}: found ${found}`, aboutOf(fs))
}
