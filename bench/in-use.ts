/**
 * What does the in-use map of a 20 GiB file system cost, as a whole process, against the tools that read the same
 * bitmaps? To reach: under 0.35 s, and at most 1.5 times 0.3 MB (ext4), 0.04 MB (XFS), 1.6 MB (Btrfs), 1.0 MB (NTFS).
 *
 * Makes (once; as root, for the loop mount) a sparse image with 11,000 files of random content, 4 GB, every fourth
 * deleted again. Then `varve map --in-use --ranges`, `partclone.* -D` (and `dumpe2fs`) over it, each several times
 * with the image out of the page cache. Prints wall time (best and median), CPU time, the reads of the image and
 * their bytes (counted by strace in a run of its own), how many bytes each says are in use, and the best time as a
 * ratio to varve's.
 *
 *   node bench/in-use.ts [--type ext4|xfs|btrfs|ntfs] [--dir /tmp/varve-bench-in-use] [--gib 20] [--files 11000] [--rounds 5]
 *
 * The image takes 4 GB of room and stays in the folder for the next run; its name says how it was made.
 */
import { spawnSync } from 'node:child_process'
import {
  closeSync,
  existsSync,
  ftruncateSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  renameSync,
  rmdirSync,
  rmSync,
  unlinkSync,
  writeSync,
} from 'node:fs'
import { availableParallelism, loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'

const { values: options } = parseArgs({
  options: {
    dir: { type: 'string', default: join(tmpdir(), 'varve-bench-in-use') },
    type: { type: 'string', default: 'ext4' },
    gib: { type: 'string', default: '20' },
    files: { type: 'string', default: '11000' },
    rounds: { type: 'string', default: '5' },
  },
})
const MKFS: Readonly<Record<string, readonly string[]>> = {
  ext4: ['mke2fs', '-q', '-F', '-t', 'ext4'],
  xfs: ['mkfs.xfs', '-q'],
  btrfs: ['mkfs.btrfs', '-q'],
  ntfs: ['mkntfs', '-q', '-Q', '-F', '-p', '0', '-H', '0', '-S', '0'],
}
const { type } = options
const mkfs = MKFS[type]
if (!mkfs) throw new Error(`--type ${type}: expected one of ${Object.keys(MKFS).join(', ')}`)
const gib = Number(options.gib)
const files = Number(options.files)
const rounds = Number(options.rounds)
process.env['PATH'] = `${process.env['PATH']}:/usr/sbin:/sbin`
process.env['LC_ALL'] = 'C.UTF-8'

// ---------------------------------------------------------------- the image

/** Numbers that follow from the seed: mulberry32. */
function random(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
}

function must(command: string, args: readonly string[]): string {
  const result = spawnSync(command, args, { encoding: 'utf8' })
  if (result.error) throw result.error
  if (result.status !== 0) throw new Error(`${command} ${args.join(' ')}: ${result.stderr}`)
  return result.stdout
}

function fill(mountPoint: string): void {
  const next = random(1)
  const pool = new Uint32Array(1 << 20).map(() => next() * 2 ** 32)
  const bytes = new Uint8Array(pool.buffer)
  const deleted: string[] = []
  for (let i = 0; i < files; i++) {
    const folder = join(mountPoint, `d${i % 200}`)
    if (i < 200) mkdirSync(folder)
    const name = join(folder, `f${i}`)
    // From 1 KB to 3 MB, most of them small: 4 GB in 11,000.
    let left = Math.floor(Math.exp(next() * 8 + 5.5) * 4) + 1
    const file = openSync(name, 'w')
    while (left > 0) {
      const from = Math.floor(next() * (bytes.length / 2))
      left -= writeSync(file, bytes, from, Math.min(left, bytes.length - from))
    }
    closeSync(file)
    if (next() < 0.25) deleted.push(name)
  }
  for (const name of deleted) unlinkSync(name)
}

/** The image, made if it is not there. */
function prepare(): string {
  mkdirSync(options.dir, { recursive: true })
  const image = join(options.dir, `${type}-${gib}g-${files}-files.raw`)
  if (existsSync(image)) return image
  console.error(`making ${image} …`)
  const making = `${image}.making`
  rmSync(making, { force: true })
  const file = openSync(making, 'w')
  ftruncateSync(file, gib * 2 ** 30)
  closeSync(file)
  must(mkfs![0]!, [...mkfs!.slice(1), making])
  const mountPoint = mkdtempSync(join(tmpdir(), 'varve-mount-'))
  try {
    // ntfs-3g does without a loop device.
    if (type === 'ntfs') must('ntfs-3g', [making, mountPoint])
    else must('mount', ['-o', 'loop', making, mountPoint])
    try {
      fill(mountPoint)
    } finally {
      must('umount', [mountPoint])
    }
  } finally {
    rmdirSync(mountPoint)
  }
  renameSync(making, image)
  return image
}

// ---------------------------------------------------------------- the runs

interface Tool {
  readonly name: string
  readonly command: string
  readonly args: (image: string, scratch: string) => readonly string[]
  /** Bytes in use by what it printed or wrote. */
  readonly inUse: (stdout: string, scratch: string) => number
}

const ALL_TOOLS: readonly (Tool & { readonly only?: string })[] = [
  {
    name: 'varve map --in-use',
    command: join(import.meta.dirname, '..', 'bin', 'varve'),
    args: (image) => ['map', image, '--in-use', '--ranges'],
    inUse: (stdout) =>
      stdout
        .trim()
        .split('\n')
        .reduce((sum, line) => sum + Number(line.split(' ')[1]), 0),
  },
  {
    name: 'dumpe2fs',
    only: 'ext4',
    command: 'dumpe2fs',
    args: (image) => [image],
    inUse(stdout) {
      const field = (name: string): number => Number(new RegExp(`^${name}: *(\\d+)`, 'm').exec(stdout)?.[1])
      let free = 0
      for (const [, list] of stdout.matchAll(/^ {2}Free blocks: (.*)$/gm)) {
        for (const [, from, to] of list!.matchAll(/(\d+)(?:-(\d+))?/g))
          free += Number(to ?? from) - Number(from) + 1
      }
      return (field('Block count') - free) * field('Block size')
    },
  },
  {
    name: `partclone.${type} -D`,
    command: `partclone.${type}`,
    args: (image, scratch) => [
      '-D',
      '-s',
      image,
      '-o',
      join(scratch, 'domain'),
      '-L',
      '/dev/null',
      '-q',
      '-F',
    ],
    inUse: (_, scratch) =>
      Array.from(readFileSync(join(scratch, 'domain'), 'utf8').matchAll(/^0x\w+\s+(0x\w+)\s+\+/gm)).reduce(
        (sum, [, length]) => sum + Number(length),
        0,
      ),
  },
]

const TOOLS = ALL_TOOLS.filter(({ only }) => only === undefined || only === type)

/** Takes the image out of the page cache, as dd does on request. */
function dropCache(image: string): void {
  must('dd', [
    `of=${image}`,
    'oflag=nocache',
    'conv=notrunc,fdatasync',
    'count=0',
    'status=none',
    'if=/dev/null',
  ])
}

interface Run {
  readonly wall: number
  readonly cpu: number
  readonly stdout: string
}

function time(tool: Tool, image: string, scratch: string): Run {
  rmSync(join(scratch, 'domain'), { force: true })
  dropCache(image)
  const from = performance.now()
  // `times` of a shell that runs nothing else: the CPU time of its only child.
  const result = spawnSync(
    'bash',
    ['-c', '"$@"; code=$?; times >&3; exit $code', 'bash', tool.command, ...tool.args(image, scratch)],
    {
      encoding: 'utf8',
      maxBuffer: 1 << 28,
      stdio: ['ignore', 'pipe', 'pipe', 'pipe'],
    },
  )
  const wall = (performance.now() - from) / 1000
  if (result.status !== 0) throw new Error(`${tool.name}: exit ${result.status}: ${result.stderr}`)
  const children = (result.output[3] ?? '').trim().split('\n')[1] ?? ''
  const cpu = Array.from(children.matchAll(/(\d+)m([\d.]+)s/g)).reduce(
    (sum, [, m, s]) => sum + Number(m) * 60 + Number(s),
    0,
  )
  return { wall, cpu, stdout: result.stdout }
}

/** Reads of the image and their bytes. */
function count(tool: Tool, image: string, scratch: string): { reads: number; bytes: number } {
  const log = join(scratch, 'strace')
  dropCache(image)
  must('strace', [
    '-f',
    '-qq',
    '-o',
    log,
    '-P',
    image,
    '-e',
    'trace=read,pread64,readv,preadv,preadv2',
    tool.command,
    ...tool.args(image, scratch),
  ])
  let [reads, bytes] = [0, 0]
  for (const [, result] of readFileSync(log, 'utf8').matchAll(/= (\d+)$/gm)) {
    reads++
    bytes += Number(result)
  }
  return { reads, bytes }
}

function has(command: string): boolean {
  return spawnSync('sh', ['-c', 'command -v "$1"', 'sh', command]).status === 0
}

const image = prepare()
const scratch = mkdtempSync(join(tmpdir(), 'varve-bench-'))
try {
  console.log(
    `${gib} GiB ${type}, ${files} files; Node ${process.version}, ${availableParallelism()} CPUs, load ${loadavg()[0]!.toFixed(1)}; best and median of ${rounds}`,
  )
  console.log(
    [
      'tool'.padEnd(20),
      ...['best s', 'median s', 'CPU s', 'reads', 'MB read', 'GB in use', 'ratio'].map((cell) =>
        cell.padStart(9),
      ),
    ].join('  '),
  )
  let own = 0
  for (const tool of TOOLS) {
    if (!has(tool.command)) {
      console.log(`${tool.name.padEnd(20)}  not installed`)
      continue
    }
    const runs = Array.from({ length: rounds }, () => time(tool, image, scratch)).sort(
      (a, b) => a.wall - b.wall,
    )
    const inUse = tool.inUse(runs[0]!.stdout, scratch)
    const io = has('strace') ? count(tool, image, scratch) : undefined
    own ||= runs[0]!.wall
    const cells = [
      runs[0]!.wall.toFixed(3),
      runs[Math.floor(rounds / 2)]!.wall.toFixed(3),
      Math.min(...runs.map((run) => run.cpu)).toFixed(2),
      io ? `${io.reads}` : '?',
      io ? (io.bytes / 1e6).toFixed(3) : '?',
      (inUse / 1e9).toFixed(4),
      (runs[0]!.wall / own).toFixed(2),
    ]
    console.log([tool.name.padEnd(20), ...cells.map((cell) => cell.padStart(9))].join('  '))
  }
} finally {
  rmSync(scratch, { recursive: true, force: true })
}
