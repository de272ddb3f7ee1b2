/**
 * The rules of ARCHITECTURE.md as one pure function from the sources to a list of breaches, so that each rule can
 * be proved with a planted breach.
 */

export interface Room {
  readonly rank: number
  readonly stands: boolean
}

/** Sources and documents by path relative to the root: `src/…/x.ts`, `docs/errors.md`, `ARCHITECTURE.md`. */
export type Files = ReadonlyMap<string, string>

/** Rooms whose folders are entries of a registry. */
const REGISTRIES = ['formats', 'volumes', 'filesystems']
const FIRST_ROOM_WITH_PACKAGES = 'live'
/** A room that nobody imports (cli) has its `main.ts` as its door. */
const DOORS = ['index.ts', 'main.ts']
/** The package's entry: re-exports doors, and nothing else. */
const LIBRARY_DOOR = 'src/index.ts'

export function breaches(files: Files): string[] {
  const rooms = readRooms(files.get('ARCHITECTURE.md') ?? '')
  const sources = [...files].filter(([path]) => /^src\/.+\.ts$/.test(path) && !path.endsWith('.test.ts'))
  const found: string[] = []
  if (rooms.size === 0) found.push('empty scan: no room in the table of ARCHITECTURE.md')
  if (sources.length === 0) found.push('empty scan: no source file')

  for (const [room, { stands }] of rooms) {
    if (stands && !DOORS.some((door) => files.has(`src/${room}/${door}`)))
      found.push(`src/${room}: stands in the table but has no index.ts`)
  }
  for (const [path, text] of sources) {
    if (path === LIBRARY_DOOR) {
      found.push(...judgeLibraryDoor(text, rooms))
      continue
    }
    const room = path.split('/')[1]!
    if (!rooms.has(room)) {
      found.push(`${path}: not in a room of the table`)
      continue
    }
    for (const target of imports(text)) found.push(...judgeImport(path, target, rooms))
    if (room !== 'cli' && /\bconsole\s*[.[]/.test(stripComments(text)))
      found.push(`${path}: console outside cli`)
  }
  found.push(...unregistered(files))
  found.push(...undocumented(files))
  return found
}

export function readRooms(architecture: string): Map<string, Room> {
  const rooms = new Map<string, Room>()
  for (const match of architecture.matchAll(/^\|\s*(\d+)\s*\|\s*`([a-z]+)`\s*\|\s*(stands|to come)\s*\|/gm)) {
    rooms.set(match[2]!, { rank: Number(match[1]), stands: match[3] === 'stands' })
  }
  return rooms
}

function judgeImport(path: string, target: string, rooms: ReadonlyMap<string, Room>): string[] {
  const [, room] = path.split('/') as [string, string]
  const mine = rooms.get(room)!
  if (!target.startsWith('.')) {
    if (target.startsWith('node:')) return []
    const allowed = mine.rank >= (rooms.get(FIRST_ROOM_WITH_PACKAGES)?.rank ?? Number.POSITIVE_INFINITY)
    const koffi = target === 'koffi' && path.startsWith('src/device/host/')
    return allowed || koffi
      ? []
      : [`${path}: imports the package ${target} below ${FIRST_ROOM_WITH_PACKAGES}`]
  }
  const resolved = resolve(path, target)
  const parts = resolved.split('/')
  if (parts[0] !== 'src') return [`${path}: imports ${resolved}, outside src`]
  const other = parts[1]!
  if (other === room) {
    const [from, to] = [path.split('/'), parts]
    const sideways = REGISTRIES.includes(room) && from.length > 3 && to.length > 3 && from[2] !== to[2]
    return sideways ? [`${path}: imports its neighbour ${resolved}`] : []
  }
  const theirs = rooms.get(other)
  if (!theirs) return [`${path}: imports ${resolved}, which is no room of the table`]
  if (theirs.rank >= mine.rank)
    return [`${path}: imports ${resolved}, ${theirs.rank > mine.rank ? 'upward' : 'sideways'}`]
  if (parts.length !== 3 || parts[2] !== 'index.ts')
    return [`${path}: imports the inside ${resolved}, not the door`]
  return []
}

function judgeLibraryDoor(text: string, rooms: ReadonlyMap<string, Room>): string[] {
  return imports(text)
    .filter((target) => !rooms.has(target.match(/^\.\/([a-z]+)\/index\.ts$/)?.[1] ?? ''))
    .map((target) => `${LIBRARY_DOOR}: imports ${target}, which is not the door of a room`)
}

/** Every module that `text` names in an import, an export-from, a dynamic import or a worker URL. */
export function imports(text: string): string[] {
  const code = stripComments(text)
  const patterns = [
    /(?:^|[;\s}])(?:import|export)\s(?:[^'";]*?\sfrom\s*)?'([^']+)'/gm,
    /\bimport\s*\(\s*'([^']+)'/g,
    /\bnew URL\(\s*'([^']+\.[tj]s)'\s*,\s*import\.meta\.url/g,
    /\brequire\(\s*'([^']+)'/g,
  ]
  return patterns.flatMap((pattern) => [...code.matchAll(pattern)].map((match) => match[1]!))
}

function unregistered(files: Files): string[] {
  const found: string[] = []
  for (const room of REGISTRIES) {
    const folders = new Set(
      [...files.keys()]
        .map((path) => path.match(new RegExp(`^src/${room}/([^/]+)/`))?.[1])
        .filter((name) => name !== undefined),
    )
    const door = stripComments(files.get(`src/${room}/index.ts`) ?? '')
    for (const folder of folders) {
      const match = door.match(new RegExp(`import\\s*\\{([^}]*)\\}\\s*from\\s*'\\./${folder}/index\\.ts'`))
      const names = (match?.[1] ?? '')
        .split(',')
        .map(
          (name) =>
            name
              .trim()
              .split(/\s+as\s+/)
              .at(-1)!,
        )
        .filter(Boolean)
      const used = names.some((name) => new RegExp(`\\b${name}\\b`, 'g')[Symbol.match](door)!.length > 1)
      if (!used) found.push(`src/${room}/${folder}: not in the registry of src/${room}/index.ts`)
    }
  }
  return found
}

function undocumented(files: Files): string[] {
  const found: string[] = []
  const page = files.get('docs/errors.md') ?? ''
  const [errorsPart = '', reasonsPart = ''] = page.split(/^## Reasons$/m)
  const documented = (part: string): Set<string> =>
    new Set([...part.matchAll(/^\|\s*`([^`]+)`\s*\|/gm)].map((match) => match[1]!))

  const table =
    (files.get('src/base/errors.ts') ?? '').match(/export const ERRORS[^=]*=\s*\{([\s\S]*?)\n\}/)?.[1] ?? ''
  const codes = new Set([...table.matchAll(/^ {2}([A-Z][A-Z_]*):/gm)].map((match) => match[1]!))
  if (codes.size === 0) found.push('empty scan: no error code in src/base/errors.ts')
  found.push(...difference('error code', codes, documented(errorsPart)))

  const reasons = new Set<string>()
  for (const [path, text] of files) {
    if (!path.startsWith('src/') || path.endsWith('.test.ts')) continue
    for (const match of stripComments(text).matchAll(
      /(?:\bnew NotTrusted|#not|\brefuse)\(\s*'([a-z0-9]+(?:-[a-z0-9]+)+)'/g,
    ))
      reasons.add(match[1]!)
  }
  const all = [...files]
    .filter(([path]) => path.startsWith('src/'))
    .map(([, text]) => stripComments(text))
    .join('\n')
  for (const reason of reasons) {
    if (!documented(reasonsPart).has(reason)) found.push(`reason ${reason}: not in docs/errors.md`)
  }
  for (const reason of documented(reasonsPart)) {
    if (!all.includes(`'${reason}'`)) found.push(`reason ${reason}: in docs/errors.md but not in the code`)
  }
  return found
}

function difference(what: string, code: ReadonlySet<string>, docs: ReadonlySet<string>): string[] {
  return [
    ...[...code].filter((name) => !docs.has(name)).map((name) => `${what} ${name}: not in docs/errors.md`),
    ...[...docs]
      .filter((name) => !code.has(name))
      .map((name) => `${what} ${name}: in docs/errors.md but not in the code`),
  ]
}

function resolve(from: string, target: string): string {
  const parts = from.split('/').slice(0, -1)
  for (const step of target.split('/')) {
    if (step === '..') parts.pop()
    else if (step !== '.') parts.push(step)
  }
  return parts.join('/')
}

function stripComments(text: string): string {
  return text.replace(/\/\*[\s\S]*?\*\//g, '').replace(/(^|\s)\/\/.*$/gm, '$1')
}
