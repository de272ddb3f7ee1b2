/**
 * THE interface in the middle. The bottom file, each layer, the top of a chain, a partition and a wrapper all
 * look like this, so every wrapper fits anywhere.
 *
 * Rules:
 * - Offsets and lengths are bytes, `number`, inside `[0, size]`. Outside is the caller's bug: RangeError
 *   (`checkRange`). Any byte range may be asked for; `blockSize` is a fact about the disk, not a restriction.
 * - `read` fills the whole buffer or throws; it is never short. Calls may overlap in time.
 * - A wrapper writes out every method (no base class, no Proxy), so that a new method breaks the build, not data.
 * - Whoever opened a device disposes of it. A wrapper owns what it wraps unless its comment says "borrows".
 * - After dispose every method throws TypeError; to dispose twice does nothing.
 * - A signal that has fired makes a call reject with CANCELLED before it starts its work; what it had begun may
 *   be done in part.
 * - A wrapper that can write has the three methods at all times; over a device that cannot they throw READ_ONLY.
 */
import { VarveError } from '../base/index.ts'
import type { Extent } from '../extents/index.ts'

/** Features are data: ask first, refuse by code. */
export interface Features {
  /** `write`, `zero` and `flush` are there and work. */
  readonly write: boolean
  /** `resize` is there and works. */
  readonly resize: boolean
  /** `extents` tells holes, zeros and data apart. When false it answers one `data` extent for everything. */
  readonly sparse: boolean
  /** Data extents carry `at`, the place in a host file. */
  readonly places: boolean
}

export interface BlockDevice extends AsyncDisposable {
  readonly size: number
  /** Logical sector size in bytes, 512 or 4096: partition tables count in it. */
  readonly blockSize: number
  readonly features: Features
  /** Fills `into` completely from `offset`, or throws. Never short. */
  read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void>
  /**
   * What this device knows about `[offset, offset + length)`; length > 0. Contiguous, ascending, not empty, the
   * first starts at `offset`; may stop before `offset + length`, so the caller asks on from where it stopped.
   */
  extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]>
}

export interface WritableBlockDevice extends BlockDevice {
  /** Writes all of `bytes`. Seen by later reads at once; durable only after `flush`. */
  write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void>
  /** The range reads as zeros afterwards; the space is given back where the device can. */
  zero(offset: number, length: number, signal?: AbortSignal): Promise<void>
  /** When it resolves, all writes that resolved before it was called survive power loss. */
  flush(signal?: AbortSignal): Promise<void>
}

export interface ResizableBlockDevice extends WritableBlockDevice {
  readonly size: number
  /** New size in bytes; what is added reads as zeros. */
  resize(size: number, signal?: AbortSignal): Promise<void>
}

/** Throws RangeError unless `[offset, offset + length)` lies in the device. First line of every read and write. */
export function checkRange(size: number, offset: number, length: number): void {
  if (
    !(
      Number.isSafeInteger(offset) &&
      Number.isSafeInteger(length) &&
      offset >= 0 &&
      length >= 0 &&
      offset + length <= size
    )
  ) {
    throw new RangeError(`range ${offset}+${length} is outside the device of ${size} bytes`)
  }
}

/** As `checkRange`, for `extents`: a request for no bytes has no answer, so it is a RangeError too. */
export function checkExtentRange(size: number, offset: number, length: number): void {
  checkRange(size, offset, length)
  if (length === 0) throw new RangeError(`extents of no bytes at ${offset}`)
}

/** Throws TypeError once a device is disposed of: using it then is the caller's bug. */
export function checkOpen(disposed: unknown): void {
  if (disposed) throw new TypeError('device is disposed')
}

/** `length` bytes at `offset` in a new buffer. The caller has checked `length` against the file or a limit. */
export async function readBytes(
  device: BlockDevice,
  offset: number,
  length: number,
  signal?: AbortSignal,
): Promise<Uint8Array> {
  checkRange(device.size, offset, length)
  const into = new Uint8Array(length)
  await device.read(offset, into, signal)
  return into
}

/** Every extent of `[offset, offset + length)`, asking on where the device stops early. */
export async function* allExtents(
  device: BlockDevice,
  offset = 0,
  length: number = device.size - offset,
  signal?: AbortSignal,
): AsyncGenerator<Extent> {
  const end = offset + length
  let at = offset
  while (at < end) {
    for (const extent of await device.extents(at, end - at, signal)) {
      yield extent
      at = extent.offset + extent.length
    }
  }
}

export function isWritable(device: BlockDevice): device is WritableBlockDevice {
  return device.features.write
}

export function isResizable(device: BlockDevice): device is ResizableBlockDevice {
  return device.features.write && device.features.resize
}

/** The device as a writable one. @throws READ_ONLY when it is not */
export function asWritable(device: BlockDevice): WritableBlockDevice {
  if (isWritable(device)) return device
  throw new VarveError('READ_ONLY', 'Cannot write: found a device open for reading, expected one for writing')
}
