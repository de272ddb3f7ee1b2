import assert from 'node:assert/strict'
import { randomFillSync } from 'node:crypto'
import { cp, mkdir, open, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import {
  contentOf,
  firstDifference,
  kept,
  randomDisk,
  sourceOf,
  type TestDisk,
} from '../../test/kit/backup.ts'
import { must, needsRoot, Random, tempDir } from '../../test/kit/index.ts'
import { isVarveError } from '../base/index.ts'
import { CountingDevice, FaultDevice, MemoryDevice, openHostFile } from '../device/index.ts'
import { checkExtents, RangeSet } from '../extents/index.ts'
import { createRepository, openRepository, type Repository } from './index.ts'

const MIB = 1 << 20

async function assertRestores(
  repository: Repository,
  disk: string,
  point: string,
  expected: Uint8Array,
): Promise<void> {
  await using device = await repository.openPoint({ disk, point })
  assert.equal(device.size, expected.length)
  assert.equal(firstDifference(await contentOf(device), expected), undefined, `${disk}@${point}`)
}

function change(random: Random, disk: TestDisk): TestDisk {
  const bytes = disk.bytes.slice()
  for (let i = 0; i < 4; i++) {
    const at = random.below(bytes.length)
    bytes.set(random.bytes(Math.min(5000, bytes.length - at)), at)
  }
  const start = 512 * random.below(bytes.length / 512 / 2)
  return { bytes, inUse: disk.inUse.union(RangeSet.of(start, start + 40_960)).subtract(RangeSet.of(0, 8192)) }
}

describe('round trips', () => {
  for (const password of [undefined, 'correct horse']) {
    for (const [chunkBytes, frameBytes] of [
      [262_144, 65_536],
      [1_048_576, 262_144],
      [4_194_304, 1_048_576],
    ] as const) {
      const how = `${password ? 'encrypted' : 'plain'}, chunks of ${chunkBytes / 1024} KiB`
      test(`random disks come back, unused bytes as zeros (${how})`, async () => {
        const random = new Random()
        await using dir = await tempDir()
        await using repository = await createRepository(dir.file('r'), { password, chunkBytes, frameBytes })
        let disk = randomDisk(random, 9 * MIB + 512 * random.below(2000) + random.pick([0, 0, 77]))
        const contents: Uint8Array[] = []
        for (let round = 0; round < 3; round++) {
          await repository.backup(sourceOf('vm', disk))
          contents.push(kept(disk))
          disk = change(random, disk)
        }
        const points = await repository.points('vm')
        assert.equal(points.length, 3)
        for (const [i, { point }] of points.entries())
          await assertRestores(repository, 'vm', point, contents[i]!)
        const result = await repository.verify()
        assert.deepEqual(result.findings, [], `seed ${random.seed}`)
        assert.ok(result.ok && result.points === 3)
        await using again = await openRepository(dir.file('r'), { password })
        await assertRestores(again, 'vm', 'latest', contents[2]!)
      })
    }
  }

  test('a host file with holes is read in the worker threads, at most 1.05 times what is in use', async () => {
    const random = new Random()
    await using dir = await tempDir()
    const size = 24 * MIB
    const file = await open(dir.file('disk'), 'w')
    await file.truncate(size)
    const disk = { bytes: new Uint8Array(size), inUse: RangeSet.empty }
    const used: { start: number; end: number }[] = []
    for (let at = 0; at < size; at += 8192 * (1 + random.below(30))) {
      const length = Math.min(size - at, 4096 * (1 + random.below(20)))
      if (random.below(4) > 0) {
        randomFillSync(disk.bytes.subarray(at, at + length))
        await file.write(disk.bytes, at, length, at)
      }
      if (random.below(3) > 0) used.push({ start: at, end: at + length })
    }
    await file.close()
    disk.inUse = RangeSet.from(used)
    await using device = await openHostFile(dir.file('disk'))
    assert.ok(device.features.places)
    const counting = new CountingDevice(device)
    await using repository = await createRepository(dir.file('r'))
    const result = await repository.backup({ disk: 'vm', device: counting, inUse: disk.inUse })
    assert.equal(counting.counts.bytesRead, 0, 'the main thread read')
    assert.equal(result.inUseBytes, disk.inUse.size)
    assert.ok(result.readBytes <= 1.05 * disk.inUse.size, `read ${result.readBytes} of ${disk.inUse.size}`)
    await assertRestores(repository, 'vm', 'latest', kept(disk))
  })

  test('an empty disk and one without anything in use have points', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    await repository.backup({ disk: 'none', device: new MemoryDevice(0), inUse: RangeSet.empty })
    await repository.backup({ disk: 'free', device: new MemoryDevice(5 * MIB), inUse: RangeSet.empty })
    await assertRestores(repository, 'none', 'latest', new Uint8Array(0))
    await assertRestores(repository, 'free', 'latest', new Uint8Array(5 * MIB))
    assert.ok((await repository.verify()).ok)
    assert.deepEqual(await readdir(dir.file('r/packs')).catch(() => []), [])
  })

  test('reads of any range, extents and the in-use map agree with the disk', async () => {
    const random = new Random()
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'), { password: 'p' })
    const disk = randomDisk(random, 7 * MIB + 4096)
    await repository.backup(sourceOf('vm', disk))
    const expected = kept(disk)
    await using point = await repository.openPoint({ disk: 'vm', point: 'latest' })
    await Promise.all(
      Array.from({ length: 200 }, async () => {
        const at = random.below(expected.length)
        const into = new Uint8Array(
          random.below(Math.min(expected.length - at, random.pick([10, 5000, 3 * MIB]))),
        )
        await point.read(at, into)
        assert.equal(
          firstDifference(into, expected.subarray(at, at + into.length)),
          undefined,
          `seed ${random.seed}`,
        )
      }),
    )
    for (let at = 0; at < point.size; ) {
      const list = await point.extents(at, point.size - at)
      checkExtents(list, at, point.size - at)
      for (const { offset, length, kind } of list) {
        if (kind !== 'data') assert.ok(expected.subarray(offset, offset + length).every((byte) => byte === 0))
        at = offset + length
      }
    }
    assert.ok((await point.inUse()).equals(disk.inUse), `seed ${random.seed}`)
    await assert.rejects(point.read(point.size, new Uint8Array(1)), RangeError)
  })
})

describe('what is stored', () => {
  test('a second backup of a changed disk adds the changed chunks only', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    const bytes = new Uint8Array(20 * MIB)
    randomFillSync(bytes)
    const disk = { bytes, inUse: RangeSet.of(0, bytes.length) }
    const first = await repository.backup(sourceOf('vm', disk))
    assert.equal(first.newChunks, 20)
    bytes[3 * MIB + 5]! ^= 1
    bytes.fill(0, 7 * MIB, 8 * MIB)
    const second = await repository.backup(sourceOf('vm', disk))
    assert.equal(second.newChunks, 1)
    assert.equal(second.reusedChunks, 18)
    assert.equal(second.changedBytes, 2 * MIB)
    assert.ok(second.storedBytes < MIB + 20_000, `${second.storedBytes}`)
    const third = await repository.backup(sourceOf('vm', disk))
    assert.equal(third.changedBytes, 0)
    assert.ok(third.storedBytes < 4096, `${third.storedBytes}`)
    await assertRestores(repository, 'vm', 'latest', bytes)
  })

  test('equal content is stored once: within a disk, between disks, in one backup', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'), { workers: 2 })
    const bytes = new Uint8Array(64 * MIB)
    randomFillSync(bytes.subarray(0, 2 * MIB))
    for (let at = 2 * MIB; at < bytes.length; at += 2 * MIB) bytes.copyWithin(at, 0, 2 * MIB)
    const all = RangeSet.of(0, bytes.length)
    const first = await repository.backup(sourceOf('one', { bytes, inUse: all }))
    assert.equal(first.newChunks, 2)
    assert.equal(first.reusedChunks, 62)
    const second = await repository.backup(sourceOf('two', { bytes, inUse: all }))
    assert.equal(second.newChunks, 0)
    assert.ok(second.storedBytes < 4096, 'the map page is shared too')
    await assertRestores(repository, 'two', 'latest', bytes)
  })

  test('ids do not depend on garbage in unused bytes, and no garbage is stored', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    const random = new Random()
    const disk = randomDisk(random, 6 * MIB)
    await repository.backup(sourceOf('vm', disk))
    const secret = Buffer.from('SECRET-THAT-WAS-DELETED-'.repeat(20))
    const garbage = disk.bytes.slice()
    for (const { start, end } of disk.inUse.complement(0, garbage.length)) {
      for (let at = start; at < end; at += secret.length) garbage.set(secret.subarray(0, end - at), at)
    }
    const result = await repository.backup(sourceOf('vm', { ...disk, bytes: garbage }))
    assert.equal(result.newChunks, 0, `seed ${random.seed}`)
    assert.equal(result.changedBytes, 0)
  })

  test('an encrypted repository shows neither names nor content', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'), { password: 'p' })
    const marker = 'MARKER-IN-THE-CLEAR-'
    const bytes = new Uint8Array(Buffer.from(marker.repeat(100_000)))
    randomFillSync(bytes.subarray(MIB))
    bytes.set(Buffer.from(marker), bytes.length - 4096)
    await repository.backup({
      ...sourceOf('payroll-server', { bytes, inUse: RangeSet.of(0, bytes.length) }),
      regions: [{ label: marker }],
    })
    const files = (await readdir(dir.path, { recursive: true, withFileTypes: true })).filter((entry) =>
      entry.isFile(),
    )
    assert.ok(files.length >= 5)
    for (const file of files) {
      const path = join(file.parentPath, file.name)
      assert.ok(!path.includes('payroll'))
      const content = await readFile(path)
      assert.equal(content.indexOf(marker), -1, path)
      assert.equal(content.indexOf('payroll'), -1, path)
    }
  })

  test('facts of the backup stand in the point', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    const disk = randomDisk(new Random(), 3 * MIB)
    const regions = [{ kind: 'ext4', offset: 0, trust: 'exact' }]
    const result = await repository.backup({ ...sourceOf('vm', disk), regions, about: { path: '/vm.raw' } })
    const [info] = await repository.points('vm')
    assert.deepEqual(info!.regions, regions)
    assert.deepEqual(info!.about, { path: '/vm.raw' })
    assert.equal(info!.point, result.point)
    assert.equal(info!.virtualSize, disk.bytes.length)
    assert.equal(info!.inUseBytes, disk.inUse.size)
    assert.equal(info!.newChunks, result.newChunks)
  })
})

describe('changed sets', () => {
  test('what did not change is taken from the parent without being read', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    const bytes = new Uint8Array(16 * MIB)
    randomFillSync(bytes)
    const inUse = RangeSet.of(0, 12 * MIB)
    const { point: parent } = await repository.backup(sourceOf('vm', { bytes, inUse }))
    bytes.fill(9, 5 * MIB + 100, 5 * MIB + 200)
    const now = RangeSet.of(0, 13 * MIB).subtract(RangeSet.of(MIB, 2 * MIB))
    const device = new CountingDevice(new MemoryDevice(bytes))
    const changed = { ranges: RangeSet.of(5 * MIB, 5 * MIB + 65_536), parent }
    const result = await repository.backup({ disk: 'vm', device, inUse: now, changed })
    // One chunk changed; one is in use now and was not kept then.
    assert.equal(device.counts.bytesRead, 2 * MIB)
    assert.equal(result.readBytes, 2 * MIB)
    assert.equal(result.newChunks, 2)
    await assertRestores(repository, 'vm', 'latest', kept({ bytes, inUse: now }))
    assert.ok((await repository.verify()).ok)
  })

  test('a parent that is not there means that all is read', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    const disk = randomDisk(new Random(), 4 * MIB)
    const warnings: string[] = []
    await repository.backup(
      { ...sourceOf('vm', disk), changed: { ranges: RangeSet.empty, parent: '01M7Y2CQ4T0A8DQPX37MQBQK1N' } },
      { log: (level, message) => void (level === 'warn' && warnings.push(message)) },
    )
    assert.equal(warnings.length, 1)
    await assertRestores(repository, 'vm', 'latest', kept(disk))
  })
})

describe('names and settings', () => {
  test('points are found by id, by a unique prefix and as latest', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    const source = (name: string) =>
      sourceOf(name, { bytes: new Uint8Array(4096).fill(1), inUse: RangeSet.of(0, 4096) })
    for (const name of ['a/b', 'ä@ö', '..', 'A%2Fb', '.hidden']) await repository.backup(source(name))
    const second = await repository.backup(source('a/b'))
    assert.deepEqual([...new Set((await repository.points()).map(({ disk }) => disk))].sort(), [
      '..',
      '.hidden',
      'A%2Fb',
      'a/b',
      'ä@ö',
    ])
    const points = await repository.points('a/b')
    assert.equal(points.length, 2)
    assert.equal(points[1]!.point, second.point)
    const open = async (point: string): Promise<string> =>
      (await repository.openPoint({ disk: 'a/b', point })).info.point
    assert.equal(await open('latest'), second.point)
    assert.equal(await open(points[0]!.point.toLowerCase()), points[0]!.point)
    await assert.rejects(open('0'), { code: 'USAGE' })
    await assert.rejects(open('ZZZ'), { code: 'NOT_FOUND' })
    await assert.rejects(repository.openPoint({ disk: 'a', point: 'latest' }), { code: 'NOT_FOUND' })
    assert.deepEqual(await repository.points('a'), [])
    for (const name of ['', 'a\nb', 'x'.repeat(300)])
      await assert.rejects(repository.backup(source(name)), { code: 'USAGE' })
  })

  test('sizes that a repository cannot have are refused before anything is made', async () => {
    await using dir = await tempDir()
    for (const sizes of [
      { chunkBytes: 1000 },
      { chunkBytes: 8 * MIB },
      { frameBytes: 32_768 },
      { frameBytes: 2 * MIB },
    ])
      await assert.rejects(createRepository(dir.file('r'), sizes), { code: 'USAGE' })
  })

  test('a folder that holds something is not taken, and none is made up', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('letter.txt'), 'dear')
    await assert.rejects(createRepository(dir.path), { code: 'EXISTS' })
    await assert.rejects(openRepository(dir.path), { code: 'NOT_FOUND' })
    await assert.rejects(openRepository(dir.file('nowhere')), { code: 'NOT_FOUND' })
    await createRepository(dir.file('r')).then((repository) => repository[Symbol.asyncDispose]())
    await assert.rejects(createRepository(dir.file('r')), { code: 'EXISTS' })
  })

  test('a wrong password and a missing one have codes of their own', async () => {
    await using dir = await tempDir()
    await createRepository(dir.file('r'), { password: 'Grüße' }).then((r) => r[Symbol.asyncDispose]())
    await assert.rejects(openRepository(dir.file('r')), { code: 'PASSWORD_NEEDED' })
    await assert.rejects(openRepository(dir.file('r'), { password: 'grüße' }), { code: 'WRONG_PASSWORD' })
    await assert.rejects(createRepository(dir.file('s'), { password: '' }), { code: 'USAGE' })
    // The same letters, composed otherwise: keyboards differ.
    await using repository = await openRepository(dir.file('r'), { password: 'Gru\u0308ße' })
    assert.ok(repository.settings.encrypted)
  })

  test('an unknown version, feature or sealing is UNSUPPORTED; a write feature leaves reading', async () => {
    await using dir = await tempDir()
    await createRepository(dir.file('r')).then((r) => r[Symbol.asyncDispose]())
    const text = await readFile(dir.file('r/config'), 'utf8')
    const { RepositoryKeys } = await import('./keys.ts')
    const { createHash } = await import('node:crypto')
    const withChange = async (alter: (body: Record<string, unknown>) => void): Promise<string> => {
      const path = dir.file(`changed-${Math.random()}`)
      await cp(dir.file('r'), path, { recursive: true })
      const { body } = JSON.parse(text) as { body: Record<string, unknown> }
      const keys = new RepositoryKeys({
        master: Buffer.from(String(body['master']), 'hex'),
        repository: Buffer.from(String(body['id']), 'hex'),
        sealing: 'none',
      })
      alter(body)
      const mac = keys.configMac(JSON.stringify(body))
      const sha256 = createHash('sha256')
        .update(JSON.stringify(body) + mac)
        .digest('hex')
      await writeFile(join(path, 'config'), JSON.stringify({ body, mac, sha256 }))
      return path
    }
    for (const alter of [
      (body: Record<string, unknown>) => void (body['version'] = 2),
      (body: Record<string, unknown>) => void (body['sealing'] = 'rot13'),
      (body: Record<string, unknown>) =>
        void (body['features'] = { required: ['patches'], requiredToWrite: [] }),
    ]) {
      await assert.rejects(openRepository(await withChange(alter)), { code: 'UNSUPPORTED' })
    }
    await using readable = await openRepository(
      await withChange((body) => void (body['features'] = { required: [], requiredToWrite: ['leases'] })),
    )
    assert.deepEqual(await readable.points(), [])
    await assert.rejects(
      readable.backup({ disk: 'vm', device: new MemoryDevice(512), inUse: RangeSet.empty }),
      { code: 'UNSUPPORTED' },
    )
  })

  test('a config that someone edited without the key is refused; a damaged one is replaced by its copy', async () => {
    await using dir = await tempDir()
    await createRepository(dir.file('r'), { password: 'p' }).then((r) => r[Symbol.asyncDispose]())
    const config = dir.file('r/config')
    const text = await readFile(config, 'utf8')
    await writeFile(config, text.slice(0, 200))
    const warnings: string[] = []
    const log = (_level: string, message: string): void => void warnings.push(message)
    await openRepository(dir.file('r'), { password: 'p', log }).then((r) => r[Symbol.asyncDispose]())
    assert.match(warnings[0]!, /copy was used/)
    const { createHash } = await import('node:crypto')
    const wrapped = JSON.parse(text) as { body: Record<string, unknown>; mac: string }
    wrapped.body['chunkBytes'] = 262_144
    const sha256 = createHash('sha256')
      .update(JSON.stringify(wrapped.body) + wrapped.mac)
      .digest('hex')
    await writeFile(config, JSON.stringify({ ...wrapped, sha256 }))
    await assert.rejects(openRepository(dir.file('r'), { password: 'p' }), { code: 'CORRUPT' })
  })
})

describe('the index is a hint', () => {
  async function withPoint(dir: { file(name: string): string }): Promise<TestDisk> {
    const disk = randomDisk(new Random(), 8 * MIB)
    await using repository = await createRepository(dir.file('r'))
    await repository.backup(sourceOf('vm', disk))
    return disk
  }

  test('lost, it is made anew from the packs and nothing is stored twice', async () => {
    await using dir = await tempDir()
    const disk = await withPoint(dir)
    await rm(dir.file('r/index'), { recursive: true })
    await using repository = await openRepository(dir.file('r'))
    const result = await repository.backup(sourceOf('other', disk))
    assert.equal(result.newChunks, 0)
    await rm(dir.file('r/index'), { recursive: true })
    await using again = await openRepository(dir.file('r'))
    const reindexed = await again.reindex()
    assert.ok(reindexed.packs >= 2 && reindexed.chunks >= 1)
    assert.deepEqual(reindexed.damaged, [])
  })

  test('damaged, another repository’s, or not to be opened, it costs a warning', async () => {
    await using dir = await tempDir()
    const disk = await withPoint(dir)
    await using other = await tempDir()
    await withPoint(other)
    const path = dir.file('r/index/chunks.sqlite')
    for (const spoil of [
      () => writeFile(path, 'this is no database at all, but longer than nothing '.repeat(100)),
      () => cp(other.file('r/index/chunks.sqlite'), path),
      async () => {
        await rm(dir.file('r/index'), { recursive: true })
        await writeFile(dir.file('r/index'), 'a file where a folder should be')
      },
    ]) {
      await spoil()
      const warnings: string[] = []
      await using repository = await openRepository(dir.file('r'), {
        log: (_l, message) => void warnings.push(message),
      })
      const result = await repository.backup(sourceOf(`vm${Math.random()}`, disk))
      assert.equal(result.newChunks, 0)
      assert.ok(warnings.length > 0)
      assert.ok((await repository.verify()).ok)
    }
  })

  test('an index that names packs which are gone makes their chunks be stored again', async () => {
    await using dir = await tempDir()
    const disk = await withPoint(dir)
    await rm(dir.file('r/packs'), { recursive: true })
    await rm(dir.file('r/meta'), { recursive: true })
    await using repository = await openRepository(dir.file('r'))
    const broken = await repository.verify()
    assert.ok(!broken.ok)
    assert.ok(
      broken.findings.every(({ points }) => points.length === 1),
      JSON.stringify(broken.findings),
    )
    const result = await repository.backup(sourceOf('vm', disk))
    assert.ok(result.newChunks > 0)
    await assertRestores(repository, 'vm', 'latest', kept(disk))
    const healed = await repository.verify({ disk: 'vm', point: 'latest' })
    assert.deepEqual(healed.findings, [])
    // Equal chunks stand at the same places of a page with another pack: the first point stays broken and says so.
    assert.ok(!(await repository.verify()).ok)
  })
})

describe('several at once', () => {
  test('two writers on one repository leave two sound points', async () => {
    const random = new Random()
    await using dir = await tempDir()
    await using one = await createRepository(dir.file('r'), { password: 'p', workers: 1 })
    await using two = await openRepository(dir.file('r'), { password: 'p', workers: 1 })
    const disks = [randomDisk(random, 12 * MIB), randomDisk(random, 12 * MIB)] as const
    const shared = randomDisk(random, 6 * MIB)
    await Promise.all([
      one.backup(sourceOf('a', disks[0])).then(() => one.backup(sourceOf('shared', shared))),
      two.backup(sourceOf('b', disks[1])).then(() => two.backup(sourceOf('shared', shared))),
      one.backup(sourceOf('c', disks[1])),
    ])
    for (const repository of [one, two]) {
      await assertRestores(repository, 'a', 'latest', kept(disks[0]))
      await assertRestores(repository, 'b', 'latest', kept(disks[1]))
      await assertRestores(repository, 'c', 'latest', kept(disks[1]))
      assert.equal((await repository.points('shared')).length, 2)
      assert.deepEqual((await repository.verify()).findings, [], `seed ${random.seed}`)
    }
    assert.deepEqual(await readdir(dir.file('r/writers')), [])
  })
})

describe('interruption and failure', () => {
  test('an aborted backup throws CANCELLED, leaves no point, and the next one works', async () => {
    const random = new Random()
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    const disk = randomDisk(random, 40 * MIB)
    for (let i = 0; i < 5; i++) {
      const controller = new AbortController()
      const run = repository.backup(sourceOf('vm', disk), {
        signal: controller.signal,
        progress: ({ doneBytes }) => void (doneBytes > (i * disk.inUse.size) / 6 && controller.abort()),
      })
      await assert.rejects(run, { code: 'CANCELLED' }, `seed ${random.seed}`)
      assert.deepEqual(await repository.points(), [])
      assert.deepEqual(await readdir(dir.file('r/tmp')), [])
      assert.deepEqual(await readdir(dir.file('r/writers')), [])
    }
    await repository.backup(sourceOf('vm', disk))
    await assertRestores(repository, 'vm', 'latest', kept(disk))
    assert.deepEqual((await repository.verify()).findings, [])
  })

  test('a source that fails to read fails the backup with its error, and leaves nothing half made', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    const disk = { bytes: new Uint8Array(30 * MIB).fill(3), inUse: RangeSet.of(0, 30 * MIB) }
    const device = new FaultDevice(new MemoryDevice(disk.bytes), {
      rules: [{ calls: ['read'], range: { start: 17 * MIB, end: 17 * MIB + 1 } }],
    })
    await assert.rejects(repository.backup({ disk: 'vm', device, inUse: disk.inUse }), { code: 'IO' })
    assert.deepEqual(await repository.points(), [])
    assert.deepEqual(await readdir(dir.file('r/tmp')), [])
    await repository.backup(sourceOf('vm', disk))
    await assertRestores(repository, 'vm', 'latest', disk.bytes)
  })

  test('a full disk is NO_SPACE; what was there stays sound, and with room it goes on', {
    skip: needsRoot(),
  }, async () => {
    await using dir = await tempDir()
    const repo = dir.file('r')
    await mkdir(repo)
    await must('mount', ['-t', 'tmpfs', '-o', 'size=12M', 'tmpfs', repo])
    try {
      await using repository = await createRepository(repo, { packBytes: MIB })
      const small = { bytes: new Uint8Array(3 * MIB), inUse: RangeSet.of(0, 3 * MIB) }
      randomFillSync(small.bytes)
      await repository.backup(sourceOf('small', small))
      const large = { bytes: new Uint8Array(16 * MIB), inUse: RangeSet.of(0, 16 * MIB) }
      randomFillSync(large.bytes)
      await assert.rejects(repository.backup(sourceOf('large', large)), { code: 'NO_SPACE' })
      assert.deepEqual(
        (await repository.points()).map(({ disk }) => disk),
        ['small'],
      )
      assert.deepEqual(await readdir(join(repo, 'tmp')), [])
      assert.deepEqual((await repository.verify()).findings, [])
      await must('mount', ['-o', 'remount,size=40M', repo])
      const again = await repository.backup(sourceOf('large', large))
      assert.ok(again.reusedChunks > 0, 'packs that were complete are used again')
      await assertRestores(repository, 'large', 'latest', large.bytes)
    } finally {
      await must('umount', [repo])
    }
  })

  test('after it is closed a repository refuses, and a point that was opened does not bring it back', async () => {
    await using dir = await tempDir()
    const repository = await createRepository(dir.file('r'))
    await repository[Symbol.asyncDispose]()
    await repository[Symbol.asyncDispose]()
    await assert.rejects(repository.points(), /closed/)
    await assert.rejects(repository.verify(), /closed/)
  })
})

describe('verify', () => {
  test('--against finds the first differing byte and what was not kept', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    const random = new Random()
    const disk = randomDisk(random, 9 * MIB)
    await repository.backup(sourceOf('vm', disk))
    const against = (bytes: Uint8Array, inUse: RangeSet) =>
      repository.verifyAgainst({ disk: 'vm', point: 'latest' }, { device: new MemoryDevice(bytes), inUse })
    const same = await against(disk.bytes, disk.inUse)
    assert.ok(same.equal, `seed ${random.seed}`)
    assert.equal(same.comparedBytes, disk.inUse.size)
    const index = random.below(disk.inUse.count)
    const at = disk.inUse.startAt(index) + random.below(disk.inUse.endAt(index) - disk.inUse.startAt(index))
    const other = disk.bytes.slice()
    other[at]! ^= 0x10
    const differing = await against(other, disk.inUse)
    assert.ok(!differing.equal)
    assert.deepEqual(differing.differences, [{ start: at, length: 1 }])
    const more = await against(disk.bytes, RangeSet.of(0, disk.bytes.length))
    assert.equal(more.notKeptBytes, disk.bytes.length - disk.inUse.size)
    assert.ok(!more.equal)
    const shorter = await against(disk.bytes.slice(0, 8 * MIB), disk.inUse.clip(0, 8 * MIB))
    assert.ok(!shorter.equal)
  })

  test('one point of a disk that is not there is NOT_FOUND', async () => {
    await using dir = await tempDir()
    await using repository = await createRepository(dir.file('r'))
    await assert.rejects(repository.verify({ disk: 'vm' }), (error) => isVarveError(error, 'NOT_FOUND'))
    await assert.rejects(repository.verify({ disk: 'vm', point: 'latest' }), { code: 'NOT_FOUND' })
    assert.ok((await repository.verify()).ok)
  })
})
