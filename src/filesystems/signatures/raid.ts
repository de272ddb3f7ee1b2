/**
 * Metadata of RAID members at the end of the device, so that the file system of the array shows at its start: DDF and
 * Intel Matrix. Recognised only; Linux md is read, in the room `volumes`.
 *
 * Rule: such a member is never read as if the file system on it were alone there: its real size is the array's,
 * and what lies behind it belongs to the array.
 */
import { Bytes } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'

const DDF_MAGIC = 0xde11de11
const ISW_SIGNATURE = 'Intel Raid ISM Cfg Sig. '
const SECTOR = 512

/** The kind of RAID member that the device is: `ddf`, `isw`; undefined when it is none. */
export async function findRaidMember(device: BlockDevice): Promise<string | undefined> {
  const sectors = Math.floor(device.size / SECTOR)
  if (sectors < 3) return undefined
  const last = new Bytes(await readBytes(device, (sectors - 1) * SECTOR, 4), 'big', 'DDF anchor')
  if (last.u32(0) === DDF_MAGIC) return 'ddf'
  const isw = await readBytes(device, (sectors - 2) * SECTOR, ISW_SIGNATURE.length)
  const text = new Bytes(isw, 'little', 'Intel RAID metadata').text(0, ISW_SIGNATURE.length)
  return text === ISW_SIGNATURE ? 'isw' : undefined
}
