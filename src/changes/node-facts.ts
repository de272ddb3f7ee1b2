/**
 * What a running QEMU says about its bitmaps: the answer to QMP's `query-named-block-nodes`.
 *
 * Rules: only the list `dirty-bitmaps` of the node counts, never the list of the file (`image`), which is stale
 * while QEMU runs; entries without a name belong to jobs and are left out; a node that the report lacks is an image
 * without bitmaps. The report comes from outside: every field is looked at before it is used.
 */
import { VarveError } from '../base/index.ts'
import type { BitmapFacts, ChainFacts, ImageFacts } from './facts.ts'

type Json = Readonly<Record<string, unknown>>

/** One node of the report, as far as it matters here. */
interface Node {
  readonly name: string
  readonly driver: string | undefined
  readonly filename: string | undefined
  /** Names of the backing image, the likelier first. */
  readonly backingNames: readonly string[]
  /** Node name of the backing image; only newer QEMUs tell it. */
  readonly backingNode: string | undefined
  readonly backingFormat: string | undefined
  readonly facts: ImageFacts
}

export interface NodeReport {
  /** The facts of the named nodes, top first; a node that the report lacks has no bitmaps. */
  chain(names: readonly string[]): ChainFacts
  /** The chain below node `top`, by the backing links. @throws USAGE when they are ambiguous */
  chainFrom(top: string): ChainFacts
  /** Undefined when the report lacks it. */
  node(name: string): ImageFacts | undefined
}

/**
 * `report`: the array, or the whole answer with `return`.
 * @throws CORRUPT when it is neither
 */
export function readNodeReport(report: unknown): NodeReport {
  const list = Array.isArray(report) ? (report as unknown[]) : isObject(report) ? report['return'] : undefined
  if (!Array.isArray(list)) {
    throw new VarveError(
      'CORRUPT',
      'Cannot use node report: found something else, expected the answer to query-named-block-nodes',
      { hint: 'Save what QMP returned: the array, or the object with "return".' },
    )
  }
  const nodes = new Map<string, Node>()
  for (const item of list as unknown[]) {
    if (!isObject(item)) continue
    const node = decodeNode(item)
    if (node && !nodes.has(node.name)) nodes.set(node.name, node)
  }
  const facts = (name: string): ImageFacts =>
    nodes.get(name)?.facts ?? {
      id: name,
      kind: 'node',
      format: undefined,
      virtualSize: undefined,
      bitmaps: [],
      problems: [],
      heldByWriter: false,
    }
  return {
    chain: (names) => names.map(facts),
    chainFrom: (top) => {
      const names = [top]
      for (let at = nodes.get(top); at; ) {
        const below = backingOf(at, nodes)
        if (!below) break
        if (names.includes(below.name)) {
          throw new VarveError(
            'CHAIN_LOOP',
            `Cannot follow the chain of node ${top}: found ${below.name} twice`,
          )
        }
        names.push(below.name)
        at = below
      }
      return names.map(facts)
    },
    node: (name) => nodes.get(name)?.facts,
  }
}

function decodeNode(item: Json): Node | undefined {
  const name = text(item['node-name'])
  if (name === undefined) return undefined
  const image = isObject(item['image']) ? item['image'] : {}
  const below = isObject(image['backing-image']) ? image['backing-image'] : {}
  const children = Array.isArray(item['children']) ? (item['children'] as unknown[]).filter(isObject) : []
  const driver = text(item['drv']) ?? text(image['format'])
  // `backing_file` is what the node really has below it; QEMU tells its depth beside it. The image's own field may
  // name a file that the node was opened without.
  const live = text(item['backing_file'])
  const stored = [text(image['full-backing-filename']), text(image['backing-filename'])]
  const backingNames = [text(below['filename']), live, ...('backing_file_depth' in item ? [] : stored)]
  const bitmaps = Array.isArray(item['dirty-bitmaps']) ? (item['dirty-bitmaps'] as unknown[]) : []
  return {
    name,
    driver,
    filename: text(image['filename']) ?? text(item['file']),
    backingNames: [...new Set(backingNames.filter((each) => each !== undefined))],
    backingNode: text(children.find(({ child }) => child === 'backing')?.['node-name']),
    backingFormat: text(image['backing-filename-format']),
    facts: {
      id: name,
      kind: 'node',
      format: driver,
      virtualSize: size(image['virtual-size']),
      bitmaps: bitmaps.filter(isObject).flatMap((bitmap) => decodeBitmap(bitmap) ?? []),
      problems: [],
      heldByWriter: false,
    },
  }
}

function decodeBitmap(bitmap: Json): BitmapFacts | undefined {
  const name = text(bitmap['name'])
  if (name === undefined || name === '') return undefined
  return {
    name,
    recording: bitmap['recording'] === true,
    inconsistent: bitmap['inconsistent'] === true,
    persistent: bitmap['persistent'] === true,
    busy: bitmap['busy'] === true,
    granularity: size(bitmap['granularity']) ?? 0,
    dirtyBytes: size(bitmap['count']),
  }
}

function backingOf(node: Node, nodes: ReadonlyMap<string, Node>): Node | undefined {
  if (node.backingNode !== undefined) return nodes.get(node.backingNode)
  for (const filename of node.backingNames) {
    // The node of the format and that of its file have one file name; so have filters and what they stand on.
    const named = [...nodes.values()].filter((each) => each !== node && each.filename === filename)
    const formats = named.filter(({ driver }) => driver === undefined || FORMATS.has(driver))
    const told = formats.filter(({ driver }) => driver !== undefined && driver === node.backingFormat)
    const found =
      told.length > 0
        ? told
        : formats.length > 0
          ? formats
          : named.filter(({ driver }) => !FILTERS.has(driver ?? ''))
    if (found.length > 1) {
      throw new VarveError(
        'USAGE',
        `Cannot follow the chain below node ${node.name}: found ${found.map(({ name }) => name).join(' and ')} with its backing file, expected one`,
        { hint: 'Give the nodes of the chain with --chain TOP,…,BASE.' },
      )
    }
    if (found[0]) return found[0]
  }
  return undefined
}

/** Drivers whose nodes are images of a chain. */
const FORMATS: ReadonlySet<string> = new Set([
  'qcow2',
  'raw',
  'qed',
  'qcow',
  'vmdk',
  'vdi',
  'vhdx',
  'vpc',
  'luks',
  'parallels',
  'bochs',
  'cloop',
  'dmg',
])

/** Drivers that stand over another node and show its file name as theirs. */
const FILTERS: ReadonlySet<string> = new Set([
  'backup-top',
  'blkdebug',
  'blkverify',
  'commit_top',
  'compress',
  'copy-before-write',
  'copy-on-read',
  'mirror_top',
  'preallocate',
  'replication',
  'snapshot-access',
  'throttle',
])

function isObject(value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function text(value: unknown): string | undefined {
  return typeof value === 'string' && value !== '' ? value : undefined
}

function size(value: unknown): number | undefined {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 ? value : undefined
}
