/**
 * On-disk structures of VHD: constants, decode and encode, no I/O.
 *
 * Specification: "Virtual Hard Disk Image Format Specification" 1.0 (Microsoft, 2006), and the `tdbatmap`
 * extension as XenServer's libvhd writes it. All integers are big-endian; a sector is 512 bytes.
 * docs/formats/vhd.md has the tables.
 *
 * Rule: decoding believes nothing. A structure with a wrong cookie, checksum or version does not decode.
 */
import { alignUp, Bytes, isPowerOfTwo, uuidText, VarveError } from '../../base/index.ts'

export const SECTOR = 512
export const FOOTER_BYTES = 512
export const HEADER_BYTES = 1024
export const NO_OFFSET = 0xffffffffffffffffn
export const UNALLOCATED = 0xffffffff
export const DEFAULT_BLOCK_BYTES = 2_097_152
/** 2000-01-01T00:00:00Z in Unix seconds: where VHD time stamps start. */
export const EPOCH_SECONDS = 946_684_800
export const NIL_UUID = '00000000-0000-0000-0000-000000000000'

const FOOTER_COOKIE = 'conectix'
/** What libvhd writes over the cookie while a resize journal is open. */
const POISON_COOKIE = 'v_poison'
const HEADER_COOKIE = 'cxsparse'
const BATMAP_COOKIE = 'tdbatmap'

/** Features: bit 1 is always set, bit 0 marks a temporary disk; nothing else is defined. */
const FEATURE_RESERVED = 0x2
const FEATURE_TEMPORARY = 0x1
const VERSION = 0x00010000

export type DiskType = 'fixed' | 'dynamic' | 'differencing'
const DISK_TYPES: Readonly<Record<number, DiskType>> = { 2: 'fixed', 3: 'dynamic', 4: 'differencing' }
const DISK_TYPE_CODES: Readonly<Record<DiskType, number>> = { fixed: 2, dynamic: 3, differencing: 4 }

export interface Geometry {
  readonly cylinders: number
  readonly heads: number
  readonly sectors: number
}

export interface Footer {
  readonly features: number
  /** Byte offset of the dynamic header; undefined for fixed disks. */
  readonly dataOffset: number | undefined
  readonly timestamp: number
  /** Four characters, e.g. `tap\0`, `win `, `qemu`. */
  readonly creator: string
  readonly creatorVersion: number
  readonly creatorOs: number
  readonly originalSize: number
  readonly currentSize: number
  readonly geometry: Geometry
  readonly type: DiskType
  readonly uuid: string
  readonly saved: boolean
  /** XenServer's mark of an inner node; zero elsewhere. */
  readonly hidden: boolean
}

/** Why bytes are not a footer: `poisoned` is one whose image must not be opened. */
export type FooterVerdict =
  | { readonly kind: 'valid'; readonly footer: Footer }
  | { readonly kind: 'poisoned' }
  | { readonly kind: 'invalid'; readonly why: string }

/** `bytes` are 512, or the 511 of the short footer that old Microsoft tools wrote (its last byte is zero). */
export function decodeFooter(bytes: Uint8Array): FooterVerdict {
  const whole = new Uint8Array(FOOTER_BYTES)
  whole.set(bytes.subarray(0, FOOTER_BYTES))
  const raw = new Bytes(whole, 'big', 'VHD footer')
  const cookie = raw.text(0, 8)
  if (cookie === POISON_COOKIE) return { kind: 'poisoned' }
  if (cookie !== FOOTER_COOKIE) return { kind: 'invalid', why: 'no cookie `conectix`' }
  const creator = raw.text(28, 4)
  const creatorVersion = raw.u32(32)
  const stored = raw.u32(64)
  if (stored !== checksumOf(whole, 64)) {
    // tap 0.1 and 1.1 summed the footer before they set `hidden`.
    const old = isTap(creator) && (creatorVersion === 0x00000001 || creatorVersion === 0x00010001)
    const shown = whole.slice()
    shown[85] = 0
    if (!old || stored !== checksumOf(shown, 64)) return { kind: 'invalid', why: 'checksum does not match' }
  }
  const features = raw.u32(8)
  if ((features & FEATURE_RESERVED) === 0 || (features & ~(FEATURE_RESERVED | FEATURE_TEMPORARY)) !== 0) {
    return { kind: 'invalid', why: `features are 0x${features.toString(16)}` }
  }
  if (raw.u32(12) !== VERSION) {
    return { kind: 'invalid', why: `file format version is 0x${raw.u32(12).toString(16)}` }
  }
  const type = DISK_TYPES[raw.u32(60)]
  if (!type) return { kind: 'invalid', why: `disk type is ${raw.u32(60)}` }
  const dataOffset = raw.u64(16)
  const sizes = [raw.u64(40), raw.u64(48)]
  const most = BigInt(Number.MAX_SAFE_INTEGER)
  if (sizes.some((size) => size > most) || (type !== 'fixed' && dataOffset > most)) {
    return { kind: 'invalid', why: 'a size or offset is above 2^53 - 1' }
  }
  return {
    kind: 'valid',
    footer: {
      features,
      dataOffset: type === 'fixed' ? undefined : Number(dataOffset),
      timestamp: raw.u32(24),
      creator,
      creatorVersion,
      creatorOs: raw.u32(36),
      originalSize: Number(sizes[0]),
      currentSize: Number(sizes[1]),
      geometry: { cylinders: raw.u16(56), heads: raw.u8(58), sectors: raw.u8(59) },
      type,
      uuid: uuidText(raw.sub(68, 16)),
      saved: raw.u8(84) !== 0,
      hidden: raw.u8(85) !== 0,
    },
  }
}

export function encodeFooter(footer: Footer): Uint8Array {
  const raw = new Bytes(new Uint8Array(FOOTER_BYTES), 'big', 'VHD footer')
  raw.setText(0, FOOTER_COOKIE)
  raw.setU32(8, footer.features)
  raw.setU32(12, VERSION)
  raw.setU64(16, footer.dataOffset ?? NO_OFFSET)
  raw.setU32(24, footer.timestamp)
  raw.setText(28, footer.creator)
  raw.setU32(32, footer.creatorVersion)
  raw.setU32(36, footer.creatorOs)
  raw.setU64(40, footer.originalSize)
  raw.setU64(48, footer.currentSize)
  raw.setU16(56, footer.geometry.cylinders)
  raw.setU8(58, footer.geometry.heads)
  raw.setU8(59, footer.geometry.sectors)
  raw.setU32(60, DISK_TYPE_CODES[footer.type])
  raw.set(68, uuidBytes(footer.uuid))
  raw.setU8(84, footer.saved ? 1 : 0)
  raw.setU8(85, footer.hidden ? 1 : 0)
  raw.setU32(64, checksumOf(raw.bytes, 64))
  return raw.bytes
}

/** The cookie of a footer, whole or poisoned: what probing looks at. */
export function hasFooterCookie(bytes: Uint8Array): boolean {
  if (bytes.length < 8) return false
  const cookie = String.fromCharCode(...bytes.subarray(0, 8))
  return cookie === FOOTER_COOKIE || cookie === POISON_COOKIE
}

export function isTap(creator: string): boolean {
  return creator.startsWith('tap')
}

/** The largest geometry that the fields can hold; it says "look at the current size instead". */
const MOST_CHS_SECTORS = 65_535 * 16 * 255

/**
 * Size of the disk in bytes as its creator's guest sees it. Virtual PC and QEMU's classic `vpc` driver go by the
 * geometry; the specification and everybody else by `current size`. The geometry is believed only where it says
 * something: not at its cap, not zero.
 */
export function guestSize(footer: Footer): { size: number; from: 'geometry' | 'current size' } {
  const { cylinders, heads, sectors } = footer.geometry
  const chs = cylinders * heads * sectors
  const byGeometry = footer.creator === 'vpc ' || footer.creator === 'qemu'
  if (byGeometry && chs > 0 && chs !== MOST_CHS_SECTORS) return { size: chs * SECTOR, from: 'geometry' }
  return { size: footer.currentSize, from: 'current size' }
}

/** The geometry of a disk of `size` bytes by the specification's appendix; never covers more than `size`. */
export function geometryOf(size: number): Geometry {
  const total = Math.min(Math.floor(size / SECTOR), MOST_CHS_SECTORS)
  if (total >= 65_535 * 16 * 63) {
    return { cylinders: Math.floor(total / 255 / 16), heads: 16, sectors: 255 }
  }
  let sectors = 17
  let tracks = Math.floor(total / sectors)
  let heads = Math.max(4, Math.floor((tracks + 1023) / 1024))
  if (tracks >= heads * 1024 || heads > 16) {
    sectors = 31
    heads = 16
    tracks = Math.floor(total / sectors)
  }
  if (tracks >= heads * 1024) {
    sectors = 63
    heads = 16
    tracks = Math.floor(total / sectors)
  }
  return { cylinders: Math.floor(tracks / heads), heads, sectors }
}

export interface Locator {
  /** Four characters: `MacX`, `W2ku`, `W2ru`, `Wi2k`, `Wi2r`, `Mac `. */
  readonly code: string
  /** Bytes reserved in the file. */
  readonly spaceBytes: number
  readonly dataLength: number
  readonly dataOffset: number
}

export interface DynamicHeader {
  readonly tableOffset: number
  /** BAT entries reserved; at least as many as the size needs. */
  readonly maxTableEntries: number
  readonly blockBytes: number
  /** All zero: no parent, or on a differencing disk a raw one. */
  readonly parentUuid: string
  readonly parentTimestamp: number
  /** UTF-16, cut at the first NUL. */
  readonly parentName: string
  /** The used slots, in their order. */
  readonly locators: readonly Locator[]
}

export const LOCATORS_AT = 576
export const LOCATOR_BYTES = 24
export const LOCATOR_SLOTS = 8

/** @throws CORRUPT */
export function decodeHeader(bytes: Uint8Array): DynamicHeader {
  const raw = new Bytes(bytes, 'big', 'VHD dynamic header')
  if (raw.text(0, 8) !== HEADER_COOKIE) throw badHeader('cookie', 'other bytes', HEADER_COOKIE)
  if (raw.u32(36) !== checksumOf(bytes.subarray(0, HEADER_BYTES), 36)) {
    throw badHeader('checksum', raw.u32(36), checksumOf(bytes.subarray(0, HEADER_BYTES), 36))
  }
  if (raw.u64(8) !== NO_OFFSET) throw badHeader('data offset', String(raw.u64(8)), 'all ones')
  if (raw.u32(24) !== VERSION) throw badHeader('header version', raw.u32(24), VERSION)
  const blockBytes = raw.u32(32)
  if (!isPowerOfTwo(blockBytes) || blockBytes < SECTOR || blockBytes > MOST_BLOCK_BYTES) {
    throw badHeader('block size', blockBytes, `a power of two from ${SECTOR} to ${MOST_BLOCK_BYTES}`)
  }
  const locators: Locator[] = []
  for (let slot = 0; slot < LOCATOR_SLOTS; slot++) {
    const at = LOCATORS_AT + slot * LOCATOR_BYTES
    const code = raw.text(at, 4)
    if (code === '\0\0\0\0') continue
    const dataOffset = raw.u64(at + 16)
    // A locator is a hint for finding the parent: one that makes no sense is passed over, the name is still there.
    const spaceBytes = locatorSpace(raw.u32(at + 4))
    if (spaceBytes === undefined || dataOffset > BigInt(Number.MAX_SAFE_INTEGER)) continue
    locators.push({ code, spaceBytes, dataLength: raw.u32(at + 8), dataOffset: Number(dataOffset) })
  }
  return {
    tableOffset: raw.size64(16, 'table offset'),
    maxTableEntries: raw.u32(28),
    blockBytes,
    parentUuid: uuidText(raw.sub(40, 16)),
    parentTimestamp: raw.u32(56),
    parentName: utf16Text(raw.sub(64, 512), 'big') ?? '',
    locators,
  }
}

/** Readers in the field stop at 2 MiB (libvhd) or nowhere (QEMU). */
const MOST_BLOCK_BYTES = 64 * 1024 * 1024

export function encodeHeader(header: DynamicHeader): Uint8Array {
  const raw = new Bytes(new Uint8Array(HEADER_BYTES), 'big', 'VHD dynamic header')
  raw.setText(0, HEADER_COOKIE)
  raw.setU64(8, NO_OFFSET)
  raw.setU64(16, header.tableOffset)
  raw.setU32(24, VERSION)
  raw.setU32(28, header.maxTableEntries)
  raw.setU32(32, header.blockBytes)
  raw.set(40, uuidBytes(header.parentUuid))
  raw.setU32(56, header.parentTimestamp)
  raw.set(64, utf16Bytes(header.parentName, 'big').subarray(0, 512))
  for (const [slot, locator] of header.locators.entries()) {
    const at = LOCATORS_AT + slot * LOCATOR_BYTES
    raw.setText(at, locator.code)
    raw.setU32(at + 4, locator.spaceBytes)
    raw.setU32(at + 8, locator.dataLength)
    raw.setU64(at + 16, locator.dataOffset)
  }
  raw.setU32(36, checksumOf(raw.bytes, 36))
  return raw.bytes
}

/** Some writers count sectors, some (Microsoft, tap) bytes: below 512 it is sectors. Undefined: neither. */
function locatorSpace(field: number): number | undefined {
  if (field < SECTOR) return field * SECTOR
  return field % SECTOR === 0 ? field : undefined
}

/** No path that an operating system accepts is longer, in any of the encodings. */
export const MOST_LOCATOR_BYTES = 8192

/**
 * The path in a locator's data, in our notation: forward slashes, no `file://`, no leading `./`. Undefined when
 * the code is unknown or the bytes are not text in its encoding. Nothing is said about whether the path may be
 * followed: that is the path policy's.
 */
export function decodeLocator(code: string, data: Uint8Array): string | undefined {
  switch (code) {
    case 'MacX': {
      const text = strictUtf8(data)
      if (!text?.startsWith('file://')) return undefined
      return cleanPath(text.slice('file://'.length).replace(/^localhost(?=\/)/, ''))
    }
    case 'W2ku':
    case 'W2ru': {
      const text = utf16Text(data, 'little')
      return text === undefined ? undefined : cleanPath(text.replaceAll('\\', '/'))
    }
    default:
      return undefined
  }
}

/** Undefined for what cannot be a path: empty, or with control characters. */
export function cleanPath(path: string): string | undefined {
  // oxlint-disable-next-line no-control-regex
  if (path === '' || /[\u0000-\u001f\u007f]/.test(path)) return undefined
  const clean = path.replace(/^(?:\.\/+)+/, '')
  return clean === '' || clean === '.' ? undefined : clean
}

export function utf16Bytes(text: string, endian: 'big' | 'little'): Uint8Array {
  const bytes = Buffer.from(text, 'utf16le')
  return endian === 'big' ? bytes.swap16() : bytes
}

/** Cut at the first NUL; undefined when the units are not well-formed UTF-16 or a byte is left over. */
export function utf16Text(bytes: Uint8Array, endian: 'big' | 'little'): string | undefined {
  if (bytes.length % 2 !== 0) return undefined
  const units = Buffer.from(bytes)
  if (endian === 'big') units.swap16()
  let end = 0
  while (end < units.length && (units[end] !== 0 || units[end + 1] !== 0)) end += 2
  const text = units.toString('utf16le', 0, end)
  return /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/.test(text)
    ? undefined
    : text
}

function strictUtf8(bytes: Uint8Array): string | undefined {
  const end = bytes.indexOf(0)
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(end < 0 ? bytes : bytes.subarray(0, end))
  } catch {
    return undefined
  }
}

/** Bytes of one block's sector bitmap: one bit per sector, padded to a sector. */
export function bitmapBytes(blockBytes: number): number {
  return alignUp(Math.ceil(blockBytes / SECTOR / 8), SECTOR)
}

export interface BatmapHeader {
  /** Byte offset of the map. */
  readonly offset: number
  readonly sectors: number
  readonly version: number
  readonly checksum: number
  /** A key's hash is stored: blocks are encrypted. */
  readonly keyed: boolean
}

/** Where libvhd puts the batmap header; nothing in the image points at it. */
export function batmapHeaderOffset(header: DynamicHeader): number {
  return header.tableOffset + alignUp(header.maxTableEntries * 4, SECTOR)
}

/** Undefined when there is none at these 512 bytes. */
export function decodeBatmapHeader(bytes: Uint8Array): BatmapHeader | undefined {
  const raw = new Bytes(bytes, 'big', 'batmap header')
  if (raw.text(0, 8) !== BATMAP_COOKIE) return undefined
  const offset = raw.u64(8)
  if (offset > BigInt(Number.MAX_SAFE_INTEGER)) return undefined
  return {
    offset: Number(offset),
    sectors: raw.u32(16),
    version: raw.u32(20),
    checksum: raw.u32(24),
    keyed: raw.u8(29) !== 0,
  }
}

export function encodeBatmapHeader(header: Omit<BatmapHeader, 'keyed'>): Uint8Array {
  const raw = new Bytes(new Uint8Array(SECTOR), 'big', 'batmap header')
  raw.setText(0, BATMAP_COOKIE)
  raw.setU64(8, header.offset)
  raw.setU32(16, header.sectors)
  raw.setU32(20, header.version)
  raw.setU32(24, header.checksum)
  return raw.bytes
}

/** Version 1.1 summed the map as signed characters. */
const BATMAP_SIGNED = 0x00010001
export const BATMAP_VERSION = 0x00010002

/**
 * Bytes of the map that libvhd reads, writes and sums: it rounds the size down to 16 MiB first, so that for sizes
 * of 8 GiB * k + 2…14 MiB the last blocks lie outside. What lies outside counts as clear.
 */
export function batmapCoveredBytes(currentSize: number): number {
  return Math.max(1, Math.ceil(Math.floor(currentSize / 2 ** 24) / SECTOR)) * SECTOR
}

export function batmapChecksum(map: Uint8Array, version: number): number {
  let sum = 0
  for (const byte of map) sum += version === BATMAP_SIGNED && byte >= 128 ? byte - 256 : byte
  return ~sum >>> 0
}

/** Ones' complement of the sum of the bytes, the 4 at `fieldAt` taken as zero. */
export function checksumOf(bytes: Uint8Array, fieldAt: number): number {
  let sum = 0
  for (let i = 0; i < bytes.length; i++) if (i < fieldAt || i >= fieldAt + 4) sum += bytes[i]!
  return ~sum >>> 0
}

export function uuidBytes(uuid: string): Uint8Array {
  return Uint8Array.from(Buffer.from(uuid.replaceAll('-', ''), 'hex'))
}

function badHeader(field: string, found: string | number, expected: string | number): VarveError {
  return new VarveError(
    'CORRUPT',
    `Cannot read VHD dynamic header: found ${field} ${found}, expected ${expected}`,
    {
      fields: { field },
    },
  )
}
