/**
 * Writes to a mounted file system as a busy machine does: files created, grown, rewritten, cut, renamed and
 * deleted, some of them fsync'ed, until told to stop. What it does follows from its seed; when it does it does not.
 */
import { mkdir, open, rename, rm, symlink, truncate } from 'node:fs/promises'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { Random } from '../kit/index.ts'

export interface WorkloadOptions {
  readonly seed: number
  /** Bytes of file content that it keeps, about. */
  readonly keepBytes: number
  /** Largest file; smaller ones are far more common. */
  readonly largestBytes?: number
  /** How many of ten files are fsync'ed. */
  readonly fsyncTenths?: number
  readonly lanes?: number
}

export class Workload {
  readonly #folder: string
  readonly #options: WorkloadOptions
  readonly #random: Random
  readonly #pool: Uint8Array
  readonly #files = new Map<string, number>()
  #bytes = 0
  #serial = 0
  #stopped = false
  #operations = 0
  #lanes: Promise<void> | undefined

  constructor(folder: string, options: WorkloadOptions) {
    this.#folder = folder
    this.#options = options
    this.#random = new Random(options.seed)
    this.#pool = this.#random.bytes(1 << 20)
  }

  /** Operations done so far. */
  get operations(): number {
    return this.#operations
  }

  /** Does `count` operations and returns. */
  async run(count: number): Promise<void> {
    for (let i = 0; i < count; i++) await this.#step()
  }

  /** Goes on in the background until `stop`. */
  start(): void {
    const lane = async (): Promise<void> => {
      while (!this.#stopped) await this.#step()
    }
    this.#lanes = Promise.all(Array.from({ length: this.#options.lanes ?? 3 }, lane)).then(() => {})
    // Seen by stop(); not before, so it must not count as unhandled.
    this.#lanes.catch(() => {})
  }

  async stop(): Promise<void> {
    this.#stopped = true
    await this.#lanes
  }

  async #step(): Promise<void> {
    this.#operations++
    const random = this.#random
    const kind = random.below(20)
    // The lanes never await anything real when there is nothing to take: let the others go on.
    if (this.#operations % 16 === 0) await setImmediate()
    if (this.#bytes > this.#options.keepBytes || (kind < 5 && this.#files.size > 10)) return this.#remove()
    if (kind < 7 && this.#files.size > 10) return this.#rename()
    if (kind < 10 && this.#files.size > 10) return this.#rewrite()
    if (kind === 10) return this.#link()
    return this.#create()
  }

  /** Takes a file out of the list, so that no other lane touches it meanwhile. */
  #take(): [string, number] | undefined {
    const names = [...this.#files.keys()]
    if (names.length === 0) return undefined
    const name = this.#random.pick(names)
    const size = this.#files.get(name)!
    this.#files.delete(name)
    return [name, size]
  }

  async #fresh(): Promise<string> {
    const serial = this.#serial++
    const folder = join(this.#folder, `d${serial % 7}`, `s${(serial >> 5) % 5}`)
    await mkdir(folder, { recursive: true })
    return join(folder, `file-${serial}${'x'.repeat(serial % 60)}`)
  }

  async #create(): Promise<void> {
    const name = await this.#fresh()
    const size = await this.#write(name, 0)
    this.#files.set(name, size)
    this.#bytes += size
  }

  async #rewrite(): Promise<void> {
    const taken = this.#take()
    if (!taken) return
    const [name, size] = taken
    const from = this.#random.below(size + 1)
    const cut = from === 0 || this.#random.below(3) === 0
    if (cut) await truncate(name, from)
    const end = Math.max(from + (await this.#write(name, from)), cut ? 0 : size)
    this.#files.set(name, end)
    this.#bytes += end - size
  }

  async #remove(): Promise<void> {
    const taken = this.#take()
    if (!taken) return
    await rm(taken[0])
    this.#bytes -= taken[1]
  }

  async #rename(): Promise<void> {
    const taken = this.#take()
    if (!taken) return
    const name = await this.#fresh()
    await rename(taken[0], name)
    this.#files.set(name, taken[1])
  }

  async #link(): Promise<void> {
    const name = await this.#fresh()
    await symlink('t'.repeat(1 + this.#random.below(200)), name)
    this.#files.set(name, 0)
    await this.#forgetLink(name)
  }

  /** Links stay, but are not written to. */
  async #forgetLink(name: string): Promise<void> {
    this.#files.delete(name)
    if (this.#random.below(2) === 0) await rm(name)
  }

  async #write(name: string, at: number): Promise<number> {
    const random = this.#random
    const largest = this.#options.largestBytes ?? 1_500_000
    const size = 1 + Math.floor(largest * random.next() ** 4)
    const sync = random.below(10) < (this.#options.fsyncTenths ?? 3)
    const file = await open(name, at === 0 ? 'w' : 'r+')
    try {
      for (let done = 0; done < size; ) {
        const from = random.below(this.#pool.length - 1)
        const part = this.#pool.subarray(from, from + Math.min(size - done, this.#pool.length - from))
        await file.write(part, 0, part.length, at + done)
        done += part.length
      }
      if (sync) await file.sync()
    } finally {
      await file.close()
    }
    return size
  }
}
