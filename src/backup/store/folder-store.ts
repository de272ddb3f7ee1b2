/**
 * A folder of a file system as a store. An object is written under `tmp/`, synced, renamed to its name, and the
 * folder that holds the name is synced: after `publish` it survives power loss.
 */
import { randomBytes } from 'node:crypto'
import {
  close as fsClose,
  fdatasync as fsDatasync,
  open as fsOpen,
  read as fsRead,
  write as fsWrite,
} from 'node:fs'
import { readdir, rename, stat, unlink } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { fromSystem, isVarveError, VarveError } from '../../base/index.ts'
import { syncFolder } from '../../device/index.ts'
import type { BlobStore, BlobWriter, StoreSpec } from './blob-store.ts'
import { makeFolder } from './make-folder.ts'

// Plain descriptors instead of FileHandles: a handle that is collected closes itself under the feet of its users.
const open = promisify(fsOpen)
const read = promisify(fsRead)
const write = promisify(fsWrite)
const datasync = promisify(fsDatasync)
const close = promisify(fsClose)

const TEMPORARY = 'tmp'
/** Descriptors kept open for reading. */
const MOST_OPEN = 64

interface OpenBlob {
  readonly fd: Promise<number>
  users: number
  /** Out of the cache: whoever uses it last closes it. */
  evicted: boolean
}

export class FolderStore implements BlobStore {
  readonly spec: StoreSpec
  readonly #path: string
  readonly #open = new Map<string, OpenBlob>()
  /** Folders whose own entry this store has made durable. */
  readonly #durable = new Set<string>()

  constructor(path: string) {
    this.#path = path
    this.spec = { kind: 'folder', path }
  }

  async size(name: string): Promise<number> {
    const path = join(this.#path, name)
    return (await stat(path).catch((error: unknown) => Promise.reject(fromSystem(error, 'read', path)))).size
  }

  async exists(name: string): Promise<boolean> {
    try {
      await this.size(name)
      return true
    } catch (error) {
      if (isVarveError(error, 'NOT_FOUND')) return false
      throw error
    }
  }

  async read(name: string, offset: number, into: Uint8Array): Promise<void> {
    const path = join(this.#path, name)
    const blob = this.#acquire(name, path)
    try {
      const fd = await blob.fd
      let done = 0
      while (done < into.length) {
        const { bytesRead } = await read(fd, into, done, into.length - done, offset + done)
        if (bytesRead === 0) {
          throw new VarveError(
            'CORRUPT',
            `Cannot read ${path}: found its end at ${offset + done}, expected ${into.length - done} bytes more`,
            { fields: { path, offset: offset + done } },
          )
        }
        done += bytesRead
      }
    } catch (error) {
      throw fromSystem(error, 'read', path)
    } finally {
      this.#release(blob)
    }
  }

  async readAll(name: string, most: number): Promise<Uint8Array> {
    const size = await this.size(name)
    if (size > most)
      throw new VarveError(
        'LIMIT',
        `Cannot read ${join(this.#path, name)}: found ${size} bytes, expected at most ${most}`,
      )
    const bytes = new Uint8Array(size)
    await this.read(name, 0, bytes)
    return bytes
  }

  async list(prefix: string): Promise<string[]> {
    const path = join(this.#path, prefix)
    try {
      const entries = await readdir(path, { recursive: true, withFileTypes: true })
      return entries
        .filter((entry) => entry.isFile())
        .map((entry) => prefix + join(entry.parentPath, entry.name).slice(path.length))
        .sort()
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return []
      throw fromSystem(error, 'list', path)
    }
  }

  async create(name: string): Promise<BlobWriter> {
    const temporary = join(this.#path, TEMPORARY, randomBytes(12).toString('hex'))
    try {
      await makeFolder(dirname(temporary))
      // Disks hold secrets: nobody but the owner reads what is stored.
      return new FolderWriter(
        await open(temporary, 'wx', 0o600),
        temporary,
        join(this.#path, name),
        this.#durable,
      )
    } catch (error) {
      throw fromSystem(error, 'create', temporary)
    }
  }

  async put(name: string, bytes: Uint8Array): Promise<void> {
    const writer = await this.create(name)
    try {
      await writer.write(bytes)
      await writer.sync()
      await writer.publish()
    } finally {
      await writer.discard()
    }
  }

  async remove(name: string): Promise<void> {
    const path = join(this.#path, name)
    try {
      await unlink(path)
      await syncFolder(dirname(path))
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw fromSystem(error, 'remove', path)
    }
  }

  async removeTemporary(olderMs: number): Promise<number> {
    const folder = join(this.#path, TEMPORARY)
    const names = await readdir(folder).catch(() => [])
    let removed = 0
    for (const name of names) {
      const path = join(folder, name)
      try {
        if (Date.now() - (await stat(path)).mtimeMs < olderMs) continue
        await unlink(path)
        removed++
      } catch (error) {
        // Another writer may have removed or renamed it in between.
        if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw fromSystem(error, 'remove', path)
      }
    }
    return removed
  }

  async close(): Promise<void> {
    const blobs = [...this.#open.values()]
    this.#open.clear()
    for (const blob of blobs) {
      blob.evicted = true
      if (blob.users === 0) await closeBlob(blob)
    }
  }

  #acquire(name: string, path: string): OpenBlob {
    let blob = this.#open.get(name)
    if (blob) {
      this.#open.delete(name)
    } else {
      blob = { fd: open(path, 'r'), users: 0, evicted: false }
      // The failure is thrown where it is awaited; a name that cannot be opened is not kept.
      const failed = blob
      blob.fd.catch(() => {
        if (this.#open.get(name) === failed) this.#open.delete(name)
      })
    }
    this.#open.set(name, blob)
    blob.users++
    if (this.#open.size > MOST_OPEN) {
      const [oldest, evicted] = this.#open.entries().next().value as [string, OpenBlob]
      this.#open.delete(oldest)
      evicted.evicted = true
      if (evicted.users === 0) void closeBlob(evicted)
    }
    return blob
  }

  #release(blob: OpenBlob): void {
    if (--blob.users === 0 && blob.evicted) void closeBlob(blob)
  }
}

async function closeBlob(blob: OpenBlob): Promise<void> {
  try {
    await close(await blob.fd)
  } catch {
    // Opened for reading only: there is nothing to lose.
  }
}

class FolderWriter implements BlobWriter {
  readonly #fd: number
  readonly #temporary: string
  readonly #path: string
  readonly #durable: Set<string>
  #position = 0
  #state: 'open' | 'synced' | 'done' = 'open'
  #closed = false

  constructor(fd: number, temporary: string, path: string, durable: Set<string>) {
    this.#durable = durable
    this.#fd = fd
    this.#temporary = temporary
    this.#path = path
  }

  async write(bytes: Uint8Array): Promise<void> {
    try {
      let done = 0
      while (done < bytes.length) {
        const { bytesWritten } = await write(this.#fd, bytes, done, bytes.length - done, this.#position)
        done += bytesWritten
        this.#position += bytesWritten
      }
    } catch (error) {
      throw fromSystem(error, 'write', this.#temporary)
    }
  }

  async sync(): Promise<void> {
    try {
      await datasync(this.#fd)
      this.#state = 'synced'
    } catch (error) {
      throw fromSystem(error, 'sync', this.#temporary)
    }
  }

  async publish(onNamed?: () => void): Promise<void> {
    if (this.#state !== 'synced') throw new Error('publish() before sync()')
    const folder = dirname(this.#path)
    try {
      await this.#close()
      try {
        await rename(this.#temporary, this.#path)
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
        await makeFolder(folder)
        await rename(this.#temporary, this.#path)
      }
      this.#state = 'done'
      onNamed?.()
      await syncFolder(folder)
      if (!this.#durable.has(folder)) {
        // Another writer may have made the folder a moment ago and not have synced its entry yet.
        await syncFolder(dirname(folder))
        this.#durable.add(folder)
      }
    } catch (error) {
      throw fromSystem(error, 'name', this.#path)
    }
  }

  async discard(): Promise<void> {
    if (this.#state === 'done') return
    this.#state = 'done'
    await this.#close().catch(() => {})
    await unlink(this.#temporary).catch(() => {})
  }

  /** Once: the number may be another file's afterwards. */
  async #close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    await close(this.#fd)
  }
}
