/**
 * The store of a classic (non-thin) snapshot, persistent format of dm-snapshot: which chunks of the origin were copied
 * before they were overwritten, and where to. Little-endian.
 *
 * Chunk 0: header (magic, valid, version, chunk size in sectors). Chunk 1: the first area of exceptions, (old, new) u64
 * pairs; after it as many data chunks as it has pairs, then the next area, and so on. An area ends at the first pair
 * whose new chunk is 0.
 */
import { Bytes, NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'

const MAGIC = 0x70416e53
const PAIR = 16

export interface Exception {
  /** Byte of the origin. */
  readonly from: number
  /** Byte of the store. */
  readonly to: number
  readonly length: number
}

/** @throws NotTrusted when the store is damaged, overflowed, or not of this format */
export async function readSnapshotStore(store: BlockDevice, chunkBytes: number): Promise<Exception[]> {
  if (!(chunkBytes >= 512 && chunkBytes <= 2 ** 24 && store.size >= chunkBytes * 2))
    throw refuse(`found chunks of ${chunkBytes} bytes`)
  const header = new Bytes(await readBytes(store, 0, 512), 'little', 'snapshot store')
  if (header.u32(0) !== MAGIC) throw refuse('found no header')
  if (header.u32(4) !== 1) throw refuse('found it invalid (it overflowed)')
  if (header.u32(8) !== 1) throw refuse(`found version ${header.u32(8)}`)
  if (header.u32(12) * 512 !== chunkBytes) throw refuse('found another chunk size than in the text')
  const perArea = chunkBytes / PAIR
  const chunks = Math.floor(store.size / chunkBytes)
  const exceptions: Exception[] = []
  for (let area = 1; area < chunks; area += perArea + 1) {
    const view = new Bytes(await readBytes(store, area * chunkBytes, chunkBytes), 'little', 'snapshot store')
    for (let i = 0; i < perArea; i++) {
      const fresh = view.size64(i * PAIR + 8, 'new chunk')
      if (fresh === 0) return exceptions
      const old = view.size64(i * PAIR, 'old chunk')
      if (fresh >= chunks || old > Number.MAX_SAFE_INTEGER / chunkBytes)
        throw refuse(`found chunk ${fresh} of ${chunks}`)
      exceptions.push({ from: old * chunkBytes, to: fresh * chunkBytes, length: chunkBytes })
    }
  }
  return exceptions
}

function refuse(why: string): NotTrusted {
  return new NotTrusted('lvm-snapshot-invalid', `Cannot use the store of an LVM snapshot: ${why}`, {
    kind: 'lvm2',
  })
}
