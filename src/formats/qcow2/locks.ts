/** Two small locks of the writer: one at a time, and one at a time per range. */

/** Runs one piece of work after another, in the order of the calls. */
export class Mutex {
  #last: Promise<unknown> = Promise.resolve()

  run<T>(work: () => Promise<T>): Promise<T> {
    const mine = this.#last.then(work)
    this.#last = mine.catch(() => {})
    return mine
  }
}

/** Ranges `[start, end)` that are being worked on; a call waits for every earlier one that it overlaps. */
export class RangeLock {
  readonly #held = new Set<{ start: number; end: number; done: Promise<void> }>()

  async run<T>(start: number, end: number, work: () => Promise<T>): Promise<T> {
    const before = [...this.#held].filter((held) => held.start < end && start < held.end)
    const { promise, resolve } = Promise.withResolvers<void>()
    const mine = { start, end, done: promise }
    this.#held.add(mine)
    try {
      for (const held of before) await held.done
      return await work()
    } finally {
      this.#held.delete(mine)
      resolve()
    }
  }
}
