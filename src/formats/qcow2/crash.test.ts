/** Power loss at any moment: the image opens, nothing flushed is lost, and at worst clusters leak. */
import assert from 'node:assert/strict'
import { writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { needs, patternAt, Random, run, tempDir } from '../../../test/kit/index.ts'
import { assertBytes } from '../../../test/kit/qcow2.ts'
import { CrashDevice, MemoryDevice, readBytes } from '../../device/index.ts'
import { checkImage } from './check.ts'
import { createImage } from './create.ts'
import { Qcow2Layer, Qcow2Writer, repairImage } from './index.ts'

const SIZE = 192 * 1024

/** What may stand in each sector of the disk, given when a state was made and when it became durable. */
interface Step {
  /** The tick at which the change was issued. */
  readonly issued: number
  /** The disk after it. */
  readonly disk: Uint8Array
  /** A flush: everything before is durable from `resolved` on. */
  readonly flushed: number | undefined
}

for (const settings of [
  { clusterBytes: 512 },
  { clusterBytes: 4096 },
  { clusterBytes: 16384, extendedL2: true },
  { clusterBytes: 4096, refcountBits: 64 },
]) {
  describe(`qcow2 power loss, ${JSON.stringify(settings)}`, () => {
    test('each sector is as it was flushed, or as a later change made it', async () => {
      const random = new Random()
      const medium = new MemoryDevice(0)
      await createImage(medium, { virtualSize: SIZE, settings })
      const device = await CrashDevice.over(medium)
      const disk = new Uint8Array(SIZE)
      const steps: Step[] = [{ issued: 0, disk: disk.slice(), flushed: 0 }]
      const layer = await Qcow2Writer.open(device)
      for (let i = 0; i < 60; i++) {
        // Whole sectors: a sector that two changes share may hold the second without the first.
        const offset = random.below(SIZE / 512) * 512
        const length = Math.min(SIZE - offset, 512 * (1 + random.below(settings.clusterBytes / 128)))
        const issued = device.clock.now
        const dice = random.next()
        if (dice < 0.5) {
          const bytes = patternAt(offset, length, i + 1)
          await layer.write(offset, bytes)
          disk.set(bytes, offset)
        } else if (dice < 0.7) {
          await layer.zero(offset, length)
          disk.fill(0, offset, offset + length)
        } else if (dice < 0.8) {
          const at = offset - (offset % settings.clusterBytes)
          const bytes = new Uint8Array(settings.clusterBytes).fill(i + 1)
          await layer.writeCompressed(at, bytes)
          disk.set(bytes, at)
        } else await layer.flush()
        steps.push({ issued, disk: disk.slice(), flushed: dice < 0.8 ? undefined : device.clock.now })
      }
      await layer.flush()
      await layer[Symbol.asyncDispose]()

      for (let tick = 0; tick <= device.clock.now; tick += 1 + random.below(3)) {
        for (const survival of ['none', 'all', random] as const) {
          const what = `seed ${random.seed}, tick ${tick}, ${typeof survival === 'string' ? survival : 'torn'}`
          const content = new MemoryDevice(device.contentAfterLoss(tick, survival))
          const findings = await checkImage(content)
          assert.deepEqual(
            findings.filter(({ severity }) => severity === 'error'),
            [],
            what,
          )
          await using after = await Qcow2Layer.open(content)
          const found = await readBytes(after, 0, SIZE)
          const flushed = steps.findLastIndex((step) => step.flushed !== undefined && step.flushed <= tick)
          const states = steps.slice(flushed).filter((step) => step.issued <= tick)
          for (let at = 0; at < SIZE; at += 512) {
            const sector = found.subarray(at, at + 512)
            assert.ok(
              states.some((step) => Buffer.compare(sector, step.disk.subarray(at, at + 512)) === 0),
              `${what}: sector at ${at} was never like this`,
            )
          }
        }
      }
    })

    test('a resize is done or not done', async () => {
      const random = new Random()
      const medium = new MemoryDevice(0)
      await createImage(medium, { virtualSize: SIZE, settings })
      const content = patternAt(0, SIZE)
      {
        await using layer = await Qcow2Writer.open(new Borrowed(medium))
        await layer.write(0, content)
      }
      for (const target of [SIZE * 40, 50 * 1024]) {
        const copy = new MemoryDevice(medium.bytes.slice())
        const device = await CrashDevice.over(copy)
        const layer = await Qcow2Writer.open(device)
        await layer.resize(target)
        await layer.flush()
        await layer[Symbol.asyncDispose]()
        for (let tick = 0; tick <= device.clock.now; tick++) {
          const what = `seed ${random.seed}, to ${target}, tick ${tick}`
          const after = new MemoryDevice(device.contentAfterLoss(tick, random))
          assert.deepEqual(
            (await checkImage(after)).filter(({ severity }) => severity === 'error'),
            [],
            what,
          )
          await using reader = await Qcow2Layer.open(after)
          assert.ok([SIZE, target].includes(reader.size), what)
          const kept = Math.min(SIZE, reader.size)
          assertBytes(await readBytes(reader, 0, kept), content.subarray(0, kept), what)
        }
      }
    })
  })
}

/** A memory device under another name, so that the layer's dispose does not end the medium itself. */
class Borrowed extends MemoryDevice {
  readonly #medium: MemoryDevice

  constructor(medium: MemoryDevice) {
    super(0)
    this.#medium = medium
  }

  override get size(): number {
    return this.#medium.size
  }
  override read(offset: number, into: Uint8Array): Promise<void> {
    return this.#medium.read(offset, into)
  }
  override write(offset: number, bytes: Uint8Array): Promise<void> {
    return this.#medium.write(offset, bytes)
  }
  override zero(offset: number, length: number): Promise<void> {
    return this.#medium.zero(offset, length)
  }
  override resize(size: number): Promise<void> {
    return this.#medium.resize(size)
  }
  override async [Symbol.asyncDispose](): Promise<void> {}
}

test('QEMU opens what a power loss leaves, and finds nothing but leaks', {
  skip: needs('qemu-img'),
}, async () => {
  await using dir = await tempDir()
  const random = new Random()
  const medium = new MemoryDevice(0)
  await createImage(medium, { virtualSize: SIZE, settings: { clusterBytes: 512, refcountBits: 64 } })
  const device = await CrashDevice.over(medium)
  const layer = await Qcow2Writer.open(device)
  for (let i = 0; i < 25; i++) {
    const offset = random.below(SIZE - 9000)
    await layer.write(offset, patternAt(offset, 1 + random.below(9000), i + 1))
    if (i % 4 === 0) await layer.flush()
    if (i % 5 === 0) await layer.zero(offset, 5000)
  }
  await layer[Symbol.asyncDispose]()
  for (let turn = 0; turn < 25; turn++) {
    const tick = random.below(device.clock.now + 1)
    const path = dir.file('a')
    const content = device.contentAfterLoss(tick, random)
    await writeFile(path, content)
    const result = await run('qemu-img', ['check', '-f', 'qcow2', path])
    assert.ok(
      result.code === 0 || result.code === 3,
      `seed ${random.seed}, tick ${tick}: ${result.stdout.toString()}${result.stderr}`,
    )
    const file = new MemoryDevice(content)
    await repairImage(file)
    await writeFile(path, file.bytes)
    assert.equal(
      (await run('qemu-img', ['check', '-f', 'qcow2', path])).code,
      0,
      `repaired, seed ${random.seed}`,
    )
  }
})
