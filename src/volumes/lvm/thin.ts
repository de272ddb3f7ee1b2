/**
 * The metadata device of a thin pool: for each thin device, which of its blocks stand in which block of the pool's data.
 * Little-endian, blocks of 4 KiB, each with its own checksum; copy on write, so what the superblock points at is whole.
 *
 * Facts: the kernel's Documentation/admin-guide/device-mapper/thin-provisioning and its persistent-data B-trees.
 * Top tree: device id -> root of a bottom tree; bottom tree: block of the device -> (data block << 24 | time).
 */
import { Bytes, NotTrusted, rawCrc32c, within } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'

const BLOCK = 4096
const SUPER_MAGIC = 27022010n
/** Each kind of block has its own value xor'ed into the checksum. */
const CRC = { superblock: 160774, node: 121107 } as const
const NODE = { internal: 1, leaf: 2 } as const
const DEEPEST = 16

export interface ThinMapping {
  /** Block of the thin device. */
  readonly block: number
  /** Block of the pool's data device. */
  readonly dataBlock: number
}

export interface ThinPool {
  /** Bytes per block. */
  readonly blockBytes: number
  /** Mappings by device id, ascending by `block`. */
  readonly devices: ReadonlyMap<number, readonly ThinMapping[]>
}

/** @throws NotTrusted when anything is damaged, or the pool asks to be checked */
export async function readThinPool(metadata: BlockDevice, dataBytes: number): Promise<ThinPool> {
  const sb = await readBlock(metadata, 0, CRC.superblock)
  if (sb.u64(32) !== SUPER_MAGIC) throw refuse('found no superblock')
  const version = sb.u32(40)
  if (version < 1 || version > 2) throw refuse(`found version ${version}`)
  if (sb.u32(4) !== 0) throw refuse('found the flag that it needs to be checked')
  if (sb.u64(56) !== 0n) throw refuse('found a metadata snapshot, which holds blocks of its own')
  const blockBytes = sb.u32(336) * 512
  if (blockBytes < 65536 || blockBytes % 65536 !== 0) throw refuse(`found blocks of ${blockBytes} bytes`)
  const blockCount = Math.floor(dataBytes / blockBytes)
  const limit = { left: Math.ceil(metadata.size / BLOCK) }
  const devices = new Map<number, readonly ThinMapping[]>()
  for await (const top of leafEntries(metadata, sb.size64(320, 'mapping root'), limit)) {
    const mappings: ThinMapping[] = []
    for await (const { key, value } of leafEntries(metadata, Number(top.value), limit)) {
      const dataBlock = Number(value >> 24n)
      if (dataBlock >= blockCount) throw refuse(`found data block ${dataBlock} of ${blockCount}`)
      const last = mappings.at(-1)
      if (last && last.block >= key) throw refuse('found keys that do not ascend')
      mappings.push({ block: key, dataBlock })
    }
    devices.set(top.key, mappings)
  }
  return { blockBytes, devices }
}

interface Entry {
  readonly key: number
  readonly value: bigint
}

async function* leafEntries(
  metadata: BlockDevice,
  root: number,
  limit: { left: number },
  depth = 0,
): AsyncGenerator<Entry> {
  if (depth > DEEPEST) throw refuse('found a tree that is too deep')
  if (limit.left-- <= 0) throw refuse('found more nodes than it has blocks')
  const node = await readBlock(metadata, root, CRC.node)
  if (node.size64(8, 'block number') !== root) throw refuse(`found another block in place of ${root}`)
  const count = node.u32(16)
  const most = node.u32(20)
  if (node.u32(24) !== 8 || count > most || 32 + most * 16 > BLOCK)
    throw refuse(`found a node with ${count} of ${most} entries`)
  const flags = node.u32(4)
  for (let i = 0; i < count; i++) {
    const key = node.size64(32 + i * 8, 'key')
    const value = node.u64(32 + most * 8 + i * 8)
    if (flags === NODE.leaf) yield { key, value }
    else if (flags === NODE.internal) yield* leafEntries(metadata, Number(value), limit, depth + 1)
    else throw refuse(`found a node with flags ${flags}`)
  }
}

async function readBlock(metadata: BlockDevice, number: number, xor: number): Promise<Bytes> {
  within(number, Math.floor(metadata.size / BLOCK) - 1, 'block of thin metadata')
  const bytes = await readBytes(metadata, number * BLOCK, BLOCK)
  const view = new Bytes(bytes, 'little', 'thin metadata')
  const crc = (rawCrc32c(bytes.subarray(4), 0xffffffff) ^ xor) >>> 0
  if (view.u32(0) !== crc) throw refuse(`found a wrong checksum in block ${number}`)
  return view
}

function refuse(why: string): NotTrusted {
  return new NotTrusted('lvm-thin-invalid', `Cannot use thin pool metadata: ${why}`, { kind: 'lvm2' })
}
