/**
 * May a bitmap be trusted? The rules of libvirt's health check, each told with the image in which it is broken.
 *
 *   1. the top image has the bitmap;
 *   2. the images that have it are one run that begins at the top: below an image without it, none has it;
 *   3. each of them is recording, persistent and consistent, and can be read.
 *
 * Beyond those, what libvirt does not look at is told as a warning, which does not make a bitmap invalid: a
 * granularity or virtual size other than the top's, an operation that holds the bitmap.
 *
 * Rule: "valid" is said only of facts that are known. An image that a writer holds, or whose list of bitmaps cannot
 * be read, makes every bitmap of the chain invalid.
 */
import { type BitmapFacts, bitmapNames, type ChainFacts, findBitmap, type ImageFacts } from './facts.ts'

export type ReasonCode =
  | 'missing-in-top'
  | 'gap'
  | 'disabled'
  | 'transient'
  | 'inconsistent'
  | 'unreadable-data'
  | 'unreadable-entry'
  | 'unreadable-directory'
  | 'autoclear-cleared'
  | 'open-by-writer'
  | 'granularity-differs'
  | 'size-differs'
  | 'busy'

export interface Reason {
  readonly code: ReasonCode
  /** An error makes the bitmap invalid, a warning does not. */
  readonly severity: 'error' | 'warning'
  /** `id` of the image in which it stands. */
  readonly image: string
  readonly text: string
  readonly whatToDo: string
}

export interface Verdict {
  readonly bitmap: string
  readonly valid: boolean
  readonly images: readonly { readonly image: ImageFacts; readonly bitmap: BitmapFacts | undefined }[]
  /** Every reason, top image first, errors and warnings. */
  readonly reasons: readonly Reason[]
}

/** Judges bitmap `name` over the whole `chain`. */
export function judge(name: string, chain: ChainFacts): Verdict {
  const images = chain.map((image) => ({ image, bitmap: findBitmap(image, name) }))
  const deepest = images.findLastIndex(({ bitmap }) => bitmap !== undefined)
  const top = images[0]
  const reasons: Reason[] = []
  images.forEach(({ bitmap, image }, depth) => {
    const say = (code: ReasonCode, text: string, whatToDo: string = WHAT_TO_DO[code]): void => {
      reasons.push({
        code,
        severity: WARNINGS.has(code) ? 'warning' : 'error',
        image: image.id,
        text,
        whatToDo,
      })
    }
    if (image.heldByWriter) {
      say(
        'open-by-writer',
        `a running program has ${image.id} open for writing and keeps its bitmaps in memory`,
      )
      return
    }
    const broken = image.problems.filter(({ code }) => code !== 'autoclear-cleared')
    for (const problem of broken) say(problem.code, problem.text)
    if (!bitmap) {
      // Of a list that cannot be read nobody knows what is missing in it.
      if (image.problems.some(({ code }) => code === 'unreadable-directory')) return
      if (depth === 0) {
        say(
          'missing-in-top',
          deepest < 0
            ? `no image of the chain has a bitmap '${name}'`
            : `the top image has no bitmap '${name}'`,
        )
      } else if (depth < deepest) {
        say('gap', `the image has no bitmap '${name}', but ${images[deepest]!.image.id} below it has one`)
      }
      return
    }
    const isVoid = image.problems.find(({ code }) => code === 'autoclear-cleared')
    if (isVoid) say('autoclear-cleared', isVoid.text)
    else if (bitmap.inconsistent) {
      say(
        'inconsistent',
        `bitmap '${name}' missed writes: the program that had it open was not closed properly`,
      )
    }
    // A malformed entry is told as the image's problem already.
    if (bitmap.unreadable !== undefined && broken.length === 0) {
      say('unreadable-data', `the bits of bitmap '${name}' cannot be read: found ${bitmap.unreadable}`)
    }
    // An inconsistent bitmap does not record either; saying so would hide the cause.
    if (!bitmap.recording && !bitmap.inconsistent)
      say('disabled', `bitmap '${name}' is disabled: it does not record`)
    if (!bitmap.persistent) say('transient', `bitmap '${name}' is not persistent: it is lost when QEMU ends`)
    if (bitmap.busy) say('busy', `bitmap '${name}' is held by another operation`)
    if (!top || depth === 0) return
    if (top.bitmap && top.bitmap.granularity !== bitmap.granularity) {
      say(
        'granularity-differs',
        `granularity ${bitmap.granularity}, the top's is ${top.bitmap.granularity}: merged, changes are rounded up`,
      )
    }
    const [size, topSize] = [image.virtualSize, top.image.virtualSize]
    if (size !== undefined && topSize !== undefined && size !== topSize) {
      say('size-differs', `virtual size ${size}, the top's is ${topSize}`)
    }
  })
  return {
    bitmap: name,
    valid: chain.length > 0 && reasons.every(({ severity }) => severity === 'warning'),
    images,
    reasons,
  }
}

/** Verdicts on all bitmaps that an image of the chain has. */
export function judgeAll(chain: ChainFacts): Verdict[] {
  return bitmapNames(chain).map((name) => judge(name, chain))
}

const WARNINGS: ReadonlySet<ReasonCode> = new Set(['granularity-differs', 'size-differs', 'busy'])

const WHAT_TO_DO: Readonly<Record<ReasonCode, string>> = {
  'missing-in-top':
    'Take a full backup with a new bitmap; a snapshot must be given the bitmaps of the image below it when it is made.',
  gap: 'Take a full backup with a new bitmap, and remove this one from every image.',
  disabled: 'Take a full backup with a new bitmap: what was written while it was disabled is not in it.',
  transient: 'Take a full backup with a new bitmap that is persistent.',
  inconsistent:
    'Remove the bitmap from every image (`varve bitmap remove`), then take a full backup with a new one.',
  'unreadable-data':
    'Remove the bitmap from every image, then take a full backup with a new one; `varve check` says more.',
  'unreadable-entry':
    'Copy the image, then `varve bitmap repair` drops what cannot be read, so that it opens again.',
  'unreadable-directory':
    'Copy the image, then `varve bitmap repair` drops what cannot be read, so that it opens again.',
  'autoclear-cleared':
    'Take a full backup with a new bitmap; keep the program that wrote to the image away from it.',
  'open-by-writer':
    'Ask the running QEMU: --qmp SOCKET, or --nodes FILE with what query-named-block-nodes returns.',
  'granularity-differs': 'Nothing; an incremental backup takes somewhat more than what changed.',
  'size-differs':
    'The disk was resized after the snapshot; what lies behind the smaller image has to be taken in full.',
  busy: 'Wait until the job or export that uses it has ended.',
}
