/** Bounded concurrency: no floating promise, first failure wins, the rest is awaited before it is thrown. */

import { assert } from './errors.ts'

/**
 * Runs `work` over `items` with at most `width` (from 1) under way. Rejects with the first failure, of `work` or of
 * `items` itself, after every started call has settled, and starts no further one after a failure. Results keep
 * the order of `items`, of which no more is taken than is started.
 */
export async function mapBounded<T, R>(
  items: Iterable<T>,
  width: number,
  work: (item: T, index: number) => Promise<R>,
): Promise<R[]> {
  assert(Number.isSafeInteger(width) && width >= 1, 'width is a positive integer')
  const results: R[] = []
  const iterator = items[Symbol.iterator]()
  let index = 0
  const state: { exhausted: boolean; failure?: { readonly error: unknown } } = { exhausted: false }
  async function lane(): Promise<void> {
    try {
      while (!state.failure && !state.exhausted) {
        const next = iterator.next()
        if (next.done) {
          state.exhausted = true
          return
        }
        const mine = index++
        results[mine] = await work(next.value, mine)
      }
    } catch (error) {
      state.failure ??= { error }
    }
  }
  const lanes: Promise<void>[] = []
  // Lanes are opened as items are there: a wide call over few items costs no more than those.
  while (lanes.length < width && !state.exhausted && !state.failure) lanes.push(lane())
  await Promise.all(lanes)
  if (!state.failure) return results
  if (!state.exhausted) iterator.return?.()
  throw state.failure.error
}
