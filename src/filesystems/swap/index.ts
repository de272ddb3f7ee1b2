/**
 * Linux swap areas: only the header page matters, because what was swapped out dies with the machine that runs.
 *
 * Rules: a suspend image (hibernation) is the whole machine, so its signature in place of the swap signature makes
 * all of the area in use; so does the old version 0 format, which nothing writes any more. Header layout: Linux
 * `include/linux/swap.h`, `union swap_header`; docs/formats/swap.md.
 */
import { Bytes, type Context, type Endian, NotTrusted, uuidText } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import type { FileSystem, FileSystemType } from '../file-system.ts'

/** The signature stands in the last ten bytes of the first page, whose size depends on the guest's machine. */
const PAGE_SIZES = [4096, 8192, 16_384, 32_768, 65_536] as const
const SIGNATURE_BYTES = 10
const SWAP_V1 = 'SWAPSPACE2'
const SWAP_V0 = 'SWAP-SPACE'
const SUSPENDED = ['S1SUSPEND', 'S2SUSPEND', 'ULSUSPEND', 'LINHIB0001', '\xed\xc3\x02\xe9\x98\x56\xe5\x0c']
const HEADER_BYTES = 1088

interface Found {
  readonly pageBytes: number
  readonly signature: 'v0' | 'v1' | 'suspended'
}

async function find(device: BlockDevice): Promise<Found | undefined> {
  for (const pageBytes of PAGE_SIZES) {
    if (device.size < pageBytes) return undefined
    const raw = await readBytes(device, pageBytes - SIGNATURE_BYTES, SIGNATURE_BYTES)
    const text = new Bytes(raw, 'little', 'swap signature').text(0, SIGNATURE_BYTES)
    if (text === SWAP_V1) return { pageBytes, signature: 'v1' }
    if (text === SWAP_V0) return { pageBytes, signature: 'v0' }
    if (SUSPENDED.some((mark) => text.startsWith(mark))) return { pageBytes, signature: 'suspended' }
  }
  return undefined
}

export const swap: FileSystemType = {
  name: 'swap',

  async probe(device: BlockDevice): Promise<boolean> {
    return (await find(device)) !== undefined
  },

  async open(device: BlockDevice, context: Context): Promise<FileSystem> {
    const found = await find(device)
    if (!found) throw new NotTrusted('swap-bad-header', 'Cannot read the swap area: found no signature')
    const raw = await readBytes(device, 0, HEADER_BYTES, context.signal)
    const about = {
      kind: 'swap',
      uuid: uuidOf(new Bytes(raw, 'little', 'swap header')),
      label: labelOf(new Bytes(raw, 'little', 'swap header')),
    }
    if (found.signature === 'suspended') {
      throw new NotTrusted(
        'swap-suspended',
        'Cannot leave out the swap area: found a suspend image in it, which the guest resumes from',
        about,
      )
    }
    if (found.signature === 'v0') {
      throw new NotTrusted('swap-version', 'Cannot read the swap area: found version 0, expected 1', {
        kind: 'swap',
      })
    }
    const { pageBytes } = found
    const header = headerOf(raw)
    if (!header) {
      throw new NotTrusted('swap-version', 'Cannot read the swap area: found no version 1 header', about)
    }
    const size = (header.lastPage + 1) * pageBytes
    if (header.lastPage === 0 || size > device.size) {
      throw new NotTrusted(
        'swap-size-mismatch',
        `Cannot read the swap area: found ${size} bytes, expected at most the ${device.size} of its partition`,
        about,
      )
    }
    return {
      kind: about.kind,
      uuid: about.uuid,
      label: about.label,
      size,
      blockBytes: pageBytes,
      used: async () => ({
        ranges: RangeSet.of(0, pageBytes).union(RangeSet.of(size, device.size)),
        trust: 'exact',
        state: 'clean',
      }),
    }
  },
}

/** The header is written in the byte order of the guest's machine; its version number tells which. */
function headerOf(raw: Uint8Array): { lastPage: number } | undefined {
  for (const endian of ['little', 'big'] satisfies Endian[]) {
    const bytes = new Bytes(raw, endian, 'swap header')
    if (bytes.u32(1024) === 1) return { lastPage: bytes.u32(1028) }
  }
  return undefined
}

function uuidOf(bytes: Bytes): string | undefined {
  const raw = bytes.sub(1036, 16)
  return raw.every((byte) => byte === 0) ? undefined : uuidText(raw)
}

function labelOf(bytes: Bytes): string | undefined {
  const label = bytes.cString(1052, 16)
  return label === '' ? undefined : label
}
