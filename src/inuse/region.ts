/** The answer of the room: which bytes of a disk are in use, and a verdict on each part of it. */

import type { RangeSet } from '../extents/index.ts'
import type { Trust } from '../filesystems/index.ts'

/** Why a region is taken as wholly in use. */
export interface Reason {
  /** Stable; listed in docs/errors.md, section Reasons. */
  readonly code: string
  /** A sentence for people; may change. */
  readonly text: string
}

/**
 * A part of a disk with one verdict. The regions of a map cover the disk without gap or overlap, and so do the
 * children of a region that has any.
 */
export interface Region {
  /** Bytes of the disk, also for children; of the volume itself below `volumes`. */
  readonly offset: number
  readonly length: number
  /** `mbr`, `gpt`, `partition`, `gap`, `ext4`, `fat32`, `swap`, …, `unknown`: docs/in-use.md lists them. */
  readonly kind: string
  /** Number or name in its table. */
  readonly name?: string
  readonly uuid?: string
  readonly label?: string
  /** For people: `clean`, `dirty: journal replayed`, … */
  readonly state?: string
  readonly inUseBytes: number
  /** The least trusted of its children, where it has any. */
  readonly trust: Trust
  /** Set when `trust` is `assumed` and the region has no children that say why. */
  readonly reason?: Reason
  readonly children?: readonly Region[]
  /**
   * Volumes of the group (LVM2, md) that this region is a member of, in bytes of each volume. Given once, with
   * the group's first member; their in-use bytes are not part of any sum.
   */
  readonly volumes?: readonly (readonly Region[])[]
}

export interface InUseMap {
  /** Size of the disk, bytes. */
  readonly size: number
  /** What is in use; inside `[0, size)`. */
  readonly ranges: RangeSet
  /** The part of `ranges` that is in use only because nobody could vouch for it (`trust` `assumed`). */
  readonly assumed: RangeSet
  readonly regions: readonly Region[]
  /** Sum of `ranges`, and of the regions' own. */
  readonly inUseBytes: number
}
