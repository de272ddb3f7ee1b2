/** varve bitmap as a process, on files and processes of real QEMU in every state that a bitmap can be in. */
import assert from 'node:assert/strict'
import { copyFile, open, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { factsOfFile, judge } from '../../src/changes/index.ts'
import { openHostFile } from '../../src/device/index.ts'
import { readBitmapBits, readBitmaps } from '../../src/formats/index.ts'
import { must, needs, Random, run, tempDir } from '../kit/index.ts'
import { QEMU, Qemu } from './qemu.ts'
import { fails, ok, okJson, varve } from './varve.ts'

const MIB = 1024 * 1024

interface ImageDocument {
  path?: string
  node?: string
  present: boolean
  recording: boolean
  inconsistent: boolean
  persistent: boolean
  busy: boolean
  granularity: number | null
  dirtyBytes: number | null
}

interface VerdictDocument {
  bitmap: string
  valid: boolean
  images: ImageDocument[]
  reasons: { code: string; severity: string; image: string; text: string; whatToDo: string }[]
}

interface PlanDocument {
  actions: { type: string; data: Record<string, unknown> }[]
  reopenReadWrite: string[]
  leftOut: { bitmap: string; reasons: { code: string }[] }[]
}

/** The verdict whatever the exit code, which must agree with it. */
async function check(args: readonly string[]): Promise<VerdictDocument> {
  const { code, stdout, stderr } = await varve(['bitmap', 'check', ...args, '--json'])
  const verdict = JSON.parse(stdout) as VerdictDocument
  assert.equal(code, verdict.valid ? 0 : 12, stderr)
  return verdict
}

const codes = (verdict: VerdictDocument): string[] => verdict.reasons.map(({ code }) => code)

async function create(path: string, bytes: number, backing?: string): Promise<void> {
  await must('qemu-img', [
    'create',
    '-q',
    '-f',
    'qcow2',
    ...(backing ? ['-b', backing, '-F', 'qcow2'] : []),
    path,
    String(bytes),
  ])
}

const addBitmap = (path: string, name: string, granularity = 65_536): Promise<string> =>
  must('qemu-img', ['bitmap', '--add', '-g', String(granularity), path, name])

const write = (path: string, command: string): Promise<string> =>
  must('qemu-io', ['-f', 'qcow2', '-c', command, path])

/** Header extension 0x23852875, found by a walk of its own: where the directory stands. */
async function directoryOf(path: string): Promise<{ offset: number; at: number }> {
  await using file = await openHostFile(path)
  const head = Buffer.alloc(4096)
  await file.read(0, head)
  for (
    let at = head.readUInt32BE(100);
    head.readUInt32BE(at) !== 0;
    at += 8 + Math.ceil(head.readUInt32BE(at + 4) / 8) * 8
  ) {
    if (head.readUInt32BE(at) === 0x23852875) return { offset: Number(head.readBigUInt64BE(at + 24)), at }
  }
  throw new Error(`${path} has no bitmaps extension`)
}

async function patch(path: string, offset: number, bytes: readonly number[]): Promise<void> {
  const file = await open(path, 'r+')
  try {
    await file.write(Uint8Array.from(bytes), 0, bytes.length, offset)
  } finally {
    await file.close()
  }
}

describe('varve bitmap check on files', { skip: needs('qemu-img', 'qemu-io') }, () => {
  test('a clean chain is valid, with the bytes that QEMU counts', async () => {
    await using dir = await tempDir()
    const [base, top] = [dir.file('base.qcow2'), dir.file('top.qcow2')]
    await create(base, 16 * MIB)
    await addBitmap(base, 'b')
    await write(base, 'write -P 1 1M 200k')
    await create(top, 16 * MIB, base)
    await addBitmap(top, 'b')
    await write(top, 'write -z 5M 1k')
    const verdict = await check([top, 'b'])
    const common = {
      present: true,
      recording: true,
      inconsistent: false,
      persistent: true,
      busy: false,
      granularity: 65_536,
    }
    assert.deepEqual(verdict, {
      bitmap: 'b',
      valid: true,
      images: [
        { path: top, ...common, dirtyBytes: 65_536 },
        { path: base, ...common, dirtyBytes: 4 * 65_536 },
      ],
      reasons: [],
    })
    assert.deepEqual(await okJson(['bitmap', 'check', top]), [verdict])
    assert.match(await ok(['bitmap', 'check', top]), /b +yes +2 of 2 +≤ 320 KiB/)
    assert.match(await ok(['bitmap', 'list', top]), /b +64 KiB +64 KiB +recording/)
  })

  test('every reason, each in its image', async () => {
    await using dir = await tempDir()
    const [base, mid, top] = ['base', 'mid', 'top'].map((name) => dir.file(`${name}.qcow2`)) as [
      string,
      string,
      string,
    ]
    await create(base, 16 * MIB)
    for (const name of ['deep', 'gap', 'off', 'crash', 'coarse']) await addBitmap(base, name)
    await create(mid, 16 * MIB, base)
    for (const name of ['deep', 'off', 'coarse']) await addBitmap(mid, name)
    await must('qemu-img', ['bitmap', '--disable', mid, 'off'])
    await create(top, 32 * MIB, mid)
    for (const name of ['gap', 'off', 'crash']) await addBitmap(top, name)
    await addBitmap(top, 'coarse', 131_072)
    assert.equal((await run('qemu-io', ['-f', 'qcow2', '-c', 'abort', base])).code, -1)
    const all = new Map<string, string[]>()
    const { code, stdout } = await varve(['bitmap', 'check', top, '--json'])
    assert.equal(code, 12)
    for (const { bitmap, reasons } of JSON.parse(stdout) as VerdictDocument[]) {
      all.set(
        bitmap,
        reasons.map((reason) => `${reason.code} ${reason.image.replace(/.*\/|\.qcow2/g, '')}`),
      )
    }
    assert.deepEqual(Object.fromEntries(all), {
      gap: ['gap mid', 'inconsistent base', 'size-differs base'],
      off: ['disabled mid', 'size-differs mid', 'inconsistent base', 'size-differs base'],
      crash: ['gap mid', 'inconsistent base', 'size-differs base'],
      coarse: [
        'granularity-differs mid',
        'size-differs mid',
        'inconsistent base',
        'granularity-differs base',
        'size-differs base',
      ],
      deep: ['missing-in-top top', 'size-differs mid', 'inconsistent base', 'size-differs base'],
    })
    assert.deepEqual(codes(await check([top, 'nope'])), ['missing-in-top'])
    const text = await varve(['bitmap', 'check', top, 'off'])
    assert.equal(text.code, 12)
    assert.match(text.stdout, /✗ off: not valid[\s\S]*disabled {2}.*mid\.qcow2: bitmap 'off' is disabled/)
    assert.match(text.stderr, /^varve: CORRUPT: Cannot trust bitmap 'off': found disabled \(/)
  })

  test('warnings alone leave a bitmap valid', async () => {
    await using dir = await tempDir()
    const [base, top] = [dir.file('base.qcow2'), dir.file('top.qcow2')]
    await create(base, 16 * MIB)
    await addBitmap(base, 'b')
    await create(top, 32 * MIB, base)
    await addBitmap(top, 'b', 4096)
    const verdict = await check([top, 'b'])
    assert.equal(verdict.valid, true)
    assert.deepEqual(
      verdict.reasons.map(({ code, severity }) => `${severity} ${code}`),
      ['warning granularity-differs', 'warning size-differs'],
    )
  })

  test('a program without bitmaps wrote to the image: void, as QEMU says', async () => {
    await using dir = await tempDir()
    const image = dir.file('i.qcow2')
    await create(image, 16 * MIB)
    await addBitmap(image, 'b')
    await patch(image, 95, [0])
    const info = await run('qemu-img', ['info', image])
    assert.match(info.stderr + info.stdout.toString(), /all bitmaps are now considered inconsistent/)
    const verdict = await check([image, 'b'])
    assert.deepEqual(codes(verdict), ['autoclear-cleared'])
    assert.equal(verdict.images[0]!.inconsistent, true)
    assert.deepEqual(codes(await check([image, 'other'])), ['missing-in-top'])
  })

  test('malformed entries are findings; QEMU opens none of these images', async () => {
    await using dir = await tempDir()
    const good = dir.file('good.qcow2')
    await create(good, 64 * MIB)
    await addBitmap(good, 'b0')
    await addBitmap(good, 'b1')
    const { at, offset } = await directoryOf(good)
    await patch(good, offset + 32 + 17, [8])
    await fails(['bitmap', 'list', good], { code: 'CORRUPT', exit: 12 }, { json: false })
    assert.equal((await varve(['bitmap', 'check', good])).code, 12)
    await patch(good, offset + 32 + 17, [16])
    // Each makes the second entry (32 bytes a piece: 24 + a name of 2, padded) or the directory malformed.
    const second = offset + 32
    const cases: Readonly<Record<string, [number, number[], string]>> = {
      'flag 2': [second + 15, [2 | 4], 'unreadable-entry'],
      'flag 3': [second + 15, [2 | 8], 'unreadable-entry'],
      'type 2': [second + 16, [2], 'unreadable-entry'],
      'granularity 2^8': [second + 17, [8], 'unreadable-entry'],
      'granularity 2^32': [second + 17, [32], 'unreadable-entry'],
      'no table entries': [second + 8, [0, 0, 0, 0], 'unreadable-entry'],
      'too many table entries': [second + 8, [0, 0, 0, 9], 'unreadable-entry'],
      'absurdly many table entries': [second + 8, [0xff, 0xff, 0xff, 0xff], 'unreadable-entry'],
      'table not aligned': [second + 7, [1], 'unreadable-entry'],
      'extra data': [second + 18, [0, 2, 0, 0, 0, 4, 1, 2, 3, 4, 98, 49], 'unreadable-entry'],
      'no name': [second + 18, [0, 0], 'unreadable-directory'],
      'name twice': [second + 25, [48], 'unreadable-entry'],
      'name over the end': [second + 18, [0xff, 0xff], 'unreadable-directory'],
      'extra data over the end': [second + 20, [0xff, 0xff, 0xff, 0xff], 'unreadable-directory'],
      'no bitmaps': [at + 8, [0, 0, 0, 0], 'unreadable-directory'],
      'more bitmaps than entries': [at + 8, [0, 0, 0, 3], 'unreadable-directory'],
      'fewer bitmaps than entries': [at + 8, [0, 0, 0, 1], 'unreadable-directory'],
      'directory behind the end': [at + 24, [0, 0, 1, 0, 0, 0, 0, 0], 'unreadable-directory'],
      'directory of a TiB': [at + 16, [0, 0, 1, 0, 0, 0, 0, 0], 'unreadable-directory'],
    }
    for (const [name, [place, bytes, expected]] of Object.entries(cases)) {
      const image = dir.file('bad.qcow2')
      await copyFile(good, image)
      await patch(image, place, bytes)
      assert.equal((await run('qemu-img', ['info', image])).code, 1, `${name}: QEMU refuses the image`)
      const verdict = await check([image, 'b1'])
      assert.ok(codes(verdict).includes(expected), `${name}: ${JSON.stringify(verdict.reasons)}`)
      await using file = await openHostFile(image)
      const facts = await factsOfFile({ path: image, format: 'qcow2', virtualSize: 64 * MIB, file })
      const sound = judge('b0', [facts])
      assert.equal(sound.valid, false, name)
      assert.ok(
        sound.reasons.some(({ code }) => code === expected),
        name,
      )
    }
  })

  test('a table or data behind the end of the file: QEMU opens it and reads zeros, we do not', async () => {
    await using dir = await tempDir()
    const good = dir.file('good.qcow2')
    await create(good, 64 * MIB)
    await addBitmap(good, 'b0')
    await write(good, 'write 0 1M')
    const { offset } = await directoryOf(good)
    const table = Buffer.alloc(8)
    {
      await using file = await openHostFile(good)
      await file.read(offset, table)
    }
    const at = Number(table.readBigUInt64BE())
    const cases: [number, number[]][] = [
      [offset, [0, 0, 0, 0x7f, 0, 0, 0, 0]],
      [at, [0, 0, 0, 0x7f, 0, 0, 0, 0]],
      [at, [0x80]],
      [at + 7, [2]],
    ]
    for (const [place, bytes] of cases) {
      const image = dir.file('bad.qcow2')
      await copyFile(good, image)
      await patch(image, place, bytes)
      const verdict = await check([image, 'b0'])
      assert.deepEqual(codes(verdict), ['unreadable-data'], `${place}: ${bytes.join()}`)
      assert.equal(verdict.images[0]!.dirtyBytes, null)
    }
    const { dirtyBytes } = (await check([good, 'b0'])).images[0]!
    assert.equal(dirtyBytes, MIB)
  })

  test('wrong usage is refused', async () => {
    const usage = { code: 'USAGE', exit: 2 }
    await fails(['bitmap', 'check'], usage)
    await fails(['bitmap', 'check', 'a', 'b', 'c'], usage)
    await fails(['bitmap', 'check', 'a', '--top', 'n'], usage)
    await fails(['bitmap', 'plan', 'delete', 'b'], usage)
    await fails(['bitmap'], usage, { json: false })
    await fails(['bitmap', 'plan', 'nothing'], usage, { json: false })
    await using dir = await tempDir()
    await writeFile(dir.file('n.json'), '[]')
    await writeFile(dir.file('bad.json'), '[')
    const nodes = ['--nodes', dir.file('n.json')]
    await fails(['bitmap', 'check', ...nodes], usage)
    await fails(['bitmap', 'check', 'image', 'name', ...nodes, '--top', 'a'], usage)
    await fails(['bitmap', 'check', 'b', ...nodes, '--chain', 'a,,b'], usage)
    await fails(['bitmap', 'check', 'b', ...nodes, '--chain', 'a,b', '--top', 'b'], usage)
    await fails(['bitmap', 'check', 'b', ...nodes, '--qmp', 'x', '--top', 'b'], usage)
    await fails(['bitmap', 'check', 'b', '--nodes', dir.file('none'), '--top', 'b'], {
      code: 'NOT_FOUND',
      exit: 10,
    })
    await fails(['bitmap', 'check', 'b', '--qmp', dir.file('none'), '--top', 'b'], {
      code: 'NOT_FOUND',
      exit: 10,
    })
    await fails(['bitmap', 'check', 'b', '--nodes', dir.file('bad.json'), '--top', 'b'], {
      code: 'CORRUPT',
      exit: 12,
    })
    await fails(['bitmap', 'plan', 'delete', 'b', ...nodes, '--top', 'a'], { code: 'NOT_FOUND', exit: 10 })
    assert.deepEqual(codes(await check(['b', ...nodes, '--top', 'a'])), ['missing-in-top'])
    assert.deepEqual(codes(await check(['b', ...nodes, '--chain', 'a,c', '--top', 'a'])), ['missing-in-top'])
  })
})

describe('varve bitmap with a running QEMU', { skip: needs('qemu-img', 'qemu-io', QEMU) }, () => {
  const live = (qemu: Qemu, top: string): string[] => ['--qmp', qemu.socket, '--top', top]

  test('what the file says is not believed while QEMU has it; QEMU itself is asked', async () => {
    await using dir = await tempDir()
    const image = dir.file('i.qcow2')
    await create(image, 16 * MIB)
    await addBitmap(image, 'stored')
    await using qemu = await Qemu.start(dir.path)
    await qemu.open('disk', image)
    await qemu.run('block-dirty-bitmap-add', { node: 'disk', name: 'live', persistent: true })
    await qemu.run('block-dirty-bitmap-add', { node: 'disk', name: 'transient' })
    await qemu.run('block-dirty-bitmap-add', { node: 'disk', name: 'off', persistent: true, disabled: true })
    await qemu.io('disk', 'write 3M 100k')
    for (const name of ['stored', 'live', 'nope'])
      assert.deepEqual(codes(await check([image, name])), ['open-by-writer'])
    assert.match((await varve(['bitmap', 'list', image])).stdout, /stored.*open by a writer/)
    const nothing = dir.file('none.qcow2')
    await create(nothing, MIB)
    await qemu.open('empty', nothing)
    assert.equal((await varve(['bitmap', 'check', nothing])).code, 12, 'nobody knows what QEMU has in memory')

    const stored = await check(['stored', ...live(qemu, 'disk')])
    assert.deepEqual(stored.images, [
      {
        node: 'disk',
        present: true,
        recording: true,
        inconsistent: false,
        persistent: true,
        busy: false,
        granularity: 65_536,
        dirtyBytes: 131_072,
      },
    ])
    assert.deepEqual(codes(await check(['live', ...live(qemu, 'disk')])), [])
    assert.deepEqual(codes(await check(['transient', ...live(qemu, 'disk')])), ['transient'])
    assert.deepEqual(codes(await check(['off', ...live(qemu, 'disk')])), ['disabled'])
    assert.deepEqual(codes(await check(['nope', ...live(qemu, 'disk')])), ['missing-in-top'])

    await qemu.kill()
    // Stored before: broken. Never stored: not there. And so does QEMU see it.
    assert.deepEqual(codes(await check([image, 'stored'])), ['inconsistent'])
    assert.deepEqual(codes(await check([image, 'live'])), ['missing-in-top'])
    await using again = await Qemu.start(dir.path)
    await again.open('disk', image, { readOnly: true })
    assert.deepEqual(
      codes(await check([image, 'stored'])),
      ['inconsistent'],
      'a reader does not make it less broken',
    )
    const verdict = await check(['stored', ...live(again, 'disk')])
    assert.deepEqual(codes(verdict), ['inconsistent'])
    assert.equal(verdict.images[0]!.recording, false)
    assert.deepEqual(codes(await check(['live', ...live(again, 'disk')])), ['missing-in-top'])
  })

  test('plans run on QEMU: the merged bitmap is, bit for bit, what was written', async () => {
    const random = new Random()
    await using dir = await tempDir()
    const size = 16 * MIB
    const granule = 65_536
    const truth = new Map<string, Set<number>>()
    await using qemu = await Qemu.start(dir.path)
    const recording = new Set<string>()
    const writeSome = async (node: string): Promise<void> => {
      for (let i = 0; i < 8; i++) {
        const offset = random.below(size / 512) * 512
        const length = Math.min(size - offset, (1 + random.below(300)) * 512)
        await qemu.io(node, `${random.pick(['write -P 7', 'write -z', 'write -z -u'])} ${offset} ${length}`)
        for (const name of recording) {
          for (let at = Math.floor(offset / granule); at * granule < offset + length; at++)
            truth.get(name)!.add(at)
        }
      }
    }
    const start = async (node: string, name: string): Promise<void> => {
      await qemu.run('block-dirty-bitmap-add', { node, name, persistent: true, granularity: granule })
      truth.set(name, new Set())
      recording.add(name)
    }
    // Overlays as libvirt makes them: in one transaction with the bitmaps that go along.
    await create(dir.file('0.qcow2'), size)
    await qemu.open('n0', dir.file('0.qcow2'))
    await start('n0', 'c0')
    await writeSome('n0')
    for (let depth = 1; depth < 4; depth++) {
      const [over, under] = [`n${depth}`, `n${depth - 1}`]
      await create(dir.file(`${depth}.qcow2`), size)
      await qemu.open(over, dir.file(`${depth}.qcow2`), { backing: null })
      await qemu.run('transaction', {
        actions: [
          { type: 'blockdev-snapshot', data: { node: under, overlay: over } },
          ...[...recording].map((name) => ({
            type: 'block-dirty-bitmap-add',
            data: { node: over, name, persistent: true, granularity: granule },
          })),
        ],
      })
      await start(over, `c${depth}`)
      await writeSome(over)
    }
    const top = 'n3'
    const what = `seed ${random.seed}`
    const bitmaps = await okJson<VerdictDocument[]>(['bitmap', 'check', ...live(qemu, top)])
    assert.deepEqual(
      bitmaps.map(({ bitmap, images, valid }) => `${bitmap} ${valid} ${images.length}`).sort(),
      [...truth.keys()].sort().map((name) => `${name} true 4`),
      what,
    )

    // Backup: into a temporary bitmap, kept in a file of its own so that its bits can be read.
    const scratch = dir.file('scratch.qcow2')
    await create(scratch, size)
    await qemu.open('scratch', scratch, { backing: null })
    for (const name of truth.keys()) {
      const args = ['--incremental', name, '--target-node', 'scratch', '--target-bitmap', `backup-${name}`]
      const plan = await okJson<PlanDocument>(['bitmap', 'plan', 'backup', ...args, ...live(qemu, top)])
      await qemu.run('transaction', { actions: plan.actions })
      await qemu.run('block-dirty-bitmap-add', {
        node: 'scratch',
        name,
        persistent: true,
        granularity: granule,
      })
      await qemu.run('block-dirty-bitmap-merge', {
        node: 'scratch',
        target: name,
        bitmaps: [`backup-${name}`],
      })
    }

    // An inner commit: n2 into n0, bitmaps carried over as planned.
    const commit = await okJson<PlanDocument>([
      'bitmap',
      'plan',
      'commit',
      '--top-node',
      'n2',
      '--base-node',
      'n0',
      ...live(qemu, top),
    ])
    assert.deepEqual(commit.reopenReadWrite, ['n0'])
    await qemu.run('block-commit', {
      'job-id': 'commit',
      device: top,
      'top-node': 'n2',
      'base-node': 'n0',
      'auto-finalize': true,
    })
    for (;;) {
      const jobs = await qemu.run<{ id: string }[]>('query-jobs')
      if (jobs.length === 0) break
    }
    // The nodes in between have left the chain but are still there to be merged from.
    await qemu.reopenForWriting(commit.reopenReadWrite)
    await qemu.run('transaction', { actions: commit.actions })
    const after = await okJson<VerdictDocument[]>(['bitmap', 'check', ...live(qemu, top)])
    assert.deepEqual(
      after.map(({ images, valid }) => `${valid} ${images.map(({ node }) => node).join()}`),
      Array(4).fill('true n3,n0'),
      what,
    )

    // And a full pull of what is left into the top.
    const pull = await okJson<PlanDocument>(['bitmap', 'plan', 'pull', ...live(qemu, top)])
    await qemu.run('transaction', { actions: pull.actions })

    // Deleting one from all images.
    const plan = await okJson<PlanDocument>(['bitmap', 'plan', 'delete', 'c1', ...live(qemu, top)])
    assert.deepEqual(plan.reopenReadWrite, ['n0'])
    await qemu.run('transaction', { actions: plan.actions })
    await fails(['bitmap', 'plan', 'delete', 'c1', ...live(qemu, top)], { code: 'NOT_FOUND', exit: 10 })
    await qemu.quit()

    for (const [path, names] of [
      [scratch, ['c0', 'c1', 'c2', 'c3']],
      [dir.file('3.qcow2'), ['c0', 'c2', 'c3']],
    ] as const) {
      await using file = await openHostFile(path)
      const stored = await readBitmaps(file)
      assert.deepEqual(stored.bitmaps.map(({ name }) => name).sort(), [...names])
      for (const bitmap of stored.bitmaps) {
        const bits = await readBitmapBits(file, stored.header, bitmap)
        const found = Array.from({ length: bits.length }, (_, bit) => bit).filter((bit) => bits.get(bit))
        assert.deepEqual(
          found,
          [...truth.get(bitmap.name)!].sort((a, b) => a - b),
          `${path} ${bitmap.name}, ${what}`,
        )
      }
    }
  })

  test('saved reports: invalid bitmaps are left out of a plan, and said', async () => {
    await using dir = await tempDir()
    const image = dir.file('i.qcow2')
    await create(image, MIB)
    await using qemu = await Qemu.start(dir.path)
    await qemu.open('disk', image)
    await qemu.run('block-dirty-bitmap-add', { node: 'disk', name: 'good', persistent: true })
    await qemu.run('block-dirty-bitmap-add', { node: 'disk', name: 'bad' })
    const report = dir.file('nodes.json')
    await writeFile(report, JSON.stringify({ return: await qemu.run('query-named-block-nodes') }))
    await qemu.quit()
    const from = ['--nodes', report, '--top', 'disk']
    const copy = await varve([
      'bitmap',
      'plan',
      'copy',
      '--mirror-node',
      'm',
      '--activewrite-name',
      'w',
      ...from,
      '--json',
    ])
    assert.equal(copy.code, 0)
    assert.match(copy.stderr, /^left out: bad: transient \(disk\)$/m)
    assert.deepEqual(JSON.parse(copy.stdout) as PlanDocument, {
      actions: [
        {
          type: 'block-dirty-bitmap-add',
          data: { node: 'm', name: 'good', persistent: true, disabled: false, granularity: 65_536 },
        },
        {
          type: 'block-dirty-bitmap-merge',
          data: {
            node: 'm',
            target: 'good',
            bitmaps: [
              { node: 'disk', name: 'good' },
              { node: 'm', name: 'w' },
            ],
          },
        },
        { type: 'block-dirty-bitmap-remove', data: { node: 'm', name: 'w' } },
      ],
      reopenReadWrite: [],
      leftOut: [{ bitmap: 'bad', valid: false, reasons: JSON.parse(copy.stdout).leftOut[0].reasons }],
    })
    const backup = ['--incremental', 'bad', '--target-node', 's', '--target-bitmap', 't']
    const refused = await varve(['bitmap', 'plan', 'backup', ...backup, ...from, '--json'])
    assert.equal(refused.code, 12)
    const plan = JSON.parse(refused.stdout) as PlanDocument
    assert.deepEqual([plan.actions, plan.leftOut[0]!.reasons.map(({ code }) => code)], [[], ['transient']])
    assert.match(await ok(['bitmap', 'plan', 'delete', 'good', ...from]), /^remove {2}disk\/good$/m)
  })
})
