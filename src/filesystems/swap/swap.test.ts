import assert from 'node:assert/strict'
import { readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, tempDir } from '../../../test/kit/index.ts'
import { NotTrusted } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { swap } from './index.ts'

const SIZE = 4 * 1024 * 1024
const UUID = '5a5a0000-0000-4000-8000-0000000000aa'

async function makeSwap(pageBytes: number): Promise<Uint8Array> {
  await using dir = await tempDir()
  const image = dir.file('swap')
  await writeFile(image, '')
  await truncate(image, SIZE)
  await must('mkswap', ['-q', '-p', String(pageBytes), '-U', UUID, '-L', 'pages', image])
  return new Uint8Array(await readFile(image))
}

function mark(image: Uint8Array, pageBytes: number, text: string): Uint8Array {
  const copy = image.slice()
  copy.fill(0, pageBytes - 10, pageBytes)
  copy.set(Buffer.from(text, 'latin1'), pageBytes - 10)
  return copy
}

const refusal = (reason: string) => (error: unknown) => error instanceof NotTrusted && error.reason === reason

describe('swap', { skip: needs('mkswap') }, () => {
  for (const pageBytes of [4096, 8192, 16_384, 32_768, 65_536]) {
    test(`with pages of ${pageBytes} bytes: the header page and the tail are in use`, async () => {
      const image = await makeSwap(pageBytes)
      const device = new MemoryDevice(image)
      assert.equal(await swap.probe(device), true)
      const area = await swap.open(device, {})
      assert.deepEqual([area.kind, area.uuid, area.label], ['swap', UUID, 'pages'])
      assert.deepEqual([area.size, area.blockBytes], [SIZE, pageBytes])
      const map = await area.used({})
      assert.equal(String(map.ranges), `[0,${pageBytes})`)
      assert.deepEqual([map.trust, map.state], ['exact', 'clean'])

      const longer = new Uint8Array(SIZE + 700)
      longer.set(image)
      const tail = await (await swap.open(new MemoryDevice(longer), {})).used({})
      assert.equal(String(tail.ranges), `[0,${pageBytes}) [${SIZE},${SIZE + 700})`)
    })
  }

  test('written in the other byte order is read', async () => {
    const image = await makeSwap(4096)
    // What mkswap on a big-endian machine writes: version, last page and number of bad pages the other way round.
    const view = new DataView(image.buffer)
    for (const at of [1024, 1028, 1032]) view.setUint32(at, view.getUint32(at, true), false)
    const area = await swap.open(new MemoryDevice(image), {})
    assert.equal(area.size, SIZE)
    assert.equal(area.uuid, UUID)
  })

  test('that holds a suspended machine is not trusted', async () => {
    const image = await makeSwap(4096)
    for (const text of [
      'S1SUSPEND\0',
      'S2SUSPEND\0',
      'ULSUSPEND\0',
      'LINHIB0001',
      '\xed\xc3\x02\xe9\x98\x56\xe5\x0c',
    ]) {
      const device = new MemoryDevice(mark(image, 4096, text))
      assert.equal(await swap.probe(device), true, text)
      await assert.rejects(swap.open(device, {}), refusal('swap-suspended'), text)
    }
  })

  test('of version 0, or of a version to come, is not trusted', async () => {
    const image = await makeSwap(4096)
    await assert.rejects(
      swap.open(new MemoryDevice(mark(image, 4096, 'SWAP-SPACE')), {}),
      refusal('swap-version'),
    )
    new DataView(image.buffer).setUint32(1024, 2, true)
    await assert.rejects(swap.open(new MemoryDevice(image), {}), refusal('swap-version'))
  })

  test('larger than its partition, or of no page at all, is not trusted', async () => {
    const image = await makeSwap(4096)
    for (const size of [SIZE - 1, SIZE - 4096, 8192, 4096]) {
      const device = new MemoryDevice(image.subarray(0, size))
      await assert.rejects(swap.open(device, {}), refusal('swap-size-mismatch'), `${size} bytes`)
    }
    for (const lastPage of [0, 0xffffffff]) {
      new DataView(image.buffer).setUint32(1028, lastPage, true)
      await assert.rejects(swap.open(new MemoryDevice(image), {}), refusal('swap-size-mismatch'))
    }
  })

  test('is not seen on devices that are too small or hold none', async () => {
    for (const size of [0, 9, 512, 4095, 4096, 70_000]) {
      assert.equal(await swap.probe(new MemoryDevice(size)), false)
    }
  })
})
