/**
 * The one copy engine: convert and restore both use it.
 *
 * It asks the source what it holds, skips what it does not, and moves the rest in pieces of 1 MiB, four under way
 * (more does not pay on local files). Where source and target are host files and the source says where its bytes
 * stand, the kernel moves them and no byte passes through here.
 *
 * Rules:
 * - Outside of `ranges` nothing of the target is touched.
 * - What reads as zeros is skipped when the target is known to be zero there (`targetIsZero`), else zeroed.
 * - Nothing is durable before the caller's own `flush`.
 */
import { type Context, isZero, throwIfAborted } from '../base/index.ts'
import {
  allExtents,
  type BlockDevice,
  copyRange,
  HostFileDevice,
  type WritableBlockDevice,
} from '../device/index.ts'
import { type Extent, type HostPlace, RangeSet } from '../extents/index.ts'

export interface CopyOptions extends Context {
  /** What to copy, bytes; default all of the source. */
  readonly ranges?: RangeSet | undefined
  /** The target reads as zeros wherever it is not written to (a new image). Default false. */
  readonly targetIsZero?: boolean
  /**
   * Looks for zeros in data too and leaves them out, in runs of 32 KiB and more. The bytes then pass through here.
   * Default false.
   */
  readonly detectZeroes?: boolean
  /** Pieces under way at once. Default 4. */
  readonly parallel?: number
}

export interface CopyResult {
  /** Data that was written to the target, bytes. */
  readonly copiedBytes: number
  /** Part of `ranges` that reads as zeros: holes, and with `detectZeroes` what was found. */
  readonly zeroBytes: number
  /** Bytes of the source outside of `ranges`. */
  readonly skippedBytes: number
}

/** One piece through memory. */
const PIECE_BYTES = 1024 * 1024
/** One piece that the kernel moves. */
const KERNEL_PIECE_BYTES = 16 * 1024 * 1024
const PARALLEL = 4
/** Zeros are looked for in units of this, and left out in runs of at least ZERO_RUN_BYTES. */
const ZERO_UNIT_BYTES = 4096
const ZERO_RUN_BYTES = 32 * 1024

interface Piece {
  readonly start: number
  readonly end: number
  readonly kind: 'data' | 'zero'
  readonly at: HostPlace | undefined
}

/**
 * Copies `source` into `target`, which is at least as large wherever `ranges` reach. Both stay open and are the
 * caller's. @throws CANCELLED, and what reading and writing throw
 */
export async function copyDevice(
  source: BlockDevice,
  target: WritableBlockDevice,
  options: CopyOptions = {},
): Promise<CopyResult> {
  const { signal, progress, targetIsZero = false, detectZeroes = false } = options
  const ranges = (options.ranges ?? RangeSet.of(0, source.size)).clip(0, source.size)
  const end = ranges.end ?? 0
  if (end > target.size) throw new RangeError(`target of ${target.size} bytes is smaller than ${end}`)
  const totalBytes = progress ? await countData(source, ranges, signal) : 0
  const kernel = !detectZeroes && target instanceof HostFileDevice ? target : undefined
  let copiedBytes = 0
  let zeroBytes = 0
  let doneBytes = 0
  progress?.({ phase: 'copy', doneBytes, totalBytes })

  async function zeros(start: number, stop: number): Promise<void> {
    if (start === stop) return
    zeroBytes += stop - start
    if (!targetIsZero) await target.zero(start, stop - start, signal)
  }

  async function data(piece: Piece, buffer: Uint8Array): Promise<void> {
    let { start } = piece
    if (piece.at && kernel) {
      const moved = await copyRange({
        from: piece.at,
        to: kernel,
        offset: start,
        length: piece.end - start,
        signal,
      })
      copiedBytes += moved
      start += moved
    }
    while (start < piece.end) {
      throwIfAborted(signal)
      const bytes = buffer.subarray(0, Math.min(PIECE_BYTES, piece.end - start))
      await source.read(start, bytes, signal)
      if (!detectZeroes) {
        await target.write(start, bytes, signal)
        copiedBytes += bytes.length
      } else {
        for (const run of splitZeros(bytes)) {
          if (run.zero) await zeros(start + run.from, start + run.to)
          else {
            await target.write(start + run.from, bytes.subarray(run.from, run.to), signal)
            copiedBytes += run.to - run.from
          }
        }
      }
      start += bytes.length
    }
  }

  const pieces = piecesOf(source, ranges, kernel !== undefined, signal)
  const failures: unknown[] = []
  async function lane(): Promise<void> {
    const buffer = new Uint8Array(PIECE_BYTES)
    try {
      while (failures.length === 0) {
        const next = await pieces.next()
        if (next.done) return
        throwIfAborted(signal)
        const piece = next.value
        if (piece.kind === 'zero') await zeros(piece.start, piece.end)
        else {
          await data(piece, buffer)
          doneBytes += piece.end - piece.start
          progress?.({ phase: 'copy', doneBytes, totalBytes })
        }
      }
    } catch (error) {
      failures.push(error)
    }
  }
  await Promise.all(Array.from({ length: Math.max(1, options.parallel ?? PARALLEL) }, lane))
  await pieces.return(undefined)
  if (failures.length > 0) throw failures[0]
  return { copiedBytes, zeroBytes, skippedBytes: source.size - ranges.size }
}

/**
 * The work, in the order of the disk. Data that touches is joined whatever its place, up to a multiple of
 * PIECE_BYTES of the disk, so that writes are aligned; a piece that the kernel can move has one place.
 */
async function* piecesOf(
  source: BlockDevice,
  ranges: RangeSet,
  kernel: boolean,
  signal: AbortSignal | undefined,
): AsyncGenerator<Piece, undefined> {
  let held: Piece | undefined
  for await (const extent of wantedExtents(source, ranges, signal)) {
    const kind = extent.kind === 'data' ? 'data' : 'zero'
    const extentEnd = extent.offset + extent.length
    if (kind === 'zero') {
      if (held) yield held
      held = undefined
      yield { start: extent.offset, end: extentEnd, kind, at: undefined }
      continue
    }
    let { offset: start } = extent
    while (start < extentEnd) {
      const at: HostPlace | undefined =
        kernel && extent.at
          ? { file: extent.at.file, offset: extent.at.offset + start - extent.offset }
          : undefined
      const unit = at ? KERNEL_PIECE_BYTES : PIECE_BYTES
      const end = Math.min(extentEnd, start - (start % unit) + unit)
      if (held && held.end === start && !held.at && !at && start % PIECE_BYTES !== 0) {
        held = { ...held, end }
      } else {
        if (held) yield held
        held = { start, end, kind, at }
      }
      start = end
    }
  }
  if (held) yield held
  return undefined
}

/** The source's extents inside `ranges`. */
async function* wantedExtents(
  source: BlockDevice,
  ranges: RangeSet,
  signal: AbortSignal | undefined,
): AsyncGenerator<Extent> {
  // One question for neighbouring ranges: asking costs more than passing over what is not wanted.
  for (const span of ranges.joinGaps(PIECE_BYTES)) {
    let index = ranges.indexAfter(span.start)
    for await (const extent of allExtents(source, span.start, span.end - span.start, signal)) {
      const extentEnd = extent.offset + extent.length
      for (; index < ranges.count && ranges.startAt(index) < extentEnd; index++) {
        const from = Math.max(ranges.startAt(index), extent.offset)
        const to = Math.min(ranges.endAt(index), extentEnd)
        if (from < to) {
          yield {
            offset: from,
            length: to - from,
            kind: extent.kind,
            at: extent.at && { file: extent.at.file, offset: extent.at.offset + from - extent.offset },
          }
        }
        if (ranges.endAt(index) > extentEnd) break
      }
    }
  }
}

async function countData(
  source: BlockDevice,
  ranges: RangeSet,
  signal: AbortSignal | undefined,
): Promise<number> {
  let total = 0
  for await (const extent of wantedExtents(source, ranges, signal)) {
    if (extent.kind === 'data') total += extent.length
  }
  return total
}

/** `bytes` as runs of zeros, each of ZERO_RUN_BYTES or more or touching an end of `bytes`, and of the rest. */
function splitZeros(bytes: Uint8Array): { from: number; to: number; zero: boolean }[] {
  if (isZero(bytes)) return [{ from: 0, to: bytes.length, zero: true }]
  const runs: { from: number; to: number; zero: boolean }[] = []
  for (let from = 0; from < bytes.length; from += ZERO_UNIT_BYTES) {
    const to = Math.min(from + ZERO_UNIT_BYTES, bytes.length)
    const zero = isZero(bytes.subarray(from, to))
    const last = runs.at(-1)
    if (last && last.zero === zero) last.to = to
    else runs.push({ from, to, zero })
  }
  // Runs of zeros too short to pay for another write join the data around them.
  const out: typeof runs = []
  for (const run of runs) {
    const atAnEnd = run.from === 0 || run.to === bytes.length
    const zero = run.zero && (atAnEnd || run.to - run.from >= ZERO_RUN_BYTES)
    const last = out.at(-1)
    if (last && last.zero === zero) last.to = run.to
    else out.push({ ...run, zero })
  }
  return out
}
