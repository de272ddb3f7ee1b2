/** Checking and repair: the same verdict as qemu-img check, and images that it calls clean afterwards. */
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { must, needs, patternAt, Random, run, tempDir } from '../../../test/kit/index.ts'
import { assertBytes, assertClean, create, io, randomCommands } from '../../../test/kit/qcow2.ts'
import { openHostFile, readBytes } from '../../device/index.ts'
import type { CheckFinding } from '../image-format.ts'
import { Qcow2Layer, Qcow2Writer, qcow2Format, repairImage } from './index.ts'
import { readHeader } from './open-image.ts'

const skip = needs('qemu-img', 'qemu-io')

async function check(path: string): Promise<readonly CheckFinding[]> {
  await using file = await openHostFile(path)
  return await qcow2Format.check!(file, {})
}

function verdict(findings: readonly CheckFinding[]): { errors: boolean; leaks: boolean } {
  return {
    errors: findings.some(({ severity }) => severity === 'error'),
    leaks: findings.some(({ severity }) => severity === 'leak'),
  }
}

async function qemuVerdict(path: string): Promise<{ errors: boolean; leaks: boolean }> {
  const result = await run('qemu-img', ['check', '--output=json', '-f', 'qcow2', path])
  const report = JSON.parse(result.stdout.toString()) as { corruptions?: number; leaks?: number }
  return { errors: (report.corruptions ?? 0) > 0, leaks: (report.leaks ?? 0) > 0 }
}

/** The places of the first L2 table and of its first data entry's refcount, for damage by hand. */
async function places(path: string): Promise<{ l2: number; block: number; clusterBytes: number }> {
  await using file = await openHostFile(path)
  const header = await readHeader(file)
  const at = async (offset: number): Promise<number> =>
    Number(new DataView((await readBytes(file, offset, 8)).buffer).getBigUint64(0) & 0x00ff_ffff_ffff_fe00n)
  return {
    l2: await at(header.l1TableOffset),
    block: await at(header.refcountTableOffset),
    clusterBytes: header.clusterBytes,
  }
}

async function poke(path: string, offset: number, ...bytes: number[]): Promise<void> {
  await using file = await openHostFile(path, { write: true })
  await file.write(offset, Uint8Array.from(bytes))
}

describe('qcow2 check', { skip }, () => {
  test('images that QEMU made are clean', async () => {
    await using dir = await tempDir()
    const random = new Random()
    let number = 0
    for (const [options, compressed] of [
      ['cluster_size=512', true],
      ['compat=0.10,cluster_size=4096', true],
      ['cluster_size=65536,refcount_bits=1', false],
      ['cluster_size=4096,refcount_bits=64,compression_type=zstd', true],
      ['extended_l2=on,cluster_size=16384', true],
      [`data_file=${dir.file('data')},data_file_raw=on`, false],
    ] as const) {
      const path = dir.file(`${number++}`)
      const clusterBytes = Number(/cluster_size=(\d+)/.exec(options)?.[1] ?? 65536)
      const bytes = clusterBytes * 60
      await create({ path, bytes, options })
      const zeros = !options.includes('0.10')
      await io(path, randomCommands(random, { bytes, clusterBytes, count: 40, compressed, zeros }))
      const plain = !options.includes('data_file') && !options.includes('refcount_bits=1')
      if (plain) await must('qemu-img', ['snapshot', '-c', 's', path])
      if (zeros) await must('qemu-img', ['bitmap', '--add', path, 'b'])
      await io(path, randomCommands(random, { bytes, clusterBytes, count: 20, zeros }))
      assert.deepEqual(await check(path), [], `${options}, seed ${random.seed}`)
    }
  })

  for (const [name, damage, repairable] of [
    ['a count that is too high', (p) => [p.block + 2 * 6 + 1, 9], true],
    ['a count that is too low', (p) => [p.block + 2 * 6, 0, 0], true],
    ['a COPIED flag that lacks', (p) => [p.l2, 0], true],
    ['two entries on one cluster', (p) => [p.l2 + 15, 0, 0x80, 0, 0, 0, 0, 0, 0x06, 0, 0], false],
    ['an entry behind the end of the file', (p) => [p.l2 + 2, 0x70], false],
    ['an entry that is not aligned', (p) => [p.l2 + 6, 0x02], false],
    ['an entry on the header', (p) => [p.l2 + 8, 0x80, 0, 0, 0, 0, 0, 0x10, 0], false],
  ] as readonly (readonly [string, (p: { l2: number; block: number }) => number[], boolean])[]) {
    test(`finds ${name}, as QEMU does`, async () => {
      await using dir = await tempDir()
      const path = dir.file('a')
      await create({ path, bytes: 1 << 20, options: 'cluster_size=4096' })
      await io(path, ['write -P 1 0 64k'])
      const [offset, ...bytes] = damage(await places(path)) as [number, ...number[]]
      await poke(path, offset, ...bytes)
      const found = verdict(await check(path))
      assert.ok(found.errors || found.leaks)
      assert.deepEqual(found, await qemuVerdict(path))
      await using file = await openHostFile(path, { write: true })
      if (!repairable) return await assert.rejects(repairImage(file), { code: 'CORRUPT' })
      await repairImage(file)
      assert.deepEqual(await check(path), [])
      await assertClean(path)
      await using layer = await Qcow2Layer.open(await openHostFile(path))
      assertBytes(await readBytes(layer, 0, 65536), new Uint8Array(65536).fill(1), 'content')
    })
  }

  test('reserved bits are errors', async () => {
    await using dir = await tempDir()
    const path = dir.file('a')
    await create({ path, bytes: 1 << 20, options: 'cluster_size=4096' })
    await io(path, ['write -P 1 0 64k'])
    const { l2 } = await places(path)
    await poke(path, l2, 0x90)
    assert.equal(verdict(await check(path)).errors, true)
    await using layer = await Qcow2Layer.open(await openHostFile(path))
    await assert.rejects(readBytes(layer, 0, 512), { code: 'CORRUPT' })
    await readBytes(layer, 4096, 512)
  })

  test('a dirty image with lazy refcounts is repaired, then written to', async () => {
    await using dir = await tempDir()
    const path = dir.file('a')
    await create({ path, bytes: 4 << 20, options: 'lazy_refcounts=on,cluster_size=4096' })
    await io(path, ['write -P 5 0 256k', 'write -P 6 1M 256k', 'flush', 'abort'])
    const found = await check(path)
    assert.ok(found.some(({ severity, text }) => severity === 'note' && /dirty/.test(text)))
    {
      await using file = await openHostFile(path, { write: true })
      await assert.rejects(Qcow2Writer.open(file), { code: 'CORRUPT' })
      await repairImage(file)
    }
    await assertClean(path)
    {
      await using layer = await Qcow2Writer.open(await openHostFile(path, { write: true }))
      assert.equal(layer.facts['dirty'], false)
      await layer.write(100, patternAt(100, 2 << 20))
    }
    await assertClean(path)
    assert.deepEqual(await check(path), [])
  })

  test('damage by the dice gets the verdict of QEMU', async () => {
    await using dir = await tempDir()
    const random = new Random()
    const path = dir.file('a')
    for (let turn = 0; turn < 25; turn++) {
      await create({ path, bytes: 1 << 20, options: 'cluster_size=4096' })
      await io(path, ['write -P 1 0 300k', 'write -z 100k 40k'])
      const { l2, block } = await places(path)
      // An offset byte of an L2 entry, or a count; not the reserved bits, which QEMU's check passes over.
      const offset =
        random.next() < 0.5 ? l2 + random.below(60) * 8 + 5 : block + random.below(60) * 2 + random.below(2)
      const value = random.below(256)
      await poke(path, offset, value)
      assert.deepEqual(
        verdict(await check(path)),
        await qemuVerdict(path),
        `seed ${random.seed}, turn ${turn}: byte ${value} at ${offset}, found ${JSON.stringify(await check(path))}`,
      )
    }
  })
})
