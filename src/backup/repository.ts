/** Makes and opens repositories, and ties the parts together. */
import { readdir } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { type Context, fromSystem, type Log, silentLog, throwIfAborted, VarveError } from '../base/index.ts'
import { type BlockDevice, syncFolder } from '../device/index.ts'
import type { RangeSet } from '../extents/index.ts'
import { ChunkIndex } from './chunk-index.ts'
import { CONFIG_NAME, createConfig, DEFAULTS, type LoadedConfig, loadConfig } from './config.ts'
import type {
  BackupOptions,
  BackupResult,
  BackupSource,
  CreateRepositoryOptions,
  OpenRepositoryOptions,
  PointDevice,
  PointInfo,
  PointName,
  ReindexResult,
  Repository,
  RepositorySettings,
  VerifyAgainstResult,
  VerifyOptions,
  VerifyResult,
} from './contract.ts'
import { type PackKind, packPath } from './layout.ts'
import { readManifest } from './manifest.ts'
import { readTrailer } from './pack-reader.ts'
import { PageCache } from './pages.ts'
import { runBackup } from './pipeline.ts'
import { RepositoryPointDevice } from './point-device.ts'
import { findManifest, listPoints } from './points.ts'
import { WorkerPool } from './pool.ts'
import { type BlobStore, openStore } from './store/blob-store.ts'
import { makeFolder } from './store/make-folder.ts'
import { verifyRepository } from './verify.ts'
import { verifyAgainst } from './verify-against.ts'
import { WriterRegistration } from './writers.ts'

const PAGE_CACHE_BYTES = 33_554_432
const INDEX_PATH = 'index/chunks.sqlite'

/**
 * Makes a repository in the folder `path`, which must be empty or not there.
 * @throws EXISTS when something stands there, USAGE for sizes that do not fit, ACCESS_DENIED, NO_SPACE, IO
 */
export async function createRepository(
  path: string,
  options: CreateRepositoryOptions = {},
): Promise<Repository> {
  const absolute = resolve(path)
  if (options.password === '')
    throw new VarveError('USAGE', 'Cannot encrypt the repository with an empty password')
  try {
    await makeFolder(absolute)
    if ((await readdir(absolute)).length > 0) {
      throw new VarveError(
        'EXISTS',
        `Cannot make a repository in ${absolute}: found a folder that is not empty`,
        {
          fields: { path: absolute },
        },
      )
    }
    const store = openStore({ kind: 'folder', path: absolute })
    const id = await createConfig(store, {
      chunkBytes: options.chunkBytes ?? DEFAULTS.chunkBytes,
      frameBytes:
        options.frameBytes ?? Math.min(DEFAULTS.frameBytes, options.chunkBytes ?? DEFAULTS.chunkBytes),
      packBytes: options.packBytes ?? DEFAULTS.packBytes,
      password: options.password,
    })
    await syncFolder(resolve(absolute, '..'))
    // Made now, so that no two first writers make it at the same time.
    const index = ChunkIndex.open(join(absolute, INDEX_PATH), id, silentLog)
    index.markComplete()
    index.close()
    await store.close()
  } catch (error) {
    throw fromSystem(error, 'make a repository in', absolute)
  }
  return await openRepository(absolute, { password: options.password, workers: options.workers })
}

/**
 * Opens a repository. Nothing is locked: others may read and write at the same time.
 * @throws NOT_FOUND, PASSWORD_NEEDED, WRONG_PASSWORD, CORRUPT, UNSUPPORTED
 */
export async function openRepository(path: string, options: OpenRepositoryOptions = {}): Promise<Repository> {
  const absolute = resolve(path)
  const store = openStore({ kind: 'folder', path: absolute })
  let config: LoadedConfig
  try {
    if (!(await store.exists(CONFIG_NAME)) && !(await store.exists(`${CONFIG_NAME}.copy`))) {
      throw new VarveError('NOT_FOUND', `Cannot open ${absolute}: found no repository there`, {
        fields: { path: absolute },
        hint: '`varve init` makes one.',
      })
    }
    config = await loadConfig(store, options.password, options.log)
  } catch (error) {
    await store.close()
    throw error
  }
  return new FolderRepository(absolute, store, config, options)
}

class FolderRepository implements Repository {
  readonly id: string
  readonly path: string
  readonly settings: RepositorySettings
  readonly #store: BlobStore
  readonly #config: LoadedConfig
  readonly #pool: WorkerPool
  readonly #pages = new PageCache(PAGE_CACHE_BYTES)
  readonly #log: Log
  #index: ChunkIndex | undefined
  /** Backups of one repository object run one after another: they share the workers' open packs. */
  #writing: Promise<unknown> = Promise.resolve()
  #closed = false

  constructor(path: string, store: BlobStore, config: LoadedConfig, options: OpenRepositoryOptions) {
    this.path = path
    this.id = config.id
    this.settings = config.settings
    this.#store = store
    this.#config = config
    this.#log = options.log ?? silentLog
    const { chunkBytes, frameBytes, packBytes } = config.settings
    this.#pool = new WorkerPool(
      { store: store.spec, keys: config.keys.material, chunkBytes, frameBytes, packBytes },
      options.workers,
    )
  }

  async backup(source: BackupSource, options: BackupOptions = {}): Promise<BackupResult> {
    this.#use()
    this.#refuseToWrite()
    const run = this.#writing.then(() => this.#backup(source, options))
    this.#writing = run.catch(() => {})
    return await run
  }

  async #backup(source: BackupSource, options: BackupOptions): Promise<BackupResult> {
    throwIfAborted(options.signal)
    const log = options.log ?? this.#log
    const writer = await WriterRegistration.begin(this.#store, log)
    try {
      const index = await this.#openIndex({ ...options, log })
      const tools = { ...this.#tools, index }
      return await runBackup(tools, source, { ...options, log })
    } finally {
      await writer.end()
    }
  }

  async points(disk?: string): Promise<PointInfo[]> {
    this.#use()
    return (await listPoints(this.#store, this.#config.keys, disk)).map(({ info }) => info)
  }

  async openPoint(name: PointName, options: Context = {}): Promise<PointDevice> {
    return await this.#openPoint(name, options)
  }

  async verify(options: VerifyOptions = {}): Promise<VerifyResult> {
    this.#use()
    if (options.point !== undefined && options.disk === undefined)
      throw new TypeError('a point needs its disk')
    return await verifyRepository(this.#tools, options)
  }

  async verifyAgainst(
    name: PointName,
    source: { readonly device: BlockDevice; readonly inUse: RangeSet },
    options: Context = {},
  ): Promise<VerifyAgainstResult> {
    await using point = await this.#openPoint(name, options)
    return await verifyAgainst(point, source, options)
  }

  async reindex(options: Context = {}): Promise<ReindexResult> {
    this.#use()
    this.#refuseToWrite()
    const index = this.#index ?? this.#makeIndex(options.log ?? this.#log)
    this.#index = index
    return await this.#fillIndex(index, options)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    await this.#writing
    await this.#pool[Symbol.asyncDispose]()
    this.#index?.close()
    await this.#store.close()
  }

  get #tools(): {
    store: BlobStore
    keys: LoadedConfig['keys']
    settings: RepositorySettings
    pool: WorkerPool
    pages: PageCache
  } {
    return {
      store: this.#store,
      keys: this.#config.keys,
      settings: this.settings,
      pool: this.#pool,
      pages: this.#pages,
    }
  }

  async #openPoint(name: PointName, options: Context): Promise<RepositoryPointDevice> {
    this.#use()
    throwIfAborted(options.signal)
    const path = await findManifest(this.#store, this.#config.keys, name)
    const manifest = await readManifest(this.#store, this.#config.keys, path)
    const { chunkBytes, pageEntries } = manifest.facts
    if (chunkBytes !== this.settings.chunkBytes || pageEntries !== this.settings.pageEntries) {
      throw new VarveError(
        'CORRUPT',
        `Cannot open ${path}: found chunks of ${chunkBytes} bytes, expected ${this.settings.chunkBytes}`,
      )
    }
    return new RepositoryPointDevice(this.#tools, manifest)
  }

  #makeIndex(log: Log): ChunkIndex {
    return ChunkIndex.open(join(this.path, INDEX_PATH), this.id, log)
  }

  /** An index that was lost is filled from the packs: reading their trailers costs less than storing all again. */
  async #openIndex(options: Context): Promise<ChunkIndex> {
    if (!this.#index) {
      const index = this.#makeIndex(options.log ?? this.#log)
      this.#index = index
      if (!index.isComplete) await this.#fillIndex(index, options)
    }
    return this.#index
  }

  async #fillIndex(index: ChunkIndex, options: Context): Promise<ReindexResult> {
    const started = performance.now()
    const damaged: string[] = []
    let packs = 0
    let chunks = 0
    index.clear()
    const found: { kind: PackKind; path: string; name: string; size: number }[] = []
    for (const kind of ['data', 'metadata'] as const) {
      for (const path of await this.#store.list(kind === 'data' ? 'packs/' : 'meta/')) {
        const name = path.slice(path.lastIndexOf('/') + 1)
        if (packPath(kind, name) === path)
          found.push({ kind, path, name, size: await this.#store.size(path).catch(() => 0) })
      }
    }
    const totalBytes = found.reduce((sum, { size }) => sum + size, 0)
    let doneBytes = 0
    for (const { kind, path, name, size } of found) {
      throwIfAborted(options.signal)
      try {
        const { objects } = await readTrailer(this.#store, this.#config.keys, kind, name)
        index.add(
          { kind, name },
          objects.map((object) => object.id),
        )
        packs++
        if (kind === 'data') chunks += objects.length
      } catch (error) {
        if (!(error instanceof VarveError)) throw error
        damaged.push(path)
        options.log?.('warn', 'A pack cannot be read; it is left out of the index.', {
          path,
          error: error.message,
        })
      }
      doneBytes += size
      options.progress?.({ phase: 'reindex', doneBytes, totalBytes })
    }
    index.markComplete()
    return { packs, chunks, damaged, seconds: (performance.now() - started) / 1000 }
  }

  #refuseToWrite(): void {
    const [feature] = this.#config.unknownToWriters
    if (feature !== undefined) {
      throw new VarveError(
        'UNSUPPORTED',
        `Cannot write to ${this.path}: found the feature ${feature}, which this version does not know`,
        { hint: 'A newer varve wrote it; use that version. Reading works.' },
      )
    }
  }

  #use(): void {
    if (this.#closed) throw new Error('repository is closed')
  }
}
