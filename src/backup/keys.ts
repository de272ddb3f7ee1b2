/**
 * The keys of a repository and what is done with them: ids, the sealing of frames and sections, the password.
 *
 *   master (32 random bytes)
 *     HKDF "varve chunk id"   -> key of the chunk ids            HKDF "varve page id" -> key of the page ids
 *     HKDF "varve names"      -> key of folder names             HKDF "varve config"  -> key of the config's MAC
 *     HKDF salt = pack name   -> per pack: sealing, MAC          HKDF salt = manifest's salt -> per manifest: the same
 *
 * Rules:
 * - AES-256-GCM never sees one nonce twice under one key: a key belongs to one pack (random name) or one manifest
 *   (random salt), and the nonce is the frame's place in it.
 * - Without a password the master key stands in the config. Ids, MACs and checks are then the same code, and find
 *   every accident; they keep no secret.
 */
import {
  createCipheriv,
  createDecipheriv,
  createHmac,
  createSecretKey,
  hkdfSync,
  type KeyObject,
  randomBytes,
  scrypt,
  timingSafeEqual,
} from 'node:crypto'
import { constants, zstdCompressSync, zstdDecompressSync } from 'node:zlib'
import { crc32, isZero, VarveError } from '../base/index.ts'
import {
  corrupt,
  frameDescriptor,
  frameOverhead,
  ID_BYTES,
  METHOD,
  MOST_STORED,
  methodOf,
  NAME_BYTES,
  type Sealing,
  storedLengthOf,
} from './layout.ts'

export const MASTER_BYTES = 32
const TAG_BYTES = 16
const NONCE_BYTES = 12
/** First four bytes of a nonce: what it seals. The other eight: where that stands. */
const PURPOSE = { frame: 0, directory: 1 }

/** What a worker thread needs to build the same keys. */
export interface KeyMaterial {
  readonly master: Uint8Array
  readonly repository: Uint8Array
  readonly sealing: Sealing
}

export interface SealKeys {
  readonly seal: KeyObject
  readonly mac: KeyObject
}

export class RepositoryKeys {
  readonly repository: Uint8Array
  readonly sealing: Sealing
  readonly #master: Uint8Array
  readonly #chunkId: KeyObject
  readonly #pageId: KeyObject
  readonly #names: KeyObject
  readonly #config: KeyObject
  /** Keys of the packs used last. */
  readonly #packs = new Map<string, SealKeys>()

  constructor(material: KeyMaterial) {
    this.repository = material.repository
    this.sealing = material.sealing
    this.#master = material.master
    const none = new Uint8Array(0)
    this.#chunkId = this.#derive(none, 'varve chunk id')
    this.#pageId = this.#derive(none, 'varve page id')
    this.#names = this.#derive(none, 'varve names')
    this.#config = this.#derive(none, 'varve config')
  }

  get material(): KeyMaterial {
    return { master: this.#master, repository: this.repository, sealing: this.sealing }
  }

  /** Id of a chunk: HMAC-SHA-256 over its content, unused bytes being zero. */
  chunkId(content: Uint8Array): Buffer {
    return createHmac('sha256', this.#chunkId).update(content).digest()
  }

  pageId(content: Uint8Array): Buffer {
    return createHmac('sha256', this.#pageId).update(content).digest()
  }

  /** Folder name of a disk in an encrypted repository: says nothing to who has no key. */
  opaqueName(name: string): string {
    return createHmac('sha256', this.#names)
      .update(name)
      .digest('hex')
      .slice(0, NAME_BYTES * 2)
  }

  configMac(text: string): string {
    return createHmac('sha256', this.#config).update(text).digest('hex')
  }

  /** Keys of the pack with this name (hex). */
  pack(name: string): SealKeys {
    let keys = this.#packs.get(name)
    if (!keys) {
      const salt = Buffer.from(name, 'hex')
      keys = { seal: this.#derive(salt, 'varve pack seal'), mac: this.#derive(salt, 'varve pack mac') }
      if (this.#packs.size >= 64) this.#packs.delete(this.#packs.keys().next().value!)
      this.#packs.set(name, keys)
    }
    return keys
  }

  manifest(salt: Uint8Array): SealKeys {
    return { seal: this.#derive(salt, 'varve point seal'), mac: this.#derive(salt, 'varve point mac') }
  }

  #derive(salt: Uint8Array, info: string): KeyObject {
    const full = Buffer.concat([Buffer.from(info), this.repository])
    return createSecretKey(new Uint8Array(hkdfSync('sha256', this.#master, salt, full, 32)))
  }
}

/** HMAC-SHA-256 over the parts, one behind the other. */
export function mac(key: KeyObject, ...parts: readonly Uint8Array[]): Buffer {
  const hmac = createHmac('sha256', key)
  for (const part of parts) hmac.update(part)
  return hmac.digest()
}

export function equalBytes(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && timingSafeEqual(a, b)
}

/** Where a frame stands: part of what its tag vouches for. */
export interface FramePlace {
  /** Of the object that it belongs to. */
  readonly id: Uint8Array
  readonly frame: number
  /** Of the frame in its pack; unique there, so it is the nonce. */
  readonly offset: number
}

/** Encodes and decodes the frames of one pack. */
export class FrameCodec {
  readonly #sealing: Sealing
  readonly #seal: KeyObject
  readonly #nonce = Buffer.alloc(NONCE_BYTES)
  /** repository 16, pack 16, id 32, frame number 4, descriptor 4. */
  readonly #aad = Buffer.alloc(NAME_BYTES * 2 + ID_BYTES + 8)
  readonly #overhead: number

  constructor(keys: RepositoryKeys, packName: string) {
    this.#sealing = keys.sealing
    this.#seal = keys.pack(packName).seal
    this.#overhead = frameOverhead(keys.sealing)
    this.#aad.set(keys.repository, 0)
    this.#aad.set(Buffer.from(packName, 'hex'), NAME_BYTES)
  }

  /**
   * Hands the stored bytes of a frame to `put`, in parts that are good only during the call, and returns the frame's
   * descriptor. Zeros are stored as nothing.
   */
  encode(content: Uint8Array, place: FramePlace, put: (part: Uint8Array) => void): number {
    if (isZero(content)) return frameDescriptor(METHOD.zeros, 0)
    const packed = compress(content)
    const smaller = packed.length < content.length
    const payload = smaller ? packed : content
    const length = payload.length + this.#overhead
    if (length > MOST_STORED) throw new RangeError(`a frame of ${length} bytes`)
    const descriptor = frameDescriptor(smaller ? METHOD.zstd : METHOD.raw, length)
    if (this.#sealing === 'none') {
      put(payload)
      const check = Buffer.alloc(4)
      check.writeUInt32LE(crc32(payload))
      put(check)
    } else {
      this.#place(place, descriptor)
      const cipher = createCipheriv('aes-256-gcm', this.#seal, this.#nonce)
      cipher.setAAD(this.#aad)
      const sealed = cipher.update(payload)
      cipher.final()
      put(sealed)
      put(cipher.getAuthTag())
      release(sealed)
    }
    release(packed)
    return descriptor
  }

  /** Fills `into`, which is as long as the frame's content. @throws CORRUPT */
  decode(stored: Uint8Array, descriptor: number, place: FramePlace, into: Uint8Array, what: string): void {
    const method = methodOf(descriptor)
    if (method === METHOD.zeros) {
      if (storedLengthOf(descriptor) !== 0) throw corrupt(what, 'a frame of zeros with bytes')
      into.fill(0)
      return
    }
    if (stored.length < this.#overhead) throw corrupt(what, `a frame of ${stored.length} bytes`)
    const payload = this.#open(stored, descriptor, place, what)
    if (method === METHOD.raw) {
      if (payload.length !== into.length) throw corrupt(what, `a frame of ${payload.length} bytes`)
      into.set(payload)
    } else if (method === METHOD.zstd) {
      const content = decompress(payload, into.length, what)
      into.set(content)
      release(content)
    } else {
      throw new VarveError('UNSUPPORTED', `Cannot read ${what}: found a frame of method ${method}`)
    }
    if (this.#sealing !== 'none') release(payload)
  }

  #open(stored: Uint8Array, descriptor: number, place: FramePlace, what: string): Uint8Array {
    const end = stored.length - this.#overhead
    const payload = stored.subarray(0, end)
    if (this.#sealing === 'none') {
      const check = Buffer.from(stored.buffer, stored.byteOffset + end, 4).readUInt32LE()
      if (crc32(payload) !== check) throw corrupt(what, `a wrong checksum of the frame at ${place.offset}`)
      return payload
    }
    this.#place(place, descriptor)
    const decipher = createDecipheriv('aes-256-gcm', this.#seal, this.#nonce)
    decipher.setAAD(this.#aad)
    decipher.setAuthTag(stored.subarray(end))
    const content = decipher.update(payload)
    try {
      decipher.final()
    } catch (error) {
      throw new VarveError(
        'CORRUPT',
        `Cannot read ${what}: found a wrong tag of the frame at ${place.offset}`,
        {
          fields: { object: what, offset: place.offset },
          cause: error,
        },
      )
    }
    return content
  }

  #place(place: FramePlace, descriptor: number): void {
    setNonce(this.#nonce, PURPOSE.frame, place.offset)
    this.#aad.set(place.id, NAME_BYTES * 2)
    this.#aad.writeUInt32LE(place.frame, NAME_BYTES * 2 + ID_BYTES)
    this.#aad.writeUInt32LE(descriptor, NAME_BYTES * 2 + ID_BYTES + 4)
  }
}

/** A section with a place of its own (a pack's directory, a manifest's parts). Its MAC is the caller's. */
export function sealSection(
  sealing: Sealing,
  key: KeyObject,
  content: Uint8Array,
  place: { readonly at: number; readonly aad: Uint8Array },
): Uint8Array {
  if (sealing === 'none') return content
  const nonce = Buffer.alloc(NONCE_BYTES)
  setNonce(nonce, PURPOSE.directory, place.at)
  const cipher = createCipheriv('aes-256-gcm', key, nonce)
  cipher.setAAD(place.aad)
  return Buffer.concat([cipher.update(content), cipher.final(), cipher.getAuthTag()])
}

export function openSection(
  sealing: Sealing,
  key: KeyObject,
  stored: Uint8Array,
  place: { readonly at: number; readonly aad: Uint8Array },
  what: string,
): Uint8Array {
  if (sealing === 'none') return stored
  if (stored.length < TAG_BYTES) throw corrupt(what, `a section of ${stored.length} bytes`)
  const nonce = Buffer.alloc(NONCE_BYTES)
  setNonce(nonce, PURPOSE.directory, place.at)
  const decipher = createDecipheriv('aes-256-gcm', key, nonce)
  decipher.setAAD(place.aad)
  decipher.setAuthTag(stored.subarray(stored.length - TAG_BYTES))
  const content = decipher.update(stored.subarray(0, stored.length - TAG_BYTES))
  try {
    decipher.final()
  } catch (error) {
    throw new VarveError('CORRUPT', `Cannot read ${what}: found a wrong tag`, { cause: error })
  }
  return content
}

function setNonce(nonce: Buffer, purpose: number, at: number): void {
  nonce.writeUInt32LE(purpose, 0)
  nonce.writeUInt32LE(at % 2 ** 32, 4)
  nonce.writeUInt32LE(Math.floor(at / 2 ** 32), 8)
}

/**
 * Gives the memory of a large result back at once. Left to the collector, hundreds of MiB of dead buffers pile up
 * before it runs, because the objects that own them are small. Nobody may use `bytes` afterwards.
 */
function release(bytes: Uint8Array): void {
  const { buffer } = bytes
  if (!(buffer instanceof ArrayBuffer)) return
  // Node's pool, of which small results may be a part, cannot be taken apart.
  const isOwn = bytes.byteLength === buffer.byteLength || buffer.byteLength > POOL_BYTES
  if (isOwn && buffer.byteLength >= 4096) buffer.transfer(0)
}

const POOL_BYTES = Buffer.allocUnsafe(8).buffer.byteLength

/** zstd level 3. The size is told beforehand: it stands in the frame and suits the tables to it. */
export function compress(content: Uint8Array): Uint8Array {
  return zstdCompressSync(content, {
    chunkSize: content.length + 4096,
    pledgedSrcSize: content.length,
    params: { [constants.ZSTD_c_compressionLevel]: 3 },
  })
}

/** Exactly `length` bytes, or CORRUPT; never more memory than that. */
export function decompress(packed: Uint8Array, length: number, what: string): Uint8Array {
  let content: Uint8Array
  try {
    content = zstdDecompressSync(packed, {
      chunkSize: Math.max(length, 64),
      maxOutputLength: Math.max(length, 1),
    })
  } catch (error) {
    throw new VarveError('CORRUPT', `Cannot read ${what}: found bytes that do not decompress`, {
      cause: error,
    })
  }
  if (content.length !== length)
    throw corrupt(what, `${content.length} bytes after decompression, expected ${length}`)
  return content
}

// ---------------------------------------------------------------- password

export interface WrappedKey {
  readonly kdf: 'scrypt'
  readonly n: number
  readonly r: number
  readonly p: number
  /** All in hex. */
  readonly salt: string
  readonly nonce: string
  readonly wrapped: string
}

/** 32 MiB and about a fifth of a second: what a guess costs. */
const SCRYPT = { n: 32768, r: 8, p: 3 }
const MOST_SCRYPT_BYTES = 268_435_456

export async function wrapMaster(
  master: Uint8Array,
  password: string,
  repository: Uint8Array,
): Promise<WrappedKey> {
  const salt = randomBytes(32)
  const nonce = randomBytes(NONCE_BYTES)
  const cipher = createCipheriv('aes-256-gcm', await stretch(password, salt, SCRYPT), nonce)
  cipher.setAAD(repository)
  const wrapped = Buffer.concat([cipher.update(master), cipher.final(), cipher.getAuthTag()])
  return {
    kdf: 'scrypt',
    ...SCRYPT,
    salt: salt.toString('hex'),
    nonce: nonce.toString('hex'),
    wrapped: wrapped.toString('hex'),
  }
}

/** The master key, or undefined when the password is not the one that wrapped it. @throws UNSUPPORTED, LIMIT */
export async function unwrapMaster(
  key: WrappedKey,
  password: string,
  repository: Uint8Array,
): Promise<Uint8Array | undefined> {
  const wrapped = Buffer.from(key.wrapped, 'hex')
  const nonce = Buffer.from(key.nonce, 'hex')
  if (wrapped.length !== MASTER_BYTES + TAG_BYTES || nonce.length !== NONCE_BYTES)
    throw corrupt('a key of the repository', 'a wrapped key of a wrong length')
  const decipher = createDecipheriv(
    'aes-256-gcm',
    await stretch(password, Buffer.from(key.salt, 'hex'), key),
    nonce,
  )
  decipher.setAAD(repository)
  decipher.setAuthTag(wrapped.subarray(MASTER_BYTES))
  const master = decipher.update(wrapped.subarray(0, MASTER_BYTES))
  try {
    decipher.final()
  } catch {
    return undefined
  }
  return master
}

function stretch(
  password: string,
  salt: Uint8Array,
  cost: { readonly n: number; readonly r: number; readonly p: number },
): Promise<Buffer> {
  const bytes = 128 * cost.n * cost.r
  if (!(bytes <= MOST_SCRYPT_BYTES && cost.p >= 1 && cost.p <= 16)) {
    throw new VarveError(
      'LIMIT',
      `Cannot use a key of the repository: found scrypt n ${cost.n}, r ${cost.r}, p ${cost.p}`,
    )
  }
  return new Promise((resolve, reject) => {
    scrypt(
      password.normalize('NFKC'),
      salt,
      32,
      { N: cost.n, r: cost.r, p: cost.p, maxmem: bytes + 33_554_432 },
      (error, key) => (error ? reject(error) : resolve(key)),
    )
  })
}
