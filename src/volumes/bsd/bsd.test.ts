import assert from 'node:assert/strict'
import { readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, tempDir } from '../../../test/kit/index.ts'
import { NotTrusted } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { placeOf, type VolumeScheme, type VolumeTable } from '../index.ts'
import { bsd, bsdSlice } from './index.ts'

const MIB = 1_048_576
const SLICE = 2048 * 512

interface Place {
  readonly name: string
  readonly start: number
  readonly end: number
}

/**
 * A disk of 16 MiB with two partitions by parted, and where parted says that they are. parted leaves a checksum that
 * BSD systems refuse, as this reader does; it is made right here.
 */
async function makeDisk(): Promise<{ disk: Uint8Array; judged: Place[] }> {
  await using dir = await tempDir()
  const image = dir.file('disk')
  await writeFile(image, '')
  await truncate(image, 16 * MIB)
  const parted = (...args: string[]): Promise<string> => must('parted', ['-s', '-m', image, ...args])
  await parted('mklabel', 'bsd', 'mkpart', '1MiB', '4MiB', 'mkpart', '5MiB', '9MiB')
  const judged = [...(await parted('unit', 'B', 'print')).matchAll(/^(\d+):(\d+)B:(\d+)B:/gm)]
  const disk = new Uint8Array(await readFile(image))
  seal(disk, 64)
  return {
    disk,
    judged: judged.map(([, number, start, last]) => ({
      name: ' abcdefgh'[Number(number)]!,
      start: Number(start),
      end: Number(last) + 1,
    })),
  }
}

/** An MBR disk whose partition is a slice with partitions by fdisk, as fdisk lists them from the slice's start. */
async function makeSlice(): Promise<{ slice: Uint8Array; judged: Place[] }> {
  await using dir = await tempDir()
  const image = dir.file('disk')
  await writeFile(image, '')
  await truncate(image, 16 * MIB)
  await must('sfdisk', ['-q', image], { input: 'label: dos\nstart=2048,size=26000,type=a5\n' })
  const script = 'b y n a 4096 +2M t a 7 n b 12288 +4M t b 1 w q'
  await must('fdisk', [image], { input: `${script.replaceAll(' ', '\n')}\n` })
  const listed = await must('fdisk', [image], { input: 'b\np\nq\n' })
  const judged = [...listed.matchAll(/^([ab])\s+(\d+)\s+(\d+)\s+(\d+)\s/gm)].map(
    ([, name, start, , sectors]) => ({
      name: name!,
      start: Number(start) * 512 - SLICE,
      end: (Number(start) + Number(sectors)) * 512 - SLICE,
    }),
  )
  return { slice: new Uint8Array(await readFile(image)).slice(SLICE, SLICE + 26_000 * 512), judged }
}

async function read(scheme: VolumeScheme, disk: Uint8Array): Promise<VolumeTable> {
  const device = new MemoryDevice(disk)
  assert.equal(await scheme.probe(device), true)
  return scheme.open([device], {})
}

const places = ({ volumes }: VolumeTable): Place[] =>
  volumes.map((volume) => ({ name: volume.name, ...placeOf(volume) }))

const refused = (error: unknown): boolean => error instanceof NotTrusted && error.reason === 'bsd-bad-label'

/** Makes the checksum of the label at `at` right again. */
function seal(disk: Uint8Array, at: number): void {
  const view = new DataView(disk.buffer, disk.byteOffset)
  view.setUint16(at + 136, 0, true)
  let sum = 0
  const end = at + 148 + view.getUint16(at + 138, true) * 16
  for (let i = at; i < Math.min(end, disk.length - 1); i += 2) sum ^= view.getUint16(i, true)
  view.setUint16(at + 136, sum, true)
}

describe('BSD disk label', { skip: needs('parted', 'fdisk', 'sfdisk') }, () => {
  test('on a disk: partitions are those that parted lists; the label is in use', async () => {
    const { disk, judged } = await makeDisk()
    const table = await read(bsd, disk)
    assert.equal(judged.length, 2)
    assert.deepEqual(places(table), judged)
    assert.ok(table.volumes.every(({ doubt }) => doubt === undefined))
    assert.equal(String(table.metadata[0]), '[0,512)')
    assert.equal(table.unclaimed, 'in-use')
  })

  test('in a slice: sectors count from the disk, and c says where the slice is', async () => {
    const { slice, judged } = await makeSlice()
    const table = await read(bsdSlice, slice)
    assert.equal(judged.length, 2)
    assert.deepEqual(places(table), judged)
    assert.equal(String(table.metadata[0]), '[512,1024)')
  })

  test('in a slice: sectors that count from the slice are told by c as well', async () => {
    const { slice, judged } = await makeSlice()
    const view = new DataView(slice.buffer)
    for (const i of [0, 1, 2]) {
      const at = 512 + 148 + i * 16 + 4
      view.setUint32(at, view.getUint32(at, true) - 2048, true)
    }
    // `d` covers the disk from sector 0 in both ways of counting; it is no partition.
    seal(slice, 512)
    assert.deepEqual(places(await read(bsdSlice, slice)), judged)
  })

  test('in a slice without a c that fits, nothing is believed', async () => {
    const { slice } = await makeSlice()
    const view = new DataView(slice.buffer)
    const size = 512 + 148 + 2 * 16
    for (const value of [0, 26_001, 0xffffffff]) {
      view.setUint32(size, value, true)
      seal(slice, 512)
      await assert.rejects(read(bsdSlice, slice), refused, String(value))
    }
    view.setUint32(size, 26_000, true)
    view.setUint32(size + 4, 4097, true)
    seal(slice, 512)
    await assert.rejects(read(bsdSlice, slice), refused)
  })

  test('labels that are none are refused, soon', async () => {
    const { disk } = await makeDisk()
    const view = new DataView(disk.buffer)
    const cases: [at: number, bytes: 2 | 4, value: number, sealed: boolean][] = [
      [136, 2, 0x1234, false],
      [152, 4, 2049, false],
      [40, 4, 0, true],
      [40, 4, 0xffffffff, true],
      [138, 2, 0, true],
      [138, 2, 23, true],
      [138, 2, 0xffff, true],
    ]
    const before = disk.slice(0, 1024)
    for (const [at, size, value, sealed] of cases) {
      if (size === 2) view.setUint16(64 + at, value, true)
      else view.setUint32(64 + at, value, true)
      if (sealed) seal(disk, 64)
      await assert.rejects(read(bsd, disk), refused, `${value} at ${at}`)
      disk.set(before)
    }
    for (const size of [0, 1, 64, 211]) {
      assert.equal(await bsd.probe(new MemoryDevice(disk.subarray(0, size))), false)
    }
    for (const size of [212, 230]) await assert.rejects(read(bsd, disk.subarray(0, size)), refused)
    for (const at of [64, 64 + 132]) {
      view.setUint32(at, 0)
      assert.equal(await bsd.probe(new MemoryDevice(disk)), false)
      disk.set(before)
    }
  })

  test('partitions past the end, over each other or over the label are doubted', async () => {
    const { disk } = await makeDisk()
    const view = new DataView(disk.buffer)
    const [a, b] = [64 + 148, 64 + 148 + 16]
    const doubts = async (): Promise<unknown[]> => {
      seal(disk, 64)
      return (await read(bsd, disk)).volumes.map(({ name, doubt }) => [name, doubt?.code])
    }
    view.setUint32(b, 0xffffffff, true)
    assert.deepEqual(await doubts(), [
      ['a', undefined],
      ['b', 'partition-past-end'],
    ])
    view.setUint32(b + 4, 2048 + 100, true)
    view.setUint32(b, 100, true)
    assert.deepEqual(await doubts(), [['a', 'partition-overlap']])
    view.setUint32(a + 4, 0, true)
    assert.equal(
      (await doubts()).find((doubt) => (doubt as unknown[])[0] === 'a')?.toString(),
      'a,partition-overlap',
    )
  })
})
