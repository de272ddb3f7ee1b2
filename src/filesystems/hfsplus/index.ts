/**
 * HFS+ and HFSX: used blocks from the allocation file.
 *
 * Rules: only a volume at rest is trusted: unmounted cleanly, or journaled with an empty journal (it is not
 * replayed). The allocation file must lie in the eight extents of the volume header, call its own blocks used, and
 * have as many clear bits as the header counts free blocks. The boot blocks with the volume header and the last
 * 1024 bytes with its copy are in use whatever it says, as is the tail.
 */
import { type Context, isPowerOfTwo, LIMITS, NotTrusted, within } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { Bitmap, RangeSet } from '../../extents/index.ts'
import type { FileSystem, FileSystemType, UsedMap } from '../file-system.ts'
import {
  decodeJournalInfo,
  decodeVolumeHeader,
  HEADER_AT,
  HEADER_BYTES,
  isJournalEmpty,
  JOURNAL_HEADER_BYTES,
  JOURNAL_INFO_BYTES,
  looksLikeHfsPlus,
  type VolumeHeader,
} from './layout.ts'

/** Boot blocks and volume header at the start; its copy and a reserved sector at the end. */
const START_BYTES = HEADER_AT + HEADER_BYTES
const END_BYTES = 1024

export const hfsplus: FileSystemType = {
  name: 'hfsplus',

  async probe(device: BlockDevice): Promise<boolean> {
    if (device.size < HEADER_AT + HEADER_BYTES) return false
    return looksLikeHfsPlus(await readBytes(device, HEADER_AT, HEADER_BYTES))
  },

  async open(device: BlockDevice, { signal }: Context): Promise<FileSystem> {
    const header = decodeVolumeHeader(await readBytes(device, HEADER_AT, HEADER_BYTES, signal))
    const { blockBytes, totalBlocks, freeBlocks } = header
    if (!isPowerOfTwo(blockBytes) || blockBytes < 512 || totalBlocks === 0 || freeBlocks > totalBlocks) {
      throw refusal(
        'hfsplus-bad-header',
        `${freeBlocks} free of ${totalBlocks} blocks of ${blockBytes} bytes`,
        header,
      )
    }
    const size = totalBlocks * blockBytes
    if (size > device.size) {
      throw refusal('hfsplus-size-mismatch', `${size} bytes in a partition of ${device.size}`, header)
    }
    return {
      kind: 'hfsplus',
      uuid: header.uuid,
      size,
      blockBytes,
      used: (context) => usedBlocks(device, header, context),
    }
  },
}

async function usedBlocks(device: BlockDevice, header: VolumeHeader, context: Context): Promise<UsedMap> {
  await checkAtRest(device, header, context)
  const { blockBytes, totalBlocks, freeBlocks, allocation } = header
  const bits = Bitmap.fromBytes(await readAllocation(device, header, context), totalBlocks, {
    msbFirst: true,
  })
  if (totalBlocks - bits.count !== freeBlocks) {
    throw refusal(
      'hfsplus-bitmap',
      `${totalBlocks - bits.count} free blocks where the header counts ${freeBlocks}`,
      header,
    )
  }
  for (const { start, blocks } of allocation) {
    if (bits.nextClear(start) < start + blocks) {
      throw refusal('hfsplus-bitmap', `one that calls its own block ${bits.nextClear(start)} free`, header)
    }
  }
  const size = totalBlocks * blockBytes
  const ranges = bits
    .toRanges()
    .scale(blockBytes)
    .union(RangeSet.of(0, Math.min(START_BYTES, device.size)))
    .union(RangeSet.of(Math.max(0, Math.min(size, device.size) - END_BYTES), device.size))
    .union(RangeSet.of(Math.max(0, device.size - END_BYTES), device.size))
  return { ranges, trust: 'exact', state: header.unmounted ? 'clean' : 'journal empty' }
}

/** @throws NotTrusted unless nothing that the allocation file does not know yet can be on the volume */
async function checkAtRest(device: BlockDevice, header: VolumeHeader, { signal }: Context): Promise<void> {
  const { journalInfoBlock, blockBytes } = header
  if (header.inconsistent || (!header.unmounted && journalInfoBlock === undefined)) {
    throw refusal('hfsplus-dirty', 'a volume that was not unmounted', header)
  }
  if (journalInfoBlock === undefined) return
  const infoAt = journalInfoBlock * blockBytes
  if (infoAt + JOURNAL_INFO_BYTES > device.size) {
    throw refusal('hfsplus-journal', `journal info in block ${journalInfoBlock}`, header)
  }
  const info = decodeJournalInfo(await readBytes(device, infoAt, JOURNAL_INFO_BYTES, signal))
  if (typeof info === 'string') throw refusal('hfsplus-journal', info, header)
  if (info.at === undefined) return
  if (info.at + BigInt(JOURNAL_HEADER_BYTES) > BigInt(device.size)) {
    throw refusal('hfsplus-journal', `a journal at ${info.at}`, header)
  }
  const empty = isJournalEmpty(await readBytes(device, Number(info.at), JOURNAL_HEADER_BYTES, signal))
  if (typeof empty === 'string') throw refusal('hfsplus-journal', empty, header)
  if (!empty) throw refusal('hfsplus-journal-not-empty', 'changes that wait in the journal', header)
}

async function readAllocation(
  device: BlockDevice,
  header: VolumeHeader,
  { signal }: Context,
): Promise<Uint8Array> {
  const { totalBlocks, blockBytes, allocation, allocationBytes } = header
  const wanted = within(Math.ceil(totalBlocks / 8), LIMITS.tableBytes, 'HFS+ allocation file')
  const held = allocation.reduce((sum, { blocks }) => sum + blocks * blockBytes, 0)
  if (allocationBytes < BigInt(wanted) || held < wanted) {
    throw refusal(
      'hfsplus-bitmap',
      `${Math.min(held, Number(allocationBytes))} bytes for ${totalBlocks} blocks in the header's extents`,
      header,
    )
  }
  if (allocation.some(({ start, blocks }) => start + blocks > totalBlocks)) {
    throw refusal('hfsplus-bitmap', 'one that leaves the volume', header)
  }
  const content = new Uint8Array(wanted)
  let done = 0
  for (const { start, blocks } of allocation) {
    const length = Math.min(blocks * blockBytes, wanted - done)
    await device.read(start * blockBytes, content.subarray(done, done + length), signal)
    done += length
  }
  return content
}

type ReasonCode =
  | 'hfsplus-bad-header'
  | 'hfsplus-size-mismatch'
  | 'hfsplus-dirty'
  | 'hfsplus-journal'
  | 'hfsplus-journal-not-empty'
  | 'hfsplus-bitmap'

function refusal(code: ReasonCode, found: string, { uuid }: VolumeHeader): NotTrusted {
  return new NotTrusted(code, `Cannot trust the HFS+ volume: found ${found}`, { kind: 'hfsplus', uuid })
}
