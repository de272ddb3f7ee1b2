/** Reads packs: the trailer, objects by their place, and everything for `verify`. */
import { crc32, VarveError, within } from '../base/index.ts'
import { equalBytes, FrameCodec, mac, openSection, type RepositoryKeys } from './keys.ts'
import {
  CRC_SPAN,
  corrupt,
  decodeDirectory,
  decodePackFooter,
  decodePackHeader,
  encodePackHeader,
  FOOTER_MAC_AT,
  MOST_PAGE_BYTES,
  PACK_FOOTER_BYTES,
  PACK_HEADER_BYTES,
  type PackFooter,
  type PackKind,
  type PackObject,
  packPath,
  storedBytes,
  storedLengthOf,
} from './layout.ts'
import type { BlobStore } from './store/blob-store.ts'

/** Read at once from the end of a pack: footer, checksums and directory of nearly every pack. */
const TAIL_BYTES = 32_768

export interface PackTrailer {
  readonly name: string
  readonly kind: PackKind
  readonly footer: PackFooter
  readonly crcs: Uint8Array
  readonly objects: readonly PackObject[]
}

/**
 * The trailer of a pack, authenticated: what it says is what the writer wrote. Says nothing about the frames.
 * @throws NOT_FOUND, CORRUPT, UNSUPPORTED
 */
export async function readTrailer(
  store: BlobStore,
  keys: RepositoryKeys,
  kind: PackKind,
  name: string,
): Promise<PackTrailer> {
  const path = packPath(kind, name)
  const what = `pack ${path}`
  const size = await store.size(path)
  if (size < PACK_HEADER_BYTES + PACK_FOOTER_BYTES) throw corrupt(what, `${size} bytes`)
  let tail = new Uint8Array(Math.min(size, TAIL_BYTES))
  await store.read(path, size - tail.length, tail)
  const footerBytes = tail.slice(tail.length - PACK_FOOTER_BYTES)
  const footer = decodePackFooter(footerBytes, size, what)
  const nameBytes = Buffer.from(name, 'hex')
  if (!equalBytes(footer.name, nameBytes)) throw corrupt(what, `the trailer of pack ${hex(footer.name)}`)
  if (footer.kind !== kind) throw corrupt(what, `a pack of ${footer.kind}`)
  if (!equalBytes(footer.repository, keys.repository) || footer.sealing !== keys.sealing)
    throw corrupt(what, 'a pack of another repository')
  const wanted = size - footer.directoryOffset
  if (wanted > tail.length) {
    tail = new Uint8Array(wanted)
    await store.read(path, footer.directoryOffset, tail)
  }
  const from = tail.length - wanted
  const stored = tail.subarray(from, from + footer.directoryStored)
  const crcs = tail.slice(from + footer.directoryStored, tail.length - PACK_FOOTER_BYTES)
  if (crc32(crcs) !== footer.crcOfCrcs) throw corrupt(what, 'a wrong checksum of its checksums')
  const packKeys = keys.pack(name)
  const header = encodePackHeader(footer)
  const expected = mac(packKeys.mac, header, stored, crcs, footerBytes.subarray(0, FOOTER_MAC_AT))
  if (!equalBytes(expected, footerBytes.subarray(FOOTER_MAC_AT, FOOTER_MAC_AT + 32)))
    throw corrupt(what, 'a trailer that this repository did not write (wrong MAC)')
  const place = { at: footer.directoryOffset, aad: header }
  const plain = openSection(footer.sealing, packKeys.seal, stored, place, what)
  if (plain.length !== footer.directoryPlain) throw corrupt(what, `a directory of ${plain.length} bytes`)
  // A copy: the directory outlives the tail that was read.
  const objects = decodeDirectory(Uint8Array.from(plain), footer.objects, footer.directoryOffset, what)
  return { name, kind, footer, crcs, objects }
}

/** Where an object stands and how it is cut. */
export interface ObjectPlace {
  readonly kind: PackKind
  readonly pack: string
  readonly id: Uint8Array
  readonly offset: number
  readonly frames: readonly number[]
  /** Content of every frame but perhaps the last. */
  readonly frameBytes: number
  readonly plainLength: number
}

/**
 * Content of the frames `[first, end)` of an object into `into`. `scratch` is a buffer for the stored bytes; one is
 * made when it is too small or not given. @throws NOT_FOUND, CORRUPT
 */
export async function readFrames(
  store: BlobStore,
  keys: RepositoryKeys,
  place: ObjectPlace,
  first: number,
  end: number,
  into: Uint8Array,
  scratch?: Uint8Array,
): Promise<void> {
  const path = packPath(place.kind, place.pack)
  const from = place.offset + storedBytes(place.frames.slice(0, first))
  const length = storedBytes(place.frames.slice(first, end))
  const stored = scratch && scratch.length >= length ? scratch.subarray(0, length) : new Uint8Array(length)
  if (length > 0) await store.read(path, from, stored)
  decodeFrames(new FrameCodec(keys, place.pack), place, first, end, stored, from, into)
}

function decodeFrames(
  codec: FrameCodec,
  place: ObjectPlace,
  first: number,
  end: number,
  stored: Uint8Array,
  from: number,
  into: Uint8Array,
): void {
  const what = `pack ${packPath(place.kind, place.pack)}`
  let at = 0
  for (let frame = first; frame < end; frame++) {
    const descriptor = place.frames[frame]!
    const length = storedLengthOf(descriptor)
    const plainFrom = frame * place.frameBytes
    const plainEnd = Math.min(plainFrom + place.frameBytes, place.plainLength)
    codec.decode(
      stored.subarray(at, at + length),
      descriptor,
      { id: place.id, frame, offset: from + at },
      into.subarray(plainFrom - first * place.frameBytes, plainEnd - first * place.frameBytes),
      what,
    )
    at += length
  }
}

/** One thing wrong in a pack. Without `objectOffset` the whole pack is in doubt. */
export interface PackDamage {
  readonly code: 'CORRUPT' | 'NOT_FOUND' | 'UNSUPPORTED' | 'IO'
  readonly message: string
  /** Place of the damaged bytes. */
  readonly offset?: number
  /** The object that cannot be read. */
  readonly objectOffset?: number
  readonly id?: string
}

export interface PackReport {
  readonly objects: number
  readonly bytes: number
  readonly damage: readonly PackDamage[]
}

/**
 * Recomputes everything of a pack: checksums of what is stored, MAC of the trailer, each frame's tag or check, each
 * object's content and id.
 */
export async function verifyPack(
  store: BlobStore,
  keys: RepositoryKeys,
  pack: { readonly kind: PackKind; readonly name: string },
  frameBytes: number,
): Promise<PackReport> {
  const path = packPath(pack.kind, pack.name)
  const what = `pack ${path}`
  const damage: (PackDamage & { readonly span?: number })[] = []
  let trailer: PackTrailer
  try {
    trailer = await readTrailer(store, keys, pack.kind, pack.name)
  } catch (error) {
    return { objects: 0, bytes: 0, damage: [describe(error)] }
  }
  const { footer, objects } = trailer
  const idOf = pack.kind === 'data' ? keys.chunkId.bind(keys) : keys.pageId.bind(keys)
  const codec = new FrameCodec(keys, pack.name)
  const crcs = new DataView(trailer.crcs.buffer, trailer.crcs.byteOffset, trailer.crcs.length)
  const end = footer.directoryOffset + footer.directoryStored
  let next = 0
  // Frames of objects cross from one span into the next, so the window begins at the next object not yet looked at.
  let buffer = new Uint8Array(CRC_SPAN * 3)
  let content = new Uint8Array(frameBytes)
  let windowAt = 0
  for (let span = 0; span < footer.crcCount; span++) {
    const at = span * CRC_SPAN
    const length = Math.min(CRC_SPAN, end - at)
    const keepFrom = Math.min(next < objects.length ? objects[next]!.offset : at, at)
    if (at + length - keepFrom > buffer.length) {
      const larger = new Uint8Array(at + length - keepFrom + CRC_SPAN)
      larger.set(buffer.subarray(keepFrom - windowAt, at - windowAt))
      buffer = larger
    } else {
      buffer.copyWithin(0, keepFrom - windowAt, at - windowAt)
    }
    windowAt = keepFrom
    const bytes = buffer.subarray(at - windowAt, at - windowAt + length)
    try {
      await store.read(path, at, bytes)
    } catch (error) {
      damage.push(describe(error))
      break
    }
    if (crc32(bytes) !== crcs.getUint32(span * 4, true)) {
      const message = `Cannot trust ${what}: found a wrong checksum of its bytes ${at} to ${at + length}`
      damage.push({ code: 'CORRUPT', message, offset: at, span: at })
    }
    if (span === 0) {
      try {
        const header = bytes.subarray(0, PACK_HEADER_BYTES)
        decodePackHeader(header, what)
        if (!equalBytes(header, encodePackHeader(footer))) throw corrupt(what, 'the header of another pack')
      } catch (error) {
        damage.push(describe(error))
      }
    }
    for (; next < objects.length; next++) {
      const object = objects[next]!
      const objectEnd = object.offset + storedBytes(object.frames)
      if (objectEnd > at + length) break
      const place = {
        ...object,
        kind: pack.kind,
        pack: pack.name,
        frameBytes: frameBytesOf(object, pack.kind, frameBytes),
      }
      try {
        within(object.plainLength, MOST_PAGE_BYTES, `${what}: object length`)
        if (object.plainLength > content.length) content = new Uint8Array(object.plainLength)
        const plain = content.subarray(0, object.plainLength)
        if (Math.ceil(object.plainLength / place.frameBytes) !== object.frames.length)
          throw corrupt(what, `an object of ${object.frames.length} frames`)
        const stored = buffer.subarray(object.offset - windowAt, objectEnd - windowAt)
        decodeFrames(codec, place, 0, object.frames.length, stored, object.offset, plain)
        if (!equalBytes(idOf(plain), object.id))
          throw new VarveError(
            'CORRUPT',
            `Cannot trust ${what}: found other content than the id of the object at ${object.offset} says`,
          )
      } catch (error) {
        damage.push({
          ...describe(error),
          objectOffset: object.offset,
          id: hex(object.id),
          offset: object.offset,
        })
      }
    }
  }
  // A wrong checksum of a span is explained by a damaged object in it; without one, the pack is in doubt as a whole.
  const spans = objects
    .filter(({ offset }) => damage.some((one) => one.objectOffset === offset))
    .map(({ offset, frames }) => ({ start: offset, end: offset + storedBytes(frames) }))
  const unexplained = damage.filter(
    ({ objectOffset, span }) =>
      objectOffset !== undefined ||
      span === undefined ||
      !spans.some(({ start, end: stop }) => start < span + CRC_SPAN && stop > span),
  )
  return {
    objects: objects.length,
    bytes: footer.fileLength,
    damage: unexplained.map(({ span: _span, ...one }) => one),
  }
}

/** Map pages stand in one frame, whatever their length. */
function frameBytesOf(object: PackObject, kind: PackKind, frameBytes: number): number {
  return kind === 'data' ? frameBytes : Math.max(object.plainLength, 1)
}

export function describe(error: unknown): { code: PackDamage['code']; message: string } {
  if (error instanceof VarveError) {
    const code = error.code
    const known = code === 'CORRUPT' || code === 'NOT_FOUND' || code === 'UNSUPPORTED' ? code : 'IO'
    return { code: code === 'LIMIT' ? 'CORRUPT' : known, message: error.message }
  }
  throw error
}

export function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('hex')
}
