/**
 * A regular file or a block device of this host, as a device: the bottom of every chain.
 *
 * Rules:
 * - `extents` is exact where the host tells holes from data (SEEK_DATA/SEEK_HOLE). A hole is `zero`, and only a
 *   hole is: preallocated or written space is `data` unless the kernel itself calls it a hole. When the file turns
 *   out shorter than it was at open, that is an I/O error, never a hole.
 * - `flush` is fdatasync, and of the folder too when the file may be new. A flush that failed stays failed: the
 *   kernel drops the pages that it could not write, so a later success would be a lie.
 * - The descriptor is closed only after every call under way has ended: its number may be another file's next.
 * - Data never goes through koffi: Node's own positioned reads and writes are as fast.
 */
import {
  close as fsClose,
  fdatasync as fsDatasync,
  read as fsRead,
  fstat as fsStat,
  ftruncate as fsTruncate,
  write as fsWrite,
} from 'node:fs'
import { dirname } from 'node:path'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { alignDown, alignUp, fromSystem, throwIfAborted, VarveError } from '../../base/index.ts'
import { type Extent, ExtentList, type HostFile, type HostPlace } from '../../extents/index.ts'
import {
  checkExtentRange,
  checkOpen,
  checkRange,
  type Features,
  type ResizableBlockDevice,
} from '../block-device.ts'
import { syncFolder } from './sync-folder.ts'
import { type Advice, FALLOCATE, mayHaveSystemCalls, systemCalls } from './system-calls.ts'
import { isNotOffered } from './system-error.ts'

/** What `openHostFile` found out about the file that it opened. */
export interface OpenedHostFile {
  readonly path: string
  readonly fd: number
  readonly kind: 'file' | 'block'
  readonly size: number
  readonly blockSize: number
  readonly write: boolean
  /** The folder's entry may be new: the first flush makes it durable as well. */
  readonly maybeNew: boolean
}

/** One system call moves at most this much; the kernel itself stops short of 2 GiB. */
const MOST_PER_CALL = 1 << 30
/** `extents` answers at most this many at once, … */
const MOST_EXTENTS = 4096
/** … and stops after this long, so that a cold or remote file system does not hold up the event loop. */
const EXTENTS_MS = 5
const ZEROS: Uint8Array = new Uint8Array(1 << 20)

export class HostFileDevice implements ResizableBlockDevice {
  readonly blockSize: number
  readonly features: Features
  /** `path` is absolute. The descriptor is good until this device is disposed of. */
  readonly file: HostFile
  readonly kind: 'file' | 'block'
  readonly #maybeNew: boolean
  #folderSynced = false
  #size: number
  #closed: Promise<void> | undefined
  #busy = 0
  #whenIdle: (() => void) | undefined
  #flushFailure: VarveError | undefined

  /** Takes over the descriptor. Use `openHostFile`. */
  constructor(opened: OpenedHostFile) {
    this.file = { path: opened.path, fd: opened.fd }
    this.kind = opened.kind
    this.blockSize = opened.blockSize
    this.#size = opened.size
    this.#maybeNew = opened.maybeNew
    const isFile = opened.kind === 'file'
    this.features = {
      write: opened.write,
      resize: opened.write && isFile,
      sparse: isFile && mayHaveSystemCalls(),
      places: true,
    }
  }

  get path(): string {
    return this.file.path
  }

  get size(): number {
    return this.#size
  }

  get isDisposed(): boolean {
    return this.#closed !== undefined
  }

  /** Bytes that the host holds for it (st_blocks); a block device holds all of its size. */
  async allocatedBytes(): Promise<number> {
    checkOpen(this.#closed)
    if (this.kind === 'block') return this.#size
    return await this.#use('stat', async () => {
      const { blocks } = await stat(this.file.fd)
      return blocks * 512
    })
  }

  async read(offset: number, into: Uint8Array, signal?: AbortSignal): Promise<void> {
    checkOpen(this.#closed)
    checkRange(this.#size, offset, into.length)
    await this.#use('read', async () => {
      for (let done = 0; done < into.length; ) {
        throwIfAborted(signal)
        const wanted = Math.min(into.length - done, MOST_PER_CALL)
        const got = await pread(this.file.fd, into, done, wanted, offset + done)
        if (got === 0) throw this.#endsAt(offset + done)
        done += got
      }
    })
  }

  async extents(offset: number, length: number, signal?: AbortSignal): Promise<readonly Extent[]> {
    checkOpen(this.#closed)
    checkExtentRange(this.#size, offset, length)
    throwIfAborted(signal)
    return await this.#use('map', async () => {
      const list = new ExtentList()
      if (this.features.sparse) {
        const started = performance.now()
        this.#seekExtents(list, offset, offset + length, started + EXTENTS_MS)
        if (list.last?.kind === 'zero') await this.#checkSize()
        if (performance.now() - started >= EXTENTS_MS) await nextTurn()
      }
      if (list.count === 0) list.add(offset, length, 'data', { file: this.file, offset })
      return list.finish()
    })
  }

  async write(offset: number, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
    this.#checkWritable()
    checkRange(this.#size, offset, bytes.length)
    await this.#use('write', () => this.#writeAll(offset, bytes, signal))
  }

  async zero(offset: number, length: number, signal?: AbortSignal): Promise<void> {
    this.#checkWritable()
    checkRange(this.#size, offset, length)
    throwIfAborted(signal)
    if (length === 0) return
    await this.#use('zero', async () => {
      if (this.kind === 'file') {
        if (!(await this.#fallocate(FALLOCATE.punchHole | FALLOCATE.keepSize, offset, length))) {
          await this.#writeZeros(offset, length, signal)
        }
        return
      }
      // A block device takes whole sectors only; 4096 serves those that say 512 and mean 4096.
      const start = alignUp(offset, Math.max(this.blockSize, 4096))
      const end = alignDown(offset + length, Math.max(this.blockSize, 4096))
      if (
        start < end &&
        ((await this.#fallocate(FALLOCATE.punchHole | FALLOCATE.keepSize, start, end - start)) ||
          (await this.#fallocate(FALLOCATE.zeroRange | FALLOCATE.keepSize, start, end - start)))
      ) {
        await this.#writeZeros(offset, start - offset, signal)
        await this.#writeZeros(end, offset + length - end, signal)
      } else {
        await this.#writeZeros(offset, length, signal)
      }
    })
  }

  async flush(signal?: AbortSignal): Promise<void> {
    this.#checkWritable()
    throwIfAborted(signal)
    if (this.#flushFailure) throw this.#flushFailure
    try {
      await this.#use('flush', async () => {
        await datasync(this.file.fd)
        if (this.#maybeNew && !this.#folderSynced) {
          await syncFolder(dirname(this.file.path))
          this.#folderSynced = true
        }
      })
    } catch (error) {
      this.#flushFailure = fromSystem(error, 'flush', this.file.path)
      throw this.#flushFailure
    }
  }

  async resize(size: number, signal?: AbortSignal): Promise<void> {
    this.#checkWritable()
    if (!Number.isSafeInteger(size) || size < 0) throw new RangeError(`size ${size} is not a size`)
    throwIfAborted(signal)
    if (!this.features.resize) {
      throw new VarveError(
        'UNSUPPORTED',
        `Cannot resize ${this.file.path}: found a block device, expected a file`,
        { fields: { path: this.file.path } },
      )
    }
    await this.#use('resize', () => truncate(this.file.fd, size))
    this.#size = size
  }

  /**
   * Tells the kernel how this range will be read or that it is not needed in memory any more. A hint: where it
   * cannot be given, nothing happens.
   */
  advise(advice: Advice, offset = 0, length = 0): void {
    checkOpen(this.#closed)
    try {
      systemCalls()?.advise(this.file.fd, offset, length, advice)
    } catch (error) {
      if (!isNotOffered(error)) throw fromSystem(error, 'advise', this.file.path)
    }
  }

  /**
   * Lets the kernel copy from another file into this one: shares blocks where the file system can (reflink),
   * else copies inside the kernel. Returns the bytes that stand here now, counted from `offset`: fewer than
   * `length`, 0 included, when the host cannot do the rest; the caller then copies that by read and write.
   * @throws NO_SPACE, IO as `write` does
   */
  async copyFrom(from: HostPlace, offset: number, length: number, signal?: AbortSignal): Promise<number> {
    this.#checkWritable()
    checkRange(this.#size, offset, length)
    return await this.#use('copy into', () => copyInKernel(from, this.file, offset, length, signal))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed ??= this.#close()
    await this.#closed
  }

  async #close(): Promise<void> {
    if (this.#busy > 0) {
      await new Promise<void>((resolve) => {
        this.#whenIdle = resolve
      })
    }
    try {
      await close(this.file.fd)
    } catch (error) {
      throw fromSystem(error, 'close', this.file.path)
    }
  }

  /** Runs `work` with the descriptor kept open, and turns what it throws into one of ours. */
  async #use<T>(doing: string, work: () => Promise<T>): Promise<T> {
    this.#busy++
    try {
      return await work()
    } catch (error) {
      throw fromSystem(error, doing, this.file.path)
    } finally {
      if (--this.#busy === 0) this.#whenIdle?.()
    }
  }

  #checkWritable(): void {
    checkOpen(this.#closed)
    if (!this.features.write) {
      throw new VarveError(
        'READ_ONLY',
        `Cannot write ${this.file.path}: found it opened for reading, expected for writing`,
        { fields: { path: this.file.path } },
      )
    }
  }

  #endsAt(offset: number): VarveError {
    return new VarveError(
      'IO',
      `Cannot read ${this.file.path}: found its end at ${offset}, expected ${this.#size} bytes`,
      { fields: { path: this.file.path, offset } },
    )
  }

  /** A hole up to the end is believed only while the file is as long as it was. */
  async #checkSize(): Promise<void> {
    const { size } = await stat(this.file.fd)
    if (size < this.#size) throw this.#endsAt(size)
  }

  /** Adds the extents of `[offset, end)` until all are there or enough is. */
  #seekExtents(list: ExtentList, offset: number, end: number, deadline: number): void {
    const calls = systemCalls()
    if (!calls) return
    const { fd } = this.file
    let at = offset
    try {
      while (at < end) {
        const data = calls.seekData(fd, at) ?? end
        if (data > at) {
          const stop = Math.min(data, end)
          list.add(at, stop - at, 'zero')
          at = stop
          if (at === end) break
        }
        // Past a hole that somebody fills or makes at this moment the two answers may disagree: never stand still.
        const stop = Math.min(Math.max(calls.seekHole(fd, at) ?? end, at + 1), end)
        list.add(at, stop - at, 'data', { file: this.file, offset: at })
        at = stop
        if (at < end && (list.count >= MOST_EXTENTS || performance.now() > deadline)) return
      }
    } catch (error) {
      if (!isNotOffered(error)) throw error
      // What is known so far is right; with nothing known, the caller answers `data` for all.
    }
  }

  async #fallocate(mode: number, offset: number, length: number): Promise<boolean> {
    const calls = systemCalls()
    if (!calls) return false
    try {
      await calls.fallocate(this.file.fd, mode, offset, length)
      return true
    } catch (error) {
      if (isNotOffered(error)) return false
      throw error
    }
  }

  async #writeAll(offset: number, bytes: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
    for (let done = 0; done < bytes.length; ) {
      throwIfAborted(signal)
      const wanted = Math.min(bytes.length - done, MOST_PER_CALL)
      done += await pwrite(this.file.fd, bytes, done, wanted, offset + done)
    }
  }

  /** Zeros by writing them, but not over holes, which are zero already and would only cost space. */
  async #writeZeros(offset: number, length: number, signal: AbortSignal | undefined): Promise<void> {
    const end = offset + length
    for (let at = offset; at < end; ) {
      const list = new ExtentList()
      if (this.features.sparse) this.#seekExtents(list, at, end, performance.now() + EXTENTS_MS)
      if (list.count === 0) list.add(at, end - at, 'data')
      for (const extent of list.finish()) {
        at = extent.offset + extent.length
        if (extent.kind === 'zero') continue
        for (let from = extent.offset; from < at; from += ZEROS.length) {
          await this.#writeAll(from, ZEROS.subarray(0, Math.min(ZEROS.length, at - from)), signal)
        }
      }
    }
  }
}

/** One call of copy_file_range, so that an abort is seen in good time. */
const COPY_BYTES = 64 << 20

async function copyInKernel(
  from: HostPlace,
  to: HostFile,
  offset: number,
  length: number,
  signal: AbortSignal | undefined,
): Promise<number> {
  const calls = systemCalls()
  if (!calls) return 0
  const call = { fromFd: from.file.fd, toFd: to.fd }
  // Reflink wants whole blocks; 4096 is the smallest block of a file system that has it. The rest is copied.
  const shared = (from.offset - offset) % 4096 === 0 && offset % 4096 === 0 ? alignDown(length, 4096) : 0
  let done = 0
  if (shared > 0) {
    throwIfAborted(signal)
    try {
      await calls.cloneRange({ ...call, fromOffset: from.offset, toOffset: offset, length: shared })
      done = shared
    } catch (error) {
      if (!isNotOffered(error)) throw error
    }
  }
  while (done < length) {
    throwIfAborted(signal)
    try {
      const moved = await calls.copyFileRange({
        ...call,
        fromOffset: from.offset + done,
        toOffset: offset + done,
        length: Math.min(length - done, COPY_BYTES),
      })
      if (moved === 0) break
      done += moved
    } catch (error) {
      if (!isNotOffered(error)) throw error
      break
    }
  }
  return done
}

function pread(fd: number, into: Uint8Array, start: number, length: number, at: number): Promise<number> {
  return new Promise((resolve, reject) => {
    fsRead(fd, into, start, length, at, (error, count) => (error ? reject(error) : resolve(count)))
  })
}

function pwrite(fd: number, bytes: Uint8Array, start: number, length: number, at: number): Promise<number> {
  return new Promise((resolve, reject) => {
    fsWrite(fd, bytes, start, length, at, (error, count) => (error ? reject(error) : resolve(count)))
  })
}

function stat(fd: number): Promise<{ size: number; blocks: number }> {
  return new Promise((resolve, reject) => {
    fsStat(fd, (error, stats) => (error ? reject(error) : resolve(stats)))
  })
}

function datasync(fd: number): Promise<void> {
  return new Promise((resolve, reject) => {
    fsDatasync(fd, (error) => (error ? reject(error) : resolve()))
  })
}

function truncate(fd: number, size: number): Promise<void> {
  return new Promise((resolve, reject) => {
    fsTruncate(fd, size, (error) => (error ? reject(error) : resolve()))
  })
}

function close(fd: number): Promise<void> {
  return new Promise((resolve, reject) => {
    fsClose(fd, (error) => (error ? reject(error) : resolve()))
  })
}
