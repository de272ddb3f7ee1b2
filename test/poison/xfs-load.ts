/**
 * Writes, syncs, clones and deletes files in a folder until it is killed: `node xfs-load.ts FOLDER SEED`. A program
 * of its own, so that the snapshots are taken while it is at it.
 */
import {
  closeSync,
  constants,
  copyFileSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readdirSync,
  renameSync,
  rmSync,
  truncateSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { Random } from '../kit/index.ts'

const [, , folder, seed] = process.argv as [string, string, string, string]
const random = new Random(Number(seed))
const content = random.bytes(1 << 20)
let count = 0

for (let d = 0; d < 6; d++) mkdirSync(join(folder, `d${d}`), { recursive: true })
process.stdout.write('ready\n')
for (;;) {
  try {
    step()
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error
    remove(random.below(6), 0.5)
  }
}

function step(): void {
  const d = random.below(6)
  const at = join(folder, `d${d}`)
  const path = join(at, `f${count++}`)
  const choice = random.below(100)
  if (choice < 70) {
    const fd = openSync(path, 'w')
    const length = random.below(20) === 0 ? random.below(content.length) : random.below(16_000)
    const from = random.below(content.length - length)
    writeSync(fd, content, from, length)
    if (choice < 12) fsyncSync(fd)
    closeSync(fd)
  } else if (choice < 80) {
    const names = readdirSync(at)
    if (names.length > 0) rmSync(join(at, random.pick(names)))
  } else if (choice < 88) {
    const names = readdirSync(at)
    if (names.length > 0) renameSync(join(at, random.pick(names)), path)
  } else if (choice < 96) {
    const names = readdirSync(at)
    if (names.length > 0) copyFileSync(join(at, random.pick(names)), path, constants.COPYFILE_FICLONE)
  } else if (choice < 99) {
    const names = readdirSync(at)
    if (names.length > 0) truncateSync(join(at, random.pick(names)), random.below(40_000))
  } else {
    remove(d, 0.3)
  }
}

function remove(d: number, share: number): void {
  const at = join(folder, `d${d}`)
  for (const name of readdirSync(at)) if (random.next() < share) rmSync(join(at, name))
}
