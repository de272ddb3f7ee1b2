/**
 * A writer that is killed at any moment leaves a repository in which every listed point verifies and the next backup
 * works: at each named step, and 50 times at random with two writers at work. And the steps are made durable in the
 * order that docs/formats/repository.md states, as the kernel saw them.
 */
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { CRASH_POINTS } from '../../src/backup/crash-points.ts'
import { createRepository, openRepository } from '../../src/backup/index.ts'
import { MemoryDevice } from '../../src/device/index.ts'
import { RangeSet } from '../../src/extents/index.ts'
import { contentOf, firstDifference } from '../kit/backup.ts'
import { must, needs, Random, tempDir } from '../kit/index.ts'

const MIB = 1 << 20
const WRITER = join(import.meta.dirname, 'backup-writer.ts')

interface Ended {
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
}

/** Runs a writer; `kill` is called when it has started and may end it. */
async function runWriter(
  args: readonly string[],
  env: Record<string, string>,
  kill: (end: () => void) => Promise<void> = async () => {},
): Promise<Ended> {
  const child = spawn(process.execPath, [WRITER, ...args], { env: { ...process.env, ...env } })
  let stdout = ''
  let stderr = ''
  let killing: Promise<void> | undefined
  child.stdout.on('data', (chunk: Buffer) => {
    stdout += chunk.toString()
    if (stdout.includes('started')) killing ??= kill(() => child.kill('SIGKILL'))
  })
  child.stderr.on('data', (chunk: Buffer) => {
    stderr += chunk.toString()
  })
  const signal = await new Promise<NodeJS.Signals | null>((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (_code, ended) => resolve(ended))
  })
  await killing
  return { signal, stdout, stderr }
}

async function smallRepository(path: string): Promise<void> {
  const sizes = { chunkBytes: 262_144, frameBytes: 65_536, packBytes: MIB }
  await (await createRepository(path, sizes))[Symbol.asyncDispose]()
}

describe('a writer killed', () => {
  for (const name of CRASH_POINTS) {
    test(`at ${name} leaves a sound repository`, async () => {
      await using dir = await tempDir()
      const repo = dir.file('r')
      await smallRepository(repo)
      const bytes = new Uint8Array(5 * MIB)
      randomFillSync(bytes)
      await writeFile(dir.file('disk'), bytes)
      const first = await runWriter([repo, dir.file('disk'), 'vm', '0'], {})
      assert.match(first.stdout, /done/, first.stderr)
      randomFillSync(bytes.subarray(0, 3 * MIB))
      await writeFile(dir.file('disk'), bytes)
      const killed = await runWriter([repo, dir.file('disk'), 'vm', '0'], { VARVE_CRASH_AT: name })
      assert.equal(killed.signal, 'SIGKILL', `the step was never reached: ${killed.stdout}${killed.stderr}`)

      await using repository = await openRepository(repo, { workers: 1 })
      const result = await repository.verify()
      assert.deepEqual(result.findings, [])
      const points = await repository.points('vm')
      assert.equal(points.length, name === 'manifest-renamed' || name === 'manifest-durable' ? 2 : 1)
      const next = await repository.backup({
        disk: 'vm',
        device: new MemoryDevice(bytes),
        inUse: RangeSet.of(0, bytes.length),
      })
      await using point = await repository.openPoint({ disk: 'vm', point: 'latest' })
      assert.equal(point.info.point, next.point)
      assert.equal(firstDifference(await contentOf(point), bytes), undefined)
      assert.deepEqual((await repository.verify()).findings, [])
      const isStored = CRASH_POINTS.indexOf(name) >= CRASH_POINTS.indexOf('data-durable')
      assert.equal(next.newChunks === 0, isStored, `${next.newChunks} chunks were stored again`)
    })
  }

  test('50 times at random moments, two writers at a time, leaves a sound repository', async (t) => {
    const random = new Random()
    const seed = `seed ${random.seed}`
    await using dir = await tempDir()
    const repo = dir.file('r')
    await smallRepository(repo)
    const disks = ['one', 'two'] as const
    const content = new Map(disks.map((name) => [name, new Uint8Array(4 * MIB)]))
    /** What each point must hold, by id. */
    const expected = new Map<string, Uint8Array>()
    const writers = { killed: 0, finished: 0 }
    // The moment of the kill is spread over what a whole backup takes here and now: some are to get through.
    let windowMs = 200
    let round = 0
    while (writers.killed < 50) {
      round++
      assert.ok(round < 120, `${seed}: ${writers.killed} kills in ${round} rounds`)
      await Promise.all(
        disks.map(async (name) => {
          const bytes = content.get(name)!.slice()
          for (let i = 0; i < 3; i++) {
            const at = random.below(bytes.length - 400_000)
            bytes.set(random.bytes(50 + random.below(20_000)), at)
            bytes.fill(random.below(256), at + 100_000, at + 100_000 + random.below(200_000))
          }
          content.set(name, bytes)
          await writeFile(dir.file(name), bytes)
          const ended = await runWriter([repo, dir.file(name), name, '4'], {}, async (end) => {
            await sleep(random.below(Math.ceil(windowMs)))
            end()
          })
          if (ended.signal === 'SIGKILL') {
            writers.killed++
            windowMs *= 1.15
          } else {
            writers.finished++
            windowMs *= 0.7
          }
          assert.ok(ended.signal === 'SIGKILL' || ended.stdout.includes('done'), `${seed}: ${ended.stderr}`)
        }),
      )
      await using repository = await openRepository(repo, { workers: 1 })
      const points = await repository.points()
      for (const { disk, point } of points) {
        if (expected.has(point)) continue
        // A point that appeared in this round holds what the disk held in this round.
        const bytes = content.get(disk as 'one')!
        expected.set(point, bytes)
        await using device = await repository.openPoint({ disk, point })
        assert.equal(firstDifference(await contentOf(device), bytes), undefined, `${seed} round ${round}`)
      }
      assert.equal(points.length, expected.size, `${seed} round ${round}: a point is gone`)
      const partly =
        round % 4 === 0 ? {} : points.length > 0 ? { disk: points[0]!.disk, point: 'latest' } : {}
      assert.deepEqual((await repository.verify(partly)).findings, [], `${seed} round ${round}`)
    }
    t.diagnostic(`${writers.killed} killed, ${writers.finished} finished, ${expected.size} points, ${seed}`)
    assert.ok(
      writers.finished > 0 && expected.size > 0,
      `${seed}: every writer was killed before it had written anything`,
    )
    await using repository = await openRepository(repo, { workers: 1 })
    for (const name of disks) {
      const bytes = content.get(name)!
      await repository.backup({
        disk: name,
        device: new MemoryDevice(bytes),
        inUse: RangeSet.of(0, bytes.length),
      })
      expected.set((await repository.points(name)).at(-1)!.point, bytes)
    }
    for (const { disk, point } of await repository.points()) {
      await using device = await repository.openPoint({ disk, point })
      assert.equal(
        firstDifference(await contentOf(device), expected.get(point)!),
        undefined,
        `${seed} ${point}`,
      )
    }
    assert.deepEqual(
      (await repository.verify()).findings,
      [],
      `${seed}, ${writers.finished} writers finished`,
    )
  })
})

/** System calls as they ended, in order, with the paths of descriptors: `[name, text]`. */
function parseTrace(text: string): { call: string; line: string; begun: number; ended: number }[] {
  const open = new Map<string, { head: string; begun: number }>()
  const calls: { call: string; line: string; begun: number; ended: number }[] = []
  for (const [i, raw] of text.split('\n').entries()) {
    const match = raw.match(/^(\d+)\s+(.*)$/)
    if (!match) continue
    const [, pid = '', line = ''] = match
    if (line.endsWith('<unfinished ...>')) {
      open.set(pid, { head: line.slice(0, -'<unfinished ...>'.length), begun: i })
      continue
    }
    const resumed = line.match(/^<\.\.\. \w+ resumed>(.*)$/)
    const begun = resumed ? open.get(pid)!.begun : i
    const whole = resumed ? open.get(pid)!.head + resumed[1] : line
    const call = whole.match(/^(\w+)\(/)?.[1]
    if (call && whole.trimEnd().endsWith(' = 0')) calls.push({ call, line: whole, begun, ended: i })
  }
  return calls
}

test('the kernel saw: synced, renamed, folder synced; packs, then metadata, then the manifest', {
  skip: needs('strace'),
}, async () => {
  await using dir = await tempDir()
  const repo = dir.file('r')
  await smallRepository(repo)
  const bytes = new Uint8Array(6 * MIB)
  randomFillSync(bytes)
  await writeFile(dir.file('disk'), bytes)
  const trace = dir.file('trace')
  await must('strace', [
    '-f',
    '-y',
    '-s',
    '4096',
    '-o',
    trace,
    '-e',
    'trace=fsync,fdatasync,rename,renameat,renameat2',
    process.execPath,
    WRITER,
    repo,
    dir.file('disk'),
    'vm',
    '0',
  ])
  const calls = parseTrace(await readFile(trace, 'utf8'))
  const renames = calls
    .filter(({ call }) => call.startsWith('rename'))
    .map((call) => {
      const [from = '', to = ''] = [...call.line.matchAll(/"([^"]+)"/g)].map((match) => match[1]!)
      return { ...call, from, to: to.slice(repo.length + 1) }
    })
    .filter(({ to }) => /^(packs|meta|points)\//.test(to))
  const kindOf = (to: string): string => to.split('/')[0]!
  const durableAt = new Map<string, number>()
  for (const rename of renames) {
    const synced = calls.find(
      ({ call, line, ended }) =>
        call === 'fdatasync' && line.includes(`<${rename.from}>`) && ended < rename.begun,
    )
    assert.ok(synced, `${rename.to} was renamed before its bytes were synced`)
    const folder = join(repo, rename.to, '..')
    const folderSynced = calls.find(
      ({ call, line, begun }) => call === 'fsync' && line.includes(`<${folder}>`) && begun > rename.ended,
    )
    assert.ok(folderSynced, `the folder of ${rename.to} was not synced after the rename`)
    durableAt.set(rename.to, folderSynced.ended)
  }
  const of = (kind: string) => renames.filter(({ to }) => kindOf(to) === kind)
  assert.ok(of('packs').length >= 4 && of('meta').length === 1 && of('points').length === 1)
  for (const pack of of('packs'))
    for (const meta of of('meta')) assert.ok(durableAt.get(pack.to)! < meta.begun, 'metadata before data')
  for (const meta of of('meta'))
    for (const point of of('points'))
      assert.ok(durableAt.get(meta.to)! < point.begun, 'manifest before metadata')
  assert.deepEqual(await readdir(join(repo, 'tmp')), [])
})
