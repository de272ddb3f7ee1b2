/**
 * What e2fsprogs says of an ext image: used blocks by `dumpe2fs`.
 *
 * Traps: it does not replay a journal, and with bigalloc it prints the first block of each free cluster, so the end
 * of a range lacks the rest of its last cluster.
 */
import { type Range, RangeSet } from '../../src/extents/index.ts'
import { must, run } from '../kit/index.ts'

export interface Dumpe2fs {
  readonly blockBytes: number
  readonly blocksCount: number
  readonly firstBlock: number
  /** Blocks, not clusters. */
  readonly clusterBlocks: number
  /** Bytes of the image that are in use, to its end (`imageBytes`). */
  readonly used: RangeSet
  /** All of the header, by name. */
  readonly header: ReadonlyMap<string, string>
}

/** `dirty`: the image needs its journal; checksums that do not fit before its replay are let pass. */
export async function dumpe2fs(
  image: string,
  imageBytes: number,
  options: { readonly dirty?: boolean } = {},
): Promise<Dumpe2fs> {
  const text = options.dirty
    ? (await run('dumpe2fs', [image])).stdout.toString()
    : await must('dumpe2fs', [image])
  const header = new Map<string, string>()
  for (const [, name, value] of text.matchAll(/^(\S[^:\n]*):[ \t]+(.*)$/gm)) {
    if (!header.has(name!)) header.set(name!, value!)
  }
  const count = (name: string): number => {
    const value = Number(header.get(name))
    if (!Number.isSafeInteger(value)) throw new Error(`dumpe2fs ${image}: no number for ${name}`)
    return value
  }
  const blockBytes = count('Block size')
  const blocksCount = count('Block count')
  const clusterBlocks = header.has('Cluster size') ? count('Cluster size') / blockBytes : 1
  const groups = Math.ceil((blocksCount - count('First block')) / count('Blocks per group'))
  const lists = text.match(/^ {2}Free blocks: /gm)?.length ?? 0
  if (lists !== groups)
    throw new Error(`dumpe2fs ${image}: ${lists} lists of free blocks for ${groups} groups`)
  const free: Range[] = []
  for (const [, list] of text.matchAll(/^ {2}Free blocks: (.*)$/gm)) {
    for (const part of list!.split(',')) {
      const match = /^\s*(\d+)(?:-(\d+))?\s*$/.exec(part)
      if (!match) {
        if (part.trim() !== '') throw new Error(`dumpe2fs ${image}: cannot read free blocks "${part}"`)
        continue
      }
      const last = Number(match[2] ?? match[1])
      free.push({ start: Number(match[1]), end: Math.min(last + clusterBlocks, blocksCount) })
    }
  }
  const used = RangeSet.from(free)
    .complement(0, blocksCount)
    .scale(blockBytes)
    .union(RangeSet.of(blocksCount * blockBytes, imageBytes))
  return { blockBytes, blocksCount, firstBlock: count('First block'), clusterBlocks, used, header }
}
