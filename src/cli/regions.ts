/** The tree of regions for people: what stands where, how much of it is in use, and how far that is trusted. */
import type { Reason, Region } from '../inuse/index.ts'
import { type Output, printable } from './output.ts'
import { table } from './table.ts'
import { formatBytes, formatShare } from './units.ts'

export function regionLines(regions: readonly Region[], output: Output): string[] {
  const rows: string[][] = []
  addRows(regions, undefined, rows, output)
  return table(
    [
      { title: 'REGION' },
      { title: 'OFFSET', align: 'right' },
      { title: 'SIZE', align: 'right' },
      { title: 'IN USE', align: 'right' },
      { title: '', align: 'right' },
      { title: 'TRUST' },
      { title: '' },
    ],
    rows,
    (titles) => output.style('bold', titles),
  )
}

/** `indent` is what stands before a child's branch; undefined for the regions of the disk itself. */
function addRows(
  regions: readonly Region[],
  indent: string | undefined,
  rows: string[][],
  output: Output,
): void {
  for (const [index, region] of regions.entries()) {
    const last = index === regions.length - 1
    const name = `${indent === undefined ? '' : `${indent}${last ? '└─ ' : '├─ '}`}${nameOf(region)}`
    rows.push([
      region.kind === 'gap' ? output.style('dim', name) : name,
      String(region.offset),
      formatBytes(region.length),
      formatBytes(region.inUseBytes),
      formatShare(region.inUseBytes, region.length),
      trustOf(region, output),
      noteOf(region, output),
    ])
    const deeper = indent === undefined ? '' : `${indent}${last ? '   ' : '│  '}`
    if (region.children) addRows(region.children, deeper, rows, output)
    for (const [number, volume] of (region.volumes ?? []).entries()) {
      rows.push([`${deeper}   ${output.style('dim', `volume ${number + 1}`)}`, '', '', '', '', '', ''])
      addRows(volume, `${deeper}   `, rows, output)
    }
  }
}

function nameOf({ kind, name, label }: Region): string {
  const parts = [kind]
  if (name !== undefined && name !== '') parts.push(printable(name))
  if (label !== undefined && label !== '') parts.push(`"${printable(label)}"`)
  return parts.join(' ')
}

function trustOf({ trust }: Region, output: Output): string {
  if (trust === 'assumed') return output.style('yellow', trust)
  return output.style('green', trust)
}

function noteOf({ state, reason, trust }: Region, output: Output): string {
  if (reason) return output.style('yellow', `${reason.code}: ${printable(reason.text)}`)
  if (state === undefined || (state === 'clean' && trust === 'exact')) return ''
  return printable(state)
}

/** A region that was taken whole, and why. */
export interface TakenWhole {
  readonly region: Region
  readonly reason: Reason
}

/** Regions without children that are `assumed`: they bring their whole length into a backup. */
export function takenWhole(regions: readonly Region[]): TakenWhole[] {
  const found: TakenWhole[] = []
  for (const region of regions) {
    if (region.trust === 'assumed' && region.reason) found.push({ region, reason: region.reason })
    found.push(...takenWhole(region.children ?? []))
    for (const volume of region.volumes ?? []) found.push(...takenWhole(volume))
  }
  return found
}
