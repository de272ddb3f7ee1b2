/** What a verb is: it says which arguments it takes and what to do with them. One file a verb, in verbs/. */
import type { Command } from 'commander'
import { ERRORS, type ErrorCode, VarveError } from '../base/index.ts'
import type { Output } from './output.ts'

export interface Host {
  /** Fires on Ctrl-C and SIGTERM; goes into every call that may run long. */
  readonly signal: AbortSignal
  readonly output: Output
}

/** Adds options, help and the action to `command`. The action throws what goes wrong. */
export type Verb = (command: Command, host: Host) => void

const EXIT_WORDS: Readonly<Record<number, string>> = {
  0: 'done',
  1: 'failed',
  2: 'wrong usage',
  3: 'done in part',
  10: 'not found',
  11: 'locked by another program',
  12: 'corrupt or invalid',
  13: 'unsupported',
  130: 'interrupted',
}

export interface HelpText {
  /** Command lines without `varve`. */
  readonly examples: readonly string[]
  /** Exit codes whose meaning the verb says more exactly. 0, 1, 2, 10, 12, 13 and 130 are listed in any case. */
  readonly exits?: Readonly<Record<number, string>>
}

export function helpText({ examples, exits = {} }: HelpText): string {
  const codes = [0, 1, 2, 10, 12, 13, 130, ...Object.keys(exits).map(Number)]
  const lines = [...new Set(codes)]
    .sort((a, b) => a - b)
    .map((code) => `  ${String(code).padStart(3)}  ${exits[code] ?? EXIT_WORDS[code]}`)
  return [
    '',
    examples.length === 1 ? 'Example:' : 'Examples:',
    ...examples.map((example) => `  varve ${example}`),
    '',
    'Exit codes:',
    ...lines,
  ].join('\n')
}

/** A mistake in the command line. */
export function usageError(message: string, hint: string = ERRORS.USAGE.whatToDo): VarveError {
  return new VarveError('USAGE' satisfies ErrorCode, message, { hint })
}

/** For options that may be given several times. */
export function collect(value: string, before: readonly string[] = []): string[] {
  return [...before, value]
}
