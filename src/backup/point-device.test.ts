/** A restore point keeps the contract of every device. */
import { contentOf, kept, randomDisk, sourceOf } from '../../test/kit/backup.ts'
import { deviceSuite } from '../../test/kit/device-suite.ts'
import { Random, tempDir } from '../../test/kit/index.ts'
import { createRepository } from './index.ts'

for (const password of [undefined, 'p']) {
  deviceSuite(
    `PointDevice, ${password ? 'encrypted' : 'plain'}`,
    async () => {
      const dir = await tempDir()
      const repository = await createRepository(dir.file('r'), {
        password,
        chunkBytes: 262_144,
        frameBytes: 65_536,
        workers: 1,
      })
      const disk = randomDisk(new Random(), 1_300_000)
      await repository.backup(sourceOf('vm', disk))
      const device = await repository.openPoint({ disk: 'vm', point: 'latest' })
      await contentOf(device)
      return {
        device,
        expected: kept(disk),
        async [Symbol.asyncDispose]() {
          await device[Symbol.asyncDispose]()
          await repository[Symbol.asyncDispose]()
          await dir[Symbol.asyncDispose]()
        },
      }
    },
    { write: false },
  )
}
