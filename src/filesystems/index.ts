/** Rank 3: file systems: device -> used ranges. The registry is this explicit list. */
import { btrfsType } from './btrfs/index.ts'
import { exfat } from './exfat/index.ts'
import { extType } from './ext/index.ts'
import { fat } from './fat/index.ts'
import type { FileSystemType } from './file-system.ts'
import { hfsplus } from './hfsplus/index.ts'
import { ntfsType } from './ntfs/index.ts'
import { foreign, raidMember } from './signatures/index.ts'
import { swap } from './swap/index.ts'
import { xfsType } from './xfs/index.ts'

export * from './file-system.ts'

/** Every type is probed; two that match make a region ambiguous, so the order does not matter. */
export const FILE_SYSTEM_TYPES: readonly FileSystemType[] = [
  btrfsType,
  exfat,
  extType,
  fat,
  hfsplus,
  ntfsType,
  swap,
  xfsType,
  ...foreign,
]

/** Wins over any other signature: what stands at the start of such a device belongs to the array. */
export const RAID_MEMBER: FileSystemType = raidMember
