/** Names of disks and points, and where their manifests stand: `points/<disk>/<ulid>`. */
import { VarveError } from '../base/index.ts'
import type { RepositoryKeys } from './keys.ts'

export const POINTS = 'points/'
/** What a file system takes as one name, less some room for suffixes. */
const MOST_FOLDER_NAME = 240

/** Throws USAGE unless `disk` can be the name of a disk. */
export function checkDiskName(disk: string): void {
  if (disk === '' || /\p{Cc}/u.test(disk) || plainFolder(disk).length > MOST_FOLDER_NAME) {
    throw new VarveError(
      'USAGE',
      `Cannot use ${JSON.stringify(disk)} as the name of a disk: expected 1 to ${MOST_FOLDER_NAME} letters and no control characters`,
    )
  }
}

/** In an encrypted repository folder names tell nothing. */
export function diskFolder(keys: RepositoryKeys, disk: string): string {
  return keys.sealing === 'none' ? plainFolder(disk) : keys.opaqueName(disk)
}

function plainFolder(disk: string): string {
  return Array.from(new TextEncoder().encode(disk), (byte, i) => {
    const letter = String.fromCharCode(byte)
    const plain = /[A-Za-z0-9_-]/.test(letter) || (letter === '.' && i > 0)
    return plain ? letter : `%${byte.toString(16).toUpperCase().padStart(2, '0')}`
  }).join('')
}

export function manifestPath(keys: RepositoryKeys, disk: string, point: string): string {
  return `${POINTS}${diskFolder(keys, disk)}/${point}`
}

/** The id of the point whose manifest stands at `path`. */
export function pointOf(path: string): string {
  return path.slice(-26)
}
