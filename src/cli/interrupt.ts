/**
 * Ctrl-C and SIGTERM: the first aborts the signal that every room was given, so that work stops at a clean place
 * and temporary files go; the second ends the process at once.
 */
import { VarveError } from '../base/index.ts'

export interface Interrupt extends Disposable {
  readonly signal: AbortSignal
}

export function catchInterrupts(): Interrupt {
  const controller = new AbortController()
  const onSignal = (name: NodeJS.Signals): void => {
    if (controller.signal.aborted) process.exit(130)
    if (process.stderr.isTTY) {
      process.stderr.write(`\r\x1b[Kvarve: stopping cleanly; once more ends at once\n`)
    }
    controller.abort(new VarveError('CANCELLED', `Cannot go on: interrupted by ${name}`))
  }
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
  for (const name of signals) process.on(name, onSignal)
  return {
    signal: controller.signal,
    [Symbol.dispose]: () => {
      for (const name of signals) process.off(name, onSignal)
    },
  }
}
