/**
 * What an image file says about its bitmaps.
 *
 * Rules: `in_use` on disk means broken only while nobody has the image open for writing, for every writer sets it
 * at once; of a held image nothing is believed. A bitmap whose bits cannot be read counts as inconsistent: QEMU
 * takes a table behind the file's end for zeros, which would be an increment that is silently short.
 */
import { type Context, isVarveError } from '../base/index.ts'
import { type HostFileDevice, heldByWriter } from '../device/index.ts'
import { readBitmapBits, readBitmaps, type StoredBitmaps } from '../formats/index.ts'
import type { BitmapFacts, ImageFacts, ImageProblem } from './facts.ts'

export interface ImageFile {
  readonly path: string
  readonly format: string
  /** Bytes. */
  readonly virtualSize: number
  /** Open for reading; borrowed. */
  readonly file: HostFileDevice
}

/** @throws CORRUPT, UNSUPPORTED, ENCRYPTED, LIMIT when the image's header cannot be used; IO */
export async function factsOfFile(image: ImageFile, options: Context = {}): Promise<ImageFacts> {
  const { file, format, path, virtualSize } = image
  const base = {
    id: path,
    kind: 'path',
    format,
    virtualSize,
    heldByWriter: heldByWriter(file) === true,
  } as const
  if (format !== 'qcow2') return { ...base, bitmaps: [], problems: [] }
  const stored = await readBitmaps(file, options.signal)
  const bitmaps: BitmapFacts[] = []
  for (const bitmap of stored.bitmaps) {
    const isVoid = stored.state === 'void'
    const bits = { dirtyBytes: undefined as number | undefined, unreadable: bitmap.problem }
    if (!isVoid && !bitmap.inUse && bitmap.problem === undefined) {
      try {
        // The last granule may reach over the disk's end; QEMU counts it whole, and so do we.
        const set = await readBitmapBits(file, stored.header, bitmap, options.signal)
        bits.dirtyBytes = set.count * 2 ** bitmap.granularityBits
      } catch (error) {
        if (!isVarveError(error, 'CORRUPT', 'LIMIT')) throw error
        bits.unreadable = error.message.replace(/^Cannot read bitmap .*?: found /, '')
      }
    }
    bitmaps.push({
      name: bitmap.name,
      recording: bitmap.enabled,
      inconsistent: isVoid || (bitmap.inUse && !base.heldByWriter),
      persistent: true,
      busy: false,
      granularity: 2 ** bitmap.granularityBits,
      dirtyBytes: bits.dirtyBytes,
      ...(bits.unreadable === undefined ? {} : { unreadable: bits.unreadable }),
    })
  }
  return { ...base, bitmaps, problems: problemsOf(stored) }
}

function problemsOf(stored: StoredBitmaps): ImageProblem[] {
  if (stored.state === 'void') {
    return [
      {
        code: 'autoclear-cleared',
        text: 'a program without support for bitmaps wrote to the image, so that every bitmap in it is void',
      },
    ]
  }
  const problems: ImageProblem[] = []
  if (stored.problem !== undefined) {
    problems.push({
      code: 'unreadable-directory',
      text: `its bitmap directory cannot be read: ${stored.problem}`,
    })
  }
  for (const { name, problem } of stored.bitmaps) {
    if (problem !== undefined) {
      problems.push({
        code: 'unreadable-entry',
        text: `the directory entry of bitmap '${name}' is malformed (${problem}), so that QEMU refuses the whole image`,
      })
    }
  }
  return problems
}
