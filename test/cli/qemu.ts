/** A real QEMU without a guest: block nodes only, driven over QMP; writes go through its own qemu-io command. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { connectQmp, type Qmp } from '../../src/live/index.ts'

export const QEMU = 'qemu-system-x86_64'

export class Qemu implements AsyncDisposable {
  readonly socket: string
  readonly qmp: Qmp
  readonly #child: ChildProcess
  #stderr: () => string

  private constructor(parts: { socket: string; qmp: Qmp; child: ChildProcess; stderr: () => string }) {
    this.socket = parts.socket
    this.qmp = parts.qmp
    this.#child = parts.child
    this.#stderr = parts.stderr
  }

  /** Starts it with two monitors in `folder`: `socket` is for the program under test, `qmp` for the test. */
  static async start(folder: string): Promise<Qemu> {
    const [socket, mine] = [join(folder, 'varve.qmp'), join(folder, 'test.qmp')]
    for (const left of [socket, mine]) await rm(left, { force: true })
    const monitor = (path: string): string[] => ['-qmp', `unix:${path},server=on,wait=off`]
    const args = ['-machine', 'none', '-accel', 'tcg', '-S', '-nodefaults', '-display', 'none']
    const child = spawn(QEMU, [...args, ...monitor(socket), ...monitor(mine)], {
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    let text = ''
    child.stderr.setEncoding('utf8').on('data', (piece: string) => {
      text += piece
    })
    try {
      for (let waited = 0; !existsSync(mine); waited += 20) {
        if (child.exitCode !== null || waited > 20_000) throw new Error(`${QEMU} does not start: ${text}`)
        await sleep(20)
      }
      return new Qemu({ socket, qmp: await connectQmp(mine), child, stderr: () => text })
    } catch (error) {
      child.kill('SIGKILL')
      throw error
    }
  }

  async run<T = unknown>(command: string, args: Record<string, unknown> = {}): Promise<T> {
    return (await this.qmp.execute(command, args)) as T
  }

  /** Opens a qcow2 image as node `name`; `backing` is a node, or null for none. */
  async open(
    name: string,
    path: string,
    options: { backing?: string | null; readOnly?: boolean } = {},
  ): Promise<void> {
    await this.run('blockdev-add', {
      'node-name': name,
      driver: 'qcow2',
      'read-only': options.readOnly ?? false,
      ...(options.backing === undefined ? {} : { backing: options.backing }),
      file: { driver: 'file', filename: path, 'node-name': `${name}-file` },
    })
  }

  /** What a plan asks for before its transaction: nodes below the top were made read-only by QEMU. */
  async reopenForWriting(names: readonly string[]): Promise<void> {
    for (const name of names) {
      const options = { 'node-name': name, driver: 'qcow2', 'read-only': false, file: `${name}-file` }
      await this.run('blockdev-reopen', { options: [options] })
    }
  }

  /** A qemu-io command on a node: `write -P 1 0 64k`. */
  async io(node: string, command: string): Promise<void> {
    const said = await this.run<string>('human-monitor-command', {
      'command-line': `qemu-io ${node} "${command}"`,
    })
    if (/error|fail|invalid/i.test(said)) throw new Error(`qemu-io ${node} ${command}: ${said}`)
  }

  /** Ends it as it should end: bitmaps are stored. */
  async quit(): Promise<void> {
    const gone = once(this.#child, 'exit')
    await this.run('quit').catch(() => {})
    await gone
    if (this.#child.exitCode !== 0)
      throw new Error(`${QEMU}: exit ${this.#child.exitCode}: ${this.#stderr()}`)
  }

  /** Ends it as the out-of-memory killer does. */
  async kill(): Promise<void> {
    const gone = once(this.#child, 'exit')
    this.#child.kill('SIGKILL')
    await gone
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.qmp[Symbol.asyncDispose]()
    if (this.#child.exitCode === null && this.#child.signalCode === null) await this.kill()
  }
}
