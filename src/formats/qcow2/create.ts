/**
 * Makes an empty qcow2 image.
 *
 * Layout: header | refcount table | refcount blocks | L1 table. Rule: the header is written last, after a flush of
 * the rest, so a file is a qcow2 image only when it is a whole one.
 */
import { alignUp, Bytes, isPowerOfTwo, VarveError } from '../../base/index.ts'
import { isResizable, type WritableBlockDevice } from '../../device/index.ts'
import type { BackingReference, CreateOptions } from '../image-format.ts'
import {
  AT,
  COMPATIBLE,
  type Compression,
  EXTENSION,
  encodeFeatureNames,
  geometryOf,
  HEADER_BYTES_V2,
  HEADER_BYTES_WRITTEN,
  INCOMPATIBLE,
  MAGIC,
  MAX_BACKING_NAME_BYTES,
  MAX_CLUSTER_BITS,
  MAX_L1_BYTES,
  MIN_CLUSTER_BITS,
  MIN_EXTENDED_CLUSTER_BITS,
} from './layout.ts'
import { setCount } from './refcounts.ts'

/** What `CreateOptions.settings` may hold for qcow2. */
export interface Qcow2Settings {
  /** 2 or 3; default 3. */
  readonly version: 2 | 3
  /** 512 B to 2 MiB, a power of two; default 64 KiB. */
  readonly clusterBytes: number
  /** 1 to 64, a power of two; default 16. Version 2 has 16 only. */
  readonly refcountBits: number
  /** Sets the feature bit for other writers; varve itself always keeps refcounts exact. Version 3. */
  readonly lazyRefcounts: boolean
  /** Subclusters; clusters of at least 16 KiB. Version 3. */
  readonly extendedL2: boolean
  /** How compressed clusters are coded; zstd needs version 3. */
  readonly compression: Compression
}

/** @throws USAGE for a setting that is unknown, of the wrong type or out of range */
export function parseSettings(settings: CreateOptions['settings'] = {}): Qcow2Settings {
  const known = ['version', 'clusterBytes', 'refcountBits', 'lazyRefcounts', 'extendedL2', 'compression']
  for (const name of Object.keys(settings)) {
    if (!known.includes(name))
      throw usage(`found unknown setting ${name}, expected one of ${known.join(', ')}`)
  }
  const version = settings['version'] ?? 3
  if (version !== 2 && version !== 3) throw usage(`found version ${version}, expected 2 or 3`)
  const clusterBytes = settings['clusterBytes'] ?? 65_536
  if (
    typeof clusterBytes !== 'number' ||
    !isPowerOfTwo(clusterBytes) ||
    clusterBytes < 2 ** MIN_CLUSTER_BITS ||
    clusterBytes > 2 ** MAX_CLUSTER_BITS
  ) {
    throw usage(`found clusterBytes ${clusterBytes}, expected a power of two from 512 to 2097152`)
  }
  const refcountBits = settings['refcountBits'] ?? 16
  if (typeof refcountBits !== 'number' || !isPowerOfTwo(refcountBits) || refcountBits > 64) {
    throw usage(`found refcountBits ${refcountBits}, expected a power of two from 1 to 64`)
  }
  const lazyRefcounts = flag('lazyRefcounts')
  const extendedL2 = flag('extendedL2')
  const compression = settings['compression'] ?? 'deflate'
  if (compression !== 'deflate' && compression !== 'zstd') {
    throw usage(`found compression ${compression}, expected deflate or zstd`)
  }
  if (version === 2 && (refcountBits !== 16 || lazyRefcounts || extendedL2 || compression === 'zstd')) {
    throw usage('found version 2 with refcountBits, lazyRefcounts, extendedL2 or zstd, expected version 3')
  }
  if (extendedL2 && clusterBytes < 2 ** MIN_EXTENDED_CLUSTER_BITS) {
    throw usage(`found clusterBytes ${clusterBytes} with extendedL2, expected at least 16384`)
  }
  return { version, clusterBytes, refcountBits, lazyRefcounts, extendedL2, compression }

  function flag(name: string): boolean {
    const value = settings[name] ?? false
    if (typeof value !== 'boolean') throw usage(`found ${name} ${value}, expected true or false`)
    return value
  }
}

/**
 * Writes an empty image of `virtualSize` bytes (rounded up to 512, in which QEMU counts) into `file`. Any former
 * content is dropped.
 */
export async function createImage(file: WritableBlockDevice, options: CreateOptions): Promise<void> {
  const settings = parseSettings(options.settings)
  const { clusterBytes, refcountBits } = settings
  const { virtualSize } = options
  if (!Number.isSafeInteger(virtualSize) || virtualSize < 0) {
    throw new RangeError(`virtualSize ${virtualSize} is not a size`)
  }
  const size = alignUp(virtualSize, 512)
  const clusterBits = Math.log2(clusterBytes)
  const { l2Span } = geometryOf({
    version: settings.version,
    clusterBits,
    extendedL2: settings.extendedL2,
    hasDataFile: false,
  })
  const l1Size = Math.max(1, Math.ceil(size / l2Span))
  if (l1Size * 8 > MAX_L1_BYTES) {
    throw new VarveError(
      'LIMIT',
      `Cannot create qcow2 image of ${size} bytes: found clusters of ${clusterBytes}, expected larger ones`,
      { fields: { size, clusterBytes }, hint: 'Choose larger clusters.' },
    )
  }
  const l1Clusters = Math.ceil((l1Size * 8) / clusterBytes)
  const perBlock = (clusterBytes * 8) / refcountBits
  // Blocks and table count themselves, so they are grown until they fit.
  let blocks = 1
  let tableClusters = 1
  for (;;) {
    const clusters = 1 + tableClusters + blocks + l1Clusters
    const needBlocks = Math.ceil(clusters / perBlock)
    const needTable = Math.ceil((needBlocks * 8) / clusterBytes)
    if (needBlocks <= blocks && needTable <= tableClusters) break
    blocks = Math.max(blocks, needBlocks)
    tableClusters = Math.max(tableClusters, needTable)
  }
  const blocksAt = (1 + tableClusters) * clusterBytes
  const l1At = blocksAt + blocks * clusterBytes
  const end = l1At + l1Clusters * clusterBytes
  const header = encodeHeader(settings, {
    size,
    l1Size,
    l1TableOffset: l1At,
    refcountTableClusters: tableClusters,
    backing: options.backing,
  })

  if (isResizable(file)) {
    await file.resize(0)
    await file.resize(end)
  } else if (file.size < end) {
    throw new VarveError(
      'NO_SPACE',
      `Cannot create qcow2 image: found a device of ${file.size} bytes, expected ${end}`,
    )
  } else await file.zero(0, end)

  const table = new DataView(new ArrayBuffer(tableClusters * clusterBytes))
  for (let i = 0; i < blocks; i++) table.setBigUint64(i * 8, BigInt(blocksAt + i * clusterBytes))
  await file.write(clusterBytes, new Uint8Array(table.buffer))
  const counts = new DataView(new ArrayBuffer(blocks * clusterBytes))
  for (let cluster = 0; cluster < end / clusterBytes; cluster++) {
    setCount(counts, Math.log2(refcountBits), cluster, 1)
  }
  await file.write(blocksAt, new Uint8Array(counts.buffer))
  await file.flush()
  await file.write(0, header)
  await file.flush()
}

function encodeHeader(
  settings: Qcow2Settings,
  image: {
    size: number
    l1Size: number
    l1TableOffset: number
    refcountTableClusters: number
    backing: BackingReference | undefined
  },
): Uint8Array {
  const { clusterBytes, version } = settings
  const out = new Bytes(new Uint8Array(clusterBytes), 'big', 'qcow2 header')
  out.setU32(0, MAGIC)
  out.setU32(4, version)
  out.setU32(20, Math.log2(clusterBytes))
  out.setU64(AT.size, image.size)
  out.setU32(AT.l1Size, image.l1Size)
  out.setU64(AT.l1TableOffset, image.l1TableOffset)
  out.setU64(AT.refcountTableOffset, clusterBytes)
  out.setU32(AT.refcountTableClusters, image.refcountTableClusters)
  let at = HEADER_BYTES_V2
  if (version === 3) {
    at = HEADER_BYTES_WRITTEN
    const zstd = settings.compression === 'zstd'
    out.setU64(
      AT.incompatible,
      (zstd ? INCOMPATIBLE.compressionType : 0n) | (settings.extendedL2 ? INCOMPATIBLE.extendedL2 : 0n),
    )
    out.setU64(AT.compatible, settings.lazyRefcounts ? COMPATIBLE.lazyRefcounts : 0n)
    out.setU32(AT.refcountOrder, Math.log2(settings.refcountBits))
    out.setU32(AT.headerLength, HEADER_BYTES_WRITTEN)
    out.setU8(AT.compressionType, zstd ? 1 : 0)
  }
  const name = new TextEncoder().encode(image.backing?.name ?? '')
  const format = new TextEncoder().encode(image.backing?.format ?? '')
  if (image.backing && (name.length === 0 || name.length > MAX_BACKING_NAME_BYTES || name.includes(0))) {
    throw usage(
      `found a backing file name of ${name.length} bytes, expected 1 to ${MAX_BACKING_NAME_BYTES} without NUL`,
    )
  }
  const names = encodeFeatureNames()
  const nameBytes = alignUp(name.length, 8)
  const formatBytes = format.length > 0 ? 8 + alignUp(format.length, 8) : 0
  if (at + formatBytes + 8 + nameBytes > clusterBytes) {
    throw usage(
      `found a backing file name of ${name.length} bytes, expected it to fit into a cluster of ${clusterBytes}`,
    )
  }
  if (format.length > 0) extension(EXTENSION.backingFormat, format)
  // The names are a courtesy: left out where the first cluster is too small for them.
  if (version === 3 && at + 8 + names.length + 8 + nameBytes <= clusterBytes) {
    extension(EXTENSION.featureNames, names)
  }
  at += 8
  if (image.backing) {
    out.setU64(8, at)
    out.setU32(16, name.length)
    out.set(at, name)
  }
  return out.bytes

  function extension(type: number, data: Uint8Array): void {
    out.setU32(at, type)
    out.setU32(at + 4, data.length)
    out.set(at + 8, data)
    at += 8 + alignUp(data.length, 8)
  }
}

function usage(found: string): VarveError {
  return new VarveError('USAGE', `Cannot create qcow2 image: ${found}`)
}
