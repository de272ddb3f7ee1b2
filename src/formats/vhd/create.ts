/**
 * Makes an empty VHD. Dynamic and differencing ones have the layout, batmap included, that XenServer's and XCP-ng's
 * tools make and expect, and therefore their creator mark: readers go by it (batmap, which size counts).
 *
 *   footer copy | header | table | batmap header | batmap | locators (differencing) | footer
 */
import { randomUUID } from 'node:crypto'
import { alignUp, isPowerOfTwo, VarveError } from '../../base/index.ts'
import type { ResizableBlockDevice } from '../../device/index.ts'
import type { BackingReference, CreateOptions, WritableImageLayer } from '../image-format.ts'
import {
  BATMAP_VERSION,
  batmapChecksum,
  batmapCoveredBytes,
  DEFAULT_BLOCK_BYTES,
  type DiskType,
  type DynamicHeader,
  EPOCH_SECONDS,
  encodeBatmapHeader,
  encodeFooter,
  encodeHeader,
  FOOTER_BYTES,
  type Footer,
  geometryOf,
  HEADER_BYTES,
  type Locator,
  NIL_UUID,
  SECTOR,
  utf16Bytes,
} from './layout.ts'
import { openVhd } from './open.ts'

/** Most that a VHD may hold, by its specification. */
const MOST_BYTES = 2040 * 1024 ** 3
const CREATOR = { creator: 'tap\0', creatorVersion: 0x00010003, creatorOs: 0 } as const
const SETTINGS = ['type', 'blockBytes', 'reserveBytes', 'uuid']
const TABLE_AT = FOOTER_BYTES + HEADER_BYTES

/**
 * Settings: `type` (`dynamic`, the default, or `fixed`; with a backing file it is differencing), `blockBytes` (a
 * power of two from 4096 to 2 MiB, the default), `reserveBytes` (room in the table to grow to this size later),
 * `uuid` (default random).
 * @throws USAGE, UNSUPPORTED (over 2040 GiB)
 */
export async function createVhd(
  file: ResizableBlockDevice,
  options: CreateOptions,
): Promise<WritableImageLayer> {
  const { virtualSize, backing, signal } = options
  const { type, blockBytes, reserveBytes, uuid } = readSettings(options)
  if (virtualSize <= 0 || virtualSize % SECTOR !== 0) {
    throw new VarveError(
      'USAGE',
      `Cannot create VHD: found a size of ${virtualSize}, expected a multiple of ${SECTOR}`,
    )
  }
  if (virtualSize > MOST_BYTES || reserveBytes > 2 * 1024 ** 4) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot create VHD of ${virtualSize} bytes: the format holds at most ${MOST_BYTES}`,
      {
        fields: { size: virtualSize, most: MOST_BYTES },
      },
    )
  }
  const footer: Footer = {
    ...CREATOR,
    features: 0x2,
    dataOffset: type === 'fixed' ? undefined : FOOTER_BYTES,
    timestamp: Math.floor(Date.now() / 1000) - EPOCH_SECONDS,
    originalSize: virtualSize,
    currentSize: virtualSize,
    geometry: geometryOf(virtualSize),
    type,
    uuid,
    saved: false,
    hidden: false,
  }
  await file.resize(0, signal)
  if (type === 'fixed') {
    await file.resize(virtualSize + FOOTER_BYTES, signal)
    await file.write(virtualSize, encodeFooter(footer), signal)
  } else {
    const head = dynamicHead(footer, { blockBytes, reserveBytes, backing })
    await file.resize(head.length + FOOTER_BYTES, signal)
    await file.write(0, head, signal)
    await file.write(head.length, encodeFooter(footer), signal)
  }
  return (await openVhd(file, { signal, log: options.log, write: true })) as WritableImageLayer
}

interface Settings {
  readonly type: DiskType
  readonly blockBytes: number
  readonly reserveBytes: number
  readonly uuid: string
}

function readSettings(options: CreateOptions): Settings {
  const settings = options.settings ?? {}
  const bad = (name: string, expected: string): VarveError =>
    new VarveError(
      'USAGE',
      `Cannot create VHD: found setting ${name} ${JSON.stringify(settings[name])}, expected ${expected}`,
    )
  for (const name of Object.keys(settings)) {
    if (!SETTINGS.includes(name)) throw bad(name, `one of ${SETTINGS.join(', ')}`)
  }
  const {
    type = options.backing ? 'differencing' : 'dynamic',
    blockBytes = DEFAULT_BLOCK_BYTES,
    reserveBytes = 0,
    uuid = randomUUID(),
  } = settings
  const types = options.backing ? ['differencing'] : ['dynamic', 'fixed']
  if (typeof type !== 'string' || !types.includes(type)) throw bad('type', types.join(' or '))
  if (
    typeof blockBytes !== 'number' ||
    !isPowerOfTwo(blockBytes) ||
    blockBytes < 4096 ||
    blockBytes > DEFAULT_BLOCK_BYTES
  ) {
    throw bad('blockBytes', 'a power of two from 4096 to 2097152')
  }
  if (typeof reserveBytes !== 'number' || !Number.isSafeInteger(reserveBytes) || reserveBytes < 0) {
    throw bad('reserveBytes', 'a number of bytes')
  }
  if (
    typeof uuid !== 'string' ||
    !/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(uuid) ||
    uuid === NIL_UUID
  ) {
    throw bad('uuid', 'a UUID in lower case')
  }
  return { type: type as DiskType, blockBytes, reserveBytes, uuid }
}

/** Everything in front of the first block. */
function dynamicHead(
  footer: Footer,
  facts: { blockBytes: number; reserveBytes: number; backing: BackingReference | undefined },
): Uint8Array {
  const { blockBytes, backing } = facts
  const entries = Math.ceil(Math.max(footer.currentSize, facts.reserveBytes) / blockBytes)
  const tableBytes = alignUp(entries * 4, SECTOR)
  const batmapAt = TABLE_AT + tableBytes
  const batmapSectors = Math.max(
    Math.ceil(Math.ceil(entries / 8) / SECTOR),
    // Smaller blocks than libvhd's would have it read more than there is.
    batmapCoveredBytes(footer.currentSize) / SECTOR,
  )
  const locatorsAt = batmapAt + SECTOR + batmapSectors * SECTOR
  const parent = backing && parentOf(backing, locatorsAt)
  const head = new Uint8Array(locatorsAt + (parent?.data.length ?? 0))
  const header: DynamicHeader = {
    tableOffset: TABLE_AT,
    maxTableEntries: entries,
    blockBytes,
    parentUuid: parent?.uuid ?? NIL_UUID,
    parentTimestamp: parent ? footer.timestamp : 0,
    parentName: parent?.name ?? '',
    locators: parent?.locators ?? [],
  }
  head.set(encodeFooter(footer))
  head.set(encodeHeader(header), FOOTER_BYTES)
  head.fill(0xff, TABLE_AT, TABLE_AT + tableBytes)
  const checksum = batmapChecksum(new Uint8Array(batmapCoveredBytes(footer.currentSize)), BATMAP_VERSION)
  head.set(
    encodeBatmapHeader({
      offset: batmapAt + SECTOR,
      sectors: batmapSectors,
      version: BATMAP_VERSION,
      checksum,
    }),
    batmapAt,
  )
  if (parent) head.set(parent.data, locatorsAt)
  return head
}

interface Parent {
  readonly uuid: string
  readonly name: string
  readonly locators: readonly Locator[]
  /** What the locators point at, to stand at the offset that was given. */
  readonly data: Uint8Array
}

/** The three locators that tap writes. @throws USAGE */
function parentOf(backing: BackingReference, at: number): Parent {
  const { name, format, id } = backing
  if (format !== 'raw' && format !== 'vhd' && format !== 'vpc') {
    throw new VarveError(
      'USAGE',
      `Cannot create VHD: found a parent of format ${format}, expected vhd or raw`,
    )
  }
  if (format !== 'raw' && id === undefined) {
    throw new VarveError('USAGE', 'Cannot create VHD: found no identity of its parent, expected its uuid')
  }
  const base = name.slice(name.lastIndexOf('/') + 1)
  // oxlint-disable-next-line no-control-regex
  if (base === '' || /[\u0000-\u001f\\]/.test(name) || base.length > 255) {
    throw new VarveError(
      'USAGE',
      `Cannot create VHD: found a parent named ${JSON.stringify(name)}, expected a path`,
    )
  }
  const path = name.startsWith('/') || name.startsWith('./') ? name : `./${name}`
  const windows = utf16Bytes(path.replaceAll('/', '\\'), 'little')
  const paths = [
    { code: 'MacX', bytes: new TextEncoder().encode(`file://${path}`) },
    { code: 'W2ku', bytes: windows },
    { code: 'W2ru', bytes: windows },
  ]
  const data = new Uint8Array(paths.reduce((sum, { bytes }) => sum + alignUp(bytes.length, SECTOR), 0))
  const locators: Locator[] = []
  let used = 0
  for (const { code, bytes } of paths) {
    const spaceBytes = alignUp(bytes.length, SECTOR)
    locators.push({ code, spaceBytes, dataLength: bytes.length, dataOffset: at + used })
    data.set(bytes, used)
    used += spaceBytes
  }
  return { uuid: format === 'raw' ? NIL_UUID : id!, name: base, locators, data }
}
