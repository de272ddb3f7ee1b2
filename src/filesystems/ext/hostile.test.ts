/**
 * Damaged and hostile ext images. Rule: the answer is an error of ours, or nothing that the intact image uses is
 * called free. Never another exception, never a hang, never memory by a field's word.
 */
import assert from 'node:assert/strict'
import { mkdir, open, readFile, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, Random, run, tempDir } from '../../../test/kit/index.ts'
import { dumpe2fs } from '../../../test/oracle/dumpe2fs.ts'
import { mounted, SCRATCH_TOOLS, scratch, snapshot, Workload } from '../../../test/poison/index.ts'
import { isVarveError } from '../../base/index.ts'
import {
  type BlockDevice,
  MemoryDevice,
  OverlayDevice,
  openHostFile,
  readBytes,
  SliceDevice,
} from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import { readDescriptors } from './descriptors.ts'
import { extType } from './index.ts'
import { BLOCK_TYPE } from './journal-layout.ts'
import { readSuperblock } from './superblock.ts'

type Answer = RangeSet | 'refused'

async function answer(device: BlockDevice): Promise<Answer> {
  try {
    if (!(await extType.probe(device))) return 'refused'
    const fs = await extType.open(device, {})
    return (await fs.used({})).ranges
  } catch (error) {
    if (isVarveError(error) && error.code !== 'INTERNAL') return 'refused'
    throw error
  }
}

/** The same of the audit. */
async function auditAnswer(device: BlockDevice): Promise<Answer> {
  try {
    const fs = await extType.open(device, {})
    return await fs.audit!({})
  } catch (error) {
    if (isVarveError(error) && error.code !== 'INTERNAL') return 'refused'
    throw error
  }
}

/** The answer for `device` with `bytes` at `offset`. */
async function patched(device: BlockDevice, offset: number, bytes: Uint8Array): Promise<Answer> {
  await using overlay = new OverlayDevice(device)
  overlay.patch(offset, bytes)
  return await answer(overlay)
}

async function flipped(device: BlockDevice, offset: number, bit: number): Promise<Answer> {
  const byte = await readBytes(device, offset, 1)
  return await patched(device, offset, Uint8Array.of(byte[0]! ^ (1 << bit)))
}

function assertSafe(found: Answer, used: RangeSet, what: string): void {
  if (found === 'refused') return
  assert.equal(used.subtract(found).toString(), '', `${what}: called free`)
}

async function makeImage(path: string, args: readonly string[], mib: number): Promise<void> {
  await writeFile(path, '')
  await truncate(path, mib * 2 ** 20)
  await using dir = await tempDir()
  for (let i = 0; i < 40; i++) {
    await mkdir(dir.file(`d${i % 3}`), { recursive: true })
    await writeFile(join(dir.file(`d${i % 3}`), `f${i}`), new Uint8Array(i * 5000).fill(i))
  }
  await must('mke2fs', ['-q', '-F', ...args, '-d', dir.path, path])
  const gone = Array.from({ length: 10 }, (_, i) => `rm d${i % 3}/f${i}`).join('\n')
  await must('debugfs', ['-w', '-f', '-', path], { input: gone })
}

const TOOLS = needs('mke2fs', 'debugfs')

describe('a flipped bit under a checksum is refused', { skip: TOOLS }, () => {
  test('superblock: every byte', async () => {
    await using dir = await tempDir()
    await makeImage(dir.file('image'), ['-t', 'ext4'], 64)
    await using device = new MemoryDevice(await readFile(dir.file('image')))
    for (let at = 0; at < 1024; at++) {
      assert.equal(await flipped(device, 1024 + at, at % 8), 'refused', `byte ${at}`)
    }
  })

  for (const features of [
    '64bit,metadata_csum',
    '^64bit,metadata_csum',
    '64bit,^metadata_csum,uninit_bg',
    '^64bit,^metadata_csum,uninit_bg',
  ]) {
    test(`group descriptors: every byte (${features})`, async () => {
      await using dir = await tempDir()
      await makeImage(dir.file('image'), ['-t', 'ext4', '-b', '1024', '-O', features], 64)
      await using device = new MemoryDevice(await readFile(dir.file('image')))
      const sb = await readSuperblock(device)
      for (let at = 0; at < sb.groupCount * sb.descBytes; at++) {
        assert.equal(await flipped(device, 2 * 1024 + at, (at * 3) % 8), 'refused', `byte ${at}`)
      }
    })
  }

  test('block bitmaps: every byte of one, some of the others', async () => {
    await using dir = await tempDir()
    await makeImage(dir.file('image'), ['-t', 'ext4', '-b', '1024'], 64)
    await using device = new MemoryDevice(await readFile(dir.file('image')))
    const sb = await readSuperblock(device)
    const descriptors = await readDescriptors(device, sb)
    let checked = 0
    for (let group = 0; group < sb.groupCount; group++) {
      const place = descriptors.blockBitmap(group) * sb.blockBytes
      if (descriptors.blockUninit(group)) continue
      for (let at = 0; at < sb.clustersPerGroup / 8; at += group === 0 ? 1 : 97) {
        assert.equal(await flipped(device, place + at, at % 8), 'refused', `group ${group} byte ${at}`)
        checked++
      }
    }
    assert.ok(checked > 1000)
  })

  test('journal inode and the block of its extents', async () => {
    await using dir = await tempDir()
    await makeImage(dir.file('image'), ['-t', 'ext4', '-b', '1024'], 64)
    await using device = new MemoryDevice(await readFile(dir.file('image')))
    const sb = await readSuperblock(device)
    const descriptors = await readDescriptors(device, sb)
    const inode = descriptors.inodeTable(0) * sb.blockBytes + 7 * sb.inodeSize
    for (let at = 0; at < sb.inodeSize; at++) {
      assert.equal(await flipped(device, inode + at, at % 8), 'refused', `byte ${at}`)
    }
  })

  test('a bit of a bitmap without a checksum does not fit its descriptor', async () => {
    await using dir = await tempDir()
    for (const args of [
      ['-t', 'ext3'],
      ['-t', 'ext2'],
      ['-t', 'ext4', '-O', '^metadata_csum,uninit_bg'],
    ]) {
      await makeImage(dir.file('image'), [...args, '-b', '1024'], 32)
      await using device = new MemoryDevice(await readFile(dir.file('image')))
      const sb = await readSuperblock(device)
      const place = (await readDescriptors(device, sb)).blockBitmap(0) * sb.blockBytes
      for (let at = 0; at < 1024; at += 13) {
        assert.equal(await flipped(device, place + at, at % 8), 'refused', `byte ${at}`)
      }
    }
  })
})

describe('fields at their extremes', { skip: TOOLS }, () => {
  const VALUES = [0, 1, 7, 0xff, 0x7fffffff, 0xffffffff]
  for (const args of [
    ['-t', 'ext4', '-O', '^metadata_csum'],
    ['-t', 'ext3'],
    ['-t', 'ext2', '-b', '1024'],
    ['-t', 'ext4', '-O', '^metadata_csum,bigalloc'],
  ]) {
    test(`superblock and descriptors without a checksum: ${args.join(' ')}`, async () => {
      await using dir = await tempDir()
      await makeImage(dir.file('image'), args, 32)
      await using device = new MemoryDevice(await readFile(dir.file('image')))
      const used = await answer(device)
      assert.ok(used !== 'refused')
      const sb = await readSuperblock(device)
      const table = sb.blockBytes === 1024 ? 2048 : sb.blockBytes
      for (const [start, end, step] of [
        [1024, 1024 + 0x280, 2],
        [table, table + Math.min(sb.groupCount, 3) * sb.descBytes, 2],
      ] as const) {
        for (let at = start; at < end; at += step) {
          for (const value of VALUES) {
            for (const width of [2, 4]) {
              const bytes = new Uint8Array(width)
              const view = new DataView(bytes.buffer)
              if (width === 4) view.setUint32(0, value, true)
              else view.setUint16(0, value & 0xffff, true)
              assertSafe(await patched(device, at, bytes), used, `${width} bytes at ${at} = ${value}`)
            }
          }
        }
      }
    })
  }

  test('a superblock alone, of any content, costs little memory and time', async () => {
    const random = new Random()
    for (let i = 0; i < 3000; i++) {
      const bytes = new Uint8Array(16_384)
      bytes.set(random.bytes(1024), 1024)
      const view = new DataView(bytes.buffer, 1024)
      view.setUint16(0x38, 0xef53, true)
      // Nearly right, so that more than the first test is passed.
      view.setUint32(0x18, random.below(3), true)
      view.setUint32(0x1c, random.below(3), true)
      view.setUint32(0x60, random.pick([0, 2, 0x42, 0x2c2]), true)
      view.setUint32(0x64, random.pick([0, 1, 0x13, 0x203]), true)
      view.setUint16(0x3a, 1, true)
      if (random.below(2) === 0) view.setUint32(0x04, random.below(20), true)
      assert.equal(await answer(new MemoryDevice(bytes)), 'refused', `seed ${random.seed}`)
    }
  })

  test('a truncated image is refused wherever it ends', async () => {
    await using dir = await tempDir()
    await makeImage(dir.file('image'), ['-t', 'ext4'], 32)
    await using device = await openHostFile(dir.file('image'))
    const { size } = device
    for (const end of [
      0,
      1,
      1023,
      1024,
      1080,
      1082,
      2047,
      2048,
      4096,
      5000,
      8192,
      1 << 20,
      size - 4096,
      size - 1,
    ]) {
      assert.equal(await answer(new SliceDevice(device, 0, end)), 'refused', `${end} bytes`)
    }
  })

  test('marks that make the bitmaps doubtful are refused with their reason', async () => {
    await using dir = await tempDir()
    const image = dir.file('image')
    const cases: [readonly string[], string, string][] = [
      [['-t', 'ext4'], 'ssv state 3', 'ext-errors'],
      [['-t', 'ext2'], 'ssv state 0', 'ext-not-clean'],
      [['-t', 'ext4'], 'ssv state 0', 'ext-not-clean'],
      [['-t', 'ext4'], 'feature FEATURE_I31', 'ext-features'],
      [['-t', 'ext4'], 'feature FEATURE_R23', 'ext-features'],
      [['-t', 'ext4'], 'ssv journal_inum 0', 'ext-external-journal'],
      [['-t', 'ext4'], 'ssv journal_inum 2', 'ext-journal'],
      [['-t', 'ext4'], 'ssv journal_inum 4000000000', 'ext-journal'],
      [['-t', 'ext4'], 'ssv blocks_count 99999999', 'ext-superblock'],
    ]
    for (const [args, command, reason] of cases) {
      await makeImage(image, args, 16)
      await must('debugfs', ['-w', '-R', command, image])
      await using device = await openHostFile(image)
      const found = extType.open(device, {}).then((fs) => fs.used({}))
      await assert.rejects(found, { reason }, command)
    }
    await must('mke2fs', ['-q', '-F', '-O', 'journal_dev', image])
    await using device = await openHostFile(image)
    await assert.rejects(extType.open(device, {}), { reason: 'ext-journal-device' })
  })
})

describe('mutator', { skip: needsRoot() || TOOLS || needs('e2fsck', 'dumpe2fs', ...SCRATCH_TOOLS) }, () => {
  test('a mutated dirty image never has a block free that its journal says is used', async (context) => {
    const random = new Random()
    await using area = await scratch(1024)
    const image = area.file('image')
    const frozen = area.file('frozen')
    await writeFile(image, '')
    await truncate(image, 128 * 2 ** 20)
    await must('mke2fs', ['-q', '-F', '-t', 'ext4', '-b', '4096', '-J', 'size=4', image])
    {
      await using mount = await mounted(image)
      const load = new Workload(mount.path, { seed: random.seed, keepBytes: 40 << 20, fsyncTenths: 8 })
      await load.run(200)
      load.start()
      await snapshot(image, frozen)
      await load.stop()
    }
    await using device = new MemoryDevice(await readFile(frozen))
    assert.notEqual(await answer(device), 'refused')
    // What the kernel would find used. What was used before the replay only is our margin, which nothing guards.
    await snapshot(frozen, image)
    const replay = await run('e2fsck', ['-E', 'journal_only', '-y', image])
    assert.ok(replay.code <= 1, replay.stderr)
    const { used } = await dumpe2fs(image, device.size)
    const sb = await readSuperblock(device)
    const descriptors = await readDescriptors(device, sb)
    const log = Array.from(
      (
        await must('debugfs', ['-c', '-f', '-', frozen], {
          input: Array.from({ length: 1024 }, (_, i) => `bmap <8> ${i}`).join('\n'),
        })
      ).matchAll(/^(\d+)$/gm),
      (match) => Number(match[1]),
    )
    const journalBlocks = await usedLogBlocks(frozen)
    const blocks = [
      0,
      1,
      descriptors.blockBitmap(0),
      descriptors.inodeTable(0),
      log[0]!,
      ...journalBlocks.map((index) => log[index]!),
    ]
    let refused = 0
    const rounds = 600
    for (let i = 0; i < rounds; i++) {
      await using overlay = new OverlayDevice(device)
      const block = random.pick(blocks)
      // The first bytes hold the headers, and are drawn more often.
      const at =
        block * 4096 + (block === 0 ? 1024 + random.below(1024) : Math.floor(4096 * random.next() ** 3))
      const length = 1 + random.below(random.pick([1, 4, 32]))
      const bytes = random.below(3) === 0 ? new Uint8Array(length) : random.bytes(length)
      overlay.patch(at, bytes.subarray(0, Math.min(length, device.size - at)))
      const found = await answer(overlay)
      if (found === 'refused') refused++
      assertSafe(
        found,
        used,
        `seed ${random.seed}, round ${i}, ${length} bytes at block ${block}+${at % 4096}`,
      )
    }
    context.diagnostic(`${refused} of ${rounds} refused, seed ${random.seed}`)
  })
})

/**
 * Indices of the blocks of the journal that hold the live log, its last commit block left out: without its magic
 * or sequence it is a commit that was never made, and nobody can tell.
 */
async function usedLogBlocks(image: string): Promise<number[]> {
  const text = await must('debugfs', ['-c', '-R', 'logdump', image])
  const control = Array.from(text.matchAll(/type (\d) .* at block (\d+)/g), (match) => ({
    type: Number(match[1]),
    block: Number(match[2]),
  }))
  const last = control.findLast(({ type }) => type === BLOCK_TYPE.commit)
  assert.ok(last && control.length > 20, 'a live log')
  const all: number[] = []
  for (const { block } of control) all.push(block, block + 1)
  return all.filter((block) => block < 1024 && block !== last.block)
}

/** Random garbage over a whole file system without checksums: no hang, no foreign exception. */
describe('garbage', { skip: TOOLS }, () => {
  test('random bytes over metadata without checksums', async () => {
    await using dir = await tempDir()
    const random = new Random()
    let audited = 0
    for (const args of [
      ['-t', 'ext3'],
      ['-t', 'ext4', '-O', '^metadata_csum'],
    ]) {
      const image = dir.file('image')
      await makeImage(image, args, 16)
      await must('debugfs', ['-w', '-R', 'feature needs_recovery', image])
      const file = await open(image, 'r+')
      try {
        for (let i = 0; i < 400; i++) {
          const from = random.below(2 << 20)
          await file.write(random.bytes(1 + random.below(64)), 0, undefined, from)
          if (from < 4096) {
            const view = new DataView(new ArrayBuffer(2))
            view.setUint16(0, 0xef53, true)
            await file.write(new Uint8Array(view.buffer), 0, 2, 1024 + 0x38)
          }
          if (i % 4 === 0) {
            await using device = await openHostFile(image)
            await answer(device)
            if ((await auditAnswer(device)) !== 'refused') audited++
          }
        }
      } finally {
        await file.close()
      }
    }
    assert.ok(audited > 0, 'some of it could still be read')
  })

  test('random bytes over inodes, directories and their trees end the audit or change its answer, no more', async () => {
    await using dir = await tempDir()
    const random = new Random()
    for (const args of [
      ['-t', 'ext3'],
      ['-t', 'ext4', '-O', '^metadata_csum'],
      ['-t', 'ext4'],
    ]) {
      const image = dir.file('image')
      await makeImage(image, [...args, '-b', '1024'], 16)
      await using device = new MemoryDevice(await readFile(image))
      const sb = await readSuperblock(device)
      const descriptors = await readDescriptors(device, sb)
      const table = descriptors.inodeTable(0) * sb.blockBytes
      const expected = await auditAnswer(device)
      assert.ok(expected !== 'refused')
      let [refused, changed] = [0, 0]
      for (let i = 0; i < 600; i++) {
        await using overlay = new OverlayDevice(device)
        overlay.patch(table + random.below(60 * sb.inodeSize), random.bytes(1 + random.below(8)))
        const found = await auditAnswer(overlay)
        if (found === 'refused') refused++
        else if (!found.equals(expected)) changed++
      }
      assert.ok(refused > 50, `${refused} refused, ${changed} changed, seed ${random.seed}`)
      // Under checksums nothing gets through.
      if (!args.includes('-O')) assert.ok(args.includes('ext3') || changed === 0)
    }
  })
})
