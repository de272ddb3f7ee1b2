/**
 * Reads the superblock and says whether this file system is one whose free space can be vouched for.
 *
 * Rule: whatever is not known to leave the free-space btrees alone is refused. Unknown read-only-compatible bits are
 * refused as well: they promise that old code may read *files*, not that it understands the allocation metadata.
 */
import { isPowerOfTwo, NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import {
  AG_HEADER_SECTORS,
  BB,
  decodeSuperblock,
  FEATURES2_KNOWN,
  INCOMPAT,
  INCOMPAT_KNOWN,
  RO_COMPAT_KNOWN,
  SB_BYTES,
  SB_MAGIC,
  type Superblock,
  superblockCrcMatches,
  superblockVersion,
  VERSION_BITS,
} from './layout.ts'

const MIN_AG_BLOCKS = 64
const MIN_BLOCK = 512
const MAX_BLOCK = 65_536
const MAX_SECTOR = 32_768

export function hasMagic(bytes: Uint8Array): boolean {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength).getUint32(0) === SB_MAGIC
}

/**
 * The superblock at the start of `device`, checked. Sizes are checked against the device.
 * @throws NotTrusted `xfs-…`
 */
export async function readSuperblock(device: BlockDevice, signal?: AbortSignal): Promise<Superblock> {
  if (device.size < SB_BYTES) throw new NotTrusted('xfs-truncated', tooSmall(device.size), { kind: 'xfs' })
  const first = await readBytes(device, 0, Math.min(device.size, 4096), signal)
  const sectorBytes = new DataView(first.buffer, first.byteOffset).getUint16(102)
  const sector =
    sectorBytes > first.length && sectorBytes <= Math.min(MAX_SECTOR, device.size)
      ? await readBytes(device, 0, sectorBytes, signal)
      : first
  return judgeSuperblock(sector, device.size, { checksum: true })
}

/**
 * `bytes` begins with a superblock sector. `checksum` is false for a sector that a log replay has put together:
 * the kernel computes the checksum anew when it writes such a sector back.
 */
export function judgeSuperblock(
  bytes: Uint8Array,
  deviceBytes: number,
  options: { readonly checksum: boolean },
): Superblock {
  if (!hasMagic(bytes)) {
    throw new NotTrusted('xfs-superblock', 'Cannot read XFS superblock: found no magic, expected "XFSB"')
  }
  const version = superblockVersion(bytes)
  const sb = decodeSuperblock(bytes)
  const about = { kind: 'xfs', uuid: sb.uuid, label: sb.label || undefined }
  const refuse = (reason: string, found: string, expected: string): never => {
    throw new NotTrusted(reason, `Cannot use XFS superblock: found ${found}, expected ${expected}`, about)
  }
  if (version !== 4 && version !== 5) return refuse('xfs-version', `version ${version}`, '4 or 5')

  const { sectorBytes, blockBytes, agblocks, agcount, dblocks } = sb
  const field = (name: string, value: number, good: boolean): void => {
    if (!good) refuse('xfs-superblock', `${name} ${value}`, 'a value that fits the others')
  }
  field('sectsize', sectorBytes, sectorBytes >= BB && sectorBytes <= MAX_SECTOR && isPowerOfTwo(sectorBytes))
  field('sectlog', sb.sectorLog, 2 ** sb.sectorLog === sectorBytes)
  if (sectorBytes > bytes.length)
    refuse('xfs-truncated', `${bytes.length} bytes`, `a sector of ${sectorBytes}`)
  if (sb.version === 5 && options.checksum && !superblockCrcMatches(bytes.subarray(0, sectorBytes))) {
    refuse('xfs-checksum', 'a wrong superblock checksum', 'the CRC-32C of its sector')
  }

  if (sb.inProgress !== 0) refuse('xfs-mkfs-unfinished', 'inprogress set', 'a finished mkfs or growfs')
  if ((sb.incompat & INCOMPAT.NEEDSREPAIR) !== 0)
    refuse('xfs-needs-repair', 'the NEEDSREPAIR bit', 'a sound one')
  const unknown = [
    ['incompatible', sb.incompat & ~INCOMPAT_KNOWN],
    ['read-only-compatible', sb.roCompat & ~RO_COMPAT_KNOWN],
    ['features2', sb.features2 & ~FEATURES2_KNOWN],
    ['version', sb.versionBits & VERSION_BITS.SHARED],
  ] as const
  for (const [name, bits] of unknown) {
    if (bits !== 0)
      refuse('xfs-feature', `${name} feature bits 0x${(bits >>> 0).toString(16)}`, 'known ones only')
  }

  field(
    'blocksize',
    blockBytes,
    blockBytes >= MIN_BLOCK && blockBytes <= MAX_BLOCK && isPowerOfTwo(blockBytes),
  )
  field('blocklog', sb.blockLog, 2 ** sb.blockLog === blockBytes && blockBytes >= sectorBytes)
  field('agblocks', agblocks, agblocks >= MIN_AG_BLOCKS && agblocks < 2 ** 31)
  field('agblocks', agblocks, agblocks * blockBytes > AG_HEADER_SECTORS * sectorBytes)
  field('agblklog', sb.agblklog, sb.agblklog === Math.ceil(Math.log2(agblocks)))
  field('agcount', agcount, agcount >= 1)
  field('dblocks', dblocks, dblocks > (agcount - 1) * agblocks && dblocks <= agcount * agblocks)
  field('inodesize', sb.inodeBytes, 2 ** sb.inodeLog === sb.inodeBytes && sb.inodeBytes >= 256)
  field('inodesize', sb.inodeBytes, sb.inodeBytes <= Math.min(2048, blockBytes))
  field('inopblock', sb.inodesPerBlock, sb.inodesPerBlock === blockBytes / sb.inodeBytes)
  field('inopblog', sb.inopblog, 2 ** sb.inopblog === sb.inodesPerBlock)
  field('dirblklog', sb.dirBlockLog, blockBytes * 2 ** sb.dirBlockLog <= MAX_BLOCK)
  if (dblocks * blockBytes > deviceBytes) {
    refuse(
      'xfs-truncated',
      `${dblocks} blocks of ${blockBytes}`,
      `at most the ${deviceBytes} bytes of the device`,
    )
  }

  if (sb.rblocks !== 0 || sb.rextents !== 0) refuse('xfs-realtime', 'a realtime section', 'none')
  if (sb.logstart === 0) refuse('xfs-external-log', 'a log on another device', 'an internal log')
  const { agno, agbno } = splitFsbno(sb, sb.logstart)
  field('logblocks', sb.logblocks, sb.logblocks > 0 && sb.logblocks * blockBytes < 2 ** 31)
  field('logstart', sb.logstart, agno < agcount && agbno + sb.logblocks <= agLength(sb, agno))
  return sb
}

export function splitFsbno(sb: Superblock, fsbno: number): { agno: number; agbno: number } {
  const unit = 2 ** sb.agblklog
  const agno = Math.floor(fsbno / unit)
  return { agno, agbno: fsbno - agno * unit }
}

/** Blocks of an AG; the last may be shorter. */
export function agLength(sb: Superblock, agno: number): number {
  return Math.min(sb.agblocks, sb.dblocks - agno * sb.agblocks)
}

/** Blocks at the start of an AG that hold its four header sectors. */
export function headerBlocks(sb: Superblock): number {
  return Math.ceil((AG_HEADER_SECTORS * sb.sectorBytes) / sb.blockBytes)
}

/** Byte offset of a block of an AG. */
export function agByte(sb: Superblock, agno: number, agbno: number): number {
  return (agno * sb.agblocks + agbno) * sb.blockBytes
}

function tooSmall(size: number): string {
  return `Cannot read XFS superblock: found a device of ${size} bytes, expected at least ${SB_BYTES}`
}
