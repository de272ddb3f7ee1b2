/**
 * Rank 4: disk -> in-use map with a verdict per region. What the words mean and which rules hold: docs/in-use.md.
 */
import { assert, type Context } from '../base/index.ts'
import type { BlockDevice } from '../device/index.ts'
import type { Trust } from '../filesystems/index.ts'
import type { InUseMap, Region } from './region.ts'
import { type Node, usedOf, usedOfAll, Walk } from './walk.ts'

export type { Trust } from '../filesystems/index.ts'
export type { InUseMap, Reason, Region } from './region.ts'

export interface MapOptions extends Context {}

/**
 * Which bytes of `disk` its partition tables, volume managers and file systems need. Reads metadata only; what
 * cannot be vouched for is in use, with a reason in its region. The disk must not change while this runs (map a
 * snapshot), and stays the caller's.
 * @throws what the disk throws when it cannot be read; CANCELLED. Never for what stands on the disk.
 */
export async function mapInUse(disk: BlockDevice, options: MapOptions = {}): Promise<InUseMap> {
  return (await mapInUseTogether([disk], options))[0]!
}

/** As `mapInUse`, for disks whose volume groups and arrays spread over them. One map per disk, in their order. */
export async function mapInUseTogether(
  disks: readonly BlockDevice[],
  options: MapOptions = {},
): Promise<readonly InUseMap[]> {
  const walk = new Walk(options)
  const covers: (readonly Node[])[] = []
  for (const disk of disks) covers.push(await walk.cover(disk, 'disk'))
  await walk.openGroups()
  return disks.map((disk, index) => toMap(disk.size, covers[index]!))
}

function toMap(size: number, nodes: readonly Node[]): InUseMap {
  const ranges = usedOfAll(nodes)
  const regions = nodes.map((node) => toRegion(node, 0))
  checkRegions(regions, 0, size)
  assert(ranges.isEmpty || (ranges.first! >= 0 && ranges.end! <= size), 'ranges lie inside the disk')
  const inUseBytes = ranges.size
  assert(
    regions.reduce((sum, region) => sum + region.inUseBytes, 0) === inUseBytes,
    'regions add up to the ranges',
  )
  return { size, ranges, regions, inUseBytes }
}

function toRegion(node: Node, base: number): Region {
  const { verdict } = node
  const offset = base + node.offset
  const about = {
    offset,
    length: node.length,
    kind: node.kind,
    ...(node.name === undefined ? {} : { name: node.name }),
    ...(node.uuid === undefined ? {} : { uuid: node.uuid }),
    ...(node.label === undefined ? {} : { label: node.label }),
    ...(node.state === undefined ? {} : { state: node.state }),
    inUseBytes: usedOf(node).size,
  }
  if (verdict.is === 'known') {
    return { ...about, trust: verdict.trust, ...(verdict.reason ? { reason: verdict.reason } : {}) }
  }
  if (verdict.is === 'parts') {
    const children = verdict.children.map((child) => toRegion(child, offset))
    checkRegions(children, offset, offset + node.length)
    return { ...about, trust: leastTrusted(children), children }
  }
  const { outcome } = verdict.group
  assert(outcome, 'all groups are opened before regions are made')
  if ('refused' in outcome) return { ...about, trust: 'assumed', reason: outcome.refused }
  const volumes = outcome.volumes.map((nodes) => nodes.map((one) => toRegion(one, 0)))
  const { uuid, label, state } = outcome.table
  return {
    ...about,
    kind: outcome.table.kind,
    ...(uuid === undefined ? {} : { uuid }),
    ...(label === undefined ? {} : { label }),
    ...(state === undefined ? {} : { state }),
    trust: leastTrusted(volumes.flat()),
    ...(verdict.index === 0 ? { volumes } : {}),
  }
}

const TRUST_ORDER: readonly Trust[] = ['exact', 'replayed', 'assumed']

function leastTrusted(regions: readonly Region[]): Trust {
  return TRUST_ORDER[Math.max(0, ...regions.map(({ trust }) => TRUST_ORDER.indexOf(trust)))]!
}

/** Only a bug breaks this: regions cover `[start, end)` without gap or overlap, and hold what they say. */
function checkRegions(regions: readonly Region[], start: number, end: number): void {
  let at = start
  for (const region of regions) {
    assert(region.offset === at && region.length > 0, `regions are contiguous at ${at}`)
    assert(region.inUseBytes >= 0 && region.inUseBytes <= region.length, 'a region holds its in-use bytes')
    at += region.length
  }
  assert(at === end, `regions end at ${end}`)
}
