/**
 * What has to happen to bitmaps when a chain changes, as the actions of one QMP `transaction`, so that all of it
 * happens at one moment or not at all. The rules, the order and the arguments are libvirt's.
 *
 * In common: a bitmap is taken along only when it is valid (judge.ts) from the top image of the operation to the
 * end of the chain; the others are left out, and said. Bitmaps are handled in the reverse of the order in which the
 * top node lists them. The granularity of a bitmap that is made is that of the first image that has it.
 *
 * Rule: nothing is computed from a bitmap that is not valid. An increment from one would be silently short.
 */
import { VarveError } from '../base/index.ts'
import { bitmapNames, type ChainFacts, findBitmap, type ImageFacts } from './facts.ts'
import { judge, type Verdict } from './judge.ts'

export interface BitmapAddAction {
  readonly type: 'block-dirty-bitmap-add'
  readonly data: {
    readonly node: string
    readonly name: string
    readonly persistent: boolean
    readonly disabled: boolean
    readonly granularity?: number
  }
}

export interface BitmapRemoveAction {
  readonly type: 'block-dirty-bitmap-remove'
  readonly data: { readonly node: string; readonly name: string }
}

export interface BitmapMergeAction {
  readonly type: 'block-dirty-bitmap-merge'
  readonly data: {
    readonly node: string
    readonly target: string
    readonly bitmaps: readonly { readonly node: string; readonly name: string }[]
  }
}

export type BitmapAction = BitmapAddAction | BitmapRemoveAction | BitmapMergeAction

export interface BitmapPlan {
  /** Argument `actions` of QMP's `transaction`; empty when there is nothing to do. */
  readonly actions: readonly BitmapAction[]
  /** Nodes to reopen for writing before the transaction and read-only after it, in this order. */
  readonly reopenReadWrite: readonly string[]
  /** Bitmaps that are not taken along because they are not valid. */
  readonly leftOut: readonly Verdict[]
}

/** libvirt's name of the bitmap that collects what the guest writes between the end of a job and the merge. */
export const ACTIVEWRITE_NAME = 'libvirt-tmp-activewrite'

export interface BackupPlanOptions {
  readonly bitmap: string
  /** Where the temporary bitmap is made: the scratch node (pull), or the disk's own (push). */
  readonly targetNode: string
  readonly targetBitmap: string
}

/**
 * Incremental backup: a transient, disabled bitmap with all that changed since `bitmap` was made.
 * @throws NOT_FOUND when no image has it. Not valid: no actions, and the verdict in `leftOut`
 */
export function planBackup(chain: ChainFacts, options: BackupPlanOptions): BitmapPlan {
  const { bitmap, targetBitmap, targetNode } = options
  mustExist(bitmap, chain)
  const verdict = judge(bitmap, chain)
  if (!verdict.valid) return { actions: [], reopenReadWrite: [], leftOut: [verdict] }
  const sources = sourcesOf(bitmap, chain)
  return {
    actions: [
      add({
        node: targetNode,
        name: targetBitmap,
        persistent: false,
        disabled: true,
        granularity: sources.granularity,
      }),
      merge(targetNode, targetBitmap, sources.bitmaps),
    ],
    reopenReadWrite: [],
    leftOut: [],
  }
}

/**
 * Deleting a checkpoint: the bitmap goes from every image that has it, in whatever state and with whatever gaps.
 * @throws NOT_FOUND when no image has it
 */
export function planDelete(chain: ChainFacts, bitmap: string): BitmapPlan {
  mustExist(bitmap, chain)
  const having = chain.filter((image) => findBitmap(image, bitmap))
  return {
    actions: having.map(({ id }) => remove(id, bitmap)),
    reopenReadWrite: having
      .filter((image) => image !== chain[0])
      .map(({ id }) => id)
      .reverse(),
    leftOut: [],
  }
}

export interface CopyPlanOptions {
  readonly mirror: ImageFacts
  /** Only the top image is copied; the mirror stands on the same backing chain. */
  readonly shallow: boolean
  readonly activewriteName?: string
}

/** Block copy, at the moment of the pivot. Nothing when the mirror is raw: it cannot hold bitmaps. */
export function planCopy(chain: ChainFacts, options: CopyPlanOptions): BitmapPlan {
  const { activewriteName = ACTIVEWRITE_NAME, mirror, shallow } = options
  if (mirror.format === 'raw') return nothing(chain)
  return carry(chain, {
    // A deep copy is of the whole chain.
    below: shallow ? 1 : chain.length,
    target: mirror,
    activewrite: activewriteName,
    reopen: [],
  })
}

export interface CommitPlanOptions {
  readonly base: string
  /** The top image is the one that the guest writes to. */
  readonly active: boolean
  readonly activewriteName?: string
}

/**
 * Block commit of `chain[0]` into `base`, after the data moved. `chain` begins with the commit's top and goes on to
 * the end of the whole chain. Nothing when the base is raw.
 * @throws NOT_FOUND when `base` is not below the top
 */
export function planCommit(chain: ChainFacts, options: CommitPlanOptions): BitmapPlan {
  const { active, activewriteName = ACTIVEWRITE_NAME, base } = options
  const below = placeBelow(chain, base, 'commit')
  const target = chain[below]!
  if (target.format === 'raw') return nothing(chain)
  return carry(chain, {
    below,
    target,
    activewrite: active ? activewriteName : undefined,
    reopen: active ? [] : [target.id],
  })
}

/**
 * Block pull into `chain[0]` of everything above `base` (of all, without one), after the data moved.
 * @throws NOT_FOUND when `base` is not below the top
 */
export function planPull(chain: ChainFacts, options: { readonly base?: string } = {}): BitmapPlan {
  const below = options.base === undefined ? chain.length : placeBelow(chain, options.base, 'pull')
  return carry(chain, { below, target: chain[0]!, activewrite: undefined, reopen: [] })
}

// Parts of plans ---------------------------------------------------------------------------------------------

interface Carrying {
  /** Images `[0, below)` are merged. */
  readonly below: number
  readonly target: ImageFacts
  readonly activewrite: string | undefined
  readonly reopen: readonly string[]
}

/** Every valid bitmap of the top: NAME of each merged image into NAME of the target, which is made when missing. */
function carry(chain: ChainFacts, { activewrite, below, reopen, target }: Carrying): BitmapPlan {
  const merged = chain.slice(0, below)
  const actions: BitmapAction[] = []
  const leftOut: Verdict[] = []
  const inTop = new Set((chain[0]?.bitmaps ?? []).map(({ name }) => name))
  for (const name of [...inTop].reverse()) {
    const verdict = judge(name, chain)
    if (!verdict.valid) {
      leftOut.push(verdict)
      continue
    }
    const { bitmaps, granularity } = sourcesOf(
      name,
      merged.filter((image) => image.id !== target.id),
    )
    const sources = activewrite === undefined ? bitmaps : [...bitmaps, { node: target.id, name: activewrite }]
    if (!findBitmap(target, name)) {
      actions.push(add({ node: target.id, name, persistent: true, disabled: false, granularity }))
    }
    if (sources.length > 0) actions.push(merge(target.id, name, sources))
  }
  for (const name of bitmapNames(merged)) if (!inTop.has(name)) leftOut.push(judge(name, chain))
  if (activewrite !== undefined) actions.push(remove(target.id, activewrite))
  return { actions, reopenReadWrite: actions.length > 0 ? reopen : [], leftOut }
}

/** Nothing can be taken along; what is lost is said. */
function nothing(chain: ChainFacts): BitmapPlan {
  return {
    actions: [],
    reopenReadWrite: [],
    leftOut: bitmapNames(chain.slice(0, 1)).map((name) => judge(name, chain)),
  }
}

function sourcesOf(
  name: string,
  images: readonly ImageFacts[],
): { readonly bitmaps: readonly { node: string; name: string }[]; readonly granularity: number } {
  const having = images.filter((image) => findBitmap(image, name))
  return {
    bitmaps: having.map(({ id }) => ({ node: id, name })),
    granularity: having.length > 0 ? findBitmap(having[0]!, name)!.granularity : 0,
  }
}

function mustExist(name: string, chain: ChainFacts): void {
  if (chain.some((image) => findBitmap(image, name))) return
  throw new VarveError('NOT_FOUND', `Cannot plan for bitmap '${name}': found it in no image of the chain`, {
    fields: { bitmap: name, images: chain.map(({ id }) => id).join(',') },
    hint: '`varve bitmap check` without a name lists the bitmaps of the chain.',
  })
}

function placeBelow(chain: ChainFacts, base: string, doing: string): number {
  const at = chain.findIndex(({ id }) => id === base)
  if (at > 0) return at
  throw new VarveError(
    'NOT_FOUND',
    `Cannot plan the ${doing}: found ${chain.map(({ id }) => id).join(', ')}, expected base '${base}' below the first of them`,
    { fields: { base }, hint: 'Give the nodes of the whole chain with --chain TOP,…,BASE.' },
  )
}

/** A granularity of 0 is not known, and left to QEMU. */
function add(data: {
  node: string
  name: string
  persistent: boolean
  disabled: boolean
  granularity: number
}): BitmapAddAction {
  const { granularity, ...rest } = data
  return { type: 'block-dirty-bitmap-add', data: granularity > 0 ? { ...rest, granularity } : rest }
}

function remove(node: string, name: string): BitmapRemoveAction {
  return { type: 'block-dirty-bitmap-remove', data: { node, name } }
}

function merge(
  node: string,
  target: string,
  bitmaps: BitmapMergeAction['data']['bitmaps'],
): BitmapMergeAction {
  return { type: 'block-dirty-bitmap-merge', data: { node, target, bitmaps } }
}
