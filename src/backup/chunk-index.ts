/**
 * The deduplication index: id of a chunk or map page -> pack. SQLite in `index/` of the repository folder.
 *
 * Rules:
 * - The index is a hint. A hit counts only after the pack's authenticated trailer confirmed it (known-packs.ts), so a
 *   lost, old or wrong index costs space or time, never data. Rows may be written once their pack is durable.
 * - Reading a repository never needs it. A writer that cannot use it says so and goes on with a private one.
 *
 * Several writers: WAL and BEGIN IMMEDIATE with a busy timeout; rows are independent of each other.
 */
import { mkdirSync, rmSync } from 'node:fs'
import { dirname } from 'node:path'
import { DatabaseSync, type StatementSync } from 'node:sqlite'
import type { Log } from '../base/index.ts'
import type { PackKind } from './layout.ts'

/** Bytes of an id that are kept: 128 bits do not collide, and the trailer is asked for all of them. */
const KEPT = 16
const SCHEMA_VERSION = 1
const BUSY_MS = 10_000

export interface IndexHit {
  readonly kind: PackKind
  readonly pack: string
}

export class ChunkIndex {
  #db: DatabaseSync
  #find!: StatementSync
  #findPack!: StatementSync
  #addPack!: StatementSync
  #addChunk!: StatementSync
  readonly #log: Log
  /** True when what is in it will be gone afterwards. */
  #isPrivate = false
  /** False in an index that was made anew, until the packs that are there have been read into it. */
  #isComplete: boolean

  private constructor(db: DatabaseSync, isComplete: boolean, log: Log) {
    this.#db = db
    this.#isComplete = isComplete
    this.#log = log
    this.#prepare()
  }

  /** Opens or makes the index; one that is damaged or another repository's is dropped and made anew. */
  static open(path: string, repository: string, log: Log): ChunkIndex {
    try {
      mkdirSync(dirname(path), { recursive: true, mode: 0o700 })
      try {
        const { db, isComplete } = openFile(path, repository)
        return new ChunkIndex(db, isComplete, log)
      } catch (error) {
        if (!isDamage(error)) throw error
        log('warn', 'The deduplication index is damaged and is made anew.', { path })
        for (const suffix of ['', '-wal', '-shm']) rmSync(path + suffix, { force: true })
        return new ChunkIndex(openFile(path, repository).db, false, log)
      }
    } catch (error) {
      log('warn', 'The deduplication index cannot be used; this run has one of its own.', {
        path,
        error: String(error),
      })
      const index = new ChunkIndex(openPrivate(repository), false, log)
      index.#isPrivate = true
      return index
    }
  }

  get isComplete(): boolean {
    return this.#isComplete
  }

  /** Says that every pack of the repository was read into the index, or that there is none. */
  markComplete(): void {
    this.#try(() => {
      this.#db.exec("INSERT OR REPLACE INTO about (key, value) VALUES ('complete', '1')")
    })
    this.#isComplete = true
  }

  find(id: Uint8Array): IndexHit | undefined {
    return this.#try(() => {
      const row = this.#find.get(id.subarray(0, KEPT)) as { name: Uint8Array; kind: number } | undefined
      if (!row) return undefined
      return { kind: row.kind === 1 ? 'data' : 'metadata', pack: Buffer.from(row.name).toString('hex') }
    })
  }

  /** Notes a pack that is durable, with everything in it. An id that is known elsewhere moves to this pack. */
  add(pack: { readonly kind: PackKind; readonly name: string }, ids: Iterable<Uint8Array>): void {
    this.#try(() => {
      const name = Buffer.from(pack.name, 'hex')
      this.#inTransaction(() => {
        this.#addPack.run(name, pack.kind === 'data' ? 1 : 2)
        const { n } = this.#findPack.get(name) as { n: number }
        for (const id of ids) this.#addChunk.run(id.subarray(0, KEPT), n)
      })
    })
  }

  /** Forgets a pack that is gone or damaged. */
  forget(pack: string): void {
    this.#try(() => {
      const row = this.#findPack.get(Buffer.from(pack, 'hex')) as { n: number } | undefined
      if (!row) return
      this.#inTransaction(() => {
        this.#db.prepare('DELETE FROM chunk WHERE pack = ?').run(row.n)
        this.#db.prepare('DELETE FROM pack WHERE n = ?').run(row.n)
      })
    })
  }

  clear(): void {
    this.#try(() => {
      this.#inTransaction(() =>
        this.#db.exec("DELETE FROM chunk; DELETE FROM pack; DELETE FROM about WHERE key = 'complete'"),
      )
    })
  }

  close(): void {
    try {
      this.#db.close()
    } catch {
      // A hint that cannot be closed is no loss.
    }
  }

  /** Runs `work`; a failure of the database ends the use of it for this run, not the backup. */
  #try<T>(work: () => T): T | undefined {
    try {
      return work()
    } catch (error) {
      if (this.#isPrivate) throw error
      this.#log('warn', 'The deduplication index failed; this run goes on with one of its own.', {
        error: String(error),
      })
      this.close()
      this.#isPrivate = true
      this.#db = openPrivate('')
      this.#prepare()
      return work()
    }
  }

  #inTransaction(work: () => void): void {
    this.#db.exec('BEGIN IMMEDIATE')
    try {
      work()
      this.#db.exec('COMMIT')
    } catch (error) {
      try {
        this.#db.exec('ROLLBACK')
      } catch {
        // SQLite has rolled back by itself.
      }
      throw error
    }
  }

  #prepare(): void {
    this.#find = this.#db.prepare(
      'SELECT pack.name AS name, pack.kind AS kind FROM chunk JOIN pack ON pack.n = chunk.pack WHERE chunk.id = ?',
    )
    this.#findPack = this.#db.prepare('SELECT n FROM pack WHERE name = ?')
    this.#addPack = this.#db.prepare('INSERT OR IGNORE INTO pack (name, kind) VALUES (?, ?)')
    this.#addChunk = this.#db.prepare('INSERT OR REPLACE INTO chunk (id, pack) VALUES (?, ?)')
  }
}

function openFile(path: string, repository: string): { db: DatabaseSync; isComplete: boolean } {
  const db = new DatabaseSync(path, { timeout: BUSY_MS })
  try {
    db.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL')
    const { user_version: version } = db.prepare('PRAGMA user_version').get() as { user_version: number }
    if (version === 0) {
      makeSchema(db, repository)
      return { db, isComplete: false }
    }
    const about = new Map(
      (db.prepare('SELECT key, value FROM about').all() as { key: string; value: string }[]).map(
        ({ key, value }) => [key, value],
      ),
    )
    if (version !== SCHEMA_VERSION || about.get('repository') !== repository) throw new DamagedIndex()
    return { db, isComplete: about.get('complete') === '1' }
  } catch (error) {
    db.close()
    throw error
  }
}

/** An empty name is SQLite's own temporary file: it does not grow in memory and nobody else sees it. */
function openPrivate(repository: string): DatabaseSync {
  const db = new DatabaseSync('')
  makeSchema(db, repository)
  return db
}

function makeSchema(db: DatabaseSync, repository: string): void {
  db.exec(`
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS pack (n INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, kind INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS chunk (id BLOB PRIMARY KEY, pack INTEGER NOT NULL) WITHOUT ROWID;
    PRAGMA user_version = ${SCHEMA_VERSION};
  `)
  db.prepare("INSERT OR REPLACE INTO about (key, value) VALUES ('repository', ?)").run(repository)
  db.exec('COMMIT')
}

class DamagedIndex extends Error {}

function isDamage(error: unknown): boolean {
  if (error instanceof DamagedIndex) return true
  // SQLITE_CORRUPT 11, SQLITE_NOTADB 26, SQLITE_ERROR 1 (a schema that is not ours).
  const code = (error as { errcode?: number }).errcode
  return code !== undefined && [1, 11, 26].includes(code % 256)
}
