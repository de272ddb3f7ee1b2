/** Makes the entries of a folder durable: what was created, renamed or removed in it survives power loss. */
import { open } from 'node:fs/promises'
import { fromSystem } from '../../base/index.ts'

/** fsync of the folder `path`. A file system that cannot sync folders (EINVAL) keeps them in order by itself. */
export async function syncFolder(path: string): Promise<void> {
  try {
    await using folder = await open(path, 'r')
    await folder.sync()
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code
    if (code === 'EINVAL' || code === 'ENOTSUP' || code === 'EISDIR' || code === 'EPERM') return
    throw fromSystem(error, 'sync', path)
  }
}
