/** varve inspect: layers, partition and file system tree, share in use and trust of each region. */
import type { InUseMap, Region } from '../../inuse/index.ts'
import { addAnyImageOptions, type Image, type ImageOptions, openImage } from '../image.ts'
import { type Output, printable } from '../output.ts'
import { regionLines } from '../regions.ts'
import { table } from '../table.ts'
import { formatBytes, formatShare } from '../units.ts'
import { type Host, helpText, type Verb } from '../verb.ts'

interface InspectOptions extends ImageOptions {
  readonly json?: true
}

/** `varve inspect --json`; docs/cli.md. */
interface InspectDocument {
  readonly image: {
    readonly path: string
    readonly format: string
    readonly virtualSize: number
    readonly layers: readonly {
      readonly path: string
      readonly format: string
      readonly virtualSize: number
      readonly allocatedBytes: number
      readonly depth: number
    }[]
  }
  readonly regions: readonly Region[]
  readonly inUseBytes: number
  readonly virtualSize: number
}

export const verb: Verb = (command, host) => {
  addAnyImageOptions(command)
    .argument('<IMAGE...>', 'images, block devices or repo:DISK@POINT')
    .option('--json', 'one JSON object; an array of them for several images')
    .addHelpText('after', helpText({ examples: ['inspect web01.qcow2', 'inspect --json *.vhd'] }))
    .action((images: readonly string[], options: InspectOptions) => runInspect(images, options, host))
}

async function runInspect(images: readonly string[], options: InspectOptions, host: Host): Promise<void> {
  const { output, signal } = host
  const { mapInUse } = await import('../../inuse/index.ts')
  const documents: InspectDocument[] = []
  for (const [index, argument] of images.entries()) {
    await using image = await openImage(argument, options, host)
    const map = await mapInUse(image.device, { signal })
    if (options.json) {
      documents.push(documentOf(image, map))
    } else {
      if (index > 0) await output.lines('')
      await output.stream(textOf(image, map, output))
    }
  }
  if (options.json) await output.document(images.length === 1 ? documents[0] : documents)
}

function documentOf(image: Image, map: InUseMap): InspectDocument {
  return {
    image: {
      path: image.path,
      format: image.format,
      virtualSize: image.device.size,
      layers: image.layers.map(({ path, format, virtualSize, allocatedBytes, depth }) => ({
        path,
        format,
        virtualSize,
        allocatedBytes,
        depth,
      })),
    },
    regions: map.regions,
    inUseBytes: map.inUseBytes,
    virtualSize: image.device.size,
  }
}

function textOf(image: Image, map: InUseMap, output: Output): string[] {
  const total = image.device.size
  const lines = [
    `${output.style('bold', printable(image.path))}  ${image.format} · ${formatBytes(total)} · ${output.style(
      'green',
      `${formatBytes(map.inUseBytes)} in use (${formatShare(map.inUseBytes, total)})`,
    )}`,
    '',
    ...table(
      [
        { title: 'LAYER' },
        { title: 'FORMAT' },
        { title: 'SIZE', align: 'right' },
        { title: 'ON HOST', align: 'right' },
        { title: '' },
      ],
      image.layers.map((layer) => [
        printable(layer.path),
        layer.format,
        formatBytes(layer.virtualSize),
        formatBytes(layer.allocatedBytes),
        output.style('dim', factsOf(layer.facts)),
      ]),
      (titles) => output.style('bold', titles),
    ),
    '',
    ...regionLines(map.regions, output),
  ]
  return lines
}

function factsOf(facts: Readonly<Record<string, string | number | boolean>>): string {
  return Object.entries(facts)
    .filter(([, value]) => value !== false && value !== 0)
    .map(([name, value]) => {
      if (value === true) return words(name)
      return name.endsWith('Bytes') && typeof value === 'number'
        ? `${words(name.slice(0, -'Bytes'.length))} ${formatBytes(value)}`
        : `${words(name)} ${printable(String(value))}`
    })
    .join(', ')
}

/** `compressionType` -> `compression type` */
function words(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`)
}
