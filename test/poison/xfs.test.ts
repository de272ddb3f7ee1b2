/**
 * XFS: snapshots of a running file system. Everything that the map calls unused is overwritten; then the kernel must
 * recover the log, find every file as it finds it without that, and xfs_repair must have nothing to say.
 *
 * The image lies on another XFS and is cloned there while programs write to it: a clone is one moment of the file,
 * as the snapshot of a virtual machine's disk is.
 */
import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { lstatSync, mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { open, rm, truncate } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { setTimeout } from 'node:timers/promises'
import { openHostFile } from '../../src/device/index.ts'
import { RangeSet } from '../../src/extents/index.ts'
import { NotTrusted, type UsedMap } from '../../src/filesystems/index.ts'
import { XfsFileSystem, xfsType } from '../../src/filesystems/xfs/index.ts'
import { decodeSuperblock } from '../../src/filesystems/xfs/layout.ts'
import { must, needs, needsRoot, Random, run, tempDir } from '../kit/index.ts'
import { fillTree, freeByXfsDb, makeManyExtents, makeXfs } from '../kit/xfs.ts'
import { mounted } from './mount.ts'

interface Variant {
  readonly args: readonly string[]
  readonly mib?: number
  readonly mountOptions?: string
  readonly snapshots: number
  readonly pauseMs: number
  /** Some snapshot must have a log that goes around its end. */
  readonly wraps?: boolean
}

const MOST_TRIES = 40
const SMALL_LOG = ['-l', 'size=6m']
const VARIANTS: Readonly<Record<string, Variant>> = {
  'as mkfs makes it': { args: [], mib: 320, snapshots: 2, pauseMs: 500 },
  'records of 256 KiB': { args: [], mountOptions: 'logbsize=256k', mib: 320, snapshots: 2, pauseMs: 600 },
  'reverse map, 1k blocks': {
    args: ['-m', 'rmapbt=1', '-b', 'size=1k'],
    mib: 320,
    snapshots: 2,
    pauseMs: 600,
  },
  'a small log that wraps': { args: SMALL_LOG, mib: 200, snapshots: 2, pauseMs: 400, wraps: true },
  '4k sectors, a wrapping log': {
    args: ['-s', 'size=4k', '-l', 'size=6m'],
    mib: 200,
    snapshots: 1,
    pauseMs: 600,
    wraps: true,
  },
}

const skip = needs('mkfs.xfs', 'xfs_db', 'xfs_repair', 'xfs_logprint', 'mount', 'setfattr') || needsRoot()

describe('XFS under load', { skip }, () => {
  for (const [name, variant] of Object.entries(VARIANTS)) {
    test(name, async (t) => {
      const random = new Random()
      t.diagnostic(`seed ${random.seed}`)
      await using dir = await tempDir()
      await makeXfs(dir.file('host'), { mib: 3072 })
      await using host = await mounted(dir.file('host'), { type: 'xfs' })
      const snapshots = await takeSnapshots(host.path, variant, random)
      for (const snapshot of snapshots) {
        await judge(snapshot, `${name}, ${snapshot}, seed ${random.seed}`)
        await rm(snapshot)
      }
    })
  }
})

describe('XFS at odd moments', { skip }, () => {
  for (const [name, back] of Object.entries({
    'the last record torn': 1,
    'a hole before the last records': 150,
  })) {
    test(`${name}: the log ends there, as the kernel sees it`, async (t) => {
      const random = new Random()
      t.diagnostic(`seed ${random.seed}`)
      await using dir = await tempDir()
      await makeXfs(dir.file('host'), { mib: 3072 })
      await using host = await mounted(dir.file('host'), { type: 'xfs' })
      const [snapshot] = await takeSnapshots(host.path, VARIANTS['a small log that wraps']!, random)
      assert.ok(snapshot)
      const { head } = await logEnds(snapshot)
      await makeStale(snapshot, back, head)
      assert.notEqual((await logEnds(snapshot)).head, head, 'the head has moved')
      // Inodes written back after the records that are gone now may contradict those that are left.
      await judge(snapshot, `${name}, seed ${random.seed}`, { auditMayRefuse: back > 1 })
    })
  }

  test('files of many extents being deleted: blocks of their trees are cancelled in the log', async () => {
    await using dir = await tempDir()
    await makeXfs(dir.file('host'), { mib: 3072 })
    await using host = await mounted(dir.file('host'), { type: 'xfs' })
    const image = join(host.path, 'image')
    await makeXfs(image, { mib: 320, args: ['-m', 'rmapbt=1'] })
    const snapshots: string[] = []
    {
      await using mount = await mounted(image, { type: 'xfs' })
      for (const name of ['a', 'b', 'c', 'd']) {
        mkdirSync(join(mount.path, name))
        await makeManyExtents(join(mount.path, name), 2000)
      }
      await must('sync', ['-f', mount.path])
      const removal = run('rm', ['-r', ...['a', 'c'].map((name) => join(mount.path, name))])
      for (let i = 0; i < 2; i++) {
        await must('sync', ['-f', mount.path])
        snapshots.push(join(host.path, `snapshot-${i}`))
        await must('cp', ['--reflink=always', image, snapshots.at(-1)!])
      }
      assert.equal((await removal).code, 0)
    }
    for (const snapshot of snapshots) await judge(snapshot, snapshot)
  })

  test('shut down without a flush of the log', async () => {
    const random = new Random()
    await using dir = await tempDir()
    const image = dir.file('xfs')
    await makeXfs(image, { mib: 100, args: SMALL_LOG, small: true })
    {
      await using mount = await mounted(image, { type: 'xfs' })
      fillTree(mount.path, random, 400)
      await must('sync', ['-f', mount.path])
      fillTree(mount.path, random, 300)
      await must('xfs_io', ['-x', '-c', 'shutdown', mount.path])
    }
    await judge(image, `seed ${random.seed}`)
  })

  test('grown, and the log still holds the new size', async () => {
    const random = new Random()
    await using dir = await tempDir()
    const image = dir.file('xfs')
    await makeXfs(image, { mib: 100, args: SMALL_LOG, small: true })
    {
      await using mount = await mounted(image, { type: 'xfs' })
      fillTree(mount.path, random, 300)
      await truncate(image, 260 * 2 ** 20)
      await must('losetup', ['--set-capacity', mount.device])
      await must('xfs_growfs', ['-d', mount.path])
      fillTree(mount.path, random, 300)
      await must('xfs_io', ['-x', '-c', 'shutdown -f', mount.path])
    }
    await judge(image, `seed ${random.seed}`)
  })

  test('frozen, as an agent in the guest does it', async () => {
    const random = new Random()
    await using dir = await tempDir()
    const image = dir.file('xfs')
    await makeXfs(image, { mib: 100, args: SMALL_LOG, small: true })
    {
      await using mount = await mounted(image, { type: 'xfs' })
      fillTree(mount.path, random, 300)
      await must('xfs_freeze', ['-f', mount.path])
      try {
        await must('cp', ['--sparse=always', image, dir.file('frozen')])
      } finally {
        await must('xfs_freeze', ['-u', mount.path])
      }
    }
    await judge(dir.file('frozen'), `seed ${random.seed}`)
  })
})

async function takeSnapshots(host: string, variant: Variant, random: Random): Promise<string[]> {
  const image = join(host, 'image')
  await makeXfs(image, { ...variant, small: variant.args.includes('-l') })
  const taken: string[] = []
  await using mount = await mounted(image, {
    type: 'xfs',
    ...(variant.mountOptions ? { options: variant.mountOptions } : {}),
  })
  const loads = ['a', 'b'].map((part) => startLoad(join(mount.path, part), random))
  try {
    await Promise.all(loads.map((load) => once(load.stdout!, 'data')))
    let wanted = variant.wraps === true
    for (let i = 0; taken.length < variant.snapshots || wanted; i++) {
      assert.ok(i < MOST_TRIES, `no log wrapped in ${i} snapshots`)
      await setTimeout(variant.pauseMs + random.below(200))
      const to = join(host, `snapshot-${i}`)
      await must('cp', ['--reflink=always', image, to])
      const { tail, head } = await logEnds(to)
      // Enough of the others: from here on only a log that goes around its end is of use.
      if (tail < head && taken.length >= variant.snapshots) {
        await rm(to)
        continue
      }
      if (tail > head) wanted = false
      taken.push(to)
    }
  } finally {
    for (const load of loads) load.kill('SIGKILL')
    for (const load of loads) if (load.exitCode === null && load.signalCode === null) await once(load, 'exit')
  }
  return taken
}

function startLoad(folder: string, random: Random): ChildProcess {
  const script = join(import.meta.dirname, 'xfs-load.ts')
  const seed = String(random.below(2 ** 31))
  return spawn(process.execPath, [script, folder, seed], { stdio: ['ignore', 'pipe', 'inherit'] })
}

/** Gives the block `back` blocks before the head the cycle before, as if its write had not come. */
async function makeStale(image: string, back: number, head: number): Promise<void> {
  const file = await open(image, 'r+')
  try {
    const first = new Uint8Array(512)
    await file.read(first, 0, 512, 0)
    const sb = decodeSuperblock(first)
    const agno = Math.floor(sb.logstart / 2 ** sb.agblklog)
    const start = (agno * sb.agblocks + (sb.logstart % 2 ** sb.agblklog)) * sb.blockBytes
    const blocks = (sb.logblocks * sb.blockBytes) / 512
    const at = start + ((head - back + blocks) % blocks) * 512
    const word = Buffer.alloc(8)
    await file.read(word, 0, 8, at)
    const cycleAt = word.readUInt32BE(0) === 0xfeedbabe ? 4 : 0
    word.writeUInt32BE(word.readUInt32BE(cycleAt) - 1, cycleAt)
    await file.write(word, cycleAt, 4, at + cycleAt)
  } finally {
    await file.close()
  }
}

async function logEnds(image: string): Promise<{ tail: number; head: number }> {
  const said = await must('xfs_logprint', ['-t', image])
  const [, tail, head] = /log tail: (\d+) head: (\d+) state: <DIRTY>/.exec(said) ?? []
  assert.ok(tail !== undefined, `the log is dirty: ${said.slice(0, 300)}`)
  return { tail: Number(tail), head: Number(head) }
}

async function judge(
  snapshot: string,
  what: string,
  { auditMayRefuse = false }: { auditMayRefuse?: boolean } = {},
): Promise<void> {
  const { map, owned } = await usedMap(snapshot, auditMayRefuse)
  assert.equal(map.trust, 'replayed', what)

  const poisoned = `${snapshot}-poisoned`
  const recovered = `${snapshot}-recovered`
  await must('cp', ['--reflink=auto', snapshot, poisoned])
  await must('cp', ['--reflink=auto', snapshot, recovered])
  const bytes = await poison(poisoned, map)
  assert.ok(bytes > 0, what)
  const expected = await recoverAndHash(recovered)
  const found = await recoverAndHash(poisoned)
  assert.ok(expected.size > 2, `${expected.size} files in ${what}`)
  const differ = [...expected].filter(([path, hash]) => found.get(path) !== hash).map(([path]) => path)
  assert.deepEqual(differ, [], `files that differ after the poison (${what})`)
  assert.equal(found.size, expected.size, what)
  for (const image of [recovered, poisoned]) {
    const repair = await run('xfs_repair', ['-n', '-f', image])
    assert.equal(repair.code, 0, `xfs_repair of ${image} (${what}): ${repair.stderr}`)
  }

  assert.ok(owned === undefined || owned.size > 100_000, what)
  assert.equal(
    (owned ?? RangeSet.empty).subtract(map.ranges).toString(),
    '',
    `owned by an inode and not in the map (${what})`,
  )

  // What the kernel has after the recovery, but for blocks that it took anew while at it.
  const { btree, freeLists } = await freeByXfsDb(recovered)
  const kernelUses = btree.union(freeLists).complement(0, map.ranges.end!)
  const missing = kernelUses.subtract(map.ranges)
  assert.equal(missing.toString(), '', `in use after recovery and not in the map (${what})`)
  await rm(poisoned)
  await rm(recovered)
}

async function usedMap(
  image: string,
  auditMayRefuse: boolean,
): Promise<{ map: UsedMap; owned: RangeSet | undefined }> {
  await using device = await openHostFile(image)
  const fileSystem = await xfsType.open(device, {})
  assert.ok(fileSystem instanceof XfsFileSystem)
  const map = await fileSystem.used({})
  try {
    return { map, owned: await fileSystem.audit({}) }
  } catch (error) {
    if (auditMayRefuse && error instanceof NotTrusted && error.reason === 'xfs-inode')
      return { map, owned: undefined }
    throw error
  }
}

async function poison(image: string, map: UsedMap): Promise<number> {
  const file = await open(image, 'r+')
  try {
    const { size } = await file.stat()
    const fill = Buffer.alloc(1 << 20, 0xa5)
    let total = 0
    for (const { start, end } of map.ranges.complement(0, size)) {
      for (let at = start; at < end; at += fill.length) {
        const length = Math.min(fill.length, end - at)
        await file.write(fill, 0, length, at)
        total += length
      }
    }
    return total
  } finally {
    await file.close()
  }
}

/** Mounts, which recovers the log, and hashes every file; then unmounts. */
async function recoverAndHash(image: string): Promise<Map<string, string>> {
  await using mount = await mounted(image, { type: 'xfs', options: 'nouuid' })
  const hashes = new Map<string, string>()
  for (const entry of readdirSync(mount.path, { recursive: true, encoding: 'utf8' })) {
    const path = join(mount.path, entry)
    const stat = lstatSync(path)
    const content = stat.isFile() ? createHash('sha256').update(readFileSync(path)).digest('hex') : 'folder'
    hashes.set(entry, `${stat.size} ${content}`)
  }
  return hashes
}
