/**
 * A running writer is written down as `writers/<ulid>`, renewed every minute and removed at its end, so that whoever
 * removes packs without references knows whom to wait for. One that was not renewed for a day is dead.
 */
import { hostname } from 'node:os'
import { type Log, VarveError } from '../base/index.ts'
import type { BlobStore } from './store/blob-store.ts'
import { newUlid } from './ulid.ts'

const RENEW_MS = 60_000
/** A temporary object that nobody has written to for so long belongs to a writer that died. */
const DEAD_MS = 7 * 24 * 3600 * 1000

export class WriterRegistration {
  readonly #store: BlobStore
  readonly #name: string
  readonly #started = new Date().toISOString()
  readonly #log: Log
  #timer: NodeJS.Timeout | undefined
  #renewing: Promise<void> = Promise.resolve()

  private constructor(store: BlobStore, log: Log) {
    this.#store = store
    this.#log = log
    this.#name = `writers/${newUlid(Date.now())}`
  }

  /** Registers, and clears away what writers of long ago left under temporary names. */
  static async begin(store: BlobStore, log: Log): Promise<WriterRegistration> {
    const registration = new WriterRegistration(store, log)
    await registration.#write()
    const removed = await store.removeTemporary(DEAD_MS)
    if (removed > 0) log('info', 'Removed what writers that died had left unfinished.', { objects: removed })
    registration.#timer = setInterval(() => {
      registration.#renewing = registration.#renewing.then(() =>
        registration.#write().catch((error: unknown) => {
          log('warn', 'The writer could not renew its registration.', { error: String(error) })
        }),
      )
    }, RENEW_MS).unref()
    return registration
  }

  async end(): Promise<void> {
    clearInterval(this.#timer)
    await this.#renewing
    try {
      await this.#store.remove(this.#name)
    } catch (error) {
      if (!(error instanceof VarveError)) throw error
      this.#log('warn', 'The writer could not remove its registration.', { error: error.message })
    }
  }

  #write(): Promise<void> {
    const body = {
      started: this.#started,
      renewed: new Date().toISOString(),
      host: hostname(),
      pid: process.pid,
    }
    return this.#store.put(this.#name, Buffer.from(`${JSON.stringify(body)}\n`))
  }
}
