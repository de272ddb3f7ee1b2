/** ULIDs: 48 bits of time (milliseconds) and 80 random bits, in 26 letters that sort by time. */
import { randomBytes } from 'node:crypto'

const ALPHABET = '0123456789ABCDEFGHJKMNPQRSTVWXYZ'

/** A new id that sorts behind `after`, whatever the clock says. */
export function newUlid(now: number, after?: string): string {
  let time = now
  if (after !== undefined) time = Math.max(time, ulidTime(after) + 1)
  const bytes = new Uint8Array(16)
  for (let i = 5, rest = time; i >= 0; i--) {
    bytes[i] = rest % 256
    rest = Math.floor(rest / 256)
  }
  bytes.set(randomBytes(10), 6)
  return ulidText(bytes)
}

/** Milliseconds since 1970. */
export function ulidTime(ulid: string): number {
  let time = 0
  for (let i = 0; i < 10; i++) time = time * 32 + ALPHABET.indexOf(ulid[i]!)
  return time
}

export function isUlid(text: string): boolean {
  return /^[0-7][0-9A-HJKMNP-TV-Z]{25}$/.test(text)
}

/** 26 letters of 5 bits, the first carrying only 3. */
export function ulidText(bytes: Uint8Array): string {
  let value = 0n
  for (const byte of bytes) value = (value << 8n) | BigInt(byte)
  let text = ''
  for (let i = 0; i < 26; i++) {
    text = ALPHABET[Number(value & 31n)]! + text
    value >>= 5n
  }
  return text
}

export function ulidBytes(text: string): Uint8Array {
  let value = 0n
  for (const letter of text) value = (value << 5n) | BigInt(ALPHABET.indexOf(letter))
  const bytes = new Uint8Array(16)
  for (let i = 15; i >= 0; i--) {
    bytes[i] = Number(value & 255n)
    value >>= 8n
  }
  return bytes
}
