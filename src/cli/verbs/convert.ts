/** varve convert: an image in another format, whole or only what is in use. */
import type { CopyResult, Disk } from '../../chain/index.ts'
import { addAnyImageOptions, type ImageOptions, openImage } from '../image.ts'
import { addInUseOptions, type InUseOptions, refuseInUseOptions, verdictLines } from '../map-options.ts'
import { progressLine } from '../progress.ts'
import { type Host, helpText, usageError, type Verb } from '../verb.ts'
import { collectSettings, type WrittenImage, writePoint, writtenText } from '../write-image.ts'

interface ConvertOptions extends ImageOptions, InUseOptions {
  readonly outputFormat: string
  readonly inUse?: true
  readonly allBlocks?: true
  readonly force?: true
  readonly set?: Readonly<Record<string, string | number | boolean>>
  readonly json?: true
}

export const verb: Verb = (command, host) => {
  addInUseOptions(addAnyImageOptions(command))
    .argument('SRC', 'image, block device or repo:DISK@POINT')
    .argument('DST', 'file to make; a block device needs --force')
    .option('-O, --output-format <FORMAT>', 'format of DST', 'raw')
    .option('--in-use', 'copy only what is in use; the rest reads as zeros')
    .option('--all-blocks', 'copy every block, in use or not (the default)')
    .option(
      '--set <NAME=VALUE>',
      'setting of the format of DST, e.g. clusterBytes=65536 (repeatable)',
      collectSettings,
    )
    .option('--force', 'replace DST if it is there')
    .option('--json', 'one JSON object')
    .addHelpText(
      'after',
      helpText({
        examples: ['convert web01.vhd web01.qcow2 -O qcow2', 'convert --in-use web01.qcow2 web01.raw'],
        exits: {
          11: 'a running VM or another program writes to an image',
          1: 'failed, or DST is there already',
        },
      }),
    )
    .action((source: string, target: string, options: ConvertOptions) =>
      runConvert(source, target, options, host),
    )
}

async function runConvert(
  source: string,
  target: string,
  options: ConvertOptions,
  host: Host,
): Promise<void> {
  const { output, signal } = host
  if (options.inUse && options.allBlocks) {
    throw usageError('Cannot run convert: found --in-use and --all-blocks, expected one of them')
  }
  if (!options.inUse) refuseInUseOptions('convert', options, '--in-use')
  const started = performance.now()
  const { convertImage } = await import('../../chain/index.ts')
  await using image = await openImage(source, options, host, { still: true })
  const result = await (async (): Promise<WrittenImage> => {
    using line = progressLine('')
    const context = { signal, progress: line.listener }
    const map = options.inUse
      ? await (await import('../../inuse/index.ts')).mapInUse(image.device, {
          ...context,
          audit: options.audit === true,
          skipPageFiles: options.skipPageFiles === true,
        })
      : undefined
    const facts = {
      format: options.outputFormat,
      force: options.force,
      settings: options.set,
      inUse: map?.ranges,
      ...context,
    }
    const copied: CopyResult = isDisk(image.device)
      ? await convertImage(image.device, target, facts)
      : await writePoint(image.device, target, facts)
    return {
      path: target,
      format: options.outputFormat,
      virtualSize: image.device.size,
      copiedBytes: copied.copiedBytes,
      zeroBytes: copied.zeroBytes,
      skippedBytes: copied.skippedBytes,
      seconds: (performance.now() - started) / 1000,
      ...(map ? { regions: map.regions } : {}),
    }
  })()
  if (options.json) await output.document(result)
  else {
    await output.stream([
      ...writtenText(result, source, output),
      ...verdictLines(result.regions ?? [], options, output),
    ])
  }
}

function isDisk(device: object): device is Disk {
  return 'layers' in device && 'mapExtents' in device
}
