import assert from 'node:assert/strict'
import { readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, tempDir } from '../../../test/kit/index.ts'
import { crc32, NotTrusted } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import { placeOf, type VolumeTable } from '../index.ts'
import { gpt } from './index.ts'

const MIB = 1_048_576
const DISK = 16 * MIB

const SCRIPT = [
  'label: gpt',
  'label-id: 5A5A0000-0000-4000-8000-000000000001',
  'start=2048, size=4096, type=U, name="EFI system", uuid=5A5A0000-0000-4000-8000-000000000002',
  'start=8192, size=8191, type=L, name="größe", uuid=5A5A0000-0000-4000-8000-000000000003',
  'start=20480, size=2048, type=S, uuid=5A5A0000-0000-4000-8000-000000000004',
].join('\n')

async function onDisk(make: (image: string) => Promise<void>, bytes = DISK): Promise<Uint8Array> {
  await using dir = await tempDir()
  const image = dir.file('disk')
  await writeFile(image, '')
  await truncate(image, bytes)
  await make(image)
  return new Uint8Array(await readFile(image))
}

/** A fresh copy each time; sfdisk is asked once. */
async function bySfdisk(): Promise<Uint8Array> {
  made ??= onDisk(async (image) => void (await must('sfdisk', ['-q', image], { input: SCRIPT })))
  return (await made).slice()
}
let made: Promise<Uint8Array> | undefined

async function read(disk: Uint8Array, blockSize = 512): Promise<VolumeTable> {
  const device = new MemoryDevice(disk, blockSize)
  assert.equal(await gpt.probe(device), true)
  return gpt.open([device], {})
}

const summary = ({ volumes }: VolumeTable) =>
  volumes.map((volume) => ({ name: volume.name, ...placeOf(volume), doubt: volume.doubt?.code }))

const refusal = (reason: string) => (error: unknown) => error instanceof NotTrusted && error.reason === reason

/** Changes a field of the header in sector `lba` and makes its checksum right again. */
function patchHeader(disk: Uint8Array, lba: number, change: (header: DataView) => void): void {
  const at = disk.byteOffset + lba * 512
  const view = new DataView(disk.buffer, at, 512)
  change(view)
  view.setUint32(16, 0, true)
  const length = Math.min(view.getUint32(12, true), 512)
  view.setUint32(16, crc32(new Uint8Array(disk.buffer, at, length)), true)
}

/** Changes an entry of the primary table and makes both checksums right again. */
function patchEntry(disk: Uint8Array, index: number, change: (entry: DataView) => void): void {
  change(new DataView(disk.buffer, disk.byteOffset + 1024 + index * 128, 128))
  const sum = crc32(disk.subarray(1024, 1024 + 128 * 128))
  patchHeader(disk, 1, (header) => header.setUint32(88, sum, true))
}

/** Both tables at once, where a test is not about their difference. */
const LAST = DISK / 512 - 1

describe('GPT', { skip: needs('sfdisk', 'sgdisk') }, () => {
  test('partitions are those that sfdisk lists, with their names and UUIDs', async () => {
    await using dir = await tempDir()
    const disk = await bySfdisk()
    const image = dir.file('disk')
    await writeFile(image, disk)
    const { partitiontable } = JSON.parse(await must('sfdisk', ['-J', image])) as {
      partitiontable: {
        id: string
        partitions: { node: string; start: number; size: number; uuid: string; name?: string }[]
      }
    }
    const table = await read(disk)
    assert.deepEqual(
      table.volumes.map((volume) => ({
        ...placeOf(volume),
        name: volume.name,
        uuid: volume.uuid,
        label: volume.label,
        doubt: volume.doubt,
      })),
      partitiontable.partitions.map(({ node, start, size, uuid, name }) => ({
        start: start * 512,
        end: (start + size) * 512,
        name: node.slice(image.length),
        uuid: uuid.toLowerCase(),
        label: name,
        doubt: undefined,
      })),
    )
    assert.equal(table.volumes[1]!.label, 'größe')
    assert.equal(table.uuid, partitiontable.id.toLowerCase())
    assert.equal(table.state, undefined)
    assert.ok(
      table.metadata[0]!.equals(
        RangeSet.from([
          { start: 0, end: 34 * 512 },
          { start: DISK - 33 * 512, end: DISK },
        ]),
      ),
    )
  })

  test('made by sgdisk, with a larger table', async () => {
    const disk = await onDisk(async (image) => {
      await must('sgdisk', ['-S', '256', '-n', '1:4096:8191', '-n', '200:10240:12287', image])
    })
    const table = await read(disk)
    assert.deepEqual(summary(table), [
      { name: '1', start: 2 * MIB, end: 4 * MIB, doubt: undefined },
      { name: '200', start: 5 * MIB, end: 6 * MIB, doubt: undefined },
    ])
    assert.equal(table.metadata[0]!.endAt(0), 66 * 512)
    assert.equal(table.metadata[0]!.startAt(1), DISK - 65 * 512)
  })

  test('sectors of 4096 bytes, whatever sector size the device claims', {
    skip: needsRoot() || needs('losetup'),
  }, async () => {
    const disk = await onDisk(async (image) => {
      const loop = (await must('losetup', ['-b', '4096', '-f', '--show', image])).trim()
      try {
        await must('sgdisk', ['-n', '1:256:511', '-n', '2:1024:1535', loop])
      } finally {
        await must('losetup', ['-d', loop])
      }
    })
    for (const blockSize of [512, 4096]) {
      const table = await read(disk, blockSize)
      assert.deepEqual(summary(table), [
        { name: '1', start: MIB, end: 2 * MIB, doubt: undefined },
        { name: '2', start: 4 * MIB, end: 6 * MIB, doubt: undefined },
      ])
      assert.equal(table.metadata[0]!.endAt(0), 6 * 4096)
    }
    // And by its backup.
    disk.fill(0, 4096, 4196)
    assert.equal((await read(disk)).volumes.length, 2)
  })

  test('a damaged primary table gives way to the backup, wherever it is damaged', async () => {
    const good = await bySfdisk()
    const expected = summary(await read(good))
    // One bit in each checksummed byte that matters: header, and the entries in use.
    for (const at of [
      512,
      520,
      524,
      528,
      532 + 4,
      536,
      544,
      552,
      560,
      568,
      584,
      592,
      596,
      600,
      1024,
      1100,
      1200,
      17_000,
    ]) {
      const disk = good.slice()
      disk[at]! ^= 4
      const table = await read(disk)
      assert.deepEqual(summary(table), expected, `bit flipped at ${at}`)
      assert.match(table.state ?? '', /backup used/, `bit flipped at ${at}`)
    }
  })

  test('with both tables damaged nothing is believed', async () => {
    const disk = await bySfdisk()
    disk[600]! ^= 1
    disk[DISK - 512 + 88]! ^= 1
    await assert.rejects(read(disk), refusal('gpt-damaged'))
  })

  test('a lost backup, or one that differs, is said and changes nothing', async () => {
    const disk = await bySfdisk()
    const expected = summary(await read(disk))
    disk[DISK - 512]! ^= 1
    const lost = await read(disk)
    assert.deepEqual(summary(lost), expected)
    assert.match(lost.state ?? '', /backup header: no signature/)
    assert.equal(lost.metadata[0]!.covers(DISK - 512, DISK), true)
    disk[DISK - 512]! ^= 1
    patchHeader(disk, LAST, (header) => header.setUint32(88, 1, true))
    assert.match((await read(disk)).state ?? '', /differs/)
  })

  test('a disk that has grown still has its backup where it was', async () => {
    const small = await bySfdisk()
    const disk = new Uint8Array(DISK + 8 * MIB)
    disk.set(small)
    const table = await read(disk)
    assert.deepEqual(summary(table), summary(await read(small)))
    assert.equal(table.metadata[0]!.covers(DISK - 33 * 512, DISK), true)
    // Primary damaged too: the damaged header still says where the backup is.
    disk[512 + 57]! ^= 1
    assert.deepEqual(summary(await read(disk)), summary(await read(small)))
  })

  test('a disk that was cut off: partitions past its end are cut and doubted', async () => {
    const disk = (await bySfdisk()).subarray(0, 21_000 * 512)
    const table = await read(disk)
    assert.equal(table.volumes.length, 3)
    assert.equal(summary(table)[2]!.doubt, 'partition-past-end')
    assert.equal(summary(table)[1]!.doubt, undefined)
    const shorter = await read(disk.subarray(0, 10_000 * 512))
    assert.match(shorter.state ?? '', /partition 3 lies past the end/)
    for (const length of [0, 100, 512, 600, 1024, 1200, 5000, 17_407]) {
      const device = new MemoryDevice(disk.subarray(0, length))
      if (await gpt.probe(device)) {
        await assert.rejects(gpt.open([device], {}), refusal('gpt-damaged'), `${length} bytes`)
      }
    }
  })

  test('hybrid: GPT wins, a slot that contradicts makes its partition doubted', async () => {
    const disk = await onDisk(async (image) => {
      await must('sgdisk', [
        '-n',
        '1:4096:8191',
        '-n',
        '2:10240:12287',
        '-n',
        '3:14336:16383',
        '-h',
        '1:2',
        image,
      ])
    })
    const table = await read(disk)
    assert.match(table.state ?? '', /hybrid MBR/)
    assert.deepEqual(
      summary(table).map(({ doubt }) => doubt),
      [undefined, undefined, undefined],
    )
    // The second slot of the hybrid MBR one sector longer.
    const view = new DataView(disk.buffer)
    const slot = [0, 1, 2, 3].find((i) => view.getUint32(446 + i * 16 + 8, true) === 10_240)!
    view.setUint32(446 + slot * 16 + 12, view.getUint32(446 + slot * 16 + 12, true) + 1, true)
    assert.deepEqual(
      summary(await read(disk)).map(({ doubt }) => doubt),
      [undefined, 'gpt-hybrid-differs', undefined],
    )
  })

  test('without its protective MBR it is not believed', async () => {
    const disk = await bySfdisk()
    disk[446 + 4] = 0x83
    await assert.rejects(read(disk), refusal('gpt-no-protective-mbr'))
    disk.fill(0, 0, 512)
    await assert.rejects(read(disk), refusal('gpt-no-protective-mbr'))
  })

  test('partitions that are members of something else are doubted by their type', async () => {
    const types = {
      '5808C8AA-7E8F-42E0-85D2-E1E90434CFB3': 'ldm-dynamic-disk',
      'AF9B60A0-1431-4F62-BC68-3311714A69AD': 'ldm-dynamic-disk',
      'E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D': 'storage-spaces',
    }
    const args = Object.keys(types).flatMap((type, i) => {
      const first = 4096 * (i + 1)
      return ['-n', `${i + 1}:${first}:${first + 4095}`, '-t', `${i + 1}:${type}`]
    })
    const disk = await onDisk(async (image) => void (await must('sgdisk', [...args, image])))
    assert.deepEqual(
      summary(await read(disk)).map(({ doubt }) => doubt),
      Object.values(types),
    )
  })
})

describe('hostile GPT', { skip: needs('sfdisk') }, () => {
  test('header fields at their extremes are refused or harmless, and quick', async () => {
    const good = await bySfdisk()
    const started = performance.now()
    for (const [at, bits] of [
      [12, 32],
      [24, 64],
      [32, 64],
      [40, 64],
      [48, 64],
      [72, 64],
      [80, 32],
      [84, 32],
    ] as const) {
      for (const value of [
        0n,
        1n,
        2n,
        127n,
        128n,
        0x7fffffffn,
        0x80000000n,
        0xffffffffn,
        2n ** 53n,
        2n ** 63n,
        2n ** 64n - 1n,
      ]) {
        const disk = good.slice()
        for (const lba of [1, LAST]) {
          patchHeader(disk, lba, (header) => {
            if (bits === 32) header.setUint32(at, Number(value & 0xffffffffn), true)
            else header.setBigUint64(at, value, true)
          })
        }
        try {
          const table = await read(disk)
          assert.ok(table.metadata[0]!.end! <= DISK)
          assert.ok(table.metadata[0]!.covers(0, 34 * 512))
        } catch (error) {
          assert.ok(refusal('gpt-damaged')(error), `field ${at} = ${value}: ${String(error)}`)
        }
      }
    }
    assert.ok(performance.now() - started < 20_000)
  })

  test('2^31 entries, or entries of no size, are refused before anything is allocated', async () => {
    for (const [at, value] of [
      [80, 2 ** 31],
      [84, 0],
      [84, 2 ** 31],
    ] as const) {
      const disk = await bySfdisk()
      for (const lba of [1, LAST]) patchHeader(disk, lba, (header) => header.setUint32(at, value, true))
      await assert.rejects(read(disk), refusal('gpt-damaged'))
    }
  })

  test('entries past 2^53, backwards, or over the table itself', async () => {
    const far = await bySfdisk()
    patchEntry(far, 1, (entry) => entry.setBigUint64(40, 2n ** 64n - 1n, true))
    assert.deepEqual(
      summary(await read(far)).map(({ name, doubt }) => [name, doubt]),
      [
        ['1', undefined],
        ['2', 'partition-overlap'],
      ],
    )
    const gone = await bySfdisk()
    patchEntry(gone, 1, (entry) => {
      entry.setBigUint64(32, 2n ** 63n, true)
      entry.setBigUint64(40, 2n ** 63n, true)
    })
    assert.match((await read(gone)).state ?? '', /partition 2 lies past the end/)
    const backwards = await bySfdisk()
    patchEntry(backwards, 1, (entry) => entry.setBigUint64(40, 8191n, true))
    await assert.rejects(read(backwards), refusal('gpt-bad-entry'))
    const over = await bySfdisk()
    patchEntry(over, 0, (entry) => entry.setBigUint64(32, 20n, true))
    assert.deepEqual(summary(await read(over))[0], {
      name: '1',
      start: 34 * 512,
      end: 6144 * 512,
      doubt: 'partition-overlap',
    })
  })
})
