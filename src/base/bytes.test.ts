import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import {
  alignDown,
  alignUp,
  ByteCursor,
  Bytes,
  type Endian,
  guidText,
  isPowerOfTwo,
  isZero,
  narrow,
  uuidText,
} from './bytes.ts'
import { isVarveError } from './errors.ts'

const corrupt = (error: unknown): boolean => isVarveError(error, 'CORRUPT')
const internal = (error: unknown): boolean => isVarveError(error, 'INTERNAL')
const sample = (): Uint8Array => Uint8Array.of(0x80, 0x91, 0xa2, 0xb3, 0xc4, 0xd5, 0xe6, 0xf7)

describe('Bytes', () => {
  test('reads fields in both byte orders', () => {
    const little = new Bytes(sample(), 'little')
    const big = new Bytes(sample(), 'big')
    assert.deepEqual(
      [little.u8(1), little.u16(1), little.u32(0), little.i32(0), little.u64(0), little.i64(0)],
      [0x91, 0xa291, 0xb3a29180, 0xb3a29180 | 0, 0xf7e6d5c4b3a29180n, BigInt.asIntN(64, 0xf7e6d5c4b3a29180n)],
    )
    assert.deepEqual(
      [big.u8(1), big.u16(1), big.u32(0), big.i32(0), big.u64(0), big.i64(0)],
      [0x91, 0x91a2, 0x8091a2b3, 0x8091a2b3 | 0, 0x8091a2b3c4d5e6f7n, BigInt.asIntN(64, 0x8091a2b3c4d5e6f7n)],
    )
  })

  test('works on a view in the middle of a buffer', () => {
    const whole = new Uint8Array(32)
    whole.set(sample(), 11)
    const bytes = new Bytes(whole.subarray(11, 19), 'big')
    assert.equal(bytes.u32(4), 0xc4d5e6f7)
    assert.equal(bytes.text(0, 2), '\x80\x91')
    assert.throws(() => bytes.u8(8), corrupt)
  })

  test('a field outside is CORRUPT and names the structure', () => {
    const bytes = new Bytes(sample(), 'little', 'superblock')
    const reads: readonly (() => unknown)[] = [
      () => bytes.u8(8),
      () => bytes.u16(7),
      () => bytes.u32(5),
      () => bytes.i32(5),
      () => bytes.u64(1),
      () => bytes.i64(1),
      () => bytes.size64(1),
      () => bytes.text(4, 5),
      () => bytes.cString(4, 5),
      () => bytes.sub(-1, 1),
      () => bytes.sub(0, -1),
      () => bytes.u8(-1),
      () => bytes.u8(Number.NaN),
      () => bytes.sub(0, Number.NaN),
      () => bytes.sub(2 ** 53, 2 ** 53),
      () => bytes.setU8(8, 0),
      () => bytes.setU16(7, 0),
      () => bytes.setU32(5, 0),
      () => bytes.setU64(1, 0),
      () => bytes.set(7, new Uint8Array(2)),
      () => bytes.setText(7, 'ab'),
    ]
    for (const [i, read] of reads.entries()) {
      assert.throws(
        read,
        (error) => corrupt(error) && /superblock/.test((error as Error).message),
        `read ${i}`,
      )
    }
    assert.deepEqual(bytes.bytes, sample(), 'and nothing was written')
  })

  test('size64() narrows up to 2^53 - 1 and no further', () => {
    const bytes = new Bytes(new Uint8Array(8), 'little', 'header')
    bytes.setU64(0, Number.MAX_SAFE_INTEGER)
    assert.equal(bytes.size64(0), Number.MAX_SAFE_INTEGER)
    for (const value of [2n ** 53n, 2n ** 63n, 2n ** 64n - 1n]) {
      bytes.setU64(0, value)
      assert.throws(() => bytes.size64(0, 'length'), /header length/)
    }
    assert.throws(() => narrow(-1n, 'x'), corrupt)
  })

  test('writes what it reads', () => {
    for (const endian of ['little', 'big'] satisfies Endian[]) {
      const bytes = new Bytes(new Uint8Array(24), endian)
      bytes.setU8(0, 0xfe)
      bytes.setU16(1, 0xfedc)
      bytes.setU32(3, 0xfedcba98)
      bytes.setU64(7, 0xfedcba9876543210n)
      bytes.setText(15, 'größe')
      assert.deepEqual(
        [bytes.u8(0), bytes.u16(1), bytes.u32(3), bytes.u64(7), bytes.cString(15, 9)],
        [0xfe, 0xfedc, 0xfedcba98, 0xfedcba9876543210n, 'größe'],
      )
    }
  })

  test('refuses to write what does not fit its field', () => {
    const bytes = new Bytes(new Uint8Array(8), 'little')
    for (const bad of [-1, 256, 1.5, Number.NaN]) assert.throws(() => bytes.setU8(0, bad), internal)
    for (const bad of [-1, 65536]) assert.throws(() => bytes.setU16(0, bad), internal)
    for (const bad of [-1, 2 ** 32]) assert.throws(() => bytes.setU32(0, bad), internal)
    for (const bad of [-1, 2 ** 53, -1n, 2n ** 64n]) assert.throws(() => bytes.setU64(0, bad), internal)
    assert.ok(isZero(bytes.bytes))
  })

  test('cString() ends at NUL or at the field, and keeps bad UTF-8 and a byte order mark visible', () => {
    const bytes = new Bytes(Uint8Array.of(0x61, 0x62, 0, 0x63, 0xff, 0xef, 0xbb, 0xbf), 'little')
    assert.equal(bytes.cString(0, 8), 'ab')
    assert.equal(bytes.cString(0, 2), 'ab')
    assert.equal(bytes.cString(2, 3), '')
    assert.equal(bytes.cString(3, 2), 'c\ufffd')
    assert.equal(bytes.cString(5, 3), '\ufeff')
  })

  test('text() takes a megabyte', () => {
    const bytes = new Bytes(new Uint8Array(1 << 20).fill(0xe9), 'little')
    const text = bytes.text(0, 1 << 20)
    assert.equal(text.length, 1 << 20)
    assert.equal(text[5], 'é')
  })
})

test('ByteCursor reads on from where it stopped, and stands still when it fails', () => {
  const cursor = new ByteCursor(sample(), 'big', 0, 'record')
  assert.deepEqual([cursor.u8(), cursor.u16(), cursor.u32(), cursor.remaining], [0x80, 0x91a2, 0xb3c4d5e6, 1])
  assert.throws(() => cursor.u16(), corrupt)
  assert.throws(() => cursor.skip(2), corrupt)
  assert.throws(() => cursor.skip(-1), corrupt)
  assert.equal(cursor.position, 7)
  assert.equal(cursor.u8(), 0xf7)
  assert.equal(new ByteCursor(sample(), 'big').u64(), 0x8091a2b3c4d5e6f7n)
  assert.equal(new ByteCursor(new Bytes(sample(), 'big'), 'little', 4).i32(), 0xc4d5e6f7 | 0)
  assert.throws(() => new ByteCursor(sample(), 'big', 0, 'record').size64('length'), /record length/)
  assert.deepEqual(new ByteCursor(sample(), 'big', 6).take(2), sample().subarray(6))
})

test('isZero() sees every single byte, at any length around its own block', () => {
  for (const length of [0, 1, 7, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 5]) {
    const bytes = new Uint8Array(length)
    assert.equal(isZero(bytes), true, `${length}`)
    for (const at of [0, 1, length >> 1, (1 << 20) - 1, 1 << 20, length - 1]) {
      if (at < 0 || at >= length) continue
      bytes[at] = 1
      assert.equal(isZero(bytes), false, `${length} at ${at}`)
      bytes[at] = 0
    }
  }
})

test('alignDown(), alignUp() work past 2^32', () => {
  const large = 2 ** 45 + 1
  assert.equal(alignDown(large, 4096), 2 ** 45)
  assert.equal(alignUp(large, 4096), 2 ** 45 + 4096)
  assert.equal(alignUp(2 ** 45, 4096), 2 ** 45)
  assert.equal(alignUp(0, 512), 0)
  assert.equal(alignUp(7, 3), 9)
})

test('isPowerOfTwo() for all exponents and their neighbours', () => {
  for (let e = 0; e <= 52; e++) {
    assert.ok(isPowerOfTwo(2 ** e), `2^${e}`)
    if (e > 1) assert.ok(!isPowerOfTwo(2 ** e - 1) && !isPowerOfTwo(2 ** e + 1), `beside 2^${e}`)
  }
  for (const bad of [0, -1, -2, 0.5, Number.NaN, Number.POSITIVE_INFINITY, 3])
    assert.ok(!isPowerOfTwo(bad), `${bad}`)
})

test('guidText() swaps the first three fields, uuidText() nothing', () => {
  const bytes = Uint8Array.from(Buffer.from('28732ac11ff8d211ba4b00a0c93ec93b', 'hex'))
  assert.equal(guidText(bytes), 'C12A7328-F81F-11D2-BA4B-00A0C93EC93B') // EFI system partition
  assert.equal(uuidText(bytes), '28732ac1-1ff8-d211-ba4b-00a0c93ec93b')
})
