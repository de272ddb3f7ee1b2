/** Runs bin/varve as a real process: plain, and on a terminal (by script(1)) with an expect-and-send dialogue. */
import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { join } from 'node:path'
import { stripVTControlCharacters } from 'node:util'
import { run } from '../kit/index.ts'

export const ROOT: string = join(import.meta.dirname, '../..')
export const VARVE: string = join(ROOT, 'bin/varve')
export const EXAMPLES: string = join(ROOT, 'examples')
export const GOLDEN: string = join(ROOT, 'test/golden')

/** What the person's shell may carry must not decide a test. */
const CLEAN: Record<string, string> = { VARVE_REPO: '', VARVE_PASSWORD: '', VARVE_DEBUG: '' }
for (const name of ['CI', 'NO_COLOR', 'FORCE_COLOR', 'NODE_OPTIONS']) delete process.env[name]

export interface Ran {
  readonly code: number
  readonly stdout: string
  readonly stderr: string
}

export interface VarveOptions {
  readonly env?: Record<string, string>
  readonly cwd?: string
}

export async function varve(args: readonly string[], options: VarveOptions = {}): Promise<Ran> {
  const { code, stdout, stderr } = await run(VARVE, args, {
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    env: { ...CLEAN, ...options.env },
  })
  return { code, stdout: stdout.toString(), stderr }
}

/** As `varve`; fails the test unless it exits 0 and stderr is empty. Returns stdout. */
export async function ok(args: readonly string[], options: VarveOptions = {}): Promise<string> {
  const { code, stdout, stderr } = await varve(args, options)
  assert.equal(code, 0, `varve ${args.join(' ')}: exit ${code}\n${stdout}\n${stderr}`)
  assert.equal(stderr, '', `varve ${args.join(' ')} is silent on stderr`)
  return stdout
}

/** As `ok`, with --json added; the one document of stdout. The caller names its type: it is the contract. */
export async function okJson<T>(args: readonly string[], options: VarveOptions = {}): Promise<T> {
  return JSON.parse(await ok([...args, '--json'], options)) as T
}

interface ErrorDocument {
  readonly error: {
    readonly code: string
    readonly message: string
    readonly fields: Record<string, unknown>
    readonly hint: string
  }
}

/**
 * Fails the test unless the command ends with this code and exit, says so in one line and a hint on stderr, and
 * says the same in --json (where that is an option). Returns the error's document.
 */
export async function fails(
  args: readonly string[],
  expected: { readonly code: string; readonly exit: number },
  options: VarveOptions & { readonly json?: boolean } = {},
): Promise<ErrorDocument['error']> {
  const text = await varve(args, options)
  assert.equal(text.code, expected.exit, `varve ${args.join(' ')}: ${text.stdout}${text.stderr}`)
  assert.match(text.stderr, new RegExp(`^varve: ${expected.code}: \\S.*\n(  \\S.*\n)?$`))
  if (options.json === false) return { code: expected.code, message: '', fields: {}, hint: '' }
  const json = await varve([...args, '--json'], options)
  assert.equal(json.code, expected.exit)
  const { error } = JSON.parse(json.stdout) as ErrorDocument
  assert.equal(error.code, expected.code)
  assert.deepEqual(Object.keys(error), ['code', 'message', 'fields', 'hint'])
  assert.ok(json.stderr.includes(error.message), 'stderr says the same')
  return error
}

export interface Started {
  readonly child: ChildProcess
  readonly done: Promise<Ran>
}

/** Starts varve and gives back the process, for signals. */
export function start(args: readonly string[]): Started {
  const child = spawn(VARVE, args, {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, ...CLEAN, LC_ALL: 'C.UTF-8' },
  })
  const text = { stdout: '', stderr: '' }
  child.stdout.setEncoding('utf8').on('data', (piece: string) => {
    text.stdout += piece
  })
  child.stderr.setEncoding('utf8').on('data', (piece: string) => {
    text.stderr += piece
  })
  const done = new Promise<Ran>((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (code) => resolve({ code: code ?? -1, ...text }))
  })
  return { child, done }
}

/**
 * Runs a command of a shell on a terminal of its own (script(1), `columns` wide): waits for each `expect` in what
 * it prints, then types `send`. Returns all that the terminal saw, and the exit code.
 */
export async function onTerminal(
  command: string,
  dialogue: readonly { readonly expect: RegExp; readonly send: string }[] = [],
  options: { readonly cwd?: string; readonly columns?: number; readonly timeoutMs?: number } = {},
): Promise<{ readonly code: number; readonly text: string; readonly raw: string }> {
  const sized = `stty cols ${options.columns ?? 100} rows 40; exec ${command}`
  const child = spawn('script', ['-qec', sized, '/dev/null'], {
    stdio: ['pipe', 'pipe', 'inherit'],
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    env: { ...process.env, ...CLEAN, LC_ALL: 'C.UTF-8', TERM: 'xterm-256color', SHELL: '/bin/sh' },
  })
  let raw = ''
  let from = 0
  const steps = [...dialogue]
  child.stdout.setEncoding('utf8').on('data', (piece: string) => {
    raw += piece
    for (let step = steps[0]; step; step = steps[0]) {
      const match = step.expect.exec(raw.slice(from))
      if (!match) break
      from += match.index + match[0].length
      steps.shift()
      child.stdin.write(step.send)
    }
  })
  child.stdin.on('error', () => {})
  const timer = setTimeout(() => child.kill('SIGKILL'), options.timeoutMs ?? 60_000)
  try {
    const code = await new Promise<number>((resolve, reject) => {
      child.on('error', reject)
      child.on('close', (status) => resolve(status ?? -1))
    })
    assert.equal(steps.length, 0, `never saw ${steps[0]?.expect} in:\n${raw}`)
    return { code, text: stripVTControlCharacters(raw).replaceAll('\r\n', '\n'), raw }
  } finally {
    clearTimeout(timer)
  }
}
