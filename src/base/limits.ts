/**
 * Limits against hostile images, in one place. An image that claims more than these is not believed (LIMIT),
 * because no tool that makes real images goes there and believing it would cost memory or time without bound.
 */
import { VarveError } from './errors.ts'

export const LIMITS = {
  /** Layers of one chain. */
  chainDepth: 256,
  /** One table (L1, BAT, GPT entries, directory …) read whole into memory. */
  tableBytes: 67_108_864,
  /** All tables that one layer may hold in memory at a time. */
  tableCacheBytes: 67_108_864,
  /** EBRs followed in one extended partition. */
  logicalPartitions: 256,
  /** Entries of a GPT. */
  gptEntries: 1024,
  /** Nodes of one on-disk tree that a walk may visit before it is taken for a loop, per MiB of file system. */
  treeNodesPerMiB: 256,
  /** A journal read for replay. */
  journalBytes: 2_147_483_648,
  /** Patched bytes that a journal replay may hold in memory. */
  overlayBytes: 268_435_456,
} as const

/** Throws LIMIT unless `value` is an integer in [0, most]. Call it before allocating or looping by a field. */
export function within(value: number, most: number, what: string): number {
  if (!(Number.isSafeInteger(value) && value >= 0 && value <= most)) {
    throw new VarveError('LIMIT', `Cannot accept ${what}: found ${value}, expected at most ${most}`, {
      fields: { field: what, value, most },
    })
  }
  return value
}
