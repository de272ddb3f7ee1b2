/** What the formats need of the host below them, where there is one. */
import { type BlockDevice, HostFileDevice } from '../device/index.ts'
import type { HostFile } from '../extents/index.ts'

/** The host file that `device` is, byte for byte; undefined for wrappers and memory. */
export function hostFileOf(device: BlockDevice): HostFile | undefined {
  return device instanceof HostFileDevice ? device.file : undefined
}

/** Asks the kernel to start reading these bytes now; nothing where that cannot be asked. */
export function prefetch(device: BlockDevice, offset: number, length: number): void {
  if (device instanceof HostFileDevice) device.advise('willneed', offset, length)
}
