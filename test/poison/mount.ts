/**
 * Loop devices and mounts for tests, gone when their scope ends, whatever happened in it.
 *
 * Needs root (`needsRoot`). A process that is killed leaves its mount behind; they all lie below the system's
 * temporary folder in folders named `varve-mount-*`.
 */
import { mkdtemp, rmdir } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { must, run } from '../kit/index.ts'

export interface LoopDevice extends AsyncDisposable {
  /** `/dev/loop7` */
  readonly device: string
}

export interface Mount extends AsyncDisposable {
  readonly device: string
  /** Where it is mounted. */
  readonly path: string
  /** Ends it before the scope does; a second call does nothing. */
  unmount(): Promise<void>
}

/** Attaches a file (or the part of it from `offset`, `length` bytes) to a free loop device. */
export async function loopDevice(
  file: string,
  options: { readonly offset?: number; readonly length?: number; readonly readOnly?: boolean } = {},
): Promise<LoopDevice> {
  const args = ['--find', '--show']
  if (options.readOnly) args.push('--read-only')
  if (options.offset !== undefined) args.push('--offset', `${options.offset}`)
  if (options.length !== undefined) args.push('--sizelimit', `${options.length}`)
  const device = (await must('losetup', [...args, file])).trim()
  let attached = true
  return {
    device,
    async [Symbol.asyncDispose]() {
      if (!attached) return
      attached = false
      await must('losetup', ['--detach', device])
    },
  }
}

/** Mounts an image file. `type` as `mount -t`, guessed where it is left out; `options` as `mount -o`. */
export async function mounted(
  image: string,
  options: {
    readonly type?: string
    readonly options?: string
    readonly offset?: number
    readonly length?: number
  } = {},
): Promise<Mount> {
  const { type, options: mountOptions, ...part } = options
  const loop = await loopDevice(image, part)
  let path: string | undefined
  try {
    path = await mkdtemp(join(tmpdir(), 'varve-mount-'))
    const args = [
      ...(type === undefined ? [] : ['-t', type]),
      ...(mountOptions === undefined ? [] : ['-o', mountOptions]),
    ]
    await must('mount', [...args, loop.device, path])
  } catch (error) {
    if (path !== undefined) await rmdir(path)
    await loop[Symbol.asyncDispose]()
    throw error
  }
  const at = path
  let there = true
  const unmount = async (): Promise<void> => {
    if (!there) return
    there = false
    try {
      // A reader of this machine (an indexer, a monitor) may hold it for a moment.
      for (let attempt = 0; ; attempt++) {
        const result = await run('umount', [at])
        if (result.code === 0) break
        if (attempt === 20) throw new Error(`umount ${at}: ${result.stderr}`)
        await setTimeout(100)
      }
      await rmdir(at)
    } finally {
      await loop[Symbol.asyncDispose]()
    }
  }
  return { device: loop.device, path: at, unmount, [Symbol.asyncDispose]: unmount }
}
