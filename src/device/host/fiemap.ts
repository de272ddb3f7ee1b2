/**
 * FIEMAP: where the blocks of a file lie on its file system's device (Linux Documentation/filesystems/fiemap.rst).
 *
 *   struct fiemap          u64 start @0, u64 length @8, u32 flags @16, u32 mapped_extents @20,
 *                          u32 extent_count @24, u32 reserved @28, extents @32
 *   struct fiemap_extent   u64 logical @0, u64 physical @8, u64 length @16, u64 reserved[2], u32 flags @40, 56 bytes
 *
 * Rule: the answer never decides what is data (unwritten and delayed extents lie here); SEEK_DATA does that.
 */
import { fromSystem, narrow, throwIfAborted, VarveError } from '../../base/index.ts'
import type { HostFile } from '../../extents/index.ts'
import { systemCalls } from './system-calls.ts'
import { isNotOffered } from './system-error.ts'

export interface FiemapExtent {
  /** Offset in the file, bytes. */
  readonly logical: number
  /** Offset on the file system's device, bytes; means nothing when `flags` has one of FIEMAP_NO_PLACE. */
  readonly physical: number
  readonly length: number
  /** FIEMAP_EXTENT bits. */
  readonly flags: number
}

export const FIEMAP_EXTENT = {
  last: 0x0001,
  unknown: 0x0002,
  delalloc: 0x0004,
  encoded: 0x0008,
  encrypted: 0x0080,
  notAligned: 0x0100,
  inline: 0x0200,
  tail: 0x0400,
  unwritten: 0x0800,
  merged: 0x1000,
  shared: 0x2000,
} as const

/** Bits that say: `physical` is no place from which the bytes could be read. */
export const FIEMAP_NO_PLACE: number =
  FIEMAP_EXTENT.unknown |
  FIEMAP_EXTENT.delalloc |
  FIEMAP_EXTENT.encoded |
  FIEMAP_EXTENT.encrypted |
  FIEMAP_EXTENT.notAligned |
  FIEMAP_EXTENT.inline |
  FIEMAP_EXTENT.tail

const FLAG_SYNC = 1
const HEADER_BYTES = 32
const EXTENT_BYTES = 56
const EXTENTS_PER_CALL = 512

export interface FiemapOptions {
  /** Write delayed blocks out first, so that each has its place. Default true. */
  readonly sync?: boolean
  readonly start?: number
  /** Default: to the end. */
  readonly length?: number
  readonly signal?: AbortSignal | undefined
}

/**
 * The extents of an open file, ascending, in groups of at most 512. Holes are left out.
 * @throws UNSUPPORTED where the host or the file system has no FIEMAP
 */
export function* fiemap(file: HostFile, options: FiemapOptions = {}): Generator<readonly FiemapExtent[]> {
  const calls = systemCalls()
  if (!calls) throw notOffered(file)
  const request = new Uint8Array(HEADER_BYTES + EXTENTS_PER_CALL * EXTENT_BYTES)
  const view = new DataView(request.buffer)
  let start = options.start ?? 0
  const end = options.length === undefined ? Number.POSITIVE_INFINITY : start + options.length
  let flags = (options.sync ?? true) ? FLAG_SYNC : 0
  while (start < end) {
    throwIfAborted(options.signal)
    view.setBigUint64(0, BigInt(start), true)
    view.setBigUint64(8, Number.isFinite(end) ? BigInt(end - start) : 2n ** 63n - 1n - BigInt(start), true)
    view.setUint32(16, flags, true)
    view.setUint32(20, 0, true)
    view.setUint32(24, EXTENTS_PER_CALL, true)
    try {
      calls.fiemap(file.fd, request)
    } catch (error) {
      if (isNotOffered(error)) throw notOffered(file, error)
      throw fromSystem(error, 'map the blocks of', file.path)
    }
    // The first call has written everything out; to wait again for each group would only follow new writes.
    flags = 0
    const group = decode(view)
    if (group.length === 0) return
    yield group
    const last = group.at(-1)!
    const next = last.logical + last.length
    if (last.flags & FIEMAP_EXTENT.last || next <= start) return
    start = next
  }
}

function decode(view: DataView): readonly FiemapExtent[] {
  const count = Math.min(view.getUint32(20, true), EXTENTS_PER_CALL)
  return Array.from({ length: count }, (_, index) => {
    const at = HEADER_BYTES + index * EXTENT_BYTES
    return {
      logical: narrow(view.getBigUint64(at, true), 'FIEMAP logical'),
      physical: narrow(view.getBigUint64(at + 8, true), 'FIEMAP physical'),
      length: narrow(view.getBigUint64(at + 16, true), 'FIEMAP length'),
      flags: view.getUint32(at + 40, true),
    }
  })
}

function notOffered(file: HostFile, cause?: unknown): VarveError {
  return new VarveError(
    'UNSUPPORTED',
    `Cannot map the blocks of ${file.path}: its file system does not tell them (no FIEMAP)`,
    { cause, fields: { path: file.path }, hint: 'Put the file on ext4, XFS or Btrfs of a local Linux host.' },
  )
}
