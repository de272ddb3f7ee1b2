/** The contract of BlockDevice over the VHD layers. */
import { writeFile } from 'node:fs/promises'
import { type DeviceUnderTest, deviceSuite } from '../../../test/kit/device-suite.ts'
import { patternAt, tempDir } from '../../../test/kit/index.ts'
import { makeVhd, sumInto, type VhdRecipe } from '../../../test/kit/vhd-recipe.ts'
import { type BlockDevice, MemoryDevice, openHostFile } from '../../device/index.ts'
import { vhdFormat } from './index.ts'

const SECTORS = 517
const HELD = Array.from({ length: SECTORS }, (_, i) => i).filter(
  (i) => i < 140 || i % 7 < 4 || i === SECTORS - 1,
)

function expected(): Uint8Array {
  const bytes = new Uint8Array(SECTORS * 512)
  for (const sector of HELD) bytes.set(patternAt(sector * 512, 512), sector * 512)
  return bytes
}

async function layer(image: Uint8Array, on: 'memory' | 'host'): Promise<DeviceUnderTest> {
  const dir = await tempDir()
  let file: BlockDevice = new MemoryDevice(new Uint8Array(image))
  if (on === 'host') {
    await writeFile(dir.file('a.vhd'), image)
    file = await openHostFile(dir.file('a.vhd'))
  }
  const device = await vhdFormat.open(file, {})
  return {
    device,
    expected: expected(),
    async [Symbol.asyncDispose]() {
      await device[Symbol.asyncDispose]()
      await dir[Symbol.asyncDispose]()
    },
  }
}

function sparse(recipe: Partial<VhdRecipe>): Uint8Array {
  return makeVhd({
    type: 'dynamic',
    size: SECTORS * 512,
    blockBytes: 65_536,
    sectors: new Map(HELD.map((sector) => [sector, patternAt(sector * 512, 512)])),
    ...recipe,
  }).bytes
}

function fixed(): Uint8Array {
  const footer = Buffer.from(makeVhd({ type: 'dynamic', size: SECTORS * 512 }).bytes.subarray(0, 512))
  footer.writeUInt32BE(2, 60)
  footer.writeBigUInt64BE(0xffffffffffffffffn, 16)
  sumInto(footer, 64)
  return Buffer.concat([expected(), footer])
}

deviceSuite('SparseVhdLayer, dynamic', () => layer(sparse({}), 'host'), { write: false })
deviceSuite('SparseVhdLayer, dynamic with batmap', () => layer(sparse({ batmap: 0x10002 }), 'host'), {
  write: false,
})
deviceSuite(
  'SparseVhdLayer, differencing, in memory',
  () => layer(sparse({ type: 'differencing', parentName: 'p.vhd', blockBytes: 4096 }), 'memory'),
  { write: false },
)
deviceSuite('FixedVhdLayer', () => layer(fixed(), 'host'), { write: false })
