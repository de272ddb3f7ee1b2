/**
 * What rooms say to whoever listens: log lines, warnings and progress. Rooms never print (`console` lives in
 * cli alone); the command line and the daemon pass a `Log` and a `ProgressListener` down.
 */
import type { ErrorFields } from './errors.ts'

export type LogLevel = 'debug' | 'info' | 'warn' | 'error'

export interface Log {
  /** `message` is a whole sentence; `fields` carry the facts for programs. */
  (level: LogLevel, message: string, fields?: ErrorFields): void
}

export const silentLog: Log = () => {}

/** One step of long work. Counts are bytes that matter (in use, changed), never the disk's virtual size. */
export interface Progress {
  readonly phase: string
  readonly doneBytes: number
  readonly totalBytes: number
}

export type ProgressListener = (progress: Progress) => void

/** What every long-running call takes: a way to stop it, a listener, a log. */
export interface Context {
  readonly signal?: AbortSignal | undefined
  readonly progress?: ProgressListener | undefined
  readonly log?: Log | undefined
}
