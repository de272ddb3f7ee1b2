/** varve restore: a restore point as an image, or onto a block device. */
import { progressLine } from '../progress.ts'
import {
  addRepositoryOptions,
  openRepositoryOf,
  parsePointName,
  type RepositoryOptions,
} from '../repository.ts'
import { type Host, helpText, type Verb } from '../verb.ts'
import { collectSettings, type WrittenImage, writePoint, writtenText } from '../write-image.ts'

interface RestoreOptions extends RepositoryOptions {
  readonly outputFormat: string
  readonly force?: true
  readonly set?: Readonly<Record<string, string | number | boolean>>
  readonly json?: true
}

export const verb: Verb = (command, host) => {
  addRepositoryOptions(command, { required: true })
    .argument('DISK@POINT', 'the point; DISK@latest or DISK is the newest')
    .argument('DEST', 'file to make; a block device needs --force')
    .option('-O, --output-format <FORMAT>', 'format of DEST', 'raw')
    .option(
      '--set <NAME=VALUE>',
      'setting of the format of DEST, e.g. clusterBytes=65536 (repeatable)',
      collectSettings,
    )
    .option('--force', 'replace DEST if it is there')
    .option('--json', 'one JSON object')
    .addHelpText(
      'after',
      helpText({
        examples: [
          'restore web01@latest web01.qcow2 -O qcow2 --repo /backup/vms',
          'restore web01@01K3 /dev/vg/web01 --force --repo /backup/vms',
        ],
        exits: { 1: 'failed, or DEST is there already', 12: 'the repository is damaged there' },
      }),
    )
    .action((point: string, target: string, options: RestoreOptions) =>
      runRestore(point, target, options, host),
    )
}

async function runRestore(text: string, target: string, options: RestoreOptions, host: Host): Promise<void> {
  const { output, signal } = host
  const started = performance.now()
  const name = parsePointName(text)
  await using repository = await openRepositoryOf(options, host)
  await using point = await repository.openPoint(name, { signal })
  const { info } = point
  const result = await (async (): Promise<WrittenImage> => {
    using line = progressLine(info.disk)
    const copied = await writePoint(point, target, {
      format: options.outputFormat,
      force: options.force,
      settings: options.set,
      signal,
      progress: line.listener,
    })
    return {
      path: target,
      format: options.outputFormat,
      virtualSize: info.virtualSize,
      copiedBytes: copied.copiedBytes,
      zeroBytes: copied.zeroBytes,
      skippedBytes: copied.skippedBytes,
      seconds: (performance.now() - started) / 1000,
    }
  })()
  if (options.json) await output.document({ disk: info.disk, point: info.point, ...result })
  else await output.stream(writtenText(result, `${info.disk}@${info.point}`, output))
}
