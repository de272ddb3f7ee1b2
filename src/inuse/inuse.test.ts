import assert from 'node:assert/strict'
import { readFile, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, describe, test } from 'node:test'
import { livePages, mutate } from '../../test/fuzz/mutations.ts'
import { must, needs, Random, tempDir } from '../../test/kit/index.ts'
import { isVarveError, VarveError } from '../base/index.ts'
import {
  type BlockDevice,
  ConcatDevice,
  CountingDevice,
  FaultDevice,
  MemoryDevice,
  openHostFile,
  SliceDevice,
} from '../device/index.ts'
import { RangeSet } from '../extents/index.ts'
import { FILE_SYSTEM_TYPES, type FileSystemType, NotTrusted } from '../filesystems/index.ts'
import { VOLUME_SCHEMES, type VolumeScheme } from '../volumes/index.ts'
import { type InUseMap, mapInUse, mapInUseTogether, type Region } from './index.ts'
import { mapDisks } from './map.ts'

const MIB = 1_048_576
const GOLDEN = join(import.meta.dirname, '../../test/golden')

/** All that holds for every map. */
function checkMap(map: InUseMap): void {
  const leaves: Region[] = []
  const visit = (regions: readonly Region[], start: number, end: number): void => {
    let at = start
    for (const region of regions) {
      assert.equal(region.offset, at)
      assert.ok(region.length > 0)
      at += region.length
      const inside = map.ranges.clip(region.offset, region.offset + region.length)
      assert.equal(region.inUseBytes, inside.size, `${region.kind} at ${region.offset}`)
      // A member of a group is as trusted as the group's volumes, which say why themselves.
      if (region.trust === 'assumed' && !region.children && region.kind !== 'span') {
        assert.ok(region.reason, 'assumed has a reason')
      }
      if (region.reason) {
        assert.match(region.reason.code, /^[a-z][a-z0-9-]+$/)
        assert.notEqual(region.reason.code, 'reader-failed', region.reason.text)
        assert.equal(region.inUseBytes, region.length, 'what has a reason is in use')
      }
      if (['mbr', 'gpt', 'gap', 'unknown'].includes(region.kind)) {
        assert.equal(region.inUseBytes, region.length, `${region.kind} is in use`)
      }
      if (region.children) visit(region.children, region.offset, region.offset + region.length)
      else leaves.push(region)
    }
    assert.equal(at, end)
  }
  visit(map.regions, 0, map.size)
  assert.equal(map.inUseBytes, map.ranges.size)
  assert.ok(map.assumed.subtract(map.ranges).isEmpty, 'what is assumed is in use')
  for (const leaf of leaves) {
    const assumed = map.assumed.clip(leaf.offset, leaf.offset + leaf.length).size
    if (leaf.reason) assert.equal(assumed, leaf.length, 'what has a reason is assumed')
    else if (leaf.trust !== 'assumed') assert.equal(assumed, 0, `${leaf.kind} is vouched for`)
  }
  assert.equal(
    leaves.reduce((sum, leaf) => sum + leaf.inUseBytes, 0),
    map.inUseBytes,
  )
}

async function mapOf(disk: BlockDevice | Uint8Array): Promise<InUseMap> {
  const map = await mapInUse(disk instanceof Uint8Array ? new MemoryDevice(disk) : disk)
  checkMap(map)
  return map
}

const goldens = new Map<string, Promise<Uint8Array>>()
/** A fresh copy of a golden disk. */
async function golden(name: string): Promise<Uint8Array> {
  let made = goldens.get(name)
  if (!made) {
    made = (async () => {
      await using dir = await tempDir()
      const raw = dir.file('raw')
      await must('qemu-img', ['convert', '-O', 'raw', join(GOLDEN, `${name}.qcow2`), raw])
      return new Uint8Array(await readFile(raw))
    })()
    goldens.set(name, made)
  }
  return (await made).slice()
}
after(() => goldens.clear())

const short = (regions: readonly Region[]): unknown[] =>
  regions.map((region) =>
    region.children
      ? [region.kind, ...short(region.children)]
      : region.reason
        ? `${region.kind}: ${region.reason.code}`
        : region.kind,
  )

/** A small swap area: the simplest thing with a known map. `pages` of 4096 bytes. */
function swapArea(pages: number): Uint8Array {
  const bytes = new Uint8Array(pages * 4096)
  bytes.set(Buffer.from('SWAPSPACE2'), 4086)
  const view = new DataView(bytes.buffer)
  view.setUint32(1024, 1, true)
  view.setUint32(1028, pages - 1, true)
  return bytes
}

function mbrDisk(
  size: number,
  partitions: readonly (readonly [first: number, bytes: Uint8Array])[],
): Uint8Array {
  const disk = new Uint8Array(size)
  const view = new DataView(disk.buffer)
  for (const [i, [first, bytes]] of partitions.entries()) {
    view.setUint8(446 + i * 16 + 4, 0x83)
    view.setUint32(446 + i * 16 + 8, first / 512, true)
    view.setUint32(446 + i * 16 + 12, bytes.length / 512, true)
    disk.set(bytes, first)
  }
  disk.set([0x55, 0xaa], 510)
  return disk
}

describe('mapInUse', () => {
  test('GPT with ESP, ext4 and swap', { skip: needs('qemu-img') }, async () => {
    const map = await mapOf(await golden('disk-gpt-ext4-fat-swap'))
    assert.deepEqual(short(map.regions), [
      'gpt',
      'gap',
      ['partition', 'fat12'],
      ['partition', 'ext4'],
      'gap',
      ['partition', 'swap'],
      'gap',
      'gpt',
    ])
    const [esp, root, swapped] = map.regions.filter(({ kind }) => kind === 'partition')
    assert.deepEqual([esp!.name, esp!.label, esp!.trust], ['1', 'esp', 'exact'])
    assert.deepEqual([esp!.children![0]!.uuid, esp!.children![0]!.label], ['1234-5678', 'ESP'])
    assert.equal(root!.children![0]!.uuid, '5a5a0000-0000-4000-8000-000000000005')
    assert.equal(root!.uuid, '5a5a0000-0000-4000-8000-000000000003')
    assert.equal(swapped!.inUseBytes, 4096)
    assert.equal(map.regions[0]!.uuid, '5a5a0000-0000-4000-8000-000000000001')
  })

  test('MBR with logical partitions', { skip: needs('qemu-img') }, async () => {
    const map = await mapOf(await golden('disk-mbr-logical'))
    assert.deepEqual(
      short(map.regions).filter((one) => one !== 'gap'),
      ['mbr', ['partition', 'ext2'], 'mbr', ['partition', 'fat16'], 'mbr', ['partition', 'ext3']],
    )
    assert.deepEqual(
      map.regions.filter(({ kind }) => kind === 'partition').map(({ name }) => name),
      ['1', '5', '6'],
    )
  })

  test('a whole disk with a file system', { skip: needs('qemu-img') }, async () => {
    assert.deepEqual(short((await mapOf(await golden('disk-xfs-clean'))).regions), ['xfs'])
    const dirty = await mapOf(await golden('disk-ext4-dirty'))
    assert.deepEqual(
      dirty.regions.map(({ kind, trust, state }) => [kind, trust, state]),
      [['ext4', 'replayed', 'dirty: journal replayed']],
    )
  })

  test('a partition has the map that its file system has alone, moved', {
    skip: needs('qemu-img'),
  }, async () => {
    const disk = await golden('disk-gpt-ext4-fat-swap')
    const map = await mapOf(disk)
    for (const { offset, length, kind } of map.regions) {
      if (kind !== 'partition') continue
      const alone = await mapOf(disk.subarray(offset, offset + length))
      assert.ok(alone.ranges.shift(offset).equals(map.ranges.clip(offset, offset + length)))
    }
  })

  test('nothing at all, zeros and noise: in use as unknown', async () => {
    assert.deepEqual(await mapOf(new Uint8Array(0)), {
      size: 0,
      ranges: RangeSet.empty,
      assumed: RangeSet.empty,
      regions: [],
      inUseBytes: 0,
    })
    const random = new Random(1)
    for (const size of [1, 100, 511, 512, 513, 4096, 100_000, MIB]) {
      for (const disk of [new Uint8Array(size), random.bytes(size)]) {
        const map = await mapOf(disk)
        assert.deepEqual(short(map.regions), ['unknown: unknown-content'], `${size} bytes`)
      }
    }
  })

  test('two signatures on one region: ambiguous, in use', async () => {
    const swapped = swapArea(64)
    const both = swapped.slice()
    both.set(Buffer.from('LUKS\xba\xbe', 'latin1'))
    assert.deepEqual(short((await mapOf(both)).regions), ['unknown: ambiguous-signature'])
    // A partition table over an older file system of the whole disk: which one lives?
    const under = mbrDisk(swapped.length, [[32_768, swapArea(8)]])
    assert.deepEqual(short((await mapOf(under)).regions), ['mbr', 'gap', ['partition', 'swap'], 'gap'])
    under.set(Buffer.from('SWAPSPACE2'), 4086)
    assert.deepEqual(short((await mapOf(under)).regions), ['unknown: ambiguous-signature'])
  })

  test('superfloppy or partition table: a FAT boot sector decides', { skip: needs('mkfs.fat') }, async () => {
    await using dir = await tempDir()
    const image = dir.file('image')
    await writeFile(image, '')
    await truncate(image, MIB)
    await must('mkfs.fat', [image])
    const disk = new Uint8Array(await readFile(image))
    assert.deepEqual(short((await mapOf(disk)).regions), ['fat12'])
    // Boot code in the place of the table, as Windows writes it: text, no status bytes.
    disk.set(
      Buffer.from('Remove disks or other media.\xff\r\nDisk error\xff\r\nPress any key', 'latin1'),
      446,
    )
    assert.deepEqual(short((await mapOf(disk)).regions), ['fat12'])
    // A table that could be one, beside a boot sector that could be one.
    disk.fill(0, 446, 510)
    new DataView(disk.buffer).setUint32(446 + 8, 8, true)
    new DataView(disk.buffer).setUint32(446 + 12, 8, true)
    assert.deepEqual(short((await mapOf(disk)).regions), ['unknown: ambiguous-signature'])
  })

  test('a member of a RAID wins over the file system that shows through', async () => {
    const disk = new Uint8Array(MIB)
    disk.set(swapArea(64))
    assert.deepEqual(short((await mapOf(disk)).regions), ['swap'])
    disk.set([0xfc, 0x4e, 0x2b, 0xa9], MIB - 65_536)
    assert.deepEqual(short((await mapOf(disk)).regions), ['md: md-super-invalid'])
  })

  test('a partition table inside a partition is not followed', async () => {
    const inner = mbrDisk(64 * 4096, [[32_768, swapArea(8)]])
    const disk = mbrDisk(MIB, [[65_536, inner]])
    assert.deepEqual(short((await mapOf(disk)).regions), [
      'mbr',
      'gap',
      ['partition', 'unknown: unknown-content'],
      'gap',
    ])
  })

  test('ranges are rounded outward to sectors, and stay inside an odd-sized disk', async () => {
    const area = swapArea(16)
    const disk = new Uint8Array(area.length + 77)
    disk.set(area)
    const map = await mapInUse(new MemoryDevice(disk, 4096))
    checkMap(map)
    assert.equal(String(map.ranges), `[0,4096) [${area.length},${area.length + 77})`)
  })
})

describe('mapInUse, when something fails', () => {
  /** A file system whose reader does as told; its signature is the text at 0. */
  const reader = (name: string, used: (device: BlockDevice) => Promise<never>): FileSystemType => ({
    name,
    probe: async (device) => {
      const into = new Uint8Array(4)
      if (device.size < 4) return false
      await device.read(0, into)
      return Buffer.from(into).toString('latin1') === name
    },
    open: async (device) => ({
      kind: name,
      uuid: 'u',
      size: device.size,
      blockBytes: 512,
      used: () => used(device),
    }),
  })
  const failing = (error: () => unknown) => ({
    schemes: VOLUME_SCHEMES,
    types: [
      ...FILE_SYSTEM_TYPES,
      reader('BAD1', async () => {
        throw error()
      }),
    ],
  })
  const disk = (): Uint8Array => {
    const bad = new Uint8Array(65_536)
    bad.set(Buffer.from('BAD1'))
    return mbrDisk(MIB, [
      [65_536, swapArea(16)],
      [131_072, bad],
      [196_608, swapArea(16)],
    ])
  }

  test('what a reader cannot vouch for is in use with its reason; its neighbours keep their verdicts', async () => {
    const cases: [unknown, string, string][] = [
      [new NotTrusted('fat-size-mismatch', 'x', { kind: 'thing', label: 'l' }), 'thing', 'fat-size-mismatch'],
      [new VarveError('CORRUPT', 'x'), 'BAD1', 'corrupt'],
      [new VarveError('LIMIT', 'x'), 'BAD1', 'over-limit'],
      [new VarveError('UNSUPPORTED', 'x'), 'BAD1', 'unsupported'],
      [new RangeError('x'), 'BAD1', 'reader-failed'],
      [new VarveError('INTERNAL', 'x'), 'BAD1', 'reader-failed'],
    ]
    for (const [error, kind, code] of cases) {
      const logged: string[] = []
      const [map] = await mapDisks(
        [new MemoryDevice(disk())],
        { log: (level, message) => logged.push(`${level} ${message}`) },
        failing(() => error),
      )
      const parts = map!.regions.filter((region) => region.kind === 'partition')
      assert.deepEqual(
        parts.map(({ inUseBytes, trust }) => [inUseBytes, trust]),
        [
          [4096, 'exact'],
          [65_536, 'assumed'],
          [4096, 'exact'],
        ],
      )
      const [region] = parts[1]!.children!
      assert.deepEqual([region!.kind, region!.uuid, region!.reason?.code], [kind, 'u', code])
      assert.equal(logged.length, code === 'reader-failed' ? 1 : 0)
    }
  })

  test('ranges outside the device are a bug of the reader, and harmless', async () => {
    const outside: FileSystemType = {
      ...reader('BAD1', async () => {
        throw new Error('not called')
      }),
      open: async (device) => ({
        kind: 'BAD1',
        size: device.size,
        blockBytes: 512,
        used: async () => ({ ranges: RangeSet.of(0, device.size + 1), trust: 'exact', state: 'clean' }),
      }),
    }
    const [map] = await mapDisks(
      [new MemoryDevice(disk())],
      {},
      {
        schemes: VOLUME_SCHEMES,
        types: [...FILE_SYSTEM_TYPES, outside],
      },
    )
    assert.equal(map!.regions.flatMap(({ children }) => children ?? [])[1]!.reason?.code, 'reader-failed')
  })

  test('a file system larger than its partition is in use', async () => {
    const large: FileSystemType = {
      ...reader('BAD1', async () => {
        throw new Error('not called')
      }),
      open: async (device) => ({
        kind: 'BAD1',
        size: device.size + 512,
        blockBytes: 512,
        used: async () => ({ ranges: RangeSet.empty, trust: 'exact', state: 'clean' }),
      }),
    }
    const [map] = await mapDisks(
      [new MemoryDevice(disk())],
      {},
      {
        schemes: VOLUME_SCHEMES,
        types: [...FILE_SYSTEM_TYPES, large],
      },
    )
    assert.equal(map!.regions.flatMap(({ children }) => children ?? [])[1]!.reason?.code, 'size-mismatch')
  })

  test('a disk that cannot be read fails the map, wherever it fails', async () => {
    for (const at of [0, 65_536, 131_072, 196_608 + 1024]) {
      const faulty = new FaultDevice(new MemoryDevice(disk()), {
        rules: [{ calls: ['read'], range: { start: at, end: at + 1 } }],
      })
      await assert.rejects(mapInUse(faulty), (error) => isVarveError(error, 'IO'), `at ${at}`)
    }
    // Also when the layer below says that the image itself is corrupt.
    const corrupt = new FaultDevice(new MemoryDevice(disk()), {
      rules: [
        { calls: ['read'], range: { start: 65_536, end: 65_537 }, error: new VarveError('CORRUPT', 'L2') },
      ],
    })
    await assert.rejects(mapInUse(corrupt), (error) => isVarveError(error, 'CORRUPT'))
  })

  test('a reader that wraps the disk’s error does not hide it', async () => {
    const wrapping = reader('BAD1', async (device) => {
      try {
        await device.read(32_768, new Uint8Array(512))
        throw new Error('read did not fail')
      } catch (cause) {
        throw new VarveError('CORRUPT', 'wrapped', { cause })
      }
    })
    const faulty = new FaultDevice(new MemoryDevice(disk()), {
      rules: [{ calls: ['read'], range: { start: 131_072 + 32_768, end: 131_072 + 32_769 } }],
    })
    await assert.rejects(
      mapDisks([faulty], {}, { schemes: VOLUME_SCHEMES, types: [wrapping] }),
      (error) => isVarveError(error, 'CORRUPT') && isVarveError(error.cause, 'IO'),
    )
  })

  test('a cancelled call says so', async () => {
    const controller = new AbortController()
    const types = [
      reader('BAD1', async () => {
        controller.abort()
        throw new VarveError('CANCELLED', 'x')
      }),
    ]
    await assert.rejects(
      mapDisks([new MemoryDevice(disk())], { signal: controller.signal }, { schemes: VOLUME_SCHEMES, types }),
      (error) => isVarveError(error, 'CANCELLED'),
    )
  })
})

/**
 * A volume manager for the tests: a member starts with "SPAN", group letter, number and count; its first sector is
 * metadata, and the volume is the rest of all members, one after another. The last sector of the last member
 * belongs to no volume.
 */
function span(unclaimed: 'in-use' | 'free', volumeHoldsItself = false): VolumeScheme {
  const head = async (device: BlockDevice): Promise<Buffer> => {
    const into = new Uint8Array(7)
    await device.read(0, into)
    return Buffer.from(into)
  }
  return {
    name: 'span',
    scopes: ['disk', 'partition', 'volume'],
    probe: async (device) =>
      device.size >= 1024 && (await head(device)).toString('latin1').startsWith('SPAN'),
    group: async (device) => (await head(device)).toString('latin1', 4, 5),
    open: async (members) => {
      const heads = await Promise.all(members.map(head))
      if (heads.some((one) => one[6] !== members.length))
        throw new NotTrusted('volume-member', 'member missing')
      const order = members.map((_, i) => i).toSorted((a, b) => heads[a]![5]! - heads[b]![5]!)
      const pieces = order.map((index, i) => {
        const device = members[index]!
        const start = volumeHoldsItself ? 0 : 512
        return { index, start, length: device.size - start - (i === order.length - 1 ? 512 : 0) }
      })
      return {
        kind: 'span',
        uuid: heads[0]!.toString('latin1', 4, 5),
        metadata: members.map(() => RangeSet.of(0, 512)),
        unclaimed,
        volumes: [
          {
            name: 'all',
            device: new ConcatDevice(
              pieces.map(({ index, start, length }) => new SliceDevice(members[index]!, start, length)),
            ),
            project: (used) => {
              const sets = members.map(() => RangeSet.empty)
              let at = 0
              for (const { index, start, length } of pieces) {
                sets[index] = used.clip(at, at + length).shift(start - at)
                at += length
              }
              return sets
            },
          },
        ],
      }
    },
  }
}

function member(letter: string, number: number, count: number, content: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(512 + content.length)
  bytes.set(Buffer.from(`SPAN${letter}`))
  bytes.set([number, count], 5)
  bytes.set(content, 512)
  return bytes
}

describe('volume groups', () => {
  const registry = (scheme: VolumeScheme) => ({
    schemes: [scheme, ...VOLUME_SCHEMES],
    types: FILE_SYSTEM_TYPES,
  })
  /** Swap of 20 pages over two members of 10 pages each, one byte of metadata sector before each. */
  const halves = (): [Uint8Array, Uint8Array] => {
    const area = swapArea(20)
    const second = new Uint8Array(area.length / 2 + 512)
    second.set(area.subarray(area.length / 2))
    return [member('a', 0, 2, area.subarray(0, area.length / 2)), member('a', 1, 2, second)]
  }

  test('over two disks: ranges are carried back to each', async () => {
    const disks = halves().map((bytes) => new MemoryDevice(bytes))
    const maps = await mapDisks(disks.toReversed(), {}, registry(span('free')))
    for (const map of maps) checkMap(map)
    const [second, first] = maps
    assert.equal(String(first!.ranges), '[0,4608)')
    assert.equal(String(second!.ranges), '[0,512)')
    assert.deepEqual([second!.regions[0]!.kind, second!.regions[0]!.trust], ['span', 'exact'])
    const [volume] = second!.regions[0]!.volumes!
    assert.deepEqual([volume![0]!.kind, volume![0]!.name, volume![0]!.inUseBytes], ['volume', 'all', 4096])
    assert.equal(volume![0]!.children![0]!.kind, 'swap')
    assert.equal(first!.regions[0]!.volumes, undefined, 'said once')
  })

  test('what belongs to no volume is free or in use as the scheme says', async () => {
    const disks = () => halves().map((bytes) => new MemoryDevice(bytes))
    const [, free] = await mapDisks(disks(), {}, registry(span('free')))
    const [, used] = await mapDisks(disks(), {}, registry(span('in-use')))
    assert.equal(used!.inUseBytes - free!.inUseBytes, 512)
    assert.ok(used!.ranges.covers(used!.size - 512, used!.size))
  })

  test('with a member missing all that is there is in use', async () => {
    const [first, second] = halves()
    for (const disk of [first, second]) {
      const [map] = await mapDisks([new MemoryDevice(disk)], {}, registry(span('free')))
      checkMap(map!)
      assert.deepEqual(short(map!.regions), ['span: volume-member'])
    }
  })

  test('stacked: on partitions of one disk, in a group of the same kind', async () => {
    const [first, second] = halves()
    // Both members of group a lie in group b, which is a partition each.
    const outer = [member('b', 0, 2, first), member('b', 1, 2, new Uint8Array(512))]
    const disk = mbrDisk(MIB, [
      [65_536, outer[0]!],
      [262_144, outer[1]!],
      [524_288, second],
    ])
    // Group a has its second member beside it, in the third partition: it is walked before group b is opened.
    const [map] = await mapDisks([new MemoryDevice(disk)], {}, registry(span('free')))
    checkMap(map!)
    assert.deepEqual(
      map!.regions.filter(({ kind }) => kind === 'partition').map(({ children }) => short(children!)),
      [['span'], ['span'], ['span: volume-member']],
    )
  })

  test('a volume that holds its own members has an end', async () => {
    const bytes = member('a', 0, 1, new Uint8Array(65_536))
    const [map] = await mapDisks([new MemoryDevice(bytes)], {}, registry(span('free', true)))
    checkMap(map!)
    assert.equal(map!.regions[0]!.trust, 'assumed')
  })

  test('a file system over several devices is read together', async () => {
    const type: FileSystemType = {
      name: 'many',
      probe: async (device) => {
        const into = new Uint8Array(4)
        await device.read(0, into)
        return Buffer.from(into).toString() === 'MANY'
      },
      open: async () => assert.fail('not alone'),
      together: {
        group: async () => 'one',
        open: async (devices) => {
          if (devices.length !== 2) throw new NotTrusted('volume-member', 'one is missing', { uuid: 'u' })
          return devices.map((device, i) => ({
            kind: 'many',
            size: device.size,
            blockBytes: 512,
            used: async () => ({ ranges: RangeSet.of(0, 512 * (i + 1)), trust: 'exact', state: 'clean' }),
          }))
        },
      },
    }
    const disk = new Uint8Array(65_536)
    disk.set(Buffer.from('MANY'))
    const types = { schemes: VOLUME_SCHEMES, types: [type] }
    const maps = await mapDisks(
      [new MemoryDevice(mbrDisk(MIB, [[65_536, disk]])), new MemoryDevice(disk)],
      {},
      types,
    )
    for (const map of maps) checkMap(map)
    assert.equal(maps[0]!.regions[2]!.inUseBytes, 512)
    assert.deepEqual(short(maps[0]!.regions), ['mbr', 'gap', ['partition', 'many'], 'gap'])
    assert.equal(maps[1]!.inUseBytes, 1024)
    const [alone] = await mapDisks([new MemoryDevice(disk)], {}, types)
    assert.deepEqual(short(alone!.regions), ['many: volume-member'])
  })

  test('disks mapped together keep their order', async () => {
    const maps = await mapInUseTogether([new MemoryDevice(swapArea(8)), new MemoryDevice(swapArea(16))])
    assert.deepEqual(
      maps.map(({ size }) => size),
      [8 * 4096, 16 * 4096],
    )
  })
})

describe('cost', () => {
  /** 20 GiB of GPT with one partition, the file system made by `mkfs` on a sparse file. */
  async function cost(
    mkfs: string,
    args: readonly string[],
  ): Promise<{ reads: number; bytes: number; map: InUseMap }> {
    await using dir = await tempDir()
    const [frame, part] = [dir.file('frame'), dir.file('part')]
    const partBytes = 20_478 * MIB
    for (const [path, size] of [
      [frame, 20_480 * MIB],
      [part, partBytes],
    ] as const) {
      await writeFile(path, '')
      await truncate(path, size)
    }
    await must('sfdisk', ['-q', frame], {
      input: `label: gpt\nstart=2048, size=${partBytes / 512}, type=L\n`,
    })
    await must(mkfs, [...args, part])
    await using table = await openHostFile(frame)
    await using inside = await openHostFile(part)
    const counting = new CountingDevice(
      new ConcatDevice([
        new SliceDevice(table, 0, MIB),
        new SliceDevice(inside, 0, partBytes),
        new SliceDevice(table, MIB + partBytes, MIB),
      ]),
    )
    const map = await mapInUse(counting)
    checkMap(map)
    const { reads, bytesRead } = counting.counts
    return { reads, bytes: bytesRead, map }
  }

  test('a 20 GiB disk with XFS: 62 KB in at most 64 reads', {
    skip: needs('sfdisk', 'mkfs.xfs'),
  }, async () => {
    const { reads, bytes, map } = await cost('mkfs.xfs', ['-q'])
    assert.deepEqual(short(map.regions), ['gpt', 'gap', ['partition', 'xfs'], 'gap', 'gpt'])
    assert.ok(bytes <= 62_000, `${bytes} bytes`)
    assert.ok(reads <= 64, `${reads} reads`)
    assert.ok(map.inUseBytes < 200 * MIB)
  })

  test('a 20 GiB disk with ext4: 400 KB in at most 64 reads', {
    skip: needs('sfdisk', 'mke2fs'),
  }, async () => {
    const { reads, bytes, map } = await cost('mke2fs', ['-q', '-t', 'ext4'])
    assert.deepEqual(short(map.regions), ['gpt', 'gap', ['partition', 'ext4'], 'gap', 'gpt'])
    assert.ok(bytes <= 400_000, `${bytes} bytes`)
    assert.ok(reads <= 64, `${reads} reads`)
  })
})

describe('poison', { skip: needs('qemu-img', 'fsck.fat', 'e2fsck') }, () => {
  for (const name of ['disk-gpt-ext4-fat-swap', 'disk-mbr-logical']) {
    test(`${name}: with all that is unused filled, the map is the same and every file system is whole`, async () => {
      await using dir = await tempDir()
      const disk = await golden(name)
      const map = await mapOf(disk)
      for (const { start, end } of map.ranges.complement(0, map.size)) disk.fill(0xa5, start, end)
      const again = await mapOf(disk)
      assert.ok(again.ranges.equals(map.ranges))
      assert.deepEqual(again.regions, map.regions)
      let checked = 0
      for (const { offset, length, children } of map.regions) {
        const kind = children?.[0]!.kind ?? ''
        const image = dir.file('part')
        await writeFile(image, disk.subarray(offset, offset + length))
        if (kind.startsWith('fat')) await must('fsck.fat', ['-n', image])
        else if (kind.startsWith('ext')) await must('e2fsck', ['-fn', image])
        else continue
        checked += 1
      }
      assert.ok(checked >= 2)
    })
  }
})

describe('damaged disks', { skip: needs('qemu-img') }, () => {
  for (const name of ['disk-gpt-ext4-fat-swap', 'disk-mbr-logical']) {
    test(`${name}: any damage gives a map, soon, that adds up`, async () => {
      const disk = await golden(name)
      const random = new Random()
      const pages = livePages(disk)
      for (let round = 0; round < 150; round++) {
        const mutations = mutate(disk, pages, random)
        const undo = mutations.map(
          ({ offset, bytes }) => [offset, disk.slice(offset, offset + bytes.length)] as const,
        )
        for (const { offset, bytes } of mutations) disk.set(bytes, offset)
        const started = performance.now()
        try {
          await mapOf(disk)
        } catch (error) {
          throw new Error(`seed ${random.seed}, round ${round}`, { cause: error })
        }
        assert.ok(performance.now() - started < 2000, `seed ${random.seed}, round ${round} took too long`)
        for (const [offset, bytes] of undo.toReversed()) disk.set(bytes, offset)
      }
    })

    test(`${name}: cut off anywhere gives a map that adds up`, async () => {
      const disk = await golden(name)
      const random = new Random()
      const sizes = [1, 511, 512, 513, 1024, 1536, 17_408, MIB, MIB + 512, disk.length - 512, disk.length - 1]
      for (let i = 0; i < 30; i++) sizes.push(random.below(disk.length))
      for (const size of sizes) {
        const map = await mapOf(disk.subarray(0, size))
        assert.equal(map.size, size)
      }
    })
  }
})
