/**
 * Makes a folder and its parents. Node's own `mkdir(…, { recursive: true })` never ends where the kernel answers ENOENT
 * for a folder whose parent exists (/proc), so each level is made once here.
 */
import { mkdir, stat } from 'node:fs/promises'
import { dirname } from 'node:path'

/** @param path absolute. A folder that is there already is fine. @throws what mkdir throws */
export async function makeFolder(path: string, mode: number): Promise<void> {
  if (await isFolder(path)) return
  const parent = dirname(path)
  if (parent !== path) await makeFolder(parent, mode)
  try {
    await mkdir(path, { mode })
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST' || !(await isFolder(path))) throw error
  }
}

async function isFolder(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory()
  } catch {
    return false
  }
}
