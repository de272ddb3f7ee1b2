/** A flipped bit anywhere in a repository is found and named, and a read never returns wrong bytes. */
import assert from 'node:assert/strict'
import { copyFile, open, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { describe, test } from 'node:test'
import { contentOf, firstDifference, kept, randomDisk, sourceOf } from '../../test/kit/backup.ts'
import { Random, tempDir } from '../../test/kit/index.ts'
import { isVarveError } from '../base/index.ts'
import { createRepository, type Finding, openRepository, type Repository } from './index.ts'
import { decodeManifestHeader, decodePackFooter, MANIFEST_HEADER_BYTES, PACK_FOOTER_BYTES } from './layout.ts'

const MIB = 1 << 20

async function flip(path: string, offset: number, mask: number): Promise<void> {
  const file = await open(path, 'r+')
  const byte = Buffer.alloc(1)
  await file.read(byte, 0, 1, offset)
  byte[0]! ^= mask
  await file.write(byte, 0, 1, offset)
  await file.close()
}

interface Place {
  readonly path: string
  readonly region: string
  readonly offset: number
}

async function objects(root: string): Promise<string[]> {
  const entries = await readdir(root, { recursive: true, withFileTypes: true })
  return entries
    .filter((entry) => entry.isFile())
    .map((entry) => relative(root, join(entry.parentPath, entry.name)))
    .filter((path) => !path.startsWith('index/'))
    .sort()
}

/** One place in each region of each object. */
async function regionsOf(root: string, path: string): Promise<Place[]> {
  const bytes = await readFile(join(root, path))
  const place = (region: string, offset: number): Place => ({ path, region, offset })
  if (path.startsWith('packs/') || path.startsWith('meta/')) {
    const footer = decodePackFooter(bytes.subarray(-PACK_FOOTER_BYTES), bytes.length, path)
    const crcsAt = footer.directoryOffset + footer.directoryStored
    return [
      ...[0, 9, 20, 40, 50, 61].map((at) => place('header', at)),
      place('first frame', 64),
      place('last frame', footer.directoryOffset - 1),
      place('directory', footer.directoryOffset),
      place('end of directory', crcsAt - 1),
      place('checksums', crcsAt),
      ...[0, 9, 20, 40, 50, 60, 66, 70, 74, 78, 82, 88, 100, 126].map((at) =>
        place('footer', bytes.length - PACK_FOOTER_BYTES + at),
      ),
    ]
  }
  if (path.startsWith('points/')) {
    const header = decodeManifestHeader(bytes.subarray(0, MANIFEST_HEADER_BYTES), path)
    const facts = MANIFEST_HEADER_BYTES + header.factsStored
    return [
      ...[0, 9, 10, 12, 20, 40, 60, 81, 85, 90, 93].map((at) => place('header', at)),
      place('facts', MANIFEST_HEADER_BYTES),
      place('end of facts', facts - 1),
      place('MAC of facts', facts + 5),
      place('page table', facts + 32),
      place('end of page table', facts + 32 + header.tableStored - 1),
      place('MAC of page table', bytes.length - 10),
      place('checksum', bytes.length - 1),
    ]
  }
  return [
    place('config', 0),
    place('config', Math.floor(bytes.length / 2)),
    place('config', bytes.length - 1),
  ]
}

function assertNamed(findings: readonly Finding[], path: string, what: string): void {
  assert.ok(
    findings.some((finding) => finding.name === path),
    `${what}: ${JSON.stringify(findings)}`,
  )
}

/** All bytes of the point, or the error that reading them met. */
async function readAll(repository: Repository, point: string): Promise<Uint8Array | string> {
  try {
    await using device = await repository.openPoint({ disk: 'vm', point })
    return await contentOf(device)
  } catch (error) {
    assert.ok(isVarveError(error, 'CORRUPT', 'NOT_FOUND', 'UNSUPPORTED', 'LIMIT'), String(error))
    return error.code
  }
}

for (const password of [undefined, 'p']) {
  describe(password ? 'encrypted' : 'plain', () => {
    test('a flipped bit anywhere is found, named, and never read as content', async () => {
      const random = new Random()
      await using dir = await tempDir()
      const root = dir.file('r')
      const disk = randomDisk(random, 2 * MIB)
      await (await createRepository(root, { password, chunkBytes: 262_144, frameBytes: 65_536 }))[
        Symbol.asyncDispose
      ]()
      await using repository = await openRepository(root, { password, workers: 2 })
      const { point } = await repository.backup(sourceOf('vm', disk))
      const expected = kept(disk)
      const paths = await objects(root)
      const places: Place[] = []
      for (const path of paths) places.push(...(await regionsOf(root, path)))
      for (let i = 0; i < 60; i++) {
        const path = random.pick(paths)
        places.push({
          path,
          region: 'anywhere',
          offset: random.below((await readFile(join(root, path))).length),
        })
      }
      for (const [i, { path, region, offset }] of places.entries()) {
        const mask = 1 << random.below(8)
        const what = `seed ${random.seed}: ${path}, ${region}, byte ${offset} ^ ${mask}`
        await flip(join(root, path), offset, mask)
        const result = await repository.verify()
        assert.ok(!result.ok, what)
        assertNamed(result.findings, path, what)
        if (!path.startsWith('config') && !path.startsWith('keys/')) {
          assert.ok(
            result.findings.some((finding) => finding.points.some((affected) => affected.point === point)),
            `${what}: no point is named: ${JSON.stringify(result.findings)}`,
          )
          // A new repository object, so that nothing of what was read before the damage helps; it takes a while.
          if (i % 7 !== 0) {
            await flip(join(root, path), offset, mask)
            continue
          }
          await using fresh = await openRepository(root, { password, workers: 1 })
          const content = await readAll(fresh, point)
          if (typeof content !== 'string') assert.equal(firstDifference(content, expected), undefined, what)
        }
        await flip(join(root, path), offset, mask)
      }
      assert.deepEqual((await repository.verify()).findings, [])
    })

    test('a truncated and a missing object are found and named', async () => {
      const random = new Random()
      await using dir = await tempDir()
      const root = dir.file('r')
      await using repository = await createRepository(root, { password })
      await repository.backup(sourceOf('vm', randomDisk(random, 4 * MIB)))
      for (const path of (await objects(root)).filter((name) => /^(packs|meta|points)\//.test(name))) {
        const bytes = await readFile(join(root, path))
        for (const length of [0, 10, 63, 64, 150, Math.floor(bytes.length / 2), bytes.length - 1]) {
          if (length >= bytes.length) continue
          await truncate(join(root, path), length)
          const result = await repository.verify()
          assertNamed(result.findings, path, `${path} cut to ${length}`)
          await writeFile(join(root, path), bytes)
        }
        await rm(join(root, path))
        const result = await repository.verify()
        // A manifest that is gone is a point that was removed.
        if (!path.startsWith('points/')) assertNamed(result.findings, path, `${path} removed`)
        await writeFile(join(root, path), bytes)
      }
      await using again = await openRepository(root, { password })
      assert.deepEqual((await again.verify()).findings, [])
    })
  })
}

test('damage to one chunk names the points that need it, and no others', async () => {
  const random = new Random()
  await using dir = await tempDir()
  const root = dir.file('r')
  await using repository = await createRepository(root, {
    chunkBytes: 262_144,
    frameBytes: 65_536,
    workers: 1,
  })
  const one = random.bytes(3 * 262_144)
  const two = one.slice()
  two.set(random.bytes(1000), 262_144)
  const { RangeSet } = await import('../extents/index.ts')
  const inUse = RangeSet.of(0, one.length)
  const first = await repository.backup(sourceOf('vm', { bytes: one, inUse }))
  const [pack] = (await objects(root)).filter((name) => name.startsWith('packs/'))
  const second = await repository.backup(sourceOf('vm', { bytes: two, inUse }))
  await repository.backup(sourceOf('other', { bytes: random.bytes(262_144), inUse: RangeSet.of(0, 262_144) }))
  // The middle of the first pack is the chunk that only the first point has; its beginning is in both.
  const middle = 64 + 262_144 + 40_000
  await flip(join(root, pack!), middle, 4)
  const result = await repository.verify()
  const chunk = result.findings.find((finding) => finding.object === 'chunk')!
  assert.equal(chunk.name, pack)
  assert.deepEqual(chunk.points, [{ disk: 'vm', point: first.point }])
  assert.equal(result.findings.length, 1, JSON.stringify(result.findings))
  assert.deepEqual((await repository.verify({ disk: 'other' })).findings, [])
  await flip(join(root, pack!), middle, 4)
  await flip(join(root, pack!), 100, 4)
  const both = (await repository.verify()).findings.find((finding) => finding.object === 'chunk')!
  assert.deepEqual(
    both.points.map(({ point }) => point),
    [first.point, second.point],
  )
})

test('points with a damaged manifest are listed with their error, and do not stop a backup', async () => {
  const random = new Random()
  await using dir = await tempDir()
  const root = dir.file('r')
  await using repository = await createRepository(root, { password: 'p' })
  const disk = randomDisk(random, 3 * MIB)
  const { point } = await repository.backup(sourceOf('vm', disk))
  await repository.backup(sourceOf('vm', disk))
  const manifests = (await objects(root)).filter((name) => name.startsWith('points/'))
  await flip(join(root, manifests[1]!), 120, 1)
  const points = await repository.points()
  assert.deepEqual(
    points.map((info) => [info.disk, info.error?.code]),
    [
      ['vm', undefined],
      ['vm', 'CORRUPT'],
    ],
  )
  const third = await repository.backup(sourceOf('vm', disk))
  assert.equal(third.newChunks, 0)
  assert.ok(third.point > points[1]!.point)
  const against = await repository.openPoint({ disk: 'vm', point })
  assert.equal(firstDifference(await contentOf(against), kept(disk)), undefined)
})

test('an object that was put in the place of another is found: manifests of other disks, packs of other repositories', async () => {
  const random = new Random()
  for (const password of [undefined, 'p']) {
    await using dir = await tempDir()
    const root = dir.file('r')
    await using repository = await createRepository(root, { password })
    const disk = randomDisk(random, 3 * MIB)
    const { point } = await repository.backup(sourceOf('vm', disk))
    await repository.backup(sourceOf('other', randomDisk(random, 3 * MIB)))
    const manifests = (await objects(root)).filter((name) => name.startsWith('points/'))
    const mine = manifests.find((name) => name.endsWith(point))!
    const folder = manifests.find((name) => name !== mine)!.slice(0, -26)
    await copyFile(join(root, mine), join(root, folder + point))
    await assert.rejects(repository.openPoint({ disk: 'other', point }), { code: 'CORRUPT' })
    assertNamed((await repository.verify()).findings, folder + point, 'a moved manifest')
    await rm(join(root, folder + point))

    await using foreign = await createRepository(dir.file('foreign'), { password })
    await foreign.backup(sourceOf('vm', disk))
    const pack = (await objects(root)).find((name) => name.startsWith('packs/'))!
    const theirs = (await objects(dir.file('foreign'))).find((name) => name.startsWith('packs/'))!
    const original = await readFile(join(root, pack))
    await copyFile(join(dir.file('foreign'), theirs), join(root, pack))
    assertNamed((await repository.verify()).findings, pack, 'a pack of another repository')
    await writeFile(join(root, pack), original)
    assert.deepEqual((await repository.verify()).findings, [])
  }
})
