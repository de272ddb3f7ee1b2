/** The subcommands of `varve bitmap` that change an image file. Each opens it for writing under QEMU's own locks. */
import { readFile, stat } from 'node:fs/promises'
import type { Command } from 'commander'
import { fromSystem, VarveError, within } from '../base/index.ts'
import type { Bitmap } from '../extents/index.ts'
import type { BitmapEditor } from '../formats/index.ts'
import { printable } from './output.ts'
import { count } from './units.ts'
import { type Host, helpText, usageError } from './verb.ts'

interface EditOptions {
  readonly granularity?: string
  readonly disabled?: true
  readonly fromImage?: string
  readonly ranges?: string
  readonly json?: true
}

interface ByteRange {
  readonly start: number
  readonly length: number
}

export function addEdits(command: Command, host: Host): Command[] {
  const add = (
    name: string,
    summary: string,
    examples: readonly string[],
    exits: Record<number, string> = {},
  ): Command =>
    command
      .command(name)
      .summary(summary)
      .description(summary.charAt(0).toUpperCase() + summary.slice(1))
      .option('--json', name === 'export' ? 'one JSON array (also without this option)' : 'one JSON object')
      .addHelpText(
        'after',
        helpText({
          examples,
          exits: {
            10: 'no such image or bitmap',
            11: 'a program has the image open',
            12: 'the image or bitmap is broken',
            ...exits,
          },
        }),
      )
  const image = 'image file, which no program has open'
  const granularity = [
    '--granularity <BYTES>',
    'bytes a bit, a power of two; 64K, 1M … (default: a cluster, 4K to 64K)',
  ] as const
  return [
    add('add', 'add a bitmap to an image', ['bitmap add web01.qcow2 daily --granularity 64K'], {
      1: 'there is one of that name',
    })
      .argument('IMAGE', image)
      .argument('NAME', 'bitmap')
      .option(...granularity)
      .option('--disabled', 'it does not record')
      .action((path: string, name: string, options: EditOptions) =>
        edit(path, host, `added bitmap ${name}`, (editor) => addTo(editor, name, options)),
      ),
    add('remove', 'remove a bitmap, whatever its state', ['bitmap remove web01.qcow2 daily'])
      .argument('IMAGE', image)
      .argument('NAME', 'bitmap')
      .action((path: string, name: string) =>
        edit(path, host, `removed bitmap ${name}`, (editor) => editor.remove(name)),
      ),
    add('clear', 'clear a bitmap: nothing has changed', ['bitmap clear web01.qcow2 daily'])
      .argument('IMAGE', image)
      .argument('NAME', 'bitmap')
      .action((path: string, name: string) =>
        edit(path, host, `cleared bitmap ${name}`, async (editor) => {
          const bits = await editor.bits(name)
          bits.clearRange(0, bits.length)
          editor.setBits(name, bits)
        }),
      ),
    ...(['enable', 'disable'] as const).map((word) =>
      add(word, `${word} a bitmap: it ${word === 'enable' ? 'records' : 'records no more'}`, [
        `bitmap ${word} web01.qcow2 daily`,
      ])
        .argument('IMAGE', image)
        .argument('NAME', 'bitmap')
        .action((path: string, name: string) =>
          edit(path, host, `${word}d bitmap ${name}`, (editor) => editor.setEnabled(name, word === 'enable')),
        ),
    ),
    add('merge', 'add to a bitmap what others mark as changed', [
      'bitmap merge base.qcow2 daily daily --from-image overlay.qcow2',
    ])
      .argument('IMAGE', image)
      .argument('TARGET', 'bitmap that is added to')
      .argument('<SOURCE...>', 'bitmaps that are read')
      .option('--from-image <FILE>', 'image that the sources are in (default: IMAGE)')
      .action((path: string, target: string, sources: readonly string[], options: EditOptions) =>
        runMerge(path, target, sources, options, host),
      ),
    add('export', 'print what a bitmap marks as changed', ['bitmap export web01.qcow2 daily > changed.json'])
      .argument('IMAGE', 'image file')
      .argument('NAME', 'bitmap')
      .action((path: string, name: string) => runExport(path, name, host)),
    add(
      'import',
      'make a bitmap of changed ranges',
      ['bitmap import web01.qcow2 daily --ranges changed.json'],
      { 1: 'there is one of that name' },
    )
      .argument('IMAGE', image)
      .argument('NAME', 'bitmap that is made')
      .requiredOption('--ranges <FILE>', 'JSON array of {start, length} in bytes')
      .option(...granularity)
      .option('--disabled', 'it does not record')
      .action((path: string, name: string, options: EditOptions) => runImport(path, name, options, host)),
    add('repair', 'drop bitmaps that are inconsistent or malformed, so that the image opens again', [
      'bitmap repair web01.qcow2',
    ])
      .argument('IMAGE', image)
      .action((path: string, options: EditOptions) => runRepair(path, options, host)),
  ]
}

async function edit(
  path: string,
  { output, signal }: Host,
  done: string,
  change: (editor: BitmapEditor) => void | Promise<void>,
): Promise<void> {
  const [{ lockImage, openHostFile }, { BitmapEditor: Editor, probeFormat }] = await Promise.all([
    import('../device/index.ts'),
    import('../formats/index.ts'),
  ])
  await using file = await openHostFile(path, { write: true })
  using _lock = lockImage(file, { write: true })
  mustBeQcow2((await probeFormat(file, signal)).name, path)
  const editor = await Editor.open(file, { signal })
  await change(editor)
  await editor.save()
  if (output.json) await output.document({ path, done })
  else await output.lines(`${output.style('green', '✓')} ${printable(path)}: ${printable(done)}`)
}

function mustBeQcow2(format: string, path: string): void {
  if (format === 'qcow2') return
  throw new VarveError(
    'UNSUPPORTED',
    `Cannot use bitmaps of ${path}: found format ${format}, expected qcow2`,
    {
      fields: { path, format },
      hint: 'Only qcow2 images store bitmaps.',
    },
  )
}

function addTo(editor: BitmapEditor, name: string, options: EditOptions): void {
  const granularity =
    options.granularity === undefined ? {} : { granularity: parseBytes(options.granularity) }
  try {
    editor.add({ name, enabled: options.disabled !== true, ...granularity })
  } catch (error) {
    if (!(error instanceof RangeError)) throw error
    throw usageError(`Cannot add bitmap '${name}': ${error.message}`)
  }
}

async function runMerge(
  path: string,
  target: string,
  sources: readonly string[],
  options: EditOptions,
  host: Host,
): Promise<void> {
  const other = options.fromImage === undefined ? undefined : await rangesOf(options.fromImage, sources, host)
  await edit(path, host, `merged ${sources.join(', ')} into bitmap ${target}`, async (editor) => {
    const lists =
      other ??
      (await Promise.all(
        sources.map(async (name) =>
          byteRanges(await editor.bits(name), editor.granularity(name), editor.header.size),
        ),
      ))
    const bits = await editor.bits(target)
    for (const ranges of lists) setRanges(bits, editor.granularity(target), editor.header.size, ranges)
    editor.setBits(target, bits)
  })
}

async function runImport(path: string, name: string, options: EditOptions, host: Host): Promise<void> {
  const ranges = await readRanges(options.ranges!)
  await edit(path, host, `made bitmap ${name} of ${count(ranges.length, 'range')}`, async (editor) => {
    addTo(editor, name, options)
    const bits = await editor.bits(name)
    setRanges(bits, editor.granularity(name), editor.header.size, ranges)
    editor.setBits(name, bits)
  })
}

async function runExport(path: string, name: string, host: Host): Promise<void> {
  const [ranges] = await rangesOf(path, [name], host)
  await host.output.array(ranges!)
}

async function runRepair(path: string, options: EditOptions, { output, signal }: Host): Promise<void> {
  const [{ lockImage, openHostFile }, { probeFormat, repairBitmaps }] = await Promise.all([
    import('../device/index.ts'),
    import('../formats/index.ts'),
  ])
  await using file = await openHostFile(path, { write: true })
  using _lock = lockImage(file, { write: true })
  mustBeQcow2((await probeFormat(file, signal)).name, path)
  const { clean, dropped } = await repairBitmaps(file, { signal })
  if (options.json) return await output.document({ path, clean, dropped })
  const tick = output.style('green', '✓')
  if (clean) return await output.lines(`${tick} ${printable(path)}: nothing to repair`)
  await output.lines(
    ...dropped.map(({ name, why }) => `dropped ${printable(name)}: ${printable(why)}`),
    `${tick} ${printable(path)}: bitmaps repaired`,
  )
}

/** What each of the named bitmaps marks. Reads only; an image that is being written is LOCKED. */
async function rangesOf(path: string, names: readonly string[], { signal }: Host): Promise<ByteRange[][]> {
  const [{ lockImage, openHostFile }, { probeFormat, readBitmapBits, readBitmaps }] = await Promise.all([
    import('../device/index.ts'),
    import('../formats/index.ts'),
  ])
  await using file = await openHostFile(path)
  using _lock = lockImage(file, { write: false })
  mustBeQcow2((await probeFormat(file, signal)).name, path)
  const stored = await readBitmaps(file, signal)
  const lists: ByteRange[][] = []
  for (const name of names) {
    const bitmap = stored.bitmaps.find((each) => each.name === name)
    if (!bitmap) {
      throw new VarveError('NOT_FOUND', `Cannot read bitmap '${name}' of ${path}: found none of that name`, {
        fields: { path, bitmap: name },
        hint: '`varve bitmap list IMAGE` lists those that there are.',
      })
    }
    if (stored.state === 'void' || bitmap.inUse) {
      throw new VarveError('CORRUPT', `Cannot use bitmap '${name}' of ${path}: found it inconsistent`, {
        fields: { path, bitmap: name },
        hint: 'It missed writes and can only be removed: `varve bitmap remove`.',
      })
    }
    lists.push(
      byteRanges(
        await readBitmapBits(file, stored.header, bitmap, signal),
        2 ** bitmap.granularityBits,
        stored.header.size,
      ),
    )
  }
  return lists
}

function byteRanges(bits: Bitmap, granularity: number, size: number): ByteRange[] {
  const ranges: ByteRange[] = []
  bits.eachRun((start, end) => {
    ranges.push({
      start: start * granularity,
      length: Math.min(end * granularity, size) - start * granularity,
    })
  })
  return ranges
}

/** Rounds out to whole granules. @throws MISMATCH when a range reaches over the disk's end */
function setRanges(bits: Bitmap, granularity: number, size: number, ranges: readonly ByteRange[]): void {
  for (const { length, start } of ranges) {
    if (length === 0) continue
    if (start + length > size) {
      throw new VarveError(
        'MISMATCH',
        `Cannot mark ${start}+${length} as changed: found a disk of ${size} bytes`,
        {
          fields: { start, length, size },
          hint: 'The ranges are those of another, larger disk.',
        },
      )
    }
    bits.setRange(Math.floor(start / granularity), Math.ceil((start + length) / granularity))
  }
}

const MOST_RANGES_BYTES = 268_435_456

async function readRanges(path: string): Promise<ByteRange[]> {
  let value: unknown
  try {
    within((await stat(path)).size, MOST_RANGES_BYTES, 'size of a list of ranges')
    value = JSON.parse(await readFile(path, 'utf8'))
  } catch (error) {
    if (error instanceof SyntaxError) throw notRanges(path, 'no JSON document')
    throw fromSystem(error, 'read', path)
  }
  if (!Array.isArray(value)) throw notRanges(path, 'no array')
  return (value as unknown[]).map((item) => {
    const { length, start } = (item ?? {}) as Partial<ByteRange>
    const sound = [start, length].every((each) => Number.isSafeInteger(each) && each! >= 0)
    if (!sound || !Number.isSafeInteger(start! + length!)) throw notRanges(path, JSON.stringify(item))
    return { start: start!, length: length! }
  })
}

function notRanges(path: string, found: string): VarveError {
  return new VarveError(
    'CORRUPT',
    `Cannot use ${path}: found ${found}, expected an array of {start, length}`,
    {
      fields: { path },
      hint: '`varve bitmap export` prints such an array.',
    },
  )
}

/** `65536`, `64K`, `64KiB`, `1M`. */
function parseBytes(text: string): number {
  const match = /^(\d+)(?:([KMG])(?:i?B)?)?$/i.exec(text.trim())
  if (!match) throw usageError(`Cannot use --granularity ${text}: expected bytes, as 65536 or 64K`)
  return Number(match[1]) * 1024 ** ['', 'K', 'M', 'G'].indexOf((match[2] ?? '').toUpperCase())
}
