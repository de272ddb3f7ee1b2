/**
 * Superblocks of RAID members that may stand at the end of the device, so that the file system of the array shows
 * at its start: Linux md (all four places), DDF and Intel Matrix. Recognised only.
 *
 * Rule: such a member is never read as if the file system on it were alone there: its real size is the array's,
 * and what lies behind it belongs to the array.
 */
import { alignDown, Bytes } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'

const MD_MAGIC = 0xa92b4efc
const DDF_MAGIC = 0xde11de11
const ISW_SIGNATURE = 'Intel Raid ISM Cfg Sig. '
const SECTOR = 512
const MD_090_RESERVED = 65_536

/** The kind of RAID member that the device is: `md`, `ddf`, `isw`; undefined when it is none. */
export async function findRaidMember(device: BlockDevice): Promise<string | undefined> {
  for (const at of mdPlaces(device.size)) {
    if (at < 0 || at + 4 > device.size) continue
    const raw = await readBytes(device, at, 4)
    // 0.90 is written in the byte order of the machine, 1.x always little-endian.
    const both = (['little', 'big'] as const).map((endian) => new Bytes(raw, endian, 'md superblock').u32(0))
    if (both.includes(MD_MAGIC)) return 'md'
  }
  const sectors = Math.floor(device.size / SECTOR)
  if (sectors < 3) return undefined
  const last = new Bytes(await readBytes(device, (sectors - 1) * SECTOR, 4), 'big', 'DDF anchor')
  if (last.u32(0) === DDF_MAGIC) return 'ddf'
  const isw = await readBytes(device, (sectors - 2) * SECTOR, ISW_SIGNATURE.length)
  const text = new Bytes(isw, 'little', 'Intel RAID metadata').text(0, ISW_SIGNATURE.length)
  return text === ISW_SIGNATURE ? 'isw' : undefined
}

/** Offsets of superblocks 1.1, 1.2, 1.0 and 0.90 on a device of `size` bytes; negative where it is too small. */
function mdPlaces(size: number): readonly number[] {
  const sectors = Math.floor(size / SECTOR)
  return [0, 4096, alignDown(sectors - 16, 8) * SECTOR, alignDown(size, MD_090_RESERVED) - MD_090_RESERVED]
}
