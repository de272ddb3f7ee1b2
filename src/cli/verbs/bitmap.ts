/** varve bitmap: dirty bitmaps of images and of a running QEMU: list, judge, plan, edit. */
import type { Command } from 'commander'
import { VarveError } from '../../base/index.ts'
import type { BitmapFacts, BitmapPlan, ChainFacts, ImageFacts, Reason, Verdict } from '../../changes/index.ts'
import {
  addChainOptions,
  addNodeOptions,
  asksNodes,
  type ChainOptions,
  fileChain,
  type NodeOptions,
  nodeChain,
  nodeReport,
} from '../bitmap-chain.ts'
import { addEdits } from '../bitmap-edit.ts'
import { type ImageOptions } from '../image.ts'
import { type Output, printable } from '../output.ts'
import { table } from '../table.ts'
import { count, formatBytes } from '../units.ts'
import { type Host, helpText, usageError, type Verb } from '../verb.ts'

interface Json {
  readonly json?: true
}

export const verb: Verb = (command, host) => {
  const verbs = [...[addList, addCheck, addPlan].map((add) => add(command, host)), ...addEdits(command, host)]
  command
    .allowExcessArguments(true)
    .usage('SUBCOMMAND [OPTIONS] …')
    .addHelpText(
      'after',
      helpText({
        examples: [
          'bitmap list web01.qcow2',
          'bitmap check web01.qcow2 daily',
          'bitmap add web01.qcow2 daily',
        ],
        exits: { 12: 'a bitmap is not valid, or the image is corrupt' },
      }),
    )
    .action(() => {
      throw unknownSubcommand(command, verbs)
    })
}

function unknownSubcommand(command: Command, verbs: readonly Command[]): VarveError {
  const found = command.args[0] === undefined ? 'nothing' : `'${command.args[0]}'`
  return usageError(
    `Cannot run ${command.name()}: found ${found}, expected ${verbs.map((each) => each.name()).join(', ')}`,
    `\`varve ${command.name() === 'plan' ? 'bitmap plan' : 'bitmap'} --help\` shows what each does.`,
  )
}

// list -------------------------------------------------------------------------------------------------------

function addList(command: Command, host: Host): Command {
  const list = command
    .command('list')
    .summary('bitmaps that an image file stores')
    .description('Bitmaps that an image file stores; its backing files are not looked at')
  list
    .argument('IMAGE', 'image file')
    .option('--format <FORMAT>', 'format of IMAGE (else its magic decides)')
    .option('--json', 'one JSON array')
    .addHelpText(
      'after',
      helpText({ examples: ['bitmap list web01.qcow2'], exits: { 12: 'the list cannot be read' } }),
    )
    .action((path: string, options: ImageOptions & Json) => runList(path, options, host))
  return list
}

async function runList(path: string, options: ImageOptions & Json, host: Host): Promise<void> {
  const { output, signal } = host
  const [{ openHostFile }, { formatByName, probeFormat }, { factsOfFile }] = await Promise.all([
    import('../../device/index.ts'),
    import('../../formats/index.ts'),
    import('../../changes/index.ts'),
  ])
  const named = options.format === undefined ? undefined : formatByName(options.format)
  if (options.format !== undefined && !named) {
    throw usageError(
      `Cannot list bitmaps of ${path}: found format '${options.format}', expected one that is known`,
    )
  }
  await using file = await openHostFile(path)
  const format = (named ?? (await probeFormat(file, signal))).name
  const image = await factsOfFile({ path, format, virtualSize: file.size, file }, { signal })
  if (options.json) await output.document(image.bitmaps.map((bitmap) => bitmapDocument(image, bitmap)))
  else await output.stream(listText(image, output))
  const broken = image.problems.filter(({ code }) => code !== 'autoclear-cleared')
  if (broken.length > 0) {
    throw new VarveError('CORRUPT', `Cannot list all bitmaps of ${path}: ${broken[0]!.text}`, {
      fields: { path, problems: broken.length },
      hint: 'Copy the image, then `varve bitmap repair` drops what cannot be read.',
    })
  }
}

function listText(image: ImageFacts, output: Output): string[] {
  if (image.bitmaps.length === 0) return [`No bitmaps are stored in ${printable(image.id)}.`]
  return table(
    [
      { title: 'BITMAP' },
      { title: 'GRANULARITY', align: 'right' },
      { title: 'CHANGED', align: 'right' },
      { title: 'STATE' },
    ],
    image.bitmaps.map((bitmap) => [
      printable(bitmap.name),
      formatBytes(bitmap.granularity),
      bitmap.dirtyBytes === undefined ? '' : formatBytes(bitmap.dirtyBytes),
      stateText(image, bitmap, output),
    ]),
    (titles) => output.style('bold', titles),
  )
}

function stateText(image: ImageFacts, bitmap: BitmapFacts, output: Output): string {
  const words = [
    image.heldByWriter ? output.style('yellow', 'open by a writer') : undefined,
    bitmap.inconsistent ? output.style('red', 'inconsistent') : undefined,
    bitmap.unreadable === undefined
      ? undefined
      : output.style('red', `unreadable: ${printable(bitmap.unreadable)}`),
    bitmap.recording ? 'recording' : 'disabled',
    bitmap.persistent ? undefined : 'transient',
    bitmap.busy ? 'busy' : undefined,
  ]
  return words.filter((word) => word !== undefined).join(', ')
}

// check ------------------------------------------------------------------------------------------------------

function addCheck(command: Command, host: Host): Command {
  const check = command
    .command('check')
    .summary('may a bitmap be trusted, and if not, why')
    .description('Says whether a bitmap may be trusted over the whole chain, and every reason why not')
  addChainOptions(check)
    .argument('[IMAGE]', 'top image of the chain; not with --nodes or --qmp')
    .argument('[NAME]', 'bitmap; without it, all of them')
    .option('--json', 'one JSON object; without NAME an array')
    .addHelpText(
      'after',
      helpText({
        examples: [
          'bitmap check web01.qcow2 daily',
          'bitmap check daily --qmp /run/web01.qmp --top libvirt-1-format',
          'bitmap check --nodes nodes.json --chain top,mid,base --json',
        ],
        exits: { 0: 'valid', 12: 'not valid, or an image is corrupt' },
      }),
    )
    .action((first: string | undefined, second: string | undefined, options: ChainOptions & Json) =>
      runCheck([first, second], options, host),
    )
  return check
}

async function runCheck(
  [first, second]: readonly [string | undefined, string | undefined],
  options: ChainOptions & Json,
  host: Host,
): Promise<void> {
  const live = asksNodes(options)
  if (live && second !== undefined) {
    throw usageError(
      `Cannot check bitmaps: found '${first}' and '${second}' beside nodes, expected only a bitmap`,
    )
  }
  if (!live && first === undefined) {
    throw usageError('Cannot check bitmaps: found neither IMAGE nor --nodes nor --qmp, expected one of them')
  }
  if (!live && (options.top !== undefined || options.chain !== undefined)) {
    throw usageError('Cannot check bitmaps: found --top or --chain without --nodes or --qmp')
  }
  const name = live ? first : second
  const { judge, judgeAll } = await import('../../changes/index.ts')
  const chain = live
    ? nodeChain(await nodeReport(options, host), options)
    : await fileChain(first!, options, host)
  const { output } = host
  if (name !== undefined) {
    const verdict = judge(name, chain)
    if (options.json) await output.document(verdictDocument(verdict))
    else await output.stream(verdictText(verdict, output))
    if (!verdict.valid) throw notValid(verdict)
    return
  }
  const verdicts = judgeAll(chain)
  if (options.json) await output.document(verdicts.map(verdictDocument))
  else await output.stream(verdictsText(verdicts, output))
  const broken = verdicts.filter(({ valid }) => !valid)
  if (broken.length === 1 && verdicts.length === 1) throw notValid(broken[0]!)
  if (broken.length > 0) {
    throw new VarveError(
      'CORRUPT',
      `Cannot trust ${count(broken.length, 'bitmap')} of ${verdicts.length}: ${broken.map(({ bitmap }) => bitmap).join(', ')}`,
      { fields: { invalid: broken.length }, hint: errorsOf(broken[0]!)[0]?.whatToDo ?? '' },
    )
  }
  if (verdicts.length === 0) refuseUnknown(chain)
}

/** No bitmap was found: is that known? */
function refuseUnknown(chain: ChainFacts): void {
  for (const image of chain) {
    if (image.heldByWriter) {
      throw new VarveError(
        'CORRUPT',
        `Cannot say which bitmaps there are: a running program has ${image.id} open for writing`,
        {
          fields: { image: image.id },
          hint: 'Ask the running QEMU: --qmp SOCKET, or --nodes FILE with what query-named-block-nodes returns.',
        },
      )
    }
    const problem = image.problems.find(({ code }) => code !== 'autoclear-cleared')
    if (problem) {
      throw new VarveError('CORRUPT', `Cannot say which bitmaps there are in ${image.id}: ${problem.text}`, {
        fields: { image: image.id },
        hint: 'Copy the image, then `varve bitmap repair` drops what cannot be read.',
      })
    }
  }
}

function errorsOf(verdict: Verdict): readonly Reason[] {
  return verdict.reasons.filter(({ severity }) => severity === 'error')
}

function notValid(verdict: Verdict): VarveError {
  const errors = errorsOf(verdict)
  return new VarveError(
    'CORRUPT',
    `Cannot trust bitmap '${verdict.bitmap}': found ${errors.map(({ code, image }) => `${code} (${image})`).join(', ')}`,
    {
      fields: { bitmap: verdict.bitmap, reasons: errors.map(({ code }) => code).join(',') },
      hint: errors[0]?.whatToDo ?? '',
    },
  )
}

function verdictDocument({ bitmap, images, reasons, valid }: Verdict): Record<string, unknown> {
  return { bitmap, valid, images: images.map((each) => imageDocument(each.image, each.bitmap)), reasons }
}

/** One shape whether the image has the bitmap or not: a program need not ask which. */
function imageDocument(image: ImageFacts, bitmap: BitmapFacts | undefined): Record<string, unknown> {
  return {
    [image.kind]: image.id,
    present: bitmap !== undefined,
    recording: bitmap?.recording ?? false,
    inconsistent: bitmap?.inconsistent ?? false,
    persistent: bitmap?.persistent ?? false,
    busy: bitmap?.busy ?? false,
    granularity: bitmap?.granularity ?? null,
    dirtyBytes: bitmap?.dirtyBytes ?? null,
  }
}

function bitmapDocument(image: ImageFacts, bitmap: BitmapFacts): Record<string, unknown> {
  return {
    name: bitmap.name,
    recording: bitmap.recording,
    inconsistent: bitmap.inconsistent,
    openByWriter: image.heldByWriter,
    granularity: bitmap.granularity,
    dirtyBytes: bitmap.dirtyBytes ?? null,
    unreadable: bitmap.unreadable ?? null,
  }
}

function* verdictText(verdict: Verdict, output: Output): Generator<string> {
  yield verdict.valid
    ? `${output.style('green', '✓')} ${printable(verdict.bitmap)}: valid`
    : `${output.style('red', '✗')} ${printable(verdict.bitmap)}: not valid`
  yield ''
  yield* table(
    [
      { title: 'IMAGE' },
      { title: 'GRANULARITY', align: 'right' },
      { title: 'CHANGED', align: 'right' },
      { title: 'STATE' },
    ],
    verdict.images.map(({ bitmap, image }) => [
      printable(image.id),
      bitmap ? formatBytes(bitmap.granularity) : '',
      bitmap?.dirtyBytes === undefined ? '' : formatBytes(bitmap.dirtyBytes),
      bitmap ? stateText(image, bitmap, output) : output.style('dim', 'no such bitmap'),
    ]),
    (titles) => output.style('bold', titles),
  )
  if (verdict.reasons.length > 0) yield ''
  for (const { code, image, severity, text, whatToDo } of verdict.reasons) {
    yield `${output.style(severity === 'error' ? 'red' : 'yellow', code)}  ${printable(image)}: ${printable(text)}`
    yield `    ${output.style('dim', whatToDo)}`
  }
}

function verdictsText(verdicts: readonly Verdict[], output: Output): string[] {
  if (verdicts.length === 0) return ['No image of the chain has a bitmap.']
  return table(
    [
      { title: 'BITMAP' },
      { title: 'VALID' },
      { title: 'IMAGES', align: 'right' },
      { title: 'CHANGED', align: 'right' },
      { title: 'WHY' },
    ],
    verdicts.map((verdict) => {
      const bitmaps = verdict.images.flatMap(({ bitmap }) => bitmap ?? [])
      const known = bitmaps.every(({ dirtyBytes }) => dirtyBytes !== undefined)
      return [
        printable(verdict.bitmap),
        verdict.valid ? output.style('green', 'yes') : output.style('red', 'no'),
        `${bitmaps.length} of ${verdict.images.length}`,
        // Images may have the same granule: the sum is the most that an increment can be.
        known ? `≤ ${formatBytes(bitmaps.reduce((sum, { dirtyBytes }) => sum + dirtyBytes!, 0))}` : '',
        verdict.reasons.map(({ code, image }) => `${code} (${printable(image)})`).join(', '),
      ]
    }),
    (titles) => output.style('bold', titles),
  )
}

// plan -------------------------------------------------------------------------------------------------------

interface PlanOptions extends NodeOptions, Json {
  readonly incremental?: string
  readonly targetNode?: string
  readonly targetBitmap?: string
  readonly mirrorNode?: string
  readonly shallow?: true
  readonly topNode?: string
  readonly baseNode?: string
  readonly active?: true
  readonly activewriteName?: string
}

function addPlan(command: Command, host: Host): Command {
  const plan = command
    .command('plan')
    .summary('what must happen to bitmaps when a chain changes')
    .description(
      'Computes what must happen to bitmaps when a chain changes, as the actions of a QMP transaction',
    )
  const add = (name: string, summary: string, example: string): Command =>
    addNodeOptions(
      plan
        .command(name)
        .summary(summary)
        .description(summary.charAt(0).toUpperCase() + summary.slice(1)),
    )
      .option('--json', 'one JSON object: actions, reopenReadWrite, leftOut')
      .addHelpText(
        'after',
        helpText({
          examples: [`bitmap plan ${name} ${example} --nodes nodes.json --json`],
          exits: { 10: 'no image has the bitmap, or no such node', 12: 'the bitmap is not valid' },
        }),
      )
  const activewrite = [
    '--activewrite-name <NAME>',
    'temporary bitmap with what the guest wrote until the pivot',
  ] as const
  const plans = [
    add(
      'backup',
      'incremental backup since a bitmap was made',
      '--incremental daily --target-node scratch --target-bitmap backup-vda --top vda',
    )
      .requiredOption('--incremental <NAME>', 'bitmap to back up by')
      .requiredOption('--target-node <NODE>', 'where the temporary bitmap is made')
      .requiredOption('--target-bitmap <NAME>', 'its name')
      .action((options: PlanOptions) => runPlan('backup', undefined, options, host)),
    add('delete', 'delete a bitmap from every image', 'daily --top vda')
      .argument('NAME', 'bitmap')
      .action((name: string, options: PlanOptions) => runPlan('delete', name, options, host)),
    add('copy', 'block copy, at the pivot', '--mirror-node mirror --top vda')
      .requiredOption('--mirror-node <NODE>', 'target of the copy')
      .option('--shallow', 'only the top image is copied')
      .option(...activewrite)
      .action((options: PlanOptions) => runPlan('copy', undefined, options, host)),
    add('commit', 'block commit, after the data moved', '--top-node vda --base-node base')
      .requiredOption('--top-node <NODE>', 'top of the commit')
      .requiredOption('--base-node <NODE>', 'image that the data moved into')
      .option('--active', 'the top of the commit is the image that the guest writes to')
      .option(...activewrite)
      .action((options: PlanOptions) => runPlan('commit', undefined, options, host)),
    add('pull', 'block pull into the top, after the data moved', '--base-node base --top vda')
      .option('--base-node <NODE>', 'image that stays below; without it all are pulled')
      .action((options: PlanOptions) => runPlan('pull', undefined, options, host)),
  ]
  plan
    .allowExcessArguments(true)
    .usage('SUBCOMMAND [OPTIONS] …')
    .action(() => {
      throw unknownSubcommand(plan, plans)
    })
  return plan
}

type PlanKind = 'backup' | 'delete' | 'copy' | 'commit' | 'pull'

async function runPlan(
  kind: PlanKind,
  name: string | undefined,
  options: PlanOptions,
  host: Host,
): Promise<void> {
  if (!asksNodes(options))
    throw usageError(`Cannot plan ${kind}: found neither --nodes nor --qmp, expected one of them`)
  const plan = await makePlan(kind, name, options, host)
  const { output } = host
  const { actions, leftOut, reopenReadWrite } = plan
  if (options.json) {
    await output.document({
      actions,
      reopenReadWrite,
      leftOut: leftOut.map(({ bitmap, reasons, valid }) => ({ bitmap, valid, reasons })),
    })
  } else {
    await output.stream(planText(plan))
  }
  for (const verdict of leftOut) {
    const why = verdict.valid
      ? 'the target is raw and cannot hold bitmaps'
      : errorsOf(verdict)
          .map(({ code, image }) => `${code} (${image})`)
          .join(', ')
    if (kind !== 'backup')
      output.note(
        `${output.styleError('yellow', 'left out:')} ${printable(verdict.bitmap)}: ${printable(why)}`,
      )
  }
  if (kind === 'backup' && leftOut.length > 0) throw notValid(leftOut[0]!)
}

async function makePlan(
  kind: PlanKind,
  name: string | undefined,
  options: PlanOptions,
  host: Host,
): Promise<BitmapPlan> {
  const changes = await import('../../changes/index.ts')
  const report = await nodeReport(options, host)
  const activewrite =
    options.activewriteName === undefined ? {} : { activewriteName: options.activewriteName }
  switch (kind) {
    case 'backup':
      return changes.planBackup(nodeChain(report, options), {
        bitmap: options.incremental!,
        targetNode: options.targetNode!,
        targetBitmap: options.targetBitmap!,
      })
    case 'delete':
      return changes.planDelete(nodeChain(report, options), name!)
    case 'copy': {
      const mirror = report.chain([options.mirrorNode!])[0]!
      return changes.planCopy(nodeChain(report, options), {
        mirror,
        shallow: options.shallow === true,
        ...activewrite,
      })
    }
    case 'commit': {
      const chain = nodeChain(report, options, options.topNode)
      const at = chain.findIndex(({ id }) => id === options.topNode)
      if (at < 0) {
        throw new VarveError(
          'NOT_FOUND',
          `Cannot plan the commit: found ${chain.map(({ id }) => id).join(', ')}, expected '${options.topNode}' among them`,
          {
            fields: { node: options.topNode },
            hint: 'Give the nodes of the whole chain with --chain TOP,…,BASE.',
          },
        )
      }
      return changes.planCommit(chain.slice(at), {
        base: options.baseNode!,
        active: options.active === true,
        ...activewrite,
      })
    }
    default:
      return changes.planPull(
        nodeChain(report, options),
        options.baseNode === undefined ? {} : { base: options.baseNode },
      )
  }
}

function* planText({ actions, reopenReadWrite }: BitmapPlan): Generator<string> {
  if (actions.length === 0) yield 'Nothing to do.'
  if (reopenReadWrite.length > 0) yield `reopen for writing: ${reopenReadWrite.map(printable).join(', ')}`
  for (const { data, type } of actions) {
    switch (type) {
      case 'block-dirty-bitmap-add':
        yield `add     ${printable(data.node)}/${printable(data.name)}  ${data.persistent ? 'persistent' : 'transient'}, ${data.disabled ? 'disabled' : 'recording'}${data.granularity === undefined ? '' : `, granularity ${formatBytes(data.granularity)}`}`
        break
      case 'block-dirty-bitmap-remove':
        yield `remove  ${printable(data.node)}/${printable(data.name)}`
        break
      case 'block-dirty-bitmap-merge':
        yield `merge   ${printable(data.node)}/${printable(data.target)}  from ${data.bitmaps.map(({ name, node }) => printable(`${node}/${name}`)).join(', ')}`
        break
    }
  }
}
