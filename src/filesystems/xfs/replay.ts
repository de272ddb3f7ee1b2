/**
 * What log recovery would do to the blocks that decide about free space: the superblock, the AG headers and btree
 * blocks. Records go in, committed buffer items stay, and `apply` puts them into a block just read.
 *
 * The kernel goes over the log twice: first it lists the buffers that a CANCEL item says are free by now, then it
 * replays all items but those of a listed buffer, taking an entry off the list at each CANCEL. In the end an item
 * counts exactly when no CANCEL of the same buffer stands after it (or in the same transaction, where CANCELs are
 * done last). Dropping a buffer's items when its CANCEL is met is the same and needs one pass.
 *
 * Of the other items none touches a block looked at here. Inodes and dquots live in used blocks; ICREATE fills an
 * inode chunk that is allocated by logged buffers. Intents (EFI, RUI, CUI, BUI, ATTRI, XMI) make the kernel *start
 * new transactions* after the replay: these free extents, which we go on calling in use, or take free ones, whose
 * old content nobody reads. So nothing is done for them, and the map errs to the safe side.
 *
 * Rule: an operation, item or region that contradicts itself stops the replay (NotTrusted), never skips ahead.
 */
import { Bytes, LIMITS, NotTrusted } from '../../base/index.ts'
import { applyInode, decodeInodeItem, type InodePatch } from './inodes.ts'
import {
  BB,
  BUF_FLAG,
  BUF_TYPE,
  type BufferFormat,
  blockLsn,
  CHUNK,
  CLIENT,
  decodeBufferFormat,
  decodeOperation,
  dirtyRuns,
  ITEM,
  ITEM_TYPES,
  LOG_FORMAT_LINUX_LE,
  MAX_REGIONS,
  OP,
  OP_BYTES,
  type Superblock,
  TRANSACTION_HEADER_BYTES,
  TRANSACTION_MAGIC,
} from './layout.ts'
import type { LogRecord } from './log.ts'

/** Buffers of these kinds can belong to free space; kernels before 3.9 wrote no kind. */
const KEPT_TYPES: ReadonlySet<number> = new Set([
  BUF_TYPE.UNKNOWN,
  BUF_TYPE.BTREE,
  BUF_TYPE.AGF,
  BUF_TYPE.AGFL,
  BUF_TYPE.AGI,
  BUF_TYPE.SB,
])
const OTHER_BUFFERS = BUF_FLAG.INODE_BUF | BUF_FLAG.UDQUOT | BUF_FLAG.PDQUOT | BUF_FLAG.GDQUOT
/** Transactions open at a time. Kernels have one or two. */
const MAX_OPEN = 1024
/** Items of one transaction: an operation is at least 12 bytes of a log of 2 GiB. */
const MAX_ITEMS = 4_194_304

interface Item {
  /** Regions in order; empty arrays stand for regions that are not kept. */
  readonly regions: Uint8Array[]
  /** How many regions the first one announces; 0 until it is there. */
  total: number
  keep: boolean
}

interface Transaction {
  readonly lsn: bigint
  /** Bytes of the header seen so far; it may be cut anywhere. */
  headerBytes: number
  readonly header: Uint8Array
  readonly items: Item[]
}

interface BufferPatch {
  readonly lsn: bigint
  /** Basic blocks. */
  readonly length: number
  readonly pieces: readonly { readonly offset: number; readonly bytes: Uint8Array }[]
}

export class LogReplay {
  readonly #sb: Superblock
  readonly #open = new Map<number, Transaction>()
  /** By address; per buffer in log order. */
  readonly #buffers = new Map<number, BufferPatch[]>()
  readonly #keepInodes: boolean
  readonly #inodes = new Map<number, InodePatch[]>()
  /** Inodes with items, by the address of the buffer they live in. */
  readonly #inodeBuffers = new Map<number, Set<number>>()
  #heldBytes = 0
  /** Checkpoints that were committed. */
  transactions = 0

  /** `inodes`: keeps inode items as well, for `applyInode`. */
  constructor(sb: Superblock, options: { readonly inodes?: boolean } = {}) {
    this.#sb = sb
    this.#keepInodes = options.inodes ?? false
  }

  /** Number of buffers that some item is left for. */
  get buffers(): number {
    return this.#buffers.size
  }

  take(record: LogRecord): void {
    const { data, header } = record
    let at = 0
    for (let i = 0; i < header.opCount; i++) {
      if (at + OP_BYTES > data.length) this.#refuse(record, 'xfs-log-record', 'operations past the end')
      const op = decodeOperation(data, at)
      at += OP_BYTES
      if (op.client !== CLIENT.TRANSACTION && op.client !== CLIENT.LOG)
        this.#refuse(record, 'xfs-log-record', `client 0x${op.client.toString(16)}`)
      if (op.length > data.length - at) this.#refuse(record, 'xfs-log-record', `an operation of ${op.length}`)
      this.#operation(record, op.tid, op.flags, data.subarray(at, at + op.length))
      at += op.length
    }
  }

  /**
   * Replays what is logged for the buffer `bytes` at byte offset `offset` of the file system, in place.
   * False when nothing was to be done: the bytes are as on disk and their checksum holds.
   */
  apply(bytes: Uint8Array, offset: number): boolean {
    const patches = this.#buffers.get(offset / BB)
    if (!patches) return false
    // What is on disk may be newer than an item: then this item and all before it are in it already.
    const onDisk = blockLsn(bytes, this.#sb)
    let changed = false
    for (const patch of patches) {
      if (this.#sb.version === 5 && patch.length * BB !== bytes.length) {
        throw new NotTrusted(
          'xfs-log-item',
          `Cannot replay XFS log: found a buffer of ${patch.length * BB} bytes at ${offset}, expected ${bytes.length}`,
        )
      }
      if (onDisk !== undefined && onDisk >= patch.lsn) continue
      for (const piece of patch.pieces) {
        if (piece.offset >= bytes.length) continue
        bytes.set(piece.bytes.subarray(0, bytes.length - piece.offset), piece.offset)
        changed = true
      }
    }
    return changed
  }

  /**
   * Replays what is logged for an inode over `bytes`, in place. `onDisk`: what stands on disk, if that is this
   * inode. False when nothing was to be done.
   */
  applyInode(bytes: Uint8Array, ino: number, onDisk: Bytes | undefined): boolean {
    let changed = false
    for (const patch of this.#inodes.get(ino) ?? []) {
      if (applyInode(bytes, onDisk, patch, this.#sb)) changed = true
    }
    return changed
  }

  #operation(record: LogRecord, tid: number, rawFlags: number, data: Uint8Array): void {
    const transaction = this.#open.get(tid)
    if (!transaction) {
      // A transaction that began before the tail is complete on disk; the rest of it means nothing.
      if ((rawFlags & OP.START) === 0) return
      if (data.length > 0) this.#refuse(record, 'xfs-log-item', 'data in the start of a transaction')
      if (this.#open.size >= MAX_OPEN) this.#refuse(record, 'xfs-log-item', 'too many open transactions')
      this.#requireHost(record)
      this.#open.set(tid, {
        lsn: record.header.lsn,
        headerBytes: 0,
        header: new Uint8Array(TRANSACTION_HEADER_BYTES),
        items: [],
      })
      return
    }
    let flags = rawFlags & ~OP.END
    if ((flags & OP.WAS_CONT) !== 0) flags &= ~OP.CONTINUE
    switch (flags) {
      case 0:
      case OP.CONTINUE:
        this.#region(record, transaction, data)
        break
      case OP.WAS_CONT:
        this.#continuation(record, transaction, data)
        break
      case OP.COMMIT:
        this.#open.delete(tid)
        this.#commit(record, transaction)
        break
      default:
        this.#refuse(record, 'xfs-log-item', `operation flags 0x${rawFlags.toString(16)}`)
    }
  }

  #region(record: LogRecord, transaction: Transaction, data: Uint8Array): void {
    if (data.length === 0) return
    if (transaction.headerBytes === 0) {
      this.#transactionHeader(record, transaction, data)
      return
    }
    if (transaction.headerBytes < TRANSACTION_HEADER_BYTES)
      this.#refuse(record, 'xfs-log-item', 'half a transaction header')
    let item = transaction.items.at(-1)
    if (!item || (item.total > 0 && item.regions.length === item.total)) {
      if (transaction.items.length >= MAX_ITEMS) this.#refuse(record, 'xfs-log-item', 'too many items')
      item = { regions: [], total: 0, keep: true }
      transaction.items.push(item)
    }
    if (item.regions.length === 0) {
      if (data.length < 4) this.#refuse(record, 'xfs-log-item', `an item of ${data.length} bytes`)
      item.total = new Bytes(data, 'little').u16(2)
      if (item.total === 0 || item.total > MAX_REGIONS)
        this.#refuse(record, 'xfs-log-item', `${item.total} regions`)
    } else if (item.regions.length === 1) {
      // Only now is the first region whole: it may have been continued.
      item.keep = this.#isKept(item.regions[0]!)
      if (!item.keep) this.#shrink(item)
    }
    item.regions.push(item.keep ? this.#hold(record, data) : EMPTY)
  }

  #continuation(record: LogRecord, transaction: Transaction, data: Uint8Array): void {
    if (transaction.headerBytes < TRANSACTION_HEADER_BYTES) {
      this.#transactionHeader(record, transaction, data)
      return
    }
    const item = transaction.items.at(-1)
    const last = item?.regions.at(-1)
    if (!item || !last) {
      this.#refuse(record, 'xfs-log-item', 'a continuation of nothing')
    } else if (item.keep) {
      const joined = new Uint8Array(last.length + data.length)
      joined.set(last)
      joined.set(data, last.length)
      this.#heldBytes -= last.length
      item.regions[item.regions.length - 1] = this.#hold(record, joined)
    }
  }

  #transactionHeader(record: LogRecord, transaction: Transaction, data: Uint8Array): void {
    if (data.length > TRANSACTION_HEADER_BYTES - transaction.headerBytes)
      this.#refuse(record, 'xfs-log-item', `a transaction header of ${data.length} bytes`)
    transaction.header.set(data, transaction.headerBytes)
    transaction.headerBytes += data.length
    if (
      transaction.headerBytes === TRANSACTION_HEADER_BYTES &&
      new Bytes(transaction.header, 'little').u32(0) !== TRANSACTION_MAGIC
    ) {
      this.#refuse(record, 'xfs-log-item', 'no magic in a transaction header')
    }
  }

  #commit(record: LogRecord, transaction: Transaction): void {
    this.transactions++
    const cancels: BufferFormat[] = []
    for (const item of transaction.items) {
      const first = item.regions[0]!
      if (item.regions.length !== item.total || first.length < 4)
        this.#refuse(record, 'xfs-log-item', `${item.regions.length} regions of ${item.total}`)
      const type = new Bytes(first, 'little').u16(0)
      if (!ITEM_TYPES.has(type)) this.#refuse(record, 'xfs-log-item', `item type 0x${type.toString(16)}`)
      if (type === ITEM.INODE && item.keep && this.#keepInodes) {
        this.#keepInode(record, transaction, item)
        continue
      }
      if (type !== ITEM.BUF || !item.keep) {
        this.#release(item)
        continue
      }
      const format = decodeBufferFormat(first)
      if (!format) {
        this.#refuse(record, 'xfs-log-item', 'a buffer item that contradicts itself')
      } else if ((format.flags & BUF_FLAG.CANCEL) !== 0) {
        cancels.push(format)
        this.#release(item)
      } else if (isKeptBuffer(format)) {
        this.#keep(record, transaction, item, format)
      } else {
        this.#release(item)
      }
    }
    for (const { blkno, length } of cancels) this.#cancel(blkno, length)
  }

  #keep(record: LogRecord, transaction: Transaction, item: Item, format: BufferFormat): void {
    if (format.length === 0) this.#refuse(record, 'xfs-log-item', `an empty buffer at ${format.blkno}`)
    const pieces: { offset: number; bytes: Uint8Array }[] = []
    let region = 1
    for (const run of dirtyRuns(item.regions[0]!, format)) {
      // A run may come in several regions, because a buffer's pages are not one piece of memory.
      let chunk = run.first
      while (chunk < run.end) {
        const bytes = item.regions[region++]
        const chunks = Math.min(Math.floor((bytes?.length ?? 0) / CHUNK), run.end - chunk)
        if (!bytes || chunks === 0 || (chunk + chunks) * CHUNK > format.length * BB) {
          this.#refuse(record, 'xfs-log-item', `a buffer at ${format.blkno} without its regions`)
          return
        }
        pieces.push({ offset: chunk * CHUNK, bytes: bytes.subarray(0, chunks * CHUNK) })
        chunk += chunks
      }
    }
    if (region !== item.regions.length)
      this.#refuse(record, 'xfs-log-item', `a buffer at ${format.blkno} with regions left over`)
    let patches = this.#buffers.get(format.blkno)
    if (!patches) {
      patches = []
      this.#buffers.set(format.blkno, patches)
    }
    patches.push({ lsn: transaction.lsn, length: format.length, pieces })
  }

  #keepInode(record: LogRecord, transaction: Transaction, item: Item): void {
    const patch = decodeInodeItem(item.regions, transaction.lsn)
    if (!patch) this.#refuse(record, 'xfs-log-item', 'an inode item that contradicts itself')
    const patches = this.#inodes.get(patch.ino)
    if (patches) patches.push(patch)
    else this.#inodes.set(patch.ino, [patch])
    const lodgers = this.#inodeBuffers.get(patch.blkno)
    if (lodgers) lodgers.add(patch.ino)
    else this.#inodeBuffers.set(patch.blkno, new Set([patch.ino]))
  }

  #cancel(blkno: number, length: number): void {
    for (const ino of this.#inodeBuffers.get(blkno) ?? []) {
      const left = this.#inodes.get(ino)?.filter((patch) => patch.blkno !== blkno || patch.length !== length)
      if (left) this.#inodes.set(ino, left)
    }
    const patches = this.#buffers.get(blkno)
    if (!patches) return
    const left = patches.filter((patch) => patch.length !== length)
    for (const patch of patches) {
      if (patch.length === length) for (const { bytes } of patch.pieces) this.#heldBytes -= bytes.length
    }
    if (left.length === 0) this.#buffers.delete(blkno)
    else this.#buffers.set(blkno, left)
  }

  #hold(record: LogRecord, data: Uint8Array): Uint8Array {
    this.#heldBytes += data.length
    if (this.#heldBytes > LIMITS.overlayBytes)
      this.#refuse(record, 'xfs-log-too-large', `more than ${LIMITS.overlayBytes} bytes to replay`)
    return data.slice()
  }

  #release(item: Item): void {
    for (const region of item.regions) this.#heldBytes -= region.length
    item.regions.length = 0
  }

  /** True unless the first region of an item says that nothing of it is needed. */
  #isKept(region: Uint8Array): boolean {
    if (region.length < 4) return false
    const type = new Bytes(region, 'little').u16(0)
    if (type === ITEM.INODE) return this.#keepInodes
    if (type !== ITEM.BUF) return false
    const format = decodeBufferFormat(region)
    return format === undefined || (format.flags & BUF_FLAG.CANCEL) !== 0 || isKeptBuffer(format)
  }

  /** Leaves of an item that is not needed no more than its type. */
  #shrink(item: Item): void {
    const type = item.regions[0]!.slice(0, 4)
    this.#heldBytes -= item.regions[0]!.length - type.length
    item.regions[0] = type
  }

  /** Items are in the byte order and with the structures of the host that wrote them. */
  #requireHost(record: LogRecord): void {
    if (record.header.format !== LOG_FORMAT_LINUX_LE)
      this.#refuse(record, 'xfs-log-format', `host format ${record.header.format}`)
  }

  #refuse(record: LogRecord, reason: string, found: string): never {
    throw new NotTrusted(
      reason,
      `Cannot replay XFS log: found ${found} in the record at log block ${record.block}, expected what Linux writes`,
      { kind: 'xfs', uuid: this.#sb.uuid, label: this.#sb.label || undefined },
    )
  }
}

const EMPTY: Uint8Array = new Uint8Array(0)

function isKeptBuffer(format: BufferFormat): boolean {
  return (format.flags & OTHER_BUFFERS) === 0 && KEPT_TYPES.has(format.bufferType)
}
