/**
 * Verification: everything that was written is read and recomputed, and what is damaged is named together with the
 * points that need it.
 *
 * 1. packs: CRC of each MiB, header, trailer's MAC, each frame's tag or check, each object's content against its id;
 * 2. manifests, and every map page that they name, each page once;
 * 3. every entry of those pages against the trailer of the pack that it names.
 *
 * For one disk or one point, the packs are those that it needs; for the whole repository all that are there.
 */
import { isVarveError, mapBounded, type ProgressListener, throwIfAborted } from '../base/index.ts'
import { checkConfigObject, configObjects } from './config.ts'
import type { Finding, RepositorySettings, VerifyOptions, VerifyResult } from './contract.ts'
import { equalBytes, type RepositoryKeys } from './keys.ts'
import { KnownPacks } from './known-packs.ts'
import { type MapPage, type PackKind, type PackObject, type PageReference, packPath } from './layout.ts'
import { type Manifest, readManifest } from './manifest.ts'
import { pointOf } from './names.ts'
import { describe, hex } from './pack-reader.ts'
import { entriesOfPage, readPage } from './pages.ts'
import { findManifest, listPoints } from './points.ts'
import type { WorkerPool } from './pool.ts'
import type { BlobStore } from './store/blob-store.ts'

export interface VerifyTools {
  readonly store: BlobStore
  readonly keys: RepositoryKeys
  readonly settings: RepositorySettings
  readonly pool: WorkerPool
}

const SIZES_UNDER_WAY = 8

interface PointRef {
  readonly disk: string
  readonly point: string
}

type OpenFinding = Omit<Finding, 'points'> & {
  readonly points: Set<string>
  /** Damage to a whole pack touches whoever names the pack, damage to an object whoever names that. */
  readonly pack?: string
  readonly objectOffset?: number
}

export async function verifyRepository(tools: VerifyTools, options: VerifyOptions): Promise<VerifyResult> {
  return await new Verification(tools, options).run()
}

class Verification {
  readonly #tools: VerifyTools
  readonly #options: VerifyOptions
  readonly #progress: ProgressListener
  readonly #findings: OpenFinding[] = []
  readonly #points = new Map<string, PointRef>()
  readonly #known: KnownPacks
  /** Findings by pack. */
  readonly #damaged = new Map<string, OpenFinding[]>()
  /** Pages that were looked at: what each found wrong, so that further points can be added to it. */
  readonly #pages = new Map<string, readonly OpenFinding[]>()
  #pageCount = 0
  #packs = 0
  #chunks = 0
  #bytes = 0

  constructor(tools: VerifyTools, options: VerifyOptions) {
    this.#tools = tools
    this.#options = options
    this.#progress = options.progress ?? (() => {})
    this.#known = new KnownPacks(tools.store, tools.keys)
  }

  async run(): Promise<VerifyResult> {
    const started = performance.now()
    const manifests = await this.#readManifests()
    await this.#verifyPacks(await this.#packsToVerify(manifests))
    for (const manifest of manifests) await this.#verifyMap(manifest)
    const findings = this.#findings.map(({ points, pack: _pack, objectOffset: _at, ...finding }) => ({
      ...finding,
      points: [...points].map((key) => this.#points.get(key)!),
    }))
    return {
      ok: findings.length === 0,
      points: manifests.length,
      pages: this.#pageCount,
      packs: this.#packs,
      chunks: this.#chunks,
      bytes: this.#bytes,
      findings,
      seconds: (performance.now() - started) / 1000,
    }
  }

  async #readManifests(): Promise<Manifest[]> {
    const { store, keys } = this.#tools
    const { disk, point } = this.#options
    let paths: { path: string; ref: PointRef }[]
    if (disk !== undefined && point !== undefined) {
      const path = await findManifest(store, keys, { disk, point })
      paths = [{ path, ref: { disk, point: pointOf(path) } }]
    } else {
      paths = (await listPoints(store, keys, disk)).map(({ path, info }) => ({ path, ref: info }))
      if (disk !== undefined && paths.length === 0) await findManifest(store, keys, { disk, point: 'latest' })
    }
    if (disk === undefined) await this.#verifyConfig()
    const manifests: Manifest[] = []
    for (const { path, ref } of paths) {
      throwIfAborted(this.#options.signal)
      this.#points.set(path, { disk: ref.disk, point: ref.point })
      try {
        const manifest = await readManifest(store, keys, path)
        manifests.push(manifest)
        this.#bytes += await store.size(path)
      } catch (error) {
        // Removed by another program since it was listed: no point any more.
        if (isVarveError(error, 'NOT_FOUND') && point === undefined && !(await store.exists(path))) continue
        this.#add({ ...describe(error), object: 'manifest', name: path, points: new Set([path]) })
      }
    }
    return manifests
  }

  async #verifyConfig(): Promise<void> {
    for (const name of await configObjects(this.#tools.store)) {
      try {
        await checkConfigObject(this.#tools.store, name)
      } catch (error) {
        this.#add({ ...describe(error), object: 'config', name, points: new Set() })
      }
    }
  }

  async #packsToVerify(manifests: readonly Manifest[]): Promise<{ kind: PackKind; name: string }[]> {
    const packs = new Map<string, PackKind>()
    if (this.#options.disk === undefined) {
      for (const [kind, prefix] of [
        ['data', 'packs/'],
        ['metadata', 'meta/'],
      ] as const) {
        for (const path of await this.#tools.store.list(prefix)) {
          const name = path.slice(path.lastIndexOf('/') + 1)
          if (packPath(kind, name) === path) packs.set(name, kind)
        }
      }
    }
    for (const manifest of manifests) {
      for (const page of manifest.pages) {
        if (!page) continue
        packs.set(page.pack, 'metadata')
        for (const pack of page.dataPacks) packs.set(pack, 'data')
      }
    }
    return [...packs].map(([name, kind]) => ({ kind, name }))
  }

  async #verifyPacks(packs: readonly { kind: PackKind; name: string }[]): Promise<void> {
    const { pool, store } = this.#tools
    const sizes = await mapBounded(packs, SIZES_UNDER_WAY, ({ kind, name }) =>
      store.size(packPath(kind, name)).catch(() => 0),
    )
    const totalBytes = sizes.reduce((sum, size) => sum + size, 0)
    let doneBytes = 0
    let next = 0
    const lane = async (index: number): Promise<void> => {
      while (next < packs.length) {
        throwIfAborted(this.#options.signal)
        const size = sizes[next]!
        const pack = packs[next++]!
        const report = await pool.lane(index).call('verifyPack', pack)
        this.#packs++
        if (pack.kind === 'data') this.#chunks += report.objects
        this.#bytes += report.bytes
        for (const { objectOffset, ...damage } of report.damage) {
          const finding: OpenFinding = {
            ...damage,
            object: objectOffset === undefined ? 'pack' : pack.kind === 'data' ? 'chunk' : 'page',
            name: packPath(pack.kind, pack.name),
            points: new Set(),
            pack: pack.name,
            ...(objectOffset === undefined ? {} : { objectOffset }),
          }
          this.#add(finding)
          const others = this.#damaged.get(pack.name)
          if (others) others.push(finding)
          else this.#damaged.set(pack.name, [finding])
        }
        doneBytes += size
        this.#progress({ phase: 'verify', doneBytes, totalBytes })
      }
    }
    const lanes = Math.min(pool.size, packs.length)
    const results = await Promise.allSettled(Array.from({ length: lanes }, (_, i) => lane(i)))
    for (const result of results) if (result.status === 'rejected') throw result.reason
  }

  async #verifyMap(manifest: Manifest): Promise<void> {
    for (const [number, reference] of manifest.pages.entries()) {
      if (!reference) continue
      throwIfAborted(this.#options.signal)
      const entries = entriesOfPage(manifest.facts.virtualSize, this.#tools.settings, number)
      const key = `${hex(reference.id)} ${reference.pack} ${reference.offset} ${entries}`
      let wrong = this.#pages.get(key)
      if (!wrong) {
        wrong = await this.#verifyPage(reference, entries)
        this.#pages.set(key, wrong)
        this.#pageCount++
      }
      for (const finding of wrong) finding.points.add(manifest.path)
    }
  }

  /** Everything that is wrong with what this page names, itself included. */
  async #verifyPage(reference: PageReference, entries: number): Promise<readonly OpenFinding[]> {
    const { store, keys, settings } = this.#tools
    const name = packPath('metadata', reference.pack)
    const framesPerChunk = settings.chunkBytes / settings.frameBytes
    const wrong: OpenFinding[] = []
    let page: MapPage
    try {
      page = await readPage(store, keys, reference, { framesPerChunk, entries })
      const listed = new Set(reference.dataPacks)
      for (const pack of page.packs) {
        if (!listed.has(pack))
          wrong.push(
            this.#finding(
              'page',
              name,
              reference.id,
              `Cannot trust the map page: its manifest does not name pack ${pack}`,
            ),
          )
      }
    } catch (error) {
      // Without the page nobody knows which chunks the point needs; the manifest still says of which packs.
      const lost = reference.dataPacks.flatMap((pack) =>
        (this.#damaged.get(pack) ?? []).filter((other) => other.objectOffset === undefined),
      )
      const known = this.#touching(reference.pack, reference.offset)
      if (known.length > 0) return [...known, ...lost]
      const finding: OpenFinding = {
        ...describe(error),
        object: 'page',
        name,
        id: hex(reference.id),
        offset: reference.offset,
        points: new Set(),
      }
      this.#add(finding)
      return [finding, ...lost]
    }
    wrong.push(...this.#touching(reference.pack, reference.offset))
    for (let i = 0; i < page.count; i++) {
      const entry = page.entry(i)
      if (!entry) continue
      const damage = this.#touching(entry.pack, entry.offset)
      for (const finding of damage) if (!wrong.includes(finding)) wrong.push(finding)
      if (damage.length > 0) continue
      const object = await this.#known.find('data', entry.pack, entry.id)
      if (object && sameFrames(object, entry)) continue
      // A pack may hold one content twice (two writers, or a hash met again); the place decides.
      const message = `Cannot trust the map page: chunk ${hex(entry.id)} does not stand at ${entry.offset} of pack ${entry.pack}`
      wrong.push(this.#finding('page', name, reference.id, message))
    }
    return wrong
  }

  /** Findings about a whole pack, or about the object at this place. */
  #touching(pack: string, offset: number): readonly OpenFinding[] {
    const damage = this.#damaged.get(pack)
    if (!damage) return []
    return damage.filter((finding) => finding.objectOffset === undefined || finding.objectOffset === offset)
  }

  #finding(object: Finding['object'], name: string, id: Uint8Array, message: string): OpenFinding {
    const finding: OpenFinding = { code: 'CORRUPT', object, name, message, id: hex(id), points: new Set() }
    this.#add(finding)
    return finding
  }

  #add(finding: OpenFinding): void {
    this.#findings.push(finding)
  }
}

function sameFrames(
  object: PackObject,
  entry: { offset: number; id: Uint8Array; frames: readonly number[] },
): boolean {
  return (
    object.offset === entry.offset &&
    equalBytes(object.id, entry.id) &&
    object.frames.length === entry.frames.length &&
    object.frames.every((frame, i) => frame === entry.frames[i])
  )
}
