import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { Random } from '../../test/kit/index.ts'
import { isVarveError } from '../base/index.ts'
import { RangeSet } from '../extents/index.ts'
import {
  type ChunkEntry,
  decodeDirectory,
  decodeManifestHeader,
  decodePackFooter,
  decodePackHeader,
  decodeTable,
  encodeDirectory,
  encodeManifestHeader,
  encodePackFooter,
  encodePackHeader,
  encodePage,
  encodeTable,
  finishPackFooter,
  frameDescriptor,
  MapPage,
  METHOD,
  type PackObject,
  type PageReference,
} from './layout.ts'

const random = new Random()
const seed = `seed ${random.seed}`
const name = (): string => Buffer.from(random.bytes(16)).toString('hex')
const frame = (): number => frameDescriptor(1 + random.below(2), 20 + random.below(200_000))
const identity = {
  kind: 'data',
  sealing: 'aes-256-gcm',
  repository: random.bytes(16),
  name: random.bytes(16),
} as const

function directory(count: number): { objects: PackObject[]; end: number } {
  let at = 64
  const objects = Array.from({ length: count }, () => {
    const frames = Array.from({ length: 1 + random.below(16) }, frame)
    const object = { id: random.bytes(32), offset: at, plainLength: random.below(1 << 20), frames }
    at += frames.reduce((sum, f) => sum + (f & 0x3fffff), 0)
    return object
  })
  return { objects, end: at }
}

function page(count: number): { entries: (ChunkEntry | undefined)[]; inUse: RangeSet } {
  const packs = Array.from({ length: 5 }, name)
  const entries = Array.from({ length: count }, () =>
    random.below(3) === 0
      ? undefined
      : {
          id: random.bytes(32),
          pack: random.pick(packs),
          offset: random.below(2 ** 32),
          frames: Array.from({ length: 4 }, () =>
            random.below(4) === 0 ? frameDescriptor(METHOD.zeros, 0) : frame(),
          ),
        },
  )
  const ranges = Array.from({ length: random.below(50) }, () => {
    const start = random.below(2_000_000) * 512
    return { start, end: start + 512 * (1 + random.below(5000)) }
  })
  return { entries, inUse: RangeSet.from(ranges) }
}

/** Every shorter form of `bytes` and a sample of altered ones decodes or fails as CORRUPT, UNSUPPORTED or LIMIT. */
function assertHostileIsRefused(bytes: Uint8Array, decode: (bytes: Uint8Array) => unknown): void {
  const attempt = (changed: Uint8Array, what: string): boolean => {
    try {
      decode(changed)
      return true
    } catch (error) {
      assert.ok(isVarveError(error, 'CORRUPT', 'UNSUPPORTED', 'LIMIT'), `${seed} ${what}: ${String(error)}`)
      return false
    }
  }
  const step = Math.max(1, Math.floor(bytes.length / 300))
  for (let length = 0; length < bytes.length; length += step) {
    assert.equal(attempt(bytes.slice(0, length), `cut to ${length}`), false, `${seed} cut to ${length}`)
  }
  for (let i = 0; i < 2000; i++) {
    const changed = bytes.slice()
    const at = random.below(Math.min(changed.length, 400))
    const value = random.pick([0, 1, 0x7f, 0x80, 0xff])
    changed.fill(value, at, at + random.pick([1, 2, 4, 8]))
    attempt(changed, `${value} at ${at}`)
  }
}

describe('packs', () => {
  test('a header says what was written, and any flipped bit of it shows', () => {
    const bytes = encodePackHeader(identity)
    const read = decodePackHeader(bytes, 'pack')
    assert.deepEqual(
      { ...read, repository: [...read.repository], name: [...read.name] },
      {
        ...identity,
        repository: [...identity.repository],
        name: [...identity.name],
      },
    )
    for (let bit = 0; bit < bytes.length * 8; bit++) {
      const flipped = bytes.slice()
      flipped[bit >> 3]! ^= 1 << (bit & 7)
      assert.throws(() => decodePackHeader(flipped, 'pack'), { code: 'CORRUPT' }, `bit ${bit}`)
    }
  })

  test('a newer version and an unknown required feature are refused by code', () => {
    for (const at of [8, 12]) {
      const bytes = encodePackHeader(identity)
      bytes[at] = 0x80
      const view = new DataView(bytes.buffer)
      view.setUint32(60, crcOf(bytes.subarray(0, 60)), true)
      assert.throws(() => decodePackHeader(bytes, 'pack'), { code: 'UNSUPPORTED' })
    }
  })

  test('a directory comes back as it was written', () => {
    const { objects, end } = directory(40)
    const bytes = encodeDirectory(objects)
    assert.deepEqual(decodeDirectory(bytes, 40, end, 'pack'), objects, seed)
    assertHostileIsRefused(bytes, (changed) => decodeDirectory(changed, 40, end, 'pack'))
  })

  test('a directory whose objects lie over each other or behind the frames is refused', () => {
    const { objects, end } = directory(3)
    const bytes = encodeDirectory(objects)
    assert.throws(() => decodeDirectory(bytes, 3, end - 1, 'pack'), { code: 'CORRUPT' })
    const overlapping = [objects[0]!, { ...objects[1]!, offset: objects[1]!.offset - 1 }]
    assert.throws(() => decodeDirectory(encodeDirectory(overlapping), 2, end, 'pack'), { code: 'CORRUPT' })
  })

  test('a footer accounts for every byte of the file', () => {
    const footer = {
      ...identity,
      fileLength: 3_000_200 + 12 + 128,
      directoryOffset: 3_000_000,
      directoryStored: 200,
      directoryPlain: 184,
      objects: 4,
      crcCount: 3,
      crcOfCrcs: 77,
    }
    const bytes = encodePackFooter(footer)
    finishPackFooter(bytes, random.bytes(32))
    const read = decodePackFooter(bytes, footer.fileLength, 'pack')
    assert.equal(read.directoryOffset, 3_000_000)
    assert.throws(() => decodePackFooter(bytes, footer.fileLength + 1, 'pack'), { code: 'CORRUPT' })
    for (let bit = 0; bit < bytes.length * 8; bit++) {
      const flipped = bytes.slice()
      flipped[bit >> 3]! ^= 1 << (bit & 7)
      assert.throws(
        () => decodePackFooter(flipped, footer.fileLength, 'pack'),
        { code: 'CORRUPT' },
        `bit ${bit}`,
      )
    }
  })
})

describe('map pages', () => {
  test('a page comes back as it was written', () => {
    for (const count of [1, 7, 1024]) {
      const content = page(count)
      const bytes = encodePage(content, 4)
      const read = new MapPage(bytes, { framesPerChunk: 4, entries: count }, 'page')
      assert.deepEqual(
        Array.from({ length: count }, (_, i) => read.entry(i)),
        content.entries,
        seed,
      )
      assert.ok(read.inUse().equals(content.inUse), seed)
    }
  })

  test('equal content has equal bytes', () => {
    const content = page(300)
    assert.deepEqual(encodePage(content, 4), encodePage(structuredCloneOf(content), 4))
  })

  test('hostile pages are refused', () => {
    const bytes = encodePage(page(40), 4)
    assertHostileIsRefused(bytes, (changed) => {
      const read = new MapPage(changed, { framesPerChunk: 4, entries: 40 }, 'page')
      for (let i = 0; i < 40; i++) read.entry(i)
      read.inUse()
    })
  })

  test('an entry of an unknown kind is UNSUPPORTED: a later format adds kinds', () => {
    const bytes = encodePage(page(40), 4)
    bytes[32] = 2
    assert.throws(() => new MapPage(bytes, { framesPerChunk: 4, entries: 40 }, 'page'), {
      code: 'UNSUPPORTED',
    })
  })
})

describe('manifests', () => {
  test('a page table comes back as it was written', () => {
    const packs = Array.from({ length: 30 }, name)
    const pages: (PageReference | undefined)[] = Array.from({ length: 200 }, () =>
      random.below(3) === 0
        ? undefined
        : {
            id: random.bytes(32),
            pack: random.pick(packs),
            offset: random.below(2 ** 32),
            frame: frame(),
            plainLength: random.below(1 << 24),
            dataPacks: Array.from({ length: random.below(8) }, () => random.pick(packs)),
          },
    )
    const bytes = encodeTable(pages)
    assert.deepEqual(decodeTable(bytes, 200, 'manifest'), pages, seed)
    assert.throws(() => decodeTable(bytes, 199, 'manifest'), { code: 'CORRUPT' })
    assertHostileIsRefused(bytes, (changed) => decodeTable(changed, 200, 'manifest'))
  })

  test('a header with any flipped bit is refused', () => {
    const bytes = encodeManifestHeader({
      sealing: 'none',
      repository: random.bytes(16),
      point: random.bytes(16),
      salt: random.bytes(32),
      factsStored: 100,
      tableStored: 200,
    })
    assert.equal(decodeManifestHeader(bytes, 'manifest').tableStored, 200)
    for (let bit = 0; bit < bytes.length * 8; bit++) {
      const flipped = bytes.slice()
      flipped[bit >> 3]! ^= 1 << (bit & 7)
      assert.throws(() => decodeManifestHeader(flipped, 'manifest'), { code: 'CORRUPT' }, `bit ${bit}`)
    }
  })
})

function structuredCloneOf(content: {
  entries: (ChunkEntry | undefined)[]
  inUse: RangeSet
}): typeof content {
  return {
    entries: content.entries.map((entry) => entry && { ...entry, frames: [...entry.frames] }),
    inUse: RangeSet.from(content.inUse),
  }
}

function crcOf(bytes: Uint8Array): number {
  let crc = ~0
  for (const byte of bytes) {
    crc ^= byte
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1
  }
  return ~crc >>> 0
}
