/** varve reindex: the deduplication index, made anew from the packs. */
import { VarveError } from '../../base/index.ts'
import { progressLine } from '../progress.ts'
import { addRepositoryOptions, openRepositoryOf, type RepositoryOptions } from '../repository.ts'
import { count, formatSeconds } from '../units.ts'
import { type Host, helpText, type Verb } from '../verb.ts'

interface ReindexOptions extends RepositoryOptions {
  readonly json?: true
}

export const verb: Verb = (command, host) => {
  addRepositoryOptions(command, { required: true })
    .option('--json', 'one JSON object')
    .addHelpText(
      'after',
      helpText({
        examples: ['reindex --repo /backup/vms'],
        exits: { 3: 'done, but some packs could not be read' },
      }),
    )
    .action((options: ReindexOptions) => runReindex(options, host))
}

async function runReindex(options: ReindexOptions, host: Host): Promise<void> {
  const { output, signal } = host
  await using repository = await openRepositoryOf(options, host)
  const result = await (async () => {
    using line = progressLine('')
    return await repository.reindex({ signal, progress: line.listener })
  })()
  if (options.json) {
    await output.document(result)
  } else {
    await output.lines(
      `Indexed ${count(result.chunks, 'chunk')} of ${count(result.packs, 'pack')} in ${formatSeconds(result.seconds)}`,
    )
  }
  if (result.damaged.length > 0) {
    throw new VarveError(
      'PARTIAL',
      `Cannot index ${count(result.damaged.length, 'pack')}: ${result.damaged.slice(0, 3).join(', ')}${result.damaged.length > 3 ? ' …' : ''}`,
      { fields: { damaged: result.damaged.length }, hint: '`varve verify` says which points that touches.' },
    )
  }
}
