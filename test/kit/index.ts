/** Test kit: temporary folders, running foreign tools, seeded randomness, content as a function of the offset. */
import { spawn, spawnSync } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/** A folder that is gone when the scope ends: `await using dir = await tempDir()`. */
export async function tempDir(): Promise<AsyncDisposable & { path: string; file(name: string): string }> {
  const path = await mkdtemp(join(tmpdir(), 'varve-test-'))
  return {
    path,
    file: (name) => join(path, name),
    [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }),
  }
}

export interface RunResult {
  readonly code: number
  readonly stdout: Buffer
  readonly stderr: string
}

/** Runs a program without a shell; never rejects for a non-zero exit (`code` -1: ended by a signal). */
export async function run(
  command: string,
  args: readonly string[],
  options: { input?: Uint8Array | string; env?: Record<string, string>; cwd?: string } = {},
): Promise<RunResult> {
  const child = spawn(command, args, {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { ...process.env, LC_ALL: 'C.UTF-8', ...options.env },
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
  })
  const stdout: Buffer[] = []
  const stderr: Buffer[] = []
  child.stdout.on('data', (chunk: Buffer) => stdout.push(chunk))
  child.stderr.on('data', (chunk: Buffer) => stderr.push(chunk))
  child.stdin.on('error', () => {})
  child.stdin.end(options.input)
  const code = await new Promise<number>((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (status) => resolve(status ?? -1))
  })
  return { code, stdout: Buffer.concat(stdout), stderr: Buffer.concat(stderr).toString() }
}

/** Like `run`, but a non-zero exit is an error that carries what the program said. Returns its stdout as text. */
export async function must(
  command: string,
  args: readonly string[],
  options: Parameters<typeof run>[2] = {},
): Promise<string> {
  const result = await run(command, args, options)
  if (result.code !== 0) {
    throw new Error(
      `${command} ${args.join(' ')}: exit ${result.code}\n${result.stdout.toString()}\n${result.stderr}`,
    )
  }
  return result.stdout.toString()
}

/**
 * For `{ skip: needs('qemu-img', …) }`: false when every tool is on PATH, else the reason. scripts/test.sh
 * installs all of them on a Debian-like system, so a skip there is a defect of its list (test/tools.txt).
 */
export function needs(...tools: readonly string[]): string | false {
  const missing = tools.filter((tool) => !onPath(tool))
  return missing.length > 0 ? `needs ${missing.join(', ')} (not installed)` : false
}

/** For `{ skip: needsRoot() }`: loop mounts and device nodes need root. */
export function needsRoot(): string | false {
  return process.getuid?.() === 0 ? false : 'needs root (loop mounts)'
}

const known = new Map<string, boolean>()
function onPath(tool: string): boolean {
  let found = known.get(tool)
  if (found === undefined) {
    found =
      spawnSync('sh', ['-c', 'command -v "$1"', 'sh', tool], { env: { ...process.env, PATH: TOOL_PATH } })
        .status === 0
    known.set(tool, found)
  }
  return found
}

const TOOL_PATH = `${process.env['PATH']}:/usr/sbin:/sbin`
process.env['PATH'] = TOOL_PATH

/** Seeded random numbers. Print `seed` in the failure message; VARVE_SEED repeats a run. */
export class Random {
  readonly seed: number
  #state: number

  constructor(seed: number = Number(process.env['VARVE_SEED'] ?? Date.now() % 2 ** 31)) {
    this.seed = seed
    this.#state = seed >>> 0
  }

  /** In [0, 1): mulberry32. */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0
    let t = this.#state
    t = Math.imul(t ^ (t >>> 15), t | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }

  /** Integer in [0, below). */
  below(below: number): number {
    return Math.floor(this.next() * below)
  }

  pick<T>(list: readonly T[]): T {
    return list[this.below(list.length)] as T
  }

  bytes(length: number): Uint8Array {
    const out = new Uint8Array(length)
    for (let i = 0; i < length; i++) out[i] = this.below(256)
    return out
  }
}

/**
 * Content as a function of the offset (and a tag), so that a wrong mapping shows: 8-byte words of
 * `tag << 40 ^ word number`, never zero.
 */
export function patternAt(offset: number, length: number, tag = 1): Uint8Array {
  const first = Math.floor(offset / 8)
  const words = Math.ceil((offset + length) / 8) - first
  const view = new DataView(new ArrayBuffer(words * 8))
  for (let i = 0; i < words; i++) {
    view.setUint32(i * 8, (first + i) >>> 0, true)
    view.setUint32(i * 8 + 4, ((tag << 20) ^ Math.floor((first + i) / 2 ** 32)) | 0x80000000, true)
  }
  return new Uint8Array(view.buffer, offset - first * 8, length)
}
