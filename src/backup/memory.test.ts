/** Memory and work grow with what matters, not with the size of the disk. Measured in a process of its own. */
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { test } from 'node:test'
import { promisify } from 'node:util'
import { tempDir } from '../../test/kit/index.ts'

const room = (name: string): string => JSON.stringify(join(import.meta.dirname, '..', name, 'index.ts'))

/** A disk of any size with 4 KiB of content every `every` bytes; the rest is a hole, all of it is in use. */
const DISK = `
import { createRepository } from ${room('backup')}
import { RangeSet } from ${room('extents')}
import { readFileSync } from 'node:fs'
function disk(size, every, salt) {
  return {
    size, blockSize: 512, features: { write: false, resize: false, sparse: true, places: false },
    async read(offset, into) {
      into.fill(0)
      for (let at = Math.ceil((offset - 4096) / every) * every; at < offset + into.length; at += every) {
        for (let i = Math.max(at, offset, 0); i < Math.min(at + 4096, offset + into.length); i++)
          into[i - offset] = Math.imul(i ^ Math.imul(Math.floor(i / every) + salt, 0x9e3779b1), 2654435761) >>> 24
      }
    },
    async extents(offset, length) {
      const list = []
      for (let at = offset; at < offset + length && list.length < 1000; ) {
        const base = Math.floor(at / every) * every
        const end = Math.min(at < base + 4096 ? base + 4096 : base + every, offset + length)
        list.push({ offset: at, length: end - at, kind: at < base + 4096 ? 'data' : 'zero' })
        at = end
      }
      return list
    },
    async [Symbol.asyncDispose]() {},
  }
}
const peakMiB = () => Number(readFileSync('/proc/self/status', 'latin1').match(/VmHWM:\\s+(\\d+)/)[1]) / 1024
`

async function child(code: string): Promise<Record<string, number>> {
  const { stdout } = await promisify(execFile)(process.execPath, ['--input-type=module', '-e', DISK + code])
  return JSON.parse(stdout) as Record<string, number>
}

test('backup, second backup and verify of a sparse disk of 64 GiB stay under 300 MiB', {
  skip: process.platform === 'linux' ? false : 'reads /proc',
}, async () => {
  await using dir = await tempDir()
  const figures = await child(`
    const GIB = 2 ** 30
    await using repository = await createRepository(${JSON.stringify(dir.file('r'))}, { password: 'p' })
    const source = (salt) => ({ disk: 'vm', device: disk(64 * GIB, 32 * 2 ** 20, salt), inUse: RangeSet.of(0, 64 * GIB) })
    const first = await repository.backup(source(0))
    const second = await repository.backup(source(0))
    const { ok, chunks } = await repository.verify()
    console.log(JSON.stringify({ peak: peakMiB(), read: first.readBytes, stored: first.storedBytes, again: second.storedBytes, ok: Number(ok), chunks }))
  `)
  assert.equal(figures['ok'], 1)
  assert.equal(figures['chunks'], 2048)
  assert.equal(figures['read'], 2048 * 4096)
  assert.ok(figures['stored']! < 16 << 20, `${figures['stored']} bytes stored`)
  assert.ok(figures['again']! < 32_768, `${figures['again']} bytes stored the second time`)
  assert.ok(figures['peak']! < 300, `${figures['peak']} MiB`)
})

test('a disk of 16 TiB of which nothing is in use takes no time and hardly any space', async () => {
  await using dir = await tempDir()
  const figures = await child(`
    await using repository = await createRepository(${JSON.stringify(dir.file('r'))})
    const started = performance.now()
    const { storedBytes } = await repository.backup({ disk: 'vm', device: disk(2 ** 44, 2 ** 40, 0), inUse: RangeSet.empty })
    console.log(JSON.stringify({ storedBytes, seconds: (performance.now() - started) / 1000, peak: peakMiB() }))
  `)
  assert.ok(figures['storedBytes']! < 4096)
  assert.ok(figures['peak']! < 200, `${figures['peak']} MiB`)
  assert.ok(figures['seconds']! < 10, `${figures['seconds']} s`)
})

test('a map of half a million ranges is taken in one pass', async () => {
  await using dir = await tempDir()
  const figures = await child(`
    import { RangeSetBuilder } from ${room('extents')}
    await using repository = await createRepository(${JSON.stringify(dir.file('r'))})
    const builder = new RangeSetBuilder()
    for (let i = 0; i < 500_000; i++) builder.add(i * 16_384, i * 16_384 + 4096)
    const device = disk(8 * 2 ** 30, 2 ** 20, 0)
    const started = performance.now()
    const { inUseBytes } = await repository.backup({ disk: 'vm', device, inUse: builder.build() })
    const seconds = (performance.now() - started) / 1000
    await using point = await repository.openPoint({ disk: 'vm', point: 'latest' })
    const { count } = await point.inUse()
    console.log(JSON.stringify({ inUseBytes, count, seconds, peak: peakMiB() }))
  `)
  assert.equal(figures['inUseBytes'], 500_000 * 4096)
  assert.equal(figures['count'], 500_000)
  // Ten times the ranges of a real disk of that size; stripping types takes some 50 MiB, and the collector its time.
  assert.ok(figures['peak']! < 360, `${figures['peak']} MiB`)
})
