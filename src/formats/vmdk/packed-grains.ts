/**
 * Compressed grains of a stream-optimized extent: a marker (first sector of the disk, length) and a zlib stream.
 *
 * Rules: what is decoded is one grain, never more, whatever the stream claims; the marker must say that it is this
 * grain's. Decoding runs on Node's thread pool. The grains used last are kept.
 */
import { promisify } from 'node:util'
import { inflate } from 'node:zlib'
import { VarveError } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { decodeMarker, GRAIN_MARKER_BYTES, SECTOR } from './layout.ts'

const inflateAsync = promisify<Uint8Array, object, Buffer>(inflate)
const CACHE_BYTES = 4 * 1024 * 1024

export class PackedGrains {
  readonly #file: BlockDevice
  readonly #grainBytes: number
  readonly #size: number
  readonly #most: number
  readonly #grains = new Map<number, Promise<Uint8Array>>()

  constructor(file: BlockDevice, grainBytes: number, size: number) {
    this.#file = file
    this.#grainBytes = grainBytes
    this.#size = size
    this.#most = Math.max(2, Math.floor(CACHE_BYTES / grainBytes))
  }

  /** The grain that begins at `start` of the extent and whose marker stands at `from` in the file. */
  async get(start: number, from: number, signal: AbortSignal | undefined): Promise<Uint8Array> {
    const known = this.#grains.get(start)
    this.#grains.delete(start)
    // A read that somebody else gave up must not fail this one.
    const grain = known?.catch(() => this.#read(start, from, signal)) ?? this.#read(start, from, signal)
    this.#grains.set(start, grain)
    grain.catch(() => this.#grains.delete(start))
    for (const oldest of this.#grains.keys()) {
      if (this.#grains.size <= this.#most) break
      this.#grains.delete(oldest)
    }
    return await grain
  }

  clear(): void {
    this.#grains.clear()
  }

  async #read(start: number, from: number, signal: AbortSignal | undefined): Promise<Uint8Array> {
    const wrong = (found: string, expected: string, cause?: unknown): VarveError =>
      new VarveError(
        'CORRUPT',
        `Cannot read compressed VMDK grain at ${start}: found ${found}, expected ${expected}`,
        { fields: { offset: start, place: from }, cause },
      )
    // Most grains are smaller than half of what they hold: one read, and a second one for the others.
    const guess = Math.min(this.#file.size - from, GRAIN_MARKER_BYTES + Math.ceil(this.#grainBytes / 2))
    const head = await readBytes(this.#file, from, guess, signal)
    const { value, size } = decodeMarker(head)
    if (value * SECTOR !== start) throw wrong(`the marker of sector ${value}`, `that of ${start / SECTOR}`)
    // Deflate adds a little to what it cannot press together; twice the grain is far above that.
    if (
      size === 0 ||
      size > this.#grainBytes * 2 + 1024 ||
      from + GRAIN_MARKER_BYTES + size > this.#file.size
    ) {
      throw wrong(`${size} bytes of it`, 'them in the file, and about a grain at most')
    }
    const end = GRAIN_MARKER_BYTES + size
    let packed = head.subarray(GRAIN_MARKER_BYTES, end)
    if (end > head.length) {
      const rest = await readBytes(this.#file, from + head.length, end - head.length, signal)
      packed = Buffer.concat([packed, rest])
    }
    let bytes: Uint8Array
    try {
      bytes = await inflateAsync(packed, {
        maxOutputLength: this.#grainBytes,
        chunkSize: Math.max(1024, this.#grainBytes),
      })
    } catch (cause) {
      throw wrong(cause instanceof Error ? cause.message : String(cause), 'a zlib stream of one grain', cause)
    }
    const needed = Math.min(this.#grainBytes, this.#size - start)
    if (bytes.length < needed) throw wrong(`${bytes.length} bytes in it`, `${needed}`)
    return bytes
  }
}
