import assert from 'node:assert/strict'
import { open, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { needs, run, tempDir } from '../../../test/kit/index.ts'
import { NotTrusted, rawCrc32 } from '../../base/index.ts'
import { MemoryDevice } from '../../device/index.ts'
import { foreign, raidMember } from './index.ts'
import { type Mark, SIGNATURES } from './table.ts'

const MIB = 1_048_576

/** What libblkid calls the kinds that it recognizes by their magic alone; the others want whole superblocks. */
const LIBBLKID: Readonly<Record<string, string>> = {
  luks: 'crypto_LUKS',
  'dm-snapshot': 'DM_snapshot_cow',
  vdo: 'vdo',
  ceph: 'ceph_bluestore',
  'oracle-asm': 'oracleasm',
  refs: 'ReFS',
  f2fs: 'f2fs',
  ufs: 'ufs',
  ocfs2: 'ocfs2',
  squashfs: 'squashfs3',
  erofs: 'erofs',
}

function marked({ at, text }: Mark, size: number): Uint8Array {
  const bytes = new Uint8Array(size)
  bytes.set(Buffer.from(text, 'latin1'), at)
  return bytes
}

async function recognized(bytes: Uint8Array): Promise<string[]> {
  const device = new MemoryDevice(bytes)
  const names = []
  for (const type of foreign) if (await type.probe(device)) names.push(type.name)
  return names
}

/** The rest of the structure, for signatures that look closer than their magic. */
const CLOSER: Readonly<Record<string, (bytes: Uint8Array) => void>> = {
  zfs: (bytes) => bytes.set([1, 1], 0x4000),
  hfs: (bytes) => {
    const view = new DataView(bytes.buffer, 1024)
    view.setUint16(14, 3)
    view.setUint32(20, 4096)
  },
  nilfs2: (bytes) => {
    const view = new DataView(bytes.buffer, 1024, 1024)
    view.setUint16(8, 280, true)
    view.setUint32(12, 0x12345678, true)
    view.setUint32(16, rawCrc32(bytes.slice(1024, 1024 + 280), 0x12345678), true)
  },
}

describe('foreign signatures', () => {
  test('every mark is recognized by its name, alone, and refused with its reason', async () => {
    for (const signature of SIGNATURES) {
      for (const mark of signature.marks) {
        const bytes = marked(mark, 3 * MIB)
        CLOSER[signature.kind]?.(bytes)
        assert.deepEqual(await recognized(bytes), [signature.kind], `${signature.kind} at ${mark.at}`)
        const type = foreign.find(({ name }) => name === signature.kind)!
        await assert.rejects(type.open(new MemoryDevice(bytes), {}), (error: unknown) => {
          assert.ok(error instanceof NotTrusted)
          assert.deepEqual([error.reason, error.about.kind], [signature.reason, signature.kind])
          return true
        })
      }
    }
  })

  test('a magic number that must be looked at closer is not enough by itself', async () => {
    for (const kind of Object.keys(CLOSER)) {
      const signature = SIGNATURES.find((one) => one.kind === kind)!
      const bytes = marked(signature.marks[0]!, 3 * MIB)
      if (kind === 'zfs') bytes[0x4002] = 7
      assert.deepEqual(await recognized(bytes), [], kind)
    }
  })

  test('nothing is seen on devices too small to hold it, nor in zeros', async () => {
    for (const size of [0, 1, 3, 100, 511, 512, 1100, 4096, 40_000, 3 * MIB]) {
      assert.deepEqual(await recognized(new Uint8Array(size)), [], `${size} bytes`)
      assert.equal(await raidMember.probe(new MemoryDevice(size)), false, `${size} bytes`)
    }
  })

  test('libblkid calls them the same', { skip: needs('wipefs') }, async () => {
    await using dir = await tempDir()
    const image = dir.file('image')
    let judged = 0
    for (const signature of SIGNATURES) {
      const expected = LIBBLKID[signature.kind]
      if (expected === undefined) continue
      for (const mark of signature.marks) {
        await writeFile(image, '')
        await truncate(image, 64 * MIB)
        await using handle = await open(image, 'r+')
        await handle.write(Buffer.from(mark.text, 'latin1'), 0, mark.text.length, mark.at)
        const { stdout } = await run('wipefs', ['-n', '-O', 'TYPE', '--noheadings', image])
        assert.equal(stdout.toString().trim(), expected, `${signature.kind} at ${mark.at}`)
        judged += 1
      }
    }
    assert.ok(judged >= Object.keys(LIBBLKID).length)
  })
})

describe('members of a RAID', () => {
  const SIZE = 3 * MIB + 12_345 * 512 + 100
  test('DDF and Intel metadata are found', async () => {
    const sectors = Math.floor(SIZE / 512)
    for (const mark of [
      { at: (sectors - 1) * 512, text: '\xde\x11\xde\x11' },
      { at: (sectors - 2) * 512, text: 'Intel Raid ISM Cfg Sig. 1.0.00' },
    ]) {
      assert.equal(await raidMember.probe(new MemoryDevice(marked(mark, SIZE))), true, mark.text)
    }
  })
})
