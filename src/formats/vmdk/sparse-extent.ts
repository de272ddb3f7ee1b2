/**
 * A sparse extent (hosted, stream-optimized, COWD, seSparse) as a device: a part of the disk, or all of it.
 * What it holds and where: grain-map.ts.
 */
import { type Log, mapBounded, throwIfAborted, VarveError } from '../../base/index.ts'
import {
  type BlockDevice,
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
  readBytes,
} from '../../device/index.ts'
import { type Extent, ExtentList } from '../../extents/index.ts'
import { hostFileOf } from '../host-place.ts'
import { GrainMap, type GrainRun, metadataOf, readDirectory } from './grain-map.ts'
import {
  checkSeSparseVolatile,
  corrupt,
  decodeCowdHeader,
  decodeMarker,
  decodeSeSparseHeader,
  decodeSparseHeader,
  type ExtentHeader,
  type ExtentKindName,
  HEADER_BYTES,
  MARKER,
  SECTOR,
  type SparseHeader,
} from './layout.ts'
import { PackedGrains } from './packed-grains.ts'

/** Reads under way at once; decoding has four threads. */
const READS = 16
const DECODES = 4
/** `extents` stops after this many; the caller asks on. */
const MOST_EXTENTS = 65_536

/** Owns `file`. */
export class SparseExtent implements BlockDevice {
  readonly size: number
  readonly blockSize = 512
  readonly features: Features
  readonly header: ExtentHeader
  readonly #file: BlockDevice
  readonly #map: GrainMap
  readonly #packed: PackedGrains | undefined
  #closed = false

  constructor(file: BlockDevice, map: GrainMap) {
    this.#file = file
    this.#map = map
    this.header = map.header
    this.size = map.size
    this.#packed = map.header.compressed ? new PackedGrains(file, map.header.grainBytes, map.size) : undefined
    this.features = {
      write: false,
      resize: false,
      sparse: true,
      places: !this.#packed && hostFileOf(file) !== undefined,
    }
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.size, offset, into.length)
    throwIfAborted(signal)
    if (into.length === 0) return
    const runs: GrainRun[] = []
    await this.#map.eachRun(
      offset,
      offset + into.length,
      (run) => {
        const last = runs.at(-1)
        if (run.kind !== 'data') into.fill(0, run.start - offset, run.end - offset)
        else if (
          last &&
          !this.#packed &&
          last.end === run.start &&
          last.from + last.end - last.start === run.from
        ) {
          runs[runs.length - 1] = { ...last, end: run.end }
        } else runs.push(run)
      },
      signal,
    )
    const packed = this.#packed
    if (!packed) {
      await mapBounded(runs, READS, ({ start, end, from }) =>
        this.#file.read(from, into.subarray(start - offset, end - offset), signal),
      )
      return
    }
    const { grainBytes } = this.header
    await mapBounded(runs, DECODES, async ({ start, end, from }) => {
      const grain = start - (start % grainBytes)
      const bytes = await packed.get(grain, from, signal)
      into.set(bytes.subarray(start - grain, end - grain), start - offset)
    })
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.size, offset, length)
    throwIfAborted(signal)
    const host = this.#packed ? undefined : hostFileOf(this.#file)
    const list = new ExtentList()
    await this.#map.eachRun(
      offset,
      offset + length,
      ({ start, end, kind, from }) =>
        list.add(
          start,
          end - start,
          kind,
          kind === 'data' && host ? { file: host, offset: from } : undefined,
        ),
      signal,
      () => list.count >= MOST_EXTENTS,
    )
    return list.finish()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    this.#map.close()
    this.#packed?.clear()
    await this.#file[Symbol.asyncDispose]()
  }
}

/**
 * The header that counts: for a stream the one at its end. @throws CORRUPT, UNSUPPORTED, LIMIT
 */
export async function readSparseHeader(file: BlockDevice, signal?: AbortSignal): Promise<SparseHeader> {
  const head = decodeSparseHeader(await firstSector(file, signal))
  if (!head.atEnd) return head
  // Footer marker, footer, end-of-stream marker: the last three sectors.
  const at = file.size - (file.size % SECTOR) - 3 * SECTOR
  if (at < HEADER_BYTES) throw corrupt('footer', 'the file to end before it', 'three sectors')
  const tail = await readBytes(file, at, 3 * SECTOR, signal)
  const marker = decodeMarker(tail)
  const end = decodeMarker(tail.subarray(2 * SECTOR))
  const whole = marker.size === 0 && marker.type === MARKER.footer && end.size === 0 && end.value === 0
  if (!whole || end.type !== MARKER.endOfStream) {
    throw corrupt('footer', 'no footer between its markers at the end of the file', 'the whole stream')
  }
  const footer = decodeSparseHeader(tail.subarray(SECTOR, 2 * SECTOR))
  if (footer.atEnd || footer.capacity !== head.capacity || footer.grainBytes !== head.grainBytes) {
    throw corrupt('footer', 'another disk than the one of the header', 'the same')
  }
  return { ...footer, descriptorOffset: head.descriptorOffset, descriptorBytes: head.descriptorBytes }
}

export async function firstSector(file: BlockDevice, signal?: AbortSignal): Promise<Uint8Array> {
  if (file.size < HEADER_BYTES) throw corrupt('header', `a file of ${file.size} bytes`, `${HEADER_BYTES}`)
  return await readBytes(file, 0, HEADER_BYTES, signal)
}

export interface OpenExtentOptions {
  readonly kind: ExtentKindName
  /** Bytes that the descriptor gives the extent. */
  readonly length: number
  readonly log?: Log | undefined
  readonly signal?: AbortSignal | undefined
}

/** Opens `file`, which the extent then owns. @throws CORRUPT, UNSUPPORTED, LIMIT */
export async function openSparseExtent(file: BlockDevice, options: OpenExtentOptions): Promise<SparseExtent> {
  const { signal, log, length } = options
  const header = await readHeader(file, options.kind, signal)
  // A capacity is rounded up to grains by some writers; what the descriptor says is the disk.
  if (header.capacity < length || header.capacity - length >= Math.max(header.grainBytes, SECTOR)) {
    throw new VarveError(
      'CORRUPT',
      `Cannot open VMDK extent: found a capacity of ${header.capacity} bytes, expected the descriptor's ${length}`,
      { fields: { capacity: header.capacity, length } },
    )
  }
  if (header.uncleanShutdown) log?.('warn', 'The VMDK was not closed by its last writer.')
  const directory = await readDirectory(file, header, log, signal)
  const more: { start: number; end: number }[] = []
  if ('descriptorOffset' in header) {
    const { descriptorOffset: start, descriptorBytes } = header as SparseHeader
    more.push({ start, end: start + descriptorBytes })
  }
  if (header.kind === 'cowd') more.push({ start: 0, end: 4 * SECTOR })
  const metadata = metadataOf(header, directory, more)
  return new SparseExtent(file, new GrainMap({ file, header, directory, size: length, metadata, log }))
}

async function readHeader(
  file: BlockDevice,
  kind: ExtentKindName,
  signal: AbortSignal | undefined,
): Promise<ExtentHeader> {
  if (kind === 'sparse') return await readSparseHeader(file, signal)
  const head = await firstSector(file, signal)
  if (kind === 'cowd') return decodeCowdHeader(head)
  const header = decodeSeSparseHeader(head)
  if (header.volatileOffset < SECTOR || header.volatileOffset + SECTOR > file.size) {
    throw corrupt('volatile header', `it at ${header.volatileOffset}`, 'it in the file')
  }
  checkSeSparseVolatile(await readBytes(file, header.volatileOffset, SECTOR, signal))
  return header
}
