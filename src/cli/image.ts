/** The IMAGE argument: a path, or `repo:DISK@POINT`. Opens it, and says what it is in one shape for all verbs. */
import { basename, extname } from 'node:path'
import type { Command } from 'commander'
import { isVarveError, throwIfAborted, VarveError } from '../base/index.ts'
import type { MapEntry } from '../chain/index.ts'
import { allExtents, type BlockDevice, lockImage, openHostFile } from '../device/index.ts'
import { printable } from './output.ts'
import {
  addRepositoryOptions,
  openRepositoryOf,
  parsePointName,
  type RepositoryOptions,
} from './repository.ts'
import { collect, type Host, usageError } from './verb.ts'

export interface ImageOptions extends RepositoryOptions {
  readonly format?: string
  readonly allowBacking?: readonly string[]
}

export function addImageOptions(command: Command): Command {
  return command
    .option('--format <FORMAT>', 'format of IMAGE (else its magic decides)')
    .option('--allow-backing <DIR>', 'folder in which backing files may lie (repeatable)', collect)
}

/** As `addImageOptions`, for verbs that also take `repo:DISK@POINT`. */
export function addAnyImageOptions(command: Command): Command {
  return addRepositoryOptions(addImageOptions(command), { required: false })
}

export interface LayerView {
  readonly path: string
  readonly format: string
  readonly virtualSize: number
  readonly allocatedBytes: number
  readonly depth: number
  /** Facts of the format, for text only: cluster size, version. */
  readonly facts: Readonly<Record<string, string | number | boolean>>
}

/** An opened IMAGE. Owns what it opened. */
export interface Image extends AsyncDisposable {
  /** As the user named it. */
  readonly path: string
  readonly format: string
  readonly device: BlockDevice
  /** Top first. */
  readonly layers: readonly LayerView[]
  /** The name that a backup gives the disk when none is asked for. */
  readonly diskName: string
  /** Extents that cover the disk, neighbours that agree joined. */
  entries(): AsyncIterable<MapEntry>
}

export interface OpenImageOptions {
  /**
   * The image must stand still (what is read will be kept): one that another program writes to is LOCKED, and
   * nobody can begin to while it is open. Default: that is only noted on stderr.
   */
  readonly still?: boolean
}

/** @throws USAGE for an argument of the wrong form, LOCKED with `still`, and whatever opening throws */
export async function openImage(
  argument: string,
  options: ImageOptions,
  host: Host,
  { still = false }: OpenImageOptions = {},
): Promise<Image> {
  throwIfAborted(host.signal)
  if (argument.startsWith('repo:')) return openPointImage(argument, options, host)
  if (/^nbd(\+unix|s)?:\/\//.test(argument)) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open ${argument}: found an NBD address, expected a path or repo:DISK@POINT`,
      { fields: { path: argument }, hint: 'Give the path of the image or block device itself.' },
    )
  }
  const { mapEntries, openDisk } = await import('../chain/index.ts')
  const { signal } = host
  await using stack = new AsyncDisposableStack()
  // The top before it is opened: what is read of it must be true as long as it is open.
  const locks = new Locks(still, host)
  stack.use(locks)
  await locks.add(argument)
  const disk = stack.use(
    await openDisk(argument, { format: options.format, allowBacking: options.allowBacking, signal }),
  )
  for (const { path, depth } of disk.layers) if (depth > 0) await locks.add(path)
  const owned = stack.move()
  return {
    path: argument,
    format: disk.layers[0]!.format,
    device: disk,
    layers: disk.layers,
    diskName: defaultDiskName(argument),
    entries: () => mapEntries(disk, { signal }),
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

/** Holds image files against writers by QEMU's locks, each by an opening of its own. */
class Locks implements AsyncDisposable {
  readonly #still: boolean
  readonly #host: Host
  readonly #files = new AsyncDisposableStack()

  constructor(still: boolean, host: Host) {
    this.#still = still
    this.#host = host
  }

  async add(path: string): Promise<void> {
    const file = this.#files.use(await openHostFile(path))
    try {
      lockImage(file, { write: false })
    } catch (error) {
      if (!isVarveError(error, 'LOCKED')) throw error
      if (this.#still) {
        throw new VarveError('LOCKED', error.message, {
          cause: error,
          fields: error.fields,
          hint: "Take a snapshot of the running VM's disk and give that, or shut the VM down.",
        })
      }
      const { output } = this.#host
      output.note(
        `${output.styleError('yellow', 'varve:')} ${printable(path)} is being written to by another program, perhaps a running VM; what is said about it may be old already`,
      )
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#files.disposeAsync()
  }
}

/** File name without its extension, fit for `DISK@POINT`. */
export function defaultDiskName(path: string): string {
  const name = basename(path)
  return basename(name, extname(name))
}

async function openPointImage(argument: string, options: ImageOptions, host: Host): Promise<Image> {
  const { signal } = host
  if (options.format !== undefined) {
    throw usageError(`Cannot open ${argument}: found --format, expected none: a restore point has no format`)
  }
  const name = parsePointName(argument.slice('repo:'.length))
  await using stack = new AsyncDisposableStack()
  const repository = stack.use(await openRepositoryOf(options, host))
  const device = stack.use(await repository.openPoint(name, { signal }))
  const { info } = device
  const owned = stack.move()
  return {
    path: argument,
    format: 'point',
    device,
    layers: [
      {
        path: `repo:${info.disk}@${info.point}`,
        format: 'point',
        virtualSize: info.virtualSize,
        allocatedBytes: info.inUseBytes,
        depth: 0,
        facts: { created: info.created },
      },
    ],
    diskName: info.disk,
    entries: () => pointEntries(device, signal),
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

async function* pointEntries(device: BlockDevice, signal: AbortSignal): AsyncGenerator<MapEntry> {
  let held: MapEntry | undefined
  for await (const { offset, length, kind } of allExtents(device, 0, device.size, signal)) {
    const present = kind !== 'absent'
    const data = kind === 'data'
    if (held && held.present === present && held.data === data) {
      held = { ...held, length: held.length + length }
      continue
    }
    if (held) yield held
    held = { start: offset, length, depth: 0, present, zero: !data, data }
  }
  if (held) yield held
}
