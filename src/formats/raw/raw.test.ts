import assert from 'node:assert/strict'
import { readFile, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { type DeviceUnderTest, deviceSuite } from '../../../test/kit/device-suite.ts'
import { patternAt, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import { MemoryDevice, openHostFile, readBytes } from '../../device/index.ts'
import { rawFormat } from './index.ts'

const SIZE = 200_000

async function rawFile(write: boolean): Promise<DeviceUnderTest> {
  const dir = await tempDir()
  const expected = new Uint8Array(SIZE)
  expected.set(patternAt(0, 30_000))
  expected.set(patternAt(150_000, 50_000), 150_000)
  const file = await openHostFile(dir.file('a.raw'), { create: true })
  await file.resize(SIZE)
  await file.write(0, expected.subarray(0, 30_000))
  await file.write(150_000, expected.subarray(150_000))
  const device = await rawFormat.open(file, { write })
  return {
    device,
    expected,
    below: async () => await readFile(dir.file('a.raw')),
    async [Symbol.asyncDispose]() {
      await device[Symbol.asyncDispose]()
      await dir[Symbol.asyncDispose]()
    },
  }
}

deviceSuite('RawLayer, reading', () => rawFile(false), { write: false })
deviceSuite('RawLayer, writing', () => rawFile(true), { write: true, resize: true })

describe('raw', () => {
  test('never answers absent: what its file does not hold is zero', async () => {
    await using device = await rawFormat.open(
      new (class extends MemoryDevice {
        override async extents(offset: number, length: number) {
          return [
            { offset, length: 512, kind: 'absent' as const },
            { offset: offset + 512, length: length - 512, kind: 'data' as const },
          ]
        }
      })(4096),
      {},
    )
    assert.deepEqual(
      (await device.extents(0, 4096)).map(({ kind }) => kind),
      ['zero', 'data'],
    )
  })

  test('create() drops what was there', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('a.raw'), patternAt(0, 100_000))
    await using image = await rawFormat.create!(await openHostFile(dir.file('a.raw'), { write: true }), {
      virtualSize: 50_000,
    })
    assert.equal(image.size, 50_000)
    assert.deepEqual(await readBytes(image, 0, 50_000), new Uint8Array(50_000))
  })

  test('create() refuses backing files and settings', async () => {
    const usage = (error: unknown): boolean => isVarveError(error, 'USAGE')
    const file = new MemoryDevice(0)
    await assert.rejects(
      rawFormat.create!(file, { virtualSize: 512, backing: { name: 'x', format: 'raw' } }),
      usage,
    )
    await assert.rejects(
      rawFormat.create!(file, { virtualSize: 512, settings: { clusterBytes: 512 } }),
      usage,
    )
  })

  test('open() for writing refuses a file that is open for reading', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('a.raw'), patternAt(0, 1000))
    await using file = await openHostFile(dir.file('a.raw'))
    await assert.rejects(rawFormat.open(file, { write: true }), (error) => isVarveError(error, 'READ_ONLY'))
  })
})
