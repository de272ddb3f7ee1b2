import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, tempDir } from '../../test/kit/index.ts'
import { silentLog } from '../base/index.ts'
import { ChunkIndex } from './chunk-index.ts'

const random = new Random()
const name = (): string => Buffer.from(random.bytes(16)).toString('hex')

test('find() gives the pack that an id was added with last, and nothing after forget()', async () => {
  await using dir = await tempDir()
  const index = ChunkIndex.open(dir.file('i/chunks.sqlite'), 'repo', silentLog)
  const [one, two, pages] = [name(), name(), name()]
  const ids = Array.from({ length: 100 }, () => random.bytes(32))
  const page = random.bytes(32)
  index.add({ kind: 'data', name: one }, ids)
  index.add({ kind: 'metadata', name: pages }, [page])
  assert.deepEqual(index.find(ids[7]!), { kind: 'data', pack: one })
  assert.deepEqual(index.find(page), { kind: 'metadata', pack: pages })
  assert.equal(index.find(random.bytes(32)), undefined)
  index.add({ kind: 'data', name: two }, ids.slice(0, 10))
  assert.equal(index.find(ids[7]!)?.pack, two)
  index.forget(two)
  assert.equal(index.find(ids[7]!), undefined)
  assert.equal(index.find(ids[11]!)?.pack, one)
  index.close()
})

test('an index that was not filled to its end says so to whoever opens it next', async () => {
  await using dir = await tempDir()
  const path = dir.file('i/chunks.sqlite')
  const open = (): ChunkIndex => ChunkIndex.open(path, 'repo', silentLog)
  const steps: [(index: ChunkIndex) => void, boolean][] = [
    [(index) => index.add({ kind: 'data', name: name() }, [random.bytes(32)]), false],
    [(index) => index.markComplete(), true],
    [(index) => index.clear(), false],
  ]
  for (const [step, isComplete] of steps) {
    const index = open()
    step(index)
    index.close()
    const again = open()
    assert.equal(again.isComplete, isComplete)
    again.close()
  }
})

test('two writers add at the same time without losing a row', async () => {
  await using dir = await tempDir()
  const path = dir.file('i/chunks.sqlite')
  const [a, b] = [ChunkIndex.open(path, 'repo', silentLog), ChunkIndex.open(path, 'repo', silentLog)]
  const ids = Array.from({ length: 400 }, () => random.bytes(32))
  for (let i = 0; i < 200; i += 10) {
    a.add({ kind: 'data', name: name() }, ids.slice(i, i + 10))
    b.add({ kind: 'data', name: name() }, ids.slice(200 + i, 210 + i))
  }
  for (const id of ids) assert.ok(a.find(id) && b.find(id))
  a.close()
  b.close()
})
