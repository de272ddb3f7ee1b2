/**
 * Compressed clusters: raw deflate (windowBits 12 as QEMU writes it; any window is read) and zstd frames.
 *
 * Rule: the output is one cluster, never more, whatever the input claims, and the input may run on behind its
 * end: the descriptor counts whole sectors, so the head of the next compressed cluster may follow in the last.
 * The work runs on Node's thread pool, so several clusters are coded at a time.
 */
import { promisify } from 'node:util'
import { constants, createInflateRaw, deflateRaw, inflateRaw, zstdCompress, zstdDecompress } from 'node:zlib'
import { Bytes, VarveError } from '../../base/index.ts'
import type { Compression } from './layout.ts'

const inflateRawAsync = promisify<Uint8Array, object, Buffer>(inflateRaw)
const deflateRawAsync = promisify<Uint8Array, object, Buffer>(deflateRaw)
const zstdDecompressAsync = promisify<Uint8Array, object, Buffer>(zstdDecompress)
const zstdCompressAsync = promisify<Uint8Array, object, Buffer>(zstdCompress)

/**
 * One cluster of `clusterBytes` bytes. `where` is its guest offset, for the message.
 * @throws CORRUPT when the input is not one whole cluster
 */
export async function decompressCluster(
  compression: Compression,
  input: Uint8Array,
  clusterBytes: number,
  where: number,
): Promise<Uint8Array> {
  let output: Uint8Array
  try {
    output = compression === 'zstd' ? await unzstd(input, clusterBytes) : await inflate(input, clusterBytes)
  } catch (cause) {
    if (cause instanceof VarveError) throw cause
    throw new VarveError(
      'CORRUPT',
      `Cannot read compressed cluster at ${where}: ${cause instanceof Error ? cause.message : String(cause)}`,
      { cause, fields: { offset: where } },
    )
  }
  if (output.length !== clusterBytes) {
    throw new VarveError(
      'CORRUPT',
      `Cannot read compressed cluster at ${where}: found ${output.length} bytes, expected ${clusterBytes}`,
      { fields: { offset: where } },
    )
  }
  return output
}

/** Compressed bytes of one cluster; undefined when they would not be shorter than the cluster. */
export async function compressCluster(
  compression: Compression,
  cluster: Uint8Array,
): Promise<Uint8Array | undefined> {
  const packed =
    compression === 'zstd'
      ? await zstdCompressAsync(cluster, {})
      : await deflateRawAsync(cluster, { windowBits: 12 })
  return packed.length < cluster.length ? packed : undefined
}

async function inflate(input: Uint8Array, clusterBytes: number): Promise<Uint8Array> {
  try {
    // A stream that lacks its end marker still counts when it gave a whole cluster: hence no Z_FINISH.
    return await inflateRawAsync(input, {
      maxOutputLength: clusterBytes,
      finishFlush: constants.Z_SYNC_FLUSH,
      chunkSize: Math.max(1024, clusterBytes),
    })
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ERR_BUFFER_TOO_LARGE') throw error
    return await inflateStart(input, clusterBytes)
  }
}

/** The first cluster of a stream that goes on: the specification stops there. Rare, so the slow way will do. */
async function inflateStart(input: Uint8Array, clusterBytes: number): Promise<Uint8Array> {
  const stream = createInflateRaw({
    chunkSize: Math.max(64, clusterBytes),
    finishFlush: constants.Z_SYNC_FLUSH,
  })
  stream.end(input)
  const parts: Uint8Array[] = []
  let length = 0
  for await (const part of stream as AsyncIterable<Uint8Array>) {
    parts.push(part)
    length += part.length
    if (length >= clusterBytes) break
  }
  return Buffer.concat(parts).subarray(0, clusterBytes)
}

/** Frames one after another until the cluster is full; what follows belongs to somebody else. */
async function unzstd(input: Uint8Array, clusterBytes: number): Promise<Uint8Array> {
  let output: Uint8Array | undefined
  let filled = 0
  let at = 0
  while (filled < clusterBytes) {
    const length = zstdFrameLength(input.subarray(at))
    const frame = await zstdDecompressAsync(input.subarray(at, at + length), {
      maxOutputLength: clusterBytes - filled,
      chunkSize: Math.max(1024, clusterBytes),
    })
    if (frame.length === clusterBytes) return frame
    output ??= new Uint8Array(clusterBytes)
    output.set(frame, filled)
    filled += frame.length
    at += length
  }
  return output ?? new Uint8Array(0)
}

const ZSTD_MAGIC = 0xfd2fb528
const ZSTD_SKIPPABLE = 0x184d2a50

/** Length of the zstd frame that `input` begins with (RFC 8878 §3.1), from its block headers. */
export function zstdFrameLength(input: Uint8Array): number {
  const bytes = new Bytes(input, 'little', 'zstd frame')
  const magic = bytes.u32(0)
  if ((magic & 0xfffffff0) >>> 0 === ZSTD_SKIPPABLE) return checked(8 + bytes.u32(4))
  if (magic !== ZSTD_MAGIC) throw new Error(`found zstd magic 0x${magic.toString(16)}`)
  const descriptor = bytes.u8(4)
  const singleSegment = (descriptor & 0x20) !== 0
  const sizeFlag = descriptor >>> 6
  const sizeBytes = sizeFlag === 0 ? (singleSegment ? 1 : 0) : 2 ** sizeFlag
  const dictionaryBytes = [0, 1, 2, 4][descriptor & 3]!
  let at = 5 + (singleSegment ? 0 : 1) + dictionaryBytes + sizeBytes
  for (;;) {
    const header = bytes.u8(at) | (bytes.u8(at + 1) << 8) | (bytes.u8(at + 2) << 16)
    const type = (header >>> 1) & 3
    const size = header >>> 3
    if (type === 3) throw new Error('found a reserved zstd block type')
    // A run-length block stores one byte whatever its size. Each turn advances by 3 at least: bounded.
    at = checked(at + 3 + (type === 1 ? 1 : size))
    if (header & 1) break
  }
  return checked(at + (descriptor & 4 ? 4 : 0))

  function checked(end: number): number {
    if (end > input.length) throw new Error(`found a zstd frame that ends at ${end} of ${input.length} bytes`)
    return end
  }
}
