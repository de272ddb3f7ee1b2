/**
 * Writes one pack: header, objects, directory, checksums, footer (docs/formats/repository.md).
 *
 * Rules: blocks of one MiB go to the store as they fill, so memory does not grow with the pack; a pack is published
 * only after `finish`, which made every byte of it durable.
 */
import { randomBytes } from 'node:crypto'
import { crc32 } from '../base/index.ts'
import { crashPoint } from './crash-points.ts'
import { FrameCodec, mac, type RepositoryKeys, sealSection } from './keys.ts'
import {
  CRC_SPAN,
  encodeCrcs,
  encodeDirectory,
  encodePackFooter,
  encodePackHeader,
  FOOTER_MAC_AT,
  finishPackFooter,
  NAME_BYTES,
  PACK_FOOTER_BYTES,
  type PackIdentity,
  type PackKind,
  type PackObject,
  packPath,
} from './layout.ts'
import type { BlobStore, BlobWriter } from './store/blob-store.ts'

/** Blocks that may wait for the store before `append` should wait too. */
const MOST_WAITING = 3

export class PackWriter {
  /** In hex; also the object's name. */
  readonly name: string
  readonly kind: PackKind
  readonly #identity: PackIdentity
  readonly #keys: RepositoryKeys
  readonly #codec: FrameCodec
  readonly #blob: BlobWriter
  readonly #objects: PackObject[] = []
  readonly #crcs: number[] = []
  /** Blocks to write to; shared by the packs of one thread, so that they are made once. */
  readonly #blocks: Uint8Array[]
  #block: Uint8Array
  #filled = 0
  /** Bytes so far, those in the block included. */
  #length = 0
  #waiting = 0
  #tail: Promise<void> = Promise.resolve()
  #failure: { error: unknown } | undefined

  private constructor(
    identity: PackIdentity,
    keys: RepositoryKeys,
    blob: BlobWriter,
    how: { readonly name: string; readonly blocks: Uint8Array[] },
  ) {
    this.name = how.name
    this.#blocks = how.blocks
    this.#block = how.blocks.pop() ?? new Uint8Array(CRC_SPAN)
    this.kind = identity.kind
    this.#identity = identity
    this.#keys = keys
    this.#codec = new FrameCodec(keys, how.name)
    this.#blob = blob
    this.#put(encodePackHeader(identity))
  }

  static async create(
    store: BlobStore,
    keys: RepositoryKeys,
    kind: PackKind,
    blocks: Uint8Array[] = [],
  ): Promise<PackWriter> {
    const name = randomBytes(NAME_BYTES)
    const hex = name.toString('hex')
    const blob = await store.create(packPath(kind, hex))
    crashPoint('pack-created')
    const identity = { kind, sealing: keys.sealing, repository: keys.repository, name }
    return new PackWriter(identity, keys, blob, { name: hex, blocks })
  }

  get length(): number {
    return this.#length
  }

  get objects(): readonly PackObject[] {
    return this.#objects
  }

  /** Compresses, seals and appends one object, cut into frames of `frameBytes`. Keeps no reference to `content`. */
  append(id: Uint8Array, content: Uint8Array, frameBytes: number): PackObject {
    const offset = this.#length
    const frames: number[] = []
    for (let from = 0, frame = 0; from < content.length; from += frameBytes, frame++) {
      const place = { id, frame, offset: this.#length }
      const descriptor = this.#codec.encode(content.subarray(from, from + frameBytes), place, (part) => {
        this.#put(part)
      })
      frames.push(descriptor)
    }
    const object = { id, offset, plainLength: content.length, frames }
    this.#objects.push(object)
    return object
  }

  /** Resolves when the store has kept up enough to go on; throws what it threw. */
  async ready(): Promise<void> {
    while (this.#waiting > MOST_WAITING && !this.#failure) await this.#tail
    if (this.#failure) throw this.#failure.error
  }

  /** Writes the trailer and makes the pack durable, still without a name. Returns its length. */
  async finish(): Promise<number> {
    const directoryOffset = this.#length
    const plain = encodeDirectory(this.#objects)
    const keys = this.#keys.pack(this.name)
    const stored = sealSection(this.#keys.sealing, keys.seal, plain, {
      at: directoryOffset,
      aad: encodePackHeader(this.#identity),
    })
    this.#put(stored)
    if (this.#filled > 0) this.#crcs.push(crc32(this.#block.subarray(0, this.#filled)))
    const crcs = encodeCrcs(this.#crcs)
    const fileLength = this.#length + crcs.length + PACK_FOOTER_BYTES
    const footer = encodePackFooter({
      ...this.#identity,
      fileLength,
      directoryOffset,
      directoryStored: stored.length,
      directoryPlain: plain.length,
      objects: this.#objects.length,
      crcCount: this.#crcs.length,
      crcOfCrcs: crc32(crcs),
    })
    finishPackFooter(
      footer,
      mac(keys.mac, encodePackHeader(this.#identity), stored, crcs, footer.subarray(0, FOOTER_MAC_AT)),
    )
    await this.#tail
    if (this.#failure) throw this.#failure.error
    await this.#blob.write(this.#block.subarray(0, this.#filled))
    await this.#blob.write(Buffer.concat([crcs, footer]))
    this.#blocks.push(this.#block)
    this.#filled = 0
    crashPoint('pack-written')
    await this.#blob.sync()
    crashPoint('pack-synced')
    return fileLength
  }

  async publish(): Promise<void> {
    await this.#blob.publish(() => crashPoint('pack-renamed'))
  }

  async discard(): Promise<void> {
    await this.#tail
    await this.#blob.discard()
  }

  #put(bytes: Uint8Array): void {
    let from = 0
    while (from < bytes.length) {
      const part = bytes.subarray(from, from + CRC_SPAN - this.#filled)
      this.#block.set(part, this.#filled)
      this.#filled += part.length
      from += part.length
      if (this.#filled === CRC_SPAN) this.#flushBlock()
    }
    this.#length += bytes.length
  }

  #flushBlock(): void {
    const block = this.#block
    this.#crcs.push(crc32(block))
    this.#waiting++
    this.#tail = this.#tail.then(async () => {
      try {
        if (!this.#failure) await this.#blob.write(block)
      } catch (error) {
        this.#failure ??= { error }
      }
      this.#waiting--
      this.#blocks.push(block)
    })
    this.#block = this.#blocks.pop() ?? new Uint8Array(CRC_SPAN)
    this.#filled = 0
  }
}
