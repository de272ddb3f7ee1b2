/** varve points: what a repository holds. */
import type { PointInfo } from '../../backup/index.ts'
import { VarveError } from '../../base/index.ts'
import { errorDocument } from '../failure.ts'
import { type Output, printable } from '../output.ts'
import { addRepositoryOptions, openRepositoryOf, type RepositoryOptions } from '../repository.ts'
import { table } from '../table.ts'
import { count, formatBytes, formatShare } from '../units.ts'
import { type Host, helpText, type Verb } from '../verb.ts'

interface PointsOptions extends RepositoryOptions {
  readonly json?: true
}

export const verb: Verb = (command, host) => {
  addRepositoryOptions(command, { required: true })
    .argument('[DISK]', 'only the points of this disk')
    .option('--json', 'one JSON array')
    .addHelpText(
      'after',
      helpText({
        examples: ['points --repo /backup/vms', 'points web01 --json --repo /backup/vms'],
        exits: { 10: 'no such repository, or no such disk in it', 12: 'a point cannot be read' },
      }),
    )
    .action((disk: string | undefined, options: PointsOptions) => runPoints(disk, options, host))
}

async function runPoints(disk: string | undefined, options: PointsOptions, host: Host): Promise<void> {
  const { output } = host
  await using repository = await openRepositoryOf(options, host)
  const points = await repository.points(disk)
  if (disk !== undefined && points.length === 0) {
    throw new VarveError(
      'NOT_FOUND',
      `Cannot list points: found none of disk '${disk}' in ${repository.path}`,
      {
        fields: { disk, repository: repository.path },
      },
    )
  }
  if (options.json) {
    await output.document(
      points.map(({ error, ...point }) => (error ? { ...point, error: errorDocument(error) } : point)),
    )
  } else {
    await output.stream(textOf(points, output))
  }
  const broken = points.filter(({ error }) => error)
  if (broken.length > 0) {
    throw new VarveError(
      'CORRUPT',
      `Cannot read ${count(broken.length, 'restore point')} of ${points.length}: ${broken[0]!.error!.message}`,
      { fields: { broken: broken.length }, hint: '`varve verify` says what is damaged.' },
    )
  }
}

function textOf(points: readonly PointInfo[], output: Output): string[] {
  if (points.length === 0) return ['No restore points yet; `varve backup IMAGE --repo REPO` makes one.']
  return [
    ...table(
      [
        { title: 'DISK' },
        { title: 'POINT' },
        { title: 'MADE' },
        { title: 'SIZE', align: 'right' },
        { title: 'IN USE', align: 'right' },
        { title: '', align: 'right' },
        { title: 'CHANGED', align: 'right' },
        { title: 'STORED', align: 'right' },
      ],
      points.map((point) => [
        printable(point.disk),
        point.point,
        ...(point.error
          ? [output.style('red', `unreadable: ${printable(point.error.message)}`)]
          : [
              localTime(point.created),
              formatBytes(point.virtualSize),
              formatBytes(point.inUseBytes),
              formatShare(point.inUseBytes, point.virtualSize),
              formatBytes(point.changedBytes),
              formatBytes(point.storedBytes),
            ]),
      ]),
      (titles) => output.style('bold', titles),
    ),
    '',
    `${count(points.length, 'restore point')} of ${count(new Set(points.map(({ disk }) => disk)).size, 'disk')}`,
  ]
}

/** `2026-03-01 14:05`, in the host's time zone. */
function localTime(iso: string): string {
  const at = new Date(iso)
  if (Number.isNaN(at.getTime())) return printable(iso)
  const two = (value: number): string => String(value).padStart(2, '0')
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`
}
