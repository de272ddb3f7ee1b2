/**
 * Whether some program has an image open for writing, read from QEMU's locks (see locks.ts) without taking any: a
 * question must not stop a VM that starts at the same moment.
 */
import { fromSystem } from '../../base/index.ts'
import type { HostFileDevice } from './host-file.ts'
import { systemCalls } from './system-calls.ts'
import { isNotOffered, SystemError } from './system-error.ts'

/** Bytes that QEMU's writers hold: permission to write (1) and to resize (3). */
const WRITER_BYTES = [101, 103] as const

/** True while another opening of the file writes to it; undefined where the host has no such locks. */
export function heldByWriter(image: HostFileDevice): boolean | undefined {
  const calls = systemCalls()
  if (!calls) return undefined
  try {
    return WRITER_BYTES.some((start) =>
      calls.conflictingLock(image.file.fd, 'exclusive', { start, length: 1 }),
    )
  } catch (error) {
    if (isNotOffered(error) || (error instanceof SystemError && error.code === 'ENOLCK')) return undefined
    throw fromSystem(error, 'ask for the locks of', image.file.path)
  }
}
