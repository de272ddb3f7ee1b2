/** VMDK against qemu-img, which makes every hosted kind; COWD and seSparse by recipe. */
import assert from 'node:assert/strict'
import { readFile, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { deflateSync } from 'node:zlib'
import { must, needs, patternAt, Random, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import { allExtents, type BlockDevice, MemoryDevice, openHostFile, readBytes } from '../../device/index.ts'
import { checkExtents } from '../../extents/index.ts'
import { parseDescriptor } from './descriptor.ts'
import { vmdkFormat } from './index.ts'

const MIB = 1024 * 1024

const failsWith =
  (code: string, words: RegExp) =>
  (error: unknown): boolean => {
    assert.ok(isVarveError(error), String(error))
    assert.equal(error.code, code, error.message)
    assert.match(error.message, words)
    return true
  }

async function openFile(path: string, dir: string): Promise<Awaited<ReturnType<typeof vmdkFormat.open>>> {
  return await vmdkFormat.open(await openHostFile(path), {
    openPart: (name) => openHostFile(`${dir}/${name}`),
  })
}

/** Reads all of it, in pieces of odd sizes, and compares; then holds every extent against the content. */
async function agrees(layer: BlockDevice, expected: Uint8Array): Promise<{ data: number }> {
  assert.equal(layer.size, expected.length)
  const step = 777_777
  for (let at = 0; at < expected.length; at += step) {
    const length = Math.min(step, expected.length - at)
    const bytes = await readBytes(layer, at, length)
    assert.equal(Buffer.compare(bytes, expected.subarray(at, at + length)), 0, `bytes from ${at}`)
  }
  let data = 0
  for await (const { kind, at, offset, length } of allExtents(layer)) {
    const truth = expected.subarray(offset, offset + length)
    if (kind !== 'data') {
      assert.ok(
        truth.every((byte) => byte === 0),
        `${kind} at ${offset}`,
      )
      continue
    }
    data += length
    if (!at) continue
    await using file = await openHostFile(at.file.path)
    assert.equal(Buffer.compare(await readBytes(file, at.offset, length), truth), 0, `place of ${offset}`)
  }
  return { data }
}

/** A raw disk with islands of pattern, one of them across grains, and an odd size. */
function content(size: number): Uint8Array {
  const bytes = new Uint8Array(size)
  for (const [start, length] of [
    [0, 4096],
    [65_536 * 3, 65_536],
    [65_536 * 5, 65_536],
    [2 * MIB - 512, 200_000],
    [size - 1024, 1024],
  ] as const)
    bytes.set(patternAt(start, length), start)
  return bytes
}

describe('VMDK against qemu-img', { skip: needs('qemu-img') }, () => {
  for (const subformat of [
    'monolithicSparse',
    'monolithicFlat',
    'twoGbMaxExtentSparse',
    'twoGbMaxExtentFlat',
    'streamOptimized',
  ]) {
    test(`reads ${subformat}, size, content and places`, async () => {
      await using dir = await tempDir()
      const expected = content(40 * MIB + 512 * 3)
      await writeFile(dir.file('a.raw'), expected)
      const args = ['-f', 'raw', '-O', 'vmdk', '-o', `subformat=${subformat}`]
      await must('qemu-img', ['convert', '-q', ...args, dir.file('a.raw'), dir.file('a.vmdk')])
      const head = (await readFile(dir.file('a.vmdk'))).subarray(0, 4096)
      assert.ok(vmdkFormat.probe(head, head))
      await using layer = await openFile(dir.file('a.vmdk'), dir.path)
      const { data } = await agrees(layer, expected)
      assert.equal(layer.facts['createType'], subformat)
      assert.ok(data >= 330_000 && data < 2 * MIB, `${data} bytes of data`)
    })
  }

  test('twoGbMaxExtent* over several files', async () => {
    await using dir = await tempDir()
    for (const subformat of ['twoGbMaxExtentSparse', 'twoGbMaxExtentFlat']) {
      const path = dir.file(`${subformat}.vmdk`)
      await must('qemu-img', ['create', '-q', '-f', 'vmdk', '-o', `subformat=${subformat}`, path, '5G'])
      await must('qemu-io', ['-f', 'vmdk', '-c', 'write -P 0x5a 2147418112 128k', path])
      await using layer = await openFile(path, dir.path)
      assert.equal(layer.size, 5 * 1024 * MIB)
      assert.equal(layer.facts['extents'], 3)
      const bytes = await readBytes(layer, 2_147_418_112 - 512, 131_072 + 1024)
      assert.ok(bytes.subarray(512, -512).every((byte) => byte === 0x5a))
      assert.ok(bytes.subarray(0, 512).every((byte) => byte === 0))
      assert.ok(bytes.subarray(-512).every((byte) => byte === 0))
    }
  })

  test('zeroed grains are zero, not absent; a child names its parent', async () => {
    await using dir = await tempDir()
    await must('qemu-img', ['create', '-q', '-f', 'vmdk', dir.file('base.vmdk'), '4M'])
    await must('qemu-io', ['-f', 'vmdk', '-c', 'write -P 1 0 1M', dir.file('base.vmdk')])
    const child = ['-f', 'vmdk', '-o', 'zeroed_grain=on', '-F', 'vmdk', '-b', dir.file('base.vmdk')]
    await must('qemu-img', ['create', '-q', ...child, dir.file('child.vmdk')])
    await must('qemu-io', [
      '-f',
      'vmdk',
      '-c',
      'write -z 64k 64k',
      '-c',
      'write -P 2 192k 64k',
      dir.file('child.vmdk'),
    ])
    await using base = await openFile(dir.file('base.vmdk'), dir.path)
    await using layer = await openFile(dir.file('child.vmdk'), dir.path)
    const kinds = (await layer.extents(0, 4 * MIB)).map(({ kind, length }) => [kind, length / 65_536])
    assert.deepEqual(kinds, [
      ['absent', 1],
      ['zero', 1],
      ['absent', 1],
      ['data', 1],
      ['absent', 60],
    ])
    assert.deepEqual(layer.backing, {
      name: dir.file('base.vmdk'),
      format: 'vmdk',
      id: base.id,
      otherNames: ['base.vmdk'],
    })
  })

  test('a damaged primary directory or table: the redundant one is used, and said', async () => {
    await using dir = await tempDir()
    const expected = content(40 * MIB)
    await writeFile(dir.file('a.raw'), expected)
    await must('qemu-img', [
      'convert',
      '-q',
      '-f',
      'raw',
      '-O',
      'vmdk',
      dir.file('a.raw'),
      dir.file('a.vmdk'),
    ])
    const image = await readFile(dir.file('a.vmdk'))
    const directory = Number(image.readBigUInt64LE(56)) * 512
    const table = image.readUInt32LE(directory) * 512
    for (const [spoil, words] of [
      [(bytes: Buffer) => bytes.writeUInt32LE(0x7fffffff, directory), /directory/],
      [(bytes: Buffer) => bytes.writeUInt32LE(0x7fffffff, table), /grain table/],
      [(bytes: Buffer) => bytes.writeUInt32LE(directory / 512, table + 12), /grain table/],
    ] as const) {
      const bytes = Buffer.from(image)
      spoil(bytes)
      const said: string[] = []
      await using layer = await vmdkFormat.open(new MemoryDevice(bytes), {
        log: (_, message) => void said.push(message),
      })
      await agrees(layer, expected)
      assert.match(said.join(), words)
      // Without a redundant copy it is refused.
      bytes.writeUInt32LE(bytes.readUInt32LE(8) & ~2, 8)
      await assert.rejects(
        async () => {
          await using alone = await vmdkFormat.open(new MemoryDevice(bytes), {})
          await readBytes(alone, 0, alone.size)
        },
        failsWith('CORRUPT', /VMDK/),
      )
    }
  })

  test('a stream with its directory at the end; hostile ones: a bomb, a wrong marker, a cut file', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('a.raw'), content(8 * MIB))
    const args = ['-f', 'raw', '-O', 'vmdk', '-o', 'subformat=streamOptimized']
    await must('qemu-img', ['convert', '-q', ...args, dir.file('a.raw'), dir.file('a.vmdk')])
    // qemu-img puts the directory at the front; other writers can not go back and leave it to a footer.
    const front = await readFile(dir.file('a.vmdk'))
    const markers = Buffer.alloc(3 * 512)
    markers.writeUInt32LE(1, 0)
    markers.writeUInt32LE(3, 12)
    front.copy(markers, 512, 0, 512)
    const image = Buffer.concat([front, markers])
    image.writeBigUInt64LE(0xffffffffffffffffn, 56)
    const table = front.readUInt32LE(Number(front.readBigUInt64LE(56)) * 512) * 512
    const grain = image.readUInt32LE(table) * 512
    const spoiled = async (spoil: (bytes: Buffer) => Buffer | void): Promise<void> => {
      const bytes = Buffer.from(image)
      const file = spoil(bytes) ?? bytes
      await using layer = await vmdkFormat.open(new MemoryDevice(file), {})
      await readBytes(layer, 0, layer.size)
    }
    await spoiled(() => {})
    await using footed = await vmdkFormat.open(new MemoryDevice(image), {})
    await agrees(footed, content(8 * MIB))
    await assert.rejects(
      spoiled((bytes) => void bytes.writeUInt32LE(7, bytes.length - 1024 + 12)),
      failsWith('CORRUPT', /another disk/),
    )
    const bomb = deflateSync(new Uint8Array(64 * MIB))
    await assert.rejects(
      spoiled((bytes) => {
        bytes.writeUInt32LE(bomb.length, grain + 8)
        return Buffer.concat([bytes.subarray(0, grain + 12), bomb, bytes.subarray(grain + 12 + bomb.length)])
      }),
      failsWith('CORRUPT', /compressed VMDK grain/),
    )
    await assert.rejects(
      spoiled((bytes) => void bytes.writeUInt32LE(128, grain)),
      failsWith('CORRUPT', /marker of sector 128/),
    )
    await assert.rejects(
      spoiled((bytes) => void bytes.writeUInt32LE(0xffffffff, grain + 8)),
      failsWith('CORRUPT', /4294967295/),
    )
    await assert.rejects(
      spoiled((bytes) => bytes.subarray(0, bytes.length - 1024)),
      failsWith('CORRUPT', /no footer/),
    )
  })
})

/** A COWD or seSparse extent whose `present` grains hold pattern; grain tables of 4096 entries. */
function delta(
  kind: 'cowd' | 'sesparse',
  size: number,
  entry: (grain: number) => 'data' | 'zero' | 'absent',
): { bytes: Buffer; expected: Uint8Array } {
  const wide = kind === 'sesparse'
  const grainBytes = wide ? 4096 : 512
  const entryBytes = wide ? 8 : 4
  const grains = Math.ceil(size / grainBytes)
  const tables = Math.ceil(grains / 4096)
  const directory = wide ? 4096 : 4 * 512
  const tablesAt = directory + Math.ceil((tables * entryBytes) / 4096) * 4096
  const grainsAt = tablesAt + tables * 4096 * entryBytes
  const bytes = Buffer.alloc(grainsAt + grains * grainBytes)
  const expected = new Uint8Array(size)
  if (wide) {
    const words: [number, bigint][] = [
      [0, 0xcafebaben],
      [8, 0x200000001n],
      [16, BigInt(size / 512)],
      [24, 8n],
      [32, 64n],
      [80, 1n],
      [88, 1n],
      [128, BigInt(directory / 512)],
      [136, BigInt((tablesAt - directory) / 512)],
      [144, BigInt(tablesAt / 512)],
      [152, BigInt((grainsAt - tablesAt) / 512)],
      [192, BigInt(grainsAt / 512)],
      [200, BigInt((grains * grainBytes) / 512)],
      [512, 0xcafecafen],
    ]
    for (const [at, value] of words) bytes.writeBigUInt64LE(value, at)
  } else {
    bytes.write('COWD', 0)
    for (const [at, value] of [
      [4, 1],
      [8, 3],
      [12, size / 512],
      [16, 1],
      [20, 4],
      [24, tables],
    ] as const)
      bytes.writeUInt32LE(value, at)
  }
  for (let table = 0; table < tables; table++) {
    if (wide) bytes.writeBigUInt64LE(0x1000000000000000n | BigInt(table), directory + table * 8)
    else bytes.writeUInt32LE((tablesAt + table * 4096 * 4) / 512, directory + table * 4)
  }
  for (let grain = 0; grain < grains; grain++) {
    const state = entry(grain)
    const at = tablesAt + grain * entryBytes
    // Grains stand in the file in the reverse order of the disk.
    const place = grains - 1 - grain
    if (state === 'data') {
      const content = patternAt(grain * grainBytes, grainBytes)
      bytes.set(content, grainsAt + place * grainBytes)
      expected.set(content.subarray(0, Math.min(grainBytes, size - grain * grainBytes)), grain * grainBytes)
      if (wide)
        bytes.writeBigUInt64LE(0x3000000000000000n | BigInt(place >> 12) | (BigInt(place & 4095) << 48n), at)
      else bytes.writeUInt32LE((grainsAt + place * grainBytes) / 512, at)
    } else if (state === 'zero') bytes.writeBigUInt64LE(0x2000000000000000n, at)
  }
  return { bytes, expected }
}

function deltaDescriptor(kind: 'cowd' | 'sesparse', size: number): Buffer {
  return Buffer.from(
    `# Disk DescriptorFile\nversion=1\nCID=0badcafe\nparentCID=00c0ffee\nisNativeSnapshot="no"\n` +
      `createType="${kind === 'cowd' ? 'vmfsSparse' : 'seSparse'}"\nparentFileNameHint="base.vmdk"\n` +
      `# Extent description\nRW ${size / 512} ${kind === 'cowd' ? 'VMFSSPARSE' : 'SESPARSE'} "x-delta.vmdk"\n\n` +
      `# The Disk Data Base\n#DDB\n\nddb.longContentID = "0123"\n`,
  )
}

describe('VMDK deltas of ESX', () => {
  for (const kind of ['cowd', 'sesparse'] as const) {
    test(`${kind}: an emptied grain says nothing of the grains beside it`, async () => {
      const size = 20 * MIB + 512 * 8
      const random = new Random()
      // Holes of one grain among data: first, last, alternating, at random.
      const hole = (grain: number): boolean =>
        grain === 0 ||
        (grain > 100 && grain < 200 && grain % 2 === 0) ||
        grain === 4095 ||
        random.below(10) === 0
      const { bytes, expected } = delta(kind, size, (grain) =>
        hole(grain) ? 'absent' : kind === 'sesparse' && grain % 7 === 0 ? 'zero' : 'data',
      )
      await using layer = await vmdkFormat.open(new MemoryDevice(deltaDescriptor(kind, size)), {
        openPart: async () => new MemoryDevice(bytes),
      })
      await agrees(layer, expected)
      const absent: number[] = []
      for await (const extent of allExtents(layer)) if (extent.kind === 'absent') absent.push(extent.length)
      assert.ok(absent.length > 1000 / (kind === 'cowd' ? 1 : 8), `seed ${random.seed}`)
      for (let i = 0; i < 50; i++) {
        const offset = random.below(size)
        const length = 1 + random.below(Math.min(size - offset, 100_000))
        checkExtents(await layer.extents(offset, length), offset, length)
        assert.deepEqual(await readBytes(layer, offset, length), expected.slice(offset, offset + length))
      }
      assert.equal(layer.backing?.id, '00c0ffee')
      assert.equal(layer.id, '0badcafe')
    })
  }

  test('what is not known of seSparse is refused', async () => {
    const size = 4 * MIB
    const { bytes } = delta('sesparse', size, () => 'data')
    for (const [at, value, words] of [
      [40, 1n, /flags/],
      [48, 1n, /flags/],
      [512 + 24, 1n, /journal/],
      [24, 16n, /grains of 16/],
    ] as const) {
      const spoiled = Buffer.from(bytes)
      spoiled.writeBigUInt64LE(value, at)
      await assert.rejects(
        vmdkFormat.open(new MemoryDevice(deltaDescriptor('sesparse', size)), {
          openPart: async () => new MemoryDevice(spoiled),
        }),
        failsWith('UNSUPPORTED', words),
      )
    }
  })

  test('an extent alone is refused', async () => {
    const { bytes } = delta('cowd', MIB, () => 'data')
    await assert.rejects(
      vmdkFormat.open(new MemoryDevice(bytes), {}),
      failsWith('UNSUPPORTED', /without a descriptor/),
    )
  })
})

describe('VMDK descriptors', () => {
  const base =
    '# Disk DescriptorFile\nversion=1\nCID=123\nparentCID=ffffffff\ncreateType="vmfs"\nRW 2048 VMFS "a-flat.vmdk"\n'
  const parse = (text: string): ReturnType<typeof parseDescriptor> => parseDescriptor(Buffer.from(text))

  test('a vmfs flat one, with an offset, zeros and CRLF', async () => {
    const text = `${base}RW 8 FLAT "b.img" 2\nRW 16 ZERO\nRDONLY 8 FLAT "c.img" 0\n`.replaceAll('\n', '\r\n')
    const file = new MemoryDevice(patternAt(0, MIB + 4096))
    const names: string[] = []
    await using layer = await vmdkFormat.open(new MemoryDevice(Buffer.from(text)), {
      openPart: async (name) => {
        names.push(name)
        return new MemoryDevice(file.bytes)
      },
    })
    assert.deepEqual(names, ['a-flat.vmdk', 'b.img', 'c.img'])
    assert.equal(layer.size, (2048 + 8 + 16 + 8) * 512)
    assert.equal(layer.id, '00000123')
    assert.equal(layer.backing, undefined)
    assert.deepEqual(await readBytes(layer, MIB, 4096), patternAt(1024, 4096))
    assert.deepEqual(await readBytes(layer, MIB + 4096, 8192), new Uint8Array(8192))
  })

  for (const [what, text, code, words] of [
    ['nonsense', `${base}hello world\n`, 'CORRUPT', /line 7/],
    ['a second CID', `${base}CID=124\n`, 'CORRUPT', /twice/],
    ['a parent without a name', base.replace('ffffffff', '12'), 'CORRUPT', /parentFileNameHint/],
    ['no access', `${base}NOACCESS 63 ZERO\n`, 'UNSUPPORTED', /without access/],
    ['a raw device', `${base}RW 63 VMFSRDM "x"\n`, 'UNSUPPORTED', /VMFSRDM/],
    ['a device type', base.replace('"vmfs"', '"fullDevice"'), 'UNSUPPORTED', /device/],
    ['an unknown type', base.replace('"vmfs"', '"vmfsNew"'), 'UNSUPPORTED', /vmfsNew/],
    ['no extent', base.replace(/^RW.*$/m, ''), 'CORRUPT', /no extent/],
    ['an unquoted name', base.replace(/^RW.*$/m, 'RW 1 FLAT a.img'), 'CORRUPT', /name/],
    ['a size of 10^15 sectors', base.replace('2048', '999999999999999'), 'CORRUPT', /size/],
    ['a key', `${base}encryption.keySafe = "vmware:key"\n`, 'ENCRYPTED', /keysafe/],
    ['version 9', base.replace('version=1', 'version=9'), 'UNSUPPORTED', /version/],
    ['another encoding', `${base}encoding="klingon"\n`, 'UNSUPPORTED', /klingon/],
    ['bytes that are no UTF-8', `${base}encoding="US-ASCII\u0000"\n`, 'CORRUPT', /line 7/],
  ] as const) {
    test(`refuses ${what}`, () => {
      assert.throws(() => parse(text), failsWith(code, words))
    })
  }

  test('a flat file shorter than its extent is refused, and parts are asked of the chain alone', async () => {
    const open = (size: number): Promise<unknown> =>
      vmdkFormat.open(new MemoryDevice(Buffer.from(base)), { openPart: async () => new MemoryDevice(size) })
    await assert.rejects(open(MIB - 1), failsWith('CORRUPT', /a-flat\.vmdk/))
    await assert.rejects(
      vmdkFormat.open(new MemoryDevice(Buffer.from(base)), {}),
      failsWith('UNSUPPORTED', /a-flat/),
    )
  })
})
