import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { access, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, run, tempDir } from '../../../test/kit/index.ts'
import { isVarveError } from '../../base/index.ts'
import { lockFile, lockImage } from './locks.ts'
import { openHostFile } from './open-host-file.ts'
import { forceSystemCalls, systemCalls } from './system-calls.ts'

const locked = (error: unknown): boolean => isVarveError(error, 'LOCKED')
const real = systemCalls()
const noCalls = real ? false : 'needs the system calls of Linux'

/** A child that has locked `path` and waits. */
async function holder(path: string): Promise<ChildProcess> {
  const script = `
    const { lockFile } = await import('${new URL('./locks.ts', import.meta.url).href}')
    await lockFile(process.argv[1], 'exclusive')
    process.stdout.write('locked')
    setInterval(() => {}, 1000)`
  const child = spawn(process.execPath, ['--input-type=module', '-e', script, path], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  await once(child.stdout, 'data')
  return child
}

describe('lockFile()', () => {
  for (const [what, calls] of [
    ['with the locks of the host', real],
    ['on the plain path', undefined],
  ] as const) {
    test(`one exclusive holder, ${what}`, async () => {
      await using dir = await tempDir()
      using _ = forceSystemCalls(calls)
      const path = dir.file('lock')
      {
        await using first = await lockFile(path, 'exclusive')
        assert.deepEqual([first.path, first.type], [path, 'exclusive'])
        await assert.rejects(lockFile(path, 'exclusive'), locked)
        await assert.rejects(lockFile(path, 'shared'), locked)
        await first[Symbol.asyncDispose]()
        await using second = await lockFile(path, 'exclusive')
        await first[Symbol.asyncDispose]() // does not take away the second's
        await assert.rejects(lockFile(path, 'shared'), locked)
        assert.equal(second.type, 'exclusive')
      }
      await using third = await lockFile(path, 'shared')
      assert.equal(third.type, 'shared')
    })

    test(`waits as long as it was told, ${what}`, async () => {
      await using dir = await tempDir()
      using _ = forceSystemCalls(calls)
      const first = await lockFile(dir.file('lock'), 'exclusive')
      const started = performance.now()
      await assert.rejects(lockFile(dir.file('lock'), 'exclusive', { waitMs: 60 }), locked)
      assert.ok(performance.now() - started >= 55)
      setTimeout(() => void first[Symbol.asyncDispose](), 30)
      await using second = await lockFile(dir.file('lock'), 'exclusive', { waitMs: 10_000 })
      assert.equal(second.type, 'exclusive')
      const waiting = lockFile(dir.file('lock'), 'shared', {
        waitMs: 10_000,
        signal: AbortSignal.timeout(20),
      })
      await assert.rejects(waiting, (error) => isVarveError(error, 'CANCELLED'))
    })
  }

  test('any number of shared holders keep an exclusive one out', { skip: noCalls }, async () => {
    await using dir = await tempDir()
    await using first = await lockFile(dir.file('lock'), 'shared')
    {
      await using second = await lockFile(dir.file('lock'), 'shared')
      assert.equal(second.type, first.type)
    }
    await assert.rejects(lockFile(dir.file('lock'), 'exclusive'), locked)
  })

  test('ends with the process that holds it, however that ends', { skip: noCalls }, async () => {
    await using dir = await tempDir()
    const child = await holder(dir.file('lock'))
    try {
      await assert.rejects(lockFile(dir.file('lock'), 'exclusive'), locked)
    } finally {
      child.kill('SIGKILL')
    }
    await once(child, 'exit')
    await using lock = await lockFile(dir.file('lock'), 'exclusive')
    assert.equal(lock.type, 'exclusive')
  })

  test('the plain path names the holder and the file to remove, and leaves nothing behind', async () => {
    await using dir = await tempDir()
    using _ = forceSystemCalls(undefined)
    {
      await using first = await lockFile(dir.file('lock'), 'exclusive')
      assert.ok(first)
      await assert.rejects(
        lockFile(dir.file('lock'), 'exclusive'),
        (error) =>
          isVarveError(error, 'LOCKED') &&
          error.message.includes(`process ${process.pid}`) &&
          error.hint.includes(dir.file('lock.held')),
      )
    }
    await assert.rejects(access(dir.file('lock.held')))
  })

  test('a folder that is not there is NOT_FOUND', async () => {
    await using dir = await tempDir()
    for (const calls of [real, undefined]) {
      using _ = forceSystemCalls(calls)
      await assert.rejects(lockFile(dir.file('no/lock'), 'exclusive'), (error) =>
        isVarveError(error, 'NOT_FOUND'),
      )
    }
  })
})

describe('lockImage()', { skip: noCalls }, () => {
  test('a writer excludes all, readers exclude writers', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('disk'), 'x')
    await using a = await openHostFile(dir.file('disk'), { write: true })
    await using b = await openHostFile(dir.file('disk'), { write: true })
    await using reader = await openHostFile(dir.file('disk'))
    {
      using first = lockImage(a, { write: true })
      assert.equal(first.enforced, true)
      assert.throws(() => lockImage(b, { write: true }), locked)
      assert.throws(() => lockImage(reader, { write: false }), locked)
    }
    {
      using _ = lockImage(reader, { write: false })
      using again = lockImage(b, { write: false })
      assert.equal(again.enforced, true)
      assert.throws(() => lockImage(a, { write: true }), locked)
    }
    using last = lockImage(a, { write: true })
    assert.equal(last.enforced, true)
  })

  test('ends with the device, and disposing of it later touches no other file', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('disk'), 'x')
    const a = await openHostFile(dir.file('disk'), { write: true })
    const lock = lockImage(a, { write: true })
    await a[Symbol.asyncDispose]()
    await using b = await openHostFile(dir.file('disk'), { write: true }) // has the descriptor that a had
    using held = lockImage(b, { write: true })
    lock[Symbol.dispose]()
    await using c = await openHostFile(dir.file('disk'), { write: true })
    assert.throws(() => lockImage(c, { write: true }), locked)
    assert.equal(held.enforced, true)
  })

  test('QEMU and we keep each other out', { skip: needs('qemu-img', 'qemu-io') }, async () => {
    await using dir = await tempDir()
    const path = dir.file('disk.qcow2')
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', path, '1M'])
    await using device = await openHostFile(path, { write: true })
    {
      using _ = lockImage(device, { write: true })
      const writes = await run('qemu-io', ['-f', 'qcow2', '-c', 'write 0 512', path])
      assert.notEqual(writes.code, 0)
      assert.match(writes.stderr + writes.stdout.toString(), /lock/)
      assert.match((await run('qemu-img', ['check', path])).stderr, /lock/)
    }
    {
      using _ = lockImage(device, { write: false })
      assert.match((await run('qemu-io', ['-f', 'qcow2', '-c', 'write 0 512', path])).stderr, /lock/)
      await must('qemu-img', ['check', '-q', path])
    }
    await must('qemu-io', ['-f', 'qcow2', '-c', 'write 0 512', path])

    // A running program of theirs: qemu-io waits for commands on its standard input.
    const child = spawn('qemu-io', ['-f', 'qcow2', path], { stdio: ['pipe', 'pipe', 'inherit'] })
    try {
      child.stdin.write('write 0 512\n')
      await once(child.stdout, 'data')
      assert.throws(() => lockImage(device, { write: true }), locked)
      assert.throws(() => lockImage(device, { write: false }), locked)
    } finally {
      child.stdin.end('quit\n')
      await once(child, 'exit')
    }
    using free = lockImage(device, { write: true })
    assert.equal(free.enforced, true)
  })

  test('says so where nothing is enforced', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('disk'), 'x')
    await using device = await openHostFile(dir.file('disk'), { write: true })
    using _ = forceSystemCalls(undefined)
    using lock = lockImage(device, { write: true })
    assert.equal(lock.enforced, false)
  })
})
