/**
 * Fails the calls that its rules match: a bad sector, a full disk, a medium that goes away. Borrows the device
 * below.
 */
import { VarveError } from '../base/index.ts'
import type { Extent } from '../extents/index.ts'
import {
  asWritable,
  type BlockDevice,
  checkOpen,
  checkRange,
  type Features,
  isResizable,
  type ResizableBlockDevice,
} from './block-device.ts'

export type FaultCall = 'read' | 'extents' | 'write' | 'zero' | 'flush' | 'resize'

/** Matches a call when all that it names is so. */
export interface FaultRule {
  /** Default: every call but `extents`. */
  readonly calls?: readonly FaultCall[]
  /** Only calls that touch a byte of `[start, end)`; flush and resize touch none. */
  readonly range?: { readonly start: number; readonly end: number }
  /** Only the n-th call (from 1) that matches the rest of the rule; default: each. */
  readonly nth?: number
  /** From the n-th on rather than the n-th alone. */
  readonly andLater?: boolean
  /** A failing write first writes this many of its bytes. Default 0. */
  readonly partialBytes?: number
  /** Default: an IO error that names the call. */
  readonly error?: Error
}

export interface FaultOptions {
  readonly rules?: readonly FaultRule[]
  /** Short of space: after this many bytes written in all, writes stop short and throw NO_SPACE. */
  readonly spaceBytes?: number
}

export class FaultDevice implements ResizableBlockDevice {
  readonly features: Features
  readonly #inner: BlockDevice
  readonly #rules: { readonly rule: FaultRule; matched: number }[]
  #spaceBytes: number
  #failures = 0
  #disposed = false

  constructor(inner: BlockDevice, options: FaultOptions = {}) {
    this.#inner = inner
    this.#rules = (options.rules ?? []).map((rule) => ({ rule, matched: 0 }))
    this.#spaceBytes = options.spaceBytes ?? Number.POSITIVE_INFINITY
    this.features = inner.features
  }

  get size(): number {
    return this.#inner.size
  }

  get blockSize(): number {
    return this.#inner.blockSize
  }

  /** How many calls were failed: a test that expects a fault asserts that it happened. */
  get failures(): number {
    return this.#failures
  }

  addRule(rule: FaultRule): void {
    this.#rules.push({ rule, matched: 0 })
  }

  clearRules(): void {
    this.#rules.length = 0
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#use(offset, into.length)
    const fault = this.#match('read', offset, into.length)
    if (fault) throw this.#fail('read', offset, fault)
    await this.#inner.read(offset, into, signal)
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    this.#use(offset, length)
    const fault = this.#match('extents', offset, length)
    if (fault) throw this.#fail('extents', offset, fault)
    return await this.#inner.extents(offset, length, signal)
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    const inner = this.#use(offset, bytes.length)
    const fault = this.#match('write', offset, bytes.length)
    if (fault) {
      await asWritable(inner).write(offset, bytes.subarray(0, fault.partialBytes ?? 0), signal)
      throw this.#fail('write', offset, fault)
    }
    const fits = Math.min(bytes.length, this.#spaceBytes)
    this.#spaceBytes -= fits
    await asWritable(inner).write(offset, bytes.subarray(0, fits), signal)
    if (fits < bytes.length) {
      this.#failures++
      throw new VarveError('NO_SPACE', `Cannot write at ${offset + fits}: no space left`)
    }
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    const inner = this.#use(offset, length)
    const fault = this.#match('zero', offset, length)
    if (fault) throw this.#fail('zero', offset, fault)
    await asWritable(inner).zero(offset, length, signal)
  }

  async flush(signal?: AbortSignal): Promise<void> {
    const inner = this.#use(0, 0)
    const fault = this.#match('flush', 0, 0)
    if (fault) throw this.#fail('flush', 0, fault)
    await asWritable(inner).flush(signal)
  }

  async resize(size: number, signal?: AbortSignal): Promise<void> {
    const inner = this.#use(0, 0)
    const fault = this.#match('resize', 0, 0)
    if (fault) throw this.#fail('resize', 0, fault)
    if (!isResizable(inner)) throw new VarveError('UNSUPPORTED', 'Cannot resize: the device has one size')
    await inner.resize(size, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
  }

  #use(offset: number, length: number): BlockDevice {
    checkOpen(this.#disposed)
    checkRange(this.#inner.size, offset, length)
    return this.#inner
  }

  #match(call: FaultCall, offset: number, length: number): FaultRule | undefined {
    for (const entry of this.#rules) {
      const { calls, range, nth, andLater } = entry.rule
      if (calls ? !calls.includes(call) : call === 'extents') continue
      if (range && !(offset < range.end && offset + length > range.start)) continue
      entry.matched++
      if (nth === undefined || entry.matched === nth || (andLater && entry.matched > nth)) return entry.rule
    }
    return undefined
  }

  #fail(call: FaultCall, offset: number, rule: FaultRule): Error {
    this.#failures++
    return (
      rule.error ??
      new VarveError('IO', `Cannot ${call} at ${offset}: fault made on purpose`, { fields: { offset } })
    )
  }
}
