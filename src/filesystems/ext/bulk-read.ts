/**
 * Reads many single blocks as few, large, parallel reads: group descriptor tables, bitmaps, inode tables.
 *
 * Rule: memory is one batch (4 MiB) however many blocks are asked for; blocks are handed over in the order asked.
 */
import { mapBounded, throwIfAborted } from '../../base/index.ts'
import type { BlockDevice } from '../../device/index.ts'

/** Blocks whose gap is below this are read in one go: a read costs more than as many bytes. */
const GAP_BYTES = 8192
const BATCH_BYTES = 4_194_304
const READ_BYTES = 1_048_576
const PARALLEL_READS = 8

interface Run {
  /** Index in `blocks` of its first member, and after its last. */
  readonly from: number
  readonly to: number
  /** Where its bytes stand in the batch buffer. */
  readonly at: number
  readonly bytes: number
}

/**
 * Calls `visit(index, bytes)` for each of `blocks` (ascending block numbers, all inside the device) in order.
 * `bytes` is one block and valid only during the call.
 */
export async function readBlocks(
  device: BlockDevice,
  blockBytes: number,
  blocks: Float64Array,
  visit: (index: number, bytes: Uint8Array) => void,
  signal?: AbortSignal,
): Promise<void> {
  let buffer = new Uint8Array(0)
  for (let from = 0; from < blocks.length; ) {
    throwIfAborted(signal)
    const runs: Run[] = []
    let filled = 0
    while (from < blocks.length) {
      const to = runEnd(blocks, from, blockBytes)
      const bytes = (blocks[to - 1]! - blocks[from]! + 1) * blockBytes
      if (runs.length > 0 && filled + bytes > BATCH_BYTES) break
      runs.push({ from, to, at: filled, bytes })
      filled += bytes
      from = to
    }
    if (buffer.length < filled) buffer = new Uint8Array(filled)
    await mapBounded(runs, PARALLEL_READS, (run) =>
      device.read(blocks[run.from]! * blockBytes, buffer.subarray(run.at, run.at + run.bytes), signal),
    )
    for (const run of runs) {
      for (let index = run.from; index < run.to; index++) {
        const at = run.at + (blocks[index]! - blocks[run.from]!) * blockBytes
        visit(index, buffer.subarray(at, at + blockBytes))
      }
    }
  }
}

function runEnd(blocks: Float64Array, from: number, blockBytes: number): number {
  const first = blocks[from]!
  let to = from + 1
  while (
    to < blocks.length &&
    (blocks[to]! - blocks[to - 1]! - 1) * blockBytes < GAP_BYTES &&
    (blocks[to]! - first + 1) * blockBytes <= READ_BYTES
  ) {
    to++
  }
  return to
}
