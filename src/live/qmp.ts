/**
 * QMP client: QEMU's machine protocol over a UNIX socket, one JSON document a line.
 *
 * Specification: QEMU's docs/interop/qmp-spec. Rules: the greeting is awaited and capabilities are negotiated before
 * anything is sent; an answer is matched to its command by `id`; a line, and all that is kept unread, is bounded; when
 * the connection ends, every command that still waits fails. Events are handed to a listener and never awaited.
 */
import { createConnection, type Socket } from 'node:net'
import { fromSystem, throwIfAborted, VarveError } from '../base/index.ts'

export interface QmpOptions {
  readonly signal?: AbortSignal | undefined
  /** How long one command may take, in milliseconds. Default 30 000. */
  readonly timeoutMs?: number
  readonly onEvent?: (event: QmpEvent) => void
}

export interface QmpEvent {
  readonly event: string
  readonly data: Readonly<Record<string, unknown>>
}

type Json = Readonly<Record<string, unknown>>

interface Waiting {
  readonly command: string
  readonly resolve: (value: unknown) => void
  readonly reject: (error: unknown) => void
}

/** One line: a report on thousands of nodes is a few MiB. */
const MOST_LINE_BYTES = 268_435_456
const TIMEOUT_MS = 30_000

/** Connects to the QMP socket at `path`. The caller disposes of it. @throws NOT_FOUND, ACCESS_DENIED, IO, UNSUPPORTED */
export async function connectQmp(path: string, options: QmpOptions = {}): Promise<Qmp> {
  const socket = createConnection({ path })
  try {
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve)
      socket.once('error', reject)
    })
  } catch (error) {
    socket.destroy()
    throw fromSystem(error, 'connect to', path)
  }
  const qmp = new Qmp(socket, path, options)
  try {
    await qmp.start()
    return qmp
  } catch (error) {
    await qmp[Symbol.asyncDispose]()
    throw error
  }
}

export class Qmp implements AsyncDisposable {
  readonly #socket: Socket
  readonly #path: string
  readonly #options: QmpOptions
  readonly #waiting = new Map<number, Waiting>()
  readonly #greeting = Promise.withResolvers<Json>()
  #parts: Buffer[] = []
  #partBytes = 0
  #nextId = 1
  #ended: VarveError | undefined

  constructor(socket: Socket, path: string, options: QmpOptions) {
    this.#socket = socket
    this.#path = path
    this.#options = options
    // Handled where it is awaited; without this an end before that would be an unhandled rejection.
    this.#greeting.promise.catch(() => {})
    socket.on('data', (chunk: Buffer) => this.#take(chunk))
    socket.on('error', (error) => this.#end(fromSystem(error, 'talk to', path)))
    socket.on('close', () => this.#end(this.#closed()))
  }

  /** Waits for the greeting and leaves negotiation mode. */
  async start(): Promise<void> {
    const greeting = await this.#within(this.#greeting.promise, 'its greeting')
    if (typeof greeting['QMP'] !== 'object') {
      throw new VarveError(
        'UNSUPPORTED',
        `Cannot talk to ${this.#path}: found another greeting, expected QMP's`,
        {
          fields: { path: this.#path },
          hint: 'Give the socket of a QMP monitor (-qmp unix:PATH,server=on,wait=off).',
        },
      )
    }
    await this.execute('qmp_capabilities')
  }

  /**
   * Runs `command` and gives back what it returns.
   * @throws IO with what QEMU said (`fields.class`, `fields.desc`), or when the connection ends; CANCELLED
   */
  async execute(command: string, args?: Json): Promise<unknown> {
    if (this.#ended) throw this.#ended
    throwIfAborted(this.#options.signal)
    const id = this.#nextId++
    const { promise, reject, resolve } = Promise.withResolvers<unknown>()
    this.#waiting.set(id, { command, resolve, reject })
    this.#socket.write(`${JSON.stringify({ execute: command, ...(args ? { arguments: args } : {}), id })}\n`)
    try {
      return await this.#within(promise, `the answer to ${command}`)
    } finally {
      this.#waiting.delete(id)
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#socket.destroyed) return
    await new Promise<void>((resolve) => {
      this.#socket.once('close', () => resolve())
      this.#socket.destroy()
    })
  }

  async #within<T>(promise: Promise<T>, what: string): Promise<T> {
    const { signal, timeoutMs = TIMEOUT_MS } = this.#options
    const { promise: stopped, reject } = Promise.withResolvers<never>()
    const timer = setTimeout(() => {
      reject(
        new VarveError('IO', `Cannot talk to ${this.#path}: found no sign of ${what} in ${timeoutMs} ms`, {
          fields: { path: this.#path },
          hint: 'A QMP socket serves one client at a time; is another one connected?',
        }),
      )
    }, timeoutMs)
    const onAbort = (): void => reject(signal?.reason)
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      return await Promise.race([promise, stopped])
    } finally {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
    }
  }

  #take(chunk: Buffer): void {
    let from = 0
    for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, from)) {
      const line = Buffer.concat([...this.#parts, chunk.subarray(from, end)]).toString()
      this.#parts = []
      this.#partBytes = 0
      from = end + 1
      if (line.trim() !== '') this.#line(line)
    }
    const rest = chunk.subarray(from)
    if (rest.length === 0) return
    this.#parts.push(rest)
    this.#partBytes += rest.length
    if (this.#partBytes > MOST_LINE_BYTES) {
      this.#fail(`found a line of more than ${MOST_LINE_BYTES} bytes`)
    }
  }

  #line(line: string): void {
    let message: Json
    try {
      const value = JSON.parse(line) as unknown
      if (typeof value !== 'object' || value === null) throw new TypeError('not an object')
      message = value as Json
    } catch {
      this.#greeting.resolve({})
      return this.#fail('found a line that is no JSON object')
    }
    if ('QMP' in message) return this.#greeting.resolve(message)
    if (typeof message['event'] === 'string') {
      const data = message['data']
      this.#options.onEvent?.({
        event: message['event'],
        data: typeof data === 'object' && data !== null ? (data as Json) : {},
      })
      return
    }
    const waiting = this.#waiting.get(message['id'] as number)
    if (!waiting) {
      if (!('id' in message) && 'error' in message)
        this.#fail(`found an error without id: ${describe(message['error'])}`)
      return
    }
    if ('return' in message) return waiting.resolve(message['return'])
    const error = (message['error'] ?? {}) as Json
    const desc = describe(error)
    waiting.reject(
      new VarveError('IO', `Cannot run ${waiting.command} in QEMU: ${desc}`, {
        fields: { path: this.#path, command: waiting.command, class: String(error['class']), desc },
        hint: 'QEMU refused; the message is its own.',
      }),
    )
  }

  #closed(): VarveError {
    return new VarveError('IO', `Cannot talk to ${this.#path}: the connection ended`, {
      fields: { path: this.#path },
      hint: 'The QEMU process ended, or closed its monitor.',
    })
  }

  #fail(found: string): void {
    this.#end(
      new VarveError('IO', `Cannot talk to ${this.#path}: ${found}, expected QMP`, {
        fields: { path: this.#path },
      }),
    )
    this.#socket.destroy()
  }

  #end(error: VarveError): void {
    if (this.#ended) return
    this.#ended = error
    this.#greeting.reject(error)
    for (const { reject } of this.#waiting.values()) reject(error)
    this.#waiting.clear()
  }
}

function describe(error: unknown): string {
  const desc = (error as Json | undefined)?.['desc']
  return typeof desc === 'string' ? desc : 'an error without description'
}
