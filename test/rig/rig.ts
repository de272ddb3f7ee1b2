/**
 * A throw-away Linux guest for what this machine's kernel cannot do: device-mapper, md, foreign file systems.
 *
 * QEMU in plain emulation (no KVM, no root) boots Debian's cloud kernel with an initramfs that holds busybox, the tools
 * asked for with their libraries, the modules in loading order, and a script. The disks given are /dev/vda, vdb … in the
 * order given. The kernel and busybox are downloaded once through apt into .cache/rig.
 */
import { execFileSync } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
} from 'node:fs'
import { readFile, truncate, writeFile } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { needs, run, tempDir } from '../kit/index.ts'

const CACHE = join(import.meta.dirname, '../../.cache/rig')
const KERNEL_PACKAGE = 'linux-image-cloud-amd64'

/** For `{ skip: needsRig() }`. */
export function needsRig(): string | false {
  return (
    needs('qemu-system-x86_64', 'apt-get', 'dpkg', 'xz', 'ldd') ||
    (process.arch === 'x64' ? false : 'the guest kernel is for x86-64')
  )
}

export interface GuestJob {
  /** Run by busybox sh as /job, with the tools on PATH; its exit code is the result's. */
  readonly script: string
  /** Programs of this machine, by name; their libraries come along. */
  readonly tools?: readonly string[]
  /** Kernel modules by name; what they depend on comes along. */
  readonly modules?: readonly string[]
  /** Image files, raw. */
  readonly disks?: readonly { readonly path: string; readonly readOnly?: boolean }[]
  /** Further files: path in the guest -> path here. */
  readonly files?: Readonly<Record<string, string>>
  readonly memoryMiB?: number
  readonly timeoutSeconds?: number
}

export interface GuestResult {
  readonly code: number
  /** Everything that the script printed. */
  readonly output: string
}

/** Boots, runs the script, powers off. @throws when the guest does not come to an end */
export async function runGuest(job: GuestJob): Promise<GuestResult> {
  const kernel = ensureKernel()
  await using dir = await tempDir()
  const initrd = dir.file('initrd')
  await writeFile(initrd, buildInitramfs(job, kernel))
  // What the script prints comes back on a disk of its own: a serial line loses characters on a busy machine.
  const output = dir.file('output')
  await writeFile(output, '')
  await truncate(output, OUTPUT_BYTES)
  const drives = [...(job.disks ?? []), { path: output, readOnly: false }].flatMap(({ path, readOnly }) => [
    '-drive',
    `file=${path},format=raw,if=virtio,cache=unsafe${readOnly ? ',readonly=on' : ''}`,
  ])
  const result = await run('timeout', [
    String(job.timeoutSeconds ?? 240),
    'qemu-system-x86_64',
    ...MACHINE.split(' '),
    '-m',
    String(job.memoryMiB ?? 768),
    '-kernel',
    kernel.image,
    '-initrd',
    initrd,
    '-append',
    'console=ttyS0 quiet panic=-1 loglevel=3',
    ...drives,
  ])
  const bytes = await readFile(output)
  const head = bytes
    .subarray(0, 64)
    .toString('latin1')
    .match(/^RIG (\d+) (\d+)\n/)
  if (!head) {
    throw new Error(
      `the guest did not finish (qemu exit ${result.code}):\n${result.stdout.toString().slice(-4000)}\n${result.stderr}`,
    )
  }
  return {
    code: Number(head[1]),
    output: bytes.subarray(head[0].length, head[0].length + Number(head[2])).toString(),
  }
}

const MACHINE =
  '-accel tcg,thread=multi -cpu max -M pc -smp 2 -nodefaults -no-user-config -display none -no-reboot -serial stdio'
const OUTPUT_BYTES = 16 << 20

interface Kernel {
  readonly image: string
  readonly modules: string
  readonly busybox: string
}

/** Downloads and unpacks the kernel and busybox, once. */
function ensureKernel(): Kernel {
  const ready = join(CACHE, 'ready')
  if (!existsSync(ready)) {
    const work = `${CACHE}.${process.pid}`
    rmSync(work, { recursive: true, force: true })
    mkdirSync(join(work, 'root'), { recursive: true })
    const depends = execFileSync('apt-cache', ['depends', KERNEL_PACKAGE], { encoding: 'utf8' })
    const image = depends.match(/Depends: (linux-image-\S+)/)?.[1]
    if (!image) throw new Error(`apt knows no kernel behind ${KERNEL_PACKAGE}; run apt-get update`)
    execFileSync('apt-get', ['download', '-q', image, 'busybox-static'], { cwd: work, stdio: 'ignore' })
    for (const deb of readdirSync(work).filter((name) => name.endsWith('.deb'))) {
      execFileSync('dpkg', ['-x', join(work, deb), join(work, 'root')])
      rmSync(join(work, deb))
    }
    mkdirSync(dirname(CACHE), { recursive: true })
    rmSync(CACHE, { recursive: true, force: true })
    renameSync(work, CACHE)
    execFileSync('touch', [ready])
  }
  const boot = join(CACHE, 'root/boot')
  const image = readdirSync(boot).find((name) => name.startsWith('vmlinuz-'))!
  return {
    image: join(boot, image),
    modules: join(CACHE, 'root/lib/modules', image.slice('vmlinuz-'.length)),
    busybox: join(CACHE, 'root/bin/busybox'),
  }
}

const INIT = `#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs dev /dev
$b mkdir -p /dev/pts /dev/shm /run /tmp /mnt; $b mount -t tmpfs tmp /tmp; $b mount -t tmpfs run /run
$b --install -s /bin
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LANG=C.UTF-8 DM_DISABLE_UDEV=1
while read -r m; do insmod "/mod/$m" || echo "insmod failed: $m"; done < /mod/order
sh /job </dev/null >/tmp/out 2>&1; rc=$?
sync; { printf 'RIG %d %d\\n' $rc $(wc -c </tmp/out); cat /tmp/out; } >/dev/RESULT; sync; poweroff -f
`

function buildInitramfs(job: GuestJob, kernel: Kernel): Uint8Array {
  const archive = new Cpio()
  for (const folder of [
    'proc',
    'sys',
    'dev',
    'bin',
    'sbin',
    'usr',
    'usr/bin',
    'usr/sbin',
    'lib',
    'lib64',
    'mod',
    'etc',
    'mnt',
  ])
    archive.folder(folder)
  archive.file(
    'init',
    Buffer.from(INIT.replace('RESULT', `vd${String.fromCharCode(97 + (job.disks?.length ?? 0))}`)),
    0o755,
  )
  archive.file('bin/busybox', readFileSync(kernel.busybox), 0o755)
  archive.file('bin/sh', readFileSync(kernel.busybox), 0o755)
  const functions: string[] = []
  for (const tool of job.tools ?? []) {
    const path = execFileSync('sh', ['-c', 'command -v "$1"', 'sh', tool], { encoding: 'utf8' }).trim()
    archive.program(path)
    // Busybox prefers its own applets of the same name; a function wins over them.
    functions.push(`${tool}() { ${path} "$@"; }\n`)
  }
  archive.file('job', Buffer.from(functions.join('') + job.script), 0o755)
  for (const [to, from] of Object.entries(job.files ?? {}))
    archive.file(to.replace(/^\//, ''), readFileSync(from), statSync(from).mode & 0o777)
  const order = moduleOrder(['virtio_pci', 'virtio_blk', ...(job.modules ?? [])], kernel.modules)
  for (const path of order) archive.file(`mod/${basename(path).replace(/\.(xz|gz)$/, '')}`, readModule(path))
  archive.file(
    'mod/order',
    Buffer.from(order.map((path) => `${basename(path).replace(/\.(xz|gz)$/, '')}\n`).join('')),
  )
  return archive.finish()
}

function readModule(path: string): Uint8Array {
  if (path.endsWith('.xz')) return execFileSync('xz', ['-dc', path], { maxBuffer: 64 << 20 })
  return path.endsWith('.gz') ? gunzipSync(readFileSync(path)) : readFileSync(path)
}

/** Paths of modules and all that they depend on, dependencies first. Built-in ones are left out. */
function moduleOrder(names: readonly string[], root: string): string[] {
  const byName = new Map<string, string>()
  for (const entry of readdirSync(join(root, 'kernel'), { recursive: true, encoding: 'utf8' })) {
    const match = basename(entry).match(/^(.+)\.ko(\.xz|\.gz)?$/)
    if (match) byName.set(match[1]!.replaceAll('-', '_'), join(root, 'kernel', entry))
  }
  const builtIn = readFileSync(join(root, 'modules.builtin'), 'utf8')
  const order: string[] = []
  const seen = new Set<string>()
  const add = (name: string): void => {
    const plain = name.replaceAll('-', '_')
    if (seen.has(plain)) return
    seen.add(plain)
    const path = byName.get(plain)
    if (!path) {
      if (new RegExp(`/${plain.replaceAll('_', '[-_]')}\\.ko`).test(builtIn)) return
      throw new Error(`the guest kernel has no module ${name}`)
    }
    const depends =
      Buffer.from(readModule(path))
        .toString('latin1')
        .match(/\0depends=([^\0]*)\0/)?.[1] ?? ''
    for (const other of depends.split(',').filter(Boolean)) add(other)
    order.push(path)
  }
  for (const name of names) add(name)
  return order
}

/** A cpio archive in the format "newc": what the kernel unpacks as its first root. */
class Cpio {
  readonly #parts: Uint8Array[] = []
  readonly #names = new Set<string>()
  #inode = 1

  folder(name: string): void {
    for (let at = name.indexOf('/'); at > 0; at = name.indexOf('/', at + 1)) this.folder(name.slice(0, at))
    this.#entry(name, 0o40755, new Uint8Array(0))
  }

  file(name: string, content: Uint8Array, mode = 0o644): void {
    if (name.includes('/')) this.folder(dirname(name))
    this.#entry(name, 0o100000 | mode, content)
  }

  /** A program at its own path, with every library that ldd names at the library's own path. */
  program(path: string): void {
    this.file(path.slice(1), readFileSync(realpathSync(path)), 0o755)
    const libraries = execFileSync('sh', ['-c', 'ldd "$1" 2>/dev/null || true', 'sh', path], {
      encoding: 'utf8',
    })
    for (const [library] of libraries.matchAll(/\/[^ )]+/g))
      this.file(library.slice(1), readFileSync(realpathSync(library)), 0o755)
  }

  finish(): Uint8Array {
    this.#entry('TRAILER!!!', 0, new Uint8Array(0))
    return Buffer.concat(this.#parts)
  }

  #entry(name: string, mode: number, content: Uint8Array): void {
    if (this.#names.has(name)) return
    this.#names.add(name)
    const hex = (value: number): string => value.toString(16).padStart(8, '0')
    const fields = [this.#inode++, mode, 0, 0, 1, 0, content.length, 0, 0, 0, 0, name.length + 1, 0]
    this.#parts.push(padded(Buffer.from(`070701${fields.map(hex).join('')}${name}\0`)), padded(content))
  }
}

function padded(bytes: Uint8Array): Uint8Array {
  const rest = bytes.length % 4
  return rest === 0 ? bytes : Buffer.concat([bytes, new Uint8Array(4 - rest)])
}
