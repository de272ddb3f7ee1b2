/**
 * Changes the dirty bitmaps that a qcow2 file stores.
 *
 * Specification: QEMU's docs/interop/qcow2, "Bitmaps extension". Everything new is written beside what is there; the
 * image turns from the old list to the new one by a single write. The write order:
 *
 *   1. bits, bitmap tables and the new directory go to clusters that nothing on disk refers to;
 *   2. refcount blocks (counts only go up); when blocks are new: flush, refcount table;              flush
 *   3. the bitmaps extension in the header names the new directory (see below);                      flush
 *   4. counts of clusters that nothing refers to any more go down (repairImage, which counts anew).
 *
 * A crash before 3 leaves the old list, after it the new one, at worst with leaked clusters.
 *
 * Step 3, by what the header holds:
 *   - the extension's 24 bytes lie in one sector: one write;
 *   - they do not, or the list was void: autoclear bit off, flush; the bytes, flush; bit on;
 *   - there is no extension: the backing file's name moves out of the way (copy, flush, offset, flush); the bytes and
 *     a new end marker behind the old one, flush; the old end marker becomes the extension's head, flush; bit on;
 *   - the last bitmap went: bit off, flush; then the extension's type becomes "end" (or, when another extension
 *     follows, one that no program knows).
 *
 * Rules: an image with errors is not edited (`checkImage` first), except that `repair` may drop what is wrong with
 * the bitmaps themselves; clusters are given back only by counting all references anew, so that a table which names
 * a cluster of the guest's cannot free it.
 */
import { alignUp, assert, type Context, VarveError } from '../../base/index.ts'
import {
  asWritable,
  type BlockDevice,
  isResizable,
  OverlayDevice,
  ReadOnlyDevice,
  readBytes,
  type WritableBlockDevice,
} from '../../device/index.ts'
import { Bitmap } from '../../extents/index.ts'
import {
  type BitmapCluster,
  bitmapShape,
  DIRTY_TRACKING,
  ENTRY_BYTES,
  extensionPlace,
  extensionsOf,
  MAX_BITMAP_BYTES,
  MAX_BITMAP_NAME_BYTES,
  MAX_GRANULARITY_BITS,
  MIN_GRANULARITY_BITS,
  readBitmapBits,
  readBitmaps,
  readBitmapTable,
  type StoredBitmap,
  type StoredBitmaps,
} from './bitmaps.ts'
import { checkImage, repairImage } from './check.ts'
import { AT, AUTOCLEAR, BITMAP_FLAG, EXTENSION, entryOffset, type Header, MAX_BITMAPS } from './layout.ts'
import { readHeader, reservedParts } from './open-image.ts'
import { Refcounts, readRefcountTable } from './refcounts.ts'

const EXTENSION_BYTES = 24
const SECTOR = 512
/** An extension that was the bitmaps' and is none now; programs keep or drop extensions that they do not know. */
const UNUSED_EXTENSION = 0x5652_5645

/** A bitmap as it will be stored: with its table as it is on disk, or with bits to be written. */
interface Entry {
  readonly nameBytes: Uint8Array
  readonly name: string
  flags: number
  readonly granularityBits: number
  readonly stored: StoredBitmap | undefined
  bits: Bitmap | undefined
}

export interface NewBitmap {
  readonly name: string
  /** Bytes that one bit stands for, a power of two from 512 to 2^31. Default: a cluster, from 4 KiB to 64 KiB. */
  readonly granularity?: number
  /** Records what is written. Default true. */
  readonly enabled?: boolean
}

export interface BitmapRepair {
  /** Names of the bitmaps that were dropped, and why. */
  readonly dropped: readonly { readonly name: string; readonly why: string }[]
  /** Nothing was wrong, nothing was written. */
  readonly clean: boolean
}

/** Edits are collected in memory; `save` makes them durable. Borrows the file. */
export class BitmapEditor {
  readonly header: Header
  readonly #file: WritableBlockDevice
  readonly #stored: StoredBitmaps
  readonly #signal: AbortSignal | undefined
  #entries: Entry[]
  #changed = false

  private constructor(
    file: WritableBlockDevice,
    stored: StoredBitmaps,
    entries: Entry[],
    signal: AbortSignal | undefined,
  ) {
    this.#file = file
    this.#stored = stored
    this.header = stored.header
    this.#entries = entries
    this.#signal = signal
  }

  /**
   * Reads the list of `file`, which must be locked against other use. A list that is void counts as empty.
   * @throws READ_ONLY; UNSUPPORTED for version 2; CORRUPT for an image with errors, malformed bitmaps among them
   */
  static async open(file: BlockDevice, options: Context = {}): Promise<BitmapEditor> {
    const writable = asWritable(file)
    const stored = await readBitmaps(file, options.signal)
    refuseUnfit(stored.header)
    refuseErrors(await checkImage(file, options))
    if (stored.state === 'void') return new BitmapEditor(writable, stored, [], options.signal)
    const bad = stored.bitmaps.find(({ problem }) => problem !== undefined)
    const problem = stored.problem ?? bad?.problem
    if (problem !== undefined) {
      throw new VarveError('CORRUPT', `Cannot edit bitmaps: found their directory malformed (${problem})`, {
        hint: 'Copy the image, then `varve bitmap repair` drops what cannot be read.',
      })
    }
    return new BitmapEditor(writable, stored, stored.bitmaps.map(entryOf), options.signal)
  }

  /** Names, in the order of the directory. */
  get names(): readonly string[] {
    return this.#entries.map(({ name }) => name)
  }

  /** Granularity in bytes. @throws NOT_FOUND */
  granularity(name: string): number {
    return 2 ** this.#entry(name).granularityBits
  }

  /** A new bitmap in which nothing has changed. @throws EXISTS, LIMIT; RangeError for a wrong name or granularity */
  add(bitmap: NewBitmap): void {
    const nameBytes = new TextEncoder().encode(bitmap.name)
    if (nameBytes.length === 0 || nameBytes.length > MAX_BITMAP_NAME_BYTES || nameBytes.includes(0)) {
      throw new RangeError(`name of ${nameBytes.length} bytes is not one of 1 to ${MAX_BITMAP_NAME_BYTES}`)
    }
    const granularity = bitmap.granularity ?? Math.min(65_536, Math.max(4096, this.header.clusterBytes))
    const granularityBits = Math.log2(granularity)
    if (
      !Number.isInteger(granularityBits) ||
      granularityBits < MIN_GRANULARITY_BITS ||
      granularityBits > MAX_GRANULARITY_BITS
    ) {
      throw new RangeError(`granularity ${granularity} is no power of two from 512 to 2^31`)
    }
    if (this.#find(bitmap.name)) {
      throw new VarveError('EXISTS', `Cannot add bitmap '${bitmap.name}': found one of that name`, {
        fields: { bitmap: bitmap.name },
      })
    }
    if (this.#entries.length >= MAX_BITMAPS) {
      throw new VarveError('LIMIT', `Cannot add bitmap '${bitmap.name}': found ${MAX_BITMAPS} already`)
    }
    const { bits, bytes } = bitmapShape(this.header.size, granularityBits, this.header.clusterBytes)
    if (bytes > MAX_BITMAP_BYTES || bits === 0) {
      throw new VarveError(
        'LIMIT',
        `Cannot add bitmap '${bitmap.name}': found that it needs ${bytes} bytes, expected 1 to ${MAX_BITMAP_BYTES}`,
        { hint: 'Choose a larger granularity.' },
      )
    }
    const flags = (bitmap.enabled ?? true) ? BITMAP_FLAG.auto : 0
    this.#entries.push({
      nameBytes,
      name: bitmap.name,
      flags,
      granularityBits,
      stored: undefined,
      bits: new Bitmap(bits),
    })
    this.#changed = true
  }

  /** In whatever state it is. @throws NOT_FOUND */
  remove(name: string): void {
    const entry = this.#entry(name)
    this.#entries = this.#entries.filter((each) => each !== entry)
    this.#changed = true
  }

  /** @throws NOT_FOUND; CORRUPT when it is inconsistent */
  setEnabled(name: string, enabled: boolean): void {
    const entry = this.#usable(name)
    entry.flags = enabled ? entry.flags | BITMAP_FLAG.auto : entry.flags & ~BITMAP_FLAG.auto
    this.#changed = true
  }

  /** The bits as they are stored or were set. @throws NOT_FOUND; CORRUPT when it is inconsistent or unreadable */
  async bits(name: string): Promise<Bitmap> {
    const entry = this.#usable(name)
    if (entry.bits) return entry.bits
    return await readBitmapBits(this.#file, this.header, entry.stored!, this.#signal)
  }

  /** Replaces the bits; as many as the disk has granules. @throws NOT_FOUND; CORRUPT when it is inconsistent */
  setBits(name: string, bits: Bitmap): void {
    const entry = this.#usable(name)
    const shape = bitmapShape(this.header.size, entry.granularityBits, this.header.clusterBytes)
    assert(bits.length === shape.bits, 'a bitmap has as many bits as the disk has granules')
    entry.bits = bits
    this.#changed = true
  }

  /** Makes the edits durable, in the order that the head of this file gives. The editor is of no use afterwards. */
  async save(): Promise<void> {
    if (!this.#changed) return
    await save(this.#file, this.#stored, this.#entries, this.#signal)
    await giveBack(this.#file, this.#signal)
  }

  #find(name: string): Entry | undefined {
    return this.#entries.find((entry) => entry.name === name)
  }

  #entry(name: string): Entry {
    const entry = this.#find(name)
    if (entry) return entry
    throw new VarveError(
      'NOT_FOUND',
      `Cannot find bitmap '${name}': found ${this.names.length === 0 ? 'none' : this.names.join(', ')}`,
      {
        fields: { bitmap: name },
        hint: '`varve bitmap list IMAGE` lists those that there are.',
      },
    )
  }

  #usable(name: string): Entry {
    const entry = this.#entry(name)
    if ((entry.flags & BITMAP_FLAG.inUse) === 0) return entry
    throw new VarveError('CORRUPT', `Cannot use bitmap '${name}': found it inconsistent`, {
      fields: { bitmap: name },
      hint: 'It missed writes and can only be removed: `varve bitmap remove`.',
    })
  }
}

/**
 * Drops bitmaps that are inconsistent or cannot be read, so that the image opens again; sound ones stay. A list that
 * is void goes as a whole.
 * @throws CORRUPT when the image has errors beside its bitmaps; UNSUPPORTED for version 2
 */
export async function repairBitmaps(file: BlockDevice, options: Context = {}): Promise<BitmapRepair> {
  const { signal } = options
  const writable = asWritable(file)
  const stored = await readBitmaps(file, signal)
  refuseUnfit(stored.header)
  // The image as if it had no bitmaps: what is wrong with it then is not theirs.
  await using view = new OverlayDevice(new ReadOnlyDevice(file))
  view.patch(AT.autoclear, autoclearField(stored.header, false))
  refuseErrors(await checkImage(view, options))
  const dropped: { name: string; why: string }[] = []
  const kept: Entry[] = []
  const owners = new Map<number, string>()
  for (const bitmap of stored.bitmaps) {
    const why =
      stored.state === 'void'
        ? 'a program without support for bitmaps wrote to the image'
        : (bitmap.problem ??
          (bitmap.inUse ? 'inconsistent' : await unreadable(writable, stored.header, bitmap, owners)))
    if (why === undefined) kept.push(entryOf(bitmap))
    else dropped.push({ name: bitmap.name, why })
  }
  const flagged = (stored.header.autoclear & AUTOCLEAR.bitmaps) !== 0n
  const clean =
    dropped.length === 0 &&
    stored.problem === undefined &&
    (stored.state !== 'void' || !stored.header.bitmaps)
  if (clean && !(flagged && !stored.header.bitmaps)) return { dropped, clean: true }
  await save(writable, stored, kept, signal, owners)
  await giveBack(writable, signal)
  return { dropped, clean: false }
}

async function unreadable(
  file: WritableBlockDevice,
  header: Header,
  bitmap: StoredBitmap,
  owners: Map<number, string>,
): Promise<string | undefined> {
  let table: readonly BitmapCluster[]
  try {
    table = await readBitmapTable(file, header, bitmap)
  } catch (error) {
    if (error instanceof VarveError && ['CORRUPT', 'LIMIT'].includes(error.code)) return error.message
    throw error
  }
  const tableBytes = bitmap.tableSize * 8
  const clusters = table.filter((each) => typeof each === 'number')
  for (let at = 0; at < tableBytes; at += header.clusterBytes) clusters.push(bitmap.tableOffset + at)
  for (const cluster of clusters) {
    const other = owners.get(cluster)
    if (other !== undefined) return `its cluster at ${cluster} is also that of bitmap '${other}'`
  }
  for (const cluster of clusters) owners.set(cluster, bitmap.name)
  return undefined
}

function refuseUnfit(header: Header): void {
  if (header.version === 2) {
    throw new VarveError(
      'UNSUPPORTED',
      'Cannot store bitmaps: found a qcow2 image of version 2, expected 3',
      {
        hint: '`qemu-img amend -o compat=1.1` makes it one of version 3.',
      },
    )
  }
  if (header.corrupt || header.dirty) {
    throw new VarveError(
      'CORRUPT',
      `Cannot edit bitmaps: found the image marked as ${header.corrupt ? 'corrupt' : 'dirty'}, expected it to be repaired first`,
    )
  }
}

function refuseErrors(findings: Awaited<ReturnType<typeof checkImage>>): void {
  const errors = findings.filter(({ severity }) => severity === 'error')
  if (errors.length === 0) return
  throw new VarveError(
    'CORRUPT',
    `Cannot edit bitmaps: found ${errors.length} errors in the image, first: ${errors[0]!.text}`,
    {
      hint: 'Copy the image; `varve check` lists the errors. When only bitmaps are wrong, `varve bitmap repair` drops those.',
    },
  )
}

function entryOf(stored: StoredBitmap): Entry {
  const { flags, granularityBits, name, nameBytes } = stored
  return { nameBytes, name, flags, granularityBits, stored, bits: undefined }
}

/** Counts all references anew, so that what is in use by nothing is free. Leaks do no harm where that is refused. */
async function giveBack(file: WritableBlockDevice, signal: AbortSignal | undefined): Promise<void> {
  await repairImage(file, { signal })
}

// Writing ----------------------------------------------------------------------------------------------------

async function save(
  file: WritableBlockDevice,
  stored: StoredBitmaps,
  entries: readonly Entry[],
  signal: AbortSignal | undefined,
  keptClusters: ReadonlyMap<number, string> = new Map(),
): Promise<void> {
  const { header } = stored
  if (entries.length === 0) return await dropExtension(file, header)
  const place = await findPlace(file, header)
  const refcounts = new Refcounts({
    file,
    header,
    table: await readRefcountTable(file, header, signal),
    grow: (bytes) => growFile(file, bytes),
    holds: await holder(file, stored, keptClusters, signal),
  })
  const writer = new ClusterWriter(file, refcounts, header.clusterBytes)
  const places: { tableOffset: number; tableSize: number }[] = []
  for (const entry of entries) {
    places.push(entry.bits ? await writer.writeBits(entry.bits, signal) : entry.stored!)
  }
  const directory = encodeDirectory(entries, places)
  const directoryOffset = await writer.writeWhole(directory, signal)
  await refcounts.writeBlocks(signal)
  await file.flush()
  if (refcounts.tableDirty) {
    await refcounts.writeTable()
    await file.flush()
  }
  const payload = new DataView(new ArrayBuffer(EXTENSION_BYTES))
  payload.setUint32(0, entries.length)
  payload.setBigUint64(8, BigInt(directory.length))
  payload.setBigUint64(16, BigInt(directoryOffset))
  await place.write(new Uint8Array(payload.buffer))
}

/** Writes into clusters that it allocates. */
class ClusterWriter {
  readonly #file: WritableBlockDevice
  readonly #refcounts: Refcounts
  readonly #clusterBytes: number

  constructor(file: WritableBlockDevice, refcounts: Refcounts, clusterBytes: number) {
    this.#file = file
    this.#refcounts = refcounts
    this.#clusterBytes = clusterBytes
  }

  /** Contiguous, padded with zeros to whole clusters. */
  async writeWhole(bytes: Uint8Array, signal: AbortSignal | undefined): Promise<number> {
    const length = alignUp(bytes.length, this.#clusterBytes)
    const run = await this.#refcounts.allocateContiguous(length / this.#clusterBytes)
    const whole = new Uint8Array(length)
    whole.set(bytes)
    const offset = run.start * this.#clusterBytes
    await this.#file.write(offset, whole, signal)
    return offset
  }

  async writeBits(
    bits: Bitmap,
    signal: AbortSignal | undefined,
  ): Promise<{ tableOffset: number; tableSize: number }> {
    const clusterBytes = this.#clusterBytes
    const bytes = bits.toBytes()
    const tableSize = Math.ceil(bytes.length / clusterBytes)
    const table = new DataView(new ArrayBuffer(tableSize * 8))
    const bitsPerCluster = clusterBytes * 8
    for (let index = 0; index < tableSize; index++) {
      const [first, end] = [index * bitsPerCluster, Math.min(bits.length, (index + 1) * bitsPerCluster)]
      if (bits.nextSet(first) >= end) continue
      if (end - first === bitsPerCluster && bits.nextClear(first) >= end) {
        table.setBigUint64(index * 8, 1n)
        continue
      }
      const data = bytes.subarray(index * clusterBytes, (index + 1) * clusterBytes)
      table.setBigUint64(index * 8, BigInt(await this.writeWhole(data, signal)))
    }
    return { tableOffset: await this.writeWhole(new Uint8Array(table.buffer), signal), tableSize }
  }
}

function encodeDirectory(
  entries: readonly Entry[],
  places: readonly { readonly tableOffset: number; readonly tableSize: number }[],
): Uint8Array {
  const lengths = entries.map(({ nameBytes }) => alignUp(ENTRY_BYTES + nameBytes.length, 8))
  const bytes = new Uint8Array(lengths.reduce((sum, length) => sum + length, 0))
  const view = new DataView(bytes.buffer)
  let at = 0
  entries.forEach(({ flags, granularityBits, nameBytes }, index) => {
    const { tableOffset, tableSize } = places[index]!
    view.setBigUint64(at, BigInt(tableOffset))
    view.setUint32(at + 8, tableSize)
    view.setUint32(at + 12, flags)
    view.setUint8(at + 16, DIRTY_TRACKING)
    view.setUint8(at + 17, granularityBits)
    view.setUint16(at + 18, nameBytes.length)
    bytes.set(nameBytes, at + ENTRY_BYTES)
    at += lengths[index]!
  })
  return bytes
}

async function growFile(file: WritableBlockDevice, bytes: number): Promise<void> {
  if (bytes <= file.size) return
  if (!isResizable(file)) {
    throw new VarveError(
      'NO_SPACE',
      `Cannot grow qcow2 image: found a device of ${file.size} bytes, expected ${bytes}`,
      {
        fields: { size: file.size, needed: bytes },
      },
    )
  }
  await file.resize(bytes)
}

/** What stands in a cluster whatever its count says: never to be allocated. */
async function holder(
  file: WritableBlockDevice,
  stored: StoredBitmaps,
  keptClusters: ReadonlyMap<number, string>,
  signal: AbortSignal | undefined,
): Promise<(cluster: number) => string | undefined> {
  const { header } = stored
  const { clusterBytes } = header
  const held = new Map<number, string>()
  const hold = (offset: number, length: number, what: string): void => {
    const end = Math.min(offset + length, file.size)
    for (let at = offset - (offset % clusterBytes); at < end; at += clusterBytes)
      held.set(at / clusterBytes, what)
  }
  const l1 = await readBytes(file, header.l1TableOffset, header.l1Size * 8, signal)
  const view = new DataView(l1.buffer)
  for (let at = 0; at < l1.length; at += 8) {
    const offset = entryOffset(view.getUint32(at), view.getUint32(at + 4))
    if (offset !== 0) hold(offset, clusterBytes, 'an L2 table')
  }
  if (stored.state === 'current' && header.bitmaps) {
    hold(
      header.bitmaps.directoryOffset,
      Math.min(header.bitmaps.directoryBytes, 1 << 26),
      'the bitmap directory',
    )
    for (const bitmap of stored.bitmaps) {
      if (bitmap.problem !== undefined || bitmap.inUse) continue
      hold(bitmap.tableOffset, bitmap.tableSize * 8, 'a bitmap table')
    }
  }
  for (const [offset, name] of keptClusters) hold(offset, clusterBytes, `bitmap '${name}'`)
  const reserved = reservedParts(header)
  return (cluster) =>
    held.get(cluster) ??
    reserved.find(({ end, start }) => start < (cluster + 1) * clusterBytes && cluster * clusterBytes < end)
      ?.what
}

// The extension ----------------------------------------------------------------------------------------------

interface Place {
  /** Step 3 of the write order: the image turns to the new list. */
  write(payload: Uint8Array): Promise<void>
}

/** Where the extension is or can be. Nothing is written yet. @throws UNSUPPORTED when the header has no room */
async function findPlace(file: WritableBlockDevice, header: Header): Promise<Place> {
  const head = await readBytes(file, 0, Math.min(header.clusterBytes, file.size))
  const setBit = async (on: boolean): Promise<void> => {
    await file.write(AT.autoclear, autoclearField(header, on))
    await file.flush()
  }
  const there = extensionPlace(head, header)
  if (there) {
    const at = there.at + 8
    const whole = Math.floor(at / SECTOR) === Math.floor((at + EXTENSION_BYTES - 1) / SECTOR)
    const isVoid = (header.autoclear & AUTOCLEAR.bitmaps) === 0n
    return {
      write: async (payload) => {
        if (!whole && !isVoid) await setBit(false)
        await file.write(at, payload)
        await file.flush()
        if (!whole || isVoid || autoclearOf(header, true) !== header.autoclear) await setBit(true)
      },
    }
  }
  const unused = [...extensionsOf(head, header)].find(
    ({ length, type }) => type === UNUSED_EXTENSION && length === EXTENSION_BYTES,
  )
  if (unused) {
    return {
      write: async (payload) => {
        await file.write(unused.at + 8, payload)
        await file.flush()
        await file.write(unused.at, extensionHead(EXTENSION.bitmaps))
        await file.flush()
        await setBit(true)
      },
    }
  }
  return newExtension(file, header, head, setBit)
}

function newExtension(
  file: WritableBlockDevice,
  header: Header,
  head: Uint8Array,
  setBit: (on: boolean) => Promise<void>,
): Place {
  const view = new DataView(head.buffer, head.byteOffset, head.byteLength)
  const last = [...extensionsOf(head, header)].at(-1)
  const endAt = last ? last.at + 8 + alignUp(last.length, 8) : header.headerLength
  const nameAt = Number(view.getBigUint64(8))
  const nameBytes = nameAt === 0 ? 0 : view.getUint32(16)
  // Extension, new end marker.
  const needed = endAt + 8 + EXTENSION_BYTES + 8
  const newNameAt =
    nameAt === 0 || nameAt >= needed ? nameAt : alignUp(Math.max(needed, nameAt + nameBytes), 8)
  const marked = endAt + 8 <= (nameAt === 0 ? head.length : nameAt) && view.getUint32(endAt) === EXTENSION.end
  if (!marked || needed > head.length || newNameAt + nameBytes > head.length) {
    throw new VarveError(
      'UNSUPPORTED',
      'Cannot add a bitmap: found no room for it in the header of the image',
      {
        fields: { clusterBytes: header.clusterBytes },
        hint: 'Convert the image to one with larger clusters.',
      },
    )
  }
  return {
    write: async (payload) => {
      if (newNameAt !== nameAt) {
        await file.write(newNameAt, head.slice(nameAt, nameAt + nameBytes))
        await file.flush()
        const field = new DataView(new ArrayBuffer(8))
        field.setBigUint64(0, BigInt(newNameAt))
        await file.write(8, new Uint8Array(field.buffer))
        await file.flush()
      }
      const behind = new Uint8Array(EXTENSION_BYTES + 8)
      behind.set(payload)
      await file.write(endAt + 8, behind)
      await file.flush()
      await file.write(endAt, extensionHead(EXTENSION.bitmaps))
      await file.flush()
      await setBit(true)
    },
  }
}

/** No bitmaps are left. */
async function dropExtension(file: WritableBlockDevice, header: Header): Promise<void> {
  await file.write(AT.autoclear, autoclearField(header, false))
  await file.flush()
  const head = await readBytes(file, 0, Math.min(header.clusterBytes, file.size))
  const place = extensionPlace(head, await readHeader(file))
  if (!place) return
  await file.write(place.at, place.last ? new Uint8Array(8) : extensionHead(UNUSED_EXTENSION))
  await file.flush()
}

function extensionHead(type: number): Uint8Array {
  const view = new DataView(new ArrayBuffer(8))
  view.setUint32(0, type)
  view.setUint32(4, EXTENSION_BYTES)
  return new Uint8Array(view.buffer)
}

/** Bits that we know, as they are; those that we do not know are cleared by whoever writes to the image. */
function autoclearOf(header: Header, bitmaps: boolean): bigint {
  const keep = header.hasDataFile ? header.autoclear & AUTOCLEAR.rawExternalData : 0n
  return bitmaps ? keep | AUTOCLEAR.bitmaps : keep
}

function autoclearField(header: Header, bitmaps: boolean): Uint8Array {
  const view = new DataView(new ArrayBuffer(8))
  view.setBigUint64(0, autoclearOf(header, bitmaps))
  return new Uint8Array(view.buffer)
}
