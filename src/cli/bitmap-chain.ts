/** Where the bitmap verbs get a chain's facts from: image files, a saved answer of QEMU, or QEMU itself. */
import { readFile, stat } from 'node:fs/promises'
import type { Command } from 'commander'
import { fromSystem, VarveError, within } from '../base/index.ts'
import type { ChainFacts, ImageFacts, NodeReport } from '../changes/index.ts'
import { addImageOptions, type ImageOptions } from './image.ts'
import { type Host, usageError } from './verb.ts'

export interface NodeOptions {
  readonly nodes?: string
  readonly qmp?: string
  readonly top?: string
  readonly chain?: string
}

export type ChainOptions = NodeOptions & ImageOptions

/** `--nodes`, `--qmp`, `--top`, `--chain`. */
export function addNodeOptions(command: Command): Command {
  return command
    .option('--nodes <FILE>', "what QMP's query-named-block-nodes returned")
    .option('--qmp <SOCKET>', 'ask the running QEMU at this UNIX socket')
    .option('--top <NODE>', 'top node of the chain; the others are found by its backing links')
    .option('--chain <TOP,…,BASE>', 'nodes of the chain, top first')
}

/** The same, and what opens an image. */
export function addChainOptions(command: Command): Command {
  return addNodeOptions(addImageOptions(command))
}

/** True when the chain is one of nodes, not of files. */
export function asksNodes(options: NodeOptions): boolean {
  return options.nodes !== undefined || options.qmp !== undefined
}

/** The report that `--nodes` or `--qmp` names. @throws USAGE, NOT_FOUND, CORRUPT */
export async function nodeReport(options: NodeOptions, host: Host): Promise<NodeReport> {
  const { readNodeReport } = await import('../changes/index.ts')
  if (options.nodes !== undefined && options.qmp !== undefined) {
    throw usageError('Cannot ask for nodes: found --nodes and --qmp, expected one of them')
  }
  if (options.qmp !== undefined) {
    const { connectQmp } = await import('../live/index.ts')
    await using qmp = await connectQmp(options.qmp, { signal: host.signal })
    return readNodeReport(await qmp.execute('query-named-block-nodes', { flat: true }))
  }
  return readNodeReport(await readJson(options.nodes!))
}

/** Nodes of the chain as `--top` and `--chain` say. @throws USAGE */
export function nodeChain(report: NodeReport, options: NodeOptions, fallbackTop?: string): ChainFacts {
  const names = options.chain?.split(',').map((name) => name.trim())
  if (names !== undefined) {
    if (names.some((name) => name === '') || new Set(names).size !== names.length) {
      throw usageError(
        `Cannot use --chain ${options.chain}: expected names of nodes, each once, with commas between`,
      )
    }
    if (options.top !== undefined && names[0] !== options.top) {
      throw usageError(
        `Cannot use --chain ${options.chain}: found ${names[0]} first, expected ${options.top} (--top)`,
      )
    }
    return report.chain(names)
  }
  const top = options.top ?? fallbackTop
  if (top === undefined) {
    throw usageError(
      'Cannot find the chain: found neither --top nor --chain',
      'Name its top node with --top NODE.',
    )
  }
  return report.chainFrom(top)
}

/** Opens the chain of `path` and reads what its images say of their bitmaps. */
export async function fileChain(path: string, options: ImageOptions, host: Host): Promise<ChainFacts> {
  const [{ openDisk }, { openHostFile }, { factsOfFile }] = await Promise.all([
    import('../chain/index.ts'),
    import('../device/index.ts'),
    import('../changes/index.ts'),
  ])
  const { signal } = host
  const disk = await openDisk(path, { format: options.format, allowBacking: options.allowBacking, signal })
  await using _disk = disk
  const chain: ImageFacts[] = []
  for (const [depth, layer] of disk.layers.entries()) {
    // The path policy has let these paths pass; the top's is the user's own.
    await using file = await openHostFile(layer.path, { noFollow: depth > 0 })
    chain.push(await factsOfFile({ ...layer, file }, { signal }))
  }
  return chain
}

/** More than any QEMU answers; less than memory. */
const MOST_REPORT_BYTES = 268_435_456

async function readJson(path: string): Promise<unknown> {
  let content: string
  try {
    within((await stat(path)).size, MOST_REPORT_BYTES, 'size of a node report')
    content = await readFile(path, 'utf8')
  } catch (error) {
    throw fromSystem(error, 'read', path)
  }
  try {
    return JSON.parse(content) as unknown
  } catch (cause) {
    throw new VarveError('CORRUPT', `Cannot use ${path}: found no JSON document, expected a node report`, {
      cause,
      fields: { path },
      hint: 'Save what QMP returned: the array, or the object with "return".',
    })
  }
}
