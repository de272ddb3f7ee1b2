/** Copies between host files without a byte passing through this program: reflink, else copy in the kernel. */
import type { HostPlace } from '../../extents/index.ts'
import type { HostFileDevice } from './host-file.ts'

export interface CopyRange {
  /** Where the bytes stand: an extent's `at`. */
  readonly from: HostPlace
  readonly to: HostFileDevice
  /** Offset in `to`, bytes. */
  readonly offset: number
  readonly length: number
  readonly signal?: AbortSignal | undefined
}

/**
 * Tries FICLONERANGE where the range allows it, then copy_file_range. Returns how many bytes stand in `to` now,
 * counted from `offset`; fewer than `length` (0 included) says that the host cannot do the rest, and the caller
 * then reads and writes it. Give data only: holes in the source come out as written zeros.
 * @throws NO_SPACE, IO, READ_ONLY as a write does
 */
export async function copyRange({ from, to, offset, length, signal }: CopyRange): Promise<number> {
  return await to.copyFrom(from, offset, length, signal)
}
