import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { link, mkdir, readFile, rename, rm, symlink, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, patternAt, Random, tempDir } from '../../test/kit/index.ts'
import { makeVhd, RECIPE_UUID, tapLocators, type VhdRecipe } from '../../test/kit/vhd-recipe.ts'
import { makeVhdx, WRITE_GUID } from '../../test/kit/vhdx-recipe.ts'
import { type ErrorCode, isVarveError } from '../base/index.ts'
import { readBytes } from '../device/index.ts'
import { checkExtents } from '../extents/index.ts'
import { type Disk, mapDisk, openDisk } from './index.ts'

const MIB = 1024 * 1024
const hasQemu = { skip: needs('qemu-img', 'qemu-io') }

/** `work` fails with `code`, and no file stays open. */
async function refuses(code: ErrorCode, words: RegExp, work: () => Promise<unknown>): Promise<void> {
  const before = openFiles()
  await assert.rejects(work, (error: unknown) => {
    assert.ok(isVarveError(error), String(error))
    assert.equal(error.code, code, error.message)
    assert.match(error.message, words)
    return true
  })
  assert.deepEqual(openFiles(), before, 'files that stay open')
}

function openFiles(): number {
  return process.platform === 'linux' ? readdirSync('/proc/self/fd').length : 0
}

async function opened(disk: Promise<Disk>): Promise<Disk> {
  return await disk
}

/** A qcow2 that names a backing file which need not be there; `name` may be anything. */
async function qcow2On(path: string, name: string, format = 'raw'): Promise<void> {
  await must('qemu-img', ['create', '-q', '-u', '-f', 'qcow2', '-b', name, '-F', format, path, '1M'])
}

interface QemuEntry {
  readonly start: number
  readonly length: number
  readonly depth: number
  readonly present: boolean
  readonly zero: boolean
  readonly data: boolean
  readonly offset?: number
}

async function qemuMap(path: string, format: string): Promise<QemuEntry[]> {
  return JSON.parse(await must('qemu-img', ['map', '--output=json', '-f', format, path])) as QemuEntry[]
}

/** The fields that both have; the place only of data, since qemu also gives one to preallocated zeros. */
async function sameMap(path: string, format: string): Promise<void> {
  await using disk = await openDisk(path, { format })
  assert.deepEqual(joined(await mapDisk(disk)), joined(await qemuMap(path, format)), path)
}

function joined(entries: readonly QemuEntry[]): QemuEntry[] {
  const out: QemuEntry[] = []
  for (const entry of entries) {
    const { start, length, depth, present, zero, data, offset } = entry
    const mine: QemuEntry = {
      start,
      length,
      depth,
      present,
      zero,
      data,
      ...(data && offset !== undefined ? { offset } : {}),
    }
    const last = out.at(-1)
    const follows =
      last &&
      last.depth === mine.depth &&
      last.present === mine.present &&
      last.zero === mine.zero &&
      last.data === mine.data &&
      (mine.offset === undefined ? last.offset === undefined : last.offset! + last.length === mine.offset)
    if (follows) out[out.length - 1] = { ...last, length: last.length + mine.length }
    else out.push(mine)
  }
  return out
}

describe('a chain as one disk', hasQemu, () => {
  test('maps and reads as qemu-img does: qcow2 three deep, sizes going up and down, raw at the bottom', async () => {
    await using dir = await tempDir()
    const random = new Random()
    for (let round = 0; round < 4; round++) {
      const layers = [
        { name: 'base.raw', format: 'raw', size: 5 * MIB + 65_536 },
        { name: 'mid.qcow2', format: 'qcow2', size: random.pick([3, 5, 9]) * MIB },
        { name: 'up.qcow2', format: 'qcow2', size: random.pick([4, 8, 12]) * MIB + 512 },
        { name: 'top.qcow2', format: 'qcow2', size: random.pick([6, 10]) * MIB },
      ]
      for (const [index, { name, format, size }] of layers.entries()) {
        const below = layers[index - 1]
        await must('qemu-img', [
          'create',
          '-q',
          '-f',
          format,
          ...(below ? ['-b', below.name, '-F', below.format] : []),
          ...(format === 'qcow2' ? ['-o', `cluster_size=${random.pick([4096, 65_536, MIB])}`] : []),
          dir.file(name),
          String(size),
        ])
        const writes: string[] = []
        for (let i = 0; i < 6; i++) {
          const at = random.below(size / 512 - 300) * 512
          const length = (1 + random.below(250)) * 512
          writes.push(
            '-c',
            random.below(4) === 0
              ? `write -z ${at} ${length}`
              : `write -P ${10 * index + i + 1} ${at} ${length}`,
          )
        }
        await must('qemu-io', ['-f', format, ...writes, dir.file(name)])
        await sameMap(dir.file(name), format)
      }
      await must('qemu-img', ['convert', '-O', 'raw', dir.file('top.qcow2'), dir.file('flat.raw')])
      await using disk = await openDisk(dir.file('top.qcow2'))
      await using flat = await openDisk(dir.file('flat.raw'), { format: 'raw' })
      assert.equal(disk.size, flat.size, `seed ${random.seed}`)
      const expected = await readBytes(flat, 0, flat.size)
      assert.ok(Buffer.compare(await readBytes(disk, 0, disk.size), expected) === 0, `seed ${random.seed}`)
      for (let i = 0; i < 50; i++) {
        const at = random.below(disk.size)
        const length = 1 + random.below(Math.min(disk.size - at, 200_000))
        assert.ok(
          Buffer.compare(await readBytes(disk, at, length), expected.subarray(at, at + length)) === 0,
          `seed ${random.seed}`,
        )
        const list = await disk.mapExtents(at, length)
        checkExtents(list, at, length)
        for (const extent of list) {
          assert.notEqual(extent.kind, 'absent')
          assert.ok(extent.present || extent.kind === 'zero')
        }
      }
    }
  })

  test('says of each layer what qemu-img info says', async () => {
    await using dir = await tempDir()
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', dir.file('a.qcow2'), '4M'])
    await must('qemu-io', ['-c', 'write -P 1 0 1M', dir.file('a.qcow2')])
    await must('qemu-img', [
      'create',
      '-q',
      '-f',
      'qcow2',
      '-b',
      'a.qcow2',
      '-F',
      'qcow2',
      dir.file('b.qcow2'),
      '8M',
    ])
    await using disk = await openDisk(dir.file('b.qcow2'))
    const info = JSON.parse(
      await must('qemu-img', ['info', '--output=json', '--backing-chain', dir.file('b.qcow2')]),
    ) as { filename: string; format: string; 'virtual-size': number; 'actual-size': number }[]
    assert.deepEqual(
      disk.layers.map(({ path, format, virtualSize, allocatedBytes, depth }) => ({
        path,
        format,
        virtualSize,
        allocatedBytes,
        depth,
      })),
      info.map((each, depth) => ({
        path: depth === 0 ? dir.file('b.qcow2') : dir.file('a.qcow2'),
        format: each.format,
        virtualSize: each['virtual-size'],
        allocatedBytes: each['actual-size'],
        depth,
      })),
    )
    assert.deepEqual(disk.layers[0]!.backing, { name: 'a.qcow2', format: 'qcow2' })
  })

  test('maps raw and dynamic VHD as qemu-img does', async () => {
    await using dir = await tempDir()
    await must('qemu-img', ['create', '-q', '-f', 'raw', dir.file('a.raw'), '9M'])
    await must('qemu-io', [
      '-f',
      'raw',
      '-c',
      'write -P 1 1M 64k',
      '-c',
      'write -P 2 8M 1M',
      dir.file('a.raw'),
    ])
    await sameMap(dir.file('a.raw'), 'raw')
    await must('qemu-img', ['create', '-q', '-f', 'vpc', dir.file('a.vhd'), '20M'])
    await must('qemu-io', [
      '-f',
      'vpc',
      '-c',
      'write -P 1 5M 64k',
      '-c',
      'write -P 1 6M 4M',
      dir.file('a.vhd'),
    ])
    await sameMap(dir.file('a.vhd'), 'vpc')
  })

  test('a compressed image under an overlay', async () => {
    await using dir = await tempDir()
    await must('qemu-img', ['create', '-q', '-f', 'raw', dir.file('a.raw'), '4M'])
    await must('qemu-io', ['-f', 'raw', '-c', 'write -P 7 1M 2M', dir.file('a.raw')])
    await must('qemu-img', [
      'convert',
      '-c',
      '-f',
      'raw',
      '-O',
      'qcow2',
      dir.file('a.raw'),
      dir.file('a.qcow2'),
    ])
    await must('qemu-img', [
      'create',
      '-q',
      '-f',
      'qcow2',
      '-b',
      'a.qcow2',
      '-F',
      'qcow2',
      dir.file('b.qcow2'),
    ])
    await must('qemu-io', ['-c', 'write -P 9 1536k 64k', dir.file('b.qcow2')])
    await sameMap(dir.file('b.qcow2'), 'qcow2')
    await using disk = await openDisk(dir.file('b.qcow2'))
    const bytes = await readBytes(disk, MIB, 2 * MIB)
    assert.equal(bytes.indexOf(9), 512 * 1024)
    assert.equal(bytes.filter((byte) => byte === 7).length, 2 * MIB - 65_536)
  })
})

describe('a chain of VHDs', () => {
  const uuid = (n: number): string => `${String(n).padStart(8, '0')}-2222-3333-4444-555555555555`

  function sectors(numbers: Iterable<number>, tag: number): Map<number, Uint8Array> {
    return new Map(Array.from(numbers, (number) => [number, patternAt(number * 512, 512, tag)]))
  }

  test('agrees with a model, sector by sector: random depth, sizes and blocks, raw or VHD at the bottom', async () => {
    const random = new Random()
    for (let round = 0; round < 12; round++) {
      await using dir = await tempDir()
      const depth = 2 + random.below(6)
      const rawBottom = random.below(2) === 0
      const bits: { size: number; has: Set<number> }[] = []
      for (let n = 0; n < depth; n++) {
        const total = 300 + random.below(500)
        const has = new Set<number>()
        for (let i = 0; i < 12; i++) {
          const at = random.below(total)
          for (let sector = at; sector < Math.min(total, at + random.below(60)); sector++) has.add(sector)
        }
        bits.push({ size: total, has })
        const path = dir.file(`${n}.vhd`)
        if (n === 0 && rawBottom) {
          await writeFile(path, patternAt(0, total * 512, 1))
          bits[0]!.has = new Set(Array.from({ length: total }, (_, i) => i))
          continue
        }
        const recipe: VhdRecipe = {
          type: n === 0 ? 'dynamic' : 'differencing',
          size: total * 512,
          blockBytes: random.pick([4096, 65_536]),
          uuid: uuid(n),
          sectors: sectors(has, n + 1),
          ...(random.below(2) ? { batmap: 0x10002 } : {}),
          ...(n > 0
            ? {
                parentName: `${n - 1}.vhd`,
                locators: tapLocators(`${n - 1}.vhd`),
                ...(n === 1 && rawBottom ? {} : { parentUuid: uuid(n - 1) }),
              }
            : {}),
        }
        await writeFile(path, makeVhd(recipe).bytes)
      }
      const top = bits.at(-1)!
      const model = { depth: new Int16Array(top.size).fill(-1) }
      const shown = new Uint8Array(top.size * 512)
      for (let sector = 0; sector < top.size; sector++) {
        for (let n = depth - 1; n >= 0 && sector < bits[n]!.size; n--) {
          if (!bits[n]!.has.has(sector)) continue
          model.depth[sector] = depth - 1 - n
          shown.set(patternAt(sector * 512, 512, n + 1), sector * 512)
          break
        }
      }
      await using disk = await openDisk(dir.file(`${depth - 1}.vhd`))
      assert.ok(Buffer.compare(await readBytes(disk, 0, disk.size), shown) === 0, `seed ${random.seed}`)
      let at = 0
      for (const extent of await mapDisk(disk)) {
        assert.equal(extent.start, at)
        at += extent.length
        for (let sector = extent.start / 512; sector < at / 512; sector++) {
          if (extent.data) assert.equal(model.depth[sector], extent.depth, `seed ${random.seed}`)
          else assert.equal(model.depth[sector], -1, `seed ${random.seed}`)
        }
      }
      assert.equal(at, disk.size)
      for (let i = 0; i < 30; i++) {
        const offset = random.below(disk.size)
        const length = 1 + random.below(Math.min(disk.size - offset, 40_000))
        assert.deepEqual(
          await readBytes(disk, offset, length),
          shown.slice(offset, offset + length),
          `seed ${random.seed}`,
        )
      }
    }
  })

  test('a parent with another uuid is not the parent', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('base.vhd'), makeVhd({ type: 'dynamic', size: MIB, uuid: uuid(1) }).bytes)
    const child: VhdRecipe = {
      type: 'differencing',
      size: MIB,
      parentName: 'base.vhd',
      locators: tapLocators('base.vhd'),
    }
    await writeFile(dir.file('good.vhd'), makeVhd({ ...child, parentUuid: uuid(1) }).bytes)
    await writeFile(dir.file('bad.vhd'), makeVhd({ ...child, parentUuid: uuid(2) }).bytes)
    await using disk = await openDisk(dir.file('good.vhd'))
    assert.equal(disk.layers.length, 2)
    await refuses('MISMATCH', /identity/, () => opened(openDisk(dir.file('bad.vhd'))))
  })

  test('takes the first locator whose file is there and allowed', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('base.vhd'), makeVhd({ type: 'dynamic', size: MIB }).bytes)
    const locators = [
      { code: 'W2ku', data: Buffer.from('C:\\disks\\base.vhd', 'utf16le') },
      { code: 'MacX', data: Buffer.from('file:///dev/mapper/VG_XenStorage--1-VHD--2') },
      { code: 'W2ru', data: Buffer.from('.\\gone\\base.vhd', 'utf16le') },
    ]
    const child = {
      type: 'differencing',
      size: MIB,
      parentUuid: RECIPE_UUID,
      parentName: 'base.vhd',
      locators,
    } as const
    await writeFile(dir.file('child.vhd'), makeVhd(child).bytes)
    await using disk = await openDisk(dir.file('child.vhd'))
    assert.equal(disk.layers[1]!.path, dir.file('base.vhd'))
    await writeFile(dir.file('orphan.vhd'), makeVhd({ ...child, parentName: 'gone.vhd' }).bytes)
    await refuses('BACKING_DENIED', /dev.mapper/, () => opened(openDisk(dir.file('orphan.vhd'))))
  })

  for (const [name, path, code] of [
    ['leads out of the folder', '../secret.vhd', 'BACKING_DENIED'],
    ['is absolute and outside', '/etc/passwd', 'BACKING_DENIED'],
    ['is a device', '/dev/null', 'BACKING_DENIED'],
    ['is in /proc', '/proc/self/environ', 'BACKING_DENIED'],
    ['is the folder itself', 'x/..', 'BACKING_DENIED'],
    ['is not there', 'gone.vhd', 'BACKING_MISSING'],
    ['is very long', `${'a/'.repeat(100)}x`, 'BACKING_MISSING'],
  ] as const) {
    test(`a parent that ${name} is refused`, async () => {
      await using dir = await tempDir()
      await mkdir(dir.file('in'))
      await writeFile(dir.file('secret.vhd'), makeVhd({ type: 'dynamic', size: MIB }).bytes)
      const data = Buffer.from(`file://${path}`)
      const recipe = { type: 'differencing', size: MIB, locators: [{ code: 'MacX', data }] } as const
      await writeFile(dir.file('in/child.vhd'), makeVhd({ ...recipe, parentName: path.slice(0, 200) }).bytes)
      await refuses(code, /backing file/, () => opened(openDisk(dir.file('in/child.vhd'))))
    })
  }
})

describe('a chain of VMDKs', hasQemu, () => {
  test('leaf to root by hint and content id; extents in other files under the policy', async () => {
    await using dir = await tempDir()
    const [base, child] = [dir.file('base.vmdk'), dir.file('child.vmdk')]
    await must('qemu-img', ['create', '-q', '-f', 'vmdk', '-o', 'subformat=twoGbMaxExtentFlat', base, '4M'])
    await must('qemu-io', ['-f', 'vmdk', '-c', 'write -P 1 0 1M', base])
    await must('qemu-img', ['create', '-q', '-f', 'vmdk', '-F', 'vmdk', '-b', base, child])
    await must('qemu-io', ['-f', 'vmdk', '-c', 'write -P 2 64k 64k', child])
    await must('qemu-img', ['convert', '-O', 'raw', child, dir.file('a.raw')])
    {
      await using disk = await openDisk(child)
      assert.equal(disk.layers.length, 2)
      assert.equal(Buffer.compare(await readBytes(disk, 0, disk.size), await readFile(dir.file('a.raw'))), 0)
      assert.deepEqual(
        (await disk.mapExtents(0, disk.size))
          .map(({ depth, length }) => [depth, length / 65_536])
          .slice(0, 3),
        [
          [1, 1],
          [0, 1],
          [1, 14],
        ],
      )
    }
    // The parent was written to after the child was made: its content id is another one.
    await must('qemu-io', ['-f', 'vmdk', '-c', 'write -P 3 0 64k', base])
    const text = await readFile(base, 'latin1')
    await writeFile(base, text.replace(/^CID=.*$/m, 'CID=1234abcd'), 'latin1')
    await refuses('MISMATCH', /1234abcd/, () => opened(openDisk(child)))
    // An extent outside of the image's folder, and one that is a device.
    for (const name of ['/etc/passwd', '../up.img', '/dev/zero']) {
      await writeFile(base, text.replace(/"base-f001.vmdk"/, JSON.stringify(name)), 'latin1')
      await refuses('BACKING_DENIED', /data file/, () => opened(openDisk(base)))
    }
  })
})

test('a chain of VHDXs: sectors come from the child or the parent, which must be the one recorded', async () => {
  await using dir = await tempDir()
  const size = 4 * 1024 * 1024
  const base = makeVhdx({ size, blocks: new Map([0, 1, 2, 3].map((block) => [block, 6])) })
  const present = (sector: number): boolean => sector % 5 === 0
  const child = (linkage: string): Buffer => {
    const parent = { parent_linkage: `{${linkage}}`, relative_path: '.\\base.vhdx' }
    const states = new Map([
      [0, 7],
      [1, 2],
      [3, 6],
    ])
    return makeVhdx({ size, blocks: states, present, parent }).bytes
  }
  // The child's bytes are those of the parent, turned over, so that it shows whose they are.
  const bytes = child(WRITE_GUID.toLowerCase())
  const expected = base.expected.slice()
  expected.fill(0, size / 4, size / 2)
  for (let at = 5 * 1024 * 1024; at < bytes.length; at++) bytes[at]! ^= 0xff
  for (let at = 0; at < size; at++) {
    if (at >= (size / 4) * 3 || (at < size / 4 && present(Math.floor(at / 512)))) expected[at]! ^= 0xff
  }
  await writeFile(dir.file('base.vhdx'), base.bytes)
  await writeFile(dir.file('child.vhdx'), bytes)
  {
    await using disk = await openDisk(dir.file('child.vhdx'))
    assert.equal(disk.layers.length, 2)
    assert.equal(Buffer.compare(await readBytes(disk, 0, size), expected), 0)
  }
  await writeFile(dir.file('child.vhdx'), child('00000000-0000-4000-8000-000000000001'))
  await refuses('MISMATCH', /identity/, () => opened(openDisk(dir.file('child.vhdx'))))
})

describe('path policy', hasQemu, () => {
  test('a backing file inside the folder tree opens, relative, absolute or through a link', async () => {
    await using dir = await tempDir()
    await mkdir(dir.file('sub'))
    await must('qemu-img', ['create', '-q', '-f', 'raw', dir.file('sub/base.raw'), '1M'])
    await symlink('sub/base.raw', dir.file('linked.raw'))
    for (const name of ['sub/base.raw', './sub/../sub/base.raw', dir.file('sub/base.raw'), 'linked.raw']) {
      await qcow2On(dir.file('top.qcow2'), name)
      await using disk = await openDisk(dir.file('top.qcow2'))
      assert.equal(disk.layers[1]!.path, dir.file('sub/base.raw'))
    }
  })

  test('names are relative to the image, also when it is reached through a link', async () => {
    await using dir = await tempDir()
    await mkdir(dir.file('real'))
    await mkdir(dir.file('named'))
    await must('qemu-img', ['create', '-q', '-f', 'raw', dir.file('real/base.raw'), '1M'])
    await qcow2On(dir.file('real/top.qcow2'), 'base.raw')
    await symlink('../real/top.qcow2', dir.file('named/top.qcow2'))
    await using disk = await openDisk(dir.file('named/top.qcow2'))
    assert.equal(disk.layers[1]!.path, dir.file('real/base.raw'))
    // As qemu: the folder of the name comes first.
    await must('qemu-img', ['create', '-q', '-f', 'raw', dir.file('named/base.raw'), '1M'])
    await using other = await openDisk(dir.file('named/top.qcow2'))
    assert.equal(other.layers[1]!.path, dir.file('named/base.raw'))
  })

  test('outside of it needs the folder to be allowed; a link out of it is outside', async () => {
    await using dir = await tempDir()
    await mkdir(dir.file('in'))
    await mkdir(dir.file('in2'))
    await mkdir(dir.file('out'))
    await must('qemu-img', ['create', '-q', '-f', 'raw', dir.file('out/base.raw'), '1M'])
    await symlink('../out/base.raw', dir.file('in/link.raw'))
    await symlink('../out', dir.file('in/folder'))
    await symlink('out', dir.file('way-to-out'))
    for (const name of [
      '../out/base.raw',
      dir.file('out/base.raw'),
      'link.raw',
      'folder/base.raw',
      '../in2/gone',
    ]) {
      await qcow2On(dir.file('in/top.qcow2'), name)
      await refuses('BACKING_DENIED', /expected it inside/, () => opened(openDisk(dir.file('in/top.qcow2'))))
      if (name === '../in2/gone') continue
      for (const allowed of [dir.file('out'), dir.file('way-to-out')]) {
        await using disk = await openDisk(dir.file('in/top.qcow2'), { allowBacking: [allowed] })
        assert.equal(disk.layers[1]!.path, dir.file('out/base.raw'))
      }
    }
    await refuses('NOT_FOUND', /allow backing/, () =>
      opened(openDisk(dir.file('in/top.qcow2'), { allowBacking: [dir.file('nowhere')] })),
    )
    // `/a/in` does not allow `/a/in2`.
    await must('qemu-img', ['create', '-q', '-f', 'raw', dir.file('in2/base.raw'), '1M'])
    await qcow2On(dir.file('in/top.qcow2'), '../in2/base.raw')
    await refuses('BACKING_DENIED', /expected it inside/, () => opened(openDisk(dir.file('in/top.qcow2'))))
  })

  test('/dev, /proc and /sys stay closed even when allowed; so do folders and pipes', async () => {
    await using dir = await tempDir()
    await mkdir(dir.file('folder'))
    await must('mkfifo', [dir.file('pipe')])
    await symlink('/dev/zero', dir.file('zero'))
    for (const name of [
      '/dev/zero',
      '/dev/null',
      '/proc/self/mem',
      '/proc/self/environ',
      '/sys/kernel/uevent_seqnum',
      'zero',
      'folder',
      'pipe',
    ]) {
      await qcow2On(dir.file('top.qcow2'), name)
      await refuses('BACKING_DENIED', /backing file/, () =>
        opened(openDisk(dir.file('top.qcow2'), { allowBacking: ['/', '/dev', '/proc', '/sys'] })),
      )
    }
  })

  test('URIs and pseudo-protocols are refused by code', async () => {
    await using dir = await tempDir()
    for (const name of [
      'nbd://host/x',
      'nbd+unix:///x?socket=/run/s',
      'json:{"driver":"null-co"}',
      'https://h/x',
      'fat:/etc',
      'file:base.raw',
      'ssh:x',
    ]) {
      await qcow2On(dir.file('top.qcow2'), name)
      await refuses('UNSUPPORTED', /expected a path/, () => opened(openDisk(dir.file('top.qcow2'))))
    }
  })

  test('a backing file without a named format is never probed', async () => {
    await using dir = await tempDir()
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', dir.file('base.qcow2'), '1M'])
    await must('qemu-img', [
      'create',
      '-q',
      '-u',
      '-f',
      'qcow2',
      '-b',
      'base.qcow2',
      '-F',
      'qcow2',
      dir.file('top.qcow2'),
      '1M',
    ])
    // The header extension that names the format becomes an unknown one.
    const image = await readFile(dir.file('top.qcow2'))
    const at = image.indexOf(Buffer.from([0xe2, 0x79, 0x2a, 0xca]))
    image.writeUInt32BE(0x12345678, at)
    await writeFile(dir.file('top.qcow2'), image)
    await refuses('BACKING_FORMAT', /no format named/, () => opened(openDisk(dir.file('top.qcow2'))))
    await qcow2On(dir.file('odd.qcow2'), 'base.qcow2', 'qed')
    await refuses('UNSUPPORTED', /qed/, () => opened(openDisk(dir.file('odd.qcow2'))))
    // Named raw, it is raw, whatever it starts with.
    await qcow2On(dir.file('raw.qcow2'), 'base.qcow2', 'raw')
    await using disk = await openDisk(dir.file('raw.qcow2'))
    assert.equal(disk.layers[1]!.format, 'raw')
  })

  test('holds for an external data file too', async () => {
    await using dir = await tempDir()
    await mkdir(dir.file('in'))
    await mkdir(dir.file('out'))
    for (const [data, allowed] of [
      ['in/data.raw', true],
      ['out/data.raw', false],
    ] as const) {
      const path = dir.file('in/top.qcow2')
      await must('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', `data_file=${dir.file(data)}`, path, '4M'])
      await must('qemu-io', ['-c', 'write -P 5 1M 1M', path])
      if (!allowed) {
        await refuses('BACKING_DENIED', /data file.*expected it inside/, () => opened(openDisk(path)))
        await using disk = await openDisk(path, { allowBacking: [dir.file('out')] })
        assert.equal(disk.size, 4 * MIB)
        continue
      }
      await sameMap(path, 'qcow2')
      await using disk = await openDisk(path)
      assert.deepEqual(await readBytes(disk, MIB, MIB), new Uint8Array(MIB).fill(5))
      await rm(dir.file(data))
      await refuses('BACKING_MISSING', /data file/, () => opened(openDisk(path)))
    }
  })

  test('a missing one is named', async () => {
    await using dir = await tempDir()
    await qcow2On(dir.file('top.qcow2'), 'gone.raw')
    await refuses('BACKING_MISSING', /gone\.raw/, () => opened(openDisk(dir.file('top.qcow2'))))
    await qcow2On(dir.file('mid.qcow2'), 'gone.raw')
    await qcow2On(dir.file('top.qcow2'), 'mid.qcow2', 'qcow2')
    await refuses('BACKING_MISSING', /mid\.qcow2/, () => opened(openDisk(dir.file('top.qcow2'))))
  })

  test('loops: on itself, of two, through a hard link', async () => {
    await using dir = await tempDir()
    await qcow2On(dir.file('self.qcow2'), 'self.qcow2', 'qcow2')
    await refuses('CHAIN_LOOP', /self\.qcow2/, () => opened(openDisk(dir.file('self.qcow2'))))
    await qcow2On(dir.file('a.qcow2'), 'b.qcow2', 'qcow2')
    await qcow2On(dir.file('b.qcow2'), 'a.qcow2', 'qcow2')
    await refuses('CHAIN_LOOP', /above it/, () => opened(openDisk(dir.file('a.qcow2'))))
    await qcow2On(dir.file('c.qcow2'), 'd.qcow2', 'qcow2')
    await link(dir.file('c.qcow2'), dir.file('d.qcow2'))
    await refuses('CHAIN_LOOP', /d\.qcow2/, () => opened(openDisk(dir.file('c.qcow2'))))
  })
})

test('a chain of 256 layers opens, one of 300 does not', async () => {
  await using dir = await tempDir()
  for (let n = 0; n < 300; n++) {
    const parent = `${n - 1}.vhd`
    const recipe: VhdRecipe =
      n === 0
        ? { type: 'dynamic', size: 512 * 300, blockBytes: 512, sectors: new Map([[0, patternAt(0, 512, 1)]]) }
        : {
            type: 'differencing',
            size: 512 * 300,
            blockBytes: 512,
            parentUuid: RECIPE_UUID,
            parentName: parent,
            sectors: new Map([[n, patternAt(n * 512, 512, 1)]]),
          }
    await writeFile(dir.file(`${n}.vhd`), makeVhd(recipe).bytes)
  }
  await refuses('CHAIN_DEPTH', /256/, () => opened(openDisk(dir.file('299.vhd'))))
  await refuses('CHAIN_DEPTH', /256/, () => opened(openDisk(dir.file('256.vhd'))))
  const before = openFiles()
  {
    await using disk = await openDisk(dir.file('255.vhd'))
    assert.equal(disk.layers.length, 256)
    assert.deepEqual(await readBytes(disk, 0, 512 * 256), patternAt(0, 512 * 256, 1))
    const map = await mapDisk(disk)
    assert.equal(map.length, 257)
  }
  assert.equal(openFiles(), before)
})

describe('the image that the user names', () => {
  test('is probed by its magic, or is what --format says', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('a.img'), makeVhd({ type: 'dynamic', size: MIB }).bytes)
    await using vhd = await openDisk(dir.file('a.img'))
    assert.equal(vhd.layers[0]!.format, 'vhd')
    await using raw = await openDisk(dir.file('a.img'), { format: 'raw' })
    assert.equal(raw.layers[0]!.format, 'raw')
    await using vpc = await openDisk(dir.file('a.img'), { format: 'vpc' })
    assert.equal(vpc.layers[0]!.format, 'vhd')
    await refuses('USAGE', /"tape"/, () => opened(openDisk(dir.file('a.img'), { format: 'tape' })))
    await refuses('NOT_FOUND', /no such file/, () => opened(openDisk(dir.file('gone'))))
    await refuses('CORRUPT', /VHD.*in .*b\.img/, async () => {
      await writeFile(dir.file('b.img'), new Uint8Array(4096))
      await openDisk(dir.file('b.img'), { format: 'vhd' })
    })
  })

  test('of a format that is not read is not taken for raw', async () => {
    await using dir = await tempDir()
    for (const magic of ['WithoutFreeSpace', 'QED\0']) {
      await writeFile(dir.file('x.img'), Buffer.concat([Buffer.from(magic, 'latin1'), Buffer.alloc(8192)]))
      await refuses('UNSUPPORTED', /magic/, () => opened(openDisk(dir.file('x.img'))))
      await using disk = await openDisk(dir.file('x.img'), { format: 'raw' })
      assert.equal(disk.layers[0]!.format, 'raw')
    }
  })

  test('empty, tiny or oddly long raw files', async () => {
    await using dir = await tempDir()
    for (const length of [0, 1, 511, 1000, 4097]) {
      await writeFile(dir.file('x.raw'), patternAt(0, length))
      await using disk = await openDisk(dir.file('x.raw'))
      assert.equal(disk.size, length)
      assert.deepEqual(await readBytes(disk, 0, length), patternAt(0, length))
      const map = await mapDisk(disk)
      assert.equal(
        map.reduce((sum, entry) => sum + entry.length, 0),
        length,
      )
    }
  })

  test('that shrinks while it is open is an error, not zeros', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x.raw'), patternAt(0, 8192))
    await using disk = await openDisk(dir.file('x.raw'))
    await truncate(dir.file('x.raw'), 4096)
    await assert.rejects(readBytes(disk, 0, 8192), (error) => isVarveError(error, 'IO'))
  })

  test('stays readable when it is renamed, and every call after dispose throws', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('x.raw'), patternAt(0, 8192))
    const disk = await openDisk(dir.file('x.raw'))
    await rename(dir.file('x.raw'), dir.file('y.raw'))
    assert.deepEqual(await readBytes(disk, 0, 8192), patternAt(0, 8192))
    await disk[Symbol.asyncDispose]()
    await assert.rejects(disk.read(0, new Uint8Array(1)), TypeError)
    await assert.rejects(disk.mapExtents(0, 1), TypeError)
    await disk[Symbol.asyncDispose]()
  })
})
