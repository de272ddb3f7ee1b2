/** What the formats need of the host below them, where there is one. */
import { readSync } from 'node:fs'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { mapBounded, throwIfAborted } from '../base/index.ts'
import { type BlockDevice, checkOpen, checkRange, HostFileDevice } from '../device/index.ts'
import type { HostFile } from '../extents/index.ts'

/** The host file that `device` is, byte for byte; undefined for wrappers and memory. */
export function hostFileOf(device: BlockDevice): HostFile | undefined {
  return device instanceof HostFileDevice ? device.file : undefined
}

export interface SmallRead {
  readonly offset: number
  readonly into: Uint8Array
}

/** The event loop gets its turn at least this often. */
const SLICE_MS = 5
const READS = 16

/**
 * Many small reads, far apart: table sectors, bitmaps. From a host file the kernel is told of all of them first,
 * so that the disk works on them together, and then they are read in this thread: a read that finds its bytes in
 * memory costs less than handing it to another thread. All or nothing: throws when one of them fails.
 * `isOpen` says whether `device` may still be used, asked whenever others had their turn.
 */
export async function readMany(
  device: BlockDevice,
  reads: readonly SmallRead[],
  isOpen: () => boolean,
  signal?: AbortSignal,
): Promise<void> {
  if (!(device instanceof HostFileDevice) || reads.length < 2) {
    await mapBounded(reads, READS, ({ offset, into }) => device.read(offset, into, signal))
    return
  }
  for (const { offset, into } of reads) {
    checkRange(device.size, offset, into.length)
    device.advise('willneed', offset, into.length)
  }
  let sliceEnd = performance.now() + SLICE_MS
  for (const { offset, into } of reads) {
    if (performance.now() > sliceEnd) {
      await nextTurn()
      throwIfAborted(signal)
      checkOpen(!isOpen())
      sliceEnd = performance.now() + SLICE_MS
    }
    // What does not come whole at once is left to the device, which knows what that means.
    if (!readNow(device.file, offset, into)) {
      await device.read(offset, into, signal)
      checkOpen(!isOpen())
    }
  }
}

function readNow(file: HostFile, offset: number, into: Uint8Array): boolean {
  try {
    return readSync(file.fd, into, 0, into.length, offset) === into.length
  } catch {
    return false
  }
}
