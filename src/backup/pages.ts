/** Reads map pages, checked by tag or CRC and by their id, and keeps the ones used last. */
import { VarveError } from '../base/index.ts'
import { equalBytes, type RepositoryKeys } from './keys.ts'
import { corrupt, MapPage, type PageReference, packPath, storedLengthOf } from './layout.ts'
import { readFrames } from './pack-reader.ts'
import type { BlobStore } from './store/blob-store.ts'

export interface PageShape {
  readonly framesPerChunk: number
  readonly entries: number
}

/** @throws NOT_FOUND, CORRUPT, UNSUPPORTED */
export async function readPage(
  store: BlobStore,
  keys: RepositoryKeys,
  reference: PageReference,
  shape: PageShape,
): Promise<MapPage> {
  const what = `map page at ${reference.offset} of pack ${packPath('metadata', reference.pack)}`
  const content = new Uint8Array(reference.plainLength)
  await readFrames(
    store,
    keys,
    {
      kind: 'metadata',
      pack: reference.pack,
      id: reference.id,
      offset: reference.offset,
      frames: [reference.frame],
      frameBytes: Math.max(reference.plainLength, 1),
      plainLength: reference.plainLength,
    },
    0,
    1,
    content,
  )
  if (storedLengthOf(reference.frame) === 0) throw corrupt(what, 'no bytes')
  if (!equalBytes(keys.pageId(content), reference.id)) {
    throw new VarveError('CORRUPT', `Cannot read ${what}: found other content than its id says`)
  }
  return new MapPage(content, shape, what)
}

/** Chunks in page `page` of a disk. */
export function entriesOfPage(
  virtualSize: number,
  settings: { readonly chunkBytes: number; readonly pageEntries: number },
  page: number,
): number {
  const chunks = Math.ceil(virtualSize / settings.chunkBytes)
  return Math.min(settings.pageEntries, chunks - page * settings.pageEntries)
}

/** Pages by id, the least recently used dropped; loads that are under way are shared. */
export class PageCache {
  readonly #most: number
  readonly #pages = new Map<string, { page: Promise<MapPage>; bytes: number }>()
  #bytes = 0

  constructor(mostBytes: number) {
    this.#most = mostBytes
  }

  get(key: string, load: () => Promise<MapPage>): Promise<MapPage> {
    const known = this.#pages.get(key)
    if (known) {
      this.#pages.delete(key)
      this.#pages.set(key, known)
      return known.page
    }
    const entry = { page: load(), bytes: 0 }
    this.#pages.set(key, entry)
    entry.page.then(
      (page) => {
        if (this.#pages.get(key) !== entry) return
        entry.bytes = page.heldBytes
        this.#bytes += entry.bytes
        for (const [oldest, held] of this.#pages) {
          if (this.#bytes <= this.#most || oldest === key) break
          this.#pages.delete(oldest)
          this.#bytes -= held.bytes
        }
      },
      () => this.#pages.delete(key),
    )
    return entry.page
  }
}
