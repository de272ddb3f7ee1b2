/**
 * Replay of a VHDX log in memory. The original is never written: what the log changes lives in an overlay.
 *
 * Rules (specification §2.3.3): a log with a GUID must be replayed before anything else is read. The active sequence
 * is the whole, valid one with the greatest sequence number; it is replayed from its tail to its head, and no other
 * entry is. No such sequence, or a file shorter than the head says it was when written: CORRUPT.
 */
import { LIMITS, throwIfAborted, within } from '../../base/index.ts'
import {
  type BlockDevice,
  ConcatDevice,
  OverlayDevice,
  readBytes,
  SliceDevice,
  ZeroDevice,
} from '../../device/index.ts'
import {
  corrupt,
  decodeLogEntry,
  HEADER_SECTION_BYTES,
  type Header,
  LOG_SECTOR,
  type LogEntry,
  MIB,
  NIL_GUID,
  unsupported,
} from './layout.ts'

/** Writers make logs of 1 MiB; all of it is held while entries are looked for. */
const MOST_LOG_BYTES: number = LIMITS.tableBytes

export interface Replayed {
  /** `file`, with what the log says over it. Borrows `file`. */
  readonly device: BlockDevice
  readonly entries: number
}

/** Where the log lies; undefined when the header names none. @throws CORRUPT */
export function logPlace(header: Header): { readonly start: number; readonly end: number } | undefined {
  const [start, length] = [Number(header.logOffset), header.logLength]
  if (length === 0 && header.logGuid === NIL_GUID) return undefined
  if (
    length === 0 ||
    length % MIB !== 0 ||
    start % MIB !== 0 ||
    start < HEADER_SECTION_BYTES ||
    start > 2 ** 52
  ) {
    throw corrupt('header', `a log at ${header.logOffset}+${length}`, 'whole MiB behind the headers')
  }
  return { start, end: start + length }
}

/** Replays the log where there is one to replay; undefined when there is none. @throws CORRUPT, UNSUPPORTED, LIMIT */
export async function replayLog(
  file: BlockDevice,
  header: Header,
  signal?: AbortSignal,
): Promise<Replayed | undefined> {
  const place = logPlace(header)
  if (header.logGuid === NIL_GUID || !place) return undefined
  if (header.logVersion !== 0) throw unsupported(`log version ${header.logVersion}`, '0')
  const length = within(place.end - place.start, MOST_LOG_BYTES, 'bytes of a VHDX log')
  if (place.end > file.size) throw corrupt('log', `its end at ${place.end}`, `it in the ${file.size} bytes`)
  const log = await readBytes(file, place.start, length, signal)
  const active = activeSequence(log, header.logGuid, signal)
  if (!active) throw corrupt('log', 'no whole sequence of entries', 'one to replay')
  const head = active.at(-1)!
  if (file.size < head.flushedFileOffset) {
    throw corrupt('file', `${file.size} bytes`, `at least the ${head.flushedFileOffset} that its log names`)
  }
  let size = Math.max(file.size, head.lastFileOffset)
  const writes = active.flatMap((entry) => entry.descriptors())
  for (const write of writes) {
    const bytes = write.kind === 'zero' ? write.length : write.bytes.length
    size = Math.max(size, write.offset + bytes)
    if (write.offset < HEADER_SECTION_BYTES && !inRegionTables(write.offset, bytes)) {
      throw corrupt('log', `a write to byte ${write.offset}`, 'none into the headers')
    }
  }
  const whole = new SliceDevice(file, 0, file.size)
  const grown = size > file.size ? new ConcatDevice([whole, new ZeroDevice(size - file.size)]) : whole
  const overlay = new OverlayDevice(grown)
  const zeros = new Uint8Array(MIB)
  let zeroed = 0
  for (const write of writes) {
    throwIfAborted(signal)
    if (write.kind === 'data') {
      overlay.patch(write.offset, write.bytes)
      continue
    }
    zeroed = within(zeroed + write.length, LIMITS.overlayBytes, 'bytes zeroed by a VHDX log')
    for (let done = 0; done < write.length; done += zeros.length) {
      overlay.patch(write.offset + done, zeros.subarray(0, Math.min(zeros.length, write.length - done)))
    }
  }
  return { device: overlay, entries: active.length }
}

/** Region tables are the one part of the header section that goes through the log. */
function inRegionTables(offset: number, length: number): boolean {
  return offset >= 192 * 1024 && offset + length <= 320 * 1024
}

/**
 * Entries of the active sequence, tail first. Entries follow each other in the ring, each one's number one above the
 * one before; no two valid entries share a sector, so these runs are disjoint and one pass finds them.
 */
export function activeSequence(
  log: Uint8Array,
  guid: string,
  signal?: AbortSignal,
): readonly LogEntry[] | undefined {
  const sectors = log.length / LOG_SECTOR
  const entries = new Map<number, LogEntry>()
  for (let start = 0; start < sectors; start++) {
    if (start % 256 === 0) throwIfAborted(signal)
    const sector = (index: number): Uint8Array => {
      const at = ((start + index) % sectors) * LOG_SECTOR
      return log.subarray(at, at + LOG_SECTOR)
    }
    const entry = decodeLogEntry(sector, sectors, guid)
    if (entry) entries.set(start * LOG_SECTOR, entry)
  }
  const next = (at: number, entry: LogEntry): number | undefined => {
    const follower = (at + entry.length) % log.length
    return entries.get(follower)?.sequenceNumber === entry.sequenceNumber + 1n ? follower : undefined
  }
  const followers = new Set<number>()
  for (const [at, entry] of entries) {
    const follower = next(at, entry)
    if (follower !== undefined) followers.add(follower)
  }
  let best: LogEntry[] | undefined
  for (const first of entries.keys()) {
    if (followers.has(first)) continue
    const places: number[] = []
    for (let at: number | undefined = first; at !== undefined; at = next(at, entries.get(at)!))
      places.push(at)
    const head = entries.get(places.at(-1)!)!
    const tail = places.indexOf(head.tail)
    if (tail < 0 || (best && best.at(-1)!.sequenceNumber >= head.sequenceNumber)) continue
    best = places.slice(tail).map((at) => entries.get(at)!)
  }
  return best
}
