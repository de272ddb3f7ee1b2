/**
 * Fixed-layout bytes: `Bytes` reads and writes fields at known places, `ByteCursor` reads one after another.
 *
 * Rule: a field outside the buffer is the image's fault (images are hostile), so it throws CORRUPT and never
 * returns a short or made-up value. 64-bit fields that mean an offset or a length are narrowed to `number` once,
 * here, by `size64()`; above 2^53 - 1 is CORRUPT too.
 */
import { assert, VarveError } from './errors.ts'

export type Endian = 'little' | 'big'

export class Bytes {
  readonly bytes: Uint8Array
  readonly #view: DataView
  readonly #little: boolean
  /** What this buffer is, for error messages: "superblock", "L1 table". */
  readonly #what: string

  constructor(bytes: Uint8Array, endian: Endian, what = 'structure') {
    this.bytes = bytes
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    this.#little = endian === 'little'
    this.#what = what
  }

  get length(): number {
    return this.bytes.length
  }

  u8(at: number): number {
    this.#check(at, 1)
    return this.#view.getUint8(at)
  }
  u16(at: number): number {
    this.#check(at, 2)
    return this.#view.getUint16(at, this.#little)
  }
  u32(at: number): number {
    this.#check(at, 4)
    return this.#view.getUint32(at, this.#little)
  }
  i32(at: number): number {
    this.#check(at, 4)
    return this.#view.getInt32(at, this.#little)
  }
  u64(at: number): bigint {
    this.#check(at, 8)
    return this.#view.getBigUint64(at, this.#little)
  }
  i64(at: number): bigint {
    this.#check(at, 8)
    return this.#view.getBigInt64(at, this.#little)
  }

  /** A 64-bit offset, length or count as a number; CORRUPT above 2^53 - 1. */
  size64(at: number, field = 'field'): number {
    return narrow(this.u64(at), `${this.#what} ${field}`)
  }

  /** `length` bytes as one character each (latin1), not trimmed. */
  text(at: number, length: number): string {
    const raw = this.sub(at, length)
    return Buffer.from(raw.buffer, raw.byteOffset, raw.length).toString('latin1')
  }

  /** Text that ends at the first NUL or after `length` bytes, decoded as UTF-8 (bad bytes become U+FFFD). */
  cString(at: number, length: number): string {
    const raw = this.sub(at, length)
    const end = raw.indexOf(0)
    return UTF8.decode(end < 0 ? raw : raw.subarray(0, end))
  }

  /** A view (no copy) of `length` bytes. */
  sub(at: number, length: number): Uint8Array {
    this.#check(at, length)
    return this.bytes.subarray(at, at + length)
  }

  /** @throws INTERNAL when `value` does not fit: half a number on a disk is worse than none. So do the others. */
  setU8(at: number, value: number): void {
    this.#check(at, 1)
    fits(value, 0xff)
    this.#view.setUint8(at, value)
  }
  setU16(at: number, value: number): void {
    this.#check(at, 2)
    fits(value, 0xffff)
    this.#view.setUint16(at, value, this.#little)
  }
  setU32(at: number, value: number): void {
    this.#check(at, 4)
    fits(value, 0xffffffff)
    this.#view.setUint32(at, value, this.#little)
  }
  setU64(at: number, value: bigint | number): void {
    this.#check(at, 8)
    if (typeof value === 'number') fits(value, Number.MAX_SAFE_INTEGER)
    else assert(value >= 0n && value < 1n << 64n, `${value} fits its field`)
    this.#view.setBigUint64(at, BigInt(value), this.#little)
  }
  setText(at: number, value: string): void {
    this.set(at, new TextEncoder().encode(value))
  }
  set(at: number, value: Uint8Array): void {
    this.#check(at, value.length)
    this.bytes.set(value, at)
  }

  #check(at: number, length: number): void {
    if (!(at >= 0 && length >= 0 && at + length <= this.bytes.length)) {
      throw new VarveError(
        'CORRUPT',
        `Cannot read ${this.#what}: field at ${at}+${length} is outside its ${this.bytes.length} bytes`,
        { fields: { structure: this.#what, offset: at } },
      )
    }
  }
}

function fits(value: number, most: number): void {
  assert(Number.isInteger(value) && value >= 0 && value <= most, `${value} fits its field`)
}

const UTF8 = new TextDecoder('utf-8', { ignoreBOM: true })

/** Reads fields one after another; every method advances `position`. */
export class ByteCursor {
  readonly #bytes: Bytes
  position: number

  constructor(bytes: Bytes | Uint8Array, endian: Endian = 'little', position = 0, what = 'structure') {
    this.#bytes = bytes instanceof Bytes ? bytes : new Bytes(bytes, endian, what)
    this.position = position
  }

  get remaining(): number {
    return this.#bytes.length - this.position
  }
  u8(): number {
    const value = this.#bytes.u8(this.position)
    this.position += 1
    return value
  }
  u16(): number {
    const value = this.#bytes.u16(this.position)
    this.position += 2
    return value
  }
  u32(): number {
    const value = this.#bytes.u32(this.position)
    this.position += 4
    return value
  }
  i32(): number {
    const value = this.#bytes.i32(this.position)
    this.position += 4
    return value
  }
  u64(): bigint {
    const value = this.#bytes.u64(this.position)
    this.position += 8
    return value
  }
  size64(field = 'field'): number {
    const value = this.#bytes.size64(this.position, field)
    this.position += 8
    return value
  }
  take(length: number): Uint8Array {
    const value = this.#bytes.sub(this.position, length)
    this.position += length
    return value
  }
  skip(length: number): void {
    this.take(length)
  }
}

/** A 64-bit field as a number; CORRUPT above 2^53 - 1. `what` names the field in the message. */
export function narrow(value: bigint, what: string): number {
  if (value < 0n || value > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw new VarveError('CORRUPT', `Cannot use ${what}: found ${value}, expected at most 2^53 - 1`, {
      fields: { field: what, value: String(value) },
    })
  }
  return Number(value)
}

/** True when every byte is zero, at the speed of memory; returns at the first other byte. An empty array is zero. */
export function isZero(bytes: Uint8Array): boolean {
  if (bytes.length > ZEROS.length) {
    for (let at = 0; at < bytes.length; at += ZEROS.length) {
      if (!isZero(bytes.subarray(at, at + ZEROS.length))) return false
    }
    return true
  }
  return Buffer.compare(bytes, ZEROS.subarray(0, bytes.length)) === 0
}

// Written once so that the pages are real: a never-written buffer maps the kernel's zero page and misleads timings.
const ZEROS: Uint8Array = new Uint8Array(1 << 20).fill(1).fill(0)

export function alignDown(value: number, unit: number): number {
  return value - (value % unit)
}

export function alignUp(value: number, unit: number): number {
  const rest = value % unit
  return rest === 0 ? value : value + (unit - rest)
}

export function isPowerOfTwo(value: number): boolean {
  return value > 0 && Number.isSafeInteger(value) && 2 ** Math.round(Math.log2(value)) === value
}

/** A GUID as GPT stores it (first three fields little-endian), upper case. */
export function guidText(bytes: Uint8Array): string {
  const hex = Buffer.from(bytes).toString('hex')
  const swap = (from: number, to: number): string =>
    (hex.slice(from, to).match(/../g) ?? []).reverse().join('')
  return `${swap(0, 8)}-${swap(8, 12)}-${swap(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20, 32)}`.toUpperCase()
}

/** A UUID in the order of its bytes, lower case. */
export function uuidText(bytes: Uint8Array): string {
  const hex = Buffer.from(bytes).toString('hex')
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20, 32)}`
}
