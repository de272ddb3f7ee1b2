/** varve convert: an image in another format, whole or only what is in use. */
import type { CopyResult, Disk } from '../../chain/index.ts'
import { addAnyImageOptions, type ImageOptions, openImage } from '../image.ts'
import { progressLine } from '../progress.ts'
import { type Host, helpText, usageError, type Verb } from '../verb.ts'
import { collectSettings, type WrittenImage, writePoint, writtenText } from '../write-image.ts'

interface ConvertOptions extends ImageOptions {
  readonly outputFormat: string
  readonly inUse?: true
  readonly allBlocks?: true
  readonly force?: true
  readonly set?: Readonly<Record<string, string | number | boolean>>
  readonly json?: true
}

export const verb: Verb = (command, host) => {
  addAnyImageOptions(command)
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
        exits: { 1: 'failed, or DST is there already' },
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
  const started = performance.now()
  const { convertImage } = await import('../../chain/index.ts')
  await using image = await openImage(source, options, host)
  const result = await (async (): Promise<WrittenImage> => {
    using line = progressLine('')
    const context = { signal, progress: line.listener }
    const inUse = options.inUse
      ? (await (await import('../../inuse/index.ts')).mapInUse(image.device, context)).ranges
      : undefined
    const facts = {
      format: options.outputFormat,
      force: options.force,
      settings: options.set,
      inUse,
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
    }
  })()
  if (options.json) await output.document(result)
  else await output.stream(writtenText(result, source, output))
}

function isDisk(device: object): device is Disk {
  return 'layers' in device && 'mapExtents' in device
}
