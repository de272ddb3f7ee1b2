/** Counts calls and bytes, and lists them on request: I/O cost is asserted in tests. Borrows the device below. */
import type { Extent } from '../extents/index.ts'
import {
  asWritable,
  type BlockDevice,
  checkOpen,
  type Features,
  type WritableBlockDevice,
} from './block-device.ts'

export interface Counts {
  readonly reads: number
  readonly bytesRead: number
  readonly writes: number
  readonly bytesWritten: number
  readonly zeros: number
  readonly bytesZeroed: number
  readonly flushes: number
  readonly extentCalls: number
}

/** One call that was made; `length` 0 for a flush. */
export interface RecordedCall {
  readonly call: 'read' | 'write' | 'zero' | 'flush' | 'extents'
  readonly offset: number
  readonly length: number
}

type Writable<T> = { -readonly [K in keyof T]: T[K] }

const NONE: Counts = {
  reads: 0,
  bytesRead: 0,
  writes: 0,
  bytesWritten: 0,
  zeros: 0,
  bytesZeroed: 0,
  flushes: 0,
  extentCalls: 0,
}

export class CountingDevice implements WritableBlockDevice {
  readonly features: Features
  readonly #inner: BlockDevice
  #counts: Writable<Counts> = { ...NONE }
  readonly #calls: RecordedCall[] | undefined
  #disposed = false

  /** `record: true` keeps every call for `calls`. */
  constructor(inner: BlockDevice, options: { readonly record?: boolean } = {}) {
    this.#inner = inner
    this.#calls = options.record ? [] : undefined
    this.features = { ...inner.features, resize: false }
  }

  get size(): number {
    return this.#inner.size
  }

  get blockSize(): number {
    return this.#inner.blockSize
  }

  /** What was asked for so far, failed calls included: a copy. */
  get counts(): Counts {
    return { ...this.#counts }
  }

  get reads(): number {
    return this.#counts.reads
  }
  get bytesRead(): number {
    return this.#counts.bytesRead
  }
  get writes(): number {
    return this.#counts.writes
  }
  get bytesWritten(): number {
    return this.#counts.bytesWritten
  }

  /** In the order of the calls; empty unless made with `record: true`. */
  get calls(): readonly RecordedCall[] {
    return this.#calls ?? []
  }

  /** Counts from zero again. */
  reset(): void {
    this.#counts = { ...NONE }
    if (this.#calls) this.#calls.length = 0
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#record('read', offset, into.length)
    this.#counts.reads++
    this.#counts.bytesRead += into.length
    await this.#inner.read(offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    this.#record('extents', offset, length)
    this.#counts.extentCalls++
    return await this.#inner.extents(offset, length, signal)
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#record('write', offset, bytes.length)
    this.#counts.writes++
    this.#counts.bytesWritten += bytes.length
    await asWritable(this.#inner).write(offset, bytes, signal)
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    this.#record('zero', offset, length)
    this.#counts.zeros++
    this.#counts.bytesZeroed += length
    await asWritable(this.#inner).zero(offset, length, signal)
  }

  async flush(signal?: AbortSignal): Promise<void> {
    this.#record('flush', 0, 0)
    this.#counts.flushes++
    await asWritable(this.#inner).flush(signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
  }

  #record(call: RecordedCall['call'], offset: number, length: number): void {
    checkOpen(this.#disposed)
    this.#calls?.push({ call, offset, length })
  }
}
