/**
 * Opens a file or block device of this host.
 *
 * Rule: nothing but a regular file or a block device is opened. A FIFO would block, a tape would rewind: the kind
 * is looked at before the open (which does not wait, O_NONBLOCK) and again on what was opened.
 */
import { type BigIntStats, close, constants, fstat, open } from 'node:fs'
import { readFile, stat } from 'node:fs/promises'
import { resolve } from 'node:path'
import { fromSystem, isPowerOfTwo, VarveError } from '../../base/index.ts'
import { HostFileDevice } from './host-file.ts'
import { systemCalls } from './system-calls.ts'
import { isNotOffered } from './system-error.ts'

export interface OpenHostFileOptions {
  /** Open for reading and writing. Default: reading. */
  readonly write?: boolean
  /** Make it, empty, when it is not there; implies `write`. What is there already is kept as it is. */
  readonly create?: boolean
  /**
   * With `create`: throws EXISTS when something stands there. Without, for a block device: throws LOCKED when the
   * host uses it (mounted, part of a volume group); this is the default when a block device is opened for writing,
   * so `false` is what someone says who knows better.
   */
  readonly exclusive?: boolean
  /** Permissions of a new file, before umask. Default 0o600: a disk holds everything its owner has. */
  readonly mode?: number
  /** Refuse when the last part of the path is a symbolic link (ACCESS_DENIED). */
  readonly noFollow?: boolean
  /** Logical sector size of the disk in a regular file, bytes; a block device knows its own. Default 512. */
  readonly blockSize?: number
}

/**
 * Opens `path` as a device. The caller disposes of it.
 * @throws NOT_FOUND, EXISTS, ACCESS_DENIED, READ_ONLY, LOCKED, IO; UNSUPPORTED for a folder, FIFO, socket or
 * character device.
 */
export async function openHostFile(path: string, options: OpenHostFileOptions = {}): Promise<HostFileDevice> {
  if (path.includes('\0')) throw new TypeError('path holds a NUL')
  const blockSize = options.blockSize ?? 512
  if (!isPowerOfTwo(blockSize) || blockSize < 512)
    throw new RangeError(`blockSize ${blockSize} is no sector size`)
  const absolute = resolve(path)
  const create = options.create ?? false
  const write = create || (options.write ?? false)
  let fd: number | undefined
  try {
    const before = await kindBefore(absolute, create)
    if (before !== undefined) refuse(before, absolute)
    const exclusive = options.exclusive ?? (write && !create && before === 'block')
    fd = await openDescriptor(
      absolute,
      (write ? constants.O_RDWR : constants.O_RDONLY) |
        (create ? constants.O_CREAT : 0) |
        (exclusive && (create || before === 'block') ? constants.O_EXCL : 0) |
        (options.noFollow ? constants.O_NOFOLLOW : 0) |
        constants.O_NONBLOCK |
        constants.O_NOCTTY,
      options.mode ?? 0o600,
    )
    const stats = await statDescriptor(fd)
    const kind = kindOf(stats)
    refuse(kind, absolute)
    const common = { path: absolute, fd, kind, write, maybeNew: create }
    return new HostFileDevice(
      kind === 'file'
        ? { ...common, size: Number(stats.size), blockSize }
        : { ...common, ...(await blockGeometry(fd, stats.rdev, absolute)) },
    )
  } catch (error) {
    if (fd !== undefined) await closeDescriptor(fd)
    if (options.noFollow && (error as NodeJS.ErrnoException).code === 'ELOOP') {
      throw new VarveError(
        'ACCESS_DENIED',
        `Cannot open ${absolute}: found a symbolic link, expected a file`,
        {
          cause: error,
          fields: { path: absolute },
        },
      )
    }
    throw fromSystem(error, 'open', absolute)
  }
}

type Kind = 'file' | 'block' | 'folder' | 'fifo' | 'socket' | 'character device' | 'unknown kind of file'

function kindOf(stats: BigIntStats): Kind {
  if (stats.isFile()) return 'file'
  if (stats.isBlockDevice()) return 'block'
  if (stats.isDirectory()) return 'folder'
  if (stats.isFIFO()) return 'fifo'
  if (stats.isSocket()) return 'socket'
  return stats.isCharacterDevice() ? 'character device' : 'unknown kind of file'
}

async function kindBefore(path: string, mayBeMissing: boolean): Promise<Kind | undefined> {
  try {
    return kindOf(await stat(path, { bigint: true }))
  } catch (error) {
    if (mayBeMissing && (error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw error
  }
}

function refuse(kind: Kind, path: string): asserts kind is 'file' | 'block' {
  if (kind === 'file' || kind === 'block') return
  throw new VarveError(
    'UNSUPPORTED',
    `Cannot open ${path}: found a ${kind}, expected a regular file or a block device`,
    { fields: { path, kind }, hint: 'Give the path of a disk image or of a block device.' },
  )
}

interface Geometry {
  readonly size: number
  readonly blockSize: number
}

/** Asks the device by ioctl; sysfs (which counts in 512 bytes) is the plain path. */
async function blockGeometry(fd: number, device: bigint, path: string): Promise<Geometry> {
  const calls = systemCalls()
  if (calls) {
    try {
      return { size: calls.blockDeviceBytes(fd), blockSize: calls.logicalSectorBytes(fd) }
    } catch (error) {
      if (!isNotOffered(error)) throw error
    }
  }
  const major = ((device >> 8n) & 0xfffn) | ((device >> 32n) & 0xfffff000n)
  const minor = (device & 0xffn) | ((device >> 12n) & 0xffffff00n)
  const folder = `/sys/dev/block/${major}:${minor}`
  const sectors = await readNumber(`${folder}/size`)
  // A partition has no queue of its own: its disk's is one folder up.
  const blockSize =
    (await readNumber(`${folder}/queue/logical_block_size`)) ??
    (await readNumber(`${folder}/../queue/logical_block_size`))
  if (sectors === undefined || blockSize === undefined) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open ${path}: this host does not tell the size of block devices`,
      {
        fields: { path },
      },
    )
  }
  return { size: sectors * 512, blockSize }
}

async function readNumber(path: string): Promise<number | undefined> {
  try {
    const value = Number((await readFile(path, 'utf8')).trim())
    return Number.isSafeInteger(value) && value >= 0 ? value : undefined
  } catch {
    return undefined
  }
}

// Plain descriptors instead of FileHandles: a handle closes itself when it is collected, under the device's feet.

function openDescriptor(path: string, flags: number, mode: number): Promise<number> {
  return new Promise((ok, fail) => {
    open(path, flags, mode, (error, fd) => (error ? fail(error) : ok(fd)))
  })
}

function statDescriptor(fd: number): Promise<BigIntStats> {
  return new Promise((ok, fail) => {
    fstat(fd, { bigint: true }, (error, stats) => (error ? fail(error) : ok(stats)))
  })
}

function closeDescriptor(fd: number): Promise<void> {
  return new Promise((ok) => close(fd, () => ok()))
}
