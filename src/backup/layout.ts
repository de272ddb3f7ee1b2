/**
 * The bytes of a repository: packs, map pages, manifests. Constants, encode and decode; no I/O, no keys.
 * Described in docs/formats/repository.md; all integers are little-endian.
 *
 * Rule: every count and length is checked against the buffer before it is used, and unknown versions, features,
 * kinds and methods are refused (UNSUPPORTED): a reader never guesses.
 */
import { Bytes, crc32, VarveError, within } from '../base/index.ts'
import { RangeSet, RangeSetBuilder } from '../extents/index.ts'

export const FORMAT_VERSION = 1
/** Bits of `required features` that this program knows, in packs and manifests. */
const KNOWN_FEATURES = 0

export const ID_BYTES = 32
export const NAME_BYTES = 16
/** Stored bytes under one CRC of a pack. */
export const CRC_SPAN = 1_048_576
export const SECTOR = 512

export type PackKind = 'data' | 'metadata'
export type Sealing = 'none' | 'aes-256-gcm'

const KINDS: Readonly<Record<PackKind, number>> = { data: 1, metadata: 2 }
const SEALINGS: Readonly<Record<Sealing, number>> = { none: 0, 'aes-256-gcm': 1 }

// ---------------------------------------------------------------- frames

/** How the bytes of a frame are stored. A frame of zeros is stored as nothing. */
export const METHOD: { readonly zeros: 0; readonly raw: 1; readonly zstd: 2 } = { zeros: 0, raw: 1, zstd: 2 }
const LENGTH_BITS = 22
/** Most bytes that a frame can take in a pack, its check or tag included. */
export const MOST_STORED = 4_194_303
export const DESCRIPTOR_BYTES = 3

/** A frame in 24 bits: bits 0-21 stored length, bits 22-23 method. */
export function frameDescriptor(method: number, storedLength: number): number {
  return (method << LENGTH_BITS) | storedLength
}
export function storedLengthOf(descriptor: number): number {
  return descriptor & MOST_STORED
}
export function methodOf(descriptor: number): number {
  return descriptor >>> LENGTH_BITS
}

function getDescriptor(bytes: Uint8Array, at: number): number {
  return bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16)
}
function setDescriptor(bytes: Uint8Array, at: number, descriptor: number): void {
  bytes[at] = descriptor & 0xff
  bytes[at + 1] = (descriptor >>> 8) & 0xff
  bytes[at + 2] = descriptor >>> 16
}

/** What a frame carries behind its payload: the tag of AES-GCM, or a CRC-32 of the payload. */
export function frameOverhead(sealing: Sealing): number {
  return sealing === 'none' ? 4 : 16
}

// ---------------------------------------------------------------- packs

const PACK_MAGIC = 'VRVPACK\0'
export const PACK_HEADER_BYTES = 64

export interface PackIdentity {
  readonly kind: PackKind
  readonly sealing: Sealing
  readonly repository: Uint8Array
  /** 128 random bits; in hex it is the object's name. */
  readonly name: Uint8Array
}

/** `magic 8, version 2, kind 1, sealing 1, required features 4, repository 16, name 16, 0 12, crc32 4`. */
export function encodePackHeader(pack: PackIdentity): Uint8Array {
  const out = new Bytes(new Uint8Array(PACK_HEADER_BYTES), 'little', 'pack header')
  out.setText(0, PACK_MAGIC)
  encodeIdentity(out, pack)
  out.setU32(60, crc32(out.sub(0, 60)))
  return out.bytes
}

export function decodePackHeader(bytes: Uint8Array, what: string): PackIdentity {
  const b = new Bytes(bytes, 'little', what)
  if (b.text(0, 8) !== PACK_MAGIC) throw corrupt(what, 'no pack header')
  if (b.u32(60) !== crc32(b.sub(0, 60))) throw corrupt(what, 'a wrong checksum of the header')
  return decodeIdentity(b, what)
}

function encodeIdentity(out: Bytes, pack: PackIdentity): void {
  out.setU16(8, FORMAT_VERSION)
  out.setU8(10, KINDS[pack.kind])
  out.setU8(11, SEALINGS[pack.sealing])
  out.setU32(12, 0)
  out.set(16, pack.repository)
  out.set(32, pack.name)
}

function decodeIdentity(b: Bytes, what: string): PackIdentity {
  checkVersion(b, what)
  const kind = (Object.keys(KINDS) as PackKind[]).find((name) => KINDS[name] === b.u8(10))
  if (!kind) throw unsupported(what, `pack kind ${b.u8(10)}`)
  return { kind, sealing: sealingOf(b.u8(11), what), repository: b.sub(16, 16), name: b.sub(32, 16) }
}

function checkVersion(b: Bytes, what: string): void {
  if (b.u16(8) !== FORMAT_VERSION) throw unsupported(what, `version ${b.u16(8)}`)
  const unknown = b.u32(12) & ~KNOWN_FEATURES
  if (unknown !== 0) throw unsupported(what, `required features 0x${(unknown >>> 0).toString(16)}`)
}

function sealingOf(code: number, what: string): Sealing {
  const sealing = (Object.keys(SEALINGS) as Sealing[]).find((name) => SEALINGS[name] === code)
  if (!sealing) throw unsupported(what, `sealing ${code}`)
  return sealing
}

/** One chunk or map page in a pack. */
export interface PackObject {
  readonly id: Uint8Array
  /** Of its first frame, from the start of the pack. */
  readonly offset: number
  /** Length of its content. */
  readonly plainLength: number
  readonly frames: readonly number[]
}

/** Stored bytes of all frames together; they stand one behind the other. */
export function storedBytes(frames: readonly number[]): number {
  let total = 0
  for (const frame of frames) total += storedLengthOf(frame)
  return total
}

const OBJECT_FIXED_BYTES = ID_BYTES + 4 + 4 + 1
const MOST_FRAMES = 64

/** Per object: `id 32, offset 4, plain length 4, frames 1`, then 3 bytes a frame. */
export function encodeDirectory(objects: readonly PackObject[]): Uint8Array {
  let length = 0
  for (const object of objects) length += OBJECT_FIXED_BYTES + object.frames.length * DESCRIPTOR_BYTES
  const out = new Bytes(new Uint8Array(length), 'little', 'pack directory')
  let at = 0
  for (const object of objects) {
    out.set(at, object.id)
    out.setU32(at + 32, object.offset)
    out.setU32(at + 36, object.plainLength)
    out.setU8(at + 40, object.frames.length)
    at += OBJECT_FIXED_BYTES
    for (const frame of object.frames) {
      setDescriptor(out.bytes, at, frame)
      at += DESCRIPTOR_BYTES
    }
  }
  return out.bytes
}

/** `end`: where the frames end; every object must lie before it. */
export function decodeDirectory(
  bytes: Uint8Array,
  count: number,
  end: number,
  what: string,
): readonly PackObject[] {
  const b = new Bytes(bytes, 'little', what)
  within(count, Math.floor(bytes.length / OBJECT_FIXED_BYTES), `${what}: objects`)
  const objects: PackObject[] = []
  let at = 0
  let previousEnd = PACK_HEADER_BYTES
  for (let i = 0; i < count; i++) {
    const id = b.sub(at, ID_BYTES)
    const offset = b.u32(at + 32)
    const plainLength = b.u32(at + 36)
    const frameCount = within(b.u8(at + 40), MOST_FRAMES, `${what}: frames`)
    at += OBJECT_FIXED_BYTES
    b.sub(at, frameCount * DESCRIPTOR_BYTES)
    const frames: number[] = []
    for (let f = 0; f < frameCount; f++, at += DESCRIPTOR_BYTES) frames.push(getDescriptor(bytes, at))
    if (offset < previousEnd || offset + storedBytes(frames) > end)
      throw corrupt(what, `an object at ${offset} outside its place`)
    previousEnd = offset + storedBytes(frames)
    objects.push({ id, offset, plainLength, frames })
  }
  if (at !== bytes.length) throw corrupt(what, `${bytes.length - at} bytes behind the last object`)
  return objects
}

const TRAILER_MAGIC = 'VRVTRLR\0'
export const PACK_FOOTER_BYTES = 128
/** Part of the footer that its MAC covers. */
export const FOOTER_MAC_AT = 92

export interface PackFooter extends PackIdentity {
  readonly fileLength: number
  readonly directoryOffset: number
  /** As stored: with the tag, when sealed. */
  readonly directoryStored: number
  readonly directoryPlain: number
  readonly objects: number
  /** One CRC-32 for each MiB of `[0, directoryOffset + directoryStored)`. */
  readonly crcCount: number
  readonly crcOfCrcs: number
}

/** The footer without MAC and checksum; `finishPackFooter` sets those. */
export function encodePackFooter(footer: PackFooter): Uint8Array {
  const out = new Bytes(new Uint8Array(PACK_FOOTER_BYTES), 'little', 'pack footer')
  out.setText(0, TRAILER_MAGIC)
  encodeIdentity(out, footer)
  out.setU64(48, footer.fileLength)
  out.setU64(56, footer.directoryOffset)
  out.setU32(64, footer.directoryStored)
  out.setU32(68, footer.directoryPlain)
  out.setU32(72, footer.objects)
  out.setU32(76, footer.crcCount)
  out.setU32(80, footer.crcOfCrcs)
  return out.bytes
}

export function finishPackFooter(bytes: Uint8Array, mac: Uint8Array): void {
  const out = new Bytes(bytes, 'little', 'pack footer')
  out.set(FOOTER_MAC_AT, mac)
  out.setU32(124, crc32(out.sub(0, 124)))
}

export function decodePackFooter(bytes: Uint8Array, fileLength: number, what: string): PackFooter {
  const b = new Bytes(bytes, 'little', what)
  if (b.text(0, 8) !== TRAILER_MAGIC) throw corrupt(what, 'no pack trailer at its end')
  if (b.u32(124) !== crc32(b.sub(0, 124))) throw corrupt(what, 'a wrong checksum of the trailer')
  const footer: PackFooter = {
    ...decodeIdentity(b, what),
    fileLength: b.size64(48, 'file length'),
    directoryOffset: b.size64(56, 'directory offset'),
    directoryStored: b.u32(64),
    directoryPlain: b.u32(68),
    objects: b.u32(72),
    crcCount: b.u32(76),
    crcOfCrcs: b.u32(80),
  }
  const directoryEnd = footer.directoryOffset + footer.directoryStored
  if (
    footer.fileLength !== fileLength ||
    footer.directoryOffset < PACK_HEADER_BYTES ||
    footer.crcCount !== Math.ceil(directoryEnd / CRC_SPAN) ||
    directoryEnd + footer.crcCount * 4 + PACK_FOOTER_BYTES !== fileLength
  ) {
    throw corrupt(what, `${fileLength} bytes that the trailer does not account for`)
  }
  return footer
}

export function encodeCrcs(crcs: readonly number[]): Uint8Array {
  const out = new Bytes(new Uint8Array(crcs.length * 4), 'little', 'pack checksums')
  crcs.forEach((crc, i) => {
    out.setU32(i * 4, crc)
  })
  return out.bytes
}

// ---------------------------------------------------------------- map pages

/** Chunks of one page. */
export const PAGE_ENTRIES = 1024
const PAGE_MAGIC = 'VRVM'
const PAGE_HEADER_BYTES = 32
/** Content of the largest page that is believed: 1024 entries of 64 frames and the worst in-use map fit. */
export const MOST_PAGE_BYTES = 16_777_216

export const ENTRY: { readonly zeros: 0; readonly chunk: 1 } = { zeros: 0, chunk: 1 }

/** Where a chunk of the disk stands. `undefined` in a page: zeros, or not in use. */
export interface ChunkEntry {
  readonly id: Uint8Array
  /** Name of the pack, in hex. */
  readonly pack: string
  readonly offset: number
  readonly frames: readonly number[]
}

export interface PageContent {
  readonly entries: readonly (ChunkEntry | undefined)[]
  /** What was in use, in bytes from the start of the page, multiples of a sector. */
  readonly inUse: RangeSet
}

/**
 * `magic 4, version 2, entries 2, packs 2, stored entries 2, frames per chunk 1, 0 3, in-use ranges 4, in-use bytes 4,
 * 0 8`; a kind byte for each entry; pack names 16 each; for each stored entry `id 32, pack ordinal 2, offset 4,
 * 3 bytes a frame`; then the in-use ranges as pairs of varints (sectors since the last end, sectors). The pack table
 * is in the order of first use, so equal content has equal bytes.
 */
export function encodePage(page: PageContent, framesPerChunk: number): Uint8Array {
  const packs = new Map<string, number>()
  let stored = 0
  for (const entry of page.entries) {
    if (!entry) continue
    stored++
    if (!packs.has(entry.pack)) packs.set(entry.pack, packs.size)
  }
  const inUse = encodeRanges(page.inUse)
  const entryBytes = ID_BYTES + 2 + 4 + framesPerChunk * DESCRIPTOR_BYTES
  const kindsAt = PAGE_HEADER_BYTES
  const packsAt = kindsAt + page.entries.length
  const storedAt = packsAt + packs.size * NAME_BYTES
  const inUseAt = storedAt + stored * entryBytes
  const out = new Bytes(new Uint8Array(inUseAt + inUse.length), 'little', 'map page')
  out.setText(0, PAGE_MAGIC)
  out.setU16(4, FORMAT_VERSION)
  out.setU16(6, page.entries.length)
  out.setU16(8, packs.size)
  out.setU16(10, stored)
  out.setU8(12, framesPerChunk)
  out.setU32(16, page.inUse.count)
  out.setU32(20, inUse.length)
  let at = packsAt
  for (const name of packs.keys()) {
    out.set(at, Buffer.from(name, 'hex'))
    at += NAME_BYTES
  }
  page.entries.forEach((entry, i) => {
    if (!entry) return
    out.setU8(kindsAt + i, ENTRY.chunk)
    out.set(at, entry.id)
    out.setU16(at + 32, packs.get(entry.pack)!)
    out.setU32(at + 34, entry.offset)
    entry.frames.forEach((frame, f) => {
      setDescriptor(out.bytes, at + 38 + f * DESCRIPTOR_BYTES, frame)
    })
    at += entryBytes
  })
  out.set(inUseAt, inUse)
  return out.bytes
}

/** A page, decoded as far as needed: entries are decoded when they are asked for. */
export class MapPage {
  /** Number of chunks that the page covers. */
  readonly count: number
  /** Pack names in hex, in the order of first use. */
  readonly packs: readonly string[]
  readonly #bytes: Uint8Array
  readonly #storedAt: number
  readonly #entryBytes: number
  readonly #frames: number
  /** Number of stored entries before entry i, and one more at the end. */
  readonly #rank: Uint16Array
  readonly #inUse: Uint8Array
  readonly #inUseCount: number
  readonly #what: string

  constructor(bytes: Uint8Array, expected: { framesPerChunk: number; entries: number }, what: string) {
    const b = new Bytes(bytes, 'little', what)
    if (b.text(0, 4) !== PAGE_MAGIC) throw corrupt(what, 'no map page')
    if (b.u16(4) !== FORMAT_VERSION) throw unsupported(what, `version ${b.u16(4)}`)
    this.count = b.u16(6)
    const packCount = b.u16(8)
    const stored = b.u16(10)
    this.#frames = b.u8(12)
    if (b.u8(13) !== 0) throw unsupported(what, `flags 0x${b.u8(13).toString(16)}`)
    this.#inUseCount = b.u32(16)
    const inUseBytes = b.u32(20)
    if (this.count !== expected.entries || this.#frames !== expected.framesPerChunk)
      throw corrupt(what, `${this.count} entries of ${this.#frames} frames`)
    this.#entryBytes = ID_BYTES + 2 + 4 + this.#frames * DESCRIPTOR_BYTES
    const packsAt = PAGE_HEADER_BYTES + this.count
    this.#storedAt = packsAt + packCount * NAME_BYTES
    const inUseAt = this.#storedAt + stored * this.#entryBytes
    if (inUseAt + inUseBytes !== bytes.length) throw corrupt(what, `${bytes.length} bytes`)
    this.#rank = new Uint16Array(this.count + 1)
    let rank = 0
    for (let i = 0; i < this.count; i++) {
      this.#rank[i] = rank
      const kind = b.u8(PAGE_HEADER_BYTES + i)
      if (kind === ENTRY.chunk) rank++
      else if (kind !== ENTRY.zeros) throw unsupported(what, `an entry of kind ${kind}`)
    }
    this.#rank[this.count] = rank
    if (rank !== stored) throw corrupt(what, `${rank} stored entries, ${stored} announced`)
    const packs: string[] = []
    for (let p = 0; p < packCount; p++)
      packs.push(Buffer.from(b.sub(packsAt + p * NAME_BYTES, NAME_BYTES)).toString('hex'))
    this.packs = packs
    this.#bytes = bytes
    this.#inUse = b.sub(inUseAt, inUseBytes)
    this.#what = what
  }

  isStored(index: number): boolean {
    return this.#rank[index + 1]! > this.#rank[index]!
  }

  entry(index: number): ChunkEntry | undefined {
    if (!this.isStored(index)) return undefined
    const at = this.#storedAt + this.#rank[index]! * this.#entryBytes
    const b = new Bytes(this.#bytes, 'little', this.#what)
    const pack = this.packs[b.u16(at + 32)]
    if (pack === undefined) throw corrupt(this.#what, `pack ${b.u16(at + 32)} of ${this.packs.length}`)
    const frames: number[] = []
    for (let f = 0; f < this.#frames; f++)
      frames.push(getDescriptor(this.#bytes, at + 38 + f * DESCRIPTOR_BYTES))
    return { id: b.sub(at, ID_BYTES), pack, offset: b.u32(at + 34), frames }
  }

  /** What was in use, in bytes from the start of the page. */
  inUse(): RangeSet {
    return decodeRanges(this.#inUse, this.#inUseCount, this.#what)
  }

  /** Bytes that this page keeps in memory. */
  get heldBytes(): number {
    return this.#bytes.length + this.#rank.byteLength
  }
}

function encodeRanges(ranges: RangeSet): Uint8Array {
  let out = new Uint8Array(64 + ranges.count * 4)
  let n = 0
  const varint = (value: number): void => {
    if (n + 10 > out.length) {
      const larger = new Uint8Array(out.length * 2)
      larger.set(out)
      out = larger
    }
    let rest = value
    while (rest >= 0x80) {
      out[n++] = (rest % 0x80) | 0x80
      rest = Math.floor(rest / 0x80)
    }
    out[n++] = rest
  }
  let last = 0
  for (let i = 0; i < ranges.count; i++) {
    const start = ranges.startAt(i) / SECTOR
    const end = ranges.endAt(i) / SECTOR
    varint(start - last)
    varint(end - start)
    last = end
  }
  return out.slice(0, n)
}

function decodeRanges(bytes: Uint8Array, count: number, what: string): RangeSet {
  const builder = new RangeSetBuilder()
  let at = 0
  const varint = (): number => {
    let value = 0
    for (let factor = 1; factor <= 2 ** 42; factor *= 0x80) {
      const byte = bytes[at++]
      if (byte === undefined) throw corrupt(what, 'an in-use map that ends too soon')
      value += (byte & 0x7f) * factor
      if (byte < 0x80) return value
    }
    throw corrupt(what, 'a number above 2^49 in the in-use map')
  }
  let last = 0
  for (let i = 0; i < count; i++) {
    const start = last + varint()
    last = start + varint()
    if (!(last <= Number.MAX_SAFE_INTEGER / SECTOR)) throw corrupt(what, 'an in-use range past 2^53')
    builder.add(start * SECTOR, last * SECTOR)
  }
  if (at !== bytes.length) throw corrupt(what, 'bytes behind the in-use map')
  return builder.build()
}

// ---------------------------------------------------------------- manifests

const MANIFEST_MAGIC = 'VRVPOINT'
export const MANIFEST_HEADER_BYTES = 96
export const MOST_FACTS_BYTES = 67_108_864
export const MOST_TABLE_BYTES = 1_073_741_824

export interface ManifestHeader {
  readonly sealing: Sealing
  readonly repository: Uint8Array
  readonly point: Uint8Array
  /** Random, so that no two manifests share a key even when a point is written again. */
  readonly salt: Uint8Array
  /** As stored: with the tag, when sealed; without the MAC behind it. */
  readonly factsStored: number
  readonly tableStored: number
}

/**
 * `magic 8, version 2, sealing 1, 0 1, required features 4, repository 16, point 16, salt 32, facts length 4,
 * table length 4, 0 4, crc32 4`; facts, MAC 32, table, MAC 32, crc32 of all before 4.
 */
export function encodeManifestHeader(header: ManifestHeader): Uint8Array {
  const out = new Bytes(new Uint8Array(MANIFEST_HEADER_BYTES), 'little', 'manifest header')
  out.setText(0, MANIFEST_MAGIC)
  out.setU16(8, FORMAT_VERSION)
  out.setU8(10, SEALINGS[header.sealing])
  out.setU32(12, 0)
  out.set(16, header.repository)
  out.set(32, header.point)
  out.set(48, header.salt)
  out.setU32(80, header.factsStored)
  out.setU32(84, header.tableStored)
  out.setU32(92, crc32(out.sub(0, 92)))
  return out.bytes
}

export function decodeManifestHeader(bytes: Uint8Array, what: string): ManifestHeader {
  const b = new Bytes(bytes, 'little', what)
  if (b.text(0, 8) !== MANIFEST_MAGIC) throw corrupt(what, 'no manifest')
  if (b.u32(92) !== crc32(b.sub(0, 92))) throw corrupt(what, 'a wrong checksum of the header')
  checkVersion(b, what)
  return {
    sealing: sealingOf(b.u8(10), what),
    repository: b.sub(16, 16),
    point: b.sub(32, 16),
    salt: b.sub(48, 32),
    factsStored: b.u32(80),
    tableStored: b.u32(84),
  }
}

/** A stored map page, as a manifest names it. */
export interface PageReference {
  readonly id: Uint8Array
  /** Metadata pack, in hex. */
  readonly pack: string
  readonly offset: number
  readonly frame: number
  readonly plainLength: number
  /** Data packs that the page refers to, in hex: marking for removal reads manifests alone. */
  readonly dataPacks: readonly string[]
}

const TABLE_MAGIC = 'VRVT'
const TABLE_HEADER_BYTES = 16
const PAGE_REFERENCE_BYTES = 1 + ID_BYTES + 4 + 4 + 4 + 4 + 4

/**
 * `magic 4, pages 4, metadata packs 4, data packs 4`, the names 16 each, then for each page a kind byte (0: all zeros
 * and nothing in use) and, for kind 1, `id 32, metadata pack ordinal 4, offset 4, frame 4, plain length 4, data packs 4`
 * and the ordinals of those, 4 each.
 */
export function encodeTable(pages: readonly (PageReference | undefined)[]): Uint8Array {
  const metadata = new Map<string, number>()
  const data = new Map<string, number>()
  const note = (table: Map<string, number>, name: string): void => {
    if (!table.has(name)) table.set(name, table.size)
  }
  let length = TABLE_HEADER_BYTES
  for (const page of pages) {
    length += 1
    if (!page) continue
    note(metadata, page.pack)
    for (const pack of page.dataPacks) note(data, pack)
    length += PAGE_REFERENCE_BYTES - 1 + page.dataPacks.length * 4
  }
  length += (metadata.size + data.size) * NAME_BYTES
  const out = new Bytes(new Uint8Array(length), 'little', 'page table')
  out.setText(0, TABLE_MAGIC)
  out.setU32(4, pages.length)
  out.setU32(8, metadata.size)
  out.setU32(12, data.size)
  let at = TABLE_HEADER_BYTES
  for (const name of [...metadata.keys(), ...data.keys()]) {
    out.set(at, Buffer.from(name, 'hex'))
    at += NAME_BYTES
  }
  for (const page of pages) {
    if (!page) {
      out.setU8(at++, ENTRY.zeros)
      continue
    }
    out.setU8(at, ENTRY.chunk)
    out.set(at + 1, page.id)
    out.setU32(at + 33, metadata.get(page.pack)!)
    out.setU32(at + 37, page.offset)
    out.setU32(at + 41, page.frame)
    out.setU32(at + 45, page.plainLength)
    out.setU32(at + 49, page.dataPacks.length)
    at += PAGE_REFERENCE_BYTES
    for (const pack of page.dataPacks) {
      out.setU32(at, data.get(pack)!)
      at += 4
    }
  }
  return out.bytes
}

export function decodeTable(
  bytes: Uint8Array,
  pageCount: number,
  what: string,
): (PageReference | undefined)[] {
  const b = new Bytes(bytes, 'little', what)
  if (b.text(0, 4) !== TABLE_MAGIC) throw corrupt(what, 'no page table')
  if (b.u32(4) !== pageCount) throw corrupt(what, `${b.u32(4)} pages for a disk of ${pageCount}`)
  const names = (count: number, from: number): string[] => {
    b.sub(from, count * NAME_BYTES)
    return Array.from({ length: count }, (_, i) =>
      Buffer.from(b.sub(from + i * NAME_BYTES, NAME_BYTES)).toString('hex'),
    )
  }
  const metadata = names(b.u32(8), TABLE_HEADER_BYTES)
  const data = names(b.u32(12), TABLE_HEADER_BYTES + metadata.length * NAME_BYTES)
  let at = TABLE_HEADER_BYTES + (metadata.length + data.length) * NAME_BYTES
  const pages: (PageReference | undefined)[] = []
  for (let i = 0; i < pageCount; i++) {
    const kind = b.u8(at)
    if (kind === ENTRY.zeros) {
      pages.push(undefined)
      at++
      continue
    }
    if (kind !== ENTRY.chunk) throw unsupported(what, `a page of kind ${kind}`)
    const pack = metadata[b.u32(at + 33)]
    if (pack === undefined) throw corrupt(what, `metadata pack ${b.u32(at + 33)} of ${metadata.length}`)
    const count = b.u32(at + 49)
    const ordinals = new Bytes(b.sub(at + PAGE_REFERENCE_BYTES, count * 4), 'little', what)
    const dataPacks: string[] = []
    for (let p = 0; p < count; p++) {
      const name = data[ordinals.u32(p * 4)]
      if (name === undefined) throw corrupt(what, `data pack ${ordinals.u32(p * 4)} of ${data.length}`)
      dataPacks.push(name)
    }
    pages.push({
      id: b.sub(at + 1, ID_BYTES),
      pack,
      offset: b.u32(at + 37),
      frame: b.u32(at + 41),
      plainLength: within(b.u32(at + 45), MOST_PAGE_BYTES, `${what}: page length`),
      dataPacks,
    })
    at += PAGE_REFERENCE_BYTES + count * 4
  }
  if (at !== bytes.length) throw corrupt(what, `${bytes.length - at} bytes behind the last page`)
  return pages
}

// ---------------------------------------------------------------- names

export function packPath(kind: PackKind, name: string): string {
  return `${kind === 'data' ? 'packs' : 'meta'}/${name.slice(0, 2)}/${name}`
}

export function corrupt(what: string, found: string): VarveError {
  return new VarveError('CORRUPT', `Cannot read ${what}: found ${found}`, { fields: { object: what } })
}

function unsupported(what: string, found: string): VarveError {
  return new VarveError(
    'UNSUPPORTED',
    `Cannot read ${what}: found ${found}, which this version does not know`,
    {
      fields: { object: what },
      hint: 'A newer varve wrote it; use that version.',
    },
  )
}
