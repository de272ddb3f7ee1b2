/**
 * The boot record of DOS disks: sector 0 (MBR) and, in the same shape, the first sector of each logical partition's
 * part of an extended partition (EBR). Shared by `mbr`, which follows it, and `gpt`, which wears one for protection.
 * Layout only; see docs/formats/mbr.md.
 */
import { Bytes } from '../base/index.ts'

/** Length of the record itself; on disks with 4096-byte sectors the rest of sector 0 is unused. */
export const BOOT_RECORD_BYTES = 512
const SIGNATURE_AT = 510
const SIGNATURE = 0xaa55
const DISK_SIGNATURE_AT = 440
const SLOTS_AT = 446
const SLOT_BYTES = 16

export const TYPE_PROTECTIVE = 0xee
export const TYPE_LDM = 0x42
const TYPES_EXTENDED: ReadonlySet<number> = new Set([0x05, 0x0f, 0x85])

export interface Slot {
  /** 0..3 */
  readonly index: number
  /** 0x80 active, 0 not; anything else is no partition slot. */
  readonly status: number
  readonly type: number
  /** In sectors. */
  readonly firstSector: number
  /** In sectors; 0 = the slot is empty, whatever its type says (as Linux reads it). */
  readonly sectors: number
}

export interface BootRecord {
  /** As eight hex digits, the way Linux prints it. */
  readonly diskSignature: string
  readonly slots: readonly Slot[]
}

/** The four slots, or undefined when the bytes do not end in 55 AA or cannot be a partition table. */
export function decodeBootRecord(sector: Uint8Array): BootRecord | undefined {
  const bytes = new Bytes(sector, 'little', 'boot record')
  if (bytes.u16(SIGNATURE_AT) !== SIGNATURE) return undefined
  const slots = [0, 1, 2, 3].map((index): Slot => {
    const at = SLOTS_AT + index * SLOT_BYTES
    return {
      index,
      status: bytes.u8(at),
      type: bytes.u8(at + 4),
      firstSector: bytes.u32(at + 8),
      sectors: bytes.u32(at + 12),
    }
  })
  // A boot sector of a file system has code or text here; the guest's kernel decides by the status bytes too.
  if (slots.some(({ status }) => status !== 0 && status !== 0x80)) return undefined
  return { diskSignature: bytes.u32(DISK_SIGNATURE_AT).toString(16).padStart(8, '0'), slots }
}

export function isExtended(slot: Slot): boolean {
  return TYPES_EXTENDED.has(slot.type)
}

export function isUsed(slot: Slot): boolean {
  return slot.sectors !== 0
}
