/**
 * A folder whose files can be frozen at one instant while something writes to them: XFS with reflinks on a loop
 * device. A copy of an image made by `snapshot` while its loop device is mounted and written to is what a
 * hypervisor's snapshot of a running machine is: crash-consistent, no write half in it, no later one in it without
 * an earlier one that was flushed before.
 *
 * (A plain `cp` of a mounted image reads its blocks at different times: no state that any disk ever had.)
 */
import { mkdtemp, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { must } from '../kit/index.ts'
import { mounted } from './mount.ts'

export interface Scratch extends AsyncDisposable {
  readonly path: string
  file(name: string): string
}

/** For `needs(…)`. */
export const SCRATCH_TOOLS: readonly string[] = ['mkfs.xfs', 'losetup', 'mount']

/** `mib`: how much it can hold; it is sparse. Everything in it must be unmounted before its scope ends. */
export async function scratch(mib = 4096): Promise<Scratch> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-scratch-'))
  const backing = join(folder, 'scratch')
  try {
    await writeFile(backing, '')
    await truncate(backing, mib * 2 ** 20)
    await must('mkfs.xfs', ['-q', '-m', 'reflink=1', backing])
    const mount = await mounted(backing, { type: 'xfs' })
    return {
      path: mount.path,
      file: (name) => join(mount.path, name),
      async [Symbol.asyncDispose]() {
        await mount.unmount()
        await rm(folder, { recursive: true, force: true })
      },
    }
  } catch (error) {
    await rm(folder, { recursive: true, force: true })
    throw error
  }
}

/** A copy of `image` as it is at one instant, sharing its blocks; both in one scratch folder. */
export async function snapshot(image: string, copy: string): Promise<void> {
  await must('cp', ['--reflink=always', image, copy])
}
