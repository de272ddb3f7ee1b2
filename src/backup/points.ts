/** Finds and lists points. */
import { isVarveError, mapBounded, VarveError } from '../base/index.ts'
import type { PointInfo, PointName } from './contract.ts'
import type { RepositoryKeys } from './keys.ts'
import { type ManifestFacts, readFacts } from './manifest.ts'
import { checkDiskName, diskFolder, POINTS, pointOf } from './names.ts'
import type { BlobStore } from './store/blob-store.ts'
import { isUlid, ulidTime } from './ulid.ts'

const READS_UNDER_WAY = 8

/** Paths of all manifests, or of one disk's; sorted by folder, then by time. */
export async function manifestPaths(
  store: BlobStore,
  keys: RepositoryKeys,
  disk?: string,
): Promise<string[]> {
  const prefix = disk === undefined ? POINTS : `${POINTS}${diskFolder(keys, disk)}/`
  return (await store.list(prefix)).filter((path) => isUlid(path.slice(-26)) && path.at(-27) === '/')
}

/**
 * The manifest that `name` means.
 * @throws NOT_FOUND; USAGE when a prefix fits several points
 */
export async function findManifest(store: BlobStore, keys: RepositoryKeys, name: PointName): Promise<string> {
  checkDiskName(name.disk)
  const paths = await manifestPaths(store, keys, name.disk)
  if (paths.length === 0) {
    throw new VarveError('NOT_FOUND', `Cannot find disk ${name.disk}: the repository has no point of it`, {
      fields: { disk: name.disk },
    })
  }
  if (name.point.toLowerCase() === 'latest') return paths.at(-1)!
  const wanted = name.point.toUpperCase()
  const fitting = wanted === '' ? [] : paths.filter((path) => pointOf(path).startsWith(wanted))
  if (fitting.length > 1) {
    throw new VarveError(
      'USAGE',
      `Cannot choose a point of ${name.disk}: ${fitting.length} ids begin with ${name.point}`,
    )
  }
  if (fitting.length === 0) {
    throw new VarveError('NOT_FOUND', `Cannot find point ${name.point} of disk ${name.disk}`, {
      fields: { disk: name.disk, point: name.point },
    })
  }
  return fitting[0]!
}

export function pointInfo(facts: ManifestFacts): PointInfo {
  return {
    disk: facts.disk,
    point: facts.point,
    created: facts.created,
    virtualSize: facts.virtualSize,
    blockBytes: facts.blockBytes,
    inUseBytes: facts.inUseBytes,
    storedBytes: facts.storedBytes,
    readBytes: facts.readBytes,
    changedBytes: facts.changedBytes,
    newChunks: facts.newChunks,
    reusedChunks: facts.reusedChunks,
    seconds: facts.seconds,
    regions: facts.regions ?? null,
    about: facts.about ?? null,
  }
}

/** Facts of every point; one whose manifest cannot be read has `error` and no figures. */
export async function listPoints(
  store: BlobStore,
  keys: RepositoryKeys,
  disk: string | undefined,
): Promise<{ path: string; info: PointInfo }[]> {
  const diskOfFolder = new Map<string, string>()
  const paths = await manifestPaths(store, keys, disk)
  const read = await mapBounded(paths, READS_UNDER_WAY, async (path) => {
    try {
      const facts = await readFacts(store, keys, path)
      diskOfFolder.set(folderOf(path), facts.disk)
      return { path, info: pointInfo(facts) }
    } catch (error) {
      if (!isVarveError(error)) throw error
      // Removed by another program since it was listed.
      if (error.code === 'NOT_FOUND') return undefined
      return { path, info: damagedInfo(disk ?? '', pointOf(path), error) }
    }
  })
  const points = read.filter((point) => point !== undefined)
  const named = points.map(({ path, info }) =>
    info.error && info.disk === ''
      ? {
          path,
          info: { ...info, disk: diskOfFolder.get(folderOf(path)) ?? nameOfFolder(keys, folderOf(path)) },
        }
      : { path, info },
  )
  const key = (info: PointInfo): string => `${info.disk}\0${info.point}`
  return named.sort((a, b) => (key(a.info) < key(b.info) ? -1 : 1))
}

function folderOf(path: string): string {
  return path.slice(POINTS.length, -27)
}

function nameOfFolder(keys: RepositoryKeys, folder: string): string {
  if (keys.sealing !== 'none') return folder
  try {
    return decodeURIComponent(folder)
  } catch {
    return folder
  }
}

function damagedInfo(disk: string, point: string, error: VarveError): PointInfo {
  return {
    disk,
    point,
    created: new Date(ulidTime(point)).toISOString(),
    virtualSize: 0,
    blockBytes: 512,
    inUseBytes: 0,
    storedBytes: 0,
    readBytes: 0,
    changedBytes: 0,
    newChunks: 0,
    reusedChunks: 0,
    seconds: 0,
    regions: null,
    about: null,
    error,
  }
}
