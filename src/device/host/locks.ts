/**
 * Advisory locks: `lockFile` for a lock file of our own (a repository's writers), `lockImage` for an image that
 * QEMU may have open.
 *
 * Both are open-file-description locks: they belong to the open file, not to the process (two openings in one
 * process exclude each other too), and the kernel drops them when the process dies, however it dies.
 *
 * Images use QEMU's own scheme (its block/file-posix.c), so that a running VM's disk is never written here and a
 * disk that we write is not started: one byte per permission, all locks shared, and a conflict is looked for by
 * asking whether an exclusive lock on the opposite byte could be had.
 *
 *   byte 100 + n   held by everyone who uses permission n
 *   byte 200 + n   held by everyone who does not let others use permission n
 *   n              0 consistent read, 1 write, 2 write unchanged, 3 resize
 *
 * Where the host has no such locks: `lockFile` makes `<path>.held` instead, which a crash leaves behind;
 * `lockImage` says so (`enforced: false`).
 */
import { close, constants, open } from 'node:fs'
import { link, readFile, unlink, writeFile } from 'node:fs/promises'
import { hostname } from 'node:os'
import { resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fromSystem, VarveError } from '../../base/index.ts'
import type { HostFileDevice } from './host-file.ts'
import { type LockType, systemCalls } from './system-calls.ts'
import { isNotOffered, SystemError } from './system-error.ts'

export interface FileLock extends AsyncDisposable {
  readonly path: string
  readonly type: LockType
}

export interface LockFileOptions {
  /** Try for this long before giving up, in milliseconds. Default 0: once. */
  readonly waitMs?: number
  readonly signal?: AbortSignal | undefined
}

/**
 * Locks the file `path`, which is made when it is not there and stays when the lock is gone. Any number may hold it
 * `shared`, or one `exclusive`. Held until disposed of, or until the process ends.
 * @throws LOCKED when another holds it; ACCESS_DENIED, READ_ONLY, NO_SPACE, IO
 */
export async function lockFile(
  path: string,
  type: LockType,
  options: LockFileOptions = {},
): Promise<FileLock> {
  const absolute = resolve(path)
  const deadline = performance.now() + (options.waitMs ?? 0)
  for (let pauseMs = 5; ; pauseMs = Math.min(pauseMs * 2, 250)) {
    const lock = await tryLock(absolute, type)
    if (lock) return lock
    const leftMs = deadline - performance.now()
    if (leftMs <= 0) throw await lockedBy(absolute, type)
    try {
      await sleep(Math.min(pauseMs, leftMs), undefined, { signal: options.signal })
    } catch (cause) {
      throw new VarveError('CANCELLED', `Cannot lock ${absolute}: interrupted`, { cause })
    }
  }
}

async function tryLock(path: string, type: LockType): Promise<FileLock | undefined> {
  const calls = systemCalls()
  if (!calls) return await hold(path, type)
  const fd = await openLockFile(path, type)
  try {
    calls.setLock(fd, type, { start: 0, length: 0 })
  } catch (error) {
    await closeFile(fd)
    if (isHeld(error)) return undefined
    if (isNotOffered(error) || (error instanceof SystemError && error.code === 'ENOLCK'))
      return await hold(path, type)
    throw fromSystem(error, 'lock', path)
  }
  let held = true
  return {
    path,
    type,
    async [Symbol.asyncDispose]() {
      // Closing the only descriptor of the open file drops its locks.
      if (held) await closeFile(fd)
      held = false
    },
  }
}

async function openLockFile(path: string, type: LockType): Promise<number> {
  try {
    return await openFile(path, constants.O_RDWR | constants.O_CREAT)
  } catch (error) {
    // Whoever may only read can still hold a shared lock on a file that is there.
    const code = (error as NodeJS.ErrnoException).code
    if (type === 'exclusive' || !['EACCES', 'EPERM', 'EROFS'].includes(code ?? ''))
      throw fromSystem(error, 'lock', path)
  }
  try {
    return await openFile(path, constants.O_RDONLY)
  } catch (error) {
    throw fromSystem(error, 'lock', path)
  }
}

/**
 * The plain path: a file whose existence is the lock, whole from its first moment (linked into place). Shared locks
 * exclude each other here; nobody takes over a file that was left behind, because no test for that is free of races.
 */
async function hold(path: string, type: LockType): Promise<FileLock | undefined> {
  const held = heldPath(path)
  const temporary = `${held}.${process.pid}.${performance.now()}`
  try {
    await writeFile(temporary, `${process.pid} ${hostname()}\n`, { flag: 'wx' })
    try {
      await link(temporary, held)
    } finally {
      await unlink(temporary)
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return undefined
    throw fromSystem(error, 'lock', path)
  }
  let mine = true
  return {
    path,
    type,
    async [Symbol.asyncDispose]() {
      if (mine) await unlink(held)
      mine = false
    },
  }
}

const heldPath = (path: string): string => `${path}.held`

async function lockedBy(path: string, type: LockType): Promise<VarveError> {
  const holder = await readFile(heldPath(path), 'utf8').catch(() => undefined)
  const fields = { path, type }
  if (holder === undefined) {
    return new VarveError('LOCKED', `Cannot lock ${path}: another program holds it`, { fields })
  }
  const [pid, host] = holder.trim().split(' ')
  return new VarveError('LOCKED', `Cannot lock ${path}: held by process ${pid} on ${host}`, {
    fields,
    hint: `When that process is gone, remove ${heldPath(path)}.`,
  })
}

export interface ImageLock extends Disposable {
  /** False where the host has no such locks: then nothing is held and nothing was checked. */
  readonly enforced: boolean
}

const PERMISSION_BASE = 100
const SHARED_BASE = 200
const CONSISTENT_READ = 0
const WRITE = 1
const WRITE_UNCHANGED = 2
const RESIZE = 3

/**
 * Locks an open image against writers (`write: false`: it will only be read and must stand still) or against all
 * other use (`write: true`), in the way QEMU does. Ends when disposed of or when the image's device is.
 * @throws LOCKED when a VM or another program has the image open in a way that does not go with it
 */
export function lockImage(image: HostFileDevice, { write }: { readonly write: boolean }): ImageLock {
  const { file } = image
  const calls = systemCalls()
  if (!calls) return NOT_ENFORCED
  const uses = write ? [CONSISTENT_READ, WRITE, RESIZE] : [CONSISTENT_READ]
  // A writer lets nobody write or read what changes under its hands; a reader lets nobody write.
  const denies = write ? [CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE] : [WRITE, RESIZE]
  const bytes = [...uses.map((n) => PERMISSION_BASE + n), ...denies.map((n) => SHARED_BASE + n)]
  const unlock = (): void => {
    // Closing it dropped the locks, and its descriptor may be another file's by now.
    if (image.isDisposed) return
    for (const start of bytes) calls.setLock(file.fd, 'none', { start, length: 1 })
  }
  try {
    // First say what we do, then look whether somebody objects: of two at the same time at least one sees the other.
    for (const start of bytes) calls.setLock(file.fd, 'shared', { start, length: 1 })
    const objections = [...uses.map((n) => SHARED_BASE + n), ...denies.map((n) => PERMISSION_BASE + n)]
    const found = objections.find((start) =>
      calls.conflictingLock(file.fd, 'exclusive', { start, length: 1 }),
    )
    if (found !== undefined) throw new SystemError('fcntl(F_OFD_GETLK)', EAGAIN)
  } catch (error) {
    if (isUnlockable(error)) return NOT_ENFORCED
    unlock()
    if (!isHeld(error)) throw fromSystem(error, 'lock', file.path)
    throw new VarveError(
      'LOCKED',
      write
        ? `Cannot write ${file.path}: another program has it open, perhaps a running VM`
        : `Cannot read ${file.path}: another program writes to it, perhaps a running VM`,
      { cause: error, fields: { path: file.path } },
    )
  }
  return { enforced: true, [Symbol.dispose]: unlock }
}

const NOT_ENFORCED: ImageLock = { enforced: false, [Symbol.dispose]() {} }
const EAGAIN = 11

function isHeld(error: unknown): boolean {
  return error instanceof SystemError && (error.code === 'EAGAIN' || error.code === 'EACCES')
}

function isUnlockable(error: unknown): boolean {
  return isNotOffered(error) || (error instanceof SystemError && error.code === 'ENOLCK')
}

function openFile(path: string, flags: number): Promise<number> {
  return new Promise((ok, fail) => {
    open(path, flags, 0o600, (error, fd) => (error ? fail(error) : ok(fd)))
  })
}

function closeFile(fd: number): Promise<void> {
  return new Promise((ok) => close(fd, () => ok()))
}
