/**
 * Rank 4: disk -> in-use map with a verdict per region. What the words mean and which rules hold: docs/in-use.md.
 */
import type { BlockDevice } from '../device/index.ts'
import { mapDisks } from './map.ts'
import type { InUseMap } from './region.ts'
import type { MapOptions } from './walk.ts'

export type { Trust } from '../filesystems/index.ts'
export type { InUseMap, Reason, Region } from './region.ts'
export type { MapOptions } from './walk.ts'

/**
 * Which bytes of `disk` its partition tables, volume managers and file systems need. Reads metadata only; what
 * cannot be vouched for is in use, with a reason in its region. The disk must not change while this runs (map a
 * snapshot), and stays the caller's.
 * @throws what the disk throws when it cannot be read; CANCELLED. Never for what stands on the disk.
 */
export async function mapInUse(disk: BlockDevice, options: MapOptions = {}): Promise<InUseMap> {
  return (await mapDisks([disk], options))[0]!
}

/** As `mapInUse`, for disks whose volume groups, arrays and file systems spread over them. One map per disk. */
export async function mapInUseTogether(
  disks: readonly BlockDevice[],
  options: MapOptions = {},
): Promise<readonly InUseMap[]> {
  return mapDisks(disks, options)
}
