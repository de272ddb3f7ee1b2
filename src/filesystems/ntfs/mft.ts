/**
 * The master file table: records by number, and the runs of an attribute wherever its pieces stand.
 *
 * An attribute that does not fit into its record is split: the base record then has an $ATTRIBUTE_LIST that names, for
 * each piece, the record that holds it. That goes for the table's own $DATA too, so it is loaded piece by piece: each
 * piece must lie in the part of the table that the earlier ones map.
 */
import { alignDown, alignUp, LIMITS, NotTrusted, within } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import {
  ATTRIBUTE,
  type Attribute,
  type AttributeListEntry,
  applyFixups,
  type BootSector,
  decodeAttributeList,
  decodeRecord,
  decodeRuns,
  type MftRecord,
  RECORD,
  type Run,
} from './layout.ts'

/** A non-resident attribute put together: its runs cover [0, clusters) without gap or overlap. */
export interface Stream {
  readonly runs: readonly Run[]
  readonly allocatedBytes: number
  readonly dataBytes: number
  readonly initializedBytes: number
  readonly flags: number
}

/** Records read together at the start: all system files that we need stand there. */
const FIRST_RECORDS = 16

export class Mft {
  readonly boot: BootSector
  readonly #device: BlockDevice
  #stream: Stream = { runs: [], allocatedBytes: 0, dataBytes: 0, initializedBytes: 0, flags: 0 }
  /** Raw bytes of the first records, so that the system files cost one read. */
  #first: Uint8Array = new Uint8Array(0)

  private constructor(device: BlockDevice, boot: BootSector) {
    this.#device = device
    this.boot = boot
  }

  static async open(device: BlockDevice, boot: BootSector): Promise<Mft> {
    const mft = new Mft(device, boot)
    const start = boot.mftLcn * boot.clusterBytes
    const head = Math.min(FIRST_RECORDS * boot.recordBytes, device.size - start)
    mft.#first = await readBytes(device, start, Math.max(0, head))
    // Until its own runs are known, the table is taken to be contiguous from its first cluster for one cluster,
    // or for the record that describes it.
    const bootstrap = Math.max(1, Math.ceil(boot.recordBytes / boot.clusterBytes))
    mft.#stream = {
      ...mft.#stream,
      runs: [{ vcn: 0, lcn: boot.mftLcn, clusters: bootstrap }],
      dataBytes: bootstrap * boot.clusterBytes,
    }
    const own = await mft.record(RECORD.mft)
    const piece = own.attributes.find(
      (attribute) => attribute.type === ATTRIBUTE.data && attribute.name === '',
    )
    const data = piece?.nonResident
    if (!data || data.lowestVcn !== 0) throw invalid(RECORD.mft, 'found no $DATA')
    const runs = decodeRuns(data.mappingPairs, 0, boot.clusterCount, '$MFT')
    if (runs[0]?.lcn !== boot.mftLcn)
      throw invalid(RECORD.mft, 'found another first cluster than in the boot sector')
    mft.#stream = { ...data, runs, flags: piece.flags }
    // What of the first records was read beyond the first run is not the table.
    mft.#first = mft.#first.subarray(
      0,
      Math.min(mft.#first.length, (runs[0]?.clusters ?? 0) * boot.clusterBytes),
    )
    mft.#stream = await mft.stream(own, ATTRIBUTE.data, '', (soFar) => {
      mft.#stream = soFar
    })
    return mft
  }

  /** Runs of the table itself. */
  get runs(): readonly Run[] {
    return this.#stream.runs
  }

  get recordCount(): number {
    return Math.floor(Math.min(this.#stream.dataBytes, this.#stream.initializedBytes) / this.boot.recordBytes)
  }

  /** Record `number`, checked. @throws NotTrusted */
  async record(number: number): Promise<MftRecord> {
    const raw = await this.#recordBytes(number)
    return decodeRecord(applyFixups(raw, 'FILE', `MFT record ${number}`), number)
  }

  /**
   * The whole non-resident attribute (`type`, `name`) of a base record.
   * @param loaded called after each piece with what is known so far: the table itself needs it
   * @throws NotTrusted when it is missing, resident, or its pieces do not fit together
   */
  async stream(
    base: MftRecord,
    type: number,
    name: string,
    loaded?: (soFar: Stream) => void,
  ): Promise<Stream> {
    const runs: Run[] = []
    let head: Attribute['nonResident']
    let flags = 0
    for await (const piece of this.#pieces(base, type, name)) {
      const data = piece.nonResident
      if (!data) throw invalid(base.number, `found attribute 0x${type.toString(16)} resident`)
      const next = runs.length === 0 ? 0 : endVcn(runs)
      if (data.lowestVcn !== next)
        throw invalid(base.number, `found a piece at VCN ${data.lowestVcn}, expected ${next}`)
      runs.push(
        ...decodeRuns(data.mappingPairs, data.lowestVcn, this.boot.clusterCount, `record ${base.number}`),
      )
      within(runs.length, LIMITS.tableBytes / 16, `runs of record ${base.number}`)
      if (runs.length > 0 && endVcn(runs) !== data.highestVcn + 1) {
        throw invalid(base.number, `found runs up to VCN ${endVcn(runs)}, expected ${data.highestVcn + 1}`)
      }
      if (!head) {
        head = data
        flags = piece.flags
      }
      loaded?.({ ...head, runs: [...runs], flags })
    }
    if (!head) throw invalid(base.number, `found no attribute 0x${type.toString(16)}`)
    if (endVcn(runs) * this.boot.clusterBytes < head.dataBytes || head.initializedBytes > head.dataBytes) {
      throw invalid(base.number, 'found sizes that contradict its runs')
    }
    return { ...head, runs, flags }
  }

  /** Every attribute of a base record and of the records that extend it. */
  async attributes(base: MftRecord): Promise<readonly Attribute[]> {
    const list = await this.#attributeList(base)
    const all = [...base.attributes]
    const others = new Set(list.map((entry) => entry.record).filter((number) => number !== base.number))
    for (const number of others) all.push(...(await this.#extension(number, base)).attributes)
    return all
  }

  /** Bytes `[offset, offset + length)` of a stream; holes read as zeros. */
  async readStream(stream: Stream, offset: number, length: number): Promise<Uint8Array> {
    const out = new Uint8Array(length)
    const { clusterBytes } = this.boot
    for (const run of stream.runs) {
      const start = Math.max(run.vcn * clusterBytes, offset)
      const end = Math.min((run.vcn + run.clusters) * clusterBytes, offset + length)
      if (start >= end || run.lcn === undefined) continue
      const at = run.lcn * clusterBytes + (start - run.vcn * clusterBytes)
      if (at + (end - start) > this.#device.size) {
        throw new NotTrusted(
          'ntfs-size-mismatch',
          `Cannot read cluster ${run.lcn}: it lies after the end of the device`,
        )
      }
      await this.#device.read(at, out.subarray(start - offset, end - offset))
    }
    return out
  }

  async *#pieces(base: MftRecord, type: number, name: string): AsyncGenerator<Attribute> {
    const matches = (attribute: Attribute): boolean => attribute.type === type && attribute.name === name
    const list = (await this.#attributeList(base)).filter(
      (entry) => entry.type === type && entry.name === name,
    )
    if (list.length === 0) {
      yield* base.attributes.filter(matches)
      return
    }
    for (const entry of list.sort((a, b) => a.lowestVcn - b.lowestVcn)) {
      const record = entry.record === base.number ? base : await this.#extension(entry.record, base)
      const piece = record.attributes.find(
        (attribute) =>
          matches(attribute) &&
          attribute.instance === entry.instance &&
          (attribute.nonResident?.lowestVcn ?? 0) === entry.lowestVcn,
      )
      if (!piece)
        throw invalid(base.number, `found no piece for VCN ${entry.lowestVcn} in record ${entry.record}`)
      yield piece
    }
  }

  async #extension(number: number, base: MftRecord): Promise<MftRecord> {
    const record = await this.record(number)
    if (!record.inUse || record.base !== base.number) {
      throw invalid(base.number, `found record ${number} in its attribute list, which does not extend it`)
    }
    return record
  }

  async #attributeList(base: MftRecord): Promise<AttributeListEntry[]> {
    const list = base.attributes.find((attribute) => attribute.type === ATTRIBUTE.attributeList)
    if (!list) return []
    if (list.value) return decodeAttributeList(list.value)
    const data = list.nonResident!
    const length = within(data.dataBytes, 1 << 18, 'bytes of an attribute list')
    const runs = decodeRuns(data.mappingPairs, 0, this.boot.clusterCount, `attribute list of ${base.number}`)
    if (endVcn(runs) * this.boot.clusterBytes < length)
      throw invalid(base.number, 'found an attribute list longer than its runs')
    return decodeAttributeList(await this.readStream({ ...data, runs, flags: 0 }, 0, length))
  }

  async #recordBytes(number: number): Promise<Uint8Array> {
    const { recordBytes } = this.boot
    const offset = number * recordBytes
    if (offset + recordBytes <= this.#first.length) return this.#first.slice(offset, offset + recordBytes)
    if (number > 0 && number >= Math.floor(this.#stream.dataBytes / recordBytes)) {
      throw invalid(number, `found a table of ${this.#stream.dataBytes} bytes`)
    }
    return this.readStream(this.#stream, offset, recordBytes)
  }

  /**
   * Every base and extension record in use, in order, read in bulk. Records never initialised (no magic) are skipped;
   * a torn or damaged one throws.
   */
  async *allRecords(): AsyncGenerator<MftRecord> {
    const { recordBytes } = this.boot
    const batch = Math.max(1, Math.floor((1 << 20) / recordBytes))
    for (let first = 0; first < this.recordCount; first += batch) {
      const count = Math.min(batch, this.recordCount - first)
      const bytes = await this.readStream(this.#stream, first * recordBytes, count * recordBytes)
      for (let i = 0; i < count; i++) {
        const raw = bytes.subarray(i * recordBytes, (i + 1) * recordBytes)
        // "FILE", and in use: free records keep stale content and may never have been written.
        if (raw[0] !== 0x46 || ((raw[22] ?? 0) & 1) === 0) {
          if (raw[0] !== 0 && raw[0] !== 0x46) throw invalid(first + i, 'found no FILE record')
          continue
        }
        yield decodeRecord(applyFixups(raw, 'FILE', `MFT record ${first + i}`), first + i)
      }
    }
  }
}

/** Clusters of runs as [lcn, lcn + clusters). */
export function* clusterRanges(runs: readonly Run[]): Generator<{ start: number; end: number }> {
  for (const run of runs) if (run.lcn !== undefined) yield { start: run.lcn, end: run.lcn + run.clusters }
}

/** Pieces of at most `most` bytes of `[0, length)`, cut at multiples of `most`. */
export function* pieces(length: number, most: number): Generator<{ offset: number; length: number }> {
  for (let offset = 0; offset < length; offset = alignDown(offset, most) + most) {
    yield { offset, length: Math.min(alignUp(offset + 1, most), length) - offset }
  }
}

function endVcn(runs: readonly Run[]): number {
  const last = runs.at(-1)
  return last ? last.vcn + last.clusters : 0
}

function invalid(number: number, why: string): NotTrusted {
  return new NotTrusted('ntfs-record-invalid', `Cannot use MFT record ${number}: ${why}`, { kind: 'ntfs' })
}
