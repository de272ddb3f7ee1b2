/** What a repository asks of a store, run over every store. */
import assert from 'node:assert/strict'
import { readdir, utimes } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { Random, tempDir } from '../../../test/kit/index.ts'
import { type BlobStore, openStore } from './blob-store.ts'

const random = new Random()

describe('folder store', () => {
  suite((path) => openStore({ kind: 'folder', path }))

  test('what writers of long ago have left under temporary names is removed, what is fresh is not', async () => {
    await using dir = await tempDir()
    const store = openStore({ kind: 'folder', path: dir.path })
    await store.create('packs/aa/old')
    const [old] = await readdir(dir.file('tmp'))
    await store.create('packs/aa/new')
    const weekAgo = Date.now() / 1000 - 8 * 24 * 3600
    await utimes(join(dir.file('tmp'), old!), weekAgo, weekAgo)
    assert.equal(await store.removeTemporary(7 * 24 * 3600 * 1000), 1)
    const left = await readdir(dir.file('tmp'))
    assert.equal(left.length, 1)
    assert.notEqual(left[0], old)
    await store.close()
  })
})

function suite(make: (path: string) => BlobStore): void {
  const withStore = (name: string, work: (store: BlobStore) => Promise<void>): void => {
    test(name, async () => {
      await using dir = await tempDir()
      const store = make(dir.path)
      try {
        await work(store)
      } finally {
        await store.close()
      }
    })
  }

  withStore('put() and read() of any range', async (store) => {
    const bytes = random.bytes(100_000)
    await store.put('a/b/c', bytes)
    assert.equal(await store.size('a/b/c'), bytes.length)
    for (let i = 0; i < 50; i++) {
      const at = random.below(bytes.length)
      const into = new Uint8Array(random.below(bytes.length - at + 1))
      await store.read('a/b/c', at, into)
      assert.deepEqual(into, bytes.subarray(at, at + into.length), `seed ${random.seed}`)
    }
    assert.deepEqual(await store.readAll('a/b/c', 100_000), bytes)
    await assert.rejects(store.readAll('a/b/c', 99_999), { code: 'LIMIT' })
  })

  withStore('what is not there is NOT_FOUND, and reading past the end is CORRUPT', async (store) => {
    await assert.rejects(store.size('x/y'), { code: 'NOT_FOUND' })
    await assert.rejects(store.read('x/y', 0, new Uint8Array(1)), { code: 'NOT_FOUND' })
    assert.equal(await store.exists('x/y'), false)
    await store.remove('x/y')
    await store.put('x/y', new Uint8Array(10))
    await assert.rejects(store.read('x/y', 5, new Uint8Array(6)), { code: 'CORRUPT' })
    assert.equal(await store.exists('x/y'), true)
  })

  withStore(
    'nothing is seen of an object before publish(), and never of one that was discarded',
    async (store) => {
      const writer = await store.create('p/one')
      await writer.write(new Uint8Array([1, 2]))
      await writer.write(new Uint8Array([3]))
      await assert.rejects(writer.publish(), /before sync/)
      await writer.sync()
      assert.equal(await store.exists('p/one'), false)
      assert.deepEqual(await store.list('p/'), [])
      await writer.publish()
      await writer.discard()
      assert.deepEqual(await store.readAll('p/one', 10), new Uint8Array([1, 2, 3]))
      const dropped = await store.create('p/two')
      await dropped.write(new Uint8Array(5))
      await dropped.discard()
      await dropped.discard()
      assert.deepEqual(await store.list('p/'), ['p/one'])
    },
  )

  withStore('list() gives names of any depth, sorted, below a prefix', async (store) => {
    for (const name of ['q/b/2', 'q/b/1', 'q/a', 'r/z']) await store.put(name, new Uint8Array(1))
    assert.deepEqual(await store.list('q/'), ['q/a', 'q/b/1', 'q/b/2'])
    assert.deepEqual(await store.list('nowhere/'), [])
    await store.remove('q/b/1')
    assert.deepEqual(await store.list('q/'), ['q/a', 'q/b/2'])
  })

  withStore('hundreds of objects are read at the same time', async (store) => {
    const names = Array.from({ length: 200 }, (_, i) => `s/${i}`)
    for (const [i, name] of names.entries()) await store.put(name, new Uint8Array(100).fill(i))
    await Promise.all(
      [...names, ...names].map(async (name) => {
        const into = new Uint8Array(100)
        await store.read(name, 0, into)
        assert.equal(into[99], Number(name.slice(2)) % 256)
      }),
    )
  })
}
