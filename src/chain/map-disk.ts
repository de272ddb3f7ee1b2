/** A disk's map in the words of `qemu-img map --output=json`. */
import type { Context } from '../base/index.ts'
import type { Disk, DiskExtent, LayerInfo } from './disk.ts'

export interface MapEntry {
  readonly start: number
  readonly length: number
  readonly depth: number
  /** False where no layer of the chain holds the range. */
  readonly present: boolean
  /** Reads as zeros, as far as metadata tells. */
  readonly zero: boolean
  /** Stands as data in a layer. */
  readonly data: boolean
  /** Byte offset in `file`, where the host keeps the range verbatim. */
  readonly offset?: number
  readonly file?: string
}

/** Entries ascending, covering `[0, size)` without gap or overlap, neighbours that agree joined. */
export async function* mapEntries(disk: Disk, context: Context = {}): AsyncGenerator<MapEntry> {
  let held: MapEntry | undefined
  let at = 0
  while (at < disk.size) {
    for (const extent of await disk.mapExtents(at, disk.size - at, context.signal)) {
      const entry = entryOf(extent, disk.layers[extent.depth]!)
      at = entry.start + entry.length
      if (held && agrees(held, entry)) held = { ...held, length: held.length + entry.length }
      else {
        if (held) yield held
        held = entry
      }
    }
  }
  if (held) yield held
}

/** All of `mapEntries` at once. */
export async function mapDisk(disk: Disk, context: Context = {}): Promise<readonly MapEntry[]> {
  return await Array.fromAsync(mapEntries(disk, context))
}

function entryOf(extent: DiskExtent, layer: LayerInfo): MapEntry {
  const entry = {
    start: extent.offset,
    length: extent.length,
    depth: extent.depth,
    // qemu calls what a format without backing files does not hold present; VHD is one to it.
    present: extent.present || (layer.format === 'vhd' && !layer.backing),
    zero: extent.kind !== 'data',
    data: extent.kind === 'data',
  }
  if (extent.at) return { ...entry, offset: extent.at.offset, file: extent.at.file.path }
  // The bytes of a raw image stand where they stand, holes too.
  if (layer.format === 'raw' && extent.present) return { ...entry, offset: extent.offset, file: layer.path }
  return entry
}

function agrees(a: MapEntry, b: MapEntry): boolean {
  return (
    a.depth === b.depth &&
    a.present === b.present &&
    a.zero === b.zero &&
    a.data === b.data &&
    a.file === b.file &&
    (a.offset === undefined ? b.offset === undefined : a.offset + a.length === b.offset)
  )
}
