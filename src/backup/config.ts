/**
 * The config and the keys of a repository: small JSON objects, each stored twice (`config`, `config.copy`), because
 * everything else is lost without them. A copy that is damaged is passed over with a warning.
 *
 * Rules: an unknown version or required feature is refused; settings never change once the repository exists; a
 * password is a key object `keys/<id>` that wraps the master key, so passwords come and go without rewriting anything.
 */
import { createHash, randomBytes } from 'node:crypto'
import { isPowerOfTwo, isVarveError, type Log, silentLog, VarveError } from '../base/index.ts'
import type { RepositorySettings } from './contract.ts'
import {
  type KeyMaterial,
  MASTER_BYTES,
  RepositoryKeys,
  unwrapMaster,
  type WrappedKey,
  wrapMaster,
} from './keys.ts'
import { FORMAT_VERSION, PAGE_ENTRIES, type Sealing } from './layout.ts'
import type { BlobStore } from './store/blob-store.ts'

export const CONFIG_NAME = 'config'
const COPY = '.copy'
const MOST_CONFIG_BYTES = 1 << 20
const KNOWN_FEATURES: ReadonlySet<string> = new Set()

interface ConfigBody {
  readonly format: 'varve repository'
  readonly version: number
  /** 128 bits in hex. */
  readonly id: string
  readonly created: string
  readonly chunkBytes: number
  readonly frameBytes: number
  readonly pageEntries: number
  readonly packBytes: number
  readonly sealing: Sealing
  readonly features: {
    /** A reader that does not know one of these refuses the repository. */
    readonly required: readonly string[]
    /** A writer that does not know one of these only reads. */
    readonly requiredToWrite: readonly string[]
  }
  /** The master key in hex, only where there is no password. */
  readonly master?: string
}

export interface LoadedConfig {
  readonly id: string
  readonly settings: RepositorySettings
  readonly keys: RepositoryKeys
  /** Features that forbid this version to write; empty: it may. */
  readonly unknownToWriters: readonly string[]
}

export const DEFAULTS: {
  readonly chunkBytes: number
  readonly frameBytes: number
  readonly packBytes: number
} = {
  chunkBytes: 1_048_576,
  frameBytes: 262_144,
  packBytes: 67_108_864,
}

/** Throws USAGE unless the sizes are ones that a repository may have. */
export function checkSizes(sizes: {
  readonly chunkBytes: number
  readonly frameBytes: number
  readonly packBytes: number
}): void {
  const { chunkBytes, frameBytes, packBytes } = sizes
  const fits = (value: number, least: number, most: number): boolean =>
    isPowerOfTwo(value) && value >= least && value <= most
  if (!fits(chunkBytes, 262_144, 4_194_304)) {
    throw new VarveError(
      'USAGE',
      `Cannot use chunks of ${chunkBytes} bytes: expected a power of two from 256 KiB to 4 MiB`,
    )
  }
  if (!fits(frameBytes, 65_536, Math.min(1_048_576, chunkBytes))) {
    throw new VarveError(
      'USAGE',
      `Cannot use frames of ${frameBytes} bytes: expected a power of two from 64 KiB to 1 MiB, at most a chunk`,
    )
  }
  if (!(Number.isSafeInteger(packBytes) && packBytes >= 1_048_576 && packBytes <= 1_073_741_824)) {
    throw new VarveError('USAGE', `Cannot use packs of ${packBytes} bytes: expected 1 MiB to 1 GiB`)
  }
}

/** Writes the config of a new repository, the key first: the config is what makes the folder a repository. Returns its id. */
export async function createConfig(
  store: BlobStore,
  options: { chunkBytes: number; frameBytes: number; packBytes: number; password: string | undefined },
): Promise<string> {
  checkSizes(options)
  const master = randomBytes(MASTER_BYTES)
  const repository = randomBytes(16)
  const encrypted = options.password !== undefined
  const sealing: Sealing = encrypted ? 'aes-256-gcm' : 'none'
  const body: ConfigBody = {
    format: 'varve repository',
    version: FORMAT_VERSION,
    id: repository.toString('hex'),
    created: new Date().toISOString(),
    chunkBytes: options.chunkBytes,
    frameBytes: options.frameBytes,
    pageEntries: PAGE_ENTRIES,
    packBytes: options.packBytes,
    sealing,
    features: { required: [], requiredToWrite: [] },
    ...(encrypted ? {} : { master: master.toString('hex') }),
  }
  const keys = new RepositoryKeys({ master, repository, sealing })
  if (options.password !== undefined) {
    const wrapped = await wrapMaster(master, options.password, repository)
    await putTwice(store, `keys/${randomBytes(16).toString('hex')}`, { ...wrapped, created: body.created })
  }
  await putTwice(store, CONFIG_NAME, body, keys.configMac(JSON.stringify(body)))
  return body.id
}

/**
 * Reads the config and opens the keys.
 * @throws NOT_FOUND, CORRUPT, UNSUPPORTED, PASSWORD_NEEDED, WRONG_PASSWORD
 */
export async function loadConfig(
  store: BlobStore,
  password: string | undefined,
  log: Log = silentLog,
): Promise<LoadedConfig> {
  const { body, mac } = await getTwice<ConfigBody>(store, CONFIG_NAME, log)
  refuseUnknown(body)
  const repository = Buffer.from(body.id, 'hex')
  const material: KeyMaterial = {
    master:
      body.sealing === 'none'
        ? Buffer.from(body.master ?? '', 'hex')
        : await openMaster(store, repository, password, log),
    repository,
    sealing: body.sealing,
  }
  if (material.master.length !== MASTER_BYTES || repository.length !== 16)
    throw new VarveError('CORRUPT', 'Cannot open the repository: found a config without id or key')
  const keys = new RepositoryKeys(material)
  if (keys.configMac(JSON.stringify(body)) !== mac)
    throw new VarveError('CORRUPT', 'Cannot open the repository: found a config that was changed (wrong MAC)')
  return {
    id: body.id,
    settings: {
      version: body.version,
      chunkBytes: body.chunkBytes,
      frameBytes: body.frameBytes,
      pageEntries: body.pageEntries,
      packBytes: body.packBytes,
      encrypted: body.sealing !== 'none',
      created: body.created,
    },
    keys,
    unknownToWriters: body.features.requiredToWrite.filter((feature) => !KNOWN_FEATURES.has(feature)),
  }
}

/** Names of the small objects that `verify` looks at: every copy of the config and of the keys. */
export async function configObjects(store: BlobStore): Promise<string[]> {
  return [CONFIG_NAME, CONFIG_NAME + COPY, ...(await store.list('keys/'))]
}

/** Throws CORRUPT when this copy is damaged. */
export async function checkConfigObject(store: BlobStore, name: string): Promise<void> {
  parse(await store.readAll(name, MOST_CONFIG_BYTES), name)
}

async function openMaster(
  store: BlobStore,
  repository: Uint8Array,
  password: string | undefined,
  log: Log,
): Promise<Uint8Array> {
  if (password === undefined) {
    throw new VarveError(
      'PASSWORD_NEEDED',
      'Cannot open the repository: it is encrypted and no password was given',
    )
  }
  const names = (await store.list('keys/')).map((name) =>
    name.endsWith(COPY) ? name.slice(0, -COPY.length) : name,
  )
  let damage: unknown
  for (const name of new Set(names)) {
    try {
      const { body } = await getTwice<WrappedKey>(store, name, log)
      if (body.kdf !== 'scrypt') continue
      const master = await unwrapMaster(body, password, repository)
      if (master) return master
    } catch (error) {
      if (!isVarveError(error, 'CORRUPT', 'LIMIT')) throw error
      damage = error
    }
  }
  if (damage) throw damage
  if (names.length === 0)
    throw new VarveError('CORRUPT', 'Cannot open the repository: found none of its keys')
  throw new VarveError(
    'WRONG_PASSWORD',
    'Cannot open the repository: the password is not one of its passwords',
  )
}

function refuseUnknown(body: ConfigBody): void {
  const refuse = (found: string): never => {
    throw new VarveError(
      'UNSUPPORTED',
      `Cannot open the repository: found ${found}, which this version does not know`,
      {
        hint: 'A newer varve wrote it; use that version.',
      },
    )
  }
  if (body.version !== FORMAT_VERSION) refuse(`version ${body.version}`)
  for (const feature of body.features.required)
    if (!KNOWN_FEATURES.has(feature)) refuse(`the feature ${feature}`)
  if (body.sealing !== 'none' && body.sealing !== 'aes-256-gcm') refuse(`the sealing ${String(body.sealing)}`)
  if (body.pageEntries !== PAGE_ENTRIES) refuse(`pages of ${body.pageEntries} entries`)
  try {
    checkSizes(body)
  } catch (error) {
    refuse(error instanceof Error ? error.message : 'sizes')
  }
}

interface Wrapped<T> {
  readonly body: T
  /** Keyed: nobody without the master key can have written the body. Only the config has one. */
  readonly mac?: string
  /** SHA-256 of the body's JSON and the MAC, in hex: finds accidents before any key is there. */
  readonly sha256: string
}

async function putTwice(store: BlobStore, name: string, body: object, mac?: string): Promise<void> {
  const wrapped: Wrapped<object> = {
    body,
    ...(mac === undefined ? {} : { mac }),
    sha256: checksum(body, mac),
  }
  const bytes = Buffer.from(`${JSON.stringify(wrapped, undefined, 1)}\n`)
  await store.put(name + COPY, bytes)
  await store.put(name, bytes)
}

// oxlint-disable-next-line typescript/no-unnecessary-type-parameters -- says what the object is
async function getTwice<T extends object>(
  store: BlobStore,
  name: string,
  log: Log,
): Promise<{ body: T; mac: string | undefined }> {
  let first: unknown
  for (const copy of [name, name + COPY]) {
    try {
      const wrapped = parse<T>(await store.readAll(copy, MOST_CONFIG_BYTES), copy)
      if (first)
        log('warn', `The repository's ${name} is damaged or missing; its copy was used.`, { object: name })
      return { body: wrapped.body, mac: wrapped.mac }
    } catch (error) {
      if (!isVarveError(error, 'CORRUPT', 'NOT_FOUND', 'LIMIT')) throw error
      first ??= error
    }
  }
  throw first
}

function parse<T extends object>(bytes: Uint8Array, name: string): Wrapped<T> {
  let wrapped: Partial<Wrapped<T>> | undefined
  try {
    // JSON may be spaced as anyone likes; any other change shows in the checksum.
    wrapped = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes)) as Partial<Wrapped<T>>
  } catch {
    wrapped = undefined
  }
  if (!wrapped?.body || wrapped.sha256 !== checksum(wrapped.body, wrapped.mac)) {
    throw new VarveError('CORRUPT', `Cannot read ${name} of the repository: found a wrong checksum`, {
      fields: { object: name },
    })
  }
  return wrapped as Wrapped<T>
}

function checksum(body: object, mac: string | undefined): string {
  return createHash('sha256')
    .update(JSON.stringify(body) + (mac ?? ''))
    .digest('hex')
}
