/**
 * Where the password of an encrypted repository comes from: --password-file, then VARVE_PASSWORD, then a prompt
 * without echo on a terminal.
 *
 * Rule: a password is never an argument (every user of the host can read those) and never printed.
 */
import { readFile } from 'node:fs/promises'
import { fromSystem, throwIfAborted, VarveError } from '../base/index.ts'
import { usageError } from './verb.ts'

export interface PasswordOptions {
  readonly passwordFile?: string
}

/** From file or environment; undefined when neither gives one. @throws USAGE for an empty one, NOT_FOUND, … */
export async function givenPassword(options: PasswordOptions): Promise<string | undefined> {
  if (options.passwordFile !== undefined) {
    let text: string
    try {
      text = await readFile(options.passwordFile, 'utf8')
    } catch (error) {
      throw fromSystem(error, 'read password file', options.passwordFile)
    }
    const password = text.split(/\r?\n/, 1)[0]!
    if (password === '') {
      throw usageError(
        `Cannot use password file ${options.passwordFile}: found an empty first line, expected the password`,
        'The password is the first line of the file.',
      )
    }
    return password
  }
  const fromEnvironment = process.env['VARVE_PASSWORD']
  return fromEnvironment === undefined || fromEnvironment === '' ? undefined : fromEnvironment
}

export function canPrompt(): boolean {
  return process.stdin.isTTY && process.stderr.isTTY
}

/** Asks on the terminal. With `twice`, asks again until both are equal (three times at most). */
export async function promptPassword(
  what: string,
  { signal, twice = false }: { readonly signal: AbortSignal; readonly twice?: boolean },
): Promise<string> {
  for (let attempt = 0; attempt < 3; attempt++) {
    const password = await readHidden(`${what}: `, signal)
    if (password === '') {
      process.stderr.write('varve: an empty password protects nothing\n')
      continue
    }
    if (!twice || (await readHidden('Once more: ', signal)) === password) return password
    process.stderr.write('varve: the two differ\n')
  }
  throw new VarveError('PASSWORD_NEEDED', 'Cannot go on: no password was entered in three attempts')
}

async function readHidden(prompt: string, signal: AbortSignal): Promise<string> {
  throwIfAborted(signal)
  const { stdin, stderr } = process
  // The echo goes before the prompt comes: who types at once is not shown either.
  stdin.setRawMode(true)
  try {
    stdin.setEncoding('utf8')
    stderr.write(prompt)
    return await new Promise<string>((resolve, reject) => {
      let line = ''
      const stop = (): void => {
        stdin.off('data', onData)
        stdin.off('end', onEnd)
        signal.removeEventListener('abort', onAbort)
      }
      const cancel = (): void => {
        stop()
        reject(new VarveError('CANCELLED', 'Cannot go on: interrupted at the password prompt'))
      }
      const onAbort = (): void => cancel()
      const onEnd = (): void => cancel()
      const onData = (text: string): void => {
        for (const char of text) {
          if (char === '\r' || char === '\n') {
            stop()
            resolve(line)
            return
          }
          // Raw mode: the terminal sends Ctrl-C and Ctrl-D as characters.
          if (char === '\x03' || (char === '\x04' && line === '')) {
            cancel()
            return
          }
          if (char === '\x7f' || char === '\b') line = Array.from(line).slice(0, -1).join('')
          else if (char === '\x15') line = ''
          else if (char >= ' ') line += char
        }
      }
      stdin.on('data', onData)
      stdin.on('end', onEnd)
      signal.addEventListener('abort', onAbort)
      stdin.resume()
    })
  } finally {
    stdin.setRawMode(false)
    stdin.pause()
    stderr.write('\n')
  }
}
