/**
 * LVM2 in user space: a volume group from its text metadata, its logical volumes as devices, and what each of them
 * needs on the physical volumes. No device-mapper, no root.
 *
 * Rules:
 * - All physical volumes of a group must be at hand and agree on the metadata, else the whole group is in use.
 * - A logical volume of a type, or in a state, that is not read is in use with everything it refers to.
 * - Extents of no logical volume are free; hidden volumes that nothing visible uses (the spare for pool metadata) are not.
 * - Snapshots: the origin also keeps what its snapshots still need of it (union); copy-on-write stores are in use whole.
 *   Thin pools: the union over all thin devices of the pool, those that the text does not know included.
 */
import { alignUp, Bytes, type Context, NotTrusted, throwIfAborted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import {
  concat,
  MappedDevice,
  type Mapping,
  mirrored,
  onMember,
  overlaid,
  type ParityLayout,
  parityStriped,
  part,
  projected,
  scattered,
  striped,
  striped10,
} from '../mapping.ts'
import type { Doubt, Volume, VolumeScheme, VolumeTable } from '../volume.ts'
import {
  type Area,
  decodeLabel,
  decodeMdaHeader,
  isLabel,
  LABEL_SECTORS,
  lvmCrc,
  MDA_HEADER_BYTES,
  type PvHeader,
  plainUuid,
  SECTOR,
} from './layout.ts'
import { readSnapshotStore } from './snapshot.ts'
import { parseText, type Section } from './text.ts'
import { readThinPool, type ThinPool } from './thin.ts'

export const lvm: VolumeScheme = {
  name: 'lvm2',
  scopes: ['disk', 'partition', 'volume'],

  async probe(device) {
    return (await findLabel(device)) !== undefined
  },

  async group(device) {
    const pv = await readPv(device)
    return pv.text === undefined ? `pv:${pv.header.uuid}` : parseVg(pv.text).id
  },

  async open(members, context) {
    return openGroup(await Promise.all(members.map(readPv)), members, context)
  },
}

interface Pv {
  readonly header: PvHeader
  /** The committed text; undefined when the volume carries none. */
  readonly text: string | undefined
}

interface Vg {
  readonly name: string
  readonly id: string
  readonly section: Section
}

async function findLabel(device: BlockDevice): Promise<{ sector: Uint8Array; number: number } | undefined> {
  const length = Math.min(LABEL_SECTORS * SECTOR, Math.floor(device.size / SECTOR) * SECTOR)
  const bytes = await readBytes(device, 0, length)
  for (let number = 0; (number + 1) * SECTOR <= length; number++) {
    const sector = bytes.subarray(number * SECTOR, (number + 1) * SECTOR)
    if (isLabel(sector)) return { sector, number }
  }
  return undefined
}

async function readPv(device: BlockDevice): Promise<Pv> {
  const label = await findLabel(device)
  if (!label) throw refuse('lvm-label-invalid', 'found no label')
  const header = decodeLabel(label.sector, label.number)
  if (header.deviceBytes > device.size)
    throw refuse('lvm-pv-short', `found ${device.size} bytes, expected ${header.deviceBytes}`)
  let text: string | undefined
  for (const area of header.metadataAreas) {
    const found = await readText(device, area)
    if (found === undefined) continue
    if (text !== undefined && text !== found)
      throw refuse('lvm-metadata-differs', 'found two metadata areas that differ')
    text = found
  }
  return { header, text }
}

async function readText(device: BlockDevice, area: Area): Promise<string | undefined> {
  if (area.offset + area.size > device.size || area.size <= MDA_HEADER_BYTES) {
    throw new NotTrusted(
      'lvm-mda-invalid',
      'Cannot use LVM metadata area: it lies past the end of the device',
      { kind: 'lvm2' },
    )
  }
  const location = decodeMdaHeader(await readBytes(device, area.offset, MDA_HEADER_BYTES), area)
  if (!location || location.ignored) return undefined
  const bytes = new Uint8Array(location.size)
  // The text is written round in a circle behind the header.
  const first = Math.min(location.size, area.size - location.offset)
  await device.read(area.offset + location.offset, bytes.subarray(0, first))
  await device.read(area.offset + MDA_HEADER_BYTES, bytes.subarray(first))
  if (lvmCrc(bytes) !== location.crc) {
    throw new NotTrusted('lvm-mda-invalid', 'Cannot use LVM metadata: found a wrong checksum of its text', {
      kind: 'lvm2',
    })
  }
  const end = bytes.indexOf(0)
  return new TextDecoder().decode(end < 0 ? bytes : bytes.subarray(0, end))
}

function parseVg(text: string): Vg {
  const root = parseText(text)
  const [only, ...others] = root.sections
  if (!only || others.length > 0)
    throw new NotTrusted('lvm-text-invalid', `Cannot use LVM metadata: found ${root.sections.size} groups`)
  return { name: only[0], section: only[1], id: only[1].string('id') }
}

async function openGroup(
  pvs: readonly Pv[],
  members: readonly BlockDevice[],
  context: Context,
): Promise<VolumeTable> {
  const texts = new Set(pvs.map((pv) => pv.text).filter((text) => text !== undefined))
  if (texts.size === 0) throw refuse('lvm-no-group', 'found a physical volume that names no group')
  // Equal but for the comment about who wrote it: the section of the group itself decides.
  const groups = [...texts].map(parseVg)
  const [vg] = groups as [Vg]
  const seqno = vg.section.number('seqno')
  if (groups.some((other) => other.section.number('seqno') !== seqno)) {
    throw refuse('lvm-metadata-differs', 'found physical volumes whose metadata is of different age', vg)
  }
  return new Group(vg, pvs, members).open(context)
}

/** How deep volumes may be stacked; real ones reach five. */
const DEEPEST = 16
/** States of a logical volume that do not change where its bytes are. */
const PLAIN_STATUS: ReadonlySet<string> = new Set(['READ', 'WRITE', 'VISIBLE', 'FIXED_MINOR'])

class Group {
  readonly #vg: Vg
  readonly #members: readonly BlockDevice[]
  readonly #extentBytes: number
  /** Extents of each physical volume, by its name in the text. */
  readonly #pvs = new Map<string, Mapping>()
  readonly #lvs: ReadonlyMap<string, Section>
  readonly #built = new Map<string, Mapping>()
  readonly #pools = new Map<string, ThinPool>()
  readonly #metadata: RangeSetBuilder[]

  constructor(vg: Vg, pvs: readonly Pv[], members: readonly BlockDevice[]) {
    this.#vg = vg
    this.#members = members
    this.#extentBytes = vg.section.number('extent_size') * SECTOR
    if (this.#extentBytes <= 0) throw refuse('lvm-text-invalid', 'found no extent size', vg)
    this.#lvs = vg.section.sections.get('logical_volumes')?.sections ?? new Map()
    this.#metadata = members.map(() => new RangeSetBuilder())
    this.#matchPvs(pvs)
  }

  async open(context: Context): Promise<VolumeTable> {
    const volumes: Volume[] = []
    const stores = this.#snapshotStores()
    const covered = new Set<string>()
    // A snapshot is known by the name of its store; the volume of type `snapshot` only ties it to its origin.
    for (const [name, segment] of stores) {
      for (const one of this.#closure(name)) covered.add(one)
      const lv = this.#lvs.get(name)
      if (lv) volumes.push(await this.#volume(name, lv, segment))
    }
    for (const [name, lv] of this.#lvs) {
      throwIfAborted(context.signal)
      const type = this.#typeOf(lv)
      if (!lv.strings('status').includes('VISIBLE') || type === 'snapshot' || stores.has(name)) continue
      for (const one of this.#closure(name)) covered.add(one)
      if (type === 'thin-pool') await this.#keepPool(name)
      else volumes.push(await this.#volume(name, lv, undefined))
    }
    for (const [name, lv] of this.#lvs) {
      if (covered.has(name) || this.#typeOf(lv) === 'snapshot') continue
      this.#keepWhole(name)
    }
    return {
      kind: 'lvm2',
      uuid: this.#vg.id,
      label: this.#vg.name,
      metadata: this.#metadata.map((builder) => builder.build()),
      volumes,
      unclaimed: 'free',
    }
  }

  #matchPvs(pvs: readonly Pv[]): void {
    const members = new Map<string, number>()
    for (const [index, pv] of pvs.entries()) {
      if (members.has(pv.header.uuid))
        throw refuse('lvm-duplicate-pv', `found the physical volume ${pv.header.uuid} twice`, this.#vg)
      members.set(pv.header.uuid, index)
    }
    for (const [name, pv] of this.#vg.section.section('physical_volumes').sections) {
      const index = members.get(plainUuid(pv.string('id')))
      if (index === undefined || pv.strings('flags').includes('MISSING')) {
        throw refuse('lvm-pv-missing', `found no device for the physical volume ${pv.string('id')}`, this.#vg)
      }
      const start = pv.number('pe_start') * SECTOR
      const size = pv.number('pe_count') * this.#extentBytes
      const member = this.#members[index]!
      if (start + size > member.size)
        throw refuse('lvm-pv-short', `found extents past the end of the device, at ${start + size}`, this.#vg)
      this.#pvs.set(name, onMember(index, start, size))
      const keep = this.#metadata[index]!
      keep.add(0, start)
      keep.add(start + size, member.size)
      for (const area of pvs[index]!.header.metadataAreas)
        keep.add(area.offset, Math.min(area.offset + area.size, member.size))
      members.delete(plainUuid(pv.string('id')))
    }
    if (members.size > 0)
      throw refuse('lvm-metadata-differs', 'found a physical volume that the group does not know', this.#vg)
  }

  /** Store of a classic snapshot -> the segment that ties it to its origin. */
  #snapshotStores(): Map<string, Section> {
    const stores = new Map<string, Section>()
    for (const lv of this.#lvs.values()) {
      const segment = lv.sections.get('segment1')
      if (segment && this.#typeOf(lv) === 'snapshot')
        stores.set(String(segment.values.get('cow_store') ?? segment.values.get('merging_store')), segment)
    }
    return stores
  }

  async #volume(name: string, lv: Section, snapshot: Section | undefined): Promise<Volume> {
    const about = { name, uuid: lv.string('id') }
    try {
      const mapping = snapshot ? await this.#snapshot(name, snapshot) : await this.#build(name, 0)
      const size = mapping.size
      return {
        ...about,
        device: new MappedDevice(mapping, this.#members, size),
        project: (used) => projected(mapping, used, this.#members.length),
      }
    } catch (error) {
      if (!(error instanceof NotTrusted)) throw error
      return this.#doubted(about, name, { code: error.reason, text: error.message }, snapshot)
    }
  }

  /** A volume that is in use with all that it refers to. */
  #doubted(about: Pick<Volume, 'name' | 'uuid'>, name: string, doubt: Doubt, snapshot?: Section): Volume {
    const names = new Set(this.#closure(name))
    const origin = snapshot?.values.get('origin')
    if (typeof origin === 'string') for (const one of this.#closure(origin)) names.add(one)
    const whole = this.#extentsOf(names)
    const size = Math.max(SECTOR, this.#sizeOf(name))
    const nowhere = scattered(onMember(0, 0, 0), size, [])
    return { ...about, doubt, device: new MappedDevice(nowhere, this.#members), project: () => whole }
  }

  /** The mapping of a logical volume. @throws NotTrusted when some part of it is not read */
  async #build(name: string, depth: number): Promise<Mapping> {
    const known = this.#built.get(name)
    if (known) return known
    if (depth > DEEPEST)
      throw refuse('lvm-unsupported', `found volumes stacked too deep at ${name}`, this.#vg)
    const lv = this.#lvs.get(name)
    if (!lv) throw refuse('lvm-text-invalid', `found no volume ${name}`, this.#vg)
    const odd = lv.strings('status').find((status) => !PLAIN_STATUS.has(status))
    if (odd !== undefined)
      throw refuse('lvm-unsupported', `found the volume ${name} in state ${odd}`, this.#vg)
    const segments = this.#segmentsOf(lv)
    const parts: Mapping[] = []
    let next = 0
    for (const segment of segments) {
      if (segment.number('start_extent') !== next)
        throw refuse('lvm-text-invalid', `found a gap in the volume ${name}`, this.#vg)
      const extents = segment.number('extent_count')
      next += extents
      const size = extents * this.#extentBytes
      const mapping = await this.#segment(segment, size, depth)
      if (mapping.size < size)
        throw refuse('lvm-text-invalid', `found a segment of ${name} that is shorter than it says`, this.#vg)
      parts.push(part(mapping, 0, size))
    }
    if (parts.length === 0)
      throw refuse('lvm-text-invalid', `found no segment of the volume ${name}`, this.#vg)
    const built = concat(parts)
    this.#built.set(name, built)
    return built
  }

  async #segment(segment: Section, size: number, depth: number): Promise<Mapping> {
    const type = segment.string('type')
    switch (type) {
      case 'striped':
        return this.#stripes(segment, size, depth)
      case 'mirror': {
        const legs = await this.#areas(segment.list('mirrors'), size, depth)
        const log = segment.values.get('mirror_log')
        if (typeof log === 'string') this.#keepWhole(log)
        return mirrored(legs)
      }
      case 'thin':
        return this.#thin(segment, size)
      default:
        if (type.startsWith('raid')) return this.#raid(type, segment, depth)
        throw refuse('lvm-unsupported', `found a volume of type ${type}`, this.#vg)
    }
  }

  async #stripes(segment: Section, size: number, depth: number): Promise<Mapping> {
    const count = segment.number('stripe_count')
    if (count < 1 || count > 1024) throw refuse('lvm-text-invalid', `found ${count} stripes`, this.#vg)
    const columns = await this.#areas(segment.list('stripes'), size / count, depth)
    if (columns.length !== count)
      throw refuse('lvm-text-invalid', `found ${columns.length} of ${count} stripes`, this.#vg)
    return count === 1 ? columns[0]! : striped(columns, this.#chunkBytes(segment))
  }

  /** Pairs of a physical or logical volume and its first extent. */
  async #areas(list: readonly (number | string)[], size: number, depth: number): Promise<Mapping[]> {
    const areas: Mapping[] = []
    for (let i = 0; i + 1 < list.length; i += 2) {
      const [name, extent] = [list[i], list[i + 1]]
      if (typeof name !== 'string' || typeof extent !== 'number')
        throw refuse('lvm-text-invalid', 'found an area without its place', this.#vg)
      const whole = this.#pvs.get(name) ?? (await this.#build(name, depth + 1))
      const start = extent * this.#extentBytes
      if (start + size > whole.size)
        throw refuse('lvm-text-invalid', `found an area past the end of ${name}`, this.#vg)
      areas.push(part(whole, start, size))
    }
    return areas
  }

  async #raid(type: string, segment: Section, depth: number): Promise<Mapping> {
    if (segment.values.has('data_offset') || segment.values.has('reshape_count')) {
      throw refuse('lvm-unsupported', 'found an array that is being reshaped', this.#vg)
    }
    const list = segment.strings(type === 'raid0' ? 'raid0_lvs' : 'raids')
    const images: Mapping[] = []
    const metas: string[] = []
    for (let i = 0; i < list.length; i++) {
      if (type !== 'raid0') metas.push(list[i++]!)
      images.push(await this.#build(list[i] ?? '', depth + 1))
    }
    if (images.length === 0) throw refuse('lvm-text-invalid', `found no image of a ${type}`, this.#vg)
    for (const meta of metas) this.#keepWhole(meta)
    if (type !== 'raid0_meta') await this.#checkSync(metas, depth)
    const layout = RAID_LAYOUTS.get(type)
    switch (type) {
      case 'raid1':
        return mirrored(images)
      case 'raid0':
      case 'raid0_meta':
        return striped(images, this.#chunkBytes(segment))
      case 'raid10':
      case 'raid10_near': {
        const copies = segment.values.get('data_copies') ?? 2
        if (typeof copies !== 'number' || copies < 1 || copies > images.length)
          throw refuse('lvm-text-invalid', `found ${String(copies)} copies`, this.#vg)
        return striped10(images, this.#chunkBytes(segment), copies)
      }
      default:
        if (!layout || images.length <= layout.parity)
          throw refuse('lvm-unsupported', `found a volume of type ${type}`, this.#vg)
        return parityStriped(images, this.#chunkBytes(segment), layout.parity, layout.layout)
    }
  }

  /** Reading the first image, or the data columns, is right only when none of them is failed or being rebuilt. */
  async #checkSync(metas: readonly string[], depth: number): Promise<void> {
    for (const name of metas) {
      const meta = new MappedDevice(await this.#build(name, depth + 1), this.#members)
      const view = new Bytes(await readBytes(meta, 0, SECTOR), 'little', 'RAID metadata')
      // "DmRd"; a new array that was never activated has none yet.
      if (view.u32(0) !== 0x64526d44)
        throw refuse('lvm-raid-state', `found no superblock in ${name}`, this.#vg)
      if (view.u64(24) !== 0n || view.u64(32) !== 0xffff_ffff_ffff_ffffn) {
        throw refuse(
          'lvm-raid-state',
          `found ${name} of an array with failed or rebuilding members`,
          this.#vg,
        )
      }
    }
  }

  async #thin(segment: Section, size: number): Promise<Mapping> {
    if (segment.values.has('external_origin'))
      throw refuse('lvm-unsupported', 'found a thin volume with an external origin', this.#vg)
    const poolName = segment.string('thin_pool')
    const { pool, data } = await this.#pool(poolName)
    const mappings = pool.devices.get(segment.number('device_id')) ?? []
    return scattered(data, size, piecesOf(mappings, pool.blockBytes, size))
  }

  async #pool(name: string): Promise<{ pool: ThinPool; data: Mapping }> {
    const segment = this.#lvs.get(name)?.sections.get('segment1')
    if (segment?.string('type') !== 'thin-pool')
      throw refuse('lvm-text-invalid', `found no thin pool ${name}`, this.#vg)
    const data = await this.#build(segment.string('pool'), 1)
    let pool = this.#pools.get(name)
    if (!pool) {
      const metadata = new MappedDevice(await this.#build(segment.string('metadata'), 1), this.#members)
      pool = await readThinPool(metadata, data.size)
      if (pool.blockBytes !== segment.number('chunk_size') * SECTOR)
        throw refuse('lvm-thin-invalid', 'found another chunk size than in the text', this.#vg)
      this.#pools.set(name, pool)
    }
    return { pool, data }
  }

  /** A thin pool's metadata is in use whole, and so are blocks of thin devices that no volume of the text is. */
  async #keepPool(name: string): Promise<void> {
    try {
      const { pool, data } = await this.#pool(name)
      const segment = this.#lvs.get(name)!.section('segment1')
      this.#keepWhole(segment.string('metadata'))
      const known = new Set<number>()
      for (const lv of this.#lvs.values()) {
        const thin = lv.sections.get('segment1')
        if (thin?.values.get('type') === 'thin' && thin.values.get('thin_pool') === name)
          known.add(thin.number('device_id'))
      }
      for (const [id, mappings] of pool.devices) {
        if (known.has(id)) continue
        const pieces = piecesOf(mappings, pool.blockBytes, Number.MAX_SAFE_INTEGER)
        const used = RangeSet.from(
          pieces.map(({ offset, length }) => ({ start: offset, end: offset + length })),
        )
        this.#keep(projected(data, used, this.#members.length))
      }
    } catch (error) {
      if (!(error instanceof NotTrusted)) throw error
      this.#keepWhole(name)
    }
  }

  /** What a classic snapshot shows: its store where chunks were copied, its origin elsewhere. */
  async #snapshot(storeName: string, segment: Section): Promise<Mapping> {
    const originName = segment.values.get('origin')
    if (segment.values.has('merging_store') || typeof originName !== 'string') {
      throw refuse('lvm-unsupported', `found the snapshot ${storeName} being merged`, this.#vg)
    }
    this.#keepWhole(storeName)
    const [origin, store] = [await this.#build(originName, 1), await this.#build(storeName, 1)]
    const exceptions = await readSnapshotStore(
      new MappedDevice(store, this.#members),
      segment.number('chunk_size') * SECTOR,
    )
    const pieces = exceptions.map(({ from, to, length }) => ({
      at: from,
      offset: to,
      length: Math.min(length, origin.size - from),
    }))
    const covered = new RangeSetBuilder()
    for (const { at, length } of pieces) covered.add(at, at + length)
    return overlaid(origin, scattered(store, origin.size, pieces), covered.build())
  }

  #chunkBytes(segment: Section): number {
    const bytes = segment.number('stripe_size') * SECTOR
    if (bytes < SECTOR || bytes % SECTOR !== 0)
      throw refuse('lvm-text-invalid', `found stripes of ${bytes} bytes`, this.#vg)
    return bytes
  }

  /** A name and every logical volume that its segments mention, and so on: by text, whatever the type. */
  #closure(name: string): Set<string> {
    const found = new Set<string>()
    const open = [name]
    for (let next = open.pop(); next !== undefined; next = open.pop()) {
      const lv = this.#lvs.get(next)
      if (!lv || found.has(next)) continue
      found.add(next)
      for (const segment of this.#segmentsOf(lv)) {
        for (const value of segment.values.values()) {
          for (const item of typeof value === 'object' ? value : [value])
            if (typeof item === 'string') open.push(item)
        }
      }
    }
    return found
  }

  /** Bytes on every member of all extents that the named volumes mention, whatever their type. */
  #extentsOf(names: ReadonlySet<string>): readonly RangeSet[] {
    const into = this.#members.map(() => new RangeSetBuilder())
    for (const name of names) {
      for (const segment of this.#segmentsOf(this.#lvs.get(name)!)) {
        const columns =
          typeof segment.values.get('stripe_count') === 'number'
            ? Math.max(1, segment.number('stripe_count'))
            : 1
        const size = alignUp(
          (segment.number('extent_count') * this.#extentBytes) / columns,
          this.#extentBytes,
        )
        for (const value of segment.values.values()) {
          if (typeof value !== 'object') continue
          for (const [i, item] of value.entries()) {
            const pv = typeof item === 'string' ? this.#pvs.get(item) : undefined
            const extent = value[i + 1]
            if (!pv || typeof extent !== 'number') continue
            pv.project(RangeSet.of(extent * this.#extentBytes, extent * this.#extentBytes + size), into)
          }
        }
      }
    }
    return into.map((builder) => builder.build())
  }

  #keepWhole(name: string): void {
    this.#keep(this.#extentsOf(this.#closure(name)))
  }

  #keep(ranges: readonly RangeSet[]): void {
    for (const [i, set] of ranges.entries()) this.#metadata[i]!.addAll(set)
  }

  #segmentsOf(lv: Section): readonly Section[] {
    return [...lv.sections].filter(([name]) => /^segment\d+$/.test(name)).map(([, segment]) => segment)
  }

  #typeOf(lv: Section): string | undefined {
    const type = this.#segmentsOf(lv)[0]?.values.get('type')
    return typeof type === 'string' ? type : undefined
  }

  #sizeOf(name: string): number {
    const lv = this.#lvs.get(name)
    const extents = lv
      ? this.#segmentsOf(lv).reduce((sum, segment) => sum + segment.number('extent_count'), 0)
      : 0
    return Math.min(extents * this.#extentBytes, Number.MAX_SAFE_INTEGER)
  }
}

const RAID_LAYOUTS: ReadonlyMap<string, { parity: 1 | 2; layout: ParityLayout }> = new Map([
  ['raid4', { parity: 1, layout: 'parity-first' }],
  ['raid5', { parity: 1, layout: 'left-symmetric' }],
  ['raid5_la', { parity: 1, layout: 'left-asymmetric' }],
  ['raid5_ra', { parity: 1, layout: 'right-asymmetric' }],
  ['raid5_ls', { parity: 1, layout: 'left-symmetric' }],
  ['raid5_rs', { parity: 1, layout: 'right-symmetric' }],
  ['raid5_n', { parity: 1, layout: 'parity-last' }],
  ['raid6', { parity: 2, layout: 'zero-restart' }],
  ['raid6_zr', { parity: 2, layout: 'zero-restart' }],
  ['raid6_nr', { parity: 2, layout: 'n-restart' }],
  ['raid6_nc', { parity: 2, layout: 'n-continue' }],
])

/** Runs of mappings, cut at the end of the volume. */
function piecesOf(
  mappings: readonly { readonly block: number; readonly dataBlock: number }[],
  blockBytes: number,
  size: number,
): { at: number; offset: number; length: number }[] {
  const pieces: { at: number; offset: number; length: number }[] = []
  for (const { block, dataBlock } of mappings) {
    const at = block * blockBytes
    if (at >= size) continue
    const length = Math.min(blockBytes, size - at)
    const last = pieces.at(-1)
    const offset = dataBlock * blockBytes
    if (last && last.at + last.length === at && last.offset + last.length === offset) last.length += length
    else pieces.push({ at, offset, length })
  }
  return pieces
}

function refuse(reason: string, why: string, vg?: Vg): NotTrusted {
  return new NotTrusted(reason, `Cannot use LVM volume group${vg ? ` ${vg.name}` : ''}: ${why}`, {
    kind: 'lvm2',
    uuid: vg?.id,
    label: vg?.name,
  })
}
