/** varve inspect: layers, partition and file system tree, share in use and trust of each region. */
import { isAbsolute, relative } from 'node:path'
import type { InUseMap, Region } from '../../inuse/index.ts'
import { addAnyImageOptions, type Image, type ImageOptions, openImage } from '../image.ts'
import { addInUseOptions, type InUseOptions, type Totals, totalsOf } from '../map-options.ts'
import { type Output, printable } from '../output.ts'
import { regionLines } from '../regions.ts'
import { table } from '../table.ts'
import { formatBytes, formatShare } from '../units.ts'
import { type Host, helpText, type Verb } from '../verb.ts'

interface InspectOptions extends ImageOptions, InUseOptions {
  readonly together?: true
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
  readonly totals: Totals
}

export const verb: Verb = (command, host) => {
  addInUseOptions(
    addAnyImageOptions(command)
      .argument('<IMAGE...>', 'images, block devices or repo:DISK@POINT')
      .option(
        '--together',
        'the images are disks of one machine: volume groups, arrays and file systems spread over them',
      ),
  )
    .option('--json', 'one JSON object; an array of them for several images, and with --together')
    .addHelpText(
      'after',
      helpText({
        examples: [
          'inspect web01.qcow2',
          'inspect --json *.vhd',
          'inspect --together disk1.qcow2 disk2.qcow2',
        ],
      }),
    )
    .action((images: readonly string[], options: InspectOptions) => runInspect(images, options, host))
}

async function runInspect(images: readonly string[], options: InspectOptions, host: Host): Promise<void> {
  const { output, signal } = host
  const { mapInUseTogether } = await import('../../inuse/index.ts')
  const asked = {
    signal,
    audit: options.audit === true,
    skipPageFiles: options.skipPageFiles === true,
  }
  const documents: InspectDocument[] = []
  // Alone, each is closed before the next one is opened.
  for (const paths of options.together ? [images] : images.map((path) => [path])) {
    await using stack = new AsyncDisposableStack()
    const opened: Image[] = []
    for (const path of paths) opened.push(stack.use(await openImage(path, options, host)))
    const maps = await mapInUseTogether(
      opened.map(({ device }) => device),
      asked,
    )
    for (const [index, image] of opened.entries()) {
      documents.push(documentOf(image, maps[index]!))
      if (options.json) continue
      if (documents.length > 1) await output.lines('')
      await output.stream(textOf(image, maps[index]!, output))
    }
  }
  if (!options.json) return
  await output.document(images.length === 1 && !options.together ? documents[0] : documents)
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
    totals: totalsOf(map),
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
        printable(shortPath(layer.path)),
        layer.format,
        formatBytes(layer.virtualSize),
        formatBytes(layer.allocatedBytes),
        output.style('dim', factsOf(layer.facts)),
      ]),
      (titles) => output.style('bold', titles),
    ),
    '',
    ...regionLines(map.regions, output),
    '',
    totalLine(totalsOf(map), total, output),
  ]
  return lines
}

function totalLine({ inUseBytes, freeBytes, assumedBytes }: Totals, total: number, output: Output): string {
  const assumed =
    assumedBytes > 0
      ? output.style('yellow', `${formatBytes(assumedBytes)} of that assumed`)
      : 'nothing of that assumed'
  return [
    `${formatBytes(inUseBytes)} in use (${formatShare(inUseBytes, total)})`,
    assumed,
    `${formatBytes(freeBytes)} free (${formatShare(freeBytes, total)})`,
  ].join(' · ')
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

/** Relative to the current folder where the file is inside it. */
function shortPath(path: string): string {
  const short = relative(process.cwd(), path)
  return isAbsolute(path) && !short.startsWith('..') ? short : path
}

/** `compressionType` -> `compression type` */
function words(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`)
}
