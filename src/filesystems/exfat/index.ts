/**
 * exFAT: used clusters from the allocation bitmap.
 *
 * Rules: the boot region matches its checksum. With two bitmaps (TexFAT) the used set is the union of both, because
 * drivers differ in which of them they follow. The bitmap must hold the clusters of the root directory and its own,
 * else it is not a bitmap of this volume. There is no journal: a dirty volume's bitmap is what its driver will go
 * on from. All before the cluster heap (boot regions, FATs) and all after it is in use.
 */
import { type Context, LIMITS, NotTrusted, within } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { Bitmap, RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import type { FileSystem, FileSystemType, UsedMap } from '../file-system.ts'
import { auditExfat } from './audit.ts'
import {
  BOOT_REGION_SECTORS,
  BOOT_SECTOR_BYTES,
  type BootSector,
  bootChecksumHolds,
  DIRECTORY_ENTRY_BYTES,
  decodeBootSector,
  decodeRootEntry,
  END_OF_CHAIN,
  FIRST_CLUSTER,
  looksLikeExfat,
  sectorBytesOf,
} from './layout.ts'

/** How far into the root directory the bitmap is looked for; formatters put it first. */
const ROOT_SEARCH_BYTES = 1_048_576
/** FAT entries read at a time while a chain is followed: chains are contiguous as a rule. */
const FAT_WINDOW_BYTES = 4096

export const exfat: FileSystemType = {
  name: 'exfat',

  async probe(device: BlockDevice): Promise<boolean> {
    if (device.size < BOOT_SECTOR_BYTES) return false
    return looksLikeExfat(await readBytes(device, 0, BOOT_SECTOR_BYTES))
  },

  async open(device: BlockDevice, context: Context): Promise<FileSystem> {
    const boot = await readBoot(device, context)
    const root = await readRoot(device, boot, context)
    return {
      kind: 'exfat',
      uuid: boot.serial,
      label: root.label,
      size: boot.volumeBytes,
      blockBytes: boot.clusterBytes,
      used: (inner) => usedClusters(device, boot, root, inner),
      audit: (inner) => auditExfat(device, boot, inner),
    }
  },
}

interface Root {
  readonly clusters: readonly number[]
  readonly bitmaps: readonly { readonly firstCluster: number; readonly bytes: number }[]
  readonly label: string | undefined
}

async function readBoot(device: BlockDevice, { signal }: Context): Promise<BootSector> {
  const about = { kind: 'exfat' }
  const sector = await readBytes(device, 0, BOOT_SECTOR_BYTES, signal)
  const sectorBytes = sectorBytesOf(sector)
  if (sectorBytes !== undefined && device.size >= BOOT_REGION_SECTORS * sectorBytes) {
    const region = await readBytes(device, 0, BOOT_REGION_SECTORS * sectorBytes, signal)
    if (!bootChecksumHolds(region, sectorBytes)) {
      throw new NotTrusted(
        'exfat-checksum',
        'Cannot read the exFAT volume: its boot checksum does not match',
        about,
      )
    }
  }
  const boot = decodeBootSector(sector)
  if (typeof boot === 'string') {
    throw new NotTrusted('exfat-bad-boot-sector', `Cannot read the exFAT volume: found ${boot}`, about)
  }
  if (boot.volumeBytes > device.size) {
    throw new NotTrusted(
      'exfat-size-mismatch',
      `Cannot read the exFAT volume: found ${boot.volumeBytes} bytes, expected at most the ${device.size} of its partition`,
      { ...about, uuid: boot.serial },
    )
  }
  return boot
}

async function readRoot(device: BlockDevice, boot: BootSector, context: Context): Promise<Root> {
  const most = Math.max(1, Math.floor(ROOT_SEARCH_BYTES / boot.clusterBytes))
  const clusters: number[] = []
  const bitmaps: { firstCluster: number; bytes: number }[] = []
  let label: string | undefined
  for await (const cluster of chain(device, boot, boot.rootCluster, context)) {
    if (clusters.length >= most) break
    clusters.push(cluster)
    const length = Math.min(boot.clusterBytes, ROOT_SEARCH_BYTES)
    const bytes = await readBytes(device, placeOf(boot, cluster), length, context.signal)
    for (let at = 0; at < length; at += DIRECTORY_ENTRY_BYTES) {
      const entry = decodeRootEntry(bytes.subarray(at, at + DIRECTORY_ENTRY_BYTES))
      if (entry.is === 'end') return { clusters, bitmaps: checked(bitmaps), label }
      if (entry.is === 'label' && entry.label !== '') label = entry.label
      if (entry.is === 'bitmap') {
        // Bits may follow that stand for no cluster, but never a different number of bitmaps than there are FATs.
        if (entry.bytes < BigInt(Math.ceil(boot.clusterCount / 8)) || bitmaps.length >= boot.fatCount) {
          throw badBitmap(`one of ${entry.bytes} bytes for ${boot.clusterCount} clusters`, boot)
        }
        const bytes = within(Math.ceil(boot.clusterCount / 8), LIMITS.tableBytes, 'exFAT allocation bitmap')
        bitmaps.push({ firstCluster: entry.firstCluster, bytes })
      }
    }
  }
  return { clusters, bitmaps: checked(bitmaps), label }

  function checked(found: Root['bitmaps']): Root['bitmaps'] {
    if (found.length === boot.fatCount) return found
    throw badBitmap(`${found.length} of them, expected ${boot.fatCount}`, boot)
  }
}

async function usedClusters(
  device: BlockDevice,
  boot: BootSector,
  root: Root,
  context: Context,
): Promise<UsedMap> {
  const { clusterBytes, clusterCount, heapStart } = boot
  let used = RangeSet.empty
  for (const { firstCluster, bytes } of root.bitmaps) {
    const { clusters, content } = await readChain(device, boot, { firstCluster, bytes }, context)
    const bits = Bitmap.fromBytes(content, clusterCount)
    for (const cluster of [...clusters, ...root.clusters]) {
      if (!bits.get(cluster - FIRST_CLUSTER)) throw badBitmap(`one that calls cluster ${cluster} free`, boot)
    }
    used = used.union(bits.toRanges())
  }
  const builder = new RangeSetBuilder()
  builder.add(0, heapStart)
  builder.addAll(used.scale(clusterBytes).shift(heapStart))
  builder.add(heapStart + clusterCount * clusterBytes, device.size)
  return {
    ranges: builder.build(),
    trust: 'exact',
    state: boot.dirty ? 'dirty: no journal to replay' : 'clean',
  }
}

/** The first `bytes` bytes of a chain; runs of clusters by one read each. */
async function readChain(
  device: BlockDevice,
  boot: BootSector,
  { firstCluster, bytes }: { readonly firstCluster: number; readonly bytes: number },
  context: Context,
): Promise<{ clusters: readonly number[]; content: Uint8Array }> {
  const wanted = Math.ceil(bytes / boot.clusterBytes)
  const clusters: number[] = []
  for await (const cluster of chain(device, boot, firstCluster, context)) {
    if (clusters.push(cluster) === wanted) break
  }
  if (clusters.length < wanted)
    throw badBitmap(`a chain of ${clusters.length} clusters for ${bytes} bytes`, boot)
  if (new Set(clusters).size < wanted) throw badBitmap('a chain that leads back to itself', boot)
  const content = new Uint8Array(bytes)
  for (let first = 0; first < wanted; ) {
    let end = first + 1
    while (end < wanted && clusters[end] === clusters[end - 1]! + 1) end += 1
    const into = content.subarray(first * boot.clusterBytes, end * boot.clusterBytes)
    await device.read(placeOf(boot, clusters[first]!), into, context.signal)
    first = end
  }
  return { clusters, content }
}

/** Clusters of a FAT chain, at most as many as there are; throws at one that is none. */
async function* chain(
  device: BlockDevice,
  boot: BootSector,
  firstCluster: number,
  { signal }: Context,
): AsyncGenerator<number> {
  const fatEnd = boot.fatStart + (boot.clusterCount + FIRST_CLUSTER) * 4
  let window: { start: number; bytes: DataView } = { start: 0, bytes: new DataView(new ArrayBuffer(0)) }
  let cluster = firstCluster
  for (let count = 0; cluster !== END_OF_CHAIN; count++) {
    if (
      cluster < FIRST_CLUSTER ||
      cluster >= boot.clusterCount + FIRST_CLUSTER ||
      count > boot.clusterCount
    ) {
      throw new NotTrusted(
        'exfat-chain',
        `Cannot follow a chain of the exFAT volume: found cluster ${cluster}, expected one of ${boot.clusterCount}`,
        { kind: 'exfat', uuid: boot.serial },
      )
    }
    yield cluster
    const at = boot.fatStart + cluster * 4
    if (at < window.start || at + 4 > window.start + window.bytes.byteLength) {
      const raw = await readBytes(device, at, Math.min(FAT_WINDOW_BYTES, fatEnd - at), signal)
      window = { start: at, bytes: new DataView(raw.buffer, raw.byteOffset, raw.byteLength) }
    }
    cluster = window.bytes.getUint32(at - window.start, true)
  }
}

function placeOf(boot: BootSector, cluster: number): number {
  return boot.heapStart + (cluster - FIRST_CLUSTER) * boot.clusterBytes
}

function badBitmap(found: string, boot: BootSector): NotTrusted {
  return new NotTrusted('exfat-bitmap', `Cannot use the exFAT allocation bitmap: found ${found}`, {
    kind: 'exfat',
    uuid: boot.serial,
  })
}
