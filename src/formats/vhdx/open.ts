/**
 * Opens a VHDX: current header, log replayed in memory, regions, metadata, BAT; all of them judged first.
 *
 * Rules: of two headers the valid one with the greater sequence number counts. Nothing but the headers and the log
 * is read before the log is replayed. Regions, log and headers overlap nothing.
 */
import { type BlockDevice, OverlayDevice, readBytes } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import type { BackingReference, FormatFacts, ImageLayer, OpenOptions } from '../image-format.ts'
import { BlockMap } from './block-map.ts'
import {
  cleanPath,
  corrupt,
  decodeHeader,
  decodeMetadata,
  decodeRegions,
  HEADER_BYTES,
  HEADER_OFFSETS,
  HEADER_SECTION_BYTES,
  type Header,
  hasIdentifier,
  type Metadata,
  MIB,
  REGION,
  REGION_OFFSETS,
  type Region,
  TABLE_BYTES,
  unsupported,
} from './layout.ts'
import { logPlace, replayLog } from './log.ts'
import { VhdxLayer } from './vhdx-layer.ts'

/** Items are small; a region larger than this is not read whole. */
const MOST_METADATA_BYTES: number = 4 * MIB

/** Opens `file`, which the layer then owns. @throws CORRUPT, UNSUPPORTED, LIMIT */
export async function openVhdx(file: BlockDevice, options: OpenOptions): Promise<ImageLayer> {
  const { signal, log } = options
  if (options.write) throw unsupported('a request to write', 'one to read')
  if (file.size < HEADER_SECTION_BYTES) {
    throw corrupt('file', `${file.size} bytes`, `at least ${HEADER_SECTION_BYTES}`)
  }
  if (!hasIdentifier(await readBytes(file, 0, 8, signal)))
    throw corrupt('file', 'no identifier', '"vhdxfile"')
  const header = await currentHeader(file, signal)
  if (header.version !== 1) throw unsupported(`version ${header.version}`, '1')
  const replayed = await replayLog(file, header, signal)
  if (replayed) {
    log?.('warn', 'The VHDX was not closed by its last writer; its log is replayed in memory.', {
      entries: replayed.entries,
    })
  }
  const content = replayed?.device ?? file
  const { bat, metadata: where, taken } = await readRegions(content, header, signal)
  const metadata = decodeMetadata(
    await readBytes(content, where.offset, Math.min(where.length, MOST_METADATA_BYTES), signal),
  )
  const map = await BlockMap.read(content, { metadata, bat, taken }, signal)
  return new VhdxLayer({
    file,
    content,
    patched: content instanceof OverlayDevice ? content.patched : RangeSet.empty,
    map,
    backing: backingOf(metadata),
    facts: factsOf(header, metadata, map, replayed?.entries ?? 0),
    id: header.dataWriteGuid,
  })
}

async function currentHeader(file: BlockDevice, signal: AbortSignal | undefined): Promise<Header> {
  const blocks = await Promise.all(HEADER_OFFSETS.map((at) => readBytes(file, at, HEADER_BYTES, signal)))
  const [first, second] = blocks.map(decodeHeader)
  if (first && second) {
    if (first.sequenceNumber !== second.sequenceNumber) {
      return first.sequenceNumber > second.sequenceNumber ? first : second
    }
    // Equal numbers say that none is the newer: only where nothing differs it does not matter.
    if (Buffer.compare(blocks[0]!, blocks[1]!) === 0) return first
    throw corrupt('headers', `two with sequence number ${first.sequenceNumber}`, 'one that is newer')
  }
  const only = first ?? second
  if (!only) throw corrupt('headers', 'none with a valid checksum', 'at least one')
  return only
}

interface Regions {
  readonly bat: Region
  readonly metadata: Region
  /** Headers, log and every region. */
  readonly taken: RangeSet
}

async function readRegions(
  file: BlockDevice,
  header: Header,
  signal: AbortSignal | undefined,
): Promise<Regions> {
  let regions: Region[] | undefined
  for (const at of REGION_OFFSETS) {
    regions = decodeRegions(await readBytes(file, at, TABLE_BYTES, signal))
    if (regions) break
  }
  if (!regions) throw corrupt('region tables', 'none with a valid checksum', 'at least one')
  const known: Record<string, Region> = {}
  const log = logPlace(header)
  const places = [{ start: 0, end: HEADER_SECTION_BYTES }, ...(log ? [log] : [])]
  for (const region of regions) {
    const { guid, offset, length, required } = region
    if (
      offset % MIB !== 0 ||
      offset < MIB ||
      length % MIB !== 0 ||
      length === 0 ||
      offset + length > file.size
    ) {
      throw corrupt('region table', `region ${guid} at ${offset}+${length}`, 'whole MiB in the file')
    }
    if (known[guid]) throw corrupt('region table', `region ${guid} twice`, 'it once')
    if (guid !== REGION.bat && guid !== REGION.metadata && required) {
      throw unsupported(`the region ${guid} that must be understood`, 'one that is known')
    }
    known[guid] = region
    places.push({ start: offset, end: offset + length })
  }
  const taken = RangeSet.from(places)
  if (taken.size !== places.reduce((sum, { start, end }) => sum + end - start, 0)) {
    throw corrupt('region table', 'regions or the log over each other', 'none')
  }
  const [bat, metadata] = [known[REGION.bat], known[REGION.metadata]]
  if (!bat || !metadata) throw corrupt('region table', `no ${bat ? 'metadata' : 'BAT'}`, 'BAT and metadata')
  return { bat, metadata, taken }
}

/** Paths are of the machine that made the image; the same name beside the image is tried after them. */
function backingOf(metadata: Metadata): BackingReference | undefined {
  if (!metadata.parent) return undefined
  const paths = metadata.parent.paths.map(cleanPath).filter((path) => path !== '')
  const names = [...new Set([...paths, ...paths.map((path) => path.split('/').at(-1)!)])].filter(
    (name) => name !== '',
  )
  const [name, ...otherNames] = names
  if (name === undefined) throw corrupt('parent locator', 'empty paths', 'one that names a file')
  return { name, otherNames, format: 'vhdx', id: metadata.parent.linkage }
}

function factsOf(header: Header, metadata: Metadata, map: BlockMap, logEntries: number): FormatFacts {
  return {
    type: metadata.hasParent ? 'differencing' : metadata.leaveBlocksAllocated ? 'fixed' : 'dynamic',
    blockBytes: metadata.blockBytes,
    blocks: map.shape.payloadBlocks,
    blocksAllocated: map.allocatedBlocks,
    logicalSectorBytes: metadata.logicalSectorBytes,
    physicalSectorBytes: metadata.physicalSectorBytes,
    virtualDiskId: metadata.virtualDiskId,
    dataWriteGuid: header.dataWriteGuid,
    logEntriesReplayed: logEntries,
    ...(metadata.parent
      ? { parentLinkage: metadata.parent.linkage, parentName: metadata.parent.paths[0]! }
      : {}),
  }
}
