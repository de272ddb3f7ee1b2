/**
 * The path policy: which file an image may name as its backing file (or as a part of itself). The one place where
 * a name out of an image becomes a path that is opened.
 *
 * Rules, for every name that an image gives:
 * - Only a regular file, only inside the folder tree of the image that the user named or of a folder that the user
 *   allowed, judged after all symbolic links are followed.
 * - Never below /dev, /proc or /sys, whatever was allowed.
 * - No URI, no `json:`, no other pseudo-protocol.
 * - A format that the image does not name is never probed: a guest could write a header into its own disk and so
 *   have the host open what it likes.
 * The image that the user names is under no policy: who names it may read it.
 */
import { realpath, stat } from 'node:fs/promises'
import { dirname, isAbsolute, resolve, sep } from 'node:path'
import { fromSystem, isVarveError, VarveError } from '../base/index.ts'
import { type HostFileDevice, openHostFile } from '../device/index.ts'
import type { BackingReference } from '../formats/index.ts'

/** Folders in which backing files may lie, as real paths. */
export interface PathPolicy {
  readonly folders: readonly string[]
}

/** An image's place: `path` as it was named (absolute), `real` with every link followed. */
export interface ImagePlace {
  readonly path: string
  readonly real: string
}

/** @throws NOT_FOUND, ACCESS_DENIED */
export async function imagePlace(path: string): Promise<ImagePlace> {
  const absolute = resolve(path)
  try {
    return { path: absolute, real: await realpath(absolute) }
  } catch (error) {
    throw fromSystem(error, 'open', path)
  }
}

/** The policy for a chain whose top is `top`. @throws NOT_FOUND when an allowed folder is not there */
export async function pathPolicy(top: ImagePlace, allowBacking: readonly string[] = []): Promise<PathPolicy> {
  const folders = new Set([dirname(top.real)])
  for (const folder of [dirname(top.path), ...allowBacking]) {
    try {
      folders.add(await realpath(resolve(folder)))
    } catch (error) {
      throw fromSystem(error, 'allow backing files in', folder)
    }
  }
  return { folders: [...folders] }
}

export interface OpenedBacking {
  readonly file: HostFileDevice
  readonly place: ImagePlace
}

/**
 * Opens the file that `image` names, for reading. Of several names the first that is allowed and there is taken.
 * @throws BACKING_DENIED, BACKING_MISSING, UNSUPPORTED (a URI), ACCESS_DENIED, IO
 */
export async function openBacking(
  policy: PathPolicy,
  image: ImagePlace,
  reference: Pick<BackingReference, 'name' | 'otherNames'>,
  what: 'backing file' | 'data file' = 'backing file',
): Promise<OpenedBacking> {
  const refusals: VarveError[] = []
  for (const name of [reference.name, ...(reference.otherNames ?? [])]) {
    try {
      return await openNamed(policy, image, name, what)
    } catch (error) {
      if (!isVarveError(error, 'BACKING_DENIED', 'BACKING_MISSING', 'UNSUPPORTED')) throw error
      refusals.push(error)
    }
  }
  // A denial says what the user can do; "not there" says more than "not a path".
  for (const code of ['BACKING_DENIED', 'BACKING_MISSING'] as const) {
    const first = refusals.find((refusal) => refusal.code === code)
    if (first) throw first
  }
  throw refusals[0]
}

async function openNamed(
  policy: PathPolicy,
  image: ImagePlace,
  name: string,
  what: string,
): Promise<OpenedBacking> {
  const fields = { image: image.path, backing: name }
  const missing = (cause?: unknown): VarveError =>
    new VarveError('BACKING_MISSING', `Cannot open ${what} of ${image.path}: found no file ${quote(name)}`, {
      fields,
      cause,
    })
  if (name === '' || name.includes('\0')) {
    throw new VarveError(
      'BACKING_DENIED',
      `Cannot open ${what} of ${image.path}: found the name ${quote(name)}`,
      {
        fields,
      },
    )
  }
  if (hasProtocol(name)) {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open ${what} of ${image.path}: found ${quote(name)}, expected a path`,
      {
        fields,
        hint: 'Backing files that are URIs or pseudo-protocols are not followed; rebase the image on a file.',
      },
    )
  }
  // Names are relative to the image as it was named (qemu) or as it really lies (libvhd); mostly the same folder.
  const paths = isAbsolute(name)
    ? [resolve(name)]
    : [...new Set([image.path, image.real].map((from) => resolve(dirname(from), name)))]
  for (const path of paths) {
    let real: string
    try {
      real = await realpath(path)
    } catch (error) {
      // Of what lies outside, not even whether it is there is told.
      if (!isAllowed(policy, path)) throw denied(policy, image, { name, path, what })
      const code = (error as NodeJS.ErrnoException).code
      if (code === 'ENOENT' || code === 'ENOTDIR') continue
      if (code === 'ELOOP' || code === 'ENAMETOOLONG') throw missing(error)
      throw fromSystem(error, `open ${what}`, path)
    }
    if (!isAllowed(policy, real)) throw denied(policy, image, { name, path: real, what })
    const stats = await stat(real).catch((error: unknown) => {
      throw fromSystem(error, `open ${what}`, real)
    })
    if (!stats.isFile()) {
      throw new VarveError(
        'BACKING_DENIED',
        `Cannot open ${what} of ${image.path}: ${real} is no regular file`,
        {
          fields: { ...fields, path: real },
        },
      )
    }
    const file = await openHostFile(real, { noFollow: true })
    if (file.kind !== 'file') {
      await file[Symbol.asyncDispose]()
      throw denied(policy, image, { name, path: real, what })
    }
    return { file, place: { path: real, real } }
  }
  throw missing()
}

/** `scheme:` before the first slash, as qemu takes it: `nbd:…`, `json:{…}`, `file:…`, also a drive letter. */
function hasProtocol(name: string): boolean {
  return /^[A-Za-z0-9+.-]+:/.test(name)
}

const NEVER = ['/dev', '/proc', '/sys']

function isAllowed(policy: PathPolicy, path: string): boolean {
  return (
    !NEVER.some((folder) => isInside(folder, path)) && policy.folders.some((folder) => isInside(folder, path))
  )
}

function isInside(folder: string, path: string): boolean {
  return path === folder || path.startsWith(folder.endsWith(sep) ? folder : folder + sep)
}

function denied(
  policy: PathPolicy,
  image: ImagePlace,
  { name, path, what }: { name: string; path: string; what: string },
): VarveError {
  return new VarveError(
    'BACKING_DENIED',
    `Cannot open ${what} of ${image.path}: found ${quote(name)}, expected it inside ${policy.folders.join(' or ')}`,
    {
      fields: { image: image.path, backing: name, path },
      ...(NEVER.some((folder) => isInside(folder, path))
        ? { hint: 'A device or a file of /dev, /proc or /sys is never opened because an image names it.' }
        : {}),
    },
  )
}

/** Names out of an image are shown with everything unprintable escaped, and cut. */
function quote(name: string): string {
  return JSON.stringify(name.length > 200 ? `${name.slice(0, 200)}…` : name)
}
