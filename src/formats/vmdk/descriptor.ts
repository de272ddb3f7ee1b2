/**
 * The VMDK descriptor: the text that says what a disk is made of. In a file of its own, or inside a sparse extent.
 *
 * Specification: VMware, "Virtual Disk Format 5.0", chapter "The Descriptor File". Rules: a line is a comment, a
 * setting, an extent or an error, and nothing that decides what is read is guessed. Names are data here; whoever
 * opens them asks the path policy.
 */
import { VarveError } from '../../base/index.ts'
import { corrupt, SECTOR, unsupported } from './layout.ts'

/** A descriptor of 4096 extents takes some 300 KiB. */
export const MOST_DESCRIPTOR_BYTES = 1_048_576
const MOST_EXTENTS = 4096

export type ExtentType = 'FLAT' | 'SPARSE' | 'ZERO' | 'VMFS' | 'VMFSSPARSE' | 'SESPARSE'

export interface DescriptorExtent {
  readonly type: ExtentType
  /** Bytes of the disk. */
  readonly length: number
  /** Empty for ZERO. */
  readonly name: string
  /** Where a flat extent starts in its file, bytes. */
  readonly offset: number
}

export interface Descriptor {
  readonly version: number
  /** Content id, eight hexadecimal digits in lower case. */
  readonly cid: string
  /** Undefined when there is no parent. */
  readonly parentCid: string | undefined
  readonly parentHint: string | undefined
  readonly createType: string
  readonly extents: readonly DescriptorExtent[]
  /** Sum of the extents, bytes. */
  readonly length: number
  /** Settings as they stand, keys in lower case: geometry, adapter, tools version. */
  readonly settings: ReadonlyMap<string, string>
}

const CREATE_TYPES: ReadonlySet<string> = new Set([
  'monolithicsparse',
  'monolithicflat',
  'twogbmaxextentsparse',
  'twogbmaxextentflat',
  '2gbmaxextentsparse',
  '2gbmaxextentflat',
  'streamoptimized',
  'vmfs',
  'vmfsthin',
  'vmfspreallocated',
  'vmfseagerzeroedthick',
  'vmfssparse',
  'sesparse',
  'custom',
])

/** Types whose data is not in files: raw devices and mappings to them. */
const DEVICE_TYPES: ReadonlySet<string> = new Set([
  'fulldevice',
  'partitioneddevice',
  'vmfsraw',
  'vmfsrdm',
  'vmfsrdmp',
  'vmfsrawdevicemap',
  'vmfspassthroughrawdevicemap',
])

const EXTENT_TYPES: ReadonlySet<string> = new Set([
  'FLAT',
  'SPARSE',
  'ZERO',
  'VMFS',
  'VMFSSPARSE',
  'SESPARSE',
])
const NO_PARENT = 'ffffffff'

/** @throws CORRUPT, UNSUPPORTED, ENCRYPTED, LIMIT */
export function parseDescriptor(bytes: Uint8Array): Descriptor {
  const end = bytes.indexOf(0)
  const lines = decode(end < 0 ? bytes : bytes.subarray(0, end)).split(/\r\n|\r|\n/)
  if (!/^# disk descriptorfile\s*$/i.test(lines[0] ?? '')) {
    throw corrupt('descriptor', JSON.stringify((lines[0] ?? '').slice(0, 60)), '"# Disk DescriptorFile"')
  }
  const settings = new Map<string, string>()
  const extents: DescriptorExtent[] = []
  let length = 0
  for (const [index, raw] of lines.entries()) {
    const line = raw.trim()
    if (line === '' || line.startsWith('#')) continue
    const extent = parseExtent(line)
    if (extent) {
      length += extent.length
      if (extents.push(extent) > MOST_EXTENTS || !Number.isSafeInteger(length)) {
        throw new VarveError(
          'LIMIT',
          `Cannot accept VMDK descriptor: found over ${MOST_EXTENTS} extents or 2^53 bytes`,
        )
      }
      continue
    }
    const setting = /^([A-Za-z][\w.:-]*)\s*=\s*(?:"([^"]*)"|([^"]*))$/.exec(line)
    if (!setting)
      throw corrupt(
        'descriptor',
        `line ${index + 1}: ${JSON.stringify(line.slice(0, 120))}`,
        'a setting or an extent',
      )
    const key = setting[1]!.toLowerCase()
    const value = setting[2] ?? setting[3]!.trim()
    if (settings.has(key) && settings.get(key) !== value && !key.startsWith('ddb.')) {
      throw corrupt('descriptor', `${setting[1]} twice`, 'one value')
    }
    settings.set(key, value)
  }
  for (const key of settings.keys()) {
    if (/^encryption|^keysafe|^keyid/.test(key)) {
      throw new VarveError('ENCRYPTED', `Cannot open VMDK: found ${key}, expected a disk without a key`)
    }
  }
  const version = Number(settings.get('version') ?? 'NaN')
  if (!(version >= 1 && version <= 4)) {
    throw unsupported(`descriptor version ${JSON.stringify(settings.get('version') ?? '')}`, '1 to 4')
  }
  const createType = settings.get('createtype') ?? ''
  if (DEVICE_TYPES.has(createType.toLowerCase())) {
    throw unsupported(`createType ${createType}, whose data stands on a device`, 'one whose data is in files')
  }
  if (!CREATE_TYPES.has(createType.toLowerCase())) {
    throw unsupported(`createType ${JSON.stringify(createType.slice(0, 60))}`, 'one that is known')
  }
  if (extents.length === 0) throw corrupt('descriptor', 'no extent', 'at least one')
  const parentCid = contentId(settings, 'parentcid') ?? NO_PARENT
  const parentHint = settings.get('parentfilenamehint')
  if (parentCid !== NO_PARENT && !parentHint) {
    throw corrupt('descriptor', `parentCID ${parentCid} without parentFileNameHint`, 'the name of the parent')
  }
  return {
    version,
    cid: contentId(settings, 'cid') ?? NO_PARENT,
    parentCid: parentCid === NO_PARENT ? undefined : parentCid,
    parentHint: parentCid === NO_PARENT ? undefined : parentHint,
    createType,
    extents,
    length,
    settings,
  }
}

/** `RW 4192256 SPARSE "name" [offset]`; undefined when the line is no extent. */
function parseExtent(line: string): DescriptorExtent | undefined {
  const words = /^(RW|RDONLY|NOACCESS)\s+(.*)$/i.exec(line)
  if (!words) return undefined
  const wrong = (why: string): VarveError =>
    corrupt('descriptor', `extent ${JSON.stringify(line.slice(0, 120))}`, why)
  const parts = /^(\d{1,15})\s+([A-Z]+)(?:\s+"([^"]*)"(?:\s+(\d{1,15}))?)?(?:\s+.*)?$/i.exec(words[2]!)
  if (!parts) throw wrong('size, type and name')
  if (words[1]!.toUpperCase() === 'NOACCESS') throw unsupported('an extent without access', 'RW or RDONLY')
  const type = parts[2]!.toUpperCase()
  if (!EXTENT_TYPES.has(type)) throw unsupported(`an extent of type ${type}`, [...EXTENT_TYPES].join(', '))
  const length = Number(parts[1]) * SECTOR
  const offset = Number(parts[4] ?? 0) * SECTOR
  if (length === 0 || !Number.isSafeInteger(length + offset)) throw wrong('a size in sectors')
  const name = parts[3] ?? ''
  if (type !== 'ZERO' && name === '') throw wrong('the name of a file')
  if (offset !== 0 && type !== 'FLAT' && type !== 'VMFS') throw wrong('an offset for flat extents only')
  return { type: type as ExtentType, length, name, offset }
}

function contentId(settings: ReadonlyMap<string, string>, key: string): string | undefined {
  const value = settings.get(key)
  if (value === undefined) return undefined
  if (!/^[0-9a-fA-F]{1,8}$/.test(value))
    throw corrupt('descriptor', `${key} ${JSON.stringify(value)}`, '32 bits in hex')
  return value.toLowerCase().padStart(8, '0')
}

/** Names are in the encoding that the text itself names; all of those begin with ASCII. */
function decode(bytes: Uint8Array): string {
  const ascii = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('latin1')
  const label = /^\s*encoding\s*=\s*"([^"]*)"/im.exec(ascii)?.[1] ?? 'UTF-8'
  try {
    return new TextDecoder(label, { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch (cause) {
    if (cause instanceof RangeError)
      throw unsupported(`encoding ${JSON.stringify(label)}`, 'one that is known')
    throw corrupt('descriptor', `bytes that are no ${label}`, 'text')
  }
}
