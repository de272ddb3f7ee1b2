/**
 * Superblocks of Linux md: 0.90 (near the end, in the byte order of its machine) and 1.0, 1.1, 1.2 (end, start, 4 KiB;
 * little-endian). Decoding only, no I/O. docs/formats/md.md has the byte tables.
 */
import { alignDown, Bytes, NotTrusted, uuidText } from '../../base/index.ts'

const MAGIC = 0xa92b4efc
export const SUPER_BYTES = 4096
const SECTOR = 512
const RESERVED_090 = 65_536

export type Version = '0.90' | '1.0' | '1.1' | '1.2'

/** Where a superblock of each version stands on a device of `size` bytes, in the order in which they are looked for. */
export function placesOf(size: number): readonly { readonly version: Version; readonly at: number }[] {
  const places: { version: Version; at: number }[] = [
    { version: '1.1', at: 0 },
    { version: '1.2', at: 4096 },
    { version: '1.0', at: alignDown(Math.floor(size / SECTOR) - 16, 8) * SECTOR },
    { version: '0.90', at: alignDown(size, RESERVED_090) - RESERVED_090 },
  ]
  return places.filter(({ at }) => at >= 0 && at + SUPER_BYTES <= size)
}

/** The magic in either byte order: a big-endian 0.90 superblock is recognised, and then refused. */
export function hasMagic(head: Uint8Array): boolean {
  return new Bytes(head, 'little').u32(0) === MAGIC || new Bytes(head, 'big').u32(0) === MAGIC
}

export interface Superblock {
  readonly version: Version
  readonly uuid: string
  readonly name: string
  readonly level: number
  readonly layout: number
  readonly chunkBytes: number
  readonly raidDisks: number
  /** This member's place in the array; undefined for spares, failed members and journals. */
  readonly role: number | undefined
  readonly events: bigint
  /** All members agree: no write was under way and nothing is left to resync. */
  readonly clean: boolean
  readonly dataOffset: number
  /** Bytes of data on this member. */
  readonly dataBytes: number
}

const FEATURE = {
  bitmap: 1,
  recoveryOffset: 2,
  reshape: 4 | 32 | 64,
  badBlocks: 8,
  replacement: 16,
  recoveryBitmap: 128,
  versionedBitmap: 256,
  raid0Layout: 4096,
}
const FEATURES_READ = FEATURE.bitmap | FEATURE.badBlocks | FEATURE.versionedBitmap | FEATURE.raid0Layout

/** @throws NotTrusted */
export function decodeSuperblock(bytes: Uint8Array, version: Version, at: number): Superblock {
  return version === '0.90' ? decode090(bytes) : decode1(bytes, version, at)
}

function decode1(bytes: Uint8Array, version: Version, at: number): Superblock {
  const sb = new Bytes(bytes, 'little', 'md superblock')
  const uuid = uuidText(sb.sub(16, 16))
  const about = { kind: 'md', uuid }
  if (sb.u32(4) !== 1) throw refuse('md-super-invalid', `found major version ${sb.u32(4)}`, about)
  const maxDev = sb.u32(220)
  if (maxDev > (SUPER_BYTES - 256) / 2)
    throw refuse('md-super-invalid', `found room for ${maxDev} members`, about)
  if (sb.u32(216) !== checksum1(bytes.subarray(0, 256 + maxDev * 2)))
    throw refuse('md-super-invalid', 'found a wrong checksum', about)
  if (sb.size64(144, 'super offset') * SECTOR !== at)
    throw refuse('md-super-invalid', 'found the superblock in another place than it says', about)
  const features = sb.u32(8)
  if ((features & ~FEATURES_READ) !== 0) {
    throw refuse(
      'md-state',
      `found features 0x${features.toString(16)}: a reshape, a rebuild or a journal`,
      about,
    )
  }
  const roleAt = sb.u32(160)
  const role = roleAt < maxDev ? sb.u16(256 + roleAt * 2) : 0xffff
  return {
    version,
    uuid,
    name: sb.cString(32, 32),
    level: sb.i32(72),
    layout: sb.u32(76),
    chunkBytes: sb.u32(88) * SECTOR,
    raidDisks: sb.u32(92),
    role: role < 0xff00 ? role : undefined,
    events: sb.u64(200),
    clean: sb.u64(208) === 0xffff_ffff_ffff_ffffn,
    dataOffset: sb.size64(128, 'data offset') * SECTOR,
    // Arrays with redundancy use `size` of each member, the others all of it.
    dataBytes: (sb.i32(72) > 0 ? sb.size64(80, 'size') : sb.size64(136, 'data size')) * SECTOR,
  }
}

function checksum1(bytes: Uint8Array): number {
  const view = new Bytes(bytes, 'little')
  let sum = 0n
  let at = 0
  for (; at + 4 <= bytes.length; at += 4) if (at !== 216) sum += BigInt(view.u32(at))
  if (at + 2 <= bytes.length) sum += BigInt(view.u16(at))
  return Number(((sum & 0xffff_ffffn) + (sum >> 32n)) & 0xffff_ffffn)
}

function decode090(bytes: Uint8Array): Superblock {
  const sb = new Bytes(bytes, 'little', 'md superblock')
  if (sb.u32(0) !== MAGIC)
    throw refuse('md-super-invalid', 'found the superblock of a big-endian machine', { kind: 'md' })
  const word = (index: number): number => sb.u32(index * 4)
  const uuid = [5, 13, 14, 15].map((index) => word(index).toString(16).padStart(8, '0')).join(':')
  const about = { kind: 'md', uuid }
  let sum = 0n
  for (let index = 0; index < SUPER_BYTES / 4; index++) if (index !== 38) sum += BigInt(word(index))
  if (word(38) !== Number(((sum & 0xffff_ffffn) + (sum >> 32n)) & 0xffff_ffffn)) {
    throw refuse('md-super-invalid', 'found a wrong checksum', about)
  }
  if (word(1) !== 0 || word(2) !== 90)
    throw refuse('md-state', `found version ${word(1)}.${word(2)}: a reshape`, about)
  const thisDisk = 992
  const state = word(thisDisk + 4)
  const inSync = (state & 2) !== 0 && (state & 4) !== 0 && (state & 1) === 0
  return {
    version: '0.90',
    uuid,
    name: '',
    level: sb.i32(7 * 4),
    layout: word(64),
    chunkBytes: word(65),
    raidDisks: word(10),
    role: inSync ? word(thisDisk + 3) : undefined,
    events: BigInt(word(39)) | (BigInt(word(40)) << 32n),
    clean: (word(33) & 1) !== 0,
    dataOffset: 0,
    dataBytes: word(8) * 1024,
  }
}

export function refuse(reason: string, why: string, about: NotTrusted['about']): NotTrusted {
  return new NotTrusted(reason, `Cannot use md array: ${why}`, about)
}
