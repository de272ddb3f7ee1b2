import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { crc32, crc32c, rawCrc16, rawCrc32, rawCrc32c } from './checksums.ts'

const text = (value: string): Uint8Array => new TextEncoder().encode(value)
const CHECK = text('123456789')

describe('known answers', () => {
  test('CRC-32 (IEEE)', () => {
    assert.equal(crc32(CHECK), 0xcbf43926)
    assert.equal(crc32(new Uint8Array(0)), 0)
    assert.equal(crc32(text('a')), 0xe8b7be43)
    assert.equal(~rawCrc32(CHECK, ~0) >>> 0, 0xcbf43926)
  })

  test('CRC-32C (RFC 3720, appendix B.4)', () => {
    assert.equal(crc32c(CHECK), 0xe3069283)
    assert.equal(crc32c(new Uint8Array(0)), 0)
    assert.equal(crc32c(new Uint8Array(32)), 0x8a9136aa)
    assert.equal(crc32c(new Uint8Array(32).fill(0xff)), 0x62a8ab43)
    assert.equal(crc32c(Uint8Array.from({ length: 32 }, (_, i) => i)), 0x46dd794e)
    assert.equal(crc32c(Uint8Array.from({ length: 32 }, (_, i) => 31 - i)), 0x113fdb5c)
  })

  test('CRC-16 (ARC and MODBUS differ in the seed alone)', () => {
    assert.equal(rawCrc16(CHECK, 0), 0xbb3d)
    assert.equal(rawCrc16(CHECK, 0xffff), 0x4b37)
  })
})

/** The definition, a bit at a time. */
function bitwise(polynomial: number, bytes: Uint8Array, register: number): number {
  let crc = register
  for (const byte of bytes) {
    crc ^= byte
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ polynomial : crc >>> 1
  }
  return crc >>> 0
}

describe('eight bytes at a time gives the same as a bit at a time', () => {
  const bytes = Uint8Array.from({ length: 80 }, (_, i) => (i * 151 + 43) & 0xff)
  for (const [name, raw, polynomial] of [
    ['CRC-32', rawCrc32, 0xedb88320],
    ['CRC-32C', rawCrc32c, 0x82f63b78],
  ] as const) {
    test(`${name}, every length and place`, () => {
      for (let start = 0; start < 9; start++) {
        for (let end = start; end <= bytes.length; end++) {
          const part = bytes.subarray(start, end)
          for (const register of [0, 0xffffffff, 0xf597a6cf, -1]) {
            assert.equal(
              raw(part, register),
              bitwise(polynomial, part, register),
              `${start}-${end} from ${register}`,
            )
          }
        }
      }
    })
  }
})

test('a checksum goes on from the one before', () => {
  const bytes = Uint8Array.from({ length: 1000 }, (_, i) => (i * 7) & 0xff)
  for (const cut of [0, 1, 8, 500, 999, 1000]) {
    const [head, tail] = [bytes.subarray(0, cut), bytes.subarray(cut)]
    assert.equal(crc32(tail, crc32(head)), crc32(bytes))
    assert.equal(crc32c(tail, crc32c(head)), crc32c(bytes))
    assert.equal(rawCrc32c(tail, rawCrc32c(head, 5)), rawCrc32c(bytes, 5))
    assert.equal(rawCrc16(tail, rawCrc16(head, 5)), rawCrc16(bytes, 5))
  }
})
