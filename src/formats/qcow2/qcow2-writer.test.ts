/** Writing: a byte array as the model, QEMU as the judge of what stands on disk. */
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { must, needs, patternAt, Random, tempDir } from '../../../test/kit/index.ts'
import { assertBytes, assertClean, create, io, qemuBytes } from '../../../test/kit/qcow2.ts'
import { type BlockDevice, MemoryDevice, openHostFile, readBytes } from '../../device/index.ts'
import type { FillAbsent } from '../image-format.ts'
import { Qcow2Layer, Qcow2Writer, qcow2Format } from './index.ts'

const skip = needs('qemu-img', 'qemu-io')

type Settings = Readonly<Record<string, string | number | boolean>>

interface Model {
  bytes: Uint8Array
  readonly below: Uint8Array | undefined
}

/** What the chain above would read: the layer over the backing file. */
async function readThrough(layer: BlockDevice, below: Uint8Array | undefined): Promise<Uint8Array> {
  const out = await readBytes(layer, 0, layer.size)
  if (!below) return out
  for (let at = 0; at < layer.size; ) {
    for (const extent of await layer.extents(at, layer.size - at)) {
      const end = extent.offset + extent.length
      if (extent.kind === 'absent')
        out.set(
          below.subarray(extent.offset, Math.max(extent.offset, Math.min(end, below.length))),
          extent.offset,
        )
      at = end
    }
  }
  return out
}

function filler(below: Uint8Array | undefined): FillAbsent {
  return async (offset, into) => {
    into.fill(0)
    if (below && offset < below.length)
      into.set(below.subarray(offset, Math.min(below.length, offset + into.length)))
  }
}

/** One random change, made to the layer and to the model. */
async function change(
  layer: Qcow2Writer,
  model: Model,
  random: Random,
  clusterBytes: number,
  resizes: boolean,
): Promise<string> {
  const size = model.bytes.length
  const offset = random.below(size)
  const length = Math.min(
    size - offset,
    1 + random.below(random.next() < 0.7 ? clusterBytes * 3 : clusterBytes * 40),
  )
  const dice = random.next()
  if (dice < 0.45) {
    const bytes = patternAt(offset, length, 1 + random.below(1000))
    await layer.write(offset, bytes)
    model.bytes.set(bytes, offset)
    return `write ${offset}+${length}`
  }
  if (dice < 0.6) {
    await layer.zero(offset, length)
    model.bytes.fill(0, offset, offset + length)
    return `zero ${offset}+${length}`
  }
  if (dice < 0.75) {
    const at = offset - (offset % clusterBytes)
    const bytes = new Uint8Array(Math.min(clusterBytes, size - at)).fill(1 + random.below(255))
    if (random.next() < 0.3) bytes.set(random.bytes(Math.min(bytes.length, 4000)))
    await layer.writeCompressed(at, bytes)
    model.bytes.set(bytes, at)
    return `writeCompressed ${at}`
  }
  if (dice < 0.85) {
    // Several at a time, overlapping clusters but not bytes.
    const parts = Array.from({ length: 4 }, (_, i) => {
      const from = offset + Math.floor((length * i) / 4)
      return { from, bytes: patternAt(from, offset + Math.floor((length * (i + 1)) / 4) - from, 77 + i) }
    })
    await Promise.all(parts.map((part) => layer.write(part.from, part.bytes)))
    for (const part of parts) model.bytes.set(part.bytes, part.from)
    return `4 writes ${offset}+${length}`
  }
  if (dice < 0.92 && resizes) {
    const next = Math.max(512, Math.floor((size * (0.6 + random.next() * 0.7)) / 512) * 512)
    await layer.resize(next)
    const bytes = new Uint8Array(next)
    bytes.set(model.bytes.subarray(0, Math.min(size, next)))
    model.bytes = bytes
    return `resize ${next}`
  }
  await layer.flush()
  return 'flush'
}

describe('qcow2 writing', { skip }, () => {
  const cases: readonly (readonly [string, Settings, number, boolean])[] = [
    ['512 B clusters', { clusterBytes: 512 }, 600_000, false],
    ['512 B clusters, 64-bit refcounts', { clusterBytes: 512, refcountBits: 64 }, 1_500_000, false],
    ['512 B clusters over a backing file', { clusterBytes: 512, refcountBits: 1 }, 400_000, true],
    ['4 KiB clusters', { clusterBytes: 4096, refcountBits: 8, compression: 'zstd' }, 3_000_000, false],
    ['4 KiB clusters over a backing file', { clusterBytes: 4096, refcountBits: 2 }, 3_000_000, true],
    ['64 KiB clusters', {}, 9_000_000, false],
    ['64 KiB clusters over a backing file', { lazyRefcounts: true, refcountBits: 32 }, 9_000_000, true],
    ['version 2', { version: 2, clusterBytes: 4096 }, 3_000_000, false],
    ['version 2 over a backing file', { version: 2, clusterBytes: 4096 }, 3_000_000, true],
    ['subclusters', { extendedL2: true, clusterBytes: 16384 }, 4_000_000, false],
    ['subclusters over a backing file', { extendedL2: true, refcountBits: 4 }, 6_000_000, true],
    ['2 MiB clusters', { clusterBytes: 2 << 20 }, 30_000_000, false],
  ]
  for (const [name, settings, bytes, backed] of cases) {
    test(`random changes agree with a byte array, and QEMU reads the same: ${name}`, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const clusterBytes = Number(settings['clusterBytes'] ?? 65536)
      const size = bytes - (bytes % 512)
      const below = backed ? new Uint8Array(patternAt(0, size - (size % 3) * 512, 9)) : undefined
      const path = dir.file('a.qcow2')
      if (below) {
        await using base = await openHostFile(dir.file('base'), { create: true })
        await base.resize(below.length)
        await base.write(0, below)
      }
      const fillAbsent = filler(below)
      const log: string[] = []
      const model: Model = { bytes: new Uint8Array(size), below }
      if (below) model.bytes.set(below)
      let layer = (await qcow2Format.create!(await openHostFile(path, { create: true }), {
        virtualSize: size,
        settings,
        ...(below ? { backing: { name: 'base', format: 'raw' }, fillAbsent } : {}),
      })) as Qcow2Writer
      try {
        for (let round = 0; round < 4; round++) {
          for (let i = 0; i < 25; i++) log.push(await change(layer, model, random, clusterBytes, true))
          assertBytes(await readThrough(layer, below), model.bytes, `seed ${random.seed}\n${log.join('\n')}`)
          await layer[Symbol.asyncDispose]()
          await assertClean(path)
          assertBytes(
            await qemuBytes(path, dir.file('raw')),
            model.bytes,
            `QEMU, seed ${random.seed}\n${log.join('\n')}`,
          )
          layer = await Qcow2Writer.open(await openHostFile(path, { write: true }), { fillAbsent })
        }
      } finally {
        await layer[Symbol.asyncDispose]()
      }
      await using reader = await Qcow2Layer.open(await openHostFile(path))
      assertBytes(await readThrough(reader, below), model.bytes, `reader, seed ${random.seed}`)
    })
  }

  test('internal snapshots keep what they had', async () => {
    for (const options of ['cluster_size=4096', 'extended_l2=on,cluster_size=16384']) {
      await using dir = await tempDir()
      const random = new Random()
      const path = dir.file('a.qcow2')
      const size = 2 << 20
      await create({ path, bytes: size, options })
      await io(path, ['write -c -P 9 0 64k', 'write -P 1 64k 700k', 'write -z 512k 32k'])
      await must('qemu-img', ['snapshot', '-c', 's', path])
      const old = await qemuBytes(path, dir.file('raw'))
      const model: Model = { bytes: Uint8Array.from(old), below: undefined }
      {
        await using layer = await Qcow2Writer.open(await openHostFile(path, { write: true }))
        for (let i = 0; i < 40; i++) await change(layer, model, random, layer.header.clusterBytes, false)
        await assert.rejects(layer.resize(size * 2), { code: 'UNSUPPORTED' })
      }
      await assertClean(path)
      assertBytes(await qemuBytes(path, dir.file('raw')), model.bytes, `seed ${random.seed}`)
      await must('qemu-img', ['snapshot', '-a', 's', path])
      assertBytes(await qemuBytes(path, dir.file('raw')), old, `snapshot, seed ${random.seed}`)
      await must('qemu-img', ['snapshot', '-d', 's', path])
      await assertClean(path)
    }
  })

  for (const raw of ['off', 'on']) {
    test(`an external data file is written at the guest's own offsets (data_file_raw=${raw})`, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const path = dir.file('a.qcow2')
      const size = 3_000_320
      await create({ path, bytes: size, options: `data_file=${dir.file('data')},data_file_raw=${raw}` })
      const model: Model = { bytes: new Uint8Array(size), below: undefined }
      {
        await using layer = await Qcow2Writer.open(await openHostFile(path, { write: true }), {
          openPart: async (name) => await openHostFile(name, { write: true }),
        })
        for (let i = 0; i < 60; i++) await change(layer, model, random, 65536, true)
      }
      await assertClean(path)
      assertBytes(await qemuBytes(path, dir.file('raw')), model.bytes, `seed ${random.seed}`)
      if (raw === 'on') {
        await using data = await openHostFile(dir.file('data'))
        assertBytes(await readBytes(data, 0, data.size), model.bytes, `data file, seed ${random.seed}`)
      }
    })
  }

  test('bitmaps that record are marked in use before the first change, the others stay good', async () => {
    await using dir = await tempDir()
    const path = dir.file('a.qcow2')
    await create({ path, bytes: 1 << 20 })
    await must('qemu-img', ['bitmap', '--add', path, 'on'])
    await must('qemu-img', ['bitmap', '--add', '--disable', path, 'off'])
    {
      await using layer = await Qcow2Writer.open(await openHostFile(path, { write: true }))
      assert.equal(layer.facts['bitmap1'], 'on (granularity 2^16, auto)')
      await layer.write(5, patternAt(5, 100))
      await assert.rejects(layer.resize(2 << 20), { code: 'UNSUPPORTED' })
    }
    await assertClean(path)
    const info = JSON.parse(await must('qemu-img', ['info', '--output=json', path])) as {
      'format-specific': { data: { bitmaps: { name: string; flags: string[] }[] } }
    }
    assert.deepEqual(
      info['format-specific'].data.bitmaps.map(({ name, flags }) => [name, flags]),
      [
        ['on', ['in-use', 'auto']],
        ['off', []],
      ],
    )
  })

  test('an image that was only opened for writing is not changed', async () => {
    await using dir = await tempDir()
    const path = dir.file('a.qcow2')
    await create({ path, bytes: 1 << 20 })
    await must('qemu-img', ['bitmap', '--add', path, 'on'])
    await using file = await openHostFile(path)
    const before = await readBytes(file, 0, file.size)
    {
      await using layer = await Qcow2Writer.open(await openHostFile(path, { write: true }))
      await layer.flush()
    }
    await using again = await openHostFile(path)
    assertBytes(await readBytes(again, 0, again.size), before, 'file')
  })

  test('a partial write over a backing file is refused when nobody gives its bytes', async () => {
    const layer = await qcow2Format.create!(new MemoryDevice(0), {
      virtualSize: 1 << 20,
      backing: { name: 'base', format: 'raw' },
    })
    await assert.rejects(layer.write(1, Uint8Array.of(1)), { code: 'UNSUPPORTED' })
    await layer.write(65536, new Uint8Array(65536).fill(3))
    await layer.write(65537, Uint8Array.of(1))
    assert.deepEqual(
      (await layer.extents(0, 1 << 20)).map(({ kind }) => kind),
      ['absent', 'data', 'absent'],
    )
    await layer[Symbol.asyncDispose]()
  })

  test('zeroed clusters are given back and used again', async () => {
    await using dir = await tempDir()
    const path = dir.file('a.qcow2')
    await using layer = await qcow2Format.create!(await openHostFile(path, { create: true }), {
      virtualSize: 64 << 20,
    })
    for (let turn = 0; turn < 6; turn++) {
      await layer.write(0, patternAt(0, 4 << 20, turn + 1))
      await layer.zero(0, 64 << 20)
      await layer.flush()
    }
    await layer[Symbol.asyncDispose]()
    await using file = await openHostFile(path)
    assert.ok(file.size < 10 << 20, `file of ${file.size}`)
    assert.ok((await file.allocatedBytes()) < 2 << 20)
    await assertClean(path)
  })

  test('a large image of small clusters grows its refcount table', async () => {
    await using dir = await tempDir()
    const path = dir.file('a.qcow2')
    const size = 12 << 20
    {
      await using layer = await qcow2Format.create!(await openHostFile(path, { create: true }), {
        virtualSize: size,
        settings: { clusterBytes: 512, refcountBits: 64 },
      })
      await layer.write(0, patternAt(0, size))
    }
    await assertClean(path)
    assertBytes(await qemuBytes(path, dir.file('raw')), patternAt(0, size), 'content')
  })

  test('create() makes what qemu-img info expects, for every setting', async () => {
    await using dir = await tempDir()
    for (let bits = 9; bits <= 21; bits++) {
      const path = dir.file(`${bits}`)
      const layer = await qcow2Format.create!(await openHostFile(path, { create: true }), {
        virtualSize: 5_000_001,
        settings: {
          clusterBytes: 2 ** bits,
          refcountBits: 2 ** (bits % 7),
          compression: bits % 2 ? 'zstd' : 'deflate',
        },
      })
      assert.equal(layer.size, 5_000_192)
      await layer[Symbol.asyncDispose]()
      await assertClean(path)
      const info = JSON.parse(await must('qemu-img', ['info', '--output=json', path])) as Record<
        string,
        unknown
      > & {
        'format-specific': { data: Record<string, unknown> }
      }
      assert.deepEqual(
        [
          info['virtual-size'],
          info['cluster-size'],
          info['format-specific'].data['refcount-bits'],
          info['format-specific'].data['compression-type'],
        ],
        [5_000_192, 2 ** bits, 2 ** (bits % 7), bits % 2 ? 'zstd' : 'zlib'],
      )
    }
    await assert.rejects(
      qcow2Format.create!(new MemoryDevice(0), { virtualSize: 1, settings: { clusterSize: 4096 } }),
      { code: 'USAGE', message: /clusterSize/ },
    )
    await assert.rejects(
      qcow2Format.create!(new MemoryDevice(0), { virtualSize: 2 ** 42, settings: { clusterBytes: 512 } }),
      { code: 'LIMIT' },
    )
  })

  test('dirty and corrupt images are not written to', async () => {
    await using dir = await tempDir()
    for (const [bit, message] of [
      [1, /stale/],
      [2, /corrupt/],
    ] as const) {
      const path = dir.file(`${bit}`)
      await create({ path, bytes: 1 << 20 })
      await using file = await openHostFile(path, { write: true })
      await file.write(79, Uint8Array.of(bit))
      await assert.rejects(Qcow2Writer.open(file), { code: 'CORRUPT', message })
      await using reader = await Qcow2Layer.open(await openHostFile(path))
      assert.equal(reader.facts[bit === 1 ? 'dirty' : 'corrupt'], true)
      await readBytes(reader, 0, 1 << 20)
    }
  })
})
