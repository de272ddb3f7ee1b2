/** LogReplay: transactions out of operations, and which buffer items count. Logs of real kernels: test/poison. */
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { NotTrusted } from '../../base/index.ts'
import { BUF_FLAG, BUF_TYPE, decodeRecordHeader, ITEM, OP, type Superblock } from './layout.ts'
import type { LogRecord } from './log.ts'
import { LogReplay } from './replay.ts'

/** Version 4: every item counts, whatever stands on disk. */
const SB = { version: 4, uuid: 'u', metaUuid: 'u', label: '', dblocks: 1000, blockBytes: 4096 } as Superblock
const TID = 77
const BLKNO = 800
const AT = BLKNO * 512

interface Op {
  readonly flags?: number
  readonly data?: Uint8Array
  readonly tid?: number
  readonly client?: number
}

let block = 0
function record(
  ops: readonly Op[],
  options: { readonly lsn?: bigint; readonly format?: number } = {},
): LogRecord {
  const parts: Uint8Array[] = []
  for (const { flags = 0, data = new Uint8Array(0), tid = TID, client = 0x69 } of ops) {
    const head = new DataView(new ArrayBuffer(12))
    head.setUint32(0, tid)
    head.setUint32(4, data.length)
    head.setUint8(8, client)
    head.setUint8(9, flags)
    parts.push(new Uint8Array(head.buffer), data)
  }
  const header = {
    ...decodeRecordHeader(new Uint8Array(512)),
    opCount: ops.length,
    lsn: options.lsn ?? BigInt(++block),
    format: options.format ?? 1,
  }
  return { header, block, data: new Uint8Array(Buffer.concat(parts)) }
}

function transaction(...items: Uint8Array[][]): Op[] {
  return [
    { flags: OP.START },
    { data: transactionHeader() },
    ...items.flat().map((data): Op => ({ data })),
    { flags: OP.COMMIT },
  ]
}

function transactionHeader(): Uint8Array {
  const bytes = new Uint8Array(16)
  new DataView(bytes.buffer).setUint32(0, 0x5452414e, true)
  return bytes
}

/** A buffer item of 4 KiB with these dirty chunks of 128 bytes, each filled with `fill`. */
function buffer(
  chunks: readonly number[],
  fill: number,
  options: {
    readonly flags?: number
    readonly type?: number
    readonly length?: number
    readonly joined?: boolean
  } = {},
): Uint8Array[] {
  const runs: number[][] = []
  for (const chunk of chunks) {
    const last = runs.at(-1)
    if (options.joined && last && last.at(-1) === chunk - 1) last.push(chunk)
    else runs.push([chunk])
  }
  const format = new DataView(new ArrayBuffer(24))
  format.setUint16(0, ITEM.BUF, true)
  format.setUint16(2, 1 + runs.length, true)
  format.setUint16(4, (options.flags ?? 0) | ((options.type ?? BUF_TYPE.BTREE) << 11), true)
  format.setUint16(6, options.length ?? 8, true)
  format.setBigInt64(8, BigInt(BLKNO), true)
  format.setUint32(16, 1, true)
  let map = 0
  for (const chunk of chunks) map |= 1 << chunk
  format.setUint32(20, map >>> 0, true)
  return [new Uint8Array(format.buffer), ...runs.map((run) => new Uint8Array(run.length * 128).fill(fill))]
}

function item(type: number, regions = 1): Uint8Array[] {
  const first = new Uint8Array(32)
  new DataView(first.buffer).setUint16(0, type, true)
  new DataView(first.buffer).setUint16(2, regions, true)
  return [first, ...Array.from({ length: regions - 1 }, () => new Uint8Array(100))]
}

/** Fill of each chunk of the buffer after the replay. */
function chunksAfter(records: readonly LogRecord[]): number[] {
  const replay = new LogReplay(SB)
  for (const one of records) replay.take(one)
  const bytes = new Uint8Array(4096)
  replay.apply(bytes, AT)
  return Array.from({ length: 32 }, (_, i) => bytes[i * 128]!)
}

function after(changes: Readonly<Record<number, number>>): number[] {
  return Array.from({ length: 32 }, (_, i) => changes[i] ?? 0)
}

function refused(reason: string, ...records: readonly LogRecord[]): void {
  assert.throws(
    () => chunksAfter(records),
    (error) => error instanceof NotTrusted && error.reason === reason,
  )
}

describe('XFS log replay', () => {
  test('puts the chunks of a committed item where its map says', () => {
    assert.deepEqual(chunksAfter([record(transaction(buffer([0, 5, 31], 9)))]), after({ 0: 9, 5: 9, 31: 9 }))
  })

  test('takes a run that comes in one region or in several', () => {
    for (const joined of [true, false]) {
      assert.deepEqual(
        chunksAfter([record(transaction(buffer([3, 4, 5, 8], 7, { joined })))]),
        after({ 3: 7, 4: 7, 5: 7, 8: 7 }),
      )
    }
  })

  test('the newest item of a buffer wins', () => {
    const log = [record(transaction(buffer([1, 2], 1))), record(transaction(buffer([2, 3], 2)))]
    assert.deepEqual(chunksAfter(log), after({ 1: 1, 2: 2, 3: 2 }))
  })

  test('a transaction without a commit is nothing, and neither is the end of one that began before', () => {
    const whole = transaction(buffer([1], 1))
    assert.deepEqual(chunksAfter([record(whole.slice(0, -1))]), after({}))
    assert.deepEqual(chunksAfter([record(whole.slice(1))]), after({}))
  })

  test('transactions mixed with each other stay apart', () => {
    const one = transaction(buffer([1], 1))
    const two = transaction(buffer([2], 2)).map((op) => ({ ...op, tid: 5 }))
    const mixed = one.flatMap((op, i) => [op, two[i]!])
    assert.deepEqual(chunksAfter([record(mixed.slice(0, -1))]), after({ 1: 1 }))
    assert.deepEqual(chunksAfter([record(mixed)]), after({ 1: 1, 2: 2 }))
  })

  test('regions and headers continued in the next record', () => {
    const [format, content] = buffer([4, 5], 6, { joined: true }) as [Uint8Array, Uint8Array]
    const header = transactionHeader()
    const log = [
      record([{ flags: OP.START }, { flags: OP.CONTINUE, data: header.subarray(0, 8) }]),
      record([
        { flags: OP.WAS_CONT | OP.END, data: header.subarray(8) },
        { flags: OP.CONTINUE, data: format.subarray(0, 12) },
      ]),
      record([
        { flags: OP.WAS_CONT | OP.END, data: format.subarray(12) },
        { flags: OP.CONTINUE, data: content.subarray(0, 100) },
      ]),
      record([{ flags: OP.WAS_CONT | OP.CONTINUE, data: content.subarray(100, 200) }]),
      record([{ flags: OP.WAS_CONT | OP.END, data: content.subarray(200) }, { flags: OP.COMMIT }]),
    ]
    assert.deepEqual(chunksAfter(log), after({ 4: 6, 5: 6 }))
  })

  test('a cancelled buffer: what comes before is dropped, what comes after counts', () => {
    const cancel = buffer([], 0, { flags: BUF_FLAG.CANCEL })
    const log = [
      record(transaction(buffer([1], 1))),
      record(transaction(cancel)),
      record(transaction(buffer([2], 2))),
    ]
    assert.deepEqual(chunksAfter(log), after({ 2: 2 }))
    // In one transaction the cancellation is done last.
    assert.deepEqual(chunksAfter([record(transaction(cancel, buffer([1], 1)))]), after({}))
    // A buffer of another length is another buffer.
    const other = buffer([], 0, { flags: BUF_FLAG.CANCEL, length: 16 })
    assert.deepEqual(chunksAfter([log[0]!, record(transaction(other))]), after({ 1: 1 }))
    // One that was not committed cancels nothing.
    assert.deepEqual(chunksAfter([log[0]!, record(transaction(cancel).slice(0, -1))]), after({ 1: 1 }))
  })

  test('version 5: an item that the block on disk has already is left out', () => {
    const uuid = '00112233-4455-6677-8899-aabbccddeeff'
    const sb = { ...SB, version: 5, uuid, metaUuid: uuid } as Superblock
    const replay = new LogReplay(sb)
    replay.take(record(transaction(buffer([10], 1)), { lsn: 0x1_0000_0010n }))
    replay.take(record(transaction(buffer([11], 2)), { lsn: 0x1_0000_0020n }))
    const onDisk = (lsn: bigint): Uint8Array => {
      const bytes = new Uint8Array(4096)
      const view = new DataView(bytes.buffer)
      view.setUint32(0, 0x41423342)
      view.setBigUint64(24, lsn)
      bytes.set(Buffer.from(uuid.replaceAll('-', ''), 'hex'), 32)
      return bytes
    }
    const run = (lsn: bigint): [boolean, number, number] => {
      const bytes = onDisk(lsn)
      return [replay.apply(bytes, AT), bytes[10 * 128]!, bytes[11 * 128]!]
    }
    assert.deepEqual(run(0x1_0000_0001n), [true, 1, 2])
    assert.deepEqual(run(0x1_0000_0010n), [true, 0, 2])
    assert.deepEqual(run(0x1_0000_0020n), [false, 0, 0])
    assert.deepEqual(run(0n), [true, 1, 2])
    const foreign = onDisk(0x7_0000_0000n)
    foreign[40] = 0
    assert.ok(replay.apply(foreign, AT), 'a block of another file system has no say')
    assert.throws(() => replay.apply(new Uint8Array(512), AT), { reason: 'xfs-log-item' })
  })

  test('inodes, dquots, ICREATE and intents change nothing and disturb nothing', () => {
    const others = [
      ITEM.INODE,
      ITEM.DQUOT,
      ITEM.ICREATE,
      ITEM.EFI,
      ITEM.RUI,
      ITEM.CUI,
      ITEM.BUI,
      ITEM.ATTRI,
      ITEM.XMI,
    ]
    const items = others.map((type, i) => item(type, 1 + (i % 3)))
    assert.deepEqual(
      chunksAfter([record(transaction(...items, buffer([1], 1), item(ITEM.EFD)))]),
      after({ 1: 1 }),
    )
    const inodeBuffer = buffer([2], 2, { flags: BUF_FLAG.INODE_BUF, type: 8 })
    const directory = buffer([3], 3, { type: 11 })
    assert.deepEqual(
      chunksAfter([record(transaction(inodeBuffer, directory, buffer([1], 1)))]),
      after({ 1: 1 }),
    )
  })

  test('what contradicts itself is refused', () => {
    const good = transaction(buffer([1], 1))
    const [format, content] = buffer([1], 1) as [Uint8Array, Uint8Array]
    refused('xfs-log-item', record(transaction(item(0x1300))))
    refused('xfs-log-item', record(transaction([format])))
    refused('xfs-log-item', record(transaction([format, content.subarray(0, 64)])))
    refused('xfs-log-item', record(transaction([item(ITEM.BUF, 0)[0]!])))
    refused('xfs-log-item', record(transaction([item(ITEM.EFI, 300)[0]!])))
    refused('xfs-log-item', record([{ flags: OP.START }, { data: new Uint8Array(16) }]))
    refused('xfs-log-item', record([{ flags: OP.START }, { data: new Uint8Array(20) }]))
    refused('xfs-log-item', record([{ flags: OP.START }, ...good]))
    refused('xfs-log-item', record([{ flags: OP.START, data: new Uint8Array(4) }]))
    refused('xfs-log-item', record([...good.slice(0, 2), { flags: OP.WAS_CONT, data: content }]))
    refused('xfs-log-item', record([...good.slice(0, 2), { flags: 0x40 }]))
    refused('xfs-log-format', record(good, { format: 2 }))
    refused('xfs-log-record', record(good.map((op) => ({ ...op, client: 1 }))))
    const outside = buffer([20], 1, { length: 1 })
    refused('xfs-log-item', record(transaction(outside)))
    const wide = new Uint8Array(format)
    new DataView(wide.buffer).setUint32(16, 100, true)
    refused('xfs-log-item', record(transaction([wide, content])))
    const cut = record(good)
    refused('xfs-log-record', { ...cut, data: cut.data.subarray(0, cut.data.length - 4) })
  })
})
