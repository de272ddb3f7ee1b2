/**
 * What a writer believes of packs that stand in the repository: only what their authenticated trailers say. Every
 * reuse of a chunk or page goes through here, so an index or a parent point that names a pack which is gone or broken
 * makes the chunk be stored again instead of making a point that cannot be restored.
 */
import { isVarveError } from '../base/index.ts'
import { equalBytes, type RepositoryKeys } from './keys.ts'
import type { PackKind, PackObject } from './layout.ts'
import { readTrailer } from './pack-reader.ts'
import type { BlobStore } from './store/blob-store.ts'

/** Objects of trailers held in memory, over all packs. */
const MOST_OBJECTS = 65_536

interface Trailer {
  readonly byId: ReadonlyMap<string, PackObject>
}

export class KnownPacks {
  readonly #store: BlobStore
  readonly #keys: RepositoryKeys
  readonly #trailers = new Map<string, Promise<Trailer | undefined>>()
  readonly #sound = new Map<string, boolean>()
  readonly #sizes = new Map<string, number>()
  #objects = 0
  /** Packs that were asked for and cannot be used. */
  readonly unusable: Set<string> = new Set()

  constructor(store: BlobStore, keys: RepositoryKeys) {
    this.#store = store
    this.#keys = keys
  }

  /** The object with this id in this pack, or undefined when the pack does not vouch for it. */
  async find(kind: PackKind, pack: string, id: Uint8Array): Promise<PackObject | undefined> {
    const trailer = await this.#trailer(kind, pack)
    const object = trailer?.byId.get(idKey(id))
    return object && equalBytes(object.id, id) ? object : undefined
  }

  /** True when the pack is there, whole in length, with a trailer that this repository wrote. */
  async isSound(kind: PackKind, pack: string): Promise<boolean> {
    return this.#sound.get(pack) ?? (await this.#trailer(kind, pack)) !== undefined
  }

  #trailer(kind: PackKind, pack: string): Promise<Trailer | undefined> {
    const known = this.#trailers.get(pack)
    if (known) {
      this.#trailers.delete(pack)
      this.#trailers.set(pack, known)
      return known
    }
    const loading = this.#load(kind, pack)
    this.#trailers.set(pack, loading)
    return loading
  }

  async #load(kind: PackKind, pack: string): Promise<Trailer | undefined> {
    try {
      const { objects } = await readTrailer(this.#store, this.#keys, kind, pack)
      this.#sound.set(pack, true)
      this.#sizes.set(pack, objects.length)
      this.#objects += objects.length
      this.#evict(pack)
      return { byId: new Map(objects.map((object) => [idKey(object.id), object])) }
    } catch (error) {
      if (!isVarveError(error, 'NOT_FOUND', 'CORRUPT', 'UNSUPPORTED', 'LIMIT', 'IO', 'ACCESS_DENIED'))
        throw error
      this.#sound.set(pack, false)
      this.unusable.add(pack)
      return undefined
    }
  }

  #evict(keep: string): void {
    for (const name of this.#trailers.keys()) {
      if (this.#objects <= MOST_OBJECTS) return
      if (name === keep || !this.#sizes.has(name)) continue
      this.#objects -= this.#sizes.get(name)!
      this.#sizes.delete(name)
      this.#trailers.delete(name)
    }
  }
}

/** A string that is equal for equal ids, for maps. */
export function idKey(id: Uint8Array): string {
  return Buffer.from(id.buffer, id.byteOffset, id.byteLength).toString('latin1')
}
