/**
 * Journal replay against e2fsprogs: logs of every form are written here, block by block, and what we would replay
 * must be what `e2fsck -E journal_only` replays into a copy of the image.
 */
import assert from 'node:assert/strict'
import { copyFile, open, readFile, truncate, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, needsRoot, Random, run, tempDir } from '../../../test/kit/index.ts'
import { mounted, SCRATCH_TOOLS, scratch, snapshot } from '../../../test/poison/index.ts'
import { Bytes, rawCrc32c } from '../../base/index.ts'
import { OverlayDevice, openHostFile } from '../../device/index.ts'
import { RangeSet } from '../../extents/index.ts'
import { NotTrusted } from '../file-system.ts'
import { readDescriptors } from './descriptors.ts'
import { extType } from './index.ts'
import { Journal, type Recovery } from './journal.ts'
import { BLOCK_TYPE, crc32MsbFirst, JOURNAL_INCOMPAT, JOURNAL_MAGIC } from './journal-layout.ts'
import { readSuperblock } from './superblock.ts'

interface Form {
  readonly name: string
  readonly incompat: number
  /** Checksums over whole transactions (compat CHECKSUM). */
  readonly checksum?: boolean
  /** A UUID after each tag instead of only after none. */
  readonly uuids?: boolean
  /** 4096-byte blocks instead of 1024. */
  readonly large?: boolean
  /** mke2fs: inode 8 mapped by indirect blocks. */
  readonly indirect?: boolean
}

const { revoke, bits64, asyncCommit, csumV2, csumV3 } = JOURNAL_INCOMPAT
const FORMS: readonly Form[] = [
  { name: 'plain', incompat: revoke },
  { name: 'plain, version 1 superblock', incompat: 0 },
  { name: 'plain with UUIDs', incompat: revoke, uuids: true },
  { name: 'plain, 64 bit', incompat: revoke | bits64 },
  { name: 'plain on indirect blocks', incompat: revoke, indirect: true },
  { name: 'transaction checksums', incompat: revoke, checksum: true },
  { name: 'transaction checksums, 64 bit', incompat: revoke | bits64, checksum: true },
  { name: 'transaction checksums, async commit', incompat: revoke | asyncCommit, checksum: true },
  { name: 'checksum v2', incompat: revoke | csumV2 },
  { name: 'checksum v2, 64 bit', incompat: revoke | csumV2 | bits64 },
  { name: 'checksum v2 with UUIDs', incompat: revoke | csumV2, uuids: true },
  { name: 'checksum v3', incompat: revoke | csumV3 },
  { name: 'checksum v3, 64 bit', incompat: revoke | csumV3 | bits64 },
  { name: 'checksum v3, 64 bit, large blocks', incompat: revoke | csumV3 | bits64, large: true },
  { name: 'checksum v3, async commit', incompat: revoke | csumV3 | asyncCommit },
]

/** Blocks of the file system that the logs write to: free ones, so that no replay does harm. */
const TARGET = { from: 6000, count: 300 } as const

interface Image {
  readonly path: string
  readonly blockBytes: number
  /** Where block n of the journal stands. */
  readonly places: readonly number[]
}

async function makeImage(path: string, form: Form): Promise<Image> {
  const blockBytes = form.large ? 4096 : 1024
  await writeFile(path, '')
  await truncate(path, 8192 * blockBytes)
  // As the kernel does: checksums of versions 2 and 3 belong to metadata_csum, all else to file systems without.
  const csum = (form.incompat & (csumV2 | csumV3)) !== 0
  const features = form.indirect ? '^extent,^metadata_csum,^64bit' : `64bit,${csum ? '' : '^'}metadata_csum`
  await must('mke2fs', [
    '-q',
    '-F',
    '-t',
    'ext4',
    '-b',
    `${blockBytes}`,
    '-O',
    features,
    '-J',
    `size=${blockBytes / 1024}`,
    path,
  ])
  const places: number[] = []
  // `ex`, `blocks` and `bmap` would do too; this one lists data blocks in order and no others.
  const list = await must('debugfs', ['-R', 'bmap <8> 0', path])
  places.push(Number(list))
  const script = Array.from({ length: 1024 }, (_, i) => `bmap <8> ${i}`).join('\n')
  const all = await must('debugfs', ['-f', '-', path], { input: script })
  const numbers = all
    .split('\n')
    .filter((line) => /^\d+$/.test(line))
    .map(Number)
  assert.equal(numbers.length, 1024)
  assert.equal(numbers[0], places[0])
  return { path, blockBytes, places: numbers }
}

/** Writes a log as jbd2 does. */
class LogWriter {
  readonly #image: Image
  readonly #form: Form
  readonly #seed: number
  readonly #uuid: Uint8Array
  readonly blocks: Map<number, Uint8Array> = new Map()
  readonly first = 1
  readonly length = 1024
  at: number
  sequence: number
  readonly start: number
  readonly startSequence: number
  #crc = 0xffffffff
  #time = 1000n

  constructor(image: Image, form: Form, uuid: Uint8Array, start: number, sequence: number) {
    this.#image = image
    this.#form = form
    this.#uuid = uuid
    this.#seed = rawCrc32c(uuid, 0xffffffff)
    this.start = start
    this.at = start
    this.sequence = sequence
    this.startSequence = sequence
  }

  get #hasCsum(): boolean {
    return (this.#form.incompat & (csumV2 | csumV3)) !== 0
  }

  /** Appends one block of the log; returns its place in it. */
  #append(bytes: Uint8Array): number {
    const at = this.at
    this.blocks.set(at, bytes)
    this.at = at + 1 === this.length ? this.first : at + 1
    return at
  }

  #header(type: number): Bytes {
    const b = new Bytes(new Uint8Array(this.#image.blockBytes), 'big')
    b.setU32(0, JOURNAL_MAGIC)
    b.setU32(4, type)
    b.setU32(8, this.sequence)
    return b
  }

  #seal(b: Bytes, at: number): void {
    if (this.#hasCsum) b.setU32(at, rawCrc32c(b.bytes, this.#seed))
  }

  get tagBytes(): number {
    const { incompat } = this.#form
    if (incompat & csumV3) return 16
    return 8 + (incompat & bits64 ? 4 : 0) + (incompat & csumV2 ? 2 : 0)
  }

  /** How many tags fit one descriptor block. */
  get tagsPerBlock(): number {
    const room = this.#image.blockBytes - 12 - (this.#hasCsum ? 4 : 0)
    return Math.floor((room - 16) / (this.tagBytes + (this.#form.uuids ? 16 : 0)))
  }

  descriptor(copies: readonly { readonly block: number; readonly bytes: Uint8Array }[]): void {
    const { incompat } = this.#form
    const b = this.#header(BLOCK_TYPE.descriptor)
    let at = 12
    const logged = copies.map(({ block, bytes }, i) => {
      const escape = new Bytes(bytes, 'big').u32(0) === JOURNAL_MAGIC
      const data = bytes.slice()
      if (escape) data.fill(0, 0, 4)
      // jbd2 gives the UUID with the first tag of a descriptor block only.
      const same = i > 0 && !this.#form.uuids
      const flags = (escape ? 1 : 0) | (same ? 2 : 0) | (i === copies.length - 1 ? 8 : 0)
      const number = new Bytes(new Uint8Array(4), 'big')
      number.setU32(0, this.sequence)
      const crc = rawCrc32c(data, rawCrc32c(number.bytes, this.#seed))
      b.setU32(at, block)
      if (incompat & csumV3) {
        b.setU32(at + 4, flags)
        b.setU32(at + 12, crc)
      } else {
        if (incompat & csumV2) b.setU16(at + 4, crc & 0xffff)
        b.setU16(at + 6, flags)
      }
      at += this.tagBytes
      if (!same) {
        b.set(at, this.#uuid)
        at += 16
      }
      return data
    })
    this.#seal(b, b.length - 4)
    this.#crc = crc32MsbFirst(b.bytes, this.#crc)
    this.#append(b.bytes)
    for (const data of logged) {
      this.#crc = crc32MsbFirst(data, this.#crc)
      this.#append(data)
    }
  }

  revokes(blocks: readonly number[]): void {
    const b = this.#header(BLOCK_TYPE.revoke)
    const wide = (this.#form.incompat & bits64) !== 0
    let at = 16
    for (const block of blocks) {
      b.setU32(wide ? at + 4 : at, block)
      at += wide ? 8 : 4
    }
    b.setU32(12, at)
    this.#seal(b, b.length - 4)
    this.#append(b.bytes)
  }

  commit(options: { readonly wrong?: boolean; readonly time?: bigint } = {}): void {
    const b = this.#header(BLOCK_TYPE.commit)
    b.setU64(48, options.time ?? this.#time++)
    if (this.#form.checksum) {
      b.setU8(12, 1)
      b.setU8(13, 4)
      b.setU32(16, this.#crc)
    }
    this.#seal(b, 16)
    if (options.wrong) b.setU32(16, (b.u32(16) ^ 0x10) >>> 0)
    this.#append(b.bytes)
    this.#crc = 0xffffffff
    this.sequence = (this.sequence + 1) >>> 0
  }

  superblock(old: Uint8Array): Uint8Array {
    const b = new Bytes(old.slice(), 'big')
    b.setU32(
      4,
      this.#form.incompat === 0 && !this.#form.checksum ? BLOCK_TYPE.superblockV1 : BLOCK_TYPE.superblockV2,
    )
    b.setU32(0x18, this.startSequence)
    b.setU32(0x1c, this.start)
    b.setU32(0x24, this.#form.checksum ? 1 : 0)
    b.setU32(0x28, this.#form.incompat)
    b.setU8(0x50, this.#hasCsum ? 4 : 0)
    b.setU32(0xfc, 0)
    if (this.#hasCsum) b.setU32(0xfc, rawCrc32c(b.sub(0, 1024), 0xffffffff))
    return b.bytes
  }
}

async function readJournalSuperblock(image: Image): Promise<Uint8Array> {
  return await readBlock(image.path, image.places[0]!, image.blockBytes)
}

async function readBlock(path: string, block: number, blockBytes: number): Promise<Uint8Array> {
  const file = await open(path)
  try {
    const bytes = new Uint8Array(blockBytes)
    await file.read(bytes, 0, blockBytes, block * blockBytes)
    return bytes
  } finally {
    await file.close()
  }
}

/** Puts the log into the image and marks the file system as needing it. */
async function install(image: Image, log: LogWriter): Promise<void> {
  const superblock = log.superblock(await readJournalSuperblock(image))
  const file = await open(image.path, 'r+')
  try {
    const put = (at: number, bytes: Uint8Array): Promise<unknown> =>
      file.write(bytes, 0, bytes.length, image.places[at]! * image.blockBytes)
    await put(0, superblock)
    for (const [at, bytes] of log.blocks) await put(at, bytes)
  } finally {
    await file.close()
  }
  await must('debugfs', ['-w', '-R', 'feature needs_recovery', image.path])
}

async function newLog(
  image: Image,
  form: Form,
  options: { start?: number; sequence?: number } = {},
): Promise<LogWriter> {
  const uuid = (await readJournalSuperblock(image)).slice(0x30, 0x40)
  return new LogWriter(image, form, uuid, options.start ?? 1, options.sequence ?? 7)
}

async function withRecovery<T>(
  image: string,
  work: (recovery: Recovery, overlay: OverlayDevice) => Promise<T>,
): Promise<T> {
  await using device = await openHostFile(image)
  const sb = await readSuperblock(device)
  const journal = await Journal.open(device, sb, await readDescriptors(device, sb))
  await using overlay = new OverlayDevice(device)
  return await work(await journal.recover(), overlay)
}

/** The target blocks after our replay. */
function replayed(image: Image): Promise<Uint8Array> {
  return withRecovery(image.path, async (recovery, overlay) => {
    await recovery.apply(
      overlay,
      Array.from({ length: TARGET.count }, (_, i) => TARGET.from + i),
    )
    const bytes = new Uint8Array(TARGET.count * image.blockBytes)
    await overlay.read(TARGET.from * image.blockBytes, bytes)
    return bytes
  })
}

/** The same after e2fsck's. */
async function replayedByE2fsck(image: Image): Promise<Uint8Array> {
  const copy = `${image.path}.e2fsck`
  await copyFile(image.path, copy)
  const result = await run('e2fsck', ['-E', 'journal_only', '-y', copy])
  assert.ok(result.code === 0 || result.code === 1, `${result.stdout.toString()}${result.stderr}`)
  const from = TARGET.from * image.blockBytes
  return new Uint8Array((await readFile(copy)).subarray(from, from + TARGET.count * image.blockBytes))
}

/** The first target block that differs. */
function firstDifference(image: Image, a: Uint8Array, b: Uint8Array): number | undefined {
  for (let i = 0; i < TARGET.count; i++) {
    const [from, to] = [i * image.blockBytes, (i + 1) * image.blockBytes]
    if (Buffer.compare(a.subarray(from, to), b.subarray(from, to)) !== 0) return TARGET.from + i
  }
  return undefined
}

/** A block's content; one in eight starts with the journal's magic and must be escaped. */
function content(image: Image, random: Random): Uint8Array {
  const bytes = new Uint8Array(image.blockBytes).fill(1 + random.below(255))
  if (random.below(8) === 0) new Bytes(bytes, 'big').setU32(0, JOURNAL_MAGIC)
  return bytes
}

/** Some transactions with copies and revocations, ending in the middle of one. */
function fill(
  image: Image,
  log: LogWriter,
  random: Random,
  transactions: number,
  withRevokes: boolean,
): void {
  for (let i = 0; i < transactions; i++) {
    if (withRevokes && random.below(2) === 0) {
      log.revokes(
        Array.from({ length: 1 + random.below(20) }, () => TARGET.from + random.below(TARGET.count)),
      )
    }
    for (let part = random.below(3); part >= 0; part--) {
      const count = 1 + random.below(Math.min(log.tagsPerBlock, 40))
      log.descriptor(
        Array.from({ length: count }, () => ({
          block: TARGET.from + random.below(TARGET.count),
          bytes: content(image, random),
        })),
      )
    }
    log.commit()
  }
}

describe('journal replay is what e2fsck replays', { skip: needs('mke2fs', 'debugfs', 'e2fsck') }, () => {
  for (const form of FORMS) {
    test(form.name, async () => {
      await using dir = await tempDir()
      const random = new Random()
      const image = await makeImage(dir.file('image'), form)
      // Starts near the end, so that it wraps; the sequence wraps at 2^32 too.
      const log = await newLog(image, form, { start: 950, sequence: 0xfffffffd })
      fill(image, log, random, 8, (form.incompat & revoke) !== 0)
      assert.ok(log.at < log.start, 'the log wraps')
      // An interrupted transaction is not replayed.
      log.descriptor([{ block: TARGET.from, bytes: content(image, random) }])
      await install(image, log)
      const ours = await replayed(image)
      const theirs = await replayedByE2fsck(image)
      assert.equal(firstDifference(image, ours, theirs), undefined, `seed ${random.seed}`)
      assert.ok(
        ours.some((byte) => byte !== 0),
        'something was replayed',
      )
      await withRecovery(image.path, async (recovery) => assert.equal(recovery.transactions, 8))
    })
  }
})

const V3: Form = { name: '', incompat: revoke | csumV3 | bits64 }
const PLAIN: Form = { name: '', incompat: revoke }

describe('journal damage', { skip: needs('mke2fs', 'debugfs', 'e2fsck') }, () => {
  async function prepared(
    dir: { file(name: string): string },
    form: Form,
    write: (log: LogWriter, image: Image) => void,
    options: { start?: number; sequence?: number } = {},
  ): Promise<Image> {
    const image = await makeImage(dir.file('image'), form)
    const log = await newLog(image, form, options)
    write(log, image)
    await install(image, log)
    return image
  }

  const one = (image: Image, byte = 1) => [
    { block: TARGET.from, bytes: new Uint8Array(image.blockBytes).fill(byte) },
    { block: TARGET.from + 1, bytes: new Uint8Array(image.blockBytes).fill(byte) },
  ]
  const flip = (log: LogWriter, at: number, byte: number): void => {
    log.blocks.get(at)![byte]! ^= 4
  }
  const refuses = async (image: Image, found: RegExp): Promise<void> => {
    await assert.rejects(
      withRecovery(image.path, async () => {}),
      (error: unknown) =>
        error instanceof NotTrusted && error.reason === 'ext-journal' && found.test(error.message),
    )
    await using device = await openHostFile(image.path)
    const fs = await extType.open(device, {})
    await assert.rejects(fs.used({}), NotTrusted)
  }

  test('a logged block with a wrong checksum is refused', async () => {
    await using dir = await tempDir()
    const image = await prepared(dir, V3, (log, image) => {
      log.descriptor(one(image))
      flip(log, 2, 500)
      log.commit()
    })
    await refuses(image, /wrong checksum on the logged copy/)
  })

  test('a logged block with a wrong checksum that is revoked later does not matter', async () => {
    await using dir = await tempDir()
    const image = await prepared(dir, V3, (log, image) => {
      log.descriptor(one(image))
      flip(log, 2, 500)
      log.commit()
      log.revokes([TARGET.from])
      log.commit()
    })
    const ours = await replayed(image)
    assert.equal(firstDifference(image, ours, await replayedByE2fsck(image)), undefined)
    assert.equal(ours[0], 0)
    assert.equal(ours[image.blockBytes], 1)
  })

  test('a descriptor with a wrong checksum in a committed transaction is refused', async () => {
    await using dir = await tempDir()
    const image = await prepared(dir, V3, (log, image) => {
      log.descriptor(one(image))
      log.commit()
      log.descriptor(one(image, 2))
      flip(log, 5, 900)
      log.commit()
    })
    await refuses(image, /wrong checksum in transaction 8/)
  })

  test('a descriptor with a wrong checksum whose commit is older ends the log', async () => {
    await using dir = await tempDir()
    const image = await prepared(dir, V3, (log, image) => {
      log.descriptor(one(image))
      log.commit()
      log.descriptor(one(image, 2))
      flip(log, 5, 900)
      log.commit({ time: 5n })
    })
    const ours = await replayed(image)
    assert.equal(firstDifference(image, ours, await replayedByE2fsck(image)), undefined)
    assert.equal(ours[0], 1)
  })

  test('a commit block with a wrong checksum is refused', async () => {
    await using dir = await tempDir()
    for (const form of [V3, { name: '', incompat: revoke, checksum: true }]) {
      const image = await prepared(dir, form, (log, image) => {
        log.descriptor(one(image))
        log.commit({ wrong: true })
      })
      await refuses(image, /wrong checksum in the commit of transaction 7/)
    }
  })

  test('a last commit block with a wrong checksum under async commit is an interrupted commit', async () => {
    await using dir = await tempDir()
    for (const form of [
      { name: '', incompat: revoke | csumV3 | asyncCommit },
      { name: '', incompat: revoke | asyncCommit, checksum: true },
    ]) {
      const image = await prepared(dir, form, (log, image) => {
        log.descriptor(one(image))
        log.commit()
        log.descriptor(one(image, 2))
        log.commit({ wrong: true })
      })
      const ours = await replayed(image)
      assert.equal(firstDifference(image, ours, await replayedByE2fsck(image)), undefined)
      assert.equal(ours[0], 1)
      await withRecovery(image.path, async (recovery) => assert.equal(recovery.transactions, 1))
    }
  })

  test('an earlier one with a later one after it is refused', async () => {
    await using dir = await tempDir()
    const image = await prepared(
      dir,
      { name: '', incompat: revoke | asyncCommit, checksum: true },
      (log, image) => {
        log.descriptor(one(image))
        log.commit({ wrong: true })
        log.descriptor(one(image, 2))
        log.commit()
      },
    )
    await refuses(image, /transaction 7 damaged/)
  })

  test('a revoke count longer than the block is refused', async () => {
    await using dir = await tempDir()
    const image = await prepared(dir, PLAIN, (log) => {
      log.revokes([1])
      new Bytes(log.blocks.get(1)!, 'big').setU32(12, 0xffffffff)
      log.commit()
    })
    await refuses(image, /revoke block/)
  })

  test('a copy of a block past the device is refused', async () => {
    await using dir = await tempDir()
    const image = await prepared(dir, V3, (log, image) => {
      log.descriptor([{ block: 8192, bytes: new Uint8Array(image.blockBytes) }])
      log.commit()
    })
    await refuses(image, /logged copy of block 8192/)
  })

  test('a log of descriptor blocks that lead around in a circle ends', async () => {
    await using dir = await tempDir()
    const image = await prepared(dir, PLAIN, (log) => {
      for (let i = 0; i < 1023; i++) log.revokes([])
    })
    await refuses(image, /leads back/)
  })

  test('a log without checksums beside metadata with them is refused', async () => {
    await using dir = await tempDir()
    const image = await makeImage(dir.file('image'), V3)
    const log = await newLog(image, PLAIN)
    log.descriptor(one(image))
    log.commit()
    await install(image, log)
    await refuses(image, /a log without checksums/)
  })

  test('the block after a damaged end of the log gives it away', async () => {
    await using dir = await tempDir()
    for (const [at, byte] of [
      [4, 0],
      [4, 11],
      [8, 0],
      [5, 9],
      [5, 3],
    ] as const) {
      const image = await prepared(dir, V3, (log, image) => {
        for (let i = 1; i < 4; i++) {
          log.descriptor(one(image, i))
          log.commit()
        }
        flip(log, at, byte)
      })
      await refuses(image, /transaction \d+/)
    }
  })

  test('impossible journal superblocks are refused', async () => {
    await using dir = await tempDir()
    const image = await prepared(dir, PLAIN, (log, image) => {
      log.descriptor(one(image))
      log.commit()
    })
    const good = await readJournalSuperblock(image)
    const cases: [number, number, RegExp][] = [
      [0x00, 0x12345678, /no journal superblock/],
      [0x04, 1, /no journal superblock/],
      [0x0c, 4096, /journal blocks of 4096/],
      [0x10, 0xffffffff, /a journal of 4294967295 blocks/],
      [0x14, 0, /starts at block 0/],
      [0x14, 5000, /starts at block 5000/],
      [0x1c, 0xffffffff, /tail is block/],
      [0x1c, 1024, /tail is block/],
      [0x28, 0x41, /unknown journal features/],
      [0x2c, 1, /unknown journal features/],
      [0x28, csumV2 | csumV3, /wrong checksum in the journal superblock/],
    ]
    const file = await open(image.path, 'r+')
    try {
      for (const [at, value, found] of cases) {
        const b = new Bytes(good.slice(), 'big')
        b.setU32(at, value)
        await file.write(b.bytes, 0, b.length, image.places[0]! * image.blockBytes)
        await refuses(image, found)
      }
    } finally {
      await file.close()
    }
  })
})

describe('fast commits', { skip: needsRoot() || needs('mke2fs', ...SCRATCH_TOOLS) }, () => {
  test('blocks of files that only fast commits know are in use', async () => {
    await using area = await scratch(1024)
    const image = area.file('image')
    const frozen = area.file('frozen')
    await writeFile(image, '')
    await truncate(image, 256 * 2 ** 20)
    await must('mke2fs', ['-q', '-F', '-t', 'ext4', '-O', 'fast_commit', image])
    {
      await using mount = await mounted(image)
      for (let i = 0; i < 40; i++) {
        // The first fsync is always a full commit, and so is one after a sync.
        const file = await open(`${mount.path}/file-${i}`, 'w')
        await file.writeFile(new Uint8Array(60_000).fill(i))
        await file.sync()
        await file.close()
      }
      await snapshot(image, frozen)
    }
    const fromBitmaps = await withRecovery(frozen, async (recovery) => {
      assert.ok(recovery.fastCommits.commits > 10, `${recovery.fastCommits.commits} fast commits`)
      return RangeSet.from(recovery.fastCommits.blocks)
    })
    await using device = await openHostFile(frozen)
    const fs = await extType.open(device, {})
    const used = await fs.used({})
    assert.equal(used.trust, 'replayed')
    assert.equal(fromBitmaps.scale(fs.blockBytes).subtract(used.ranges).toString(), '')
    // The kernel's replay puts the files where the records say.
    await using mount = await mounted(frozen)
    for (let i = 0; i < 40; i++) {
      const content = await readFile(`${mount.path}/file-${i}`)
      assert.ok(content.length === 60_000 && content.every((byte) => byte === i))
    }
  })
})
