/**
 * Makes a folder and its parents, each durable in its own parent. Node's `mkdir(…, { recursive: true })` never ends where
 * the kernel answers ENOENT for a folder whose parent exists (/proc), so each level is made once here.
 */
import { mkdir, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { syncFolder } from '../../device/index.ts'

/** @param path absolute. A folder that is there already is fine. @throws what mkdir throws */
export async function makeFolder(path: string): Promise<void> {
  if (await isFolder(path)) return
  const parent = dirname(path)
  if (parent !== path) await makeFolder(parent)
  try {
    // Disks hold secrets: nobody but the owner looks in.
    await mkdir(path, { mode: 0o700 })
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST' || !(await isFolder(path))) throw error
  }
  await syncFolder(parent)
}

async function isFolder(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory()
  } catch {
    return false
  }
}
