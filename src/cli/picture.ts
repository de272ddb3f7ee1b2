/**
 * A disk drawn as strips: one for the whole of it, one for each region, cut into cells of equal length. Each cell
 * shows how much of it is in use, and whether that is known or assumed. For a terminal and as SVG.
 *
 * Rule: a cell that holds anything in use never looks free, one that has anything free never looks full.
 */
import type { RangeSet } from '../extents/index.ts'
import type { InUseMap, Region } from '../inuse/index.ts'
import { totalsOf } from './map-options.ts'
import { type Output, printable } from './output.ts'
import { width } from './table.ts'
import { formatBytes, formatShare } from './units.ts'

export interface Drawn {
  /** As the user named it. */
  readonly path: string
  readonly map: InUseMap
}

/** One strip: where it lies on the disk, and what it is called. */
interface Strip {
  readonly title: string
  readonly offset: number
  readonly length: number
  readonly note: string
}

/** How much of a cell is in use: 0 nothing, 4 all, 1 to 3 in between. */
type Shade = 0 | 1 | 2 | 3 | 4
interface Cell {
  readonly shade: Shade
  /** Most of what is in use in it is assumed. */
  readonly assumed: boolean
}

function stripsOf(map: InUseMap): Strip[] {
  const strips: Strip[] = [{ title: 'whole disk', offset: 0, length: map.size, note: '' }]
  const add = (region: Region, inherited: string): void => {
    const title = [inherited, nameOf(region)].filter((part) => part !== '').join(' ')
    if (region.children) {
      for (const child of region.children) add(child, title)
      return
    }
    const { offset, length, reason, state } = region
    strips.push({ title, offset, length, note: printable(reason?.text ?? state ?? '') })
  }
  for (const region of map.regions) add(region, '')
  // A disk that is one region would be drawn twice.
  return strips.length === 2 ? [{ ...strips[1]!, title: `whole disk: ${strips[1]!.title}` }] : strips
}

function nameOf({ kind, name, label }: Region): string {
  // The number of a partition says more than the word.
  const words = kind === 'partition' ? [] : [kind]
  if (name !== undefined && name !== '') words.push(printable(name))
  if (label !== undefined && label !== '' && kind !== 'partition') words.push(`"${printable(label)}"`)
  return words.join(' ')
}

/** `count` cells over `[offset, offset + length)`. */
export function cellsOf(
  { ranges, assumed }: Pick<InUseMap, 'ranges' | 'assumed'>,
  { offset, length }: { readonly offset: number; readonly length: number },
  count: number,
): Cell[] {
  const used = bytesPerCell(ranges, offset, length, count)
  const guessed = bytesPerCell(assumed, offset, length, count)
  return Array.from(used, (bytes, i) => {
    const whole = length / count
    const share = bytes / whole
    // Fractions of bytes come from rounding only, unless cells are that small.
    const shade =
      bytes < Math.min(0.5, whole / 2) ? 0 : share > 1 - 1e-9 ? 4 : share > 2 / 3 ? 3 : share > 1 / 3 ? 2 : 1
    return { shade, assumed: shade > 0 && guessed[i]! * 2 > bytes }
  })
}

function bytesPerCell(ranges: RangeSet, offset: number, length: number, count: number): Float64Array {
  const cells = new Float64Array(count)
  const whole = length / count
  const end = offset + length
  for (let i = ranges.indexAfter(offset); i < ranges.count && ranges.startAt(i) < end; i++) {
    const from = Math.max(ranges.startAt(i), offset) - offset
    const to = Math.min(ranges.endAt(i), end) - offset
    const first = Math.min(count - 1, Math.floor(from / whole))
    const last = Math.min(count - 1, Math.ceil(to / whole) - 1)
    if (first >= last) cells[first]! += to - from
    else {
      cells[first]! += (first + 1) * whole - from
      for (let cell = first + 1; cell < last; cell++) cells[cell]! += whole
      cells[last]! += to - last * whole
    }
  }
  return cells
}

const SHADED = ['·', '░', '▒', '▓', '█'] as const
const PLAIN = ['.', '-', '+', '*', '#'] as const
const PLAIN_ASSUMED = '?'
const LONGEST_TITLE = 32
const NARROWEST_STRIP = 10

/** Lines of at most `columns` characters, if the terminal is no narrower than a few words. */
export function pictureLines({ path, map }: Drawn, columns: number, output: Output): string[] {
  const colours = output.style('green', 'x') !== 'x'
  const strips = stripsOf(map)
  const titles = strips.map(({ title }) => shortened(title, Math.min(LONGEST_TITLE, Math.floor(columns / 3))))
  const titleWidth = Math.max(...titles.map(width))
  const figures = strips.map(({ offset, length }) => {
    const used = map.ranges.clip(offset, offset + length).size
    return `${formatBytes(length).padStart(9)} ${formatShare(used, length).padStart(4)}`
  })
  const cellCount = Math.max(NARROWEST_STRIP, columns - titleWidth - 2 - 2 - 14)
  const draw = (cells: readonly Cell[]): string => {
    if (!colours) {
      return cells.map(({ shade, assumed }) => (assumed ? PLAIN_ASSUMED : PLAIN[shade])).join('')
    }
    let line = ''
    for (let at = 0; at < cells.length; ) {
      let end = at + 1
      while (end < cells.length && styleOf(cells[end]!) === styleOf(cells[at]!)) end++
      const text = cells
        .slice(at, end)
        .map(({ shade }) => SHADED[shade])
        .join('')
      line += output.style(styleOf(cells[at]!), text)
      at = end
    }
    return line
  }
  const legend = colours
    ? [
        `${output.style('green', '█')} in use`,
        `${output.style('green', '░▒▓')} in part`,
        `${output.style('dim', '·')} free`,
        `${output.style('yellow', '█')} assumed in use`,
      ]
    : ['# in use', '-+* in part', '. free', '? assumed in use']
  return [
    `${output.style('bold', printable(path))}  ${factsOf(map)}`,
    '',
    ...strips.map((strip, i) =>
      [
        titles[i]! + ' '.repeat(titleWidth - width(titles[i]!)),
        draw(cellsOf(map, strip, cellCount)),
        figures[i]!,
      ].join('  '),
    ),
    '',
    legend.join('   '),
  ]
}

function styleOf({ shade, assumed }: Cell): 'dim' | 'yellow' | 'green' {
  return shade === 0 ? 'dim' : assumed ? 'yellow' : 'green'
}

function factsOf(map: InUseMap): string {
  const { inUseBytes, freeBytes, assumedBytes } = totalsOf(map)
  return [
    formatBytes(map.size),
    `${formatBytes(inUseBytes)} in use (${formatShare(inUseBytes, map.size)})`,
    ...(assumedBytes > 0 ? [`of that ${formatBytes(assumedBytes)} assumed`] : []),
    `${formatBytes(freeBytes)} free`,
  ].join(' · ')
}

function shortened(text: string, most: number): string {
  if (width(text) <= most) return text
  let kept = ''
  for (const character of text) {
    if (width(kept) + width(character) > most - 1) break
    kept += character
  }
  return `${kept}…`
}

const SVG = {
  width: 1000,
  margin: 20,
  headHeight: 44,
  rowHeight: 50,
  stripHeight: 22,
  legendHeight: 40,
  free: '#e6e8eb',
  inUse: '#2f9e63',
  assumed: '#e0a100',
  text: '#1f2328',
  faint: '#656d76',
} as const
/** Opacity of a shade, so that a cell in use in part lies between free and in use. */
const OPACITY = [0, 0.35, 0.6, 0.8, 1] as const

/** The same as a picture, one disk below the other. Well-formed whatever the names in the image are. */
export function pictureSvg(disks: readonly Drawn[]): string {
  const body: string[] = []
  let y = SVG.margin
  for (const { path, map } of disks) {
    body.push(text(SVG.margin, y + 16, path, { size: 17, weight: 'bold' }))
    body.push(text(SVG.width - SVG.margin, y + 16, factsOf(map), { anchor: 'end' }))
    y += SVG.headHeight
    for (const strip of stripsOf(map)) {
      body.push(...svgStrip(strip, map, y))
      y += SVG.rowHeight
    }
  }
  body.push(...svgLegend(y + 4))
  const height = y + SVG.legendHeight
  return [
    '<?xml version="1.0" encoding="UTF-8"?>',
    `<svg xmlns="http://www.w3.org/2000/svg" width="${SVG.width}" height="${height}" viewBox="0 0 ${SVG.width} ${height}" font-family="Helvetica, Arial, 'DejaVu Sans', sans-serif" font-size="13">`,
    `<title>${escaped(`What is in use: ${disks.map(({ path }) => path).join(', ')}`)}</title>`,
    `<rect width="${SVG.width}" height="${height}" fill="#ffffff"/>`,
    ...body,
    '</svg>',
    '',
  ].join('\n')
}

function svgStrip(strip: Strip, map: InUseMap, y: number): string[] {
  const { offset, length, title, note } = strip
  const used = map.ranges.clip(offset, offset + length).size
  const across = SVG.width - 2 * SVG.margin
  const top = y + 18
  const figures = `${formatBytes(length)} at ${offset} · ${formatShare(used, length)} in use`
  const lines = [
    '<g>',
    `<title>${escaped([title, figures, note].filter((part) => part !== '').join('\n'))}</title>`,
    text(SVG.margin, y + 12, shortened(title, 64)),
    text(SVG.width - SVG.margin, y + 12, figures, { anchor: 'end', fill: SVG.faint }),
    rect(SVG.margin, top, across, SVG.free),
  ]
  const cells = cellsOf(map, strip, across)
  for (let at = 0; at < cells.length; ) {
    const { shade, assumed } = cells[at]!
    let end = at + 1
    while (end < cells.length && cells[end]!.shade === shade && cells[end]!.assumed === assumed) end++
    if (shade > 0) {
      lines.push(rect(SVG.margin + at, top, end - at, assumed ? SVG.assumed : SVG.inUse, OPACITY[shade]))
    }
    at = end
  }
  lines.push('</g>')
  return lines
}

function svgLegend(y: number): string[] {
  const entries = [
    { name: 'in use', fill: SVG.inUse },
    { name: 'assumed in use: nobody could vouch for it', fill: SVG.assumed },
    { name: 'free', fill: SVG.free },
  ]
  let x: number = SVG.margin
  return entries.flatMap(({ name, fill }) => {
    const at = x
    x += 40 + name.length * 7
    return [
      `<rect x="${at}" y="${y}" width="14" height="14" fill="${fill}"/>`,
      text(at + 20, y + 12, name, { fill: SVG.faint }),
    ]
  })
}

function rect(x: number, y: number, across: number, fill: string, opacity = 1): string {
  const faint = opacity === 1 ? '' : ` fill-opacity="${opacity}"`
  return `<rect x="${x}" y="${y}" width="${across}" height="${SVG.stripHeight}" fill="${fill}"${faint}/>`
}

function text(
  x: number,
  y: number,
  content: string,
  look: {
    readonly size?: number
    readonly weight?: string
    readonly anchor?: string
    readonly fill?: string
  } = {},
): string {
  const attributes = [
    `x="${x}"`,
    `y="${y}"`,
    `fill="${look.fill ?? SVG.text}"`,
    ...(look.size === undefined ? [] : [`font-size="${look.size}"`]),
    ...(look.weight === undefined ? [] : [`font-weight="${look.weight}"`]),
    ...(look.anchor === undefined ? [] : [`text-anchor="${look.anchor}"`]),
  ]
  return `<text ${attributes.join(' ')}>${escaped(content)}</text>`
}

const ENTITIES: Readonly<Record<string, string>> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' }

/** Fit for XML 1.0: no control characters, no half surrogates, nothing that is markup. */
function escaped(content: string): string {
  return content
    .split('\n')
    .map((line) => printable(line.toWellFormed()).replace(/[\ufffe\uffff]/g, '\ufffd'))
    .join('\n')
    .replace(/[&<>"]/g, (character) => ENTITIES[character]!)
}
