/**
 * From a walked disk to the answer: offsets become the disk's, ranges become one set, and what only a bug can
 * break is checked: regions cover the disk, and add up to the set.
 */
import { assert } from '../base/index.ts'
import type { BlockDevice } from '../device/index.ts'
import type { Trust } from '../filesystems/index.ts'
import type { Registry } from './recognize.ts'
import type { InUseMap, Region } from './region.ts'
import { type MapOptions, type Node, usedOf, usedOfAll, Walk } from './walk.ts'

/** One map per disk, in their order. @throws what a disk throws; CANCELLED */
export async function mapDisks(
  disks: readonly BlockDevice[],
  options: MapOptions,
  registry?: Registry,
): Promise<readonly InUseMap[]> {
  const walk = new Walk(options, registry)
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
  const assumed = usedOfAll(nodes, 'assumed')
  assert(assumed.subtract(ranges).isEmpty, 'what is assumed is in use')
  const inUseBytes = ranges.size
  assert(
    regions.reduce((sum, region) => sum + region.inUseBytes, 0) === inUseBytes,
    'regions add up to the ranges',
  )
  return { size, ranges, assumed, regions, inUseBytes }
}

function toRegion(node: Node, base: number): Region {
  const { verdict } = node
  const offset = base + node.offset
  if (verdict.is === 'shared') return toRegion(verdict.shared.nodes[verdict.index]!, offset)
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
