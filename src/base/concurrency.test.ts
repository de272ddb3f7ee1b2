import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { mapBounded } from './concurrency.ts'
import { isVarveError } from './errors.ts'

describe('mapBounded()', () => {
  test('keeps the order of the items, whatever order they end in', async () => {
    const found = await mapBounded([5, 1, 3, 0, 2], 3, async (item, index) => {
      await sleep(item * 2)
      return `${index}:${item}`
    })
    assert.deepEqual(found, ['0:5', '1:1', '2:3', '3:0', '4:2'])
  })

  test('has `width` under way and never more', async () => {
    let now = 0
    let most = 0
    await mapBounded(Array.from({ length: 50 }), 4, async () => {
      most = Math.max(most, ++now)
      await sleep(1)
      now--
    })
    assert.equal(most, 4)
  })

  test('takes no more items than it starts', async () => {
    let taken = 0
    function* endless(): Generator<number> {
      for (;;) yield taken++
    }
    const failed = mapBounded(endless(), 3, async (item) => {
      await sleep(1)
      if (item === 10) throw new Error('enough')
    })
    await assert.rejects(failed, /enough/)
    assert.ok(taken <= 14, `took ${taken}`)
  })

  test('rejects with the first failure after all that was started has ended', async () => {
    let underWay = 0
    const started: number[] = []
    const run = mapBounded([1, 2, 3, 4, 5, 6, 7, 8], 3, async (item) => {
      started.push(item)
      underWay++
      await sleep(item === 2 ? 1 : 15)
      underWay--
      throw new Error(`item ${item}`)
    })
    await assert.rejects(run, /item 2/)
    assert.equal(underWay, 0)
    assert.deepEqual(started, [1, 2, 3])
  })

  test('a failure of the items themselves is no different, and the items are told to end', async () => {
    let underWay = 0
    function* broken(): Generator<number> {
      yield 1
      yield 2
      throw new Error('list broke')
    }
    const run = mapBounded(broken(), 3, async () => {
      underWay++
      await sleep(5)
      underWay--
    })
    await assert.rejects(run, /list broke/)
    assert.equal(underWay, 0)

    let ended = false
    function* cleansUp(): Generator<number> {
      try {
        for (;;) yield 1
      } finally {
        ended = true
      }
    }
    await assert.rejects(
      mapBounded(cleansUp(), 2, async () => Promise.reject(new Error('no'))),
      /no/,
    )
    assert.ok(ended)
  })

  test('a falsy failure is still a failure', async () => {
    // oxlint-disable-next-line typescript/prefer-promise-reject-errors -- other people's code rejects with anything
    const run = mapBounded([1], 1, () => Promise.reject(undefined))
    await assert.rejects(
      run.then(
        () => 'resolved',
        (error: unknown) => Promise.reject(new Error(`was ${String(error)}`)),
      ),
      /was undefined/,
    )
  })

  test('work that throws before it returns a promise is a failure', async () => {
    const run = mapBounded([1, 2], 2, () => {
      throw new Error('at once')
    })
    await assert.rejects(run, /at once/)
  })

  test('no items, and more lanes than items', async () => {
    assert.deepEqual(await mapBounded([], 5, async () => 1), [])
    assert.deepEqual(await mapBounded([1], 1_000_000_000, async (item) => item), [1])
  })

  test('a width that is none is refused, not taken for "do nothing"', async () => {
    for (const width of [0, -1, Number.NaN, 1.5]) {
      await assert.rejects(
        mapBounded([1], width, async () => 1),
        (error) => isVarveError(error, 'INTERNAL'),
      )
    }
  })
})
