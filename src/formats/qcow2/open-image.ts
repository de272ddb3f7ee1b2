/**
 * Opens a qcow2 file up to the point where reading, writing and checking part: header, external data file,
 * snapshot list, L1 table, cluster map.
 */
import { LIMITS, VarveError, within } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import type { FormatFacts, OpenOptions } from '../image-format.ts'
import { ClusterMap, type Reserved, readL1 } from './cluster-map.ts'
import {
  AUTOCLEAR,
  BITMAP_FLAG,
  type BitmapEntry,
  COMPATIBLE,
  checkTable,
  clusterBitsOf,
  corrupt,
  decodeBitmapDirectory,
  decodeHeader,
  decodeSnapshots,
  type Geometry,
  geometryOf,
  HEADER_BYTES_V2,
  type Header,
  INCOMPATIBLE,
  MAX_BITMAPS,
  MAX_SNAPSHOT_EXTRA_BYTES,
  type Snapshot,
} from './layout.ts'
import { TableCache } from './table-cache.ts'

/** First read of every image: holds the whole header unless clusters are larger and it has grown past this. */
const HEAD_BYTES = 65_536

export interface Qcow2OpenOptions extends OpenOptions {
  /** Open the disk as it was at this internal snapshot (id or name) instead of the active state. Read-only. */
  readonly snapshot?: string
}

export interface OpenedImage {
  readonly file: BlockDevice
  /** Where guest data stands: `file` itself, or the external data file. */
  readonly data: BlockDevice
  readonly header: Header
  readonly geometry: Geometry
  readonly snapshots: readonly Snapshot[]
  readonly map: ClusterMap
  /** Virtual size in bytes: of the active state, or of the snapshot that was asked for. */
  readonly size: number
  readonly facts: FormatFacts
}

/** Header of `file`, with every extension. */
export async function readHeader(file: BlockDevice, signal?: AbortSignal): Promise<Header> {
  let head = await readBytes(file, 0, Math.min(HEAD_BYTES, file.size), signal)
  if (head.length < HEADER_BYTES_V2) {
    throw corrupt(`found a file of ${head.length} bytes, expected a header of at least ${HEADER_BYTES_V2}`)
  }
  const clusterBytes = 2 ** clusterBitsOf(head)
  if (clusterBytes > head.length && file.size > head.length) {
    head = await readBytes(file, 0, Math.min(clusterBytes, file.size), signal)
  }
  return decodeHeader(head.subarray(0, clusterBytes), file.size)
}

/** Opens `file`; nothing of it is disposed of when this throws, except a data file that it opened itself. */
export async function openImage(file: BlockDevice, options: Qcow2OpenOptions): Promise<OpenedImage> {
  const { signal } = options
  const header = await readHeader(file, signal)
  const geometry = geometryOf(header)
  const { snapshots, problem } = await readSnapshots(file, header, signal)
  const chosen =
    options.snapshot === undefined ? undefined : findSnapshot(snapshots, options.snapshot, problem)
  const active = chosen ?? header
  if (chosen && chosen.l1Size > 0) {
    checkTable({
      offset: chosen.l1TableOffset,
      length: chosen.l1Size * 8,
      clusterBytes: geometry.clusterBytes,
      fileBytes: file.size,
      what: `L1 table of snapshot ${chosen.id}`,
    })
  }
  if (active.l1Size < Math.ceil(active.size / geometry.l2Span)) {
    throw corrupt(`found ${active.l1Size} L1 entries, expected enough for a disk of ${active.size} bytes`)
  }
  const bitmaps = await bitmapFacts(file, header, signal)
  const l1 = await readL1(file, active, signal)
  const data = header.hasDataFile ? await openDataFile(header, options) : file
  try {
    const map = new ClusterMap({
      geometry,
      file,
      data,
      tables: new TableCache(file, geometry.clusterBytes),
      l1,
      reserved: reservedParts(header, chosen),
    })
    const facts = factsOf(header, { snapshots, problem, chosen, bitmaps })
    return { file, data, header, geometry, snapshots, map, size: active.size, facts }
  } catch (error) {
    if (data !== file) await data[Symbol.asyncDispose]()
    throw error
  }
}

/** The parts of the file where neither guest data nor an L2 table can stand. */
export function reservedParts(
  header: Pick<
    Header,
    | 'clusterBytes'
    | 'l1TableOffset'
    | 'l1Size'
    | 'refcountTableOffset'
    | 'refcountTableClusters'
    | 'nbSnapshots'
    | 'snapshotsOffset'
  >,
  snapshot?: Snapshot,
): readonly Reserved[] {
  const { clusterBytes } = header
  const parts: Reserved[] = [
    { what: 'header', start: 0, end: clusterBytes },
    { what: 'L1 table', start: header.l1TableOffset, end: header.l1TableOffset + header.l1Size * 8 },
    {
      what: 'refcount table',
      start: header.refcountTableOffset,
      end: header.refcountTableOffset + header.refcountTableClusters * clusterBytes,
    },
  ]
  if (header.nbSnapshots > 0) {
    parts.push({ what: 'snapshot table', start: header.snapshotsOffset, end: header.snapshotsOffset + 1 })
  }
  if (snapshot) {
    const start = snapshot.l1TableOffset
    parts.push({ what: 'L1 table of the snapshot', start, end: start + snapshot.l1Size * 8 })
  }
  return parts.filter((part) => part.end > part.start)
}

/**
 * The list of internal snapshots. A list that cannot be read is a fact (`problem`), not a refusal: the active
 * disk does not depend on it. Writers refuse such an image.
 */
export async function readSnapshots(
  file: BlockDevice,
  header: Header,
  signal?: AbortSignal,
): Promise<{ snapshots: Snapshot[]; tableBytes: number; problem: VarveError | undefined }> {
  if (header.nbSnapshots === 0) return { snapshots: [], tableBytes: 0, problem: undefined }
  try {
    const offset = header.snapshotsOffset
    // At least the fixed part of each entry has to be there; the whole length shows only while decoding.
    const least = header.nbSnapshots * 40
    checkTable({
      offset,
      length: least,
      clusterBytes: header.clusterBytes,
      fileBytes: file.size,
      what: 'snapshot table',
    })
    const most = Math.min(
      header.nbSnapshots * (40 + MAX_SNAPSHOT_EXTRA_BYTES + 2 * 65_536),
      LIMITS.tableBytes,
      file.size - offset,
    )
    let length = Math.min(most, Math.max(65_536, header.nbSnapshots * 256))
    for (;;) {
      const bytes = await readBytes(file, offset, length, signal)
      try {
        return { ...decodeSnapshots(bytes, header), problem: undefined }
      } catch (error) {
        if (length === most) throw error
        length = Math.min(most, length * 8)
      }
    }
  } catch (error) {
    if (!(error instanceof VarveError) || !['CORRUPT', 'LIMIT'].includes(error.code)) throw error
    return { snapshots: [], tableBytes: 0, problem: error }
  }
}

/** The bitmap directory; undefined when the image has none. @throws CORRUPT, LIMIT */
export async function readBitmapDirectory(
  file: BlockDevice,
  header: Header,
  signal?: AbortSignal,
): Promise<BitmapEntry[] | undefined> {
  if (!header.bitmaps) return undefined
  const { nbBitmaps, directoryBytes, directoryOffset } = header.bitmaps
  within(nbBitmaps, MAX_BITMAPS, 'number of qcow2 bitmaps')
  within(directoryBytes, LIMITS.tableBytes, 'qcow2 bitmap directory bytes')
  checkTable({
    offset: directoryOffset,
    length: directoryBytes,
    clusterBytes: header.clusterBytes,
    fileBytes: file.size,
    what: 'bitmap directory',
  })
  return decodeBitmapDirectory(await readBytes(file, directoryOffset, directoryBytes, signal), nbBitmaps)
}

async function bitmapFacts(
  file: BlockDevice,
  header: Header,
  signal: AbortSignal | undefined,
): Promise<FormatFacts> {
  if (!header.bitmaps) return {}
  if ((header.autoclear & AUTOCLEAR.bitmaps) === 0n) {
    return { bitmaps: header.bitmaps.nbBitmaps, bitmapsConsistent: false }
  }
  try {
    const entries = (await readBitmapDirectory(file, header, signal)) ?? []
    const facts: Record<string, string | number | boolean> = {
      bitmaps: entries.length,
      bitmapsConsistent: true,
    }
    entries.slice(0, MOST_LISTED).forEach((entry, index) => {
      const flags = [
        entry.flags & BITMAP_FLAG.inUse ? 'in-use' : undefined,
        entry.flags & BITMAP_FLAG.auto ? 'auto' : undefined,
      ].filter((flag) => flag !== undefined)
      facts[`bitmap${index + 1}`] =
        `${entry.name} (${[`granularity 2^${entry.granularityBits}`, ...flags].join(', ')})`
    })
    return facts
  } catch (error) {
    if (!(error instanceof VarveError) || !['CORRUPT', 'LIMIT'].includes(error.code)) throw error
    return { bitmaps: header.bitmaps.nbBitmaps, bitmapsConsistent: false, bitmapsProblem: error.message }
  }
}

/** Snapshots and bitmaps that are listed one by one in the facts. */
const MOST_LISTED = 256

function factsOf(
  header: Header,
  more: {
    snapshots: readonly Snapshot[]
    problem: VarveError | undefined
    chosen: Snapshot | undefined
    bitmaps: FormatFacts
  },
): FormatFacts {
  const facts: Record<string, string | number | boolean> = {
    version: header.version,
    clusterBytes: header.clusterBytes,
    refcountBits: 2 ** header.refcountOrder,
    compression: header.compression,
    extendedL2: header.extendedL2,
    lazyRefcounts: (header.compatible & COMPATIBLE.lazyRefcounts) !== 0n,
    dirty: (header.incompatible & INCOMPATIBLE.dirty) !== 0n,
    corrupt: (header.incompatible & INCOMPATIBLE.corrupt) !== 0n,
    snapshots: header.nbSnapshots,
  }
  if (header.hasDataFile) {
    facts['dataFile'] = header.dataFileName ?? ''
    facts['dataFileRaw'] = header.rawExternalData
  }
  more.snapshots.slice(0, MOST_LISTED).forEach((snapshot, index) => {
    facts[`snapshot${index + 1}`] =
      `${snapshot.id} ${snapshot.name} (${new Date(snapshot.takenMs).toISOString()}, ${snapshot.size} bytes)`
  })
  if (more.problem) facts['snapshotsProblem'] = more.problem.message
  if (more.chosen) facts['openedSnapshot'] = more.chosen.id
  return { ...facts, ...more.bitmaps }
}

/** By id first, then by name, as QEMU does. */
function findSnapshot(
  snapshots: readonly Snapshot[],
  wanted: string,
  problem: VarveError | undefined,
): Snapshot {
  if (problem) throw problem
  const found =
    snapshots.find((snapshot) => snapshot.id === wanted) ??
    snapshots.find((snapshot) => snapshot.name === wanted)
  if (!found) {
    throw new VarveError(
      'NOT_FOUND',
      `Cannot open internal snapshot ${wanted}: found ${snapshots.length} others, expected it among them`,
      { fields: { snapshot: wanted }, hint: '`varve inspect` lists the internal snapshots of an image.' },
    )
  }
  return found
}

async function openDataFile(header: Header, options: Qcow2OpenOptions): Promise<BlockDevice> {
  if (header.dataFileName === undefined) {
    throw new VarveError('UNSUPPORTED', 'Cannot open qcow2 image: found an external data file without a name')
  }
  if (!options.openPart) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open qcow2 image: found an external data file (${header.dataFileName}), expected none here`,
      { fields: { dataFile: header.dataFileName } },
    )
  }
  return await options.openPart(header.dataFileName)
}
