/**
 * Second opinion on a FAT volume: every cluster that some directory entry owns, found from the root down.
 *
 * The map and the chains stand in the same table, so what can differ is the ends: an entry that starts, or a chain
 * that goes on, in a cluster that the table calls free.
 */
import { type Context, NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { Bitmap, type RangeSet } from '../../extents/index.ts'
import { ChainWalk } from '../cluster-chains.ts'
import { type BootSector, decodeDirectory, FIRST_CLUSTER } from './layout.ts'

/** Directories are read in pieces of at most this; a cluster is no larger than 256 KiB. */
const PIECE_BYTES = 262_144

/** @throws NotTrusted for a chain that leaves the volume */
export async function auditFat(device: BlockDevice, boot: BootSector, context: Context): Promise<RangeSet> {
  const { fatStart, fatBytes, fatBits, activeFat, clusters, clusterBytes, dataStart } = boot
  const { signal } = context
  const mask = { 12: 0xfff, 16: 0xffff, 32: 0x0fffffff }[fatBits]
  const walk = new ChainWalk({
    device,
    start: fatStart + (activeFat ?? 0) * fatBytes,
    bits: fatBits,
    clusters,
    mask,
    // Bad-cluster marks end a chain as well: they lie just below.
    endOfChain: mask - 8,
    refuse: (found) =>
      new NotTrusted(
        'fat-chain',
        `Cannot follow a chain of the FAT volume: found cluster ${found}, expected one of ${clusters}`,
        { kind: `fat${fatBits}`, uuid: boot.serial },
      ),
  })
  const directories: number[] = []
  const queued = new Bitmap(clusters + FIRST_CLUSTER)
  const queue = (first: number): void => {
    // One that is out of range is refused when it is its turn.
    if (first < queued.length && queued.get(first)) return
    if (first < queued.length) queued.set(first)
    directories.push(first)
  }

  /** False at the end of the directory. */
  const take = async (piece: Uint8Array): Promise<boolean> => {
    const { entries, ended } = decodeDirectory(piece, fatBits)
    for (const { firstCluster, isDirectory } of entries) {
      if (isDirectory) queue(firstCluster)
      else for await (const _ of walk.chain(firstCluster, signal));
    }
    return !ended
  }

  if (fatBits === 32) queue(boot.rootCluster)
  else {
    for (let at = 0; at < boot.rootBytes; at += PIECE_BYTES) {
      const length = Math.min(PIECE_BYTES, boot.rootBytes - at)
      if (!(await take(await readBytes(device, boot.rootStart + at, length, signal)))) break
    }
  }
  for (let first = directories.pop(); first !== undefined; first = directories.pop()) {
    let more = true
    for await (const cluster of walk.chain(first, signal)) {
      const at = dataStart + (cluster - FIRST_CLUSTER) * clusterBytes
      // What follows the end of a directory is its own, but says nothing.
      more &&= await take(await readBytes(device, at, clusterBytes, signal))
    }
  }
  return walk.owned.scale(clusterBytes).shift(dataStart)
}
