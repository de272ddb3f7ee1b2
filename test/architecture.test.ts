/** Holds ARCHITECTURE.md against the code, and proves each rule with a planted breach. */
import assert from 'node:assert/strict'
import { readdir, readFile } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { describe, test } from 'node:test'
import { breaches, imports, readRooms } from './architecture/rules.ts'

const root = join(import.meta.dirname, '..')

async function readTree(): Promise<Map<string, string>> {
  const files = new Map<string, string>()
  const entries = await readdir(join(root, 'src'), { recursive: true, withFileTypes: true })
  const paths = entries.filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name))
  for (const path of [...paths, join(root, 'ARCHITECTURE.md'), join(root, 'docs/errors.md')]) {
    files.set(relative(root, path), await readFile(path, 'utf8'))
  }
  return files
}

const real = await readTree()

describe('the house', () => {
  test('keeps every rule of ARCHITECTURE.md', () => {
    assert.deepEqual(breaches(real), [])
  })

  test('is really scanned', () => {
    assert.ok(real.size > 30, `only ${real.size} files were scanned`)
    assert.equal(readRooms(real.get('ARCHITECTURE.md')!).size, 17)
    const known = [...real].flatMap(([path, text]) => (path.endsWith('.ts') ? imports(text) : []))
    assert.ok(known.length > 50, `only ${known.length} imports were seen`)
  })
})

describe('a planted breach is found:', () => {
  const plant = (path: string, text: string): string[] => {
    const planted = new Map(real)
    planted.set(path, text)
    const before = new Set(breaches(real))
    return breaches(planted).filter((breach) => !before.has(breach))
  }
  const cases: readonly [name: string, path: string, text: string, expected: RegExp][] = [
    ['an upward import', 'src/base/planted.ts', `import { x } from '../device/index.ts'`, /upward/],
    ['an upward type import', 'src/base/planted.ts', `import type { x } from '../cli/index.ts'`, /upward/],
    ['an upward dynamic import', 'src/base/planted.ts', `await import('../device/index.ts')`, /upward/],
    [
      'an import over several lines',
      'src/base/planted.ts',
      `import {\n  x,\n} from '../device/index.ts'`,
      /upward/,
    ],
    ['an upward re-export', 'src/extents/planted.ts', `export * from '../device/index.ts'`, /upward/],
    [
      'a sideways import',
      'src/formats/raw/planted.ts',
      `import { x } from '../../volumes/index.ts'`,
      /sideways/,
    ],
    ['a neighbour’s inside', 'src/chain/planted.ts', `import { x } from '../device/slice.ts'`, /inside/],
    [
      'a neighbouring format',
      'src/formats/raw/planted.ts',
      `import { x } from '../vhd/layout.ts'`,
      /neighbour/,
    ],
    ['a folder that is no room', 'src/attic/index.ts', `export const x: number = 1`, /not in a room/],
    [
      'an unregistered format',
      'src/formats/planted/index.ts',
      `export const x: number = 1`,
      /not in the registry/,
    ],
    [
      'an unregistered volume scheme',
      'src/volumes/planted/index.ts',
      `export const x: number = 1`,
      /not in the registry/,
    ],
    [
      'an unregistered file system',
      'src/filesystems/planted/index.ts',
      `export const x: number = 1`,
      /registry/,
    ],
    ['console outside cli', 'src/base/planted.ts', `console.log('x')`, /console/],
    ['a package in chain', 'src/chain/planted.ts', `import { x } from 'lodash'`, /package lodash/],
    ['koffi outside device/host', 'src/device/planted.ts', `import koffi from 'koffi'`, /package koffi/],
    [
      'an import from outside src',
      'src/chain/planted.ts',
      `import { x } from '../../test/kit/index.ts'`,
      /outside src/,
    ],
    [
      'an undocumented reason',
      'src/inuse/planted.ts',
      `throw new NotTrusted('planted-reason', 'x')`,
      /planted-reason/,
    ],
    ['an empty table', 'ARCHITECTURE.md', '# nothing', /empty scan/],
    [
      'an undocumented error code',
      'docs/errors.md',
      real.get('docs/errors.md')!.replace(/^\| `CORRUPT`\s*\|/m, '| x |'),
      /CORRUPT: not in docs/,
    ],
    [
      'a stale error code',
      'docs/errors.md',
      real.get('docs/errors.md')!.replace(/^\| `CORRUPT`\s*\|/m, '| `PLANTED` |'),
      /PLANTED: in docs/,
    ],
    [
      'a stale reason',
      'docs/errors.md',
      `${real.get('docs/errors.md')}\n| \`planted-stale\` | x |\n`,
      /planted-stale: in docs/,
    ],
  ]
  for (const [name, path, text, expected] of cases) {
    test(name, () => {
      const found = plant(path, text)
      assert.ok(
        found.some((breach) => expected.test(breach)),
        `found only ${JSON.stringify(found)}`,
      )
    })
  }

  test('an empty scan', () => {
    assert.ok(breaches(new Map()).some((breach) => breach.includes('empty scan')))
  })

  test('a room without a door', () => {
    const planted = new Map(real)
    planted.delete('src/base/index.ts')
    assert.ok(breaches(planted).some((breach) => breach.includes('no index.ts')))
  })
})
