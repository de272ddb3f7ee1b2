/**
 * The worker threads of a repository: started on first use, kept until the repository is closed, never keeping the
 * process alive while they have nothing to do.
 */
import { availableParallelism } from 'node:os'
import { extname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import { type ErrorCode, type ErrorFields, VarveError } from '../base/index.ts'
import type { DurablePack, Engine, EngineSetup } from './engine.ts'

type Methods = Pick<Engine, 'hash' | 'store' | 'flush' | 'abort' | 'decode' | 'verifyPack' | 'close'>
type Argument<M extends keyof Methods> = Parameters<Methods[M]>[0]
type Answer<M extends keyof Methods> = Awaited<ReturnType<Methods[M]>>

export type Call = {
  [M in keyof Methods]: { readonly call: number; readonly method: M; readonly argument: Argument<M> }
}[keyof Methods]

export type Reply =
  | { readonly pack: DurablePack }
  | { readonly call: number; readonly value: unknown }
  | { readonly call: number; readonly error: PackedError }

interface PackedError {
  readonly code: ErrorCode | undefined
  readonly message: string
  readonly stack: string | undefined
  readonly fields: ErrorFields
}

/** Errors lose their class on the way between threads, so their facts travel instead. */
export function packError(error: unknown): PackedError {
  if (error instanceof VarveError)
    return { code: error.code, message: error.message, stack: error.stack, fields: error.fields }
  const plain = error instanceof Error ? error : new Error(String(error))
  return { code: undefined, message: plain.message, stack: plain.stack, fields: {} }
}

function unpackError(packed: PackedError): Error {
  if (packed.code === undefined) {
    const error = new Error(packed.message)
    error.stack = packed.stack ?? ''
    return error
  }
  return new VarveError(packed.code, packed.message, { fields: packed.fields })
}

/** A processor each, but never so many that their buffers make the process large. */
const MOST_WORKERS = 4
const MOST_SPARE_BUFFERS = 8

export class WorkerPool implements AsyncDisposable {
  readonly size: number
  readonly #setup: EngineSetup
  readonly #lanes: Lane[] = []
  /** Told of every pack that became durable. One backup at a time listens. */
  onPack: (pack: DurablePack) => void = () => {}

  readonly #buffers: ArrayBuffer[] = []

  constructor(setup: EngineSetup, size: number | undefined) {
    this.#setup = setup
    this.size = Math.max(1, Math.min(size ?? Math.min(availableParallelism(), MOST_WORKERS), 64))
  }

  /** A buffer of `bytes` (always the same number) with anything in it. */
  takeBuffer(bytes: number): ArrayBuffer {
    return this.#buffers.pop() ?? new ArrayBuffer(bytes)
  }

  giveBuffer(buffer: ArrayBuffer): void {
    if (this.#buffers.length < MOST_SPARE_BUFFERS) this.#buffers.push(buffer)
  }

  /** Worker `index` of `size`. */
  lane(index: number): Lane {
    let lane = this.#lanes[index]
    // A thread that died took what was under way with it; the next piece of work gets a new one.
    if (!lane || lane.isDead) {
      lane = new Lane(this.#setup, (pack) => this.onPack(pack))
      this.#lanes[index] = lane
    }
    return lane
  }

  /** The worker with the least to do. */
  idlest(among: number = this.size): Lane {
    let best = 0
    for (let i = 0; i < among; i++) {
      const load = this.#lanes[i]?.load ?? 0
      if (load === 0) return this.lane(i)
      if (load < this.lane(best).load) best = i
    }
    return this.lane(best)
  }

  /** Runs on every worker that was started. */
  async everywhere(method: 'flush' | 'abort'): Promise<void> {
    const results = await Promise.allSettled(this.#lanes.map((lane) => lane.call(method, undefined)))
    for (const result of results) if (result.status === 'rejected') throw result.reason
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.#lanes.splice(0).map((lane) => lane.close()))
  }
}

interface Waiting {
  readonly resolve: (value: never) => void
  readonly reject: (error: unknown) => void
}

export class Lane {
  readonly #worker: Worker
  readonly #waiting = new Map<number, Waiting>()
  #calls = 0
  #failure: Error | undefined

  constructor(setup: EngineSetup, onPack: (pack: DurablePack) => void) {
    // The same file in sources (.ts) and in the package (.js).
    const entry = new URL(`./worker${extname(fileURLToPath(import.meta.url))}`, import.meta.url)
    // Flags of the process that speak of its main module (--eval, --input-type, --test) are not for a worker.
    this.#worker = new Worker(entry, { workerData: setup, name: 'varve-repository', execArgv: [] })
    this.#worker.unref()
    this.#worker.on('message', (reply: Reply) => {
      if ('pack' in reply) onPack(reply.pack)
      else this.#settle(reply)
    })
    this.#worker.on('error', (error) => this.#fail(error as Error))
    this.#worker.on('exit', (code) => this.#fail(new Error(`a worker thread ended with code ${code}`)))
  }

  get isDead(): boolean {
    return this.#failure !== undefined
  }

  /** Calls that have not been answered. */
  get load(): number {
    return this.#waiting.size
  }

  call<M extends keyof Methods>(
    method: M,
    argument: Argument<M>,
    transfer: readonly ArrayBuffer[] = [],
  ): Promise<Answer<M>> {
    if (this.#failure) return Promise.reject(this.#failure)
    const call = ++this.#calls
    return new Promise<Answer<M>>((resolve, reject) => {
      if (this.#waiting.size === 0) this.#worker.ref()
      this.#waiting.set(call, { resolve, reject })
      this.#worker.postMessage({ call, method, argument }, [...transfer])
    })
  }

  async close(): Promise<void> {
    try {
      await this.call('close', undefined)
    } catch {
      // It failed before; whoever called it then knows.
    }
    this.#failure ??= new Error('the repository is closed')
    await this.#worker.terminate()
  }

  #settle(reply: Exclude<Reply, { pack: unknown }>): void {
    const waiting = this.#waiting.get(reply.call)
    this.#waiting.delete(reply.call)
    if (this.#waiting.size === 0) this.#worker.unref()
    if (!waiting) return
    if ('error' in reply) waiting.reject(unpackError(reply.error))
    else waiting.resolve(reply.value as never)
  }

  #fail(error: Error): void {
    this.#failure ??= error
    for (const waiting of this.#waiting.values()) waiting.reject(this.#failure)
    this.#waiting.clear()
  }
}
