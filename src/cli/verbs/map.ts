/** varve map: extents of the guest's view, as `qemu-img map --output=json` names them, and what is in use. */

import { addAnyImageOptions, type Image, type ImageOptions, openImage } from '../image.ts'
import type { MapRow } from '../map-rows.ts'
import { mapRows } from '../map-rows.ts'
import { type Output, printable } from '../output.ts'
import { table } from '../table.ts'
import { count, formatBytes, formatShare } from '../units.ts'
import { type Host, helpText, usageError, type Verb } from '../verb.ts'

interface MapOptions extends ImageOptions {
  readonly inUse?: true
  readonly allocated?: true
  readonly ranges?: true
  readonly all?: true
  readonly json?: true
}

/** Rows that a terminal is given before it is told how many more there are. */
const TERMINAL_ROWS = 100

export const verb: Verb = (command, host) => {
  addAnyImageOptions(command)
    .argument('IMAGE', 'image, block device or repo:DISK@POINT')
    .option('--in-use', "mark what the guest's file systems use, and cut extents there")
    .option('--allocated', 'only what some layer holds (with --json: mark it)')
    .option(
      '--ranges',
      'a line "start length" a range, bytes; with --in-use or --allocated (or both: what is both)',
    )
    .option('--all', 'print every row on a terminal too')
    .option('--json', 'one JSON array that covers the whole disk')
    .addHelpText(
      'after',
      helpText({
        examples: [
          'map web01.qcow2',
          'map --in-use --json web01.qcow2',
          'map --in-use --ranges /dev/vg/web01',
        ],
      }),
    )
    .action((argument: string, options: MapOptions) => runMap(argument, options, host))
}

async function runMap(argument: string, options: MapOptions, host: Host): Promise<void> {
  const { output, signal } = host
  if (options.ranges && options.json) {
    throw usageError('Cannot run map: found --ranges and --json, expected one of them')
  }
  if (options.ranges && !options.inUse && !options.allocated) {
    throw usageError('Cannot run map: found --ranges alone, expected --in-use or --allocated with it')
  }
  await using image = await openImage(argument, options, host)
  const inUse = options.inUse
    ? (await (await import('../../inuse/index.ts')).mapInUse(image.device, { signal })).ranges
    : undefined
  if (options.ranges && inUse && !options.allocated) {
    // The map itself: no need to ask the layers for anything.
    await output.stream(rangeLines(inUse))
    return
  }
  const rows = mapRows(image.entries(), { inUse, allocated: options.allocated })
  if (options.ranges) {
    await output.stream(await wantedRanges(rows))
  } else if (options.json) {
    await output.array(await Array.fromAsync(rows))
  } else {
    await printRows(await Array.fromAsync(rows), image, options, output)
  }
}

function* rangeLines(ranges: Iterable<{ readonly start: number; readonly end: number }>): Generator<string> {
  for (const { start, end } of ranges) yield `${start} ${end - start}`
}

/** What is allocated (and in use, where that was asked), joined over rows that differ in other ways. */
async function wantedRanges(rows: AsyncIterable<MapRow>): Promise<string[]> {
  const ranges: { start: number; end: number }[] = []
  for await (const row of rows) {
    if (!row.allocated || row.inUse === false) continue
    const last = ranges.at(-1)
    if (last?.end === row.start) last.end += row.length
    else ranges.push({ start: row.start, end: row.start + row.length })
  }
  return [...rangeLines(ranges)]
}

async function printRows(
  rows: readonly MapRow[],
  image: Image,
  options: MapOptions,
  output: Output,
): Promise<void> {
  const wanted = options.allocated ? rows.filter((row) => row.allocated) : rows
  const limit = options.all || !process.stdout.isTTY ? wanted.length : TERMINAL_ROWS
  const files = new Map(image.layers.map(({ path, depth }) => [path, depth]))
  const lines = table(
    [
      { title: 'START', align: 'right' },
      { title: 'LENGTH', align: 'right' },
      { title: '', align: 'right' },
      { title: 'LAYER', align: 'right' },
      { title: 'KIND' },
      { title: options.inUse ? 'IN USE' : '' },
      { title: 'PLACE' },
    ],
    wanted
      .slice(0, limit)
      .map((row) => [
        String(row.start),
        String(row.length),
        formatBytes(row.length),
        String(row.depth),
        row.data ? 'data' : row.present ? 'zero' : output.style('dim', 'absent'),
        row.inUse === undefined ? '' : row.inUse ? output.style('green', 'yes') : output.style('dim', 'no'),
        row.offset === undefined ? '' : `${placeName(row.file, files)}:${row.offset}`,
      ]),
    (titles) => output.style('bold', titles),
  )
  await output.stream(lines)
  if (wanted.length > limit) {
    await output.lines(
      output.style('dim', `… and ${count(wanted.length - limit, 'row')} more; --all prints them`),
    )
  }
  const total = image.device.size
  const sum = (keep: (row: MapRow) => boolean): number =>
    rows.reduce((bytes, row) => (keep(row) ? bytes + row.length : bytes), 0)
  const data = sum((row) => row.data)
  const facts = [`${formatBytes(total)} disk`, `${formatBytes(data)} data (${formatShare(data, total)})`]
  if (options.inUse) {
    const used = sum((row) => row.inUse === true)
    facts.push(`${formatBytes(used)} in use (${formatShare(used, total)})`)
  }
  await output.lines('', facts.join(' · '))
}

/** The path once is enough: rows name their layer's own file by nothing but the offset. */
function placeName(file: string | undefined, files: ReadonlyMap<string, number>): string {
  if (file === undefined) return ''
  return files.size === 1 && files.has(file) ? '' : printable(file)
}
