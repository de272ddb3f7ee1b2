/**
 * varve backup: a restore point of each image, of what is in use.
 *
 * Rule: what is printed and what --json says come from the same facts, and name what was taken whole because it
 * could not be vouched for. Of several images, one that fails does not stop the others: exit 3 then.
 */
import type { BackupResult, Repository } from '../../backup/index.ts'
import { VarveError } from '../../base/index.ts'
import { RangeSet } from '../../extents/index.ts'
import type { Region } from '../../inuse/index.ts'
import { asVarveError, errorDocument } from '../failure.ts'
import { addImageOptions, defaultDiskName, type ImageOptions, openImage } from '../image.ts'
import { addInUseOptions, type InUseOptions, verdictLines } from '../map-options.ts'
import { type Output, printable } from '../output.ts'
import { progressLine } from '../progress.ts'
import { addRepositoryOptions, openRepositoryOf } from '../repository.ts'
import { count, formatBytes, formatSeconds, formatShare } from '../units.ts'
import { type Host, helpText, usageError, type Verb } from '../verb.ts'

interface BackupOptions extends ImageOptions, InUseOptions {
  readonly disk?: string
  readonly allBlocks?: true
  readonly json?: true
}

/** `varve backup --json`, one per image; docs/cli.md. */
interface BackupDocument extends BackupResult {
  readonly regions: readonly Region[]
}

export const verb: Verb = (command, host) => {
  addInUseOptions(addRepositoryOptions(addImageOptions(command), { required: true }))
    .argument('<IMAGE...>', 'images or block devices; nothing may write to them meanwhile')
    .option(
      '--disk <NAME>',
      "the disk's name in the repository (default: the file name without its extension)",
    )
    .option('--all-blocks', 'keep every byte as it is, in use or not')
    .option('--json', 'one JSON object; an array of them for several images')
    .addHelpText(
      'after',
      helpText({
        examples: [
          'backup web01.qcow2 --repo /backup/vms',
          'backup --disk web01 --json /dev/vg/web01-snapshot --repo /backup/vms',
        ],
        exits: {
          11: 'a running VM or another program writes to an image',
          3: 'done for some of the images; the output names the others',
          130: 'interrupted; no half point is left, and the next backup works',
        },
      }),
    )
    .action((images: readonly string[], options: BackupOptions) => runBackup(images, options, host))
}

async function runBackup(images: readonly string[], options: BackupOptions, host: Host): Promise<void> {
  const { output, signal } = host
  const jobs = jobsOf(images, options)
  await using repository = await openRepositoryOf(options, host)
  const documents: unknown[] = []
  const failures: { readonly image: string; readonly error: VarveError }[] = []
  for (const { image, disk } of jobs) {
    try {
      const document = await backupOne(image, disk, repository, options, host)
      documents.push(document)
      if (!options.json) {
        if (documents.length > 1) await output.lines('')
        await output.stream(textOf(image, document, options, output))
      }
    } catch (error) {
      const failure = asVarveError(error, signal)
      if (jobs.length === 1 || failure.code === 'CANCELLED') throw failure
      failures.push({ image, error: failure })
      documents.push({ disk, image, error: errorDocument(failure) })
      output.note(
        `${output.styleError(['red', 'bold'], `varve: ${failure.code}:`)} ${printable(image)}: ${printable(failure.message)}`,
      )
    }
  }
  if (options.json) await output.document(jobs.length === 1 ? documents[0] : documents)
  if (failures.length === 0) return
  if (failures.length === jobs.length) throw failures[0]!.error
  throw new VarveError(
    'PARTIAL',
    `Cannot back up ${failures.length} of ${count(jobs.length, 'image')}: ${failures.map(({ image }) => image).join(', ')}`,
    { fields: { failed: failures.length, done: jobs.length - failures.length } },
  )
}

interface Job {
  readonly image: string
  readonly disk: string
}

function jobsOf(images: readonly string[], options: BackupOptions): readonly Job[] {
  const { disk } = options
  if (options.allBlocks && options.skipPageFiles) {
    throw usageError('Cannot run backup: found --all-blocks and --skip-page-files, expected one of them')
  }
  if (disk !== undefined && images.length > 1) {
    throw usageError(`Cannot run backup: found --disk with ${images.length} images, expected one image`)
  }
  const jobs: Job[] = []
  for (const image of images) {
    if (image.startsWith('repo:')) {
      throw usageError(
        `Cannot back up ${image}: found a restore point, expected an image or a block device`,
        'A restore point is in a repository already.',
      )
    }
    const name = disk ?? defaultDiskName(image)
    const other = jobs.find((job) => job.disk === name)
    if (other) {
      throw usageError(
        `Cannot run backup: found the disk name '${name}' for ${other.image} and ${image}, expected different ones`,
        'Back them up one by one, with --disk NAME.',
      )
    }
    jobs.push({ image, disk: name })
  }
  return jobs
}

async function backupOne(
  argument: string,
  disk: string,
  repository: Repository,
  options: BackupOptions,
  host: Host,
): Promise<BackupDocument> {
  const { signal } = host
  const { mapInUse } = await import('../../inuse/index.ts')
  await using image = await openImage(argument, options, host, { still: true })
  using line = progressLine(disk)
  const { device } = image
  const map = await mapInUse(device, {
    signal,
    progress: line.listener,
    audit: options.audit === true,
    skipPageFiles: options.skipPageFiles === true,
  })
  const result = await repository.backup(
    {
      disk,
      device,
      inUse: options.allBlocks ? RangeSet.of(0, device.size) : map.ranges,
      regions: map.regions,
      about: {
        path: image.layers[0]!.path,
        format: image.format,
        allBlocks: options.allBlocks === true,
      },
    },
    { signal, progress: line.listener },
  )
  return { ...result, regions: map.regions }
}

function textOf(image: string, done: BackupDocument, options: BackupOptions, output: Output): string[] {
  const { virtualSize, inUseBytes, readBytes, changedBytes, storedBytes, newChunks, reusedChunks, seconds } =
    done
  const skipped = virtualSize - inUseBytes
  const row = (name: string, size: number, note: string): string =>
    `  ${name.padEnd(8)} ${formatBytes(size).padStart(9)}  ${output.style('dim', note)}`.trimEnd()
  const rate = seconds > 0 ? `${formatBytes(Math.round(readBytes / seconds))}/s` : ''
  const lines = [
    `${output.style('green', '✓')} ${output.style('bold', printable(done.disk))}@${done.point}  ${output.style('dim', printable(image))}`,
    row('in use', inUseBytes, `${formatShare(inUseBytes, virtualSize)} of ${formatBytes(virtualSize)}`),
    row('skipped', skipped, options.allBlocks ? 'nothing: --all-blocks' : 'no file system uses it'),
    row('read', readBytes, `in ${formatSeconds(seconds)}${rate === '' ? '' : `, ${rate}`}`),
    row('changed', changedBytes, 'in chunks that the latest point of this disk has not'),
    row('stored', storedBytes, `${count(newChunks, 'new chunk')}, ${reusedChunks} reused`),
  ]
  lines.push(...verdictLines(done.regions, options, output))
  return lines
}
