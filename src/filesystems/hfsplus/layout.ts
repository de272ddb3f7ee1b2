/**
 * HFS+ and HFSX on disk: Apple Technical Note TN1150. Big-endian. Layout only; docs/formats/hfsplus.md.
 */
import { Bytes } from '../../base/index.ts'

export const HEADER_AT = 1024
export const HEADER_BYTES = 512
const SIGNATURES: Readonly<Record<string, number>> = { 'H+': 4, HX: 5 }
const ATTRIBUTE_UNMOUNTED = 0x100
const ATTRIBUTE_INCONSISTENT = 0x800
const ATTRIBUTE_JOURNALED = 0x2000
const FORK_AT = 112
const FORK_EXTENTS = 8

export interface Extent {
  readonly start: number
  readonly blocks: number
}

export interface VolumeHeader {
  readonly unmounted: boolean
  readonly inconsistent: boolean
  /** Block of the journal info, when the volume is journaled. */
  readonly journalInfoBlock: number | undefined
  readonly blockBytes: number
  readonly totalBlocks: number
  readonly freeBlocks: number
  readonly uuid: string | undefined
  /** The allocation file's first extents; empty ones left out. */
  readonly allocation: readonly Extent[]
  readonly allocationBytes: bigint
}

export function looksLikeHfsPlus(header: Uint8Array): boolean {
  const bytes = new Bytes(header, 'big', 'HFS+ volume header')
  return SIGNATURES[bytes.text(0, 2)] === bytes.u16(2)
}

export function decodeVolumeHeader(header: Uint8Array): VolumeHeader {
  const bytes = new Bytes(header, 'big', 'HFS+ volume header')
  const attributes = bytes.u32(4)
  const allocation: Extent[] = []
  for (let i = 0; i < FORK_EXTENTS; i++) {
    const at = FORK_AT + 16 + i * 8
    const blocks = bytes.u32(at + 4)
    if (blocks > 0) allocation.push({ start: bytes.u32(at), blocks })
  }
  const id = Buffer.from(bytes.sub(104, 8)).toString('hex')
  return {
    unmounted: (attributes & ATTRIBUTE_UNMOUNTED) !== 0,
    inconsistent: (attributes & ATTRIBUTE_INCONSISTENT) !== 0,
    journalInfoBlock: (attributes & ATTRIBUTE_JOURNALED) === 0 ? undefined : bytes.u32(12),
    blockBytes: bytes.u32(40),
    totalBlocks: bytes.u32(44),
    freeBlocks: bytes.u32(48),
    uuid: /^0+$/.test(id) ? undefined : id,
    allocation,
    allocationBytes: bytes.u64(FORK_AT),
  }
}

export const JOURNAL_INFO_BYTES = 52
export const JOURNAL_HEADER_BYTES = 44
const JOURNAL_IN_VOLUME = 1
const JOURNAL_NEEDS_INIT = 4
const JOURNAL_MAGIC = 0x4a4e4c78
const JOURNAL_ENDIAN = 0x12345678

/** Where the journal starts, bytes of the volume; undefined: it was never used. A string says what is wrong. */
export function decodeJournalInfo(info: Uint8Array): { readonly at: bigint | undefined } | string {
  const bytes = new Bytes(info, 'big', 'HFS+ journal info')
  const flags = bytes.u32(0)
  if ((flags & JOURNAL_IN_VOLUME) === 0) return 'a journal on another device'
  return { at: flags & JOURNAL_NEEDS_INIT ? undefined : bytes.u64(36) }
}

/** True when nothing waits in the journal; a string says what is wrong. The journal has its writer's byte order. */
export function isJournalEmpty(header: Uint8Array): boolean | string {
  for (const endian of ['big', 'little'] as const) {
    const bytes = new Bytes(header, endian, 'HFS+ journal header')
    if (bytes.u32(0) !== JOURNAL_MAGIC || bytes.u32(4) !== JOURNAL_ENDIAN) continue
    return bytes.u64(8) === bytes.u64(16)
  }
  return 'no journal header'
}
