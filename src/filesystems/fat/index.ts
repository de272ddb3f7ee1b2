/**
 * FAT12, FAT16 and FAT32: used clusters from the file allocation table.
 *
 * Rules: a cluster is free only when every live copy of the FAT says 0; anything else, bad clusters and nonsense
 * included, is in use. Where the copies differ, as a crash leaves them, the used set is their union: a driver may
 * follow either. There is no journal, the FAT is the state, so a dirty volume is as good as a clean one. All
 * before the first cluster (boot sectors, FATs, FAT12/16 root directory) and all after the last one is in use.
 */
import { type Context, NotTrusted, throwIfAborted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { RangeSetBuilder } from '../../extents/index.ts'
import type { FileSystem, FileSystemType, UsedMap } from '../file-system.ts'
import { auditFat } from './audit.ts'
import {
  BOOT_SECTOR_BYTES,
  type BootSector,
  decodeBootSector,
  FIRST_CLUSTER,
  fatEntriesBytes,
  firstFatAt,
  labelOfDirectory,
  looksLikeFat,
} from './layout.ts'
import { RunCollector } from './used-runs.ts'

/** Read of one FAT at a time: 3 * 2^18, so that no 12-bit entry is cut in two. */
const CHUNK_BYTES = 786_432
/** How far into the root directory the label is looked for; it is the first entry almost always. */
const LABEL_SEARCH_BYTES = 4096

export const fat: FileSystemType = {
  name: 'fat',

  async probe(device: BlockDevice): Promise<boolean> {
    if (device.size < BOOT_SECTOR_BYTES) return false
    const sector = await readBytes(device, 0, BOOT_SECTOR_BYTES)
    if (!looksLikeFat(sector)) return false
    const at = firstFatAt(sector)
    if (at + 1 > device.size) return false
    // Media descriptor again: a boot sector alone is left behind by too many tools.
    return (await readBytes(device, at, 1))[0] === sector[21]
  },

  async open(device: BlockDevice, context: Context): Promise<FileSystem> {
    const boot = decodeBootSector(await readBytes(device, 0, BOOT_SECTOR_BYTES, context.signal))
    if (typeof boot === 'string') {
      throw new NotTrusted('fat-bad-boot-sector', `Cannot read the FAT volume: found ${boot}`, {
        kind: 'fat',
      })
    }
    const kind = `fat${boot.fatBits}`
    if (boot.volumeBytes > device.size) {
      throw new NotTrusted(
        'fat-size-mismatch',
        `Cannot read the FAT volume: found ${boot.volumeBytes} bytes, expected at most the ${device.size} of its partition`,
        { kind, uuid: boot.serial, label: boot.label },
      )
    }
    return {
      kind,
      uuid: boot.serial,
      label: (await rootLabel(device, boot, context)) ?? boot.label,
      size: boot.volumeBytes,
      blockBytes: boot.clusterBytes,
      used: (inner) => usedClusters(device, boot, inner),
      audit: (inner) => auditFat(device, boot, inner),
    }
  },
}

async function rootLabel(
  device: BlockDevice,
  boot: BootSector,
  context: Context,
): Promise<string | undefined> {
  const { rootCluster, clusterBytes, dataStart } = boot
  if (boot.fatBits !== 32) {
    const length = Math.min(boot.rootBytes, LABEL_SEARCH_BYTES)
    return labelOfDirectory(await readBytes(device, boot.rootStart, length, context.signal))
  }
  if (rootCluster < FIRST_CLUSTER || rootCluster >= boot.clusters + FIRST_CLUSTER) {
    throw new NotTrusted(
      'fat-bad-boot-sector',
      `Cannot read the FAT volume: found its root directory in cluster ${rootCluster}, expected one of ${boot.clusters}`,
      { kind: 'fat32', uuid: boot.serial, label: boot.label },
    )
  }
  const at = dataStart + (rootCluster - FIRST_CLUSTER) * clusterBytes
  return labelOfDirectory(
    await readBytes(device, at, Math.min(clusterBytes, LABEL_SEARCH_BYTES), context.signal),
  )
}

async function usedClusters(device: BlockDevice, boot: BootSector, context: Context): Promise<UsedMap> {
  const { fatStart, fatBytes, fatCount, fatBits, activeFat, clusters, clusterBytes, dataStart } = boot
  const live = activeFat === undefined ? Array.from({ length: fatCount }, (_, copy) => copy) : [activeFat]
  const total = fatEntriesBytes(fatBits, clusters + FIRST_CLUSTER)
  const runs = live.map(() => new RunCollector(fatBits, clusters))
  let differ = false
  let markedUnclean = false
  for (let at = 0; at < total; at += CHUNK_BYTES) {
    throwIfAborted(context.signal)
    const length = Math.min(CHUNK_BYTES, total - at)
    const chunks: Uint8Array[] = []
    for (const copy of live) {
      chunks.push(await readBytes(device, fatStart + copy * fatBytes + at, length, context.signal))
    }
    const [first, ...others] = chunks as [Uint8Array, ...Uint8Array[]]
    if (at === 0) markedUnclean = isMarkedUnclean(first, fatBits)
    runs[0]!.take(first)
    for (const [index, chunk] of others.entries()) {
      if (Buffer.compare(first, chunk) === 0) runs[index + 1]!.skip(chunk.length)
      else {
        differ = true
        runs[index + 1]!.take(chunk)
      }
    }
  }
  const used = runs.map((collector) => collector.finish()).reduce((all, more) => all.union(more))
  const builder = new RangeSetBuilder()
  builder.add(0, dataStart)
  builder.addAll(used.shift(-FIRST_CLUSTER).scale(clusterBytes).shift(dataStart))
  builder.add(dataStart + clusters * clusterBytes, device.size)
  const notes = [boot.dirty || markedUnclean ? 'dirty: no journal to replay' : 'clean']
  if (differ) notes.push('copies of the FAT differ: union taken')
  return { ranges: builder.build(), trust: 'exact', state: notes.join('; ') }
}

/** FAT[1] carries "volume was unmounted cleanly" in its top bit but one; FAT12 has no room for it. */
function isMarkedUnclean(fat: Uint8Array, fatBits: number): boolean {
  if (fatBits === 16) return (fat[3]! & 0x80) === 0
  if (fatBits === 32) return (fat[7]! & 0x08) === 0
  return false
}
