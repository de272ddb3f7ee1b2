/**
 * The second opinion, end to end: images that are consistent but for one block, which a file owns and the block map
 * calls free. Without the audit nothing can tell; with it the region is in use as a whole.
 */
import assert from 'node:assert/strict'
import { open, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { crc32c } from '../../src/base/index.ts'
import { openHostFile } from '../../src/device/index.ts'
import { mapInUse } from '../../src/inuse/index.ts'
import { must, needs, tempDir } from '../kit/index.ts'

const MIB = 2 ** 20
const FILE_BYTES = 300_000

interface Made {
  readonly image: string
  /** A folder with one file `f` of FILE_BYTES. */
  readonly folder: string
}

interface Case {
  readonly name: string
  readonly tools: readonly string[]
  readonly bytes: number
  readonly make: (made: Made) => Promise<void>
  /** Makes the block map call a block of `f` free, or `f` own a free one. Returns the block's offset. */
  readonly breakIt: (made: Made) => Promise<number>
}

const CASES: readonly Case[] = [
  ...['metadata_csum', '^metadata_csum,^uninit_bg'].map(
    (features): Case => ({
      name: `ext4 with ${features}`,
      tools: ['mke2fs', 'debugfs', 'dumpe2fs'],
      bytes: 64 * MIB,
      make: async ({ image, folder }) => {
        await must('mke2fs', ['-q', '-t', 'ext4', '-b', '4096', '-O', features, '-d', folder, image])
      },
      breakIt: async ({ image }) => {
        const debugfs = (request: string): Promise<string> => must('debugfs', ['-w', '-R', request, image])
        const block = Number(/\d+/.exec(await debugfs('blocks /f'))![0])
        const before = await must('dumpe2fs', [image])
        const inAll = Number(/^Free blocks:\s+(\d+)/m.exec(before)![1])
        const inGroup = Number(/^\s+(\d+) free blocks/m.exec(before)![1])
        await debugfs(`freeb ${block}`)
        await debugfs(`set_bg 0 free_blocks_count ${inGroup + 1}`)
        await debugfs(`set_super_value free_blocks_count ${inAll + 1}`)
        await debugfs('set_bg 0 checksum calc')
        return block * 4096
      },
    }),
  ),
  {
    name: 'NTFS',
    tools: ['mkntfs', 'ntfscp', 'ntfsinfo'],
    bytes: 64 * MIB,
    make: async ({ image, folder }) => {
      await must('mkntfs', ['-q', '-Q', '-F', '-p', '0', '-H', '0', '-S', '0', '-c', '4096', image])
      await must('ntfscp', [image, `${folder}/f`, 'f'])
    },
    breakIt: async ({ image }) => {
      const firstRun = async (args: readonly string[]): Promise<number> =>
        Number(/Runlist:.*\n\s+0x0\s+(0x[0-9a-f]+)/i.exec(await must('ntfsinfo', ['-v', ...args, image]))![1])
      const cluster = await firstRun(['-F', 'f'])
      const bitmap = (await firstRun(['-i', '6'])) * 4096
      await patch(image, bitmap + Math.floor(cluster / 8), 1, (bytes) => {
        bytes[0]! &= ~(1 << (cluster % 8))
      })
      return cluster * 4096
    },
  },
  {
    // The other way round: the map is true, and the file's extent points to a place that it calls free.
    name: 'Btrfs',
    tools: ['mkfs.btrfs', 'btrfs', 'btrfs-map-logical'],
    bytes: 200 * MIB,
    make: async ({ image, folder }) => {
      const profile = ['-m', 'single', '-d', 'single']
      await must('mkfs.btrfs', ['-q', '-n', '4096', ...profile, '--rootdir', folder, image])
    },
    breakIt: async ({ image }) => {
      const dump = await must('btrfs', ['inspect-internal', 'dump-tree', '-t', '5', image])
      const leaf = Number(/^leaf (\d+)/m.exec(dump)![1])
      const extent = BigInt(/extent data disk byte (\d+)/.exec(dump)![1]!)
      const physical = async (logical: number): Promise<number> =>
        Number(/physical (\d+)/.exec(await must('btrfs-map-logical', ['-l', `${logical}`, image]))![1])
      const wrong = extent + 1_048_576n
      await patch(image, await physical(leaf), 4096, (bytes) => {
        const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
        let found = 0
        for (let at = 101; at + 8 <= bytes.length; at++) {
          if (view.getBigUint64(at, true) !== extent) continue
          view.setBigUint64(at, wrong, true)
          found += 1
        }
        assert.equal(found, 1)
        view.setUint32(0, crc32c(bytes.subarray(32)), true)
      })
      return (await physical(Number(extent))) + 1_048_576
    },
  },
  {
    name: 'FAT32',
    tools: ['mkfs.fat', 'mcopy'],
    bytes: 64 * MIB,
    make: async ({ image, folder }) => {
      await must('mkfs.fat', ['-F', '32', '-s', '1', '-R', '32', image])
      await must('mcopy', ['-i', image, `${folder}/f`, '::f'])
    },
    breakIt: async ({ image }) => {
      let fatBytes = 0
      await patch(image, 0, 512, (boot) => {
        fatBytes = new DataView(boot.buffer, boot.byteOffset).getUint32(36, true) * 512
      })
      // The root directory is cluster 2, the file goes on from 3 or 4: its second cluster, free in both copies.
      for (const at of [32 * 512, 32 * 512 + fatBytes]) {
        await patch(image, at + 5 * 4, 4, (entry) => entry.fill(0))
      }
      return 32 * 512 + 2 * fatBytes + 3 * 512
    },
  },
]

async function patch(
  image: string,
  at: number,
  length: number,
  change: (bytes: Uint8Array) => void,
): Promise<void> {
  const file = await open(image, 'r+')
  try {
    const bytes = new Uint8Array(length)
    await file.read(bytes, 0, length, at)
    change(bytes)
    await file.write(bytes, 0, length, at)
  } finally {
    await file.close()
  }
}

describe('audit', () => {
  for (const { name, tools, bytes, make, breakIt } of CASES) {
    test(`${name}: one block with an owner that is free in the map makes all of it in use`, {
      skip: needs(...tools),
    }, async () => {
      await using dir = await tempDir()
      const image = dir.file('image')
      const folder = dir.file('folder')
      await must('mkdir', [folder])
      await writeFile(`${folder}/f`, Buffer.alloc(FILE_BYTES, 7))
      await writeFile(image, '')
      await truncate(image, bytes)
      await make({ image, folder })
      const region = async (audit: boolean) => {
        await using device = await openHostFile(image)
        const map = await mapInUse(device, { audit })
        assert.equal(map.regions.length, 1)
        return { ranges: map.ranges, ...map.regions[0]! }
      }
      const whole = await region(true)
      assert.equal(whole.trust, 'exact', whole.reason?.text ?? 'not exact')
      assert.equal(whole.state, 'clean; audited')

      const at = await breakIt({ image, folder })
      const unaudited = await region(false)
      assert.equal(unaudited.trust, 'exact', unaudited.reason?.text ?? 'not exact')
      assert.ok(!unaudited.ranges.has(at), 'the map lacks the block')
      const audited = await region(true)
      assert.equal(audited.trust, 'assumed')
      assert.equal(audited.reason?.code, 'audit-mismatch', audited.reason?.text ?? 'no reason')
      assert.match(audited.reason?.text ?? '', new RegExp(`first at ${at}$`))
      assert.equal(audited.inUseBytes, bytes)
    })
  }
})
