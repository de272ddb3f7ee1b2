/** Bounded concurrency: no floating promise, first failure wins, the rest is awaited before it is thrown. */

/**
 * Runs `work` over `items` with at most `width` under way. Rejects with the first failure after every started
 * call has settled, and starts no further one after a failure. Results keep the order of `items`.
 */
export async function mapBounded<T, R>(
  items: Iterable<T>,
  width: number,
  work: (item: T, index: number) => Promise<R>,
): Promise<R[]> {
  const results: R[] = []
  const iterator = items[Symbol.iterator]()
  let index = 0
  let failure: { error: unknown } | undefined
  async function lane(): Promise<void> {
    while (!failure) {
      const next = iterator.next()
      if (next.done) return
      const mine = index++
      try {
        results[mine] = await work(next.value, mine)
      } catch (error) {
        failure ??= { error }
      }
    }
  }
  await Promise.all(Array.from({ length: Math.max(1, width) }, lane))
  if (failure) throw failure.error
  return results
}
