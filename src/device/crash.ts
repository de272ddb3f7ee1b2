/**
 * A device whose power can fail at any moment, afterwards: it passes every call on, keeps all of them, and builds
 * the contents that could stand on the medium after a power loss. Borrows the device below. For tests; everything
 * written is held in memory.
 *
 * The model. A call counts from its first tick (issued) to its second (resolved):
 * - A write, zero or resize that resolved before a flush was called, that flush having resolved before the loss, is
 *   there. Nothing else is promised.
 * - Each other one that was issued is there, not there, or (writes, zeros) there in part: each sector on its own,
 *   in any combination. A sector is whole, old or new.
 * - Those that are there apply in the order in which they were issued, as one file's page cache has them.
 * - A resize counts as one such call: bytes written past a size that was lost are lost with it, and bytes between
 *   a shorter and a longer size are zero.
 * Several devices on one `CrashClock` lose power at the same moment; between them there is no order but flushes.
 */
import { throwIfAborted, VarveError } from '../base/index.ts'
import type { Extent } from '../extents/index.ts'
import {
  asWritable,
  checkOpen,
  type Features,
  isResizable,
  type ResizableBlockDevice,
  readBytes,
  type WritableBlockDevice,
} from './block-device.ts'

/** One clock for all devices that lose power together. */
export class CrashClock {
  #now = 0

  /** The last tick. Power can fail after each tick from 0 (before everything) to this one. */
  get now(): number {
    return this.#now
  }

  tick(): number {
    return ++this.#now
  }
}

/**
 * What becomes of calls that no flush made safe: `none` is there, `all` is, or each by the dice (`next` in [0, 1)):
 * a third lost, a third there, a third torn.
 */
export type Survival = 'none' | 'all' | { next(): number }

interface Change {
  readonly issued: number
  resolved: number
  readonly offset: number
  /** Bytes written; a number: that many zeros; undefined: a resize to `offset`. */
  readonly content: Uint8Array | number | undefined
}

interface Flush {
  readonly called: number
  resolved: number
}

export class CrashDevice implements ResizableBlockDevice {
  readonly features: Features
  readonly clock: CrashClock
  readonly #inner: WritableBlockDevice
  readonly #initial: Uint8Array
  readonly #changes: Change[] = []
  readonly #flushes: Flush[] = []
  #disposed = false

  private constructor(inner: WritableBlockDevice, initial: Uint8Array, clock: CrashClock) {
    this.#inner = inner
    this.#initial = initial
    this.clock = clock
    this.features = inner.features
  }

  /** Starts to record over `inner`, whose whole content (taken as durable) is read into memory. */
  static async over(inner: WritableBlockDevice, clock: CrashClock = new CrashClock()): Promise<CrashDevice> {
    return new CrashDevice(inner, await readBytes(inner, 0, inner.size), clock)
  }

  get size(): number {
    return this.#inner.size
  }

  get blockSize(): number {
    return this.#inner.blockSize
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    await this.#inner.read(offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#disposed)
    return await this.#inner.extents(offset, length, signal)
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    await this.#change(offset, bytes.slice(), signal, () =>
      asWritable(this.#inner).write(offset, bytes, signal),
    )
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    await this.#change(offset, length, signal, () => asWritable(this.#inner).zero(offset, length, signal))
  }

  async flush(signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    const inner = asWritable(this.#inner)
    throwIfAborted(signal)
    const flush: Flush = { called: this.clock.tick(), resolved: Number.POSITIVE_INFINITY }
    await inner.flush(signal)
    flush.resolved = this.clock.tick()
    this.#flushes.push(flush)
  }

  async resize(size: number, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#disposed)
    const inner = this.#inner
    if (!isResizable(inner)) throw new VarveError('UNSUPPORTED', 'Cannot resize: the device has one size')
    await this.#change(size, undefined, signal, () => inner.resize(size, signal))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
  }

  /** What could stand on the medium when the power failed just after `tick`. A new array each time. */
  contentAfterLoss(tick: number, survival: Survival): Uint8Array {
    let safeBefore = 0
    for (const flush of this.#flushes)
      if (flush.resolved <= tick) safeBefore = Math.max(safeBefore, flush.called)
    let content: Uint8Array = this.#initial.slice()
    for (const change of this.#changes) {
      if (change.issued > tick) break
      const safe = change.resolved < safeBefore
      content = apply(content, change, safe ? 'all' : survival, this.blockSize)
    }
    return content
  }

  async #change(
    offset: number,
    content: Change['content'],
    signal: AbortSignal | undefined,
    work: () => Promise<void>,
  ): Promise<void> {
    checkOpen(this.#disposed)
    throwIfAborted(signal)
    const change: Change = { issued: this.clock.tick(), resolved: Number.POSITIVE_INFINITY, offset, content }
    this.#changes.push(change)
    // One that fails stays unresolved for ever: it may be there, whole or in part.
    await work()
    change.resolved = this.clock.tick()
  }
}

function apply(before: Uint8Array, change: Change, survival: Survival, sector: number): Uint8Array {
  const dice = typeof survival === 'string' ? survival : DICE[Math.floor(survival.next() * 3)]!
  if (dice === 'none') return before
  const { offset, content } = change
  if (content === undefined) {
    const after = new Uint8Array(offset)
    after.set(before.subarray(0, offset))
    return after
  }
  const end = Math.min(offset + (typeof content === 'number' ? content : content.length), before.length)
  for (let at = offset; at < end; ) {
    const stop = Math.min(at - (at % sector) + sector, end)
    if (dice === 'all' || (typeof survival !== 'string' && survival.next() < 0.5)) {
      if (typeof content === 'number') before.fill(0, at, stop)
      else before.set(content.subarray(at - offset, stop - offset), at)
    }
    at = stop
  }
  return before
}

const DICE = ['none', 'all', 'torn'] as const
