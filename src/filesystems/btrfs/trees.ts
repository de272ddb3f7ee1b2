/**
 * Reading B-trees of a Btrfs: nodes by logical address, each checked (checksum, address, generation, level, id) before
 * use, a damaged copy replaced by another; whole trees level by level, sorted and in bulk.
 */
import { mapBounded, NotTrusted } from '../../base/index.ts'
import type { BlockDevice } from '../../device/index.ts'
import { checksumHolds } from './checksum.ts'
import type { ChunkMap, Place } from './chunk-map.ts'
import {
  compareKeys,
  decodeNode,
  type Item,
  type Key,
  type Node,
  nodeLimit,
  type RootItem,
  type SuperBlock,
} from './layout.ts'

/** Nodes closer together than this are read in one go. */
const JOIN_GAP = 16384
const JOIN_MOST = 1 << 20
const PARALLEL_READS = 8

interface Wanted {
  readonly bytenr: number
  readonly generation: bigint
  readonly level: number
}

export class Trees {
  readonly #sb: SuperBlock
  readonly #devices: ReadonlyMap<bigint, BlockDevice>
  readonly #limit: number
  #visited = 0
  chunks: ChunkMap

  constructor(sb: SuperBlock, devices: ReadonlyMap<bigint, BlockDevice>, chunks: ChunkMap) {
    this.#sb = sb
    this.#devices = devices
    this.#limit = nodeLimit(sb)
    this.chunks = chunks
  }

  /**
   * Every item of a tree, leaf by leaf. `node` is called for each node on the way. Nodes in `seen` are left out, with
   * all below them, and those that are read are put into it: snapshots share most of theirs.
   */
  async *items(root: RootItem, node?: (node: Node) => void, seen?: Set<number>): AsyncGenerator<Item> {
    let level: Wanted[] = [root]
    for (let height = root.level; ; height--) {
      if (seen) {
        level = level.filter(({ bytenr }) => !seen.has(bytenr))
        for (const { bytenr } of level) seen.add(bytenr)
        if (level.length === 0) return
      }
      const nodes = await this.#readAll(level)
      for (const one of nodes) node?.(one)
      if (height === 0) {
        for (const leaf of nodes) yield* leaf.items
        return
      }
      level = nodes.flatMap((inner) =>
        inner.pointers.map(({ bytenr, generation }) => ({ bytenr, generation, level: height - 1 })),
      )
    }
  }

  /** The first item at or after `key`, when its objectid and type are those of `key`. Reads one path. */
  async find(root: RootItem, key: Key): Promise<Item | undefined> {
    let wanted: Wanted = root
    for (;;) {
      const [node] = (await this.#readAll([wanted])) as [Node]
      if (node.level === 0) {
        const item = node.items.find((candidate) => compareKeys(candidate.key, key) >= 0)
        return item && item.key.objectid === key.objectid && item.key.type === key.type ? item : undefined
      }
      const next = node.pointers.findLast((pointer) => compareKeys(pointer.key, key) <= 0) ?? node.pointers[0]
      if (!next) return undefined
      wanted = { bytenr: next.bytenr, generation: next.generation, level: node.level - 1 }
    }
  }

  /** Reads nodes; the result is in the order of `wanted`. */
  async #readAll(wanted: readonly Wanted[]): Promise<Node[]> {
    this.#visited += wanted.length
    if (this.#visited > this.#limit) {
      throw new NotTrusted(
        'btrfs-node-invalid',
        `Cannot walk Btrfs trees: found more than ${this.#limit} nodes`,
      )
    }
    const { nodeBytes } = this.#sb
    const jobs = wanted.map((want, index) => ({ want, index, place: this.#copies(want.bytenr)[0]! }))
    jobs.sort((a, b) =>
      a.place.devid === b.place.devid
        ? a.place.offset - b.place.offset
        : a.place.devid < b.place.devid
          ? -1
          : 1,
    )
    const groups: (typeof jobs)[] = []
    for (const job of jobs) {
      const group = groups.at(-1)
      const first = group?.[0]
      const last = group?.at(-1)
      if (
        group &&
        first &&
        last &&
        first.place.devid === job.place.devid &&
        job.place.offset - (last.place.offset + nodeBytes) <= JOIN_GAP &&
        job.place.offset + nodeBytes - first.place.offset <= JOIN_MOST
      ) {
        group.push(job)
      } else groups.push([job])
    }
    const nodes: Node[] = []
    await mapBounded(groups, PARALLEL_READS, async (group) => {
      const start = group[0]!.place.offset
      const device = this.#device(group[0]!.place)
      const bytes = new Uint8Array(group.at(-1)!.place.offset + nodeBytes - start)
      await device.read(start, bytes)
      for (const { want, index, place } of group) {
        const raw = bytes.subarray(place.offset - start, place.offset - start + nodeBytes)
        nodes[index] = this.#check(want, raw) ?? (await this.#readOther(want))
      }
    })
    return nodes
  }

  /** The other copies of a node whose first copy is damaged. */
  async #readOther(want: Wanted): Promise<Node> {
    for (const place of this.#copies(want.bytenr).slice(1)) {
      const raw = new Uint8Array(this.#sb.nodeBytes)
      await this.#device(place).read(place.offset, raw)
      const node = this.#check(want, raw)
      if (node) return node
    }
    throw new NotTrusted('btrfs-checksum', `Cannot use Btrfs node ${want.bytenr}: no copy of it is whole`)
  }

  #check(want: Wanted, raw: Uint8Array): Node | undefined {
    if (!checksumHolds(this.#sb.checksumType, raw)) return undefined
    const node = decodeNode(raw)
    const right =
      node.bytenr === want.bytenr &&
      node.generation === want.generation &&
      node.level === want.level &&
      node.fsid === this.#sb.metadataUuid
    return right ? node : undefined
  }

  /** Copies of a node that lie on a device at hand, whole. */
  #copies(bytenr: number): Place[] {
    const { nodeBytes } = this.#sb
    const places = this.chunks.copies(bytenr, nodeBytes)
    const usable = places.filter((place) => {
      const device = this.#devices.get(place.devid)
      return device !== undefined && place.length === nodeBytes && place.offset + nodeBytes <= device.size
    })
    if (usable.length === 0) {
      throw new NotTrusted(
        'btrfs-address-invalid',
        `Cannot read Btrfs node ${bytenr}: none of its copies is on a device at hand`,
      )
    }
    return usable
  }

  #device(place: Place): BlockDevice {
    return this.#devices.get(place.devid)!
  }
}
