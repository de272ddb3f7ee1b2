/**
 * A writer for backup-kill.test.ts: backs up a disk image at a limited rate and gets killed meanwhile.
 * Arguments: repository, image, name of the disk, milliseconds that each read takes. Prints `started` and `done ID`.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { openRepository } from '../../src/backup/index.ts'
import { type BlockDevice, openHostFile } from '../../src/device/index.ts'
import { RangeSet } from '../../src/extents/index.ts'

const [path = '', image = '', disk = '', delayMs = '0'] = process.argv.slice(2)
await using repository = await openRepository(path, { workers: 2 })
await using file = await openHostFile(image)
const slow: BlockDevice = {
  size: file.size,
  blockSize: file.blockSize,
  features: { ...file.features, places: false },
  async read(offset, into, signal) {
    await sleep(Number(delayMs))
    await file.read(offset, into, signal)
  },
  async extents(offset, length, signal) {
    const extents = await file.extents(offset, length, signal)
    return Number(delayMs) === 0 ? extents : extents.map(({ at: _at, ...extent }) => extent)
  },
  async [Symbol.asyncDispose]() {},
}
process.stdout.write('started\n')
const result = await repository.backup({ disk, device: slow, inUse: RangeSet.of(0, file.size) })
process.stdout.write(`done ${result.point}\n`)
