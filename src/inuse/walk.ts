/**
 * Walks a disk from its partition table down to its file systems and back up: first every device is recognized
 * and its readers are asked (top down), then the used ranges are carried to the disk (bottom up).
 *
 * Rules:
 * - Whatever a reader cannot vouch for makes its own region wholly in use, with the reason; its neighbours keep
 *   their verdicts. Only a failing device (or a cancelled call) fails the map.
 * - Members of a volume group are set aside until everything that can be walked has been; then groups are opened
 *   in the order of the registry, so that LVM2 on md finds all its members.
 * - A node's ranges are relative to the node, its offset to its parent's device.
 */
import { assert, type Context, isVarveError, mapBounded, NotTrusted } from '../base/index.ts'
import type { BlockDevice } from '../device/index.ts'
import { RangeSet, RangeSetBuilder } from '../extents/index.ts'
import type { FileSystem, FileSystemType, Trust, UsedMap } from '../filesystems/index.ts'
import {
  type Doubt,
  placeOf,
  type Scope,
  type Volume,
  type VolumeScheme,
  type VolumeTable,
} from '../volumes/index.ts'
import { ProbeCache } from './probe-cache.ts'
import { REGISTRY, type Registry, recognize } from './recognize.ts'
import type { Reason } from './region.ts'

/** Volumes in volumes in volumes: no real stack is deeper, and a volume that holds itself has no bottom. */
const DEEPEST = 8
/** Partitions read at a time. */
const WIDTH = 4

export interface Node {
  readonly offset: number
  readonly length: number
  readonly kind: string
  readonly name?: string | undefined
  readonly uuid?: string | undefined
  readonly label?: string | undefined
  readonly state?: string | undefined
  readonly verdict: Verdict
}

export type Verdict =
  | {
      readonly is: 'known'
      readonly used: RangeSet
      readonly trust: Trust
      readonly reason?: Reason | undefined
    }
  | { readonly is: 'parts'; readonly children: readonly Node[] }
  | { readonly is: 'member'; readonly group: Group; readonly index: number }
  | { readonly is: 'shared'; readonly shared: SharedFileSystem; readonly index: number }

/** Which of a node's ranges: all that is in use, or those among them that nobody vouches for. */
export type View = 'used' | 'assumed'

/** Devices that together make volumes. `outcome` is set before any range is asked for. */
export class Group {
  readonly scheme: VolumeScheme
  readonly depth: number
  readonly members: ProbeCache[] = []
  outcome:
    | { readonly table: VolumeTable; readonly volumes: readonly (readonly Node[])[] }
    | { readonly refused: Reason }
    | undefined
  readonly ranges: Map<View, readonly RangeSet[]> = new Map()

  constructor(scheme: VolumeScheme, depth: number) {
    this.scheme = scheme
    this.depth = depth
  }
}

/** Devices that one file system spreads over. `nodes` are set before any range is asked for. */
export interface SharedFileSystem {
  readonly type: FileSystemType
  readonly devices: ProbeCache[]
  /** One per device. */
  nodes: readonly Node[]
}

/** What `mapInUse` may be asked for besides. */
export interface MapOptions extends Context {
  /** Ask every file system for its second opinion; a difference makes the region wholly in use. */
  readonly audit?: boolean
  /** Leave page, swap and hibernation files out. */
  readonly skipPageFiles?: boolean
}

export class Walk {
  readonly #context: Context
  readonly #options: MapOptions
  readonly #registry: Registry
  readonly #groups = new Map<VolumeScheme, Map<string, Group>>()
  readonly #shared = new Map<FileSystemType, Map<string, SharedFileSystem>>()

  constructor(options: MapOptions, registry: Registry = REGISTRY) {
    this.#context = options
    this.#options = options
    this.#registry = registry
  }

  /** Nodes that cover `[0, device.size)`; call `openGroups` before their ranges are asked for. */
  async cover(device: BlockDevice, scope: Scope, depth = 0): Promise<readonly Node[]> {
    if (device.size === 0) return []
    if (depth > DEEPEST) {
      return [inUse(device.size, 'unknown', { code: 'nested-too-deep', text: 'volumes are nested too deep' })]
    }
    const cache = new ProbeCache(device)
    try {
      return await this.#coverRecognized(cache, scope, depth)
    } catch (error) {
      if (!this.#isVerdict(error, cache)) throw error
      return [this.#refused(device.size, error)]
    }
  }

  /** Opens all groups that were found, those that their volumes bring up, and file systems over several devices. */
  async openGroups(): Promise<void> {
    for (;;) {
      const scheme = this.#registry.schemes.find((one) => this.#groups.has(one))
      if (!scheme) break
      const groups = [...this.#groups.get(scheme)!.values()]
      this.#groups.delete(scheme)
      for (const group of groups) await this.#openGroup(group)
    }
    for (const byId of this.#shared.values()) {
      for (const shared of byId.values()) await this.#openShared(shared)
    }
  }

  async #coverRecognized(device: ProbeCache, scope: Scope, depth: number): Promise<readonly Node[]> {
    const found = await recognize(device, scope, this.#registry)
    switch (found.is) {
      case 'unknown':
        return [
          inUse(device.size, 'unknown', {
            code: 'unknown-content',
            text: 'no partition table, volume or file system was recognized',
          }),
        ]
      case 'ambiguous':
        return [
          inUse(device.size, 'unknown', {
            code: 'ambiguous-signature',
            text: `found the signatures of ${found.names.join(' and ')}, expected one`,
          }),
        ]
      case 'file-system':
        return [await this.#readFileSystem(device, found.type)]
      default:
        return this.#followScheme(device, found.scheme, depth)
    }
  }

  async #readFileSystem(device: ProbeCache, type: FileSystemType): Promise<Node> {
    try {
      const id = await type.together?.group(device, this.#context)
      if (id !== undefined) return this.#setAside(device, type, id)
      return await this.#readUsed(device, type.name, await type.open(device, this.#context))
    } catch (error) {
      if (!this.#isVerdict(error, device)) throw error
      return this.#refused(device.size, error, { kind: type.name })
    }
  }

  async #readUsed(device: ProbeCache, name: string, system: FileSystem): Promise<Node> {
    const { size } = device
    const about = { kind: system.kind, uuid: system.uuid, label: system.label }
    try {
      if (system.size > size) {
        throw new NotTrusted(
          'size-mismatch',
          `Cannot trust the file system: found ${system.size} bytes, expected at most the ${size} of its region`,
        )
      }
      const map = await system.used(this.#context)
      assert(isInside(map.ranges, size), `used ranges of ${name} lie inside its device`)
      const { needed, state } = await this.#apply(system, map)
      // Outward, as everywhere: what shares a sector with something needed is needed.
      const used = needed.coarsen(device.blockSize).clip(0, size)
      return { offset: 0, length: size, ...about, state, verdict: known(used, map.trust) }
    } catch (error) {
      if (!this.#isVerdict(error, device)) throw error
      return this.#refused(size, error, about)
    }
  }

  /** The options: a second opinion, page files left out. @throws NotTrusted when the second opinion differs */
  async #apply(system: FileSystem, map: UsedMap): Promise<{ needed: RangeSet; state: string }> {
    const notes = [map.state]
    let needed = map.ranges
    if (this.#options.audit && system.audit) {
      const missing = (await system.audit(this.#context)).subtract(needed)
      if (!missing.isEmpty) {
        throw new NotTrusted(
          'audit-mismatch',
          `Cannot trust the block map: found ${missing.size} bytes that have an owner and are free in it, first at ${missing.first}`,
        )
      }
      notes.push('audited')
    } else if (this.#options.audit) notes.push('no audit for this file system')
    if (this.#options.skipPageFiles && system.pageFiles) {
      const skipped = await system.pageFiles(this.#context)
      if (!skipped.isEmpty) notes.push(`${skipped.size} bytes of page files left out`)
      needed = needed.subtract(skipped)
    }
    return { needed, state: notes.join('; ') }
  }

  #setAside(device: ProbeCache, type: FileSystemType, id: string): Node {
    const byId = this.#shared.get(type) ?? new Map<string, SharedFileSystem>()
    this.#shared.set(type, byId)
    const shared = byId.get(id) ?? { type, devices: [], nodes: [] }
    byId.set(id, shared)
    const index = shared.devices.push(device) - 1
    return { offset: 0, length: device.size, kind: type.name, verdict: { is: 'shared', shared, index } }
  }

  async #openShared(shared: SharedFileSystem): Promise<void> {
    const { type, devices } = shared
    try {
      const systems = await type.together!.open(devices, this.#context)
      assert(systems.length === devices.length, 'a shared file system is one per device')
      shared.nodes = await mapBounded(systems, 1, (system, i) =>
        this.#readUsed(devices[i]!, type.name, system),
      )
    } catch (error) {
      if (!devices.every((device) => this.#isVerdict(error, device))) throw error
      shared.nodes = devices.map(({ size }) => this.#refused(size, error, { kind: type.name }))
    }
  }

  async #followScheme(device: ProbeCache, scheme: VolumeScheme, depth: number): Promise<readonly Node[]> {
    if (scheme.group) {
      const id = await scheme.group(device, this.#context)
      const groups = this.#groups.get(scheme) ?? new Map<string, Group>()
      this.#groups.set(scheme, groups)
      const group = groups.get(id) ?? new Group(scheme, depth)
      groups.set(id, group)
      const index = group.members.push(device) - 1
      return [{ offset: 0, length: device.size, kind: scheme.name, verdict: { is: 'member', group, index } }]
    }
    const table = await scheme.open([device], this.#context)
    const partitions = await mapBounded(table.volumes, WIDTH, (volume) => this.#partition(volume, depth))
    const metadata = table.metadata[0]!
    const taken = RangeSet.from([...metadata, ...partitions.map(rangeOf)])
    assert(taken.size === metadata.size + sum(partitions), 'partitions share no byte')
    const nodes: Node[] = [
      ...Array.from(metadata, ({ start, end }, index) => ({
        ...whole(start, end, table.kind),
        ...(index === 0 ? { uuid: table.uuid, label: table.label, state: table.state } : {}),
      })),
      ...partitions,
      ...Array.from(taken.complement(0, device.size), ({ start, end }) => whole(start, end, 'gap')),
    ]
    return nodes.toSorted((a, b) => a.offset - b.offset)
  }

  async #partition(volume: Volume, depth: number): Promise<Node> {
    const { start, end } = placeOf(volume)
    return {
      offset: start,
      length: end - start,
      kind: 'partition',
      name: volume.name,
      uuid: volume.uuid,
      label: volume.label,
      verdict: await this.#verdictOn(volume, 'partition', depth),
    }
  }

  async #verdictOn(volume: Volume, scope: Scope, depth: number): Promise<Verdict> {
    if (volume.doubt) return known(RangeSet.of(0, volume.device.size), 'assumed', volume.doubt)
    return { is: 'parts', children: await this.cover(volume.device, scope, depth + 1) }
  }

  async #openGroup(group: Group): Promise<void> {
    try {
      const table = await group.scheme.open(group.members, this.#context)
      assert(table.metadata.length === group.members.length, 'metadata is given for each member')
      const volumes = await mapBounded(table.volumes, WIDTH, async (volume): Promise<readonly Node[]> => {
        const verdict = await this.#verdictOn(volume, 'volume', group.depth)
        const { name, uuid, label } = volume
        return [{ offset: 0, length: volume.device.size, kind: 'volume', name, uuid, label, verdict }]
      })
      group.outcome = { table, volumes }
    } catch (error) {
      if (!group.members.every((member) => this.#isVerdict(error, member))) throw error
      group.outcome = { refused: this.#reasonOf(error) }
    }
  }

  /** True when `error` says something about what stands on the device; false when it says the device fails. */
  #isVerdict(error: unknown, device: ProbeCache): boolean {
    if (isVarveError(error, 'CANCELLED') || this.#context.signal?.aborted) return false
    return !device.failedWith(error)
  }

  #refused(length: number, error: unknown, about: NotTrusted['about'] = {}): Node {
    const known = error instanceof NotTrusted ? { ...about, ...definedOf(error.about) } : about
    const { kind = 'unknown', uuid, label } = known
    return { ...inUse(length, kind, this.#reasonOf(error)), uuid, label }
  }

  #reasonOf(error: unknown): Reason {
    if (error instanceof NotTrusted) return { code: error.reason, text: error.message }
    const text = error instanceof Error ? error.message : String(error)
    if (isVarveError(error, 'CORRUPT', 'MISMATCH')) return { code: 'corrupt', text }
    if (isVarveError(error, 'LIMIT')) return { code: 'over-limit', text }
    if (isVarveError(error, 'UNSUPPORTED', 'ENCRYPTED')) return { code: 'unsupported', text }
    // A bug of the reader. The map stays safe without it; the log carries what is needed to find it.
    this.#context.log?.('error', `A reader failed, its region is taken as in use: ${text}`, {
      stack: error instanceof Error ? error.stack : undefined,
    })
    return { code: 'reader-failed', text }
  }
}

/** The ranges of a node, relative to it. All groups have been opened. */
export function usedOf(node: Node, view: View = 'used'): RangeSet {
  let used = RANGES[view].get(node)
  if (!used) {
    used = computeUsed(node, view)
    RANGES[view].set(node, used)
  }
  return used
}

const RANGES: Readonly<Record<View, WeakMap<Node, RangeSet>>> = {
  used: new WeakMap(),
  assumed: new WeakMap(),
}

function computeUsed({ verdict }: Node, view: View): RangeSet {
  if (verdict.is === 'known') {
    return view === 'used' || verdict.trust === 'assumed' ? verdict.used : RangeSet.empty
  }
  if (verdict.is === 'parts') return usedOfAll(verdict.children, view)
  if (verdict.is === 'shared') return usedOf(verdict.shared.nodes[verdict.index]!, view)
  return usedOfGroup(verdict.group, view)[verdict.index]!
}

/** The ranges of neighbours, relative to what they cover. */
export function usedOfAll(nodes: readonly Node[], view: View = 'used'): RangeSet {
  const builder = new RangeSetBuilder()
  for (const node of nodes) builder.addAll(usedOf(node, view).shift(node.offset))
  return builder.build()
}

function usedOfGroup(group: Group, view: View): readonly RangeSet[] {
  let ranges = group.ranges.get(view)
  if (!ranges) {
    ranges = computeUsedOfGroup(group, view)
    group.ranges.set(view, ranges)
  }
  return ranges
}

function computeUsedOfGroup({ outcome, members }: Group, view: View): readonly RangeSet[] {
  if (!outcome || 'refused' in outcome) return members.map(({ size }) => RangeSet.of(0, size))
  // What belongs to the scheme is in use by rule, which is no assumption.
  const used = view === 'used' ? [...outcome.table.metadata] : members.map(() => RangeSet.empty)
  const add = (more: readonly RangeSet[]): void => {
    assert(more.length === members.length, 'a volume is projected to each member')
    for (const [index, ranges] of more.entries()) used[index] = used[index]!.union(ranges)
  }
  for (const [index, volume] of outcome.table.volumes.entries()) {
    add(volume.project(usedOfAll(outcome.volumes[index]!, view)))
  }
  if (view === 'used' && outcome.table.unclaimed === 'in-use') {
    const claimed = members.map(() => RangeSet.empty)
    for (const volume of outcome.table.volumes) {
      for (const [index, ranges] of volume.project(RangeSet.of(0, volume.device.size)).entries()) {
        claimed[index] = claimed[index]!.union(ranges)
      }
    }
    add(members.map(({ size }, index) => claimed[index]!.complement(0, size)))
  }
  return members.map(({ size, blockSize }, index) => {
    assert(isInside(used[index]!, size), 'projected ranges lie inside their member')
    return used[index]!.coarsen(blockSize).clip(0, size)
  })
}

function isInside(ranges: RangeSet, size: number): boolean {
  return ranges.isEmpty || (ranges.first! >= 0 && ranges.end! <= size)
}

function known(used: RangeSet, trust: Trust, reason?: Doubt): Verdict {
  return { is: 'known', used, trust, ...(reason ? { reason } : {}) }
}

/** A region that nobody vouches for. */
function inUse(length: number, kind: string, reason: Reason): Node {
  return { offset: 0, length, kind, verdict: known(RangeSet.of(0, length), 'assumed', reason) }
}

/** A region that is in use by rule: metadata of a table, a gap. */
function whole(start: number, end: number, kind: string): Node {
  return { offset: start, length: end - start, kind, verdict: known(RangeSet.of(0, end - start), 'exact') }
}

function definedOf(about: NotTrusted['about']): NotTrusted['about'] {
  return Object.fromEntries(Object.entries(about).filter(([, value]) => value !== undefined))
}

function rangeOf(node: Node): { start: number; end: number } {
  return { start: node.offset, end: node.offset + node.length }
}

function sum(nodes: readonly Node[]): number {
  return nodes.reduce((total, node) => total + node.length, 0)
}
