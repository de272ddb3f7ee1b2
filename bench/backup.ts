/**
 * How do backup, second backup and restore of a virtual machine's disk compare with restic, borg and qemu-img?
 *
 * Makes (once; as root, for the loop mount) the disk image: GPT and one ext4 with deleted garbage between and behind
 * the live data, so that only half of what is allocated is in use. Then, for each tool side by side: first backup,
 * second backup after change A (100 extents of 1 MiB of a database-like file overwritten), third after change B
 * (25 600 random pages of 4 KiB), restore of the second. Before each run the image and the repository leave the page
 * cache. Prints wall time, CPU time, peak memory, bytes read from the device, size of the repository.
 *
 *   node bench/backup.ts [--scale 1] [--dir /var/tmp/varve-bench] [--tools varve,restic,borg,qemu-img] [--keep]
 *
 * Scale 1 is a disk of 10 GiB with 3.4 GiB in use and takes 40 GiB of room while it runs; 0.1 is a tenth of it.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { availableParallelism, cpus, loadavg } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { openRepository } from '../src/backup/index.ts'

const { values: options } = parseArgs({
  options: {
    scale: { type: 'string', default: '1' },
    dir: { type: 'string', default: '/var/tmp/varve-bench' },
    tools: { type: 'string', default: 'varve,restic,borg,qemu-img' },
    keep: { type: 'boolean', default: false },
  },
})
const scale = Number(options.scale)
const dir = options.dir
const tools = options.tools.split(',')
const image = join(dir, 'vm.raw')
/** Stands beside an image that is complete; --keep uses it again. */
const made = join(dir, 'vm.made')
const mountPoint = join(dir, 'mnt')
const MIB = 1 << 20

// ---------------------------------------------------------------- the disk

function sh(script: string): string {
  const result = spawnSync('bash', ['-ec', script], { encoding: 'utf8', maxBuffer: 1 << 28 })
  if (result.status !== 0) throw new Error(`${script}\n${result.stdout}${result.stderr}`)
  return result.stdout
}

/** The partition as a loop device of its own: no udev and no partition support of the kernel is needed. */
function attach(path: string, how = ''): string {
  const bytes = statSync(path).size - 2 * MIB
  return sh(`losetup -f --show ${how} -o ${MIB} --sizelimit ${bytes} ${path}`).trim()
}

/** Mounts the guest's file system, runs `work` in it, and unmounts it whatever happens. */
function inGuest(work: (root: string) => void): void {
  const loop = attach(image)
  try {
    if (!sh(`blkid -o value -s TYPE ${loop} || true`).trim()) {
      sh(`mkfs.ext4 -q -b 4096 -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 ${loop}`)
    }
    sh(`mkdir -p ${mountPoint}; mount ${loop} ${mountPoint}`)
    try {
      work(mountPoint)
    } finally {
      sh(`umount ${mountPoint}`)
    }
  } finally {
    sh(`losetup -d ${loop}`)
  }
}

function makeImage(): void {
  const mib = (count: number): number => Math.max(1, Math.round(count * scale))
  mkdirSync(dir, { recursive: true })
  rmSync(image, { force: true })
  rmSync(made, { force: true })
  const sectors = mib(10_240) * 2048
  sh(`truncate -s ${mib(10_240)}M ${image}; sgdisk -n 1:2048:${sectors - 2049} -t 1:8300 ${image}`)
  inGuest((root) => {
    const tree = join(root, 'system')
    sh(`mkdir -p ${root}/garbage ${tree}`)
    randomFile(join(root, 'garbage/random'), mib(1024) * MIB)
    // Names in the order of the folders, up to the size wanted: the same tree on the same machine.
    const copySystem = (to: string, most: number): void => {
      sh(
        `cd /usr && find . -xdev -type f -size -64M -printf '%s %p\\n' | sort -k2 | awk -v most=${most} '(n += $1) > most { exit } { print substr($0, index($0, " ") + 1) }' | tar -cf - -T - | tar -xf - -C ${to}`,
      )
    }
    copySystem(join(root, 'garbage'), mib(1024) * MIB)
    copySystem(tree, mib(1300) * MIB)
    randomFile(join(root, 'media'), mib(768) * MIB)
    databaseFile(join(root, 'database'), mib(1024) * MIB)
    randomFile(join(root, 'garbage/more'), mib(1536) * MIB)
    sh(`sync; rm -rf ${root}/garbage; sync`)
  })
  writeFileSync(made, '')
}

function randomFile(path: string, bytes: number): void {
  const fd = openSync(path, 'w')
  for (let done = 0; done < bytes; done += MIB) writeSync(fd, randomBytes(Math.min(MIB, bytes - done)))
  closeSync(fd)
}

/** Pages of 8 KiB, a third of each incompressible: about 3:1, as tables with text and numbers are. */
function databaseFile(path: string, bytes: number): void {
  const fd = openSync(path, 'w')
  const text = Buffer.from('customer order 2026-03-14 shipped EUR net 30 days; '.repeat(200))
  for (let done = 0; done < bytes; done += MIB) {
    const piece = Buffer.alloc(MIB)
    for (let page = 0; page < MIB; page += 8192) {
      piece.writeBigUInt64LE(BigInt(done + page), page)
      text.copy(piece, page + 8, 0, 5400)
      randomBytes(2700).copy(piece, page + 5408)
    }
    writeSync(fd, piece)
  }
  closeSync(fd)
}

function changeDatabase(count: number, bytes: number): void {
  inGuest((root) => {
    const path = join(root, 'database')
    const places = Math.floor(statSync(path).size / bytes)
    const fd = openSync(path, 'r+')
    const seen = new Set<number>()
    while (seen.size < Math.min(count, places)) {
      const place = randomBytes(4).readUInt32LE() % places
      if (seen.has(place)) continue
      seen.add(place)
      writeSync(fd, randomBytes(bytes), 0, bytes, place * bytes)
    }
    closeSync(fd)
    sh('sync')
  })
}

// ---------------------------------------------------------------- measuring

interface Measured {
  readonly seconds: number
  readonly cpuSeconds: number
  readonly peakMiB: number
  /** From the device, by the kernel's account. */
  readonly readBytes: number
  readonly stdout: string
}

/** Figures of a process from /proc, looked at while it runs; the last look is at most 10 ms before its end. */
function watch(child: ChildProcess): { cpuSeconds: number; peakMiB: number; readBytes: number } {
  const figures = { cpuSeconds: 0, peakMiB: 0, readBytes: 0 }
  const timer = setInterval(() => {
    try {
      const stat = readFileSync(`/proc/${child.pid}/stat`, 'latin1')
      const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
      figures.cpuSeconds = Math.max(figures.cpuSeconds, (Number(fields[11]) + Number(fields[12])) / 100)
      const peak = readFileSync(`/proc/${child.pid}/status`, 'latin1').match(/VmHWM:\s+(\d+)/)
      if (peak) figures.peakMiB = Math.max(figures.peakMiB, Number(peak[1]) / 1024)
      const io = readFileSync(`/proc/${child.pid}/io`, 'latin1').match(/^read_bytes: (\d+)/m)
      if (io) figures.readBytes = Math.max(figures.readBytes, Number(io[1]))
    } catch {
      clearInterval(timer)
    }
  }, 10)
  child.on('close', () => clearInterval(timer))
  return figures
}

async function measure(
  command: string,
  args: readonly string[],
  env: Record<string, string>,
): Promise<Measured> {
  dropFromCache(dir)
  const started = performance.now()
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'], env: { ...process.env, ...env } })
  const figures = watch(child)
  let stdout = ''
  let stderr = ''
  child.stdout.on('data', (chunk: Buffer) => {
    if (stdout.length < 1 << 20) stdout += chunk.toString()
  })
  child.stderr.on('data', (chunk: Buffer) => {
    stderr += chunk.toString()
  })
  const code = await new Promise<number | null>((resolve, reject) => {
    child.on('error', reject)
    child.on('close', resolve)
  })
  if (code !== 0) throw new Error(`${command} ${args.join(' ')}: exit ${code}\n${stdout}\n${stderr}`)
  return { ...figures, seconds: (performance.now() - started) / 1000, stdout }
}

/** Every file below `folder` is written out and leaves the page cache. */
function dropFromCache(folder: string): void {
  sh(
    `sync; find ${folder} -type f -print0 | xargs -0 -r -n 64 sh -c 'for f; do dd if="$f" iflag=nocache count=0 status=none; done' sh`,
  )
}

function folderBytes(folder: string): number {
  return Number(sh(`du -s --apparent-size -B1 ${folder}`).split('\t')[0])
}

// ---------------------------------------------------------------- the tools

interface Tool {
  readonly version: () => string
  readonly init: () => Promise<void>
  readonly backup: (number: number) => Promise<Measured>
  readonly restore: () => Promise<{ measured: Measured; path: string }>
  /** Where it keeps what it stores. */
  readonly repository: string
  /** Free blocks come back as zeros, so the restored image equals the source by its file system, not by its bytes. */
  readonly zeroesFree: boolean
}

const password = 'correct horse battery staple'
const restored = join(dir, 'restored')

function tool(name: string): Tool {
  const repository = join(dir, `repository-${name}`)
  const env: Record<string, string> = {
    RESTIC_PASSWORD: password,
    BORG_PASSPHRASE: password,
    VARVE_PASSWORD: password,
    VARVE_REPO: repository,
    RESTIC_REPOSITORY: repository,
    RESTIC_CACHE_DIR: join(dir, 'restic-cache'),
    BORG_BASE_DIR: join(dir, 'borg-base'),
    BORG_RELOCATED_REPO_ACCESS_IS_OK: 'yes',
  }
  const run = (command: string, ...args: readonly string[]): Promise<Measured> => measure(command, args, env)
  const varve = (...args: readonly string[]): Promise<Measured> =>
    run(process.execPath, join(import.meta.dirname, '../src/cli/main.ts'), ...args)
  const common = { repository, zeroesFree: false }
  switch (name) {
    case 'varve':
      return {
        ...common,
        zeroesFree: true,
        version: () =>
          readFileSync(join(import.meta.dirname, '../package.json'), 'utf8').match(/"version": "(.*)"/)![1]!,
        init: async () => void (await varve('init', repository, '--encrypt')),
        backup: () => varve('backup', image, '--json'),
        restore: async () => {
          const points = JSON.parse((await varve('points', '--json')).stdout) as {
            point: string
          }[]
          const path = join(restored, 'vm.raw')
          return {
            measured: await varve('restore', `vm@${points[1]!.point}`, path),
            path,
          }
        },
      }
    case 'restic':
      return {
        ...common,
        version: () => sh('restic version').trim(),
        init: async () => void (await run('restic', 'init')),
        backup: (number) => run('restic', 'backup', '--tag', `n${number}`, image),
        restore: async () => ({
          measured: await run('restic', 'restore', 'latest', '--tag', 'n2', '--target', restored),
          path: join(restored, image),
        }),
      }
    case 'borg':
      return {
        ...common,
        version: () => sh('borg --version').trim(),
        init: async () => void (await run('borg', 'init', '--encryption', 'repokey-blake2', repository)),
        backup: (number) =>
          run(
            'borg',
            'create',
            '-C',
            'zstd,3',
            '--chunker-params',
            'fixed,4194304',
            '--sparse',
            `${repository}::n${number}`,
            image,
          ),
        restore: async () => ({
          // borg extracts into the folder that it runs in.
          measured: await run(
            'sh',
            '-c',
            `mkdir -p ${restored} && cd ${restored} && exec borg extract --sparse ${repository}::n2`,
          ),
          path: join(restored, image),
        }),
      }
    case 'qemu-img':
      return {
        ...common,
        version: () => sh('qemu-img --version').split('\n')[0]!,
        init: async () => void mkdirSync(repository, { recursive: true }),
        backup: (number) =>
          run(
            'qemu-img',
            'convert',
            '-O',
            'qcow2',
            '-c',
            '-o',
            'compression_type=zstd',
            '-m',
            '4',
            '-W',
            image,
            join(repository, `n${number}.qcow2`),
          ),
        restore: async () => {
          mkdirSync(restored, { recursive: true })
          const path = join(restored, 'vm.raw')
          return {
            measured: await run(
              'qemu-img',
              'convert',
              '-O',
              'raw',
              '-m',
              '4',
              '-W',
              join(repository, 'n2.qcow2'),
              path,
            ),
            path,
          }
        },
      }
    default:
      throw new Error(`no tool ${name}`)
  }
}

// ---------------------------------------------------------------- the run

interface Row {
  readonly what: string
  readonly tool: string
  readonly measured: Measured
  readonly bytes: number
}

const rows: Row[] = []

function note(what: string, name: string, measured: Measured, bytes: number): void {
  rows.push({ what, tool: name, measured, bytes })
  console.error(line(rows.at(-1)!))
}

function line({ what, tool: name, measured, bytes }: Row): string {
  const cells = [
    what.padEnd(20),
    name.padEnd(9),
    measured.seconds.toFixed(2).padStart(8),
    measured.cpuSeconds.toFixed(1).padStart(7),
    measured.peakMiB.toFixed(0).padStart(8),
    (measured.readBytes / 1e9).toFixed(2).padStart(8),
    (bytes / 1e6).toFixed(1).padStart(10),
  ]
  return cells.join(' | ')
}

async function hashOf(path: string): Promise<string> {
  const hash = createHash('sha256')
  const child = spawn('cat', [path], { stdio: ['ignore', 'pipe', 'inherit'] })
  for await (const chunk of child.stdout) hash.update(chunk as Buffer)
  return hash.digest('hex')
}

/** Hashes of all files of the guest and a clean fsck: what equal means where free blocks are not kept. */
function guestDigest(path: string): string {
  const loop = attach(path, '-r')
  try {
    sh(`e2fsck -fn ${loop} && mkdir -p ${mountPoint} && mount -o ro,noload ${loop} ${mountPoint}`)
    try {
      return sh(`cd ${mountPoint} && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum`)
    } finally {
      sh(`umount ${mountPoint}`)
    }
  } finally {
    sh(`losetup -d ${loop}`)
  }
}

console.error(
  `${cpus()[0]?.model}, ${availableParallelism()} processors, load ${loadavg()[0]!.toFixed(2)}, scale ${scale}`,
)
for (const name of tools) {
  console.error(`${name}: ${tool(name).version()}`)
  rmSync(tool(name).repository, { recursive: true, force: true })
}
if (!existsSync(made) || !options.keep) makeImage()
console.error(
  `image: ${(statSync(image).size / 1e9).toFixed(2)} GB virtual, ${((statSync(image).blocks * 512) / 1e9).toFixed(2)} GB allocated`,
)

try {
  const before = new Map<string, number>()
  let hashAtA = ''
  let guestAtA = ''
  const states = ['first backup', 'second, change A', 'third, change B']
  for (const [i, what] of states.entries()) {
    if (i === 1) changeDatabase(Math.max(1, Math.round(100 * scale)), MIB)
    if (i === 2) changeDatabase(Math.max(1, Math.round(25_600 * scale)), 4096)
    if (i === 1) {
      hashAtA = await hashOf(image)
      guestAtA = guestDigest(image)
    }
    for (const name of tools) {
      const current = tool(name)
      if (i === 0) await current.init()
      const measured = await current.backup(i + 1)
      const bytes = folderBytes(current.repository)
      note(what, name, measured, bytes - (before.get(name) ?? 0))
      before.set(name, bytes)
    }
  }
  for (const name of tools) {
    rmSync(restored, { recursive: true, force: true })
    mkdirSync(restored, { recursive: true })
    const current = tool(name)
    const { measured, path } = await current.restore()
    note('restore of A', name, measured, statSync(path).blocks * 512)
    const equal = current.zeroesFree ? guestDigest(path) === guestAtA : (await hashOf(path)) === hashAtA
    if (!equal) throw new Error(`${name}: what was restored differs from the source`)
  }
  if (tools.includes('varve')) await randomReads()
} finally {
  rmSync(restored, { recursive: true, force: true })
  if (!options.keep) rmSync(dir, { recursive: true, force: true })
}

/** Reads of 4 KiB at random places in use, each in a frame that was not decoded before, from the latest point. */
async function randomReads(): Promise<void> {
  await using repository = await openRepository(tool('varve').repository, { password })
  const started = performance.now()
  await using point = await repository.openPoint({ disk: 'vm', point: 'latest' })
  const opened = performance.now() - started
  const used = await point.inUse()
  const blocks = used.size / 4096
  const times: number[] = []
  for (let i = 0; i < 500; i++) {
    let block = randomBytes(6).readUIntLE(0, 6) % Math.floor(blocks)
    let range = 0
    for (; block >= (used.endAt(range) - used.startAt(range)) / 4096; range++)
      block -= (used.endAt(range) - used.startAt(range)) / 4096
    const at = Math.min(used.startAt(range) + Math.floor(block) * 4096, point.size - 4096)
    const before = performance.now()
    await point.read(at, new Uint8Array(4096))
    times.push(performance.now() - before)
  }
  times.sort((a, b) => a - b)
  const share = (part: number): string => times[Math.floor(times.length * part)]!.toFixed(2)
  console.log(
    `varve: point opened in ${opened.toFixed(1)} ms (after the password); 500 random reads of 4 KiB: p50 ${share(0.5)}, p90 ${share(0.9)}, p99 ${share(0.99)} ms`,
  )
}

console.log('what                 | tool      |   wall s |   CPU s | peak MiB |  read GB |   MB added')
for (const row of rows) console.log(line(row))
