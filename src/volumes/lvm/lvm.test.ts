/**
 * LVM2 against lvm2 itself: volume groups made by lvm on loop devices, without device-mapper; where an extent is, is
 * asked from `lvs`, not from our own reader.
 */
import assert from 'node:assert/strict'
import { copyFile, open, readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, patternAt, Random, run, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import {
  type BlockDevice,
  type HostFileDevice,
  MemoryDevice,
  openHostFile,
  readBytes,
} from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import { NotTrusted } from '../../filesystems/file-system.ts'
import { lvm } from './lvm.ts'
import { parseText } from './text.ts'

const MiB = 2 ** 20
const skip = needs('pvcreate', 'losetup', 'mke2fs') || needsRoot()
const OFFLINE = ['--driverloaded', 'n']

/** Runs lvm commands on images through loop devices, with a configuration that sees nothing else. */
async function withLvm(
  folder: string,
  images: readonly string[],
  work: (
    lvmRun: (command: string, ...args: string[]) => Promise<string>,
    loops: readonly string[],
  ) => Promise<void>,
): Promise<void> {
  const loops: string[] = []
  try {
    for (const image of images) loops.push((await must('losetup', ['-f', '--show', image])).trim())
    const filter = [...loops.map((loop) => `"a|^${loop}$|"`), '"r|.*|"'].join(',')
    await writeFile(
      `${folder}/lvm.conf`,
      `devices { use_devicesfile=0 scan=["/dev"] filter=[${filter}] }
       activation { udev_sync=0 udev_rules=0 monitoring=0 }
       global { use_lvmpolld=0 locking_type=1 }
       backup { backup=0 archive=0 }`,
    )
    const env = { LVM_SYSTEM_DIR: folder, LVM_SUPPRESS_FD_WARNINGS: '1' }
    await work((command, ...args) => must(command, args, { env }), loops)
  } finally {
    for (const loop of loops) await run('losetup', ['-d', loop])
  }
}

interface Segment {
  readonly lv: string
  readonly start: number
  readonly size: number
  readonly stripeBytes: number
  /** Index of the image and byte where the extents begin. */
  readonly areas: readonly { readonly image: number; readonly at: number }[]
}

/** Segments as `lvs` prints them. */
async function segmentsOf(
  lvmRun: (command: string, ...args: string[]) => Promise<string>,
  loops: readonly string[],
): Promise<Segment[]> {
  const peStart = MiB
  const extent = 4 * MiB
  const out = await lvmRun(
    'lvs',
    ...OFFLINE,
    '--segments',
    '--noheadings',
    '--units',
    'b',
    '--nosuffix',
    '--separator',
    ';',
    '-o',
    'lv_name,seg_start,seg_size,stripesize,devices',
    'vg',
  )
  return out
    .trim()
    .split('\n')
    .map((line) => {
      const [lv, start, size, stripe, devices] = line.trim().split(';') as [
        string,
        string,
        string,
        string,
        string,
      ]
      const areas = devices.split(',').map((device) => {
        const [, path, first] = device.match(/^(.+)\((\d+)\)$/)!
        return { image: loops.indexOf(path!), at: peStart + Number(first) * extent }
      })
      return { lv, start: Number(start), size: Number(size), stripeBytes: Number(stripe), areas }
    })
}

/** Writes the bytes of a volume to where lvs says they belong. */
async function writeVolume(
  segments: readonly Segment[],
  lv: string,
  content: Uint8Array,
  images: readonly string[],
): Promise<void> {
  const handles = await Promise.all(images.map((image) => open(image, 'r+')))
  try {
    for (const { start, size, stripeBytes, areas } of segments.filter((segment) => segment.lv === lv)) {
      const unit = areas.length === 1 ? MiB : stripeBytes
      for (let at = 0; at < size && start + at < content.length; at += unit) {
        const chunk = at / unit
        const area = areas[chunk % areas.length]!
        const piece = content.subarray(start + at, Math.min(start + at + unit, content.length))
        if (piece.every((byte) => byte === 0)) continue
        await handles[area.image]!.write(
          piece,
          0,
          piece.length,
          area.at + Math.floor(chunk / areas.length) * unit,
        )
      }
    }
  } finally {
    for (const handle of handles) await handle.close()
  }
}

async function makeGroup(folder: string): Promise<{ images: string[]; segments: Segment[] }> {
  const images = ['pv0', 'pv1', 'pv2'].map((name) => `${folder}/${name}`)
  for (const image of images) {
    await writeFile(image, '')
    await truncate(image, 120 * MiB)
  }
  let segments: Segment[] = []
  await withLvm(folder, images, async (lvmRun, loops) => {
    await lvmRun('pvcreate', '-qq', ...loops)
    await lvmRun('vgcreate', '-qq', ...OFFLINE, 'vg', ...loops)
    const create = (...args: string[]): Promise<string> =>
      lvmRun('lvcreate', '-qq', ...OFFLINE, '-an', '-Zn', '-Wn', ...args, 'vg')
    await create('-L', '40M', '-n', 'lin')
    await create('-L', '20M', '-n', 'gone')
    await create('-i', '3', '-I', '64k', '-L', '72M', '-n', 'str')
    await lvmRun('lvremove', '-qq', '-y', ...OFFLINE, 'vg/gone')
    await lvmRun('lvextend', '-qq', ...OFFLINE, '-L', '100M', 'vg/lin')
    segments = await segmentsOf(lvmRun, loops)
  })
  return { images, segments }
}

async function openAll(images: readonly string[]): Promise<readonly HostFileDevice[] & AsyncDisposable> {
  const files = await Promise.all(images.map((image) => openHostFile(image)))
  return Object.assign(files, {
    [Symbol.asyncDispose]: async () => {
      for (const file of files) await file[Symbol.asyncDispose]()
    },
  })
}

describe('LVM2', { skip }, () => {
  test('linear and striped volumes read as lvs places them; the map keeps what they need and frees the rest', async () => {
    await using dir = await tempDir()
    const { images, segments } = await makeGroup(dir.path)
    assert.ok(
      segments.filter((segment) => segment.lv === 'lin').length > 1,
      'the linear volume is in several pieces',
    )
    const sizes = { lin: 100 * MiB, str: 72 * MiB }
    for (const [lv, size] of Object.entries(sizes))
      await writeVolume(segments, lv, patternAt(0, size, lv === 'lin' ? 1 : 2), images)
    await using files = await openAll(images)
    for (const file of files) assert.equal(await lvm.probe(file), true)
    const ids = await Promise.all(files.map((file) => lvm.group!(file, {})))
    assert.equal(new Set(ids).size, 1)
    // In any order.
    const members: BlockDevice[] = [files[2]!, files[0]!, files[1]!]
    const table = await lvm.open(members, {})
    assert.equal(table.label, 'vg')
    assert.deepEqual(table.volumes.map((volume) => volume.name).sort(), ['lin', 'str'])
    for (const volume of table.volumes) {
      const size = sizes[volume.name as 'lin' | 'str']
      assert.equal(volume.device.size, size)
      assert.ok(
        Buffer.from(await readBytes(volume.device, 0, size)).equals(
          Buffer.from(patternAt(0, size, volume.name === 'lin' ? 1 : 2)),
        ),
      )
      // Projection: for random ranges, the members hold the volume's bytes in just those ranges.
      const random = new Random()
      for (let i = 0; i < 50; i++) {
        const start = random.below(size - 1)
        const length = 1 + random.below(Math.min(size - start, 300_000))
        const sets = volume.project(RangeSet.of(start, start + length))
        const total = sets.reduce((sum, set) => sum + set.size, 0)
        assert.equal(total, length, `seed ${random.seed}: ${volume.name} ${start}+${length}`)
        const found = new Set<string>()
        for (const [member, set] of sets.entries()) {
          for (const range of set) {
            const bytes = await readBytes(
              members[member]!,
              range.start,
              Math.min(16, range.end - range.start),
            )
            found.add(Buffer.from(bytes).toString('hex'))
          }
        }
        const whole = Buffer.from(patternAt(start, length, volume.name === 'lin' ? 1 : 2)).toString('hex')
        for (const piece of found)
          assert.ok(whole.includes(piece), `seed ${random.seed}: a projected range holds other bytes`)
      }
    }
    // Metadata and all volumes whole: what is left is the free extents.
    const freeExtents = (3 * 29 - 25 - 18) * 4 * MiB
    let free = 0
    for (const [i, member] of members.entries()) {
      let used = table.metadata[i]!
      for (const volume of table.volumes)
        used = used.union(volume.project(RangeSet.of(0, volume.device.size))[i]!)
      free += used.complement(0, member.size).size
    }
    assert.equal(free, freeExtents)
  })

  test('a missing volume, one of another age and a copy of one are refused with the reason', async () => {
    await using dir = await tempDir()
    const { images } = await makeGroup(dir.path)
    await copyFile(images[2]!, dir.file('old'))
    await withLvm(dir.path, images, async (lvmRun) => {
      await lvmRun('lvrename', '-qq', ...OFFLINE, 'vg', 'lin', 'renamed')
    })
    await using files = await openAll([...images, dir.file('old')])
    const refused = (members: readonly BlockDevice[], reason: string): Promise<void> =>
      assert.rejects(lvm.open(members, {}), (error) => error instanceof NotTrusted && error.reason === reason)
    await refused(files.slice(0, 2), 'lvm-pv-missing')
    await refused([files[0]!, files[1]!, files[3]!], 'lvm-metadata-differs')
    await refused([files[0]!, files[0]!, files[1]!, files[2]!], 'lvm-duplicate-pv')
    await lvm.open(files.slice(0, 3), {})
  })

  test('volumes of a type or state that is not read are in use with all that they refer to', async () => {
    await using dir = await tempDir()
    const { images } = await makeGroup(dir.path)
    // The text is the group's own; only the type and status are changed, and the checksums made right.
    const { lvmCrc } = await import('./layout.ts')
    const changed = await Promise.all(
      images.map(async (image) => {
        const bytes = new Uint8Array(await readFile(image))
        const view = new DataView(bytes.buffer)
        const header = 4096
        const offset = Number(view.getBigUint64(header + 40, true))
        const size = Number(view.getBigUint64(header + 48, true))
        const text = Buffer.from(bytes.subarray(header + offset, header + offset + size)).toString()
        // Same length, so that everything stays where it is.
        const next = text.replace(/type = "striped"(\s+stripe_count = 3)/, 'type = "vdovdos"$1')
        assert.notEqual(next, text)
        bytes.set(Buffer.from(next), header + offset)
        view.setUint32(header + 56, lvmCrc(bytes.subarray(header + offset, header + offset + size)), true)
        view.setUint32(header, lvmCrc(bytes.subarray(header + 4, header + 512)), true)
        return new MemoryDevice(bytes)
      }),
    )
    const table = await lvm.open(changed, {})
    const volume = table.volumes.find((one) => one.name === 'str')!
    assert.equal(volume.doubt?.code, 'lvm-unsupported')
    const kept = volume.project(RangeSet.empty)
    assert.equal(
      kept.reduce((sum, set) => sum + set.size, 0),
      72 * MiB,
    )
  })

  test('metadata with bytes wrong ends in one clear error or the same table', async () => {
    await using dir = await tempDir()
    const { images } = await makeGroup(dir.path)
    const originals = await Promise.all(images.map(async (image) => new Uint8Array(await readFile(image))))
    const random = new Random()
    for (let i = 0; i < 300; i++) {
      const target = random.pick(originals)
      const at = random.below(2) === 0 ? 512 + random.below(512) : 4096 + random.below(8192)
      const old = target[at]!
      target[at] = random.below(256)
      try {
        await lvm.open(
          originals.map((bytes) => new MemoryDevice(bytes)),
          {},
        )
      } catch (error) {
        assert.ok(
          isVarveError(error) && error.code !== 'INTERNAL',
          `seed ${random.seed}, case ${i}: ${(error as Error).stack}`,
        )
      } finally {
        target[at] = old
      }
    }
  })
})

describe('LVM2 text', () => {
  test('parseText() reads what lvm writes', () => {
    const text = parseText(
      '# c\nvg {\n id = "a-b" # "x"\n n = -3\n list = ["p\\"q", 0,\n "r"]\n empty = []\n sub { deep { k = 1 } } }\nversion = 1\n',
    )
    const vg = text.section('vg')
    assert.equal(vg.string('id'), 'a-b')
    assert.deepEqual(vg.list('list'), ['p"q', 0, 'r'])
    assert.deepEqual(vg.list('empty'), [])
    assert.equal(vg.section('sub').section('deep').number('k'), 1)
    assert.throws(() => vg.number('n'))
    assert.equal(text.number('version'), 1)
  })

  test('parseText() refuses what does not end, nests too deep or is no text', () => {
    for (const bad of [
      'a {',
      'a = [1, 2',
      '}',
      'a = ',
      'a b',
      '{ }',
      'a { '.repeat(20),
      'a = "x',
      '\0\0\0',
      'a = {}',
    ]) {
      assert.throws(
        () => parseText(bad),
        (error) => error instanceof NotTrusted,
        JSON.stringify(bad),
      )
    }
  })
})
