/** Compares a point with a disk, byte by byte, over what is in use on the disk now and was kept then. */

import type { Context } from '../base/index.ts'
import { throwIfAborted } from '../base/index.ts'
import type { BlockDevice } from '../device/index.ts'
import { RangeSet } from '../extents/index.ts'
import type { VerifyAgainstResult } from './contract.ts'
import type { RepositoryPointDevice } from './point-device.ts'

const PIECE_BYTES = 1_048_576
const PIECES_UNDER_WAY = 6
const MOST_DIFFERENCES = 100

export async function verifyAgainst(
  point: RepositoryPointDevice,
  source: { readonly device: BlockDevice; readonly inUse: RangeSet },
  options: Context,
): Promise<VerifyAgainstResult> {
  const started = performance.now()
  const { device } = source
  const common = Math.min(device.size, point.size)
  const wanted = source.inUse.clip(0, device.size)
  const kept = await point.inUse()
  const toCompare = wanted.intersect(kept).clip(0, common)
  const notKept = wanted.subtract(kept)
  const totalBytes = toCompare.size
  const differences: { start: number; length: number }[] = []
  let doneBytes = 0
  const pieces = piecesOf(toCompare)
  const lane = async (): Promise<void> => {
    const ours = new Uint8Array(PIECE_BYTES)
    const theirs = new Uint8Array(PIECE_BYTES)
    for (const { start, length } of pieces) {
      throwIfAborted(options.signal)
      const [a, b] = [ours.subarray(0, length), theirs.subarray(0, length)]
      const reads = await Promise.allSettled([
        point.read(start, a, options.signal),
        device.read(start, b, options.signal),
      ])
      for (const read of reads) if (read.status === 'rejected') throw read.reason
      if (Buffer.compare(a, b) !== 0) addDifferences(differences, start, a, b)
      doneBytes += length
      options.progress?.({ phase: 'compare', doneBytes, totalBytes })
    }
  }
  const lanes = await Promise.allSettled(Array.from({ length: PIECES_UNDER_WAY }, lane))
  for (const result of lanes) if (result.status === 'rejected') throw result.reason
  if (device.size !== point.size) {
    differences.push({ start: common, length: Math.max(device.size, point.size) - common })
  }
  return {
    disk: point.info.disk,
    point: point.info.point,
    equal: differences.length === 0 && notKept.isEmpty,
    comparedBytes: totalBytes,
    differences: joined(differences).slice(0, MOST_DIFFERENCES),
    notKeptBytes: notKept.size,
    seconds: (performance.now() - started) / 1000,
  }
}

/** One generator, drawn on by all lanes. */
function* piecesOf(ranges: RangeSet): Generator<{ start: number; length: number }> {
  for (const { start, end } of ranges) {
    for (let at = start; at < end; ) {
      const stop = Math.min(end, at + PIECE_BYTES - (at % PIECE_BYTES))
      yield { start: at, length: stop - at }
      at = stop
    }
  }
}

function addDifferences(
  into: { start: number; length: number }[],
  offset: number,
  a: Uint8Array,
  b: Uint8Array,
): void {
  let from = -1
  for (let i = 0; i <= a.length; i++) {
    const differs = i < a.length && a[i] !== b[i]
    if (differs && from < 0) from = i
    if (!differs && from >= 0) {
      // Enough to show; what is behind is in the count of none.
      if (into.length < MOST_DIFFERENCES * PIECES_UNDER_WAY)
        into.push({ start: offset + from, length: i - from })
      from = -1
    }
  }
}

function joined(
  differences: readonly { start: number; length: number }[],
): { start: number; length: number }[] {
  return Array.from(
    RangeSet.from(differences.map(({ start, length }) => ({ start, end: start + length }))),
    ({ start, end }) => ({ start, length: end - start }),
  )
}
