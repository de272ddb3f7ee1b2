import assert from 'node:assert/strict'
import { readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, tempDir } from '../../../test/kit/index.ts'
import { LIMITS, NotTrusted } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import { placeOf, type VolumeTable } from '../index.ts'
import { mbr } from './index.ts'

const MIB = 1_048_576

/** A disk of `bytes` with the table that sfdisk makes of `script`, and what sfdisk says about it afterwards. */
async function makeDisk(bytes: number, script: string): Promise<{ disk: Uint8Array; judged: Judged[] }> {
  await using dir = await tempDir()
  const image = dir.file('disk')
  await writeFile(image, '')
  await truncate(image, bytes)
  await must('sfdisk', ['-q', image], { input: script })
  const { partitiontable } = JSON.parse(await must('sfdisk', ['-J', image])) as {
    partitiontable: { partitions: { node: string; start: number; size: number; type: string }[] }
  }
  const judged = partitiontable.partitions.map(({ node, start, size, type }) => ({
    name: node.slice(image.length),
    start: start * 512,
    end: (start + size) * 512,
    type,
  }))
  return { disk: new Uint8Array(await readFile(image)), judged }
}

interface Judged {
  readonly name: string
  readonly start: number
  readonly end: number
  readonly type: string
}

async function read(disk: Uint8Array, blockSize = 512): Promise<VolumeTable> {
  const device = new MemoryDevice(disk, blockSize)
  assert.equal(await mbr.probe(device), true)
  return mbr.open([device], {})
}

const summary = ({ volumes }: VolumeTable) =>
  volumes.map((volume) => ({ name: volume.name, ...placeOf(volume), doubt: volume.doubt?.code }))

/** Writes one slot of the record at `recordAt`; sectors. */
function setSlot(
  disk: Uint8Array,
  recordAt: number,
  index: number,
  slot: { status?: number; type: number; first: number; sectors: number },
): void {
  const view = new DataView(disk.buffer, disk.byteOffset + recordAt + 446 + index * 16, 16)
  view.setUint8(0, slot.status ?? 0)
  view.setUint8(4, slot.type)
  view.setUint32(8, slot.first, true)
  view.setUint32(12, slot.sectors, true)
  disk.set([0x55, 0xaa], recordAt + 510)
}

const refusal = (reason: string) => (error: unknown) => error instanceof NotTrusted && error.reason === reason

describe('MBR', { skip: needs('sfdisk') }, () => {
  test('primary and logical partitions are those that sfdisk lists; every EBR is in use', async () => {
    const { disk, judged } = await makeDisk(
      64 * MIB,
      [
        'label: dos',
        'label-id: 0x5a5a0001',
        'start=2048, size=10000, type=83, bootable',
        'start=20480, size=90000, type=5',
        'start=22528, size=8192, type=83',
        'start=40960, size=8193, type=82',
        'start=61440, size=20480, type=7',
        'start=112640, type=c',
      ].join('\n'),
    )
    const table = await read(disk)
    const expected = judged.filter(({ type }) => type !== '5')
    assert.equal(expected.length, 5)
    assert.deepEqual(
      summary(table),
      expected
        .map(({ name, start, end }) => ({ name, start, end, doubt: undefined }))
        .toSorted((a, b) => a.start - b.start),
    )
    assert.equal(table.uuid, '5a5a0001')
    assert.equal(table.volumes.find(({ name }) => name === '6')?.uuid, '5a5a0001-06')
    assert.equal(table.unclaimed, 'in-use')
    // MBR and the three EBRs that sfdisk wrote: found by their signatures, not by following the chain.
    const signed = []
    for (let at = 0; at < disk.length; at += 512) {
      if (disk[at + 510] === 0x55 && disk[at + 511] === 0xaa) signed.push({ start: at, end: at + 512 })
    }
    assert.equal(signed.length, 4)
    assert.ok(table.metadata[0]!.equals(RangeSet.from(signed)))
  })

  test('a volume is the bytes of its partition, and its ranges are shifted to the disk', async () => {
    const { disk } = await makeDisk(8 * MIB, 'label: dos\nstart=2048, size=4096, type=83\n')
    disk.set([1, 2, 3], MIB)
    const [volume] = (await read(disk)).volumes
    const into = new Uint8Array(3)
    await volume!.device.read(0, into)
    assert.deepEqual([...into], [1, 2, 3])
    assert.equal(volume!.device.size, 2 * MIB)
    assert.equal(String(volume!.project(RangeSet.of(512, 1024))), `[${MIB + 512},${MIB + 1024})`)
  })

  test('forty logical partitions', async () => {
    const lines = Array.from({ length: 40 }, () => 'size=512, type=83')
    const { disk, judged } = await makeDisk(96 * MIB, ['label: dos', 'type=f', ...lines].join('\n'))
    const table = await read(disk)
    assert.equal(table.volumes.length, 40)
    assert.deepEqual(
      summary(table).map(({ name, start, end }) => ({ name, start, end })),
      judged.filter(({ type }) => type !== 'f').map(({ name, start, end }) => ({ name, start, end })),
    )
  })

  test('sector numbers count in the disk’s sectors', async () => {
    const disk = new Uint8Array(4 * MIB)
    setSlot(disk, 0, 0, { type: 0x83, first: 256, sectors: 512 })
    const table = await read(disk, 4096)
    assert.deepEqual(summary(table), [{ name: '1', start: MIB, end: 3 * MIB, doubt: undefined }])
    assert.equal(String(table.metadata[0]), '[0,4096)')
  })
})

describe('hostile MBR', () => {
  /** Extended partition over sectors 64..1024 of a disk of 1024, whose first EBR is empty. */
  function extended(): Uint8Array {
    const disk = new Uint8Array(1024 * 512)
    setSlot(disk, 0, 0, { type: 0x83, first: 8, sectors: 32 })
    setSlot(disk, 0, 1, { type: 0x05, first: 64, sectors: 960 })
    disk.set([0x55, 0xaa], 64 * 512 + 510)
    return disk
  }
  const whole = (code: string) => [
    { name: '1', start: 8 * 512, end: 40 * 512, doubt: undefined },
    { name: '2', start: 64 * 512, end: 1024 * 512, doubt: code },
  ]

  test('an empty extended partition is just its EBR', async () => {
    const table = await read(extended())
    assert.equal(table.volumes.length, 1)
    assert.equal(table.metadata[0]!.size, 1024)
  })

  test('EBRs in a loop make the extended partition doubted, and nothing else', async () => {
    const disk = extended()
    setSlot(disk, 64 * 512, 1, { type: 0x05, first: 100, sectors: 10 })
    setSlot(disk, 164 * 512, 1, { type: 0x05, first: 0, sectors: 10 })
    assert.deepEqual(summary(await read(disk)), whole('mbr-ebr-loop'))
    setSlot(disk, 164 * 512, 1, { type: 0x05, first: 100, sectors: 10 })
    assert.deepEqual(summary(await read(disk)), whole('mbr-ebr-loop'))
  })

  test('a chain that never ends is given up', async () => {
    const disk = extended()
    for (let i = 0; i < 500; i++) {
      setSlot(disk, (64 + i) * 512, 1, { type: 0x05, first: i + 1, sectors: 1 })
    }
    assert.ok(LIMITS.logicalPartitions < 500)
    assert.deepEqual(summary(await read(disk)), whole('mbr-ebr-too-many'))
  })

  test('EBRs and logical partitions outside the extended one, and records that are none', async () => {
    for (const first of [960, 961, 0x7fffffff, 0xffffffff]) {
      const disk = extended()
      setSlot(disk, 64 * 512, 1, { type: 0x05, first, sectors: 1 })
      assert.deepEqual(summary(await read(disk)), whole('mbr-ebr-outside'), `next EBR at ${first}`)
    }
    for (const [first, sectors] of [
      [1, 960],
      [0xffffffff, 1],
      [1, 0xffffffff],
    ] as const) {
      const disk = extended()
      setSlot(disk, 64 * 512, 0, { type: 0x83, first, sectors })
      assert.deepEqual(summary(await read(disk)), whole('mbr-ebr-outside'), `${first}+${sectors}`)
    }
    const unsigned = extended()
    unsigned[64 * 512 + 510] = 0
    assert.deepEqual(summary(await read(unsigned)), whole('mbr-ebr-bad'))
    const third = extended()
    setSlot(third, 64 * 512, 2, { type: 0x83, first: 3, sectors: 3 })
    assert.deepEqual(summary(await read(third)), whole('mbr-ebr-bad'))
    const status = extended()
    setSlot(status, 64 * 512, 0, { status: 0x12, type: 0x83, first: 3, sectors: 3 })
    assert.deepEqual(summary(await read(status)), whole('mbr-ebr-bad'))
  })

  test('partitions past the end are cut and doubted, those wholly past it are named', async () => {
    const disk = new Uint8Array(1024 * 512)
    setSlot(disk, 0, 0, { type: 0x83, first: 1000, sectors: 0xffffffff })
    setSlot(disk, 0, 1, { type: 0x83, first: 0xffffffff, sectors: 0xffffffff })
    const table = await read(disk)
    assert.deepEqual(summary(table), [
      { name: '1', start: 1000 * 512, end: 1024 * 512, doubt: 'partition-past-end' },
    ])
    assert.equal(table.state, 'partition 2 lies past the end of the disk')
  })

  test('partitions that overlap each other or the MBR are doubted, and no byte belongs to two', async () => {
    const disk = new Uint8Array(1024 * 512)
    setSlot(disk, 0, 0, { type: 0x83, first: 100, sectors: 200 })
    setSlot(disk, 0, 1, { type: 0x83, first: 150, sectors: 10 })
    setSlot(disk, 0, 2, { type: 0x83, first: 250, sectors: 100 })
    setSlot(disk, 0, 3, { type: 0x83, first: 0, sectors: 50 })
    assert.deepEqual(summary(await read(disk)), [
      { name: '4', start: 512, end: 50 * 512, doubt: 'partition-overlap' },
      { name: '1', start: 100 * 512, end: 300 * 512, doubt: 'partition-overlap' },
      { name: '3', start: 300 * 512, end: 350 * 512, doubt: 'partition-overlap' },
    ])
  })

  test('a dynamic disk of Windows is refused by name', async () => {
    const disk = new Uint8Array(64 * 512)
    setSlot(disk, 0, 0, { type: 0x42, first: 1, sectors: 63 })
    await assert.rejects(read(disk), refusal('ldm-dynamic-disk'))
  })

  test('boot sectors, protective MBRs, empty tables and short devices are not its own', async () => {
    const probe = (disk: Uint8Array) => mbr.probe(new MemoryDevice(disk))
    const disk = new Uint8Array(1024 * 512)
    assert.equal(await probe(disk), false)
    disk.set([0x55, 0xaa], 510)
    assert.equal(await probe(disk), false, 'empty table')
    setSlot(disk, 0, 0, { type: 0x83, first: 8, sectors: 8 })
    assert.equal(await probe(disk), true)
    disk[446 + 16] = 0x54
    assert.equal(await probe(disk), false, 'text where a status byte should be')
    disk[446 + 16] = 0
    setSlot(disk, 0, 3, { type: 0xee, first: 1, sectors: 8 })
    assert.equal(await probe(disk), false, 'protective')
    for (const length of [0, 1, 511]) assert.equal(await probe(disk.subarray(0, length)), false)
  })
})
