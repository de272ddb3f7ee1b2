/**
 * Makes an image file so that it is either there, whole and durable, or not there at all.
 *
 * Order (each step durable before the next where it says "sync"): make a file of a temporary name in the target's
 * folder; fill it; flush it (sync); give it its name (link, or rename with `force`); sync the folder. A process
 * that dies on the way leaves at most a file named `.NAME.varve-XXXX.tmp`.
 *
 * A block device is written in place: there is no other way, so it asks for `force`.
 */
import { randomBytes } from 'node:crypto'
import { link, realpath, rename, stat, unlink } from 'node:fs/promises'
import { basename, dirname, join, resolve } from 'node:path'
import { alignUp, type Context, fromSystem, throwIfAborted, VarveError } from '../base/index.ts'
import { type HostFileDevice, openHostFile, syncFolder, type WritableBlockDevice } from '../device/index.ts'
import { type CreateOptions, formatByName, type ImageFormat } from '../formats/index.ts'

export interface CreateImageOptions extends Context {
  /** Name of a format that can be created. */
  readonly format: string
  readonly virtualSize: number
  /** Replace a file that is there; write over a block device. Default false. */
  readonly force?: boolean | undefined
  readonly settings?: CreateOptions['settings'] | undefined
}

export interface CreatedImage {
  /** To be filled; reads as zeros until then when `isZero`. Not to be disposed of. */
  readonly target: WritableBlockDevice
  readonly isZero: boolean
}

/**
 * Creates the image `path`, calls `fill`, and makes the result durable. When `fill` throws, nothing is left (a
 * block device: is left half written).
 * @throws USAGE, EXISTS, UNSUPPORTED, NO_SPACE, LOCKED, ACCESS_DENIED, IO, and what `fill` throws
 */
export async function createImage<T>(
  path: string,
  options: CreateImageOptions,
  fill: (image: CreatedImage) => Promise<T>,
): Promise<T> {
  const format = creatableFormat(options.format)
  const there = await lookAt(path)
  if (there && !options.force) {
    throw new VarveError('EXISTS', `Cannot create ${path}: it exists already`, { fields: { path } })
  }
  if (there?.kind === 'block') return await fillDevice(path, format, options, fill)
  const final = there?.real ?? resolve(path)
  const temporary = join(
    dirname(final),
    `.${basename(final).slice(0, 200)}.varve-${randomBytes(6).toString('hex')}.tmp`,
  )
  const file = await openHostFile(temporary, {
    create: true,
    exclusive: true,
    ...(there ? { mode: there.mode } : {}),
  })
  try {
    const result = await fillFile(file, format, options, fill)
    throwIfAborted(options.signal)
    try {
      if (options.force) await rename(temporary, final)
      else await giveName(temporary, final)
    } catch (error) {
      throw fromSystem(error, 'create', final)
    }
    await syncFolder(dirname(final))
    return result
  } catch (error) {
    await file[Symbol.asyncDispose]().catch(() => {})
    await unlink(temporary).catch(() => {})
    throw error
  }
}

function creatableFormat(name: string): ImageFormat {
  const format = formatByName(name)
  if (!format) {
    throw new VarveError(
      'USAGE',
      `Cannot create image: found format ${JSON.stringify(name)}, expected one that is known`,
    )
  }
  if (!format.create) {
    throw new VarveError('UNSUPPORTED', `Cannot create image: format ${format.name} can only be read`)
  }
  return format
}

async function fillFile<T>(
  file: HostFileDevice,
  format: ImageFormat,
  options: CreateImageOptions,
  fill: (image: CreatedImage) => Promise<T>,
): Promise<T> {
  // Containers count in sectors; raw alone can have any size.
  const virtualSize = format.name === 'raw' ? options.virtualSize : alignUp(options.virtualSize, 512)
  await using layer = await format.create!(file, {
    signal: options.signal,
    log: options.log,
    virtualSize,
    ...(options.settings ? { settings: options.settings } : {}),
  })
  // The file itself where the format adds nothing: the copy engine knows what to do with a host file.
  const result = await fill({ target: format.name === 'raw' ? file : layer, isZero: true })
  await layer.flush(options.signal)
  return result
}

async function fillDevice<T>(
  path: string,
  format: ImageFormat,
  options: CreateImageOptions,
  fill: (image: CreatedImage) => Promise<T>,
): Promise<T> {
  if (format.name !== 'raw') {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot create ${format.name} image on block device ${path}: only raw fits there`,
    )
  }
  await using device = await openHostFile(path, { write: true })
  if (device.size < options.virtualSize) {
    throw new VarveError(
      'NO_SPACE',
      `Cannot write ${path}: found a device of ${device.size} bytes, expected at least ${options.virtualSize}`,
      { fields: { path, size: device.size, needed: options.virtualSize } },
    )
  }
  const result = await fill({ target: device, isZero: false })
  await device.flush(options.signal)
  return result
}

interface There {
  readonly kind: 'file' | 'block'
  /** With links followed, so that a link is kept and what it leads to is replaced. */
  readonly real: string
  readonly mode: number
}

async function lookAt(path: string): Promise<There | undefined> {
  try {
    const stats = await stat(path)
    if (!stats.isFile() && !stats.isBlockDevice()) {
      throw new VarveError(
        'UNSUPPORTED',
        `Cannot create ${path}: what stands there is no file and no block device`,
        {
          fields: { path },
        },
      )
    }
    return {
      kind: stats.isFile() ? 'file' : 'block',
      real: await realpath(path),
      mode: stats.mode & 0o777,
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw fromSystem(error, 'create', path)
  }
}

/** A hard link never replaces what came in the meantime. File systems without links get a rename. */
async function giveName(temporary: string, final: string): Promise<void> {
  try {
    await link(temporary, final)
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code
    if (code !== 'EPERM' && code !== 'ENOTSUP' && code !== 'EOPNOTSUPP' && code !== 'ENOSYS') throw error
    if (await lookAt(final)) {
      throw new VarveError('EXISTS', `Cannot create ${final}: it exists already`, { fields: { path: final } })
    }
    await rename(temporary, final)
    return
  }
  await unlink(temporary)
}
