/**
 * Walks a btree inside one allocation group (bnobt, inobt), level by level from the root, each level in one go: the
 * pointers of a level are known before its blocks are read, so the reads are sorted and parallel.
 *
 * A block holds a header, then records (leaf) or keys and, behind room for as many keys as fit, pointers (node):
 *
 *     leaf   header | record record record …
 *     node   header | key key key …      | pointer pointer pointer …
 *
 * Rule: every block names its neighbours, and the neighbours are those that the level above lists. So no block can
 * come twice and no loop can be; and keys ascend, each below its own pointer's.
 */
import { Bytes, throwIfAborted } from '../../base/index.ts'
import type { BlockReader, Place } from './blocks.ts'
import { decodeBtreeHeader, NULL_AGBNO, SHORT, type Superblock } from './layout.ts'
import { agByte, agLength, headerBlocks } from './superblock.ts'

/** Bytes of tree blocks read at a time per AG. */
const BATCH_BYTES = 1 << 20

export interface ShortTree {
  /** For messages. */
  readonly name: string
  /** Reason that a tree which contradicts itself is refused for. */
  readonly reason: string
  /** By version: [v4, v5]. */
  readonly magic: readonly [number, number]
  readonly recordBytes: number
  readonly keyBytes: number
  readonly agno: number
  readonly root: number
  readonly levels: number
}

/**
 * Calls `leaf` with each record, in order: `at` is its offset in `block`, whose first field is the key. Returns the
 * agbno of every block of the tree.
 * @throws NotTrusted
 */
export async function walkShortTree(
  reader: BlockReader,
  tree: ShortTree,
  leaf: (block: Bytes, at: number) => void,
): Promise<number[]> {
  const { sb } = reader
  const { agno, name } = tree
  const shape = SHORT[sb.version]
  const magic = tree.magic[sb.version - 4]!
  const length = agLength(sb, agno)
  const room = sb.blockBytes - shape.headerBytes
  const leafRecords = Math.floor(room / tree.recordBytes)
  const nodeRecords = Math.floor(room / (tree.keyBytes + 4))
  const refuse = (found: string, expected: string): never => {
    throw reader.refuse(tree.reason, `${found} in the ${name} of AG ${agno}`, expected)
  }
  const blocks: number[] = []
  let level: { readonly block: number; readonly key: number }[] = [{ block: tree.root, key: 0 }]

  for (let height = tree.levels - 1; height >= 0; height--) {
    const below: { block: number; key: number }[] = []
    const isRoot = height === tree.levels - 1
    const most = height === 0 ? leafRecords : nodeRecords
    const batch = Math.max(1, Math.floor(BATCH_BYTES / sb.blockBytes))
    for (let first = 0; first < level.length; first += batch) {
      throwIfAborted(reader.signal)
      const loaded = await reader.read(places(sb, agno, level.slice(first, first + batch)))
      for (const [i, raw] of loaded.entries()) {
        const index = first + i
        const { block, key } = level[index]!
        const keyAfter = level[index + 1]?.key ?? Number.POSITIVE_INFINITY
        const { bytes } = reader.finish(raw, shape, magic, `block ${block} of the ${name} of AG ${agno}`)
        const b = new Bytes(bytes, 'big', `${name} block`)
        const header = decodeBtreeHeader(b, shape)
        if (header.level !== height) refuse(`level ${header.level} at block ${block}`, String(height))
        if (sb.version === 5 && b.u32(shape.ownerAt) !== agno)
          refuse(`a block of AG ${b.u32(shape.ownerAt)}`, String(agno))
        const left = level[index - 1]?.block ?? NULL_AGBNO
        const right = level[index + 1]?.block ?? NULL_AGBNO
        if (header.leftsib !== BigInt(left) || header.rightsib !== BigInt(right))
          refuse(
            `siblings ${header.leftsib} and ${header.rightsib} at block ${block}`,
            `${left} and ${right}`,
          )
        if (header.numrecs > most || (header.numrecs === 0 && !(isRoot && height === 0)))
          refuse(`${header.numrecs} records at block ${block}`, `1 to ${most}`)
        blocks.push(block)
        for (let r = 0; r < header.numrecs; r++) {
          const at = shape.headerBytes + r * (height === 0 ? tree.recordBytes : tree.keyBytes)
          const own = b.u32(at)
          if (own < key || own >= keyAfter) refuse(`key ${own} at block ${block}`, `${key} to ${keyAfter}`)
          if (height === 0) {
            leaf(b, at)
            continue
          }
          const child = b.u32(shape.headerBytes + nodeRecords * tree.keyBytes + r * 4)
          if (child < headerBlocks(sb) || child >= length) refuse(`a pointer to ${child}`, 'one inside')
          const before = below.at(-1)
          if (before && own <= before.key) refuse(`key ${own} after ${before.key}`, 'ascending keys')
          below.push({ block: child, key: own })
        }
        if (below.length + blocks.length > length) refuse('more tree blocks than blocks', `at most ${length}`)
      }
    }
    level = below
  }
  return blocks
}

function places(sb: Superblock, agno: number, level: readonly { readonly block: number }[]): Place[] {
  return level.map(({ block }) => ({ offset: agByte(sb, agno, block), length: sb.blockBytes }))
}
