/**
 * What a verb prints. Text for people or one JSON document, on stdout; notes on stderr.
 *
 * Rules: text that came from an image (labels, names) is printed without its control characters, so that an image
 * cannot steer the terminal; a reader that goes away (`varve map … | head`) is no failure: what is left is dropped
 * and the work goes on; colours only where the stream and the environment (NO_COLOR, FORCE_COLOR) allow.
 */
import { stripVTControlCharacters, styleText } from 'node:util'

export type Style = 'bold' | 'dim' | 'green' | 'yellow' | 'red' | 'cyan'

export class Output {
  readonly json: boolean
  #stdoutGone = false
  /** True once a JSON document was begun: a program then reads the failure from the exit code and stderr. */
  #wroteJson = false

  constructor(options: { readonly json: boolean }) {
    this.json = options.json
    process.stdout.on('error', this.#onStdoutError)
    process.stderr.on('error', () => {})
  }

  get wroteJson(): boolean {
    return this.#wroteJson
  }

  /** Nobody reads stdout any more: what is made only to be printed need not be made. */
  get stdoutGone(): boolean {
    return this.#stdoutGone
  }

  /** Text to stdout, as it is; waits while the reader is slow. */
  async write(text: string): Promise<void> {
    if (this.#stdoutGone || text === '') return
    await new Promise<void>((resolve) => {
      process.stdout.write(text, () => resolve())
    })
  }

  /** Lines of text for people. */
  async lines(...lines: readonly string[]): Promise<void> {
    if (lines.length > 0) await this.write(`${lines.join('\n')}\n`)
  }

  /** The one JSON document. */
  async document(value: unknown): Promise<void> {
    this.#wroteJson = true
    await this.write(`${JSON.stringify(value, undefined, 2)}\n`)
  }

  /** The one JSON document as an array with an element a line, in pieces: it may have millions. */
  async array(values: Iterable<unknown>): Promise<void> {
    this.#wroteJson = true
    let piece = '['
    let first = true
    for (const value of values) {
      if (this.#stdoutGone) return
      piece += `${first ? '' : ',\n'}${JSON.stringify(value)}`
      first = false
      if (piece.length > PIECE) {
        await this.write(piece)
        piece = ''
      }
    }
    await this.write(`${piece}]\n`)
  }

  /** Many lines, in pieces. */
  async stream(lines: Iterable<string>): Promise<void> {
    let piece = ''
    for (const line of lines) {
      if (this.#stdoutGone) return
      piece += `${line}\n`
      if (piece.length > PIECE) {
        await this.write(piece)
        piece = ''
      }
    }
    await this.write(piece)
  }

  /** A line on stderr that is no error. */
  note(text: string): void {
    process.stderr.write(`${text}\n`)
  }

  style(style: Style | readonly Style[], text: string): string {
    return styleText(style, text, { stream: process.stdout })
  }

  styleError(style: Style | readonly Style[], text: string): string {
    return styleText(style, text, { stream: process.stderr })
  }

  readonly #onStdoutError = (error: NodeJS.ErrnoException): void => {
    this.#stdoutGone = true
    if (error.code === 'EPIPE') return
    // A full disk behind `> file`: what was printed is not there, and the exit code must say so.
    process.stderr.write(`varve: IO: Cannot write stdout: ${error.message}\n`)
    process.exitCode = 1
    this.stdoutFailed = true
  }

  /** stdout could not be written for another reason than a reader that went away. */
  stdoutFailed = false
}

const PIECE = 1 << 16

/** Text of foreign origin, fit for a terminal: no escape sequences, no control characters, no bidi overrides. */
export function printable(text: string): string {
  return stripVTControlCharacters(text).replace(/[\p{Cc}\p{Zl}\p{Zp}\p{Bidi_Control}]/gu, '\u{fffd}')
}
