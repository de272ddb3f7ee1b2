/**
 * Apple partition maps: a driver descriptor in block 0, one map entry per block after it. Big-endian; Apple
 * "Inside Macintosh: Devices", chapter 3; docs/formats/apm.md.
 *
 * Rules: the map is an entry of itself and in use, as are the descriptor and all space of no partition. There is no
 * checksum, so an entry that is not one makes the whole map doubted.
 */
import { Bytes, type Context, isPowerOfTwo, NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import {
  onlyMember,
  type PartitionEntry,
  partitionTable,
  type VolumeScheme,
  type VolumeTable,
} from '../volume.ts'

const DESCRIPTOR_SIGNATURE = 'ER'
const ENTRY_SIGNATURE = 'PM'
const ENTRY_BYTES = 512
/** A map of more entries is not one: drivers make room for 63. */
const MOST_ENTRIES = 256
const TYPE_MAP = 'Apple_partition_map'
const TYPE_FREE = 'Apple_Free'

/** The block size of the descriptor, when entry 1 of the map stands where that puts it. */
async function blockBytesOf(device: BlockDevice): Promise<number | undefined> {
  if (device.size < 1024) return undefined
  const descriptor = new Bytes(await readBytes(device, 0, 4), 'big', 'driver descriptor')
  if (descriptor.text(0, 2) !== DESCRIPTOR_SIGNATURE) return undefined
  const blockBytes = descriptor.u16(2)
  if (!isPowerOfTwo(blockBytes) || blockBytes < 512 || blockBytes > 4096) return undefined
  if (blockBytes + ENTRY_BYTES > device.size) return undefined
  const first = new Bytes(await readBytes(device, blockBytes, 2), 'big', 'partition map entry')
  return first.text(0, 2) === ENTRY_SIGNATURE ? blockBytes : undefined
}

export const apm: VolumeScheme = {
  name: 'apm',
  scopes: ['disk', 'volume'],

  async probe(device: BlockDevice): Promise<boolean> {
    return (await blockBytesOf(device)) !== undefined
  },

  async open(members: readonly BlockDevice[], { signal }: Context): Promise<VolumeTable> {
    const disk = onlyMember(members)
    const blockBytes = await blockBytesOf(disk)
    if (blockBytes === undefined) throw badMap('no first entry')
    const entries: PartitionEntry[] = []
    let metadata = RangeSet.of(0, blockBytes)
    let count = 1
    for (let number = 1; number <= count; number++) {
      const at = number * blockBytes
      if (at + ENTRY_BYTES > disk.size) throw badMap(`entry ${number} of ${count} past the end of the disk`)
      const entry = new Bytes(await readBytes(disk, at, ENTRY_BYTES, signal), 'big', 'partition map entry')
      if (entry.text(0, 2) !== ENTRY_SIGNATURE) throw badMap(`no entry ${number} of ${count}`)
      const entryCount = entry.u32(4)
      if (number === 1) count = entryCount
      if (entryCount !== count || count < 1 || count > MOST_ENTRIES)
        throw badMap(`a map of ${entryCount} entries`)
      metadata = metadata.union(RangeSet.of(at, at + blockBytes))
      const start = entry.u32(8) * blockBytes
      const end = start + entry.u32(12) * blockBytes
      const type = entry.cString(48, 32)
      if (type === TYPE_MAP) metadata = metadata.union(RangeSet.of(start, end))
      else if (type !== TYPE_FREE && start < end) {
        const label = entry.cString(16, 32)
        entries.push({ name: String(number), start, end, label: label === '' ? undefined : label })
      }
    }
    return partitionTable(disk, { kind: 'apm', metadata, entries })
  },
}

function badMap(found: string): NotTrusted {
  return new NotTrusted('apm-bad-map', `Cannot read the Apple partition map: found ${found}`, { kind: 'apm' })
}
