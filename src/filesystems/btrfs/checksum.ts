/**
 * The four checksums of Btrfs, over everything after the first 32 bytes of a block: CRC-32C, xxHash64 (seed 0),
 * SHA-256, BLAKE2b with a 256-bit digest (RFC 7693). Node has no xxHash and only the 512-bit
 * BLAKE2b, so those two stand here; they see metadata only, a few MB at most.
 */
import { createHash } from 'node:crypto'
import { crc32c } from '../../base/index.ts'

export const CHECKSUM_BYTES = 32

export const CHECKSUM_TYPES: readonly string[] = ['crc32c', 'xxhash64', 'sha256', 'blake2b']

/** True when the stored checksum of `block` (its first 32 bytes) is right. `type` is one that is listed above. */
export function checksumHolds(type: number, block: Uint8Array): boolean {
  const body = block.subarray(CHECKSUM_BYTES)
  const found = digest(type, body)
  return found !== undefined && Buffer.compare(block.subarray(0, found.length), found) === 0
}

function digest(type: number, body: Uint8Array): Uint8Array | undefined {
  switch (type) {
    case 0: {
      const out = new DataView(new ArrayBuffer(4))
      out.setUint32(0, crc32c(body), true)
      return new Uint8Array(out.buffer)
    }
    case 1: {
      const out = new DataView(new ArrayBuffer(8))
      out.setBigUint64(0, xxhash64(body), true)
      return new Uint8Array(out.buffer)
    }
    case 2:
      return createHash('sha256').update(body).digest()
    case 3:
      return blake2b256(body)
    default:
      return undefined
  }
}

const MASK = (1n << 64n) - 1n
const P1 = 0x9e3779b185ebca87n
const P2 = 0xc2b2ae3d27d4eb4fn
const P3 = 0x165667b19e3779f9n
const P4 = 0x85ebca77c2b2ae63n
const P5 = 0x27d4eb2f165667c5n

/** xxHash64 with seed 0. */
export function xxhash64(bytes: Uint8Array): bigint {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const rotl = (value: bigint, by: bigint): bigint => ((value << by) | (value >> (64n - by))) & MASK
  const round = (lane: bigint, word: bigint): bigint => (rotl((lane + word * P2) & MASK, 31n) * P1) & MASK
  let at = 0
  let hash: bigint
  if (bytes.length >= 32) {
    const lanes = [(P1 + P2) & MASK, P2, 0n, -P1 & MASK]
    for (; at + 32 <= bytes.length; at += 32) {
      for (let lane = 0; lane < 4; lane++)
        lanes[lane] = round(lanes[lane]!, view.getBigUint64(at + lane * 8, true))
    }
    hash = (rotl(lanes[0]!, 1n) + rotl(lanes[1]!, 7n) + rotl(lanes[2]!, 12n) + rotl(lanes[3]!, 18n)) & MASK
    for (const lane of lanes) hash = ((hash ^ round(0n, lane)) * P1 + P4) & MASK
  } else {
    hash = P5
  }
  hash = (hash + BigInt(bytes.length)) & MASK
  for (; at + 8 <= bytes.length; at += 8) {
    hash = (rotl(hash ^ round(0n, view.getBigUint64(at, true)), 27n) * P1 + P4) & MASK
  }
  if (at + 4 <= bytes.length) {
    hash = (rotl(hash ^ ((BigInt(view.getUint32(at, true)) * P1) & MASK), 23n) * P2 + P3) & MASK
    at += 4
  }
  for (; at < bytes.length; at++) hash = (rotl(hash ^ ((BigInt(bytes[at]!) * P5) & MASK), 11n) * P1) & MASK
  hash = ((hash ^ (hash >> 33n)) * P2) & MASK
  hash = ((hash ^ (hash >> 29n)) * P3) & MASK
  return hash ^ (hash >> 32n)
}

/** The initial state of SHA-512: eight 64-bit words as low, high pairs. */
const IV: Uint32Array = Uint32Array.of(
  0xf3bcc908,
  0x6a09e667,
  0x84caa73b,
  0xbb67ae85,
  0xfe94f82b,
  0x3c6ef372,
  0x5f1d36f1,
  0xa54ff53a,
  0xade682d1,
  0x510e527f,
  0x2b3e6c1f,
  0x9b05688c,
  0xfb41bd6b,
  0x1f83d9ab,
  0x137e2179,
  0x5be0cd19,
)

/** Message word order of each round, a hex digit a word. */
const SIGMA: readonly string[] = [
  '0123456789abcdef',
  'ea489fd61c02b753',
  'b8c052fdae367194',
  '7931dcbe265a40f8',
  '905724afe1bc683d',
  '2c6a0b834d75fe19',
  'c51fed4a0763928b',
  'db7ec13950f4862a',
  '6fe9b308c2d714a5',
  'a2847615fb9e3cd0',
]

const BLOCK = 128

/** BLAKE2b, 256-bit digest, no key. 64-bit words are pairs of 32-bit ones, which is much faster than bigint. */
export function blake2b256(bytes: Uint8Array): Uint8Array {
  const h = IV.slice()
  h[0]! ^= 0x01010000 ^ 32
  const m = new Uint32Array(32)
  const padded = new Uint8Array(m.buffer)
  let done = 0
  while (bytes.length - done > BLOCK) {
    padded.set(bytes.subarray(done, done + BLOCK))
    done += BLOCK
    compress(h, m, done, false)
  }
  padded.fill(0)
  padded.set(bytes.subarray(done))
  compress(h, m, bytes.length, true)
  return new Uint8Array(h.buffer.slice(0, 32))
}

function compress(h: Uint32Array, m: Uint32Array, total: number, last: boolean): void {
  const v = new Uint32Array(32)
  v.set(h)
  v.set(IV, 16)
  v[24]! ^= total >>> 0
  v[25]! ^= Math.floor(total / 2 ** 32)
  if (last) {
    v[28] = ~v[28]!
    v[29] = ~v[29]!
  }
  for (let round = 0; round < 12; round++) {
    const order = SIGMA[round % 10]!
    const word = (i: number): number => Number.parseInt(order[i]!, 16) * 2
    for (let i = 0; i < 4; i++)
      mix(v, i * 2, 8 + i * 2, 16 + i * 2, 24 + i * 2, m, word(i * 2), word(i * 2 + 1))
    for (let i = 0; i < 4; i++) {
      mix(
        v,
        i * 2,
        8 + ((i + 1) % 4) * 2,
        16 + ((i + 2) % 4) * 2,
        24 + ((i + 3) % 4) * 2,
        m,
        word(8 + i * 2),
        word(9 + i * 2),
      )
    }
  }
  for (let i = 0; i < 16; i++) h[i]! ^= v[i]! ^ v[i + 16]!
}

function mix(
  v: Uint32Array,
  a: number,
  b: number,
  c: number,
  d: number,
  m: Uint32Array,
  x: number,
  y: number,
): void {
  add(v, a, v[b]!, v[b + 1]!)
  add(v, a, m[x]!, m[x + 1]!)
  rotate(v, d, a, 32)
  add(v, c, v[d]!, v[d + 1]!)
  rotate(v, b, c, 24)
  add(v, a, v[b]!, v[b + 1]!)
  add(v, a, m[y]!, m[y + 1]!)
  rotate(v, d, a, 16)
  add(v, c, v[d]!, v[d + 1]!)
  rotate(v, b, c, 63)
}

function add(v: Uint32Array, a: number, low: number, high: number): void {
  const sum = v[a]! + low
  v[a] = sum
  v[a + 1] = v[a + 1]! + high + (sum >= 2 ** 32 ? 1 : 0)
}

/** v[d] = rotate right by `by` of (v[d] xor v[a]). */
function rotate(v: Uint32Array, d: number, a: number, by: 16 | 24 | 32 | 63): void {
  const low = v[d]! ^ v[a]!
  const high = v[d + 1]! ^ v[a + 1]!
  if (by === 32) {
    v[d] = high
    v[d + 1] = low
  } else if (by === 63) {
    v[d] = (low << 1) | (high >>> 31)
    v[d + 1] = (high << 1) | (low >>> 31)
  } else {
    v[d] = (low >>> by) | (high << (32 - by))
    v[d + 1] = (high >>> by) | (low << (32 - by))
  }
}
