/** Editing bitmaps: judged by qemu-img, and by power loss at any moment. */
import assert from 'node:assert/strict'
import { copyFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, Random, run, tempDir } from '../../../test/kit/index.ts'
import { type BlockDevice, CrashDevice, MemoryDevice, openHostFile, readBytes } from '../../device/index.ts'
import { Bitmap } from '../../extents/index.ts'
import { BitmapEditor, repairBitmaps } from './bitmap-editor.ts'
import { extensionPlace, readBitmapBits, readBitmaps } from './bitmaps.ts'
import { checkImage } from './check.ts'
import { createImage } from './create.ts'
import { Qcow2Layer } from './index.ts'

const KIB = 1024

/** Everything about the bitmaps that a reader can see: name -> flags, granularity, bits. */
async function stateOf(file: BlockDevice): Promise<string> {
  const stored = await readBitmaps(file)
  if (stored.state !== 'current') return stored.state
  assert.equal(stored.problem, undefined)
  const lines: string[] = []
  for (const bitmap of stored.bitmaps) {
    assert.equal(bitmap.problem, undefined)
    const bits = await readBitmapBits(file, stored.header, bitmap)
    lines.push(`${bitmap.name} ${bitmap.flags} ${bitmap.granularityBits} ${bits.toRanges().toString()}`)
  }
  return lines.join('\n')
}

function randomBits(random: Random, length: number): Bitmap {
  const bits = new Bitmap(length)
  // Whole and empty clusters too: they are stored without data.
  if (random.next() < 0.2) bits.setRange(0, length)
  for (let i = random.below(6); i > 0; i--) {
    const start = random.below(length)
    bits.setRange(start, start + random.below(length - start))
  }
  return bits
}

async function editOnce(random: Random, file: BlockDevice): Promise<void> {
  const editor = await BitmapEditor.open(file)
  for (let i = 1 + random.below(2); i > 0; i--) {
    const name = `b${random.below(4)}`
    if (!editor.names.includes(name)) {
      editor.add({ name, granularity: random.pick([512, 4096, 65_536]), enabled: random.next() < 0.7 })
      const { length } = await editor.bits(name)
      editor.setBits(name, randomBits(random, length))
      continue
    }
    const dice = random.below(4)
    if (dice < 2) editor.remove(name)
    else if (dice === 2) editor.setEnabled(name, random.next() < 0.5)
    else editor.setBits(name, randomBits(random, (await editor.bits(name)).length))
  }
  await editor.save()
}

describe('BitmapEditor', () => {
  test('power loss at any moment leaves the list before or the list after', async () => {
    const random = new Random()
    let split = 0
    for (let round = 0; round < 12; round++) {
      // The lengths decide where the extension comes to stand; the long one lets a sector's end split it.
      const name = 'x'.repeat(1 + random.below(120))
      const format = round % 3 === 0 ? 'f'.repeat(488) : 'raw'
      const backing = round % 3 < 2 ? { backing: { name, format } } : {}
      const medium = new MemoryDevice(0)
      const clusterBytes = random.pick([2048, 4096, 65_536])
      await createImage(medium, { virtualSize: 3_000_320, settings: { clusterBytes }, ...backing })
      const device = await CrashDevice.over(medium)
      const states: { readonly from: number; readonly state: string }[] = [
        { from: 0, state: await stateOf(device) },
      ]
      let splits = false
      for (let edit = 0; edit < 5; edit++) {
        const from = device.clock.now
        await editOnce(random, device)
        states.push({ from, state: await stateOf(device) })
        const at = extensionPlace(await readBytes(device, 0, 2048), (await readBitmaps(device)).header)?.at
        splits ||= at !== undefined && Math.floor((at + 8) / 512) !== Math.floor((at + 31) / 512)
      }
      if (splits) split += 1
      for (let tick = 0; tick <= device.clock.now; tick += 1 + random.below(4)) {
        for (const survival of ['none', 'all', random] as const) {
          const what = `seed ${random.seed}, round ${round}, tick ${tick}`
          const content = new MemoryDevice(device.contentAfterLoss(tick, survival))
          const errors = (await checkImage(content)).filter(({ severity }) => severity === 'error')
          assert.deepEqual(errors, [], what)
          const current = states.findLastIndex((each) => each.from <= tick)
          const allowed = states.slice(Math.max(0, current - 1), current + 1).map(({ state }) => state)
          const found = await stateOf(content)
          // Without an extension, or with one that is split by a sector's end, the list is void for a moment.
          const passing = splits || allowed.some((state) => state === 'none' || state === 'void')
          assert.ok(
            allowed.includes(found) || (passing && ['void', 'none'].includes(found)),
            `${what}: ${found}, expected ${allowed.join(' or ')}`,
          )
          await using layer = await Qcow2Layer.open(content)
          assert.equal(layer.backing?.name, backing.backing?.name, what)
        }
      }
    }
    assert.ok(split > 0, 'extensions that are split were among them')
  })

  test('refuses what QEMU could not open', async () => {
    const file = new MemoryDevice(0)
    await createImage(file, { virtualSize: 1 << 20, settings: { clusterBytes: 4096 } })
    const editor = await BitmapEditor.open(file)
    editor.add({ name: 'b' })
    assert.equal(editor.granularity('b'), 4096)
    assert.throws(() => editor.add({ name: 'b' }), { code: 'EXISTS' })
    for (const granularity of [256, 513, 2 ** 32, -1, Number.NaN])
      assert.throws(() => editor.add({ name: 'c', granularity }), RangeError)
    for (const name of ['', 'x'.repeat(1024), 'ä'.repeat(512)])
      assert.throws(() => editor.add({ name }), RangeError)
    assert.throws(() => editor.remove('zz'), { code: 'NOT_FOUND' })
    const old = new MemoryDevice(0)
    await createImage(old, { virtualSize: 1 << 20, settings: { version: 2 } })
    await assert.rejects(BitmapEditor.open(old), { code: 'UNSUPPORTED' })
  })
})

describe('bitmaps edited by us', { skip: needs('qemu-img', 'qemu-io') }, () => {
  test('qemu-img reads them, merges them and finds nothing wrong; guest data stays', async () => {
    const random = new Random()
    await using dir = await tempDir()
    const image = dir.file('i.qcow2')
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4096', image, '64M'])
    await must('qemu-io', ['-f', 'qcow2', '-c', 'write -P 5 1M 3M', image])
    for (let round = 0; round < 10; round++) {
      await using file = await openHostFile(image, { write: true })
      await editOnce(random, file)
      const expected = await readBitmaps(file)
      const checked = await run('qemu-img', ['check', image])
      assert.equal(
        checked.code,
        0,
        `seed ${random.seed}, round ${round}: ${checked.stdout.toString()}${checked.stderr}`,
      )
      const info = JSON.parse(await must('qemu-img', ['info', '--output=json', image])) as {
        'format-specific': { data: { bitmaps?: { name: string; granularity: number; flags: string[] }[] } }
      }
      assert.deepEqual(
        (info['format-specific'].data.bitmaps ?? []).map(
          ({ flags, granularity, name }) => `${name} ${granularity} ${flags.join()}`,
        ),
        expected.bitmaps.map(
          ({ enabled, granularityBits, name }) => `${name} ${2 ** granularityBits} ${enabled ? 'auto' : ''}`,
        ),
      )
    }
    // QEMU has to load the bits to merge them: the result is read by us.
    await using file = await openHostFile(image, { write: true })
    const editor = await BitmapEditor.open(file)
    editor.add({ name: 'source', granularity: 4096 })
    const bits = randomBits(random, (await editor.bits('source')).length)
    editor.setBits('source', bits)
    await editor.save()
    await must('qemu-img', ['bitmap', '--add', '-g', '4096', '--merge', 'source', image, 'merged'])
    await using again = await openHostFile(image)
    const stored = await readBitmaps(again)
    const merged = stored.bitmaps.find(({ name }) => name === 'merged')!
    assert.ok(
      (await readBitmapBits(again, stored.header, merged)).toRanges().equals(bits.toRanges()),
      `seed ${random.seed}`,
    )
    assert.match(await must('qemu-io', ['-f', 'qcow2', '-r', '-c', 'read -P 5 1M 3M', image]), /read 3145728/)
    assert.doesNotMatch(
      await must('qemu-io', ['-f', 'qcow2', '-r', '-c', 'read -P 5 1M 3M', image]),
      /failed/,
    )
  })

  test('repair drops what is broken, keeps what is sound, and the image opens again', async () => {
    await using dir = await tempDir()
    const good = dir.file('good.qcow2')
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', good, '64M'])
    for (const name of ['b0', 'b1', 'b2']) await must('qemu-img', ['bitmap', '--add', good, name])
    await must('qemu-io', ['-f', 'qcow2', '-c', 'write -P 5 1M 3M', good])
    let directory: number
    let extension: number
    {
      await using file = await openHostFile(good)
      const { header } = await readBitmaps(file)
      directory = header.bitmaps!.directoryOffset
      extension = extensionPlace(await readBytes(file, 0, 4 * KIB), header)!.at
    }
    const cases: [what: string, place: number, bytes: number[], left: string[]][] = [
      ['nothing', 0, [0x51], ['b0', 'b1', 'b2']],
      ['reserved flag', directory + 32 + 15, [10], ['b0', 'b2']],
      ['type', directory + 16, [2], ['b1', 'b2']],
      ['in use', directory + 64 + 15, [3], ['b0', 'b1']],
      ['table of another', directory + 32, [], ['b0', 'b2']],
      ['table behind the end', directory + 32, [0, 0, 0, 0x7f, 0, 0, 0, 0], ['b0', 'b2']],
      ['directory', extension + 16, [0, 0, 0, 0, 0xff, 0, 0, 0], []],
      ['too many counted', extension + 8, [0, 0, 0, 9], ['b0', 'b1', 'b2']],
      ['void', 95, [0], []],
    ]
    for (const [what, place, bytes, left] of cases) {
      const image = dir.file('bad.qcow2')
      await copyFile(good, image)
      await using file = await openHostFile(image, { write: true })
      if (what === 'table of another') await file.write(place, await readBytes(file, directory, 8))
      else await file.write(place, Uint8Array.from(bytes))
      const { clean, dropped } = await repairBitmaps(file)
      assert.equal(clean, what === 'nothing', what)
      const stored = await readBitmaps(file)
      assert.deepEqual([stored.problem, stored.bitmaps.map(({ name }) => name)], [undefined, left], what)
      if (!['directory', 'too many counted'].includes(what))
        assert.equal(dropped.length, 3 - left.length, what)
      const checked = await run('qemu-img', ['check', image])
      assert.equal(checked.code, 0, `${what}: ${checked.stdout.toString()}${checked.stderr}`)
      const read = await must('qemu-io', ['-f', 'qcow2', '-r', '-c', 'read -P 5 1M 3M', image])
      assert.ok(read.includes('read 3145728') && !read.includes('failed'), what)
      assert.equal((await repairBitmaps(file)).clean, true, `${what}: a second time there is nothing to do`)
    }
  })

  test('an inconsistent bitmap can only be removed; an image with errors is not edited', async () => {
    await using dir = await tempDir()
    const image = dir.file('i.qcow2')
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M'])
    await must('qemu-img', ['bitmap', '--add', image, 'b'])
    await run('qemu-io', ['-f', 'qcow2', '-c', 'abort', image])
    await using file = await openHostFile(image, { write: true })
    const editor = await BitmapEditor.open(file)
    assert.throws(() => editor.setEnabled('b', false), { code: 'CORRUPT' })
    assert.throws(() => editor.setBits('b', new Bitmap(1024)), { code: 'CORRUPT' })
    await assert.rejects(editor.bits('b'), { code: 'CORRUPT' })
    editor.remove('b')
    await editor.save()
    assert.equal((await run('qemu-img', ['check', image])).code, 0)
    // A refcount of 0 under the L1 table: whoever allocates there destroys the image.
    const { header } = await readBitmaps(file)
    const table = Buffer.from(await readBytes(file, header.refcountTableOffset, 8)).readBigUInt64BE()
    await file.write(Number(table) + (header.l1TableOffset / header.clusterBytes) * 2, Uint8Array.of(0, 0))
    await assert.rejects(BitmapEditor.open(file), { code: 'CORRUPT' })
    await assert.rejects(repairBitmaps(file), { code: 'CORRUPT' })
  })
})
