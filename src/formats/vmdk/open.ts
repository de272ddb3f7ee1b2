/**
 * Opens a VMDK: reads its descriptor, opens the extents that it names, and puts them one after another.
 *
 * Rules:
 * - A name in the descriptor is opened by `openPart` alone, under the chain's path policy. An embedded descriptor
 *   stands for the file that it is in, whatever name it gives: files are renamed.
 * - A sparse extent on its own is a piece of a disk, so it is refused: the descriptor says what it is a piece of.
 * - Every extent is opened and judged before the first byte is read; on the way out all that was opened is closed.
 */
import { VarveError, within } from '../../base/index.ts'
import { type BlockDevice, ConcatDevice, readBytes, ZeroDevice } from '../../device/index.ts'
import type { BackingReference, FormatFacts, ImageLayer, OpenOptions } from '../image-format.ts'
import {
  type Descriptor,
  type DescriptorExtent,
  type ExtentType,
  MOST_DESCRIPTOR_BYTES,
  parseDescriptor,
} from './descriptor.ts'
import { FlatExtent } from './flat-extent.ts'
import { corrupt, type ExtentKindName, HEADER_BYTES, magicOf, unsupported } from './layout.ts'
import { firstSector, openSparseExtent, readSparseHeader, SparseExtent } from './sparse-extent.ts'
import { VmdkLayer } from './vmdk-layer.ts'

/** Opens `file`, which the layer then owns. @throws CORRUPT, UNSUPPORTED, ENCRYPTED, LIMIT */
export async function openVmdk(file: BlockDevice, options: OpenOptions): Promise<ImageLayer> {
  if (options.write) throw unsupported('a request to write', 'one to read')
  const magic = magicOf(await readBytes(file, 0, Math.min(file.size, HEADER_BYTES), options.signal))
  switch (magic) {
    case 'descriptor': {
      within(file.size, MOST_DESCRIPTOR_BYTES, 'bytes of a VMDK descriptor')
      const text = await readBytes(file, 0, file.size, options.signal)
      return await openParts(parseDescriptor(text), options, file)
    }
    case 'sparse':
      return await openHosted(file, options)
    case 'cowd':
    case 'sesparse':
      throw lonely(magic)
    default:
      throw corrupt('file', 'no magic of a VMDK', 'a descriptor or a sparse extent')
  }
}

/** A sparse extent with the descriptor inside. */
async function openHosted(file: BlockDevice, options: OpenOptions): Promise<ImageLayer> {
  const { signal, log } = options
  const header = await readSparseHeader(file, signal)
  const { descriptorOffset: at, descriptorBytes: length } = header
  if (at === 0 || length === 0) throw lonely('sparse')
  within(length, MOST_DESCRIPTOR_BYTES, 'bytes of a VMDK descriptor')
  if (at < HEADER_BYTES || at + length > file.size) {
    throw corrupt('descriptor', `it at ${at}+${length} of a file of ${file.size} bytes`, 'it in the file')
  }
  const descriptor = parseDescriptor(await readBytes(file, at, length, signal))
  const [extent, further] = descriptor.extents
  if (!extent || further || extent.type !== 'SPARSE') {
    throw unsupported('an embedded descriptor of other extents than its own file', 'one sparse extent')
  }
  const part = await openSparseExtent(file, { kind: 'sparse', length: extent.length, log, signal })
  return layerOf(descriptor, part, [part])
}

/** A descriptor file and the extents that it names. The layer owns both. */
async function openParts(
  descriptor: Descriptor,
  options: OpenOptions,
  file: BlockDevice,
): Promise<ImageLayer> {
  const parts: BlockDevice[] = []
  try {
    for (const extent of descriptor.extents) parts.push(await openPart(extent, options))
    return layerOf(descriptor, new ConcatDevice(parts), parts, file)
  } catch (error) {
    await Promise.allSettled(parts.map((part) => part[Symbol.asyncDispose]()))
    throw error
  }
}

const KINDS: Partial<Record<ExtentType, ExtentKindName>> = {
  SPARSE: 'sparse',
  VMFSSPARSE: 'cowd',
  SESPARSE: 'sesparse',
}

async function openPart(extent: DescriptorExtent, options: OpenOptions): Promise<BlockDevice> {
  const { signal, log } = options
  if (extent.type === 'ZERO') return new ZeroDevice(extent.length)
  if (!options.openPart) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open VMDK: found the extent ${JSON.stringify(extent.name)}, expected none here`,
      { fields: { extent: extent.name } },
    )
  }
  const file = await options.openPart(extent.name)
  try {
    const kind = KINDS[extent.type]
    if (!kind) return new FlatExtent(file, extent.offset, extent.length)
    const found = magicOf(await firstSector(file, signal))
    if (found !== kind) throw corrupt('extent', found ?? 'no VMDK', kind)
    return await openSparseExtent(file, { kind, length: extent.length, log, signal })
  } catch (error) {
    await file[Symbol.asyncDispose]()
    throw named(error, extent.name)
  }
}

function layerOf(
  descriptor: Descriptor,
  content: BlockDevice,
  parts: readonly BlockDevice[],
  file?: BlockDevice,
): ImageLayer {
  const sparse = parts.find((part) => part instanceof SparseExtent)
  const facts: Record<string, string | number | boolean> = {
    createType: descriptor.createType,
    cid: descriptor.cid,
    extents: parts.length,
  }
  if (sparse) {
    facts['grainBytes'] = sparse.header.grainBytes
    facts['compressed'] = parts.some((part) => part instanceof SparseExtent && part.header.compressed)
    facts['uncleanShutdown'] = parts.some(
      (part) => part instanceof SparseExtent && part.header.uncleanShutdown,
    )
  }
  if (descriptor.parentCid !== undefined) {
    facts['parentCid'] = descriptor.parentCid
    facts['parentName'] = descriptor.parentHint!
  }
  const changeTrack = descriptor.settings.get('changetrackpath')
  if (changeTrack !== undefined) facts['changeTrackPath'] = changeTrack
  return new VmdkLayer(content, {
    backing: backingOf(descriptor),
    facts: facts satisfies FormatFacts,
    id: descriptor.cid,
    descriptor: file,
  })
}

/** The hint is a path of the machine that made the image; the same name beside the image is tried after it. */
function backingOf(descriptor: Descriptor): BackingReference | undefined {
  const { parentHint: name, parentCid: id } = descriptor
  if (name === undefined || id === undefined) return undefined
  const base = name.split(/[\\/]/).at(-1)!
  return { name, format: 'vmdk', id, ...(base !== name && base !== '' ? { otherNames: [base] } : {}) }
}

function lonely(kind: ExtentKindName): VarveError {
  return new VarveError(
    'UNSUPPORTED',
    `Cannot open VMDK: found a ${kind} extent without a descriptor, expected the descriptor`,
    { fields: { extent: kind }, hint: 'Open the descriptor file (NAME.vmdk) that names this extent.' },
  )
}

function named(error: unknown, name: string): unknown {
  if (!(error instanceof VarveError)) return error
  return new VarveError(error.code, `${error.message} (extent ${JSON.stringify(name)})`, {
    cause: error.cause,
    hint: error.hint,
    fields: { ...error.fields, extent: name },
  })
}
