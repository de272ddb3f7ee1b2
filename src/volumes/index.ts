/** Rank 3: partition tables and volume managers. The registry is this explicit list. */
import { apm } from './apm/index.ts'
import { bsd, bsdSlice } from './bsd/index.ts'
import { gpt } from './gpt/index.ts'
import { lvm } from './lvm/index.ts'
import { mbr } from './mbr/index.ts'
import { md } from './md/index.ts'
import { sun } from './sun/index.ts'
import type { VolumeScheme } from './volume.ts'

export * from './volume.ts'

/**
 * In the order in which groups are assembled: what others are stacked on comes first (md before LVM2), so that
 * all members of a group are known when it is opened.
 */
export const VOLUME_SCHEMES: readonly VolumeScheme[] = [gpt, mbr, apm, bsd, bsdSlice, sun, md, lvm]
