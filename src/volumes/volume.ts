/**
 * What a partition table or volume manager is to the rest of varve: it recognises the devices it was written on
 * (its *members*), and turns them into *volumes*, each of which is a device of its own.
 *
 * A volume carries `project`: where a set of its bytes lies on each member. That is all the room `inuse` needs to
 * carry "in use" from a file system down to the disk, whatever stands between: a partition shifts, a striped
 * volume deals out, a mirror answers the same set for each leg, RAID 5 answers whole stripe rows, a thin volume
 * goes through its mapping. Partition tables have one member; LVM2, md and LDM are handed all members of a group
 * that the caller could find, on one disk or several, and refuse (NotTrusted) when one is missing.
 *
 * Rules: what belongs to the scheme itself (`metadata`) is in use whatever its volumes say. What a scheme cannot
 * vouch for it says so: for everything by throwing NotTrusted, for one volume by its `doubt`.
 */
import { assert, type Context } from '../base/index.ts'
import { type BlockDevice, SliceDevice } from '../device/index.ts'
import { RangeSet } from '../extents/index.ts'

/** Where a device comes from: a whole disk, a partition of a table, or a volume of a volume manager. */
export type Scope = 'disk' | 'partition' | 'volume'

export interface VolumeScheme {
  /** The folder's name, the region's kind in print and the prefix of its reasons. */
  readonly name: string
  /** Where it is looked for. A partition table inside a partition is not what the guest's kernel would read. */
  readonly scopes: readonly Scope[]
  /**
   * True when the contents of its volumes may stand at the start of the member too, so that the signature of a
   * file system there belongs to the volume (md 0.90 and 1.0): this scheme then wins instead of being ambiguous.
   */
  readonly showsContents?: boolean
  /** True when the device carries this scheme's signature. Reads little; throws nothing but I/O errors. */
  probe(device: BlockDevice): Promise<boolean>
  /**
   * The identity of the group that this member belongs to (UUID of the volume group or array): members with one
   * identity are opened together. Absent: every member stands alone (partition tables).
   * @throws NotTrusted, CORRUPT, LIMIT
   */
  group?(device: BlockDevice, context: Context): Promise<string>
  /** `members` are borrowed and must outlive what is returned. @throws NotTrusted, CORRUPT, LIMIT */
  open(members: readonly BlockDevice[], context: Context): Promise<VolumeTable>
}

export interface VolumeTable {
  /** The region's kind in print: `gpt`, `mbr`, `lvm2`. */
  readonly kind: string
  readonly uuid?: string | undefined
  readonly label?: string | undefined
  /** For people, when there is something to say: `primary header damaged: backup used`. */
  readonly state?: string | undefined
  /** In use whatever the volumes say; one set per member, in the order of the members. */
  readonly metadata: readonly RangeSet[]
  readonly volumes: readonly Volume[]
  /** Verdict on what is neither metadata nor part of a volume: gaps are in use, extents of no volume are free. */
  readonly unclaimed: 'in-use' | 'free'
}

export interface Volume {
  /** Number or name by which its table knows it: `1`, `root`. */
  readonly name: string
  readonly uuid?: string | undefined
  readonly label?: string | undefined
  /** The volume's bytes. Borrows the members. */
  readonly device: BlockDevice
  /** Where the bytes `used` of the volume lie; one set per member. `used` lies inside `[0, device.size)`. */
  project(used: RangeSet): readonly RangeSet[]
  /** Set when the volume must be taken as wholly in use without looking at what it holds. */
  readonly doubt?: Doubt | undefined
}

export interface Doubt {
  /** A reason code of docs/errors.md. */
  readonly code: string
  readonly text: string
}

/** One entry of a partition table, as it stands there: bytes, not yet checked against the disk. */
export interface PartitionEntry {
  readonly name: string
  readonly start: number
  /** First byte after it; may lie past the end of the disk. */
  readonly end: number
  readonly uuid?: string | undefined
  readonly label?: string | undefined
  readonly doubt?: Doubt | undefined
}

/**
 * Makes a table of partitions out of its entries, with the rules that all partition tables share: an entry that
 * reaches past the end of the disk is cut and doubted; entries that overlap each other or the table's own
 * metadata are doubted, and each byte goes to the first of them, so that no two volumes share one.
 */
export function partitionTable(
  disk: BlockDevice,
  table: {
    readonly kind: string
    readonly uuid?: string | undefined
    readonly state?: string | undefined
    readonly metadata: RangeSet
    readonly entries: readonly PartitionEntry[]
  },
): VolumeTable {
  const metadata = table.metadata.clip(0, disk.size)
  const entries = table.entries.toSorted((a, b) => a.start - b.start || a.end - b.end)
  const notes = table.state === undefined ? [] : [table.state]
  const volumes: Volume[] = []
  let claimed = metadata
  for (const [index, entry] of entries.entries()) {
    if (entry.start >= disk.size) {
      notes.push(`partition ${entry.name} lies past the end of the disk`)
      continue
    }
    const end = Math.min(entry.end, disk.size)
    const free = RangeSet.of(entry.start, end).subtract(claimed)
    const shared =
      claimed.touches(entry.start, end) ||
      entries.some(
        (other, at) => at !== index && other.start < end && entry.start < Math.min(other.end, disk.size),
      )
    const doubt = entry.doubt ?? doubtOf(entry, shared, disk.size)
    for (const piece of free) volumes.push(partition(disk, piece.start, piece.end, { ...entry, doubt }))
    claimed = claimed.union(free)
  }
  return {
    kind: table.kind,
    uuid: table.uuid,
    state: notes.length > 0 ? notes.join('; ') : undefined,
    metadata: [metadata],
    volumes: volumes.toSorted((a, b) => placeOf(a).start - placeOf(b).start),
    unclaimed: 'in-use',
  }
}

function doubtOf(entry: PartitionEntry, shared: boolean, diskSize: number): Doubt | undefined {
  if (shared) {
    return {
      code: 'partition-overlap',
      text: `partition ${entry.name} shares bytes with another one or with the table itself`,
    }
  }
  if (entry.end > diskSize) {
    return {
      code: 'partition-past-end',
      text: `partition ${entry.name} ends at ${entry.end}, the disk at ${diskSize}`,
    }
  }
  return undefined
}

function partition(
  disk: BlockDevice,
  start: number,
  end: number,
  about: Pick<Volume, 'name' | 'uuid' | 'label' | 'doubt'>,
): Volume {
  return {
    name: about.name,
    uuid: about.uuid,
    label: about.label,
    doubt: about.doubt,
    device: new SliceDevice(disk, start, end - start),
    project: (used) => [used.shift(start)],
  }
}

/** The one range of a partition on its disk. */
export function placeOf(volume: Volume): { readonly start: number; readonly end: number } {
  const place = volume.project(RangeSet.of(0, volume.device.size))[0]
  assert(place?.count === 1, 'a partition is one range of one member')
  return { start: place.startAt(0), end: place.endAt(0) }
}

/** The only member of a scheme that has no groups. */
export function onlyMember(members: readonly BlockDevice[]): BlockDevice {
  assert(members.length === 1, 'a partition table has one member')
  return members[0]!
}
