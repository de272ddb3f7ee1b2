/** The contract of BlockDevice over chains. */
import { writeFile } from 'node:fs/promises'
import { type DeviceUnderTest, deviceSuite } from '../../test/kit/device-suite.ts'
import { patternAt, tempDir } from '../../test/kit/index.ts'
import { makeVhd, RECIPE_UUID, type VhdRecipe } from '../../test/kit/vhd-recipe.ts'
import { openDisk } from './index.ts'

const SECTORS = 600

/** Layer n of `depth` holds every sector that n + 2 divides, and below the top some layers end early. */
async function chain(depth: number): Promise<DeviceUnderTest> {
  const dir = await tempDir()
  const sizes = Array.from({ length: depth }, (_, n) =>
    n === depth - 1 ? SECTORS : SECTORS + 30 - ((n * 37) % 90),
  )
  const holds = (n: number, sector: number): boolean =>
    sector % (n + 2) === 0 || (sector > 300 && sector < 310)
  for (const [n, size] of sizes.entries()) {
    const numbers = Array.from({ length: size }, (_, i) => i).filter((sector) => holds(n, sector))
    const recipe: VhdRecipe = {
      type: n === 0 ? 'dynamic' : 'differencing',
      size: size * 512,
      blockBytes: n % 2 ? 4096 : 65_536,
      sectors: new Map(numbers.map((sector) => [sector, patternAt(sector * 512, 512, n + 1)])),
      ...(n > 0 ? { parentUuid: RECIPE_UUID, parentName: `${n - 1}.vhd` } : {}),
    }
    await writeFile(dir.file(`${n}.vhd`), makeVhd(recipe).bytes)
  }
  const expected = new Uint8Array(SECTORS * 512)
  for (let sector = 0; sector < SECTORS; sector++) {
    for (let n = depth - 1; n >= 0 && sector < sizes[n]!; n--) {
      if (!holds(n, sector)) continue
      expected.set(patternAt(sector * 512, 512, n + 1), sector * 512)
      break
    }
  }
  const device = await openDisk(dir.file(`${depth - 1}.vhd`))
  return {
    device,
    expected,
    async [Symbol.asyncDispose]() {
      await device[Symbol.asyncDispose]()
      await dir[Symbol.asyncDispose]()
    },
  }
}

for (const depth of [1, 2, 7]) deviceSuite(`ChainDisk of ${depth}`, () => chain(depth), { write: false })
