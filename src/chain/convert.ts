/** Copies a disk into a new image of another format. */
import { stat } from 'node:fs/promises'
import { VarveError } from '../base/index.ts'
import { type BlockDevice, HostFileDevice, systemCalls, type WritableBlockDevice } from '../device/index.ts'
import { RangeSet } from '../extents/index.ts'
import type { CreateOptions } from '../formats/index.ts'
import { type CopyResult, copyDevice } from './copy-device.ts'
import { createImage } from './create-image.ts'
import type { Disk } from './disk.ts'
import { type OpenDiskOptions, openDisk } from './open-disk.ts'

export interface ConvertOptions extends Omit<OpenDiskOptions, 'format'> {
  /** Format of the new image. */
  readonly format: string
  /** Format of the source when it is a path; probed when not given. */
  readonly sourceFormat?: string | undefined
  /** What to copy; the rest reads as zeros in a new image. Default: everything. */
  readonly inUse?: RangeSet | undefined
  /** Replace a file that is there; needed for a block device. Default false. */
  readonly force?: boolean | undefined
  /**
   * Leave out zeros that stand as data. Default: yes, but where the file system can share the source's blocks with
   * the target, blocks are shared as they are.
   */
  readonly detectZeroes?: boolean | undefined
  /** Settings of the new image's format. */
  readonly settings?: CreateOptions['settings'] | undefined
}

export interface ConvertResult extends CopyResult {
  readonly path: string
  readonly format: string
  readonly virtualSize: number
}

/**
 * Writes `source` (a path, or a disk, which stays open) as a new image `path`: whole and durable, or not there.
 * @throws what `openDisk` and `createImage` throw; USAGE when `path` is a part of the source
 */
export async function convertImage(
  source: string | Disk,
  path: string,
  options: ConvertOptions,
): Promise<ConvertResult> {
  if (typeof source === 'string') {
    await using disk = await openDisk(source, {
      format: options.sourceFormat,
      allowBacking: options.allowBacking,
      signal: options.signal,
      log: options.log,
    })
    return await convertImage(disk, path, options)
  }
  await refuseSource(source, path)
  const { signal, progress, log } = options
  const copied = await createImage(
    path,
    {
      signal,
      log,
      format: options.format,
      virtualSize: source.size,
      force: options.force,
      settings: options.settings,
    },
    async ({ target, isZero }) => {
      const ranges = options.inUse
      if (!isZero && ranges) {
        // Only what is in use is copied, and nothing of what stood on the device may shine through.
        for (const gap of ranges.complement(0, source.size))
          await target.zero(gap.start, gap.end - gap.start, signal)
      }
      return await copyDevice(source, target, {
        signal,
        progress,
        ranges,
        targetIsZero: isZero,
        detectZeroes:
          options.detectZeroes ??
          !(await sharesBlocks(source, target, ranges ?? RangeSet.of(0, source.size), signal)),
      })
    },
  )
  return { path, format: options.format, virtualSize: source.size, ...copied }
}

/** A layer of the source as the target would be gone before it was read. */
async function refuseSource(source: Disk, path: string): Promise<void> {
  const target = await stat(path, { bigint: true }).catch(() => undefined)
  if (!target) return
  for (const layer of source.layers) {
    const stats = await stat(layer.path, { bigint: true }).catch(() => undefined)
    if (stats && stats.dev === target.dev && stats.ino === target.ino) {
      throw new VarveError('USAGE', `Cannot convert into ${path}: it is a part of the source`, {
        fields: { path },
      })
    }
  }
}

/** Tries to share (reflink) one block of the source with the target, where it belongs. */
async function sharesBlocks(
  source: BlockDevice,
  target: WritableBlockDevice,
  ranges: RangeSet,
  signal: AbortSignal | undefined,
): Promise<boolean> {
  const calls = systemCalls()
  if (!calls || !(target instanceof HostFileDevice) || target.kind !== 'file' || source.size === 0)
    return false
  for (const { kind, at, offset, length } of await source.extents(0, source.size, signal)) {
    if (kind !== 'data' || !at || offset % 4096 !== 0 || at.offset % 4096 !== 0) continue
    if (length < 4096 || !ranges.covers(offset, offset + 4096)) continue
    try {
      await calls.cloneRange({
        fromFd: at.file.fd,
        toFd: target.file.fd,
        fromOffset: at.offset,
        toOffset: offset,
        length: 4096,
      })
      return true
    } catch {
      return false
    }
  }
  return false
}
