/** Reading: images made by QEMU, byte for byte and extent for extent as QEMU reads them. */
import assert from 'node:assert/strict'
import { copyFile, truncate } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, Random, tempDir } from '../../../test/kit/index.ts'
import {
  assertBytes,
  create,
  io,
  ownExtents,
  qemuBytes,
  qemuExtents,
  randomCommands,
} from '../../../test/kit/qcow2.ts'
import { CountingDevice, openHostFile, readBytes } from '../../device/index.ts'
import { checkExtents } from '../../extents/index.ts'
import { Qcow2Layer, qcow2Format } from './index.ts'

const skip = needs('qemu-img', 'qemu-io')

async function openLayer(path: string): Promise<Qcow2Layer> {
  return await Qcow2Layer.open(await openHostFile(path), {
    openPart: async (name) => await openHostFile(name),
  })
}

/** Whole disk, then random parts of it, then the extents, against QEMU. */
async function compare(path: string, scratch: string, random: Random): Promise<void> {
  const expected = await qemuBytes(path, scratch)
  await using layer = await openLayer(path)
  assert.equal(layer.size, expected.length)
  assertBytes(await readBytes(layer, 0, layer.size), expected, `${path}, seed ${random.seed}`)
  for (let i = 0; i < 40 && layer.size > 0; i++) {
    const offset = random.below(layer.size)
    const length = 1 + random.below(Math.min(layer.size - offset, 300_000))
    const found = await readBytes(layer, offset, length)
    assertBytes(
      found,
      expected.subarray(offset, offset + length),
      `${path} ${offset}+${length}, seed ${random.seed}`,
    )
    checkExtents(await layer.extents(offset, length), offset, length)
  }
  assert.deepEqual(await ownExtents(layer), await qemuExtents(path))
}

describe('qcow2 reading', { skip }, () => {
  for (const [clusterBytes, compat] of [
    [512, '1.1'],
    [512, '0.10'],
    [1024, '1.1'],
    [2048, '0.10'],
    [4096, '1.1'],
    [8192, '1.1'],
    [16384, '0.10'],
    [32768, '1.1'],
    [65536, '1.1'],
    [65536, '0.10'],
    [131072, '1.1'],
    [262144, '1.1'],
    [524288, '0.10'],
    [1048576, '1.1'],
    [2097152, '1.1'],
  ] as const) {
    test(`read() and extents() agree with QEMU: ${clusterBytes} bytes, compat ${compat}`, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const path = dir.file('a.qcow2')
      // Not a multiple of the cluster size.
      const bytes = Math.max(clusterBytes * 12, 1 << 20) + 512 * 3
      await create({ path, bytes, options: `cluster_size=${clusterBytes},compat=${compat}` })
      const zeros = compat === '1.1'
      await io(path, randomCommands(random, { bytes, clusterBytes, count: 60, compressed: true, zeros }))
      await compare(path, dir.file('raw'), random)
    })
  }

  for (const clusterBytes of [16384, 65536, 2097152]) {
    test(`read() understands subclusters of ${clusterBytes / 32} bytes`, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const path = dir.file('a.qcow2')
      const bytes = clusterBytes * 20 + 1536
      await create({ path, bytes, options: `extended_l2=on,cluster_size=${clusterBytes}` })
      await io(path, randomCommands(random, { bytes, clusterBytes, count: 80, compressed: true }))
      await compare(path, dir.file('raw'), random)
    })
  }

  for (const type of ['zlib', 'zstd']) {
    test(`read() decodes clusters that qemu-img compressed with ${type}`, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const raw = dir.file('source')
      const path = dir.file('a.qcow2')
      const content = new Uint8Array(2 * 1048576 + 7 * 512)
      // Text-like, random (not compressible) and zero stretches, of odd lengths.
      for (let at = 0; at < content.length; ) {
        const length = Math.min(content.length - at, 1 + random.below(200_000))
        const dice = random.below(3)
        if (dice === 0) content.set(random.bytes(length), at)
        else if (dice === 1) for (let i = 0; i < length; i++) content[at + i] = 97 + random.below(6)
        at += length
      }
      await using file = await openHostFile(raw, { create: true })
      await file.resize(content.length)
      await file.write(0, content)
      for (const clusterBytes of [512, 4096, 65536, 2097152]) {
        await must('qemu-img', [
          'convert',
          '-c',
          '-f',
          'raw',
          '-O',
          'qcow2',
          '-o',
          `compression_type=${type},cluster_size=${clusterBytes}`,
          raw,
          path,
        ])
        await compare(path, dir.file('raw'), random)
        await using layer = await openLayer(path)
        assert.equal(layer.facts['compression'], type === 'zstd' ? 'zstd' : 'deflate')
      }
    })
  }

  test('small sequential reads decode a compressed cluster once', async () => {
    await using dir = await tempDir()
    const path = dir.file('a.qcow2')
    await create({ path, bytes: 1 << 20 })
    await io(path, ['write -c -P 7 0 64k', 'write -c -P 8 64k 64k'])
    await using file = await openHostFile(path)
    const counting = new CountingDevice(file)
    await using layer = await Qcow2Layer.open(counting)
    for (let turn = 0; turn < 200; turn++) {
      const before = counting.counts.reads
      for (const [offset, byte] of [
        [512 * (turn % 100), 7],
        [65536 + 512 * (turn % 100), 8],
      ] as const) {
        assert.ok((await readBytes(layer, offset, 512)).every((found) => found === byte))
      }
      if (turn > 0) assert.equal(counting.counts.reads, before)
    }
  })

  for (const raw of ['off', 'on']) {
    test(`read() takes guest data from an external data file (data_file_raw=${raw})`, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const path = dir.file('a.qcow2')
      const bytes = 3 * 1048576 + 512
      await create({ path, bytes, options: `data_file=${dir.file('data')},data_file_raw=${raw}` })
      await io(path, randomCommands(random, { bytes, clusterBytes: 65536, count: 40 }))
      const expected = await qemuBytes(path, dir.file('raw'))
      await using layer = await openLayer(path)
      assertBytes(await readBytes(layer, 0, bytes), expected, `seed ${random.seed}`)
      assert.deepEqual(
        [layer.facts['dataFile'], layer.facts['dataFileRaw']],
        [dir.file('data'), raw === 'on'],
      )
      for (const extent of await layer.extents(0, bytes)) {
        if (extent.kind === 'data') assert.equal(extent.at?.file.path, dir.file('data'))
      }
      await using file = await openHostFile(path)
      await assert.rejects(qcow2Format.open(file, {}), { code: 'UNSUPPORTED', message: /external data file/ })
    })
  }

  test('a layer of a chain: backing is named, its own clusters alone are present', async () => {
    await using dir = await tempDir()
    const random = new Random()
    const bytes = 2 << 20
    const [base, top] = [dir.file('base.qcow2'), dir.file('top.qcow2')]
    await create({ path: base, bytes: 1 << 20 })
    await io(base, ['write -P 1 0 1M'])
    await create({ path: top, bytes, backing: 'base.qcow2', options: 'cluster_size=4096' })
    await io(top, randomCommands(random, { bytes, clusterBytes: 4096, count: 50 }))
    await using layer = await openLayer(top)
    assert.deepEqual(layer.backing, { name: 'base.qcow2', format: 'qcow2' })
    const alone = dir.file('alone.qcow2')
    await copyFile(top, alone)
    await must('qemu-img', ['rebase', '-u', '-f', 'qcow2', '-b', '', alone])
    assert.deepEqual(await ownExtents(layer), await qemuExtents(alone))
    assertBytes(
      await readBytes(layer, 0, bytes),
      await qemuBytes(alone, dir.file('raw')),
      `seed ${random.seed}`,
    )
  })

  test('internal snapshots are listed and can be opened', async () => {
    await using dir = await tempDir()
    const path = dir.file('a.qcow2')
    await create({ path, bytes: 1 << 20, options: 'cluster_size=4096' })
    await io(path, ['write -P 1 0 512k'])
    await must('qemu-img', ['snapshot', '-c', 'first one', path])
    const first = await qemuBytes(path, dir.file('raw1'))
    await io(path, ['write -P 2 100k 300k', 'write -z 4k 64k'])
    await must('qemu-img', ['snapshot', '-c', 'zweiter', path])
    await must('qemu-img', ['resize', '-q', '-f', 'qcow2', path, '2M'])
    await io(path, ['write -P 3 0 2M'])
    await using now = await openLayer(path)
    assert.deepEqual(
      now.snapshots.map(({ id, name, size }) => [id, name, size]),
      [
        ['1', 'first one', 1 << 20],
        ['2', 'zweiter', 1 << 20],
      ],
    )
    assert.equal(now.facts['snapshots'], 2)
    assert.match(String(now.facts['snapshot1']), /^1 first one /)
    assertBytes(await readBytes(now, 0, now.size), new Uint8Array(2 << 20).fill(3), 'active state')
    await using old = await Qcow2Layer.open(await openHostFile(path), { snapshot: 'first one' })
    assertBytes(await readBytes(old, 0, old.size), first, 'first snapshot')
    await using file = await openHostFile(path)
    await assert.rejects(Qcow2Layer.open(file, { snapshot: 'none' }), { code: 'NOT_FOUND' })
  })

  test('facts tell bitmaps with their flags, lazy refcounts and the dirty bit', async () => {
    await using dir = await tempDir()
    const path = dir.file('a.qcow2')
    await create({ path, bytes: 1 << 20, options: 'lazy_refcounts=on,refcount_bits=64' })
    await must('qemu-img', ['bitmap', '--add', '-g', '32k', path, 'b0'])
    await must('qemu-img', ['bitmap', '--add', '--disable', path, 'b1'])
    {
      await using layer = await openLayer(path)
      const { facts } = layer
      assert.deepEqual(
        [
          facts['refcountBits'],
          facts['lazyRefcounts'],
          facts['bitmaps'],
          facts['bitmapsConsistent'],
          facts['dirty'],
        ],
        [64, true, 2, true, false],
      )
      assert.deepEqual(
        [facts['bitmap1'], facts['bitmap2']],
        ['b0 (granularity 2^15, auto)', 'b1 (granularity 2^16)'],
      )
    }
    // A qemu-io that is killed in the middle leaves the dirty bit set; the content is there all the same.
    await io(path, ['write -P 5 0 256k', 'flush', 'abort']).catch(() => {})
    await using layer = await openLayer(path)
    assert.equal(layer.facts['dirty'], true)
    assertBytes(await readBytes(layer, 0, 262144), new Uint8Array(262144).fill(5), 'dirty image')
  })

  test('a disk of no bytes opens', async () => {
    await using dir = await tempDir()
    await create({ path: dir.file('a'), bytes: 0 })
    await using layer = await openLayer(dir.file('a'))
    assert.equal(layer.size, 0)
  })

  test('a last cluster that the file cuts short reads as zeros behind the end; one that lacks is CORRUPT', async () => {
    await using dir = await tempDir()
    const path = dir.file('a')
    await create({ path, bytes: 1 << 20 })
    await io(path, ['write -P 1 0 64k'])
    await using probe = await openLayer(path)
    const place = (await probe.extents(0, 65536))[0]!.at!.offset
    await truncate(path, place + 1000)
    {
      await using layer = await openLayer(path)
      const bytes = await readBytes(layer, 0, 65536)
      assert.ok(bytes.subarray(0, 1000).every((byte) => byte === 1))
      assert.ok(bytes.subarray(1000).every((byte) => byte === 0))
      assert.deepEqual(
        (await layer.extents(0, 65536)).map(({ kind, length }) => [kind, length]),
        [
          ['data', 1000],
          ['zero', 64536],
        ],
      )
    }
    await truncate(path, place)
    await using layer = await openLayer(path)
    await assert.rejects(readBytes(layer, 0, 512), { code: 'CORRUPT' })
    assert.equal((await layer.extents(1 << 19, 1 << 19))[0]!.kind, 'absent')
  })
})
