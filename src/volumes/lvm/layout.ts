/**
 * LVM2 on disk: the label, the physical volume header, the metadata area with its circular text. Little-endian.
 * Decoding only, no I/O. docs/formats/lvm.md has the byte tables.
 */
import { Bytes, NotTrusted, rawCrc32, within } from '../../base/index.ts'

export const SECTOR = 512
/** The label stands in one of the first four sectors. */
export const LABEL_SECTORS = 4
const LABEL_ID = 'LABELONE'
const LABEL_TYPE = 'LVM2 001'
const MDA_MAGIC = ' LVM2 x[5A%r0N*>'
export const MDA_HEADER_BYTES = 512

/** The seed of all LVM2 checksums. */
const CRC_SEED = 0xf597a6cf

export interface PvHeader {
  /** 32 characters, without the dashes of the text form. */
  readonly uuid: string
  readonly deviceBytes: number
  /** Offset and size in bytes; size 0 means to the end of the device. */
  readonly dataAreas: readonly Area[]
  readonly metadataAreas: readonly Area[]
}

export interface Area {
  readonly offset: number
  readonly size: number
}

export function isLabel(sector: Uint8Array): boolean {
  const view = new Bytes(sector, 'little')
  return view.text(0, 8) === LABEL_ID && view.text(24, 8) === LABEL_TYPE
}

/** The header of a physical volume out of the sector with its label. @throws NotTrusted */
export function decodeLabel(sector: Uint8Array, number: number): PvHeader {
  const view = new Bytes(sector, 'little', 'LVM label')
  const invalid = (why: string): NotTrusted =>
    new NotTrusted('lvm-label-invalid', `Cannot use LVM label: ${why}`, { kind: 'lvm2' })
  if (view.size64(8, 'sector') !== number)
    throw invalid(`found the label of sector ${view.u64(8)} in sector ${number}`)
  if (view.u32(16) !== lvmCrc(view.sub(20, SECTOR - 20))) throw invalid('found a wrong checksum')
  let at = view.u32(20)
  if (at < 32 || at > SECTOR - 40) throw invalid(`found its content at ${at}`)
  const uuid = view.text(at, 32)
  const deviceBytes = view.size64(at + 32, 'device size')
  at += 40
  const areas = (): Area[] => {
    const list: Area[] = []
    for (;;) {
      const area = { offset: view.size64(at, 'area'), size: view.size64(at + 8, 'area size') }
      at += 16
      if (area.offset === 0) return list
      list.push(area)
    }
  }
  return { uuid, deviceBytes, dataAreas: areas(), metadataAreas: areas() }
}

export interface TextLocation {
  /** Inside the metadata area. */
  readonly offset: number
  readonly size: number
  readonly crc: number
  readonly ignored: boolean
}

/** Where the committed text of a metadata area is; undefined when the area holds none. @throws NotTrusted */
export function decodeMdaHeader(bytes: Uint8Array, area: Area): TextLocation | undefined {
  const view = new Bytes(bytes, 'little', 'LVM metadata area')
  const invalid = (why: string): NotTrusted =>
    new NotTrusted('lvm-mda-invalid', `Cannot use LVM metadata area: ${why}`, { kind: 'lvm2' })
  if (view.text(4, 16) !== MDA_MAGIC) throw invalid('found no magic')
  if (view.u32(0) !== lvmCrc(view.sub(4, MDA_HEADER_BYTES - 4))) throw invalid('found a wrong checksum')
  if (view.u32(20) !== 1) throw invalid(`found version ${view.u32(20)}`)
  if (view.size64(24, 'start') !== area.offset) throw invalid('found the header of another area')
  const size = view.size64(32, 'size')
  const location = {
    offset: view.size64(40, 'text'),
    size: view.size64(48, 'text size'),
    crc: view.u32(56),
    ignored: (view.u32(60) & 1) !== 0,
  }
  if (location.offset === 0) return undefined
  const fits =
    location.offset >= MDA_HEADER_BYTES && location.offset < size && location.size <= size - MDA_HEADER_BYTES
  if (!fits) throw invalid(`found text at ${location.offset}+${location.size} of ${size} bytes`)
  within(location.size, 64 * 2 ** 20, 'bytes of LVM metadata')
  return location
}

/** CRC-32 as LVM2 computes it: its own seed, no final inversion. */
export function lvmCrc(bytes: Uint8Array): number {
  return rawCrc32(bytes, CRC_SEED)
}

/** The 32 characters of a UUID out of its text form with dashes. */
export function plainUuid(text: string): string {
  return text.replaceAll('-', '')
}
