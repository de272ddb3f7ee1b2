/** VMDKs with a few bytes wrong: one clear error or an answer, never another exception; and the device contract. */
import assert from 'node:assert/strict'
import { readFile, writeFile } from 'node:fs/promises'
import { test } from 'node:test'
import { type DeviceUnderTest, deviceSuite } from '../../../test/kit/device-suite.ts'
import { must, needs, patternAt, Random, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import { allExtents, MemoryDevice, openHostFile, readBytes } from '../../device/index.ts'
import { vmdkFormat } from './index.ts'

const SIZE = 300_032

function content(): Uint8Array {
  const bytes = new Uint8Array(SIZE)
  for (const [start, end] of [
    [0, 20_000],
    [65_536, 65_537],
    [131_072, 196_608],
    [SIZE - 30_000, SIZE - 10_000],
  ] as const)
    bytes.set(patternAt(start, end - start), start)
  return bytes
}

async function image(subformat: string): Promise<DeviceUnderTest & { readonly path: string }> {
  const dir = await tempDir()
  const expected = content()
  const path = dir.file('a.vmdk')
  await writeFile(dir.file('a.raw'), expected)
  const args = ['-f', 'raw', '-O', 'vmdk', '-o', `subformat=${subformat}`]
  await must('qemu-img', ['convert', '-q', ...args, dir.file('a.raw'), path])
  const device = await vmdkFormat.open(await openHostFile(path), {
    openPart: (name) => openHostFile(dir.file(name)),
  })
  return {
    device,
    expected,
    path,
    async [Symbol.asyncDispose]() {
      await device[Symbol.asyncDispose]()
      await dir[Symbol.asyncDispose]()
    },
  }
}

for (const subformat of ['monolithicSparse', 'streamOptimized', 'twoGbMaxExtentSparse', 'monolithicFlat']) {
  deviceSuite(`VmdkLayer ${subformat}`, () => image(subformat), { write: false, skip: needs('qemu-img') })
}

test('a few bytes wrong', { skip: needs('qemu-img') }, async () => {
  const random = new Random()
  for (const subformat of ['monolithicSparse', 'streamOptimized', 'monolithicFlat']) {
    await using whole = await image(subformat)
    const original = await readFile(whole.path)
    // Header, descriptor, directories and tables stand in front.
    const front = Math.min(original.length, 64 * 1024)
    let refused = 0
    for (let round = 0; round < 400; round++) {
      let bytes = Buffer.from(original)
      for (let i = 0; i <= random.below(3); i++) {
        const at = random.below(random.below(2) ? Math.min(512, front) : front)
        if (random.below(2)) bytes[at] = random.below(256)
        else bytes.fill(random.pick([0, 0xff, 0x7f]), at, Math.min(bytes.length, at + random.pick([1, 4, 8])))
      }
      if (random.below(5) === 0) bytes = bytes.subarray(0, random.below(bytes.length))
      try {
        await using layer = await vmdkFormat.open(new MemoryDevice(bytes), {
          openPart: async () => new MemoryDevice(SIZE),
        })
        let read = 0
        for await (const { offset, length, kind } of allExtents(layer)) {
          if (kind !== 'data' || (read += length) > 4_000_000) continue
          await readBytes(layer, offset, Math.min(length, 1_000_000))
        }
      } catch (error) {
        refused++
        const known = isVarveError(error) && error.code !== 'INTERNAL'
        assert.ok(known, `seed ${random.seed}, round ${round}: ${error instanceof Error ? error.stack : ''}`)
      }
    }
    assert.ok(refused > 0, `seed ${random.seed}`)
  }
})
