/** varve map: extents of the guest's view, as `qemu-img map --output=json` names them, and what is in use. */
import { writeFile } from 'node:fs/promises'
import { fromSystem } from '../../base/index.ts'
import type { InUseMap } from '../../inuse/index.ts'
import { addAnyImageOptions, type Image, type ImageOptions, openImage } from '../image.ts'
import { addInUseOptions, type InUseOptions, refuseInUseOptions } from '../map-options.ts'
import type { MapRow } from '../map-rows.ts'
import { mapRows } from '../map-rows.ts'
import { type Output, printable } from '../output.ts'
import { table } from '../table.ts'
import { count, formatBytes, formatShare } from '../units.ts'
import { type Host, helpText, usageError, type Verb } from '../verb.ts'

interface MapOptions extends ImageOptions, InUseOptions {
  readonly inUse?: true
  readonly together?: true
  readonly allocated?: true
  readonly ranges?: true
  readonly picture?: true
  readonly svg?: string
  readonly force?: true
  readonly all?: true
  readonly json?: true
}

/** Rows that a terminal is given before it is told how many more there are. */
const TERMINAL_ROWS = 100
/** Columns of a picture that goes to no terminal. */
const PLAIN_COLUMNS = 100

export const verb: Verb = (command, host) => {
  addInUseOptions(
    addAnyImageOptions(command)
      .argument('<IMAGE...>', 'image, block device or repo:DISK@POINT; several with --together')
      .option('--in-use', "mark what the guest's file systems use, and cut extents there")
      .option(
        '--together',
        'the images are disks of one machine: volume groups, arrays and file systems spread over them (implies --in-use)',
      ),
  )
    .option('--allocated', 'only what some layer holds (with --json: mark it)')
    .option(
      '--ranges',
      'a line "start length" a range, bytes; with --in-use or --allocated (or both: what is both)',
    )
    .option('--picture', 'draw what is in use: a strip for the disk, one for each region')
    .option('--svg <FILE>', 'write the same as an SVG picture')
    .option('--force', 'replace the FILE of --svg if it is there')
    .option('--all', 'print every row on a terminal too')
    .option('--json', 'one JSON array that covers the whole disk')
    .addHelpText(
      'after',
      helpText({
        examples: [
          'map web01.qcow2',
          'map --in-use --json web01.qcow2',
          'map --in-use --ranges /dev/vg/web01',
          'map --picture web01.qcow2',
          'map --together --svg vm.svg disk1.qcow2 disk2.qcow2',
        ],
      }),
    )
    .action((images: readonly string[], options: MapOptions) => runMap(images, options, host))
}

async function runMap(paths: readonly string[], options: MapOptions, host: Host): Promise<void> {
  const { output, signal } = host
  const { picture, svg, together } = options
  const wantsInUse = options.inUse || together || picture || svg !== undefined
  checkOptions(paths, options, wantsInUse)

  await using stack = new AsyncDisposableStack()
  const images: Image[] = []
  for (const path of paths) images.push(stack.use(await openImage(path, options, host)))
  const maps = wantsInUse
    ? await (await import('../../inuse/index.ts')).mapInUseTogether(
        images.map(({ device }) => device),
        { signal, audit: options.audit === true, skipPageFiles: options.skipPageFiles === true },
      )
    : undefined

  if (maps && (picture || svg !== undefined)) {
    const done = await draw(images, maps, options, output)
    if (done) return
  }
  if (options.json && together) {
    const documents: unknown[] = []
    for (const [index, image] of images.entries()) {
      documents.push({
        path: image.path,
        virtualSize: image.device.size,
        extents: await Array.fromAsync(rowsOf(image, maps?.[index], options)),
      })
    }
    await output.document(documents)
    return
  }
  for (const [index, image] of images.entries()) {
    const map = maps?.[index]
    if (options.ranges) {
      const suffix = together ? ` ${index}` : ''
      // The map itself where that is all: no need to ask the layers for anything.
      const ranges = map && !options.allocated ? map.ranges : await wantedRanges(rowsOf(image, map, options))
      await output.stream(rangeLines(ranges, suffix))
    } else if (options.json) {
      await output.array(await Array.fromAsync(rowsOf(image, map, options)))
    } else {
      if (index > 0) await output.lines('')
      if (together) await output.lines(output.style('bold', printable(image.path)))
      await printRows(await Array.fromAsync(rowsOf(image, map, options)), image, wantsInUse, options, output)
    }
  }
}

function checkOptions(paths: readonly string[], options: MapOptions, inUse: boolean): void {
  const { ranges, json, picture, svg, force, allocated, together } = options
  if (ranges && json) throw usageError('Cannot run map: found --ranges and --json, expected one of them')
  if (ranges && !inUse && !allocated) {
    throw usageError('Cannot run map: found --ranges alone, expected --in-use or --allocated with it')
  }
  if (paths.length > 1 && !together) {
    throw usageError(
      `Cannot run map: found ${paths.length} images, expected one, or --together`,
      'With --together images are taken as the disks of one machine; for others run map once for each.',
    )
  }
  const other = ranges ? '--ranges' : json ? '--json' : allocated ? '--allocated' : undefined
  if (picture && other !== undefined) {
    throw usageError(`Cannot run map: found --picture and ${other}, expected one of them`)
  }
  if (force && svg === undefined) throw usageError('Cannot run map: found --force, expected --svg with it')
  if (svg === '-' && (ranges || json || picture)) {
    throw usageError('Cannot run map: found --svg - and other output, expected one of them on stdout')
  }
  if (!inUse) refuseInUseOptions('map', options, '--in-use')
}

function rowsOf(image: Image, map: InUseMap | undefined, options: MapOptions): AsyncIterable<MapRow> {
  return mapRows(image.entries(), { inUse: map?.ranges, allocated: options.allocated })
}

/** True when there is nothing else to print. */
async function draw(
  images: readonly Image[],
  maps: readonly InUseMap[],
  options: MapOptions,
  output: Output,
): Promise<boolean> {
  const { pictureLines, pictureSvg } = await import('../picture.ts')
  const disks = images.map(({ path }, index) => ({ path, map: maps[index]! }))
  const { svg } = options
  if (svg === '-') {
    await output.write(pictureSvg(disks))
    return true
  }
  if (svg !== undefined) {
    try {
      await writeFile(svg, pictureSvg(disks), { flag: options.force ? 'w' : 'wx' })
    } catch (error) {
      throw fromSystem(error, 'write', svg)
    }
  }
  if (options.picture) {
    for (const [index, disk] of disks.entries()) {
      if (index > 0) await output.lines('')
      await output.stream(pictureLines(disk, process.stdout.columns ?? PLAIN_COLUMNS, output))
    }
    return true
  }
  if (options.ranges || options.json || options.inUse || options.allocated) return false
  await output.lines(`${output.style('green', '✓')} ${output.style('bold', printable(svg!))}`)
  return true
}

function* rangeLines(
  ranges: Iterable<{ readonly start: number; readonly end: number }>,
  suffix: string,
): Generator<string> {
  for (const { start, end } of ranges) yield `${start} ${end - start}${suffix}`
}

/** What is allocated (and in use, where that was asked), joined over rows that differ in other ways. */
async function wantedRanges(rows: AsyncIterable<MapRow>): Promise<{ start: number; end: number }[]> {
  const ranges: { start: number; end: number }[] = []
  for await (const row of rows) {
    if (!row.allocated || row.inUse === false) continue
    const last = ranges.at(-1)
    if (last?.end === row.start) last.end += row.length
    else ranges.push({ start: row.start, end: row.start + row.length })
  }
  return ranges
}

async function printRows(
  rows: readonly MapRow[],
  image: Image,
  inUse: boolean,
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
      { title: inUse ? 'IN USE' : '' },
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
  if (inUse) {
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
