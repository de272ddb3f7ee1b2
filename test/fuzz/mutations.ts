/** Seeded mutations of bytes, biased to where images carry structure: non-zero pages, aligned fields, extremes. */
import type { Random } from '../kit/index.ts'

export interface Mutation {
  readonly offset: number
  readonly bytes: Uint8Array
}

/** Offsets of the 4 KiB pages of `bytes` that are not all zero: holes carry no structure. */
export function livePages(bytes: Uint8Array): number[] {
  const pages: number[] = []
  const words = new Uint32Array(bytes.buffer, bytes.byteOffset, Math.floor(bytes.length / 4))
  for (let page = 0; page * 4096 < bytes.length; page++) {
    const end = Math.min((page + 1) * 1024, words.length)
    for (let i = page * 1024; i < end; i++) {
      if (words[i] !== 0) {
        pages.push(page * 4096)
        break
      }
    }
  }
  return pages
}

/** One to six mutations of `bytes`, none outside `allowed` ([start, end) pairs; everything when absent). */
export function mutate(
  bytes: Uint8Array,
  pages: readonly number[],
  random: Random,
  allowed: readonly (readonly [number, number])[] = [[0, bytes.length]],
): Mutation[] {
  const list: Mutation[] = []
  const wanted = 1 + random.below(6)
  for (let tries = 0; list.length < wanted && tries < 100; tries++) {
    // Headers stand at the start of images and file systems, so a third of all mutations goes to the first pages.
    const page = random.below(3) === 0 ? pages[random.below(Math.min(4, pages.length))]! : random.pick(pages)
    const mutation = one(bytes, page + random.below(Math.min(4096, bytes.length - page)), random)
    const end = mutation.offset + mutation.bytes.length
    if (allowed.some(([from, to]) => mutation.offset >= from && end <= to)) list.push(mutation)
  }
  return list
}

function one(bytes: Uint8Array, at: number, random: Random): Mutation {
  switch (random.below(6)) {
    case 0:
      return { offset: at, bytes: Uint8Array.of(bytes[at]! ^ (1 << random.below(8))) }
    case 1:
      return { offset: at, bytes: Uint8Array.of(random.below(256)) }
    case 2:
      return field(bytes, at, 4, random)
    case 3:
      return field(bytes, at, 8, random)
    case 4: {
      const from = at - (at % 512)
      return { offset: from, bytes: new Uint8Array(Math.min(512, bytes.length - from)) }
    }
    default: {
      // A structure in the wrong place: valid by itself, so only cross-checks notice.
      const length = Math.min(512, bytes.length)
      const from = random.below(Math.max(1, Math.floor(bytes.length / 512))) * 512
      const to = Math.min(at - (at % 512), bytes.length - length)
      return { offset: Math.max(0, to), bytes: bytes.slice(from, from + length) }
    }
  }
}

const EXTREMES = [
  0n,
  1n,
  2n,
  0x7fn,
  0xffn,
  0xffffn,
  0x7fff_ffffn,
  0x8000_0000n,
  0xffff_ffffn,
  1n << 40n,
  1n << 62n,
  1n << 63n,
  (1n << 64n) - 1n,
]

function field(bytes: Uint8Array, at: number, width: 4 | 8, random: Random): Mutation {
  const offset = Math.max(0, Math.min(at - (at % width), bytes.length - width))
  const value = random.below(4) === 0 ? BigInt(random.below(bytes.length)) : random.pick(EXTREMES)
  const view = new DataView(new ArrayBuffer(8))
  view.setBigUint64(0, BigInt.asUintN(width * 8, value), random.below(2) === 0)
  // Big-endian values of four bytes stand in the upper half.
  const raw = new Uint8Array(view.buffer)
  return {
    offset,
    bytes: raw.slice(0, width).some((byte) => byte !== 0) ? raw.slice(0, width) : raw.slice(8 - width),
  }
}
