/** Poison for ext4 and ext3: clean, and frozen while written to. */
import assert from 'node:assert/strict'
import { rm, stat, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { setTimeout } from 'node:timers/promises'
import { openHostFile } from '../../src/device/index.ts'
import { RangeSet } from '../../src/extents/index.ts'
import { extType } from '../../src/filesystems/ext/index.ts'
import type { UsedMap } from '../../src/filesystems/file-system.ts'
import { must, needs, needsRoot, patternAt, Random, run } from '../kit/index.ts'
import { dumpe2fs } from '../oracle/dumpe2fs.ts'
import {
  assertSurvivesPoison,
  mounted,
  type PoisonSubject,
  readImage,
  SCRATCH_TOOLS,
  scratch,
  snapshot,
  Workload,
} from './index.ts'

interface Variant {
  readonly name: string
  readonly mkfs: readonly string[]
  readonly mib: number
  /** Options of the mount under load. */
  readonly mount?: string
  /** Go on until the live log wraps. */
  readonly wrapped?: boolean
  readonly fsyncTenths?: number
}

const VARIANTS: readonly Variant[] = [
  { name: 'checksum v3', mkfs: ['-t', 'ext4'], mib: 256 },
  { name: 'no checksums', mkfs: ['-t', 'ext4', '-O', '^metadata_csum'], mib: 256 },
  { name: '1k blocks', mkfs: ['-t', 'ext4', '-b', '1024'], mib: 192 },
  { name: '32 bit', mkfs: ['-t', 'ext4', '-O', '^64bit'], mib: 256 },
  { name: 'log wrapped', mkfs: ['-t', 'ext4', '-J', 'size=4'], mib: 128, wrapped: true, fsyncTenths: 9 },
  {
    name: 'log wrapped, 1k blocks, no checksums',
    mkfs: ['-t', 'ext4', '-b', '1024', '-J', 'size=2', '-O', '^metadata_csum'],
    mib: 128,
    wrapped: true,
    fsyncTenths: 9,
  },
  {
    name: 'transaction checksums, async commit',
    mkfs: ['-t', 'ext4', '-O', '^metadata_csum'],
    mib: 192,
    mount: 'journal_async_commit,data=writeback',
  },
  {
    name: 'checksum v3, async commit',
    mkfs: ['-t', 'ext4'],
    mib: 192,
    mount: 'journal_async_commit,data=writeback',
  },
  { name: 'data=journal', mkfs: ['-t', 'ext4', '-J', 'size=16'], mib: 192, mount: 'data=journal' },
  { name: 'bigalloc', mkfs: ['-t', 'ext4', '-O', 'bigalloc', '-C', '16384'], mib: 256 },
  { name: 'fast commit', mkfs: ['-t', 'ext4', '-O', 'fast_commit'], mib: 256, fsyncTenths: 5 },
  { name: 'ext3', mkfs: ['-t', 'ext3'], mib: 192 },
]

const SKIP = needsRoot() || needs('mke2fs', 'e2fsck', 'dumpe2fs', 'debugfs', ...SCRATCH_TOOLS)
const SNAPSHOTS = 2

const CLEAN: readonly (readonly string[])[] = [
  ['-t', 'ext4'],
  ['-t', 'ext4', '-b', '1024', '-O', '^metadata_csum,uninit_bg'],
  ['-t', 'ext4', '-O', 'bigalloc,inline_data', '-C', '16384'],
  ['-t', 'ext2', '-b', '1024'],
]

async function make(image: string, mkfs: readonly string[], mib: number): Promise<void> {
  await writeFile(image, '')
  await truncate(image, mib * 2 ** 20)
  await must('mke2fs', ['-q', '-F', ...mkfs, image])
}

/** The map; all that the inodes own is in it, seen after the replay. */
async function usedOf(image: string): Promise<UsedMap> {
  await using device = await openHostFile(image)
  const fs = await extType.open(device, {})
  const used = await fs.used({})
  const owned = await fs.audit!({})
  assert.ok(owned.size > 0)
  assert.equal(owned.subtract(used.ranges).toString(), '', 'owned and not used')
  return used
}

function subject(image: string, used: UsedMap): PoisonSubject {
  return {
    image,
    used: used.ranges,
    read: readImage,
    async check(copy) {
      const result = await run('e2fsck', ['-fn', copy])
      assert.equal(result.code, 0, `e2fsck -fn: ${result.stdout.toString()}`)
    },
  }
}

/**
 * For fast commits: the kernel's own replay of them leaves counts that e2fsck corrects, now and then, so the poisoned
 * copy must be just as the untouched one, whatever e2fsck says of that.
 */
function subjectAsKernelLeavesIt(image: string, used: UsedMap): PoisonSubject {
  const said: string[] = []
  return {
    ...subject(image, used),
    async check(copy) {
      const result = await run('e2fsck', ['-fn', copy])
      said.push(`exit ${result.code}: ${result.stdout.toString().replaceAll(copy, 'image')}`)
      if (said.length > 1) assert.equal(said[1], said[0], 'e2fsck finds the same with and without poison')
    },
  }
}

/**
 * True when the live log runs over the end of the journal: `logdump` goes through it in order. `-c`: bitmaps, whose
 * checksums need not fit before the replay, are not asked.
 */
async function logIsWrapped(image: string): Promise<boolean> {
  const text = await must('debugfs', ['-c', '-R', 'logdump', image])
  const blocks = Array.from(text.matchAll(/sequence \d+, type \d .* at block (\d+)/g), (match) =>
    Number(match[1]),
  )
  return blocks.some((block, i) => i > 0 && block < blocks[i - 1]!)
}

describe('ext survives poison', { skip: SKIP }, () => {
  for (const mkfs of CLEAN) {
    test(`clean: mke2fs ${mkfs.join(' ')}`, async (context) => {
      const { seed } = new Random()
      context.diagnostic(`seed ${seed}`)
      await using area = await scratch()
      const image = area.file('image')
      await make(image, mkfs, 192)
      {
        await using mount = await mounted(image)
        await new Workload(mount.path, { seed, keepBytes: 48 << 20, fsyncTenths: 0 }).run(400)
      }
      const used = await usedOf(image)
      assert.equal(used.trust, 'exact')
      const { files } = await assertSurvivesPoison(subject(image, used))
      context.diagnostic(`${files} files`)
    })
  }

  test('a block that is left out is found', async () => {
    await using area = await scratch()
    const image = area.file('image')
    await make(image, ['-t', 'ext4', '-b', '4096'], 64)
    {
      await using mount = await mounted(image)
      await writeFile(join(mount.path, 'file'), patternAt(0, 20_000))
    }
    const used = await usedOf(image)
    const block = Number(/\d+/.exec(await must('debugfs', ['-R', 'bmap file 2', image]))![0])
    const hole = RangeSet.of(block * 4096, (block + 1) * 4096)
    assert.equal(hole.subtract(used.ranges).toString(), '', 'the block of the file is in use')
    const wrong = { ...used, ranges: used.ranges.subtract(hole) }
    await assert.rejects(assertSurvivesPoison(subject(image, wrong)), /files differ after poison/)
    await assertSurvivesPoison(subject(image, used))
  })

  for (const variant of VARIANTS) {
    test(`frozen under load: ${variant.name}`, async (context) => {
      const { seed } = new Random()
      context.diagnostic(`seed ${seed}`)
      await using area = await scratch()
      const image = area.file('image')
      await make(image, variant.mkfs, variant.mib)
      const frozen: string[] = []
      {
        await using mount = await mounted(
          image,
          variant.mount === undefined ? {} : { options: variant.mount },
        )
        const load = new Workload(mount.path, {
          seed,
          keepBytes: variant.mib * 2 ** 18,
          ...(variant.wrapped ? { largestBytes: 60_000 } : {}),
          ...(variant.fsyncTenths === undefined ? {} : { fsyncTenths: variant.fsyncTenths }),
        })
        load.start()
        try {
          for (let i = 0; i < SNAPSHOTS; i++) {
            for (let attempt = 0; ; attempt++) {
              await setTimeout(variant.wrapped ? 200 : 400)
              const copy = area.file(`frozen-${i}`)
              await snapshot(image, copy)
              // A moment with an empty journal shows nothing of the replay.
              const wanted = variant.wrapped
                ? await logIsWrapped(copy)
                : (await usedOf(copy)).trust === 'replayed'
              if (wanted) {
                frozen.push(copy)
                break
              }
              assert.ok(attempt < 100, 'the journal is in use (and wraps) sooner or later')
            }
          }
        } finally {
          await load.stop()
        }
      }
      for (const copy of frozen) {
        const used = await usedOf(copy)
        assert.equal(used.trust, 'replayed')
        const { size } = await stat(copy)
        const { files, poisonedBytes } = await assertSurvivesPoison(
          variant.name === 'fast commit' ? subjectAsKernelLeavesIt(copy, used) : subject(copy, used),
        )
        context.diagnostic(`${files} files, ${poisonedBytes >> 20} MiB poisoned of ${size >> 20}`)
        // e2fsck 1.47.0 leaves a superblock with a wrong checksum after a replay with fast commits.
        if (variant.name !== 'fast commit') await compareWithReplay(copy, used)
      }
    })
  }
})

/**
 * In use is exactly what is used after the replay (which e2fsck does here, and nothing else) and what was before
 * it; and all that the kernel finds used after it has mounted the image is among it.
 */
async function compareWithReplay(image: string, used: UsedMap): Promise<void> {
  const { size } = await stat(image)
  const copy = `${image}.replayed`
  try {
    const before = await dumpe2fs(image, size, { dirty: true })
    await snapshot(image, copy)
    const result = await run('e2fsck', ['-E', 'journal_only', '-y', copy])
    assert.ok(
      result.code === 0 || result.code === 1,
      `e2fsck -E journal_only: ${result.stdout.toString()}${result.stderr}`,
    )
    const after = await dumpe2fs(copy, size)
    const expected = after.used.union(before.used)
    assert.equal(expected.subtract(used.ranges).toString(), '', 'too little')
    // Files deleted while open are freed by e2fsck in the same go: those blocks it has no more.
    if (!/orphan/i.test(result.stdout.toString())) {
      assert.equal(used.ranges.subtract(expected).toString(), '', 'too much')
    }

    await snapshot(image, copy)
    await (await mounted(copy)).unmount()
    const kernel = await dumpe2fs(copy, size)
    assert.equal(kernel.used.subtract(used.ranges).toString(), '', 'used by the kernel')
  } finally {
    await rm(copy, { force: true })
  }
}
