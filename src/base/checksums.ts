/**
 * CRC-32 (IEEE, as zlib, GPT, packs) and CRC-32C (Castagnoli, as ext4, XFS v5, Btrfs).
 *
 * CRC-32 is the host's own (`zlib.crc32`). CRC-32C is slicing-by-8 over tables made once on first use.
 */
import { crc32 as hostCrc32 } from 'node:zlib'

/** CRC-32 of `bytes`, going on from `seed` (the CRC of what came before). Unsigned. */
export function crc32(bytes: Uint8Array, seed = 0): number {
  return hostCrc32(bytes, seed)
}

/**
 * CRC-32C of `bytes`, going on from `seed` (the CRC of what came before). Unsigned, with the usual inversions.
 * File systems that use the raw register (ext4, Btrfs seed ~0 and no final inversion): `rawCrc32c`.
 */
export function crc32c(bytes: Uint8Array, seed = 0): number {
  return ~rawCrc32c(bytes, ~seed) >>> 0
}

/** The CRC-32C register itself: no inversion before or after. ext4's `crc32c_le(seed, …)`. */
export function rawCrc32c(bytes: Uint8Array, register: number): number {
  TABLES ??= makeTables(0x82f63b78)
  return runRegister(TABLES, bytes, register)
}

/** The reflected CRC-32 register itself, no inversions: LVM2 seeds it with 0xf597a6cf. */
export function rawCrc32(bytes: Uint8Array, register: number): number {
  TABLES_IEEE ??= makeTables(0xedb88320)
  return runRegister(TABLES_IEEE, bytes, register)
}

/** CRC-16 (reflected polynomial 0xA001), register in, register out: ext4 group descriptors with uninit_bg. */
export function rawCrc16(bytes: Uint8Array, register: number): number {
  let crc = register
  for (const byte of bytes) {
    crc ^= byte
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xa001 : crc >>> 1
  }
  return crc & 0xffff
}

let TABLES: readonly Uint32Array[] | undefined
let TABLES_IEEE: readonly Uint32Array[] | undefined

function runRegister(tables: readonly Uint32Array[], bytes: Uint8Array, register: number): number {
  const [t0, t1, t2, t3, t4, t5, t6, t7] = tables as readonly [
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
    Uint32Array,
  ]
  let crc = register
  let at = 0
  const end8 = bytes.length - 8
  for (; at <= end8; at += 8) {
    const low = crc ^ (bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24))
    crc =
      t7[low & 0xff]! ^
      t6[(low >>> 8) & 0xff]! ^
      t5[(low >>> 16) & 0xff]! ^
      t4[low >>> 24]! ^
      t3[bytes[at + 4]!]! ^
      t2[bytes[at + 5]!]! ^
      t1[bytes[at + 6]!]! ^
      t0[bytes[at + 7]!]!
  }
  for (; at < bytes.length; at++) crc = t0[(crc ^ bytes[at]!) & 0xff]! ^ (crc >>> 8)
  return crc >>> 0
}

function makeTables(polynomial: number): readonly Uint32Array[] {
  const tables = Array.from({ length: 8 }, () => new Uint32Array(256))
  const first = tables[0]!
  for (let byte = 0; byte < 256; byte++) {
    let crc = byte
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ polynomial : crc >>> 1
    first[byte] = crc
  }
  for (let slice = 1; slice < 8; slice++) {
    const below = tables[slice - 1]!
    for (let byte = 0; byte < 256; byte++) {
      tables[slice]![byte] = first[below[byte]! & 0xff]! ^ (below[byte]! >>> 8)
    }
  }
  return tables
}
