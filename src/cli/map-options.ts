/** Options of every verb that takes an in-use map, and what they did, for people. */
import type { Command } from 'commander'
import type { InUseMap, Region } from '../inuse/index.ts'
import { type Output, printable } from './output.ts'
import { takenWhole } from './regions.ts'
import { formatBytes } from './units.ts'
import { usageError } from './verb.ts'

export interface InUseOptions {
  readonly audit?: true
  readonly skipPageFiles?: true
}

export function addInUseOptions(command: Command): Command {
  return command
    .option(
      '--audit',
      'walk every inode, record or directory too: a region that owns what its map calls free is taken whole',
    )
    .option('--skip-page-files', 'leave page and hibernation files out of what is in use (NTFS)')
}

/** What was asked for must be applied, or is an error. */
export function refuseInUseOptions(verb: string, { audit, skipPageFiles }: InUseOptions, need: string): void {
  const given = [audit ? '--audit' : '', skipPageFiles ? '--skip-page-files' : ''].filter(
    (name) => name !== '',
  )
  if (given.length === 0) return
  throw usageError(`Cannot run ${verb}: found ${given.join(' and ')}, expected ${need} with it`)
}

/** Bytes of a disk by what is known of them; `inUseBytes` and `freeBytes` add up to its size. */
export interface Totals {
  readonly inUseBytes: number
  readonly freeBytes: number
  /** The part of `inUseBytes` that nobody could vouch for. */
  readonly assumedBytes: number
}

export function totalsOf(map: InUseMap): Totals {
  return {
    inUseBytes: map.inUseBytes,
    freeBytes: map.size - map.inUseBytes,
    assumedBytes: map.assumed.size,
  }
}

/** Lines under the figures of backup and convert: regions taken whole and why; what the options came to. */
export function verdictLines(regions: readonly Region[], options: InUseOptions, output: Output): string[] {
  const lines = takenWhole(regions).map(
    ({ region, reason }) =>
      `  ${output.style('yellow', 'whole')}    ${formatBytes(region.length).padStart(9)}  ${region.kind} at ${region.offset}: ${printable(reason.text)} (${reason.code})`,
  )
  if (!options.audit && !options.skipPageFiles) return lines
  for (const region of fileSystems(regions)) {
    lines.push(
      `  state    ${formatBytes(region.length).padStart(9)}  ${region.kind} at ${region.offset}: ${printable(region.state ?? '')}`,
    )
  }
  return lines
}

/** Regions that say a state and were not taken whole; the innermost ones. */
function fileSystems(regions: readonly Region[]): Region[] {
  return regions.flatMap((region) => [
    ...(region.state !== undefined && !region.reason && !region.children && !region.volumes ? [region] : []),
    ...fileSystems(region.children ?? []),
    ...(region.volumes ?? []).flatMap(fileSystems),
  ])
}
