/**
 * What one worker thread does: reads source bytes that stand in host files, hashes, compresses, seals, writes packs;
 * decodes chunks; verifies packs. The main thread decides what is stored (pipeline.ts).
 *
 * Rules: `hash` and `store` of one batch run on one engine, in that order; a pack is announced (`onPack`) only when it
 * is durable under its name. Bytes of a batch live in one buffer that travels to and fro and is used again.
 */
import { read as fsRead } from 'node:fs'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { fromSystem, isZero, VarveError } from '../base/index.ts'
import { crashPoint } from './crash-points.ts'
import { equalBytes, type KeyMaterial, RepositoryKeys } from './keys.ts'
import { ID_BYTES, type PackKind } from './layout.ts'
import { type ObjectPlace, type PackReport, readFrames, verifyPack } from './pack-reader.ts'
import { PackWriter } from './pack-writer.ts'
import { type BlobStore, openStore, type StoreSpec } from './store/blob-store.ts'

export interface EngineSetup {
  readonly store: StoreSpec
  readonly keys: KeyMaterial
  readonly chunkBytes: number
  readonly frameBytes: number
  readonly packBytes: number
}

/** Some chunks of a disk in one buffer, chunk i at i * chunkBytes. */
export interface Batch {
  readonly batch: number
  readonly buffer: ArrayBuffer
  readonly chunks: number
  /** Four numbers each: place in the buffer, length, file descriptor, offset in the file. Ascending. */
  readonly reads: Float64Array
  /** Two numbers each: place in the buffer, length; set to zero after the reads. */
  readonly zeros: Float64Array
}

export interface Hashed {
  /** One id for each chunk; all zero where the chunk is all zeros. */
  readonly ids: Uint8Array
}

export interface Stored {
  /** Names of the packs that `places` counts. */
  readonly packs: readonly string[]
  /** For each stored chunk, in the order asked: pack ordinal, offset, then the frames. */
  readonly places: Uint32Array
  readonly buffer: ArrayBuffer
}

/** A pack that is durable and has its name. */
export interface DurablePack {
  readonly kind: PackKind
  readonly name: string
  readonly bytes: number
  /** Ids of its objects, one behind the other. */
  readonly ids: Uint8Array
}

/** Objects in one pack at most: a trailer stays small enough to be held in memory. */
export const MOST_PACK_OBJECTS = 8192
/** Packs that may be on their way to being durable while the next one fills. */
const MOST_FINISHING = 2

export class Engine {
  readonly #setup: EngineSetup
  readonly #store: BlobStore
  readonly #keys: RepositoryKeys
  readonly #onPack: (pack: DurablePack) => void
  readonly #batches = new Map<number, { buffer: ArrayBuffer; ids: Uint8Array }>()
  #pack: PackWriter | undefined
  readonly #blocks: Uint8Array[] = []
  /** Buffers for what decoding reads, one for each call under way. */
  readonly #scratch: Uint8Array[] = []
  /** Calls of `store` one after another: they share the open pack. */
  #storing: Promise<unknown> = Promise.resolve()
  readonly #finishing = new Set<Promise<void>>()
  #failure: { error: unknown } | undefined
  #cancelled = false

  constructor(setup: EngineSetup, onPack: (pack: DurablePack) => void) {
    this.#setup = setup
    this.#store = openStore(setup.store)
    this.#keys = new RepositoryKeys(setup.keys)
    this.#onPack = onPack
  }

  /** Reads what stands in host files, zeroes what is not in use, and computes the ids. */
  async hash(batch: Batch): Promise<Hashed> {
    const bytes = new Uint8Array(batch.buffer)
    const { reads, zeros } = batch
    for (let i = 0; i < reads.length; i += 4) {
      const into = bytes.subarray(reads[i], reads[i]! + reads[i + 1]!)
      await readFully(reads[i + 2]!, into, reads[i + 3]!)
    }
    for (let i = 0; i < zeros.length; i += 2) bytes.fill(0, zeros[i], zeros[i]! + zeros[i + 1]!)
    const { chunkBytes } = this.#setup
    const ids = new Uint8Array(batch.chunks * ID_BYTES)
    for (let i = 0; i < batch.chunks; i++) {
      const content = bytes.subarray(i * chunkBytes, (i + 1) * chunkBytes)
      if (!isZero(content)) ids.set(this.#keys.chunkId(content), i * ID_BYTES)
    }
    this.#batches.set(batch.batch, { buffer: batch.buffer, ids })
    return { ids: ids.slice() }
  }

  /** Puts the chunks of a hashed batch whose numbers stand in `which` into packs, and gives the buffer back. */
  async store(request: { readonly batch: number; readonly which: Uint32Array }): Promise<Stored> {
    const batch = this.#batches.get(request.batch)
    if (!batch) throw new Error(`no batch ${request.batch}`)
    this.#batches.delete(request.batch)
    const stored = this.#storing.then(() => this.#storeAll(batch, request.which))
    this.#storing = stored.catch(() => {})
    return await stored
  }

  async #storeAll(batch: { buffer: ArrayBuffer; ids: Uint8Array }, which: Uint32Array): Promise<Stored> {
    const { chunkBytes, frameBytes } = this.#setup
    const framesPerChunk = chunkBytes / frameBytes
    const packs: string[] = []
    const places = new Uint32Array(which.length * (2 + framesPerChunk))
    let at = 0
    for (const chunk of which) {
      if (this.#cancelled) throw cancelled()
      const pack = await this.#openPack()
      if (packs.at(-1) !== pack.name) packs.push(pack.name)
      const content = new Uint8Array(batch.buffer, chunk * chunkBytes, chunkBytes)
      const id = batch.ids.slice(chunk * ID_BYTES, (chunk + 1) * ID_BYTES)
      const object = pack.append(id, content, frameBytes)
      places[at++] = packs.length - 1
      places[at++] = object.offset
      for (const frame of object.frames) places[at++] = frame
      if (pack.length >= this.#setup.packBytes || pack.objects.length >= MOST_PACK_OBJECTS)
        await this.#finishLater()
      await pack.ready()
      // Lets reads of the next batch that have ended go on.
      await nextTurn()
    }
    return { packs, places, buffer: batch.buffer }
  }

  /** Makes every pack durable. */
  async flush(): Promise<void> {
    await this.#storing
    await this.#finishLater()
    await Promise.all(this.#finishing)
    if (this.#failure) throw this.#failure.error
  }

  /** Ends what is under way and drops the open pack; packs that are durable stay. The engine is as new afterwards. */
  async abort(): Promise<void> {
    this.#cancelled = true
    await this.#storing
    await Promise.all(this.#finishing)
    await this.#pack?.discard()
    this.#pack = undefined
    this.#batches.clear()
    this.#failure = undefined
    this.#cancelled = false
  }

  /** Content of the frames `[first, end)` of an object, checked by its id when `check` is set and it is all of it. */
  async decode(request: {
    readonly place: ObjectPlace
    readonly first: number
    readonly end: number
    readonly length: number
    readonly buffer: ArrayBuffer
  }): Promise<{ buffer: ArrayBuffer }> {
    const { place, first, end } = request
    const into = new Uint8Array(request.buffer, 0, request.length)
    // The largest chunk is one of raw frames, each with its check or tag.
    const scratch = this.#scratch.pop() ?? new Uint8Array(this.#setup.chunkBytes + place.frames.length * 16)
    await readFrames(this.#store, this.#keys, place, first, end, into, scratch)
    this.#scratch.push(scratch)
    const whole = first === 0 && end === place.frames.length
    // The tags of sealed frames vouch for the content; a bare CRC is not enough where the whole can be checked.
    if (whole && this.#keys.sealing === 'none' && !equalBytes(this.#keys.chunkId(into), place.id)) {
      throw new VarveError(
        'CORRUPT',
        `Cannot read pack ${place.pack}: found other content than the chunk's id says`,
        {
          fields: { pack: place.pack, offset: place.offset },
        },
      )
    }
    return { buffer: request.buffer }
  }

  async verifyPack(pack: { readonly kind: PackKind; readonly name: string }): Promise<PackReport> {
    return await verifyPack(this.#store, this.#keys, pack, this.#setup.frameBytes)
  }

  async close(): Promise<void> {
    await this.#store.close()
  }

  async #openPack(): Promise<PackWriter> {
    if (this.#failure) throw this.#failure.error
    this.#pack ??= await PackWriter.create(this.#store, this.#keys, 'data', this.#blocks)
    return this.#pack
  }

  /** Lets the open pack become durable in the background. */
  async #finishLater(): Promise<void> {
    const pack = this.#pack
    this.#pack = undefined
    if (!pack) return
    while (this.#finishing.size >= MOST_FINISHING) await Promise.race(this.#finishing)
    const finished = this.#finish(pack)
      .catch((error: unknown) => {
        this.#failure ??= { error }
      })
      .finally(() => this.#finishing.delete(finished))
    this.#finishing.add(finished)
  }

  async #finish(pack: PackWriter): Promise<void> {
    try {
      const bytes = await pack.finish()
      await pack.publish()
      crashPoint('pack-durable')
      const ids = new Uint8Array(pack.objects.length * ID_BYTES)
      pack.objects.forEach((object, i) => {
        ids.set(object.id, i * ID_BYTES)
      })
      this.#onPack({ kind: 'data', name: pack.name, bytes, ids })
    } finally {
      await pack.discard()
    }
  }
}

function readFully(fd: number, into: Uint8Array, offset: number): Promise<void> {
  return new Promise((resolve, reject) => {
    const more = (done: number): void => {
      fsRead(fd, into, done, into.length - done, offset + done, (error, count) => {
        if (error) reject(fromSystem(error, 'read', 'the source'))
        else if (count === 0)
          reject(new VarveError('IO', `Cannot read the source: found its end at ${offset + done}`))
        else if (done + count < into.length) more(done + count)
        else resolve()
      })
    }
    more(0)
  })
}

function cancelled(): VarveError {
  return new VarveError('CANCELLED', 'Cannot go on: interrupted')
}
