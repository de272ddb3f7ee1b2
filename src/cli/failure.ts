/** A failure as the person or the program sees it, and the exit code that goes with it. */
import { fromSystem, isVarveError, VarveError } from '../base/index.ts'
import { type Output, printable } from './output.ts'

/** Whatever was thrown, as one of ours. What is no VarveError by now is a bug, and says so with its stack. */
export function asVarveError(error: unknown, signal: AbortSignal): VarveError {
  if (signal.aborted && isAbort(error)) {
    return isVarveError(signal.reason)
      ? signal.reason
      : new VarveError('CANCELLED', 'Cannot go on: interrupted', { cause: error })
  }
  if (error instanceof VarveError) return error
  if (error instanceof Error && typeof (error as NodeJS.ErrnoException).syscall === 'string') {
    const { path } = error as NodeJS.ErrnoException
    return fromSystem(error, 'use', path ?? 'a file')
  }
  return new VarveError('INTERNAL', error instanceof Error ? error.message : String(error), { cause: error })
}

function isAbort(error: unknown): boolean {
  return isVarveError(error, 'CANCELLED') || (error instanceof Error && error.name === 'AbortError')
}

/** `error` in JSON output: `{code, message, fields, hint}`. */
export function errorDocument(error: VarveError): Record<string, unknown> {
  return { code: error.code, message: error.message, fields: error.fields, hint: error.hint }
}

/** Prints the failure: a line and a hint on stderr; with --json also `{"error": …}`, unless a document is out. */
export async function reportFailure(error: VarveError, output: Output): Promise<number> {
  if (output.json && !output.wroteJson) await output.document({ error: errorDocument(error) })
  output.note(`${output.styleError(['red', 'bold'], `varve: ${error.code}:`)} ${printable(error.message)}`)
  if (error.hint !== '') output.note(`  ${output.styleError('dim', printable(error.hint))}`)
  if (error.code === 'INTERNAL' || process.env['VARVE_DEBUG']) {
    for (let at: unknown = error; at instanceof Error; at = at.cause) {
      if (at.stack) output.note(at.stack)
    }
  }
  return error.exitCode
}
