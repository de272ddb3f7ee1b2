/**
 * Every call of the operating system that Node itself does not offer, typed, through koffi. Nothing else in varve
 * uses koffi.
 *
 * Rules:
 * - koffi is loaded at the first `systemCalls()` (12 ms), never at import: a verb that needs none does not pay.
 * - `systemCalls()` is undefined where they cannot be had: another system than 64-bit little-endian Linux, koffi
 *   or its binary missing, or VARVE_PLAIN_IO=1 in the environment. Callers then take the plain path.
 * - Each call throws `SystemError`; `isNotOffered` tells "not on this file system" from a true failure.
 * - Offsets and lengths are bytes. EINTR is retried here. What may take long (space is given back, data is
 *   copied) runs on koffi's own threads; the rest answers from memory or by one metadata read, and is synchronous.
 */
import { createRequire } from 'node:module'
import type koffi from 'koffi'
import { SystemError } from './system-error.ts'

export type LockType = 'shared' | 'exclusive'

/** A byte range for a lock; `length` 0 reaches to the end of the file, however it grows. */
export interface LockRange {
  readonly start: number
  readonly length: number
}

export type Advice = 'normal' | 'random' | 'sequential' | 'willneed' | 'dontneed'

export interface CopyCall {
  readonly fromFd: number
  readonly fromOffset: number
  readonly toFd: number
  readonly toOffset: number
  readonly length: number
}

export interface SystemCalls {
  /** First offset at or after `offset` that holds data; undefined when there is none up to the file's end. */
  seekData(fd: number, offset: number): number | undefined
  /** First offset at or after `offset` that is a hole (the file's end counts); undefined past the end. */
  seekHole(fd: number, offset: number): number | undefined
  /** `fallocate(2)`; modes are FALLOCATE. */
  fallocate(fd: number, mode: number, offset: number, length: number): Promise<void>
  /** `copy_file_range(2)`: bytes copied, fewer than asked for when the kernel stops early, 0 at the end. */
  copyFileRange(call: CopyCall): Promise<number>
  /** FICLONERANGE: shares the blocks, all or nothing. Offsets and length are multiples of the block size. */
  cloneRange(call: CopyCall): Promise<void>
  advise(fd: number, offset: number, length: number, advice: Advice): void
  /** `flock(2)` on the whole file, without waiting; EWOULDBLOCK (EAGAIN) when another holds it. */
  flock(fd: number, type: LockType | 'none'): void
  /** Open-file-description lock on a byte range, without waiting; EAGAIN when another holds it. */
  setLock(fd: number, type: LockType | 'none', range: LockRange): void
  /** The type of a lock that would keep `type` from being taken on `range`; undefined when none would. */
  conflictingLock(fd: number, type: LockType, range: LockRange): LockType | undefined
  /** BLKGETSIZE64: bytes of a block device. */
  blockDeviceBytes(fd: number): number
  /** BLKSSZGET: logical sector of a block device, bytes. */
  logicalSectorBytes(fd: number): number
  /** FS_IOC_FIEMAP on a `struct fiemap` laid out by fiemap.ts, filled in place. */
  fiemap(fd: number, request: Uint8Array): void
  /** `umount2(2)`; flags are UMOUNT. */
  umount(path: string, flags: number): void
}

export const FALLOCATE = { keepSize: 0x01, punchHole: 0x02, zeroRange: 0x10 } as const
export const UMOUNT = { force: 1, detach: 2, noFollow: 8 } as const

/** The host's calls, or undefined where they cannot be had. */
export function systemCalls(): SystemCalls | undefined {
  if (forced) return forced.calls
  if (loaded === undefined) loaded = load() ?? 'none'
  return loaded === 'none' ? undefined : loaded
}

/**
 * Whether `systemCalls()` will answer, as far as that can be said without loading anything: true may still turn
 * out wrong where koffi is not installed.
 */
export function mayHaveSystemCalls(): boolean {
  if (forced) return forced.calls !== undefined
  if (loaded !== undefined) return loaded !== 'none'
  return (
    process.env['VARVE_PLAIN_IO'] !== '1' &&
    process.platform === 'linux' &&
    ARCHITECTURES.includes(process.arch)
  )
}

/**
 * For tests: until the result is disposed of, `systemCalls()` answers `calls` (undefined: a host without any).
 */
export function forceSystemCalls(calls: SystemCalls | undefined): Disposable {
  const before = forced
  forced = { calls }
  return {
    [Symbol.dispose]: () => {
      forced = before
    },
  }
}

let loaded: SystemCalls | 'none' | undefined
let forced: { readonly calls: SystemCalls | undefined } | undefined

// The request codes and structures below are those of the kernel's generic layout, which these have in common.
const ARCHITECTURES: readonly string[] = ['x64', 'arm64', 'riscv64', 'loong64']

const SEEK_DATA = 3
const SEEK_HOLE = 4
const BLKGETSIZE64 = 0x80081272
const BLKSSZGET = 0x1268
const FICLONERANGE = 0x4020940d
const FS_IOC_FIEMAP = 0xc020660b
const F_OFD_GETLK = 36
const F_OFD_SETLK = 37
const LOCK_TYPE = { shared: 0, exclusive: 1, none: 2 } as const
const FLOCK_OPERATION = { shared: 1, exclusive: 2, none: 8 } as const
const FLOCK_NO_WAIT = 4
const ADVICE = { normal: 0, random: 1, sequential: 2, willneed: 3, dontneed: 4 } as const

function load(): SystemCalls | undefined {
  if (!mayHaveSystemCalls()) return undefined
  try {
    return bind(createRequire(import.meta.url)('koffi') as typeof koffi)
  } catch {
    // koffi or one of its binaries is not installed, or the C library lacks a function: the plain path is correct.
    return undefined
  }
}

function bind(k: typeof koffi): SystemCalls {
  const libc = k.load(null)
  const lseek = libc.func('int64_t lseek(int fd, int64_t offset, int whence)')
  const fallocate = libc.func('int fallocate(int fd, int mode, int64_t offset, int64_t length)')
  const copyFileRange = libc.func(
    'int64_t copy_file_range(int from, void *fromOffset, int to, void *toOffset, size_t length, uint flags)',
  )
  const fadvise = libc.func('int posix_fadvise(int fd, int64_t offset, int64_t length, int advice)')
  const flock = libc.func('int flock(int fd, int operation)')
  const fcntl = libc.func('int fcntl(int fd, int command, void *argument)')
  const ioctl = libc.func('int ioctl(int fd, ulong request, void *argument)')
  const umount2 = libc.func('int umount2(const char *path, int flags)')

  /** Runs `call` until it is not interrupted; the result, or a SystemError for a negative one. */
  const now = (name: string, call: () => number | bigint): number => {
    for (;;) {
      const result = Number(call())
      if (result >= 0) return result
      const errno = k.errno()
      if (errno !== EINTR) throw new SystemError(name, errno)
    }
  }
  const turn = new Turns(MOST_ON_THREADS)
  /** The same on one of koffi's threads. */
  const later = async (
    name: string,
    fn: { async: (...args: unknown[]) => void },
    ...args: unknown[]
  ): Promise<number> => {
    for (;;) {
      await turn.take()
      const answer = await new Promise<{ result: number; errno: number }>((resolve, reject) => {
        fn.async(...args, (error: unknown, result: number | bigint) => {
          if (error) reject(error)
          // errno is that of the thread which ran the call; koffi hands it over for the time of this callback.
          else resolve({ result: Number(result), errno: Number(result) < 0 ? k.errno() : 0 })
        })
      }).finally(() => turn.give())
      if (answer.result >= 0) return answer.result
      if (answer.errno !== EINTR) throw new SystemError(name, answer.errno)
    }
  }
  const seek = (fd: number, offset: number, whence: number): number | undefined => {
    try {
      return now('lseek', () => lseek(fd, offset, whence))
    } catch (error) {
      if (error instanceof SystemError && error.code === 'ENXIO') return undefined
      throw error
    }
  }

  return {
    seekData: (fd, offset) => seek(fd, offset, SEEK_DATA),
    seekHole: (fd, offset) => seek(fd, offset, SEEK_HOLE),
    async fallocate(fd, mode, offset, length) {
      await later('fallocate', fallocate, fd, mode, offset, length)
    },
    async copyFileRange({ fromFd, fromOffset, toFd, toOffset, length }) {
      const from = BigInt64Array.of(BigInt(fromOffset))
      const to = BigInt64Array.of(BigInt(toOffset))
      return await later('copy_file_range', copyFileRange, fromFd, from, toFd, to, length, 0)
    },
    async cloneRange({ fromFd, fromOffset, toFd, toOffset, length }) {
      // struct file_clone_range { s64 src_fd; u64 src_offset; u64 src_length; u64 dest_offset; }
      const range = BigInt64Array.of(BigInt(fromFd), BigInt(fromOffset), BigInt(length), BigInt(toOffset))
      await later('ioctl(FICLONERANGE)', ioctl, toFd, FICLONERANGE, range)
    },
    advise(fd, offset, length, advice) {
      // posix_fadvise answers the errno itself and leaves `errno` alone.
      const errno = fadvise(fd, offset, length, ADVICE[advice]) as number
      if (errno !== 0) throw new SystemError('posix_fadvise', errno)
    },
    flock(fd, type) {
      now('flock', () => flock(fd, FLOCK_OPERATION[type] | FLOCK_NO_WAIT))
    },
    setLock(fd, type, range) {
      const lock = encodeLock(type, range)
      now('fcntl(F_OFD_SETLK)', () => fcntl(fd, F_OFD_SETLK, lock))
    },
    conflictingLock(fd, type, range) {
      const lock = encodeLock(type, range)
      now('fcntl(F_OFD_GETLK)', () => fcntl(fd, F_OFD_GETLK, lock))
      const found = new DataView(lock.buffer).getInt16(0, true)
      if (found === LOCK_TYPE.none) return undefined
      return found === LOCK_TYPE.exclusive ? 'exclusive' : 'shared'
    },
    blockDeviceBytes(fd) {
      const into = new BigUint64Array(1)
      now('ioctl(BLKGETSIZE64)', () => ioctl(fd, BLKGETSIZE64, into))
      return Number(into[0])
    },
    logicalSectorBytes(fd) {
      const into = new Int32Array(1)
      now('ioctl(BLKSSZGET)', () => ioctl(fd, BLKSSZGET, into))
      return into[0]!
    },
    fiemap(fd, request) {
      now('ioctl(FS_IOC_FIEMAP)', () => ioctl(fd, FS_IOC_FIEMAP, request))
    },
    umount(path, flags) {
      now('umount2', () => umount2(path, flags))
    },
  }
}

const EINTR = 4

/** koffi throws past 256 waiting calls and takes 256 KiB of memory for each; two threads have no use for more. */
const MOST_ON_THREADS = 32

/** Lets so many through at a time, the others in the order in which they came. */
class Turns {
  #free: number
  readonly #waiting: (() => void)[] = []

  constructor(most: number) {
    this.#free = most
  }

  async take(): Promise<void> {
    if (this.#free > 0) this.#free--
    else await new Promise<void>((resolve) => this.#waiting.push(resolve))
  }

  give(): void {
    const next = this.#waiting.shift()
    if (next) next()
    else this.#free++
  }
}

/** struct flock { s16 type; s16 whence (0: from the start); s64 start at 8; s64 length; s32 pid (0 for OFD) }. */
function encodeLock(type: LockType | 'none', range: LockRange): Uint8Array<ArrayBuffer> {
  const view = new DataView(new ArrayBuffer(32))
  view.setInt16(0, LOCK_TYPE[type], true)
  view.setBigInt64(8, BigInt(range.start), true)
  view.setBigInt64(16, BigInt(range.length), true)
  return new Uint8Array(view.buffer)
}
