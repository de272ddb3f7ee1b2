/**
 * Poison: the acceptance test of an in-use map. Everything that the map calls unused is overwritten with 0xA5 in a
 * copy; then the file system must still check clean and every file must still read as in an untouched copy.
 *
 * It finds what a comparison of bitmaps cannot: blocks that nobody's bitmap lists but somebody reads.
 */
import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { lstat, open, readdir, readlink, rm } from 'node:fs/promises'
import { join } from 'node:path'
import type { RangeSet } from '../../src/extents/index.ts'
import { mounted } from './mount.ts'
import { snapshot } from './scratch.ts'

export * from './mount.ts'
export * from './scratch.ts'
export * from './workload.ts'

export const POISON = 0xa5

/** Overwrites every byte of the file that is not in `used`. Returns how many that were. */
export async function fillUnused(path: string, used: RangeSet): Promise<number> {
  const file = await open(path, 'r+')
  try {
    const { size } = await file.stat()
    const unused = used.complement(0, size)
    const fill = new Uint8Array(1 << 20).fill(POISON)
    for (const { start, end } of unused) {
      for (let at = start; at < end; at += fill.length) {
        const length = Math.min(fill.length, end - at)
        await file.write(fill, 0, length, at)
      }
    }
    return unused.size
  } finally {
    await file.close()
  }
}

/** What can be read below a folder: path -> what it is and a digest of its content. */
export type Tree = ReadonlyMap<string, string>

/** A file that cannot be read is in the tree with its error: that is a difference, not the end of the test. */
export async function readTree(folder: string): Promise<Tree> {
  const tree = new Map<string, string>()
  const visit = async (path: string): Promise<void> => {
    const at = join(folder, path)
    try {
      const stats = await lstat(at)
      const mode = stats.mode.toString(8)
      if (stats.isSymbolicLink()) tree.set(path, `${mode} link to ${await readlink(at)}`)
      else if (stats.isDirectory()) {
        tree.set(path, mode)
        for (const name of (await readdir(at)).sort()) await visit(join(path, name))
      } else if (stats.isFile()) {
        tree.set(path, `${mode} ${stats.size} bytes ${await digest(at)}`)
      } else tree.set(path, `${mode} ${stats.rdev}`)
    } catch (error) {
      tree.set(path, `error ${(error as NodeJS.ErrnoException).code}`)
    }
  }
  await visit('.')
  return tree
}

/** The tree of a file system in an image. Mounts it for writing, so that its journal is replayed. */
export async function readImage(image: string, options: Parameters<typeof mounted>[1] = {}): Promise<Tree> {
  await using mount = await mounted(image, options)
  return await readTree(mount.path)
}

/** What differs, one line each, at most ten. */
export function differences(expected: Tree, found: Tree): string[] {
  const lines: string[] = []
  for (const path of new Set([...expected.keys(), ...found.keys()])) {
    const [before, after] = [expected.get(path), found.get(path)]
    if (before !== after) lines.push(`${path}: found ${after ?? 'nothing'}, expected ${before ?? 'nothing'}`)
  }
  return lines.length > 10 ? [...lines.slice(0, 10), `and ${lines.length - 10} more`] : lines
}

export interface PoisonSubject {
  /** Never written to; in a scratch folder. */
  readonly image: string
  readonly used: RangeSet
  /** Reads everything back from a copy that may be written to, e.g. `readImage`. */
  read(copy: string): Promise<Tree>
  /** Throws unless the checker finds nothing to complain of; called after `read` on the same copy. */
  check(copy: string): Promise<void>
}

export interface PoisonResult {
  readonly files: number
  readonly poisonedBytes: number
}

/** Fails unless the poisoned copy checks clean and reads exactly like the untouched one. */
export async function assertSurvivesPoison(subject: PoisonSubject): Promise<PoisonResult> {
  const plain = `${subject.image}.plain`
  const poisoned = `${subject.image}.poisoned`
  try {
    await snapshot(subject.image, plain)
    const expected = await subject.read(plain)
    await subject.check(plain)
    await snapshot(subject.image, poisoned)
    const poisonedBytes = await fillUnused(poisoned, subject.used)
    const found = await subject.read(poisoned)
    assert.deepEqual(differences(expected, found), [], 'files differ after poison')
    await subject.check(poisoned)
    assert.ok(poisonedBytes > 0, 'something was poisoned')
    return { files: expected.size, poisonedBytes }
  } finally {
    await rm(plain, { force: true })
    await rm(poisoned, { force: true })
  }
}

async function digest(path: string): Promise<string> {
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(chunk as Buffer)
  return hash.digest('hex').slice(0, 32)
}
