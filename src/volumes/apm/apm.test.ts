import assert from 'node:assert/strict'
import { readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, tempDir } from '../../../test/kit/index.ts'
import { NotTrusted } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { placeOf, type VolumeTable } from '../index.ts'
import { apm } from './index.ts'

const MIB = 1_048_576

/** A disk of 8 MiB with two partitions by parted, and where parted says that they are. */
async function makeDisk(): Promise<{ disk: Uint8Array; judged: unknown[] }> {
  await using dir = await tempDir()
  const image = dir.file('disk')
  await writeFile(image, '')
  await truncate(image, 8 * MIB)
  const parted = (...args: string[]): Promise<string> => must('parted', ['-s', '-m', image, ...args])
  await parted('mklabel', 'mac', 'mkpart', 'one', '1MiB', '3MiB', 'mkpart', 'two', '4MiB', '7MiB')
  const judged = [...(await parted('unit', 'B', 'print')).matchAll(/^(\d+):(\d+)B:(\d+)B:\d+B:\w*:(\w+)/gm)]
  return {
    disk: new Uint8Array(await readFile(image)),
    judged: judged
      .filter(([, , , , label]) => label !== 'Apple')
      .map(([, name, start, last, label]) => ({
        name,
        label,
        start: Number(start),
        end: Number(last) + 1,
        doubt: undefined,
      })),
  }
}

async function read(disk: Uint8Array): Promise<VolumeTable> {
  const device = new MemoryDevice(disk)
  assert.equal(await apm.probe(device), true)
  return apm.open([device], {})
}

const summary = ({ volumes }: VolumeTable) =>
  volumes.map((volume) => ({
    name: volume.name,
    label: volume.label,
    ...placeOf(volume),
    doubt: volume.doubt?.code,
  }))

const refused = (error: unknown): boolean => error instanceof NotTrusted && error.reason === 'apm-bad-map'

describe('Apple partition map', { skip: needs('parted') }, () => {
  test('partitions are those that parted lists; the map itself is in use', async () => {
    const { disk, judged } = await makeDisk()
    const table = await read(disk)
    assert.equal(judged.length, 2)
    assert.deepEqual(summary(table), judged)
    assert.equal(String(table.metadata[0]), '[0,32768)')
    assert.equal(table.unclaimed, 'in-use')
  })

  test('maps that are none are refused, soon', async () => {
    const { disk } = await makeDisk()
    const view = new DataView(disk.buffer)
    const cases: [at: number, value: number][] = [
      [512 + 4, 0],
      [512 + 4, 257],
      [512 + 4, 0xffffffff],
      [1024 + 4, 3],
      [1024, 0],
      [512 + 4, 200],
    ]
    for (const [at, value] of cases) {
      const before = view.getUint32(at)
      view.setUint32(at, value)
      await assert.rejects(read(disk), refused, `${value} at ${at}`)
      view.setUint32(at, before)
    }
    for (const size of [1024, 1500, 2047]) await assert.rejects(read(disk.subarray(0, size)), refused)
    for (const size of [0, 1, 512, 1023]) {
      assert.equal(await apm.probe(new MemoryDevice(disk.subarray(0, size))), false)
    }
    view.setUint16(2, 0)
    assert.equal(await apm.probe(new MemoryDevice(disk)), false)
  })

  test('a partition past the end, or over another one, is doubted', async () => {
    const { disk } = await makeDisk()
    const view = new DataView(disk.buffer)
    const second = [2, 3, 4, 5].find(
      (i) => Buffer.from(disk).toString('latin1', i * 512 + 16, i * 512 + 19) === 'two',
    )!
    view.setUint32(second * 512 + 12, 0xffffffff)
    assert.equal(summary(await read(disk)).at(-1)!.doubt, 'partition-past-end')
    view.setUint32(second * 512 + 8, 4096)
    view.setUint32(second * 512 + 12, 100)
    assert.deepEqual(
      summary(await read(disk)).map(({ doubt }) => doubt),
      ['partition-overlap'],
    )
  })
})
