/**
 * Second opinion on an exFAT volume: every cluster that some directory entry owns, found from the root down, by the
 * FAT or, where the entry says so, as a run of clusters.
 */
import { type Context, NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { Bitmap, type RangeSet } from '../../extents/index.ts'
import { ChainWalk } from '../cluster-chains.ts'
import {
  type BootSector,
  DIRECTORY_ENTRY_BYTES,
  DirectoryReader,
  FIRST_CLUSTER,
  type OwningEntry,
} from './layout.ts'

/** Clusters may have 32 MiB; directories are read in pieces. */
const PIECE_BYTES = 262_144
/** Numbers from here on are marks: bad, or the end of the chain. */
const END_OF_CHAIN = 0xfffffff7

/** @throws NotTrusted for a chain or run that leaves the volume */
export async function auditExfat(device: BlockDevice, boot: BootSector, context: Context): Promise<RangeSet> {
  const { clusterBytes, clusterCount, heapStart } = boot
  const { signal } = context
  const refuse = (found: number): NotTrusted =>
    new NotTrusted(
      'exfat-chain',
      `Cannot follow a chain of the exFAT volume: found cluster ${found}, expected one of ${clusterCount}`,
      { kind: 'exfat', uuid: boot.serial },
    )
  const walk = new ChainWalk({
    device,
    start: boot.fatStart,
    bits: 32,
    clusters: clusterCount,
    mask: 0xffffffff,
    endOfChain: END_OF_CHAIN,
    refuse,
  })
  const clustersOf = async function* ({ firstCluster, bytes, isRun }: OwningEntry): AsyncGenerator<number> {
    if (!isRun) {
      yield* walk.chain(firstCluster, signal)
      return
    }
    const count = Math.ceil(bytes / clusterBytes)
    if (count > clusterCount) throw refuse(firstCluster + count - 1)
    yield* walk.run(firstCluster, count)
  }

  const queued = new Bitmap(clusterCount + FIRST_CLUSTER)
  const directories: OwningEntry[] = []
  const queue = (entry: OwningEntry): void => {
    const { firstCluster } = entry
    // One that is out of range is refused when it is its turn.
    if (firstCluster < queued.length && queued.get(firstCluster)) return
    if (firstCluster < queued.length) queued.set(firstCluster)
    directories.push(entry)
  }
  queue({ firstCluster: boot.rootCluster, bytes: 0, isRun: false, isDirectory: true })
  for (let directory = directories.pop(); directory; directory = directories.pop()) {
    const reader = new DirectoryReader()
    let more = true
    for await (const cluster of clustersOf(directory)) {
      const start = heapStart + (cluster - FIRST_CLUSTER) * clusterBytes
      for (let at = 0; more && at < clusterBytes; at += PIECE_BYTES) {
        const piece = await readBytes(device, start + at, Math.min(PIECE_BYTES, clusterBytes - at), signal)
        for (let i = 0; more && i < piece.length; i += DIRECTORY_ENTRY_BYTES) {
          const entry = reader.next(piece.subarray(i, i + DIRECTORY_ENTRY_BYTES))
          if (entry === 'end') more = false
          else if (entry?.isDirectory) queue(entry)
          else if (entry) for await (const _ of clustersOf(entry));
        }
      }
    }
  }
  return walk.owned.scale(clusterBytes).shift(heapStart)
}
