/**
 * The example of `npm start`: a small VM's disk on Monday and on Tuesday (examples/, with the recipe that made it),
 * backed up twice, verified, listed, restored and compared. Every step is a command that a person could type, run
 * as its own process in a temporary folder that stays, so that one can go on there.
 */
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { copyFile, mkdtemp, open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { styleText } from 'node:util'

const root = join(import.meta.dirname, '..')
const varve = join(root, 'bin/varve')
const started = performance.now()
const folder = await mkdtemp(join(tmpdir(), 'varve-example-'))
// A Ctrl-C reaches the command that runs, which ends cleanly; one that comes while none runs ends the example too.
let interrupted = false
process.on('SIGINT', () => {
  interrupted = true
})

function say(text: string): void {
  console.log(`\n${styleText('cyan', '▌')} ${text}`)
}

interface Run {
  /** Takes stdout instead of showing it; nothing is printed then. */
  readonly quiet?: boolean
}

/** Shows and runs one command in the folder; ends the example when it fails. Returns stdout where it was taken. */
async function run(args: readonly string[], { quiet = false }: Run = {}): Promise<string> {
  if (!quiet) console.log(`${styleText('dim', '$')} ${styleText('bold', `varve ${args.join(' ')}`)}`)
  const child = spawn(varve, args, {
    cwd: folder,
    stdio: ['inherit', quiet ? 'pipe' : 'inherit', 'inherit'],
    // The example's repository has no password, whatever the person's others have.
    env: { ...process.env, VARVE_PASSWORD: '' },
  })
  let text = ''
  child.stdout?.setEncoding('utf8').on('data', (piece: string) => {
    text += piece
  })
  const code = await new Promise<number>((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (status) => resolve(interrupted ? 130 : (status ?? 1)))
  })
  if (code !== 0) {
    console.error(
      `\nThe example ended at \`varve ${args.join(' ')}\` (exit ${code}). What it made is in ${folder}`,
    )
    process.exit(code)
  }
  return text
}

/** SHA-256 of the ranges (`start length` a line) of a raw image. */
async function hashOf(name: string, ranges: string): Promise<string> {
  const hash = createHash('sha256')
  const file = await open(join(folder, name))
  try {
    const buffer = Buffer.alloc(1 << 20)
    for (const line of ranges.trim().split('\n')) {
      const [start = 0, length = 0] = line.split(' ').map(Number)
      for (let at = start; at < start + length; ) {
        const { bytesRead } = await file.read(buffer, 0, Math.min(buffer.length, start + length - at), at)
        if (bytesRead === 0) throw new Error(`${name} ends at ${at}`)
        hash.update(buffer.subarray(0, bytesRead))
        at += bytesRead
      }
    }
  } finally {
    await file.close()
  }
  return hash.digest('hex')
}

console.log(styleText('bold', 'varve backs up the blocks of a VM disk that matter, and gives them back.'))
console.log(`This example works in ${styleText('bold', folder)} and stays there.`)
for (const name of ['monday.qcow2', 'tuesday.qcow2']) {
  await copyFile(join(root, 'examples', name), join(folder, name))
}

say(
  "A small VM's disk on Monday. A big folder was deleted on it: the blocks are there, but nobody needs them.",
)
await run(['inspect', 'monday.qcow2'])

say('A repository, and a first backup: it reads what is in use and nothing else.')
await run(['init', 'repo'])
await run(['backup', 'monday.qcow2', '--disk', 'web01', '--repo', 'repo'])

say('A day later (tuesday.qcow2 is a layer over monday.qcow2): only what is new goes into the repository.')
await run(['backup', 'tuesday.qcow2', '--disk', 'web01', '--repo', 'repo'])

say('Everything that is stored is read again and recomputed; then the point is compared with its source.')
await run(['verify', '--repo', 'repo'])
await run(['verify', 'web01@latest', '--against', 'tuesday.qcow2', '--repo', 'repo'])
await run(['points', '--repo', 'repo'])

say('And back: the latest point as a new image.')
await run(['restore', 'web01@latest', 'restored.raw', '--repo', 'repo'])

say('Is it the same disk? The source is made raw too, and what is in use of both is hashed.')
await run(['convert', 'tuesday.qcow2', 'source.raw'])
const ranges = await run(['map', '--in-use', '--ranges', 'tuesday.qcow2'], { quiet: true })
const [source, restored] = [await hashOf('source.raw', ranges), await hashOf('restored.raw', ranges)]
console.log(`  source    ${source}`)
console.log(`  restored  ${restored}`)
if (source !== restored) {
  console.error(
    styleText('red', `The restored disk differs from its source. Please report this; see ${folder}`),
  )
  process.exit(1)
}
console.log(`${styleText('green', '✓')} equal, byte for byte`)

const seconds = ((performance.now() - started) / 1000).toFixed(0)
// The shortest way to type it: relative to where the person stands, if that is in the checkout.
const from = process.env['INIT_CWD'] ?? process.cwd()
const short = relative(from, varve)
const command = short.startsWith('..') ? varve : short
const next: readonly (readonly [string, string])[] = [
  [`${command} inspect YOUR-DISK.qcow2`, 'what is in it, and how much of it matters'],
  [`${command} init /backup/vms`, 'a repository of your own (--encrypt asks for a password)'],
  [`${command} backup YOUR-DISK.qcow2 --repo /backup/vms`, 'a first restore point'],
  [`${command} --help`, 'all verbs; `npm start -- ARGUMENTS` is the same'],
  [`rm -r ${folder}`, 'when you have seen enough'],
]
const widest = Math.max(...next.map(([line]) => line.length))
console.log(`\n${styleText('bold', `Done in ${seconds} s. Next:`)}`)
for (const [line, what] of next) console.log(`  ${line.padEnd(widest)}  ${styleText('dim', what)}`)
