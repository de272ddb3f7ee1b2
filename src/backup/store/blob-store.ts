/**
 * Where a repository keeps its objects: a flat space of names with `/`, objects that are written once and whole.
 *
 * Rules:
 * - An object appears under its name complete and durable, or not at all.
 * - Nothing here relies on locks or on conditional writes: names of packs are random, points are ULIDs.
 */
import { FolderStore } from './folder-store.ts'

export interface BlobStore {
  /** Enough to open the same store in another thread. */
  readonly spec: StoreSpec
  /** Length in bytes. @throws NOT_FOUND */
  size(name: string): Promise<number>
  exists(name: string): Promise<boolean>
  /** Fills `into` from `offset`. @throws NOT_FOUND; CORRUPT when the object ends before */
  read(name: string, offset: number, into: Uint8Array): Promise<void>
  /** The whole object; LIMIT above `most` bytes. */
  readAll(name: string, most: number): Promise<Uint8Array>
  /** Names below `prefix` (which ends in `/`), sorted, of any depth. Temporary objects never appear. */
  list(prefix: string): Promise<string[]>
  /** A new object. Nothing is seen of it before `publish`. */
  create(name: string): Promise<BlobWriter>
  /** `create`, `write`, `sync` and `publish` in one; for small objects. */
  put(name: string, bytes: Uint8Array): Promise<void>
  /** Done when it is not there either. */
  remove(name: string): Promise<void>
  /** Removes what writers that died have left more than `olderMs` ago. Returns how many. */
  removeTemporary(olderMs: number): Promise<number>
  close(): Promise<void>
}

export interface BlobWriter {
  /** Appends. One call at a time. */
  write(bytes: Uint8Array): Promise<void>
  /** All that was written survives power loss, though the object has no name yet. */
  sync(): Promise<void>
  /** Gives the object its name, durably. Call `sync` first. */
  publish(onNamed?: () => void): Promise<void>
  /** Drops what was written. Harmless after `publish`. */
  discard(): Promise<void>
}

export interface StoreSpec {
  readonly kind: 'folder'
  readonly path: string
}

export function openStore(spec: StoreSpec): BlobStore {
  return new FolderStore(spec.path)
}
