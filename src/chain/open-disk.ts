/**
 * Opens a chain leaf to root under the path policy.
 *
 * Rule: on every way out but the last, whatever was opened is closed again.
 */
import { stat } from 'node:fs/promises'
import { type Context, fromSystem, LIMITS, VarveError } from '../base/index.ts'
import { type HostFileDevice, openHostFile } from '../device/index.ts'
import {
  type BackingReference,
  formatByName,
  type ImageFormat,
  type ImageLayer,
  probeFormat,
} from '../formats/index.ts'
import { ChainDisk, type Disk, disposeAll, type OpenLayer } from './disk.ts'
import { type ImagePlace, imagePlace, openBacking, type PathPolicy, pathPolicy } from './policy.ts'

export interface OpenDiskOptions extends Context {
  /** Format of the image at `path`; probed by its magic when not given. Needed for raw that starts with a magic. */
  readonly format?: string | undefined
  /** Folders in which backing files may lie, besides the folder tree of the image itself. */
  readonly allowBacking?: readonly string[] | undefined
}

/**
 * Opens the image at `path` with all its backing files, for reading. The caller disposes of the disk.
 * @throws USAGE (unknown `format`), NOT_FOUND, CORRUPT, UNSUPPORTED, ENCRYPTED, LIMIT, BACKING_DENIED,
 * BACKING_MISSING, BACKING_FORMAT, CHAIN_LOOP, CHAIN_DEPTH, MISMATCH (a parent that is not the one recorded)
 */
export async function openDisk(path: string, options: OpenDiskOptions = {}): Promise<Disk> {
  const named = options.format === undefined ? undefined : formatNamedByUser(options.format)
  const top = await imagePlace(path)
  const policy = await pathPolicy(top, options.allowBacking)
  const opened: OpenLayer[] = []
  const seen = new Set<string>()
  try {
    let place = top
    let file = await openHostFile(path)
    let format: ImageFormat | undefined = named
    for (;;) {
      const layer = await openLayer(file, format, place, policy, options)
      try {
        opened.push({ layer, path: place.path, allocatedBytes: await file.allocatedBytes() })
      } catch (error) {
        await layer[Symbol.asyncDispose]()
        throw error
      }
      seen.add(await identity(place.real))
      const { backing } = layer
      if (!backing) break
      if (opened.length >= LIMITS.chainDepth) {
        throw new VarveError(
          'CHAIN_DEPTH',
          `Cannot open ${path}: found more than ${LIMITS.chainDepth} layers`,
          {
            fields: { path, most: LIMITS.chainDepth },
          },
        )
      }
      format = formatOfBacking(backing, place)
      const below = await openBacking(policy, place, backing)
      if (seen.has(await identity(below.place.real))) {
        await below.file[Symbol.asyncDispose]()
        throw new VarveError(
          'CHAIN_LOOP',
          `Cannot open ${path}: found that ${place.path} names ${below.place.path} as its backing file, which stands above it`,
          { fields: { path, image: place.path, backing: below.place.path } },
        )
      }
      ;({ file, place } = below)
    }
    checkIdentities(opened)
    return new ChainDisk(opened)
  } catch (error) {
    await disposeAll(opened.map(({ layer }) => layer)).catch(() => {})
    throw error
  }
}

function formatNamedByUser(name: string): ImageFormat {
  const format = formatByName(name)
  if (format) return format
  throw new VarveError(
    'USAGE',
    `Cannot open image: found format ${JSON.stringify(name)}, expected one that is known`,
    {
      fields: { format: name },
    },
  )
}

/** Opens one image. Takes `file` over: it is closed when this throws. */
async function openLayer(
  file: HostFileDevice,
  named: ImageFormat | undefined,
  place: ImagePlace,
  policy: PathPolicy,
  options: OpenDiskOptions,
): Promise<ImageLayer> {
  try {
    const format = named ?? (await probeFormat(file, options.signal))
    return await format.open(file, {
      signal: options.signal,
      log: options.log,
      openPart: async (name) => (await openBacking(policy, place, { name }, 'data file')).file,
    })
  } catch (error) {
    await file[Symbol.asyncDispose]()
    throw withPath(error, place.path)
  }
}

function formatOfBacking(backing: BackingReference, place: ImagePlace): ImageFormat {
  const fields = { image: place.path, backing: backing.name, format: backing.format }
  if (backing.format === undefined) {
    throw new VarveError(
      'BACKING_FORMAT',
      `Cannot open backing file of ${place.path}: found no format named for it, expected one`,
      { fields },
    )
  }
  const format = formatByName(backing.format)
  if (format) return format
  throw new VarveError(
    'UNSUPPORTED',
    `Cannot open backing file of ${place.path}: found format ${JSON.stringify(backing.format)}, expected one that is known`,
    { fields },
  )
}

/** A parent other than the one that the child was made on would give a disk that never was. */
function checkIdentities(opened: readonly OpenLayer[]): void {
  for (const [depth, { layer, path }] of opened.entries()) {
    const expected = layer.backing?.id
    const below = opened[depth + 1]
    if (expected === undefined || !below || below.layer.id === expected) continue
    throw new VarveError(
      'MISMATCH',
      `Cannot open ${path}: found backing file ${below.path} with identity ${below.layer.id}, expected ${expected}`,
      { fields: { image: path, backing: below.path, found: below.layer.id, expected } },
    )
  }
}

/** Device and inode: two names of one file are one file. */
async function identity(path: string): Promise<string> {
  try {
    const { dev, ino } = await stat(path, { bigint: true })
    return `${dev}:${ino}`
  } catch (error) {
    throw fromSystem(error, 'open', path)
  }
}

/** Formats do not know their file's name; the person needs it. */
function withPath(error: unknown, path: string): unknown {
  if (!(error instanceof VarveError) || error.message.includes(path)) return error
  return new VarveError(error.code, `${error.message} (in ${path})`, {
    cause: error.cause,
    hint: error.hint,
    fields: { path, ...error.fields },
  })
}
