/**
 * VHDX files by recipe: differencing disks, 4096-byte sectors and logs, which qemu-img does not make. Written from the
 * specification alone and sharing nothing with the reader.
 */
import { crc32c } from '../../src/base/index.ts'
import { patternAt } from './index.ts'

const KIB = 1024
const MIB = 1024 * KIB
export const LOG_GUID: string = '11223344-5566-7788-99AA-BBCCDDEEFF00'
export const WRITE_GUID: string = '01234567-89AB-CDEF-0123-456789ABCDEF'

function guid(text: string): Buffer {
  const raw = Buffer.from(text.replaceAll('-', ''), 'hex')
  raw.subarray(0, 4).reverse()
  raw.subarray(4, 6).reverse()
  raw.subarray(6, 8).reverse()
  return raw
}

export function sum(bytes: Buffer, at = 4): void {
  bytes.writeUInt32LE(0, at)
  bytes.writeUInt32LE(crc32c(bytes), at)
}

export interface VhdxRecipe {
  readonly size: number
  readonly blockBytes?: number
  readonly sector?: 512 | 4096
  /** State of each payload block that is not 0. */
  readonly blocks?: ReadonlyMap<number, number>
  /** Whether a sector of a partly present block is in the file. */
  readonly present?: (sector: number) => boolean
  readonly parent?: Readonly<Record<string, string>>
  /** Log GUID and version in the headers. */
  readonly logGuid?: string
  readonly logVersion?: number
}

export interface MadeVhdx {
  readonly bytes: Buffer
  readonly expected: Uint8Array
  readonly batOffset: number
}

/** Headers | log at 1 MiB | metadata at 2 MiB | BAT at 3 MiB | bitmaps | blocks, the last one of the disk first. */
export function makeVhdx(recipe: VhdxRecipe): MadeVhdx {
  const { size, blockBytes = MIB, sector = 512, blocks = new Map<number, number>() } = recipe
  const ratio = (2 ** 23 * sector) / blockBytes
  const payload = Math.ceil(size / blockBytes)
  const chunks = Math.ceil(payload / ratio)
  const bitmapsAt = 4 * MIB
  const blocksAt = bitmapsAt + (recipe.parent ? chunks * MIB : 0)
  const held = [...blocks].filter(([, state]) => state >= 6).map(([block]) => block)
  const bytes = Buffer.alloc(blocksAt + held.length * blockBytes)
  const expected = new Uint8Array(size)
  bytes.write('vhdxfile', 0)
  for (const [at, number] of [
    [64 * KIB, 7n],
    [128 * KIB, 8n],
  ] as const) {
    const header = bytes.subarray(at, at + 4096)
    header.write('head', 0)
    header.writeBigUInt64LE(number, 8)
    guid(WRITE_GUID).copy(header, 32)
    if (recipe.logGuid) guid(recipe.logGuid).copy(header, 48)
    header.writeUInt16LE(recipe.logVersion ?? 0, 64)
    header.writeUInt16LE(1, 66)
    header.writeUInt32LE(MIB, 68)
    header.writeBigUInt64LE(BigInt(MIB), 72)
    sum(header)
  }
  for (const at of [192 * KIB, 256 * KIB]) {
    const table = bytes.subarray(at, at + 64 * KIB)
    table.write('regi', 0)
    table.writeUInt32LE(2, 8)
    for (const [index, [id, offset]] of (
      [
        ['2DC27766-F623-4200-9D64-115E9BFD4A08', 3 * MIB],
        ['8B7CA206-4790-4B9A-B8FE-575F050F886E', 2 * MIB],
      ] as const
    ).entries()) {
      guid(id).copy(table, 16 + index * 32)
      table.writeBigUInt64LE(BigInt(offset), 32 + index * 32)
      table.writeUInt32LE(MIB, 40 + index * 32)
      table.writeUInt32LE(1, 44 + index * 32)
    }
    sum(table)
  }
  const region = bytes.subarray(2 * MIB, 3 * MIB)
  region.write('metadata', 0)
  let place = 64 * KIB
  const item = (id: string, flags: number, content: Buffer): void => {
    const index = region.readUInt16LE(10)
    guid(id).copy(region, 32 + index * 32)
    region.writeUInt32LE(place, 48 + index * 32)
    region.writeUInt32LE(content.length, 52 + index * 32)
    region.writeUInt32LE(flags, 56 + index * 32)
    content.copy(region, place)
    place += content.length
    region.writeUInt16LE(index + 1, 10)
  }
  const numbers = (...words: number[]): Buffer => Buffer.from(Uint32Array.from(words).buffer)
  item('CAA16737-FA36-4D43-B3B6-33F0AA44E76B', 4, numbers(blockBytes, recipe.parent ? 2 : 0))
  item('2FA54224-CD1B-4876-B211-5DBED83BF4B8', 6, numbers(size % 2 ** 32, Math.floor(size / 2 ** 32)))
  item('BECA12AB-B2E6-4523-93EF-C309E000C746', 6, Buffer.alloc(16, 5))
  item('8141BF1D-A96F-4709-BA47-F233A8FAAB5F', 6, numbers(sector))
  item('CDA348C7-445D-4471-9CC9-E9885251C556', 6, numbers(4096))
  if (recipe.parent) {
    const pairs = Object.entries(recipe.parent)
    const head = Buffer.alloc(20 + pairs.length * 12)
    guid('B04AEFB7-D19E-4A81-B789-25B8E9445913').copy(head)
    head.writeUInt16LE(pairs.length, 18)
    const texts: Buffer[] = []
    let at = head.length
    for (const [index, pair] of pairs.entries()) {
      for (const [which, text] of pair.entries()) {
        const encoded = Buffer.from(text, 'utf16le')
        head.writeUInt32LE(at, 20 + index * 12 + which * 4)
        head.writeUInt16LE(encoded.length, 28 + index * 12 + which * 2)
        texts.push(encoded)
        at += encoded.length
      }
    }
    item('A8D35F2D-B30B-454D-ABF7-D3D84834AB0C', 4, Buffer.concat([head, ...texts]))
  }
  const entry = (index: number, state: number, at: number): void => {
    bytes.writeBigUInt64LE(BigInt(at) | BigInt(state), 3 * MIB + index * 8)
  }
  if (recipe.parent) {
    for (let chunk = 0; chunk < chunks; chunk++)
      entry(chunk * (ratio + 1) + ratio, 6, bitmapsAt + chunk * MIB)
  }
  for (const [block, state] of blocks) {
    const index = block + Math.floor(block / ratio)
    if (state < 6) {
      entry(index, state, 0)
      continue
    }
    const at = blocksAt + (held.length - 1 - held.indexOf(block)) * blockBytes
    entry(index, state, at)
    const base = block * blockBytes
    for (let offset = 0; offset < blockBytes; offset += sector) {
      // What the bitmap does not claim is filled too: who reads it is seen.
      bytes.set(patternAt(base + offset, sector), at + offset)
      const number = (base + offset) / sector
      if (state === 7) {
        if (!recipe.present!(number)) continue
        const bit = number % 2 ** 23
        const byte = bitmapsAt + Math.floor(number / 2 ** 23) * MIB + (bit >>> 3)
        bytes[byte]! |= 1 << (bit & 7)
      }
      if (base + offset < size) expected.set(patternAt(base + offset, sector), base + offset)
    }
  }
  return { bytes, expected, batOffset: 3 * MIB }
}

export type LogWrite =
  | { readonly offset: number; readonly data: Uint8Array }
  | { readonly offset: number; readonly zero: number }

/** One log entry as bytes. */
export function logEntry(
  sequence: bigint,
  tail: number,
  writes: readonly LogWrite[],
  sizes: { readonly flushed: number; readonly last: number },
): Buffer {
  const data = writes.flatMap((write) => ('data' in write ? [write] : []))
  const head = 1 + Math.ceil(Math.max(0, writes.length - 126) / 128)
  const bytes = Buffer.alloc((head + data.length) * 4096)
  bytes.write('loge', 0)
  bytes.writeUInt32LE(bytes.length, 8)
  bytes.writeUInt32LE(tail, 12)
  bytes.writeBigUInt64LE(sequence, 16)
  bytes.writeUInt32LE(writes.length, 24)
  guid(LOG_GUID).copy(bytes, 32)
  bytes.writeBigUInt64LE(BigInt(sizes.flushed), 48)
  bytes.writeBigUInt64LE(BigInt(sizes.last), 56)
  let sector = head
  for (const [index, write] of writes.entries()) {
    const at = 64 + index * 32
    bytes.writeBigUInt64LE(BigInt(write.offset), at + 16)
    bytes.writeBigUInt64LE(sequence, at + 24)
    if ('zero' in write) {
      bytes.write('zero', at)
      bytes.writeBigUInt64LE(BigInt(write.zero), at + 8)
      continue
    }
    const from = sector++ * 4096
    bytes.write('desc', at)
    bytes.set(write.data.subarray(4092), at + 4)
    bytes.set(write.data.subarray(0, 8), at + 8)
    bytes.set(write.data, from)
    bytes.write('data', from)
    bytes.writeUInt32LE(Number(sequence >> 32n), from + 4)
    bytes.writeUInt32LE(Number(sequence & 0xffffffffn), from + 4092)
  }
  sum(bytes)
  return bytes
}

/** Puts entries into the ring from `at` on. */
export function putLog(image: Buffer, at: number, ...entries: readonly Buffer[]): void {
  const all = Buffer.concat(entries)
  for (let done = 0; done < all.length; done += 4096) {
    all.copy(image, MIB + ((at + done) % MIB), done, done + 4096)
  }
}
