/** The layers keep the contract of every device: the shared suite, over reading and writing. */
import { type DeviceUnderTest, deviceSuite } from '../../../test/kit/device-suite.ts'
import { patternAt, tempDir } from '../../../test/kit/index.ts'
import { openHostFile } from '../../device/index.ts'
import { Qcow2Layer, Qcow2Writer, qcow2Format } from './index.ts'

const SIZE = 300_032

async function image(
  write: boolean,
  settings: Readonly<Record<string, string | number | boolean>>,
): Promise<DeviceUnderTest> {
  const dir = await tempDir()
  const path = dir.file('a.qcow2')
  const expected = new Uint8Array(SIZE)
  {
    await using layer = await qcow2Format.create!(await openHostFile(path, { create: true }), {
      virtualSize: SIZE,
      settings,
    })
    for (const [start, end] of [
      [0, 20_000],
      [65_536, 65_537],
      [131_072, 196_608],
      [SIZE - 30_000, SIZE - 10_000],
    ] as const) {
      expected.set(patternAt(start, end - start), start)
      await layer.write(start, expected.subarray(start, end))
    }
    const packed = new Uint8Array(16_384).fill(7)
    expected.set(packed, 229_376)
    for (let at = 229_376; at < 229_376 + packed.length; at += Number(settings['clusterBytes'])) {
      await layer.writeCompressed!(at, packed.subarray(0, Number(settings['clusterBytes'])))
    }
  }
  const file = await openHostFile(path, { write })
  const device = write ? await Qcow2Writer.open(file) : await Qcow2Layer.open(file)
  return {
    device,
    expected,
    async [Symbol.asyncDispose]() {
      await device[Symbol.asyncDispose]()
      await dir[Symbol.asyncDispose]()
    },
  }
}

for (const settings of [
  { clusterBytes: 512 },
  { clusterBytes: 4096 },
  { clusterBytes: 16_384, extendedL2: true },
]) {
  const name = JSON.stringify(settings)
  deviceSuite(`Qcow2Layer ${name}`, () => image(false, settings), { write: false })
  deviceSuite(`Qcow2Writer ${name}`, () => image(true, settings), { write: true, resize: true, steps: 150 })
}
