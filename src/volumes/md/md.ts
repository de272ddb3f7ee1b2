/**
 * Linux md arrays in user space: linear, RAID 0, 1, 4, 5, 6 and 10 (near), superblocks 0.90 and 1.x.
 *
 * Rules:
 * - With superblock 0.90 or 1.0 a mirror's file system shows at the start of each member: md wins over it, because the
 *   real size is the array's and what lies behind it belongs to md.
 * - Members must agree (events, level, layout). RAID 1 is read from whatever legs are at hand; all others need all members.
 * - A RAID 1 that is not clean (a running VM's) may differ from leg to leg where writes were under way: every leg is
 *   read by itself, and each leg keeps what any of them needs.
 * - Everything on a member outside its data is in use: superblock, bitmap, bad-block list, room for a reshape.
 */
import { NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import {
  concat,
  MappedDevice,
  type Mapping,
  mirrored,
  onMember,
  type ParityLayout,
  parityStriped,
  part,
  projected,
  striped,
  striped10,
} from '../mapping.ts'
import type { Volume, VolumeScheme, VolumeTable } from '../volume.ts'
import { decodeSuperblock, hasMagic, placesOf, refuse, SUPER_BYTES, type Superblock } from './layout.ts'

export const md: VolumeScheme = {
  name: 'md',
  scopes: ['disk', 'partition', 'volume'],
  showsContents: true,

  async probe(device) {
    for (const { at } of placesOf(device.size)) if (hasMagic(await readBytes(device, at, 4))) return true
    return false
  },

  async group(device) {
    return (await readSuperblock(device)).uuid
  },

  async open(members) {
    return openArray(await Promise.all(members.map(readSuperblock)), members)
  },
}

async function readSuperblock(device: BlockDevice): Promise<Superblock> {
  for (const { version, at } of placesOf(device.size)) {
    if (!hasMagic(await readBytes(device, at, 4))) continue
    const sb = decodeSuperblock(await readBytes(device, at, SUPER_BYTES), version, at)
    if (sb.dataOffset + sb.dataBytes > device.size) {
      throw refuse(
        'md-size-mismatch',
        `found data up to ${sb.dataOffset + sb.dataBytes}, the member ends at ${device.size}`,
        { kind: 'md', uuid: sb.uuid },
      )
    }
    return sb
  }
  throw refuse('md-super-invalid', 'found no superblock', { kind: 'md' })
}

function openArray(supers: readonly Superblock[], members: readonly BlockDevice[]): VolumeTable {
  const [first] = supers as [Superblock]
  const about = { kind: 'md', uuid: first.uuid, ...(first.name === '' ? {} : { label: first.name }) }
  for (const sb of supers) {
    const same =
      sb.level === first.level &&
      sb.layout === first.layout &&
      sb.chunkBytes === first.chunkBytes &&
      sb.raidDisks === first.raidDisks
    if (!same || sb.events !== first.events)
      throw refuse('md-members-differ', 'found members of different age or shape', about)
    if (sb.role === undefined) throw refuse('md-state', 'found a spare, failed or rebuilding member', about)
  }
  if (
    new Set(supers.map((sb) => sb.role)).size !== supers.length ||
    supers.some((sb) => sb.role! >= first.raidDisks)
  ) {
    throw refuse('md-members-differ', 'found two members for one place', about)
  }
  if (first.level === 10 && !first.clean)
    throw refuse('md-state', 'found a RAID 10 that is not clean: its copies may differ', about)
  const data = supers.map((sb, index) => onMember(index, sb.dataOffset, sb.dataBytes))
  const volumes =
    first.level === 1
      ? mirror(first, data, members)
      : [single(first, arrayMapping(supers, data, about), members)]
  return {
    kind: 'md',
    uuid: first.uuid,
    label: about.label,
    state: `raid level ${first.level}${first.clean ? '' : ', not clean'}`,
    metadata: supers.map((sb, index) =>
      RangeSet.of(sb.dataOffset, sb.dataOffset + sb.dataBytes).complement(0, members[index]!.size),
    ),
    volumes,
    unclaimed: 'in-use',
  }
}

/** One volume, or one for each leg when they may differ; each is projected to every leg. */
function mirror(sb: Superblock, legs: readonly Mapping[], members: readonly BlockDevice[]): Volume[] {
  const all = mirrored(legs)
  const read = sb.clean ? legs.slice(0, 1) : legs
  return read.map((leg, index) => ({
    ...single(sb, all, members),
    name: read.length === 1 ? nameOf(sb) : `${nameOf(sb)}/leg${index}`,
    device: new MappedDevice(part(leg, 0, all.size), members),
  }))
}

function single(sb: Superblock, mapping: Mapping, members: readonly BlockDevice[]): Volume {
  return {
    name: nameOf(sb),
    uuid: sb.uuid,
    device: new MappedDevice(mapping, members),
    project: (used) => projected(mapping, used, members.length),
  }
}

function nameOf(sb: Superblock): string {
  return sb.name === '' ? 'md' : sb.name
}

function arrayMapping(
  supers: readonly Superblock[],
  data: readonly Mapping[],
  about: NotTrusted['about'],
): Mapping {
  const [sb] = supers as [Superblock]
  if (supers.length !== sb.raidDisks)
    throw refuse('md-members-missing', `found ${supers.length} of ${sb.raidDisks} members`, about)
  const columns = data.map((_, place) => data[supers.findIndex((one) => one.role === place)]!)
  if (sb.level === -1)
    return concat(columns.map((column) => part(column, 0, rounded(column.size, sb.chunkBytes))))
  if (!(sb.chunkBytes >= 512 && sb.chunkBytes % 512 === 0))
    throw refuse('md-super-invalid', `found chunks of ${sb.chunkBytes} bytes`, about)
  switch (sb.level) {
    case 0:
      if (
        columns.some(
          (column) => rounded(column.size, sb.chunkBytes) !== rounded(columns[0]!.size, sb.chunkBytes),
        )
      ) {
        throw refuse('md-unsupported', 'found a RAID 0 over members of different sizes', about)
      }
      return striped(columns, sb.chunkBytes)
    case 10:
      // Near copies, far copies, and whether far ones are offset.
      if (sb.layout >> 8 !== 1 || (sb.layout & 0xff) < 1)
        throw refuse('md-unsupported', `found RAID 10 layout 0x${sb.layout.toString(16)}`, about)
      return striped10(columns, sb.chunkBytes, sb.layout & 0xff)
    case 4:
      return parityStriped(columns, sb.chunkBytes, 1, 'parity-last')
    case 5:
    case 6: {
      const layout = PARITY_LAYOUTS.get(sb.layout)
      const parity = sb.level === 5 ? 1 : 2
      if (!layout || columns.length <= parity || (parity === 1 && sb.layout > 5)) {
        throw refuse('md-unsupported', `found RAID ${sb.level} layout ${sb.layout}`, about)
      }
      return parityStriped(columns, sb.chunkBytes, parity, layout)
    }
    default:
      throw refuse('md-unsupported', `found level ${sb.level}`, about)
  }
}

const PARITY_LAYOUTS: ReadonlyMap<number, ParityLayout> = new Map([
  [0, 'left-asymmetric'],
  [1, 'right-asymmetric'],
  [2, 'left-symmetric'],
  [3, 'right-symmetric'],
  [4, 'parity-first'],
  [5, 'parity-last'],
  [8, 'zero-restart'],
  [9, 'n-restart'],
  [10, 'n-continue'],
])

function rounded(size: number, chunkBytes: number): number {
  return chunkBytes > 0 ? size - (size % chunkBytes) : size
}
