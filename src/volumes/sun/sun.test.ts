import assert from 'node:assert/strict'
import { readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, tempDir } from '../../../test/kit/index.ts'
import { NotTrusted } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { placeOf, type VolumeTable } from '../index.ts'
import { sun } from './index.ts'

const MIB = 1_048_576

interface Place {
  readonly name: string
  readonly start: number
  readonly end: number
}

/** A disk of 64 MiB by parted, and the partitions that sfdisk, which had no part in it, lists; not the whole disk. */
async function byParted(): Promise<{ disk: Uint8Array; judged: Place[] }> {
  await using dir = await tempDir()
  const image = dir.file('disk')
  await writeFile(image, '')
  await truncate(image, 64 * MIB)
  await must('parted', ['-s', image, 'mklabel', 'sun', 'mkpart', '8MiB', '20MiB', 'mkpart', '20MiB', '40MiB'])
  return await judge(image)
}

/** As sfdisk lays it out: other cylinders, the first partition from the label's own. */
async function bySfdisk(): Promise<{ disk: Uint8Array; judged: Place[] }> {
  await using dir = await tempDir()
  const image = dir.file('disk')
  await writeFile(image, '')
  await truncate(image, 64 * MIB)
  await must('sfdisk', ['-q', image], { input: 'label: sun\nstart=0,size=10M\nstart=24M,size=20M\n' })
  return await judge(image)
}

async function judge(image: string): Promise<{ disk: Uint8Array; judged: Place[] }> {
  const { partitiontable } = JSON.parse(await must('sfdisk', ['--json', image])) as {
    partitiontable: { partitions: { node: string; start: number; size: number; type: string }[] }
  }
  return {
    disk: new Uint8Array(await readFile(image)),
    judged: partitiontable.partitions
      .filter(({ type }) => type !== '5')
      .map(({ node, start, size }) => ({
        name: /\d+$/.exec(node)![0],
        start: start * 512,
        end: (start + size) * 512,
      })),
  }
}

async function read(disk: Uint8Array): Promise<VolumeTable> {
  const device = new MemoryDevice(disk)
  assert.equal(await sun.probe(device), true)
  return sun.open([device], {})
}

const places = ({ volumes }: VolumeTable): Place[] =>
  volumes.map((volume) => ({ name: volume.name, ...placeOf(volume) }))

const doubts = ({ volumes }: VolumeTable): unknown[] => volumes.map(({ doubt }) => doubt?.code)

function seal(disk: Uint8Array): void {
  const view = new DataView(disk.buffer)
  view.setUint16(510, 0)
  let sum = 0
  for (let at = 0; at < 510; at += 2) sum ^= view.getUint16(at)
  view.setUint16(510, sum)
}

describe('Sun disk label', { skip: needs('parted', 'sfdisk') }, () => {
  test('partitions are those that sfdisk lists, on labels of parted; the label is in use', async () => {
    const { disk, judged } = await byParted()
    const table = await read(disk)
    assert.equal(judged.length, 2)
    assert.deepEqual(places(table), judged)
    assert.deepEqual(doubts(table), [undefined, undefined])
    assert.equal(String(table.metadata[0]), '[0,512)')
    assert.equal(table.unclaimed, 'in-use')
  })

  test('a partition that starts with the label is doubted, the others are not', async () => {
    const { disk, judged } = await bySfdisk()
    const table = await read(disk)
    assert.equal(judged.length, 2)
    assert.equal(judged[0]!.start, 0)
    assert.deepEqual(places(table), [{ ...judged[0]!, start: 512 }, judged[1]])
    assert.deepEqual(doubts(table), ['partition-overlap', undefined])
  })

  test('without a VTOC the third slot is the whole disk', async () => {
    const { disk, judged } = await byParted()
    disk.fill(0, 128, 264)
    seal(disk)
    const table = await read(disk)
    assert.equal(table.state, 'without VTOC')
    assert.deepEqual(places(table), judged)
  })

  test('a wrong checksum is no label; cylinders of no length are refused; what reaches past the end is doubted', async () => {
    const { disk } = await byParted()
    const view = new DataView(disk.buffer)
    disk[200]! ^= 1
    assert.equal(await sun.probe(new MemoryDevice(disk)), false)
    disk[200]! ^= 1
    view.setUint32(444 + 8 + 4, 0xffffffff)
    seal(disk)
    assert.deepEqual(doubts(await read(disk)), [undefined, 'partition-past-end'])
    view.setUint16(438, 0)
    seal(disk)
    await assert.rejects(
      read(disk),
      (error) => error instanceof NotTrusted && error.reason === 'sun-bad-label',
    )
    for (const size of [0, 1, 511])
      assert.equal(await sun.probe(new MemoryDevice(disk.subarray(0, size))), false)
  })
})
