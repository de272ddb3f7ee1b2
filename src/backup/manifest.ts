/** Manifests: one object for each restore point, written last, `points/<disk>/<ulid>`. */
import { randomBytes } from 'node:crypto'
import { crc32, VarveError, within } from '../base/index.ts'
import { crashPoint } from './crash-points.ts'
import {
  compress,
  decompress,
  equalBytes,
  mac,
  openSection,
  type RepositoryKeys,
  sealSection,
} from './keys.ts'
import {
  corrupt,
  decodeManifestHeader,
  decodeTable,
  encodeManifestHeader,
  encodeTable,
  MANIFEST_HEADER_BYTES,
  MOST_FACTS_BYTES,
  MOST_TABLE_BYTES,
  type PageReference,
} from './layout.ts'
import { manifestPath } from './names.ts'
import type { BlobStore } from './store/blob-store.ts'
import { ulidBytes } from './ulid.ts'

const MAC_BYTES = 32

/** What a manifest says in JSON. Unknown members are kept by readers and mean nothing to them. */
export interface ManifestFacts {
  readonly disk: string
  readonly point: string
  readonly created: string
  readonly virtualSize: number
  readonly blockBytes: number
  readonly chunkBytes: number
  readonly pageEntries: number
  readonly inUseBytes: number
  readonly readBytes: number
  readonly changedBytes: number
  /** Of packs; the manifest itself is not counted in. */
  readonly storedBytes: number
  readonly newChunks: number
  readonly reusedChunks: number
  readonly seconds: number
  /** The point whose map was used to find what is known; for people, nothing depends on it. */
  readonly parent: string | null
  readonly regions: unknown
  readonly about: unknown
}

export interface Manifest {
  readonly path: string
  readonly facts: ManifestFacts
  readonly pages: readonly (PageReference | undefined)[]
}

/** Writes the manifest; when it resolves the point is durable. Returns the bytes stored. */
export async function writeManifest(
  store: BlobStore,
  keys: RepositoryKeys,
  path: string,
  facts: ManifestFacts,
  pages: readonly (PageReference | undefined)[],
): Promise<number> {
  const salt = randomBytes(32)
  const own = keys.manifest(salt)
  const overhead = keys.sealing === 'none' ? 0 : 16
  const packedFacts = packSection(Buffer.from(JSON.stringify(facts)))
  const packedTable = packSection(encodeTable(pages))
  const header = encodeManifestHeader({
    sealing: keys.sealing,
    repository: keys.repository,
    point: ulidBytes(facts.point),
    salt,
    factsStored: packedFacts.length + overhead,
    tableStored: packedTable.length + overhead,
  })
  const factsStored = sealSection(keys.sealing, own.seal, packedFacts, { at: 0, aad: header })
  const factsMac = mac(own.mac, header, factsStored)
  const tableStored = sealSection(keys.sealing, own.seal, packedTable, { at: 1, aad: header })
  const tableMac = mac(own.mac, header, factsMac, tableStored)
  const body = Buffer.concat([header, factsStored, factsMac, tableStored, tableMac])
  const check = Buffer.alloc(4)
  check.writeUInt32LE(crc32(body))
  const writer = await store.create(path)
  try {
    await writer.write(Buffer.concat([body, check]))
    await writer.sync()
    crashPoint('manifest-synced')
    await writer.publish(() => crashPoint('manifest-renamed'))
  } finally {
    await writer.discard()
  }
  return body.length + 4
}

/** Reads and checks a manifest as a whole. @throws NOT_FOUND, CORRUPT, UNSUPPORTED */
export async function readManifest(store: BlobStore, keys: RepositoryKeys, path: string): Promise<Manifest> {
  const what = `manifest ${path}`
  const bytes = await store.readAll(path, MOST_TABLE_BYTES)
  if (bytes.length < MANIFEST_HEADER_BYTES) throw corrupt(what, `${bytes.length} bytes`)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const bodyLength = bytes.length - 4
  const { header, factsEnd } = checkHeader(bytes, keys, path)
  if (factsEnd + MAC_BYTES + header.tableStored + MAC_BYTES !== bodyLength)
    throw corrupt(what, `${bytes.length} bytes that its header does not account for`)
  if (crc32(bytes.subarray(0, bodyLength)) !== view.getUint32(bodyLength, true))
    throw corrupt(what, 'a wrong checksum')
  const facts = openFacts(bytes, keys, path)
  const headerBytes = bytes.subarray(0, MANIFEST_HEADER_BYTES)
  const own = keys.manifest(header.salt)
  const factsMac = bytes.subarray(factsEnd, factsEnd + MAC_BYTES)
  const tableStored = bytes.subarray(factsEnd + MAC_BYTES, bodyLength - MAC_BYTES)
  if (
    !equalBytes(
      mac(own.mac, headerBytes, factsMac, tableStored),
      bytes.subarray(bodyLength - MAC_BYTES, bodyLength),
    )
  )
    throw corrupt(what, 'a page table that this repository did not write (wrong MAC)')
  const packed = openSection(keys.sealing, own.seal, tableStored, { at: 1, aad: headerBytes }, what)
  const pageCount = Math.ceil(facts.virtualSize / (facts.chunkBytes * facts.pageEntries))
  const table = unpackSection(packed, MOST_TABLE_BYTES, what)
  return { path, facts, pages: decodeTable(table, pageCount, what) }
}

/** The facts of a manifest without its page table: what a list of points needs. */
export async function readFacts(
  store: BlobStore,
  keys: RepositoryKeys,
  path: string,
): Promise<ManifestFacts> {
  const what = `manifest ${path}`
  const size = await store.size(path)
  if (size < MANIFEST_HEADER_BYTES) throw corrupt(what, `${size} bytes`)
  let bytes = new Uint8Array(Math.min(size, 16_384))
  await store.read(path, 0, bytes)
  const { factsEnd } = checkHeader(bytes, keys, path)
  if (factsEnd + MAC_BYTES > size) throw corrupt(what, `${size} bytes`)
  if (factsEnd + MAC_BYTES > bytes.length) {
    bytes = new Uint8Array(factsEnd + MAC_BYTES)
    await store.read(path, 0, bytes)
  }
  return openFacts(bytes, keys, path)
}

function checkHeader(
  bytes: Uint8Array,
  keys: RepositoryKeys,
  path: string,
): { header: ReturnType<typeof decodeManifestHeader>; factsEnd: number } {
  const what = `manifest ${path}`
  const header = decodeManifestHeader(bytes.subarray(0, MANIFEST_HEADER_BYTES), what)
  if (!equalBytes(header.repository, keys.repository) || header.sealing !== keys.sealing)
    throw corrupt(what, 'a manifest of another repository')
  if (!equalBytes(header.point, ulidBytes(path.slice(-26))))
    throw corrupt(what, 'the manifest of another point')
  within(header.factsStored, MOST_FACTS_BYTES, `${what}: facts`)
  within(header.tableStored, MOST_TABLE_BYTES, `${what}: page table`)
  return { header, factsEnd: MANIFEST_HEADER_BYTES + header.factsStored }
}

function openFacts(bytes: Uint8Array, keys: RepositoryKeys, path: string): ManifestFacts {
  const what = `manifest ${path}`
  const { header, factsEnd } = checkHeader(bytes, keys, path)
  const headerBytes = bytes.subarray(0, MANIFEST_HEADER_BYTES)
  const own = keys.manifest(header.salt)
  const stored = bytes.subarray(MANIFEST_HEADER_BYTES, factsEnd)
  if (!equalBytes(mac(own.mac, headerBytes, stored), bytes.subarray(factsEnd, factsEnd + MAC_BYTES)))
    throw corrupt(what, 'facts that this repository did not write (wrong MAC)')
  const packed = openSection(keys.sealing, own.seal, stored, { at: 0, aad: headerBytes }, what)
  const text = new TextDecoder().decode(unpackSection(packed, MOST_FACTS_BYTES, what))
  return checkFacts(text, keys, path)
}

function checkFacts(text: string, keys: RepositoryKeys, path: string): ManifestFacts {
  const what = `manifest ${path}`
  let facts: ManifestFacts
  try {
    facts = JSON.parse(text) as ManifestFacts
  } catch (cause) {
    throw new VarveError('CORRUPT', `Cannot read ${what}: found facts that are no JSON`, { cause })
  }
  const size = (value: unknown): boolean => Number.isSafeInteger(value) && (value as number) >= 0
  if (
    typeof facts.disk !== 'string' ||
    !size(facts.virtualSize) ||
    !size(facts.chunkBytes) ||
    facts.chunkBytes < 1 ||
    !size(facts.pageEntries) ||
    facts.pageEntries < 1
  ) {
    throw corrupt(what, 'facts that make no sense')
  }
  // Whoever keeps the files cannot pass one disk's point off as another's.
  if (manifestPath(keys, facts.disk, facts.point) !== path)
    throw corrupt(what, `the manifest of ${facts.disk}@${facts.point}`)
  return facts
}

/** `plain length 4`, then zstd. */
function packSection(plain: Uint8Array): Uint8Array {
  const head = Buffer.alloc(4)
  head.writeUInt32LE(plain.length)
  return Buffer.concat([head, compress(plain)])
}

function unpackSection(packed: Uint8Array, most: number, what: string): Uint8Array {
  if (packed.length < 4) throw corrupt(what, `a section of ${packed.length} bytes`)
  const length = new DataView(packed.buffer, packed.byteOffset, 4).getUint32(0, true)
  return decompress(packed.subarray(4), within(length, most, `${what}: section`), what)
}
