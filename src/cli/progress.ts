/**
 * Progress on a terminal: one line on stderr that is drawn over itself and taken away at the end. Silent when
 * stderr is no terminal. Counts are bytes that matter, as rooms report them; never the disk's virtual size.
 */
import type { Progress, ProgressListener } from '../base/index.ts'
import { width } from './table.ts'
import { formatBytes, formatClock, formatShare } from './units.ts'

const REDRAW_MS = 100
/** The rate is that of the last seconds, so that it follows what happens. */
const WINDOW_MS = 5000

export interface ProgressLine extends Disposable {
  readonly listener: ProgressListener | undefined
}

export function progressLine(label: string): ProgressLine {
  const stream = process.stderr
  if (!stream.isTTY || process.env['TERM'] === 'dumb') {
    return { listener: undefined, [Symbol.dispose]: () => {} }
  }
  let now: Progress | undefined
  let samples: { readonly at: number; readonly bytes: number }[] = []
  let drawn = false

  const draw = (): void => {
    if (!now) return
    const at = performance.now()
    samples.push({ at, bytes: now.doneBytes })
    while (samples.length > 2 && at - samples[0]!.at > WINDOW_MS) samples.shift()
    stream.write(`\r${renderProgress(label, now, rateOf(samples), (stream.columns ?? 80) - 1)}\x1b[K`)
    drawn = true
  }
  const timer = setInterval(draw, REDRAW_MS)
  timer.unref()

  return {
    listener: (progress) => {
      if (now?.phase !== progress.phase) samples = []
      now = progress
    },
    [Symbol.dispose]: () => {
      clearInterval(timer)
      if (drawn) stream.write('\r\x1b[K')
    },
  }
}

function rateOf(samples: readonly { readonly at: number; readonly bytes: number }[]): number {
  const first = samples[0]
  const last = samples.at(-1)
  if (!first || !last || last.at - first.at < 300) return 0
  return ((last.bytes - first.bytes) / (last.at - first.at)) * 1000
}

/** `web01 reading ━━━━━━────── 45% · 1.2 GiB of 2.6 GiB · 350 MiB/s · 0:04 left`, shortened to `columns`. */
export function renderProgress(label: string, progress: Progress, rate: number, columns: number): string {
  const { phase, doneBytes, totalBytes } = progress
  const head = label === '' ? phase : `${label} ${phase}`
  const facts: string[] = []
  if (totalBytes > 0) facts.push(formatShare(doneBytes, totalBytes).padStart(4))
  facts.push(
    totalBytes > 0 ? `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}` : formatBytes(doneBytes),
  )
  if (rate > 0) facts.push(`${formatBytes(Math.round(rate))}/s`)
  if (rate > 0 && totalBytes > doneBytes) facts.push(`${formatClock((totalBytes - doneBytes) / rate)} left`)
  const text = facts.join(' · ')
  const room = columns - width(head) - width(text) - 2
  if (room >= 8 && totalBytes > 0) {
    const bar = Math.min(30, room)
    const full = Math.min(bar, Math.floor((doneBytes / totalBytes) * bar))
    return `${head} ${'━'.repeat(full)}${'─'.repeat(bar - full)} ${text}`
  }
  const plain = `${head} ${text.trimStart()}`
  return width(plain) <= columns ? plain : text.trimStart().slice(0, Math.max(0, columns))
}
