/** What a process owes its shell: signals, pipes, terminals, exit codes, help. */
import assert from 'node:assert/strict'
import { open, readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { VERBS } from '../../src/cli/program.ts'
import { width } from '../../src/cli/table.ts'
import { must, needs, Random, run, tempDir } from '../kit/index.ts'
import { EXAMPLES, fails, ok, okJson, onTerminal, ROOT, start, VARVE, varve } from './varve.ts'

const MIB = 1024 * 1024
const MONDAY = join(EXAMPLES, 'monday.qcow2')

/** A raw image of random bytes, which takes a backup a while. */
async function bigImage(path: string, mebibytes: number): Promise<void> {
  const block = Buffer.from(new Random(1).bytes(MIB))
  const file = await open(path, 'w')
  for (let i = 0; i < mebibytes; i++) {
    // Each MiB is another chunk that does not compress.
    for (let at = 0; at < MIB; at += 4096) block.writeUInt32LE(i + 1, at)
    await file.write(block)
  }
  await file.close()
}

/** Long options of a verb and of all that stands below it. */
async function optionsOf(words: readonly string[]): Promise<string[]> {
  const help = await ok([...words, '--help'])
  const options = [...help.matchAll(/^ +(?:-\w, )?(--[a-z-]+)/gm)].map((match) => match[1]!)
  const below = help.split(/^Commands:$/m)[1]?.split(/^\S/m)[0] ?? ''
  for (const [, word] of below.matchAll(/^ {2}([a-z]+) /gm))
    options.push(...(await optionsOf([...words, word!])))
  return options
}

async function folderBytes(path: string): Promise<number> {
  let total = 0
  for (const entry of await readdir(path, { recursive: true, withFileTypes: true })) {
    if (!entry.isFile()) continue
    total += (await stat(join(entry.parentPath, entry.name)).catch(() => ({ size: 0 }))).size
  }
  return total
}

describe('interrupts', () => {
  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    test(`${signal} during a backup: exit 130, no point, a repository that verifies`, async () => {
      await using dir = await tempDir()
      const repo = ['--repo', dir.file('repo')]
      await bigImage(dir.file('big.raw'), 400)
      await ok(['init', dir.file('repo')])
      const before = await folderBytes(dir.file('repo'))
      const { child, done } = start(['backup', dir.file('big.raw'), ...repo, '--json'])
      while (child.exitCode === null && (await folderBytes(dir.file('repo'))) < before + 20 * MIB)
        await sleep(5)
      child.kill(signal)
      const { code, stdout, stderr } = await done
      assert.equal(code, 130, stderr)
      assert.match(stderr, /^varve: CANCELLED: /)
      assert.equal((JSON.parse(stdout) as { error: { code: string } }).error.code, 'CANCELLED')
      assert.deepEqual(await okJson(['points', ...repo]), [])
      await ok(['verify', ...repo])
      await ok(['backup', dir.file('big.raw'), ...repo])
      await ok(['verify', 'big@latest', '--against', dir.file('big.raw'), ...repo])
    })
  }

  test('SIGINT during a restore leaves no file', async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    await bigImage(dir.file('big.raw'), 400)
    await ok(['init', dir.file('repo')])
    await ok(['backup', dir.file('big.raw'), ...repo])
    const { child, done } = start(['restore', 'big', dir.file('out.raw'), ...repo])
    const started = async (): Promise<boolean> =>
      (await readdir(dir.path)).some((name) => name.includes('out.raw'))
    while (child.exitCode === null && !(await started())) await sleep(2)
    child.kill('SIGINT')
    assert.equal((await done).code, 130)
    assert.deepEqual((await readdir(dir.path)).sort(), ['big.raw', 'repo'])
  })

  test('a second SIGINT ends at once', async () => {
    await using dir = await tempDir()
    const repo = ['--repo', dir.file('repo')]
    await bigImage(dir.file('big.raw'), 400)
    await ok(['init', dir.file('repo')])
    const before = await folderBytes(dir.file('repo'))
    const { child, done } = start(['backup', dir.file('big.raw'), ...repo])
    while (child.exitCode === null && (await folderBytes(dir.file('repo'))) < before + 8 * MIB) await sleep(5)
    child.kill('SIGINT')
    child.kill('SIGINT')
    await sleep(1)
    child.kill('SIGINT')
    assert.equal((await done).code, 130)
    await ok(['verify', ...repo])
    await ok(['backup', dir.file('big.raw'), ...repo])
  })
})

describe('pipes', () => {
  test('a reader that goes away is no failure', async () => {
    await using dir = await tempDir()
    const file = await open(dir.file('holes.raw'), 'w')
    for (let i = 0; i < 4000; i++) await file.write(Buffer.alloc(4096, 1), 0, 4096, i * 8192)
    await file.close()
    for (const args of ['map --json', 'map --all', 'map --allocated --ranges', 'inspect', 'inspect --json']) {
      const script = `{ "$1" ${args} "$2"; echo "exit $?" >&2; } | head -c 5`
      const { stderr, stdout } = await run('sh', ['-c', script, 'sh', VARVE, dir.file('holes.raw')])
      assert.equal(stderr, 'exit 0\n', args)
      assert.equal(stdout.length, 5)
    }
  })

  test('work goes on when nobody reads what it prints', async () => {
    await using dir = await tempDir()
    await ok(['init', dir.file('repo')])
    await must('sh', [
      '-c',
      '"$1" backup "$2" --json --repo "$3" | true',
      'sh',
      VARVE,
      MONDAY,
      dir.file('repo'),
    ])
    assert.equal((await okJson<unknown[]>(['points', '--repo', dir.file('repo')])).length, 1)
  })

  test('a full disk behind stdout is a failure', async () => {
    const { code, stderr } = await run('sh', ['-c', '"$1" inspect "$2" >/dev/full', 'sh', VARVE, MONDAY])
    assert.equal(code, 1)
    assert.match(stderr, /^varve: IO: Cannot write stdout: .*ENOSPC/)
  })

  test('progress and colours stay out of a pipe', async () => {
    await using dir = await tempDir()
    await bigImage(dir.file('big.raw'), 100)
    await ok(['init', dir.file('repo')])
    // `ok` fails on anything on stderr.
    const text = await ok(['backup', dir.file('big.raw'), '--repo', dir.file('repo')])
    assert.ok(!text.includes('\x1b') && !text.includes('\r'))
  })
})

describe('a terminal', { skip: needs('script') }, () => {
  test('sees progress of what matters, with rate and time left, and none of it afterwards', async () => {
    await using dir = await tempDir()
    await bigImage(dir.file('big.raw'), 400)
    await ok(['init', dir.file('repo')])
    const command = `${VARVE} backup big.raw --repo repo`
    const { code, raw, text } = await onTerminal(command, [], { cwd: dir.path })
    assert.equal(code, 0, text)
    const seen = raw.replaceAll('\x1b', '␛')
    assert.match(seen, /\rbig \S.* +\d+% · [\d.]+ [KMG]iB of 400 MiB/)
    assert.match(seen, /[\d.]+ [KMG]iB\/s · \d+:\d\d left␛\[K/)
    assert.match(seen, /\r␛\[K[^\r]*✓/, 'the line is taken away before the result')
    assert.match(seen, /␛\[32m✓/, 'colours on a terminal')
    const drawn = seen.split(/[\r\n]/).filter((line) => line.includes('·') && line.endsWith('␛[K'))
    assert.ok(drawn.length > 3)
    for (const line of drawn) assert.ok(width(line.slice(0, -3)) < 100, line)
    const plain = await onTerminal(`env NO_COLOR=1 ${VARVE} points --repo repo`, [], { cwd: dir.path })
    assert.ok(!plain.raw.includes('\x1b['))
  })

  test('is asked for the password, without echo; twice for a new one', async () => {
    await using dir = await tempDir()
    const init = await onTerminal(
      `${VARVE} init --encrypt repo`,
      [
        { expect: /New password for repo: /, send: 'secret-1\r' },
        { expect: /Once more: /, send: 'secret-2\r' },
        { expect: /the two differ[\s\S]*New password for repo: /, send: 'secret-x\x7f3\r' },
        { expect: /Once more: /, send: 'secret-3\r' },
      ],
      { cwd: dir.path },
    )
    assert.equal(init.code, 0, init.text)
    assert.match(init.text, /Made repository .*, encrypted/)
    assert.doesNotMatch(init.text, /secret/)

    const points = await onTerminal(
      `${VARVE} points --repo repo`,
      [{ expect: /Password of repo: /, send: 'secret-3\r' }],
      { cwd: dir.path },
    )
    assert.equal(points.code, 0, points.text)
    assert.match(points.text, /No restore points yet/)
    assert.doesNotMatch(points.text, /secret/)

    const wrong = await onTerminal(
      `${VARVE} points --repo repo`,
      [{ expect: /Password of repo: /, send: 'secret-4\r' }],
      { cwd: dir.path },
    )
    assert.equal(wrong.code, 1)
    assert.match(wrong.text, /varve: WRONG_PASSWORD: /)

    const interrupted = await onTerminal(
      `${VARVE} points --repo repo`,
      [{ expect: /Password of repo: /, send: 'sec\x03' }],
      { cwd: dir.path },
    )
    assert.equal(interrupted.code, 130, interrupted.text)
  })

  test('gets a long map in part, and is told how to see it all', async () => {
    await using dir = await tempDir()
    const file = await open(dir.file('holes.raw'), 'w')
    for (let i = 0; i < 100; i++) await file.write(Buffer.alloc(4096, 1), 0, 4096, i * 8192)
    await file.close()
    const { text } = await onTerminal(`${VARVE} map holes.raw`, [], { cwd: dir.path })
    assert.match(text, /… and 99 rows more; --all prints them/)
    const all = await onTerminal(`${VARVE} map --all holes.raw`, [], { cwd: dir.path })
    assert.equal(all.text.match(/ (data|zero|absent)\b/g)!.length >= 199, true)
  })

  test('Ctrl-C during a backup stops it cleanly', async () => {
    await using dir = await tempDir()
    await bigImage(dir.file('big.raw'), 400)
    await ok(['init', dir.file('repo')])
    const { code, text } = await onTerminal(
      `${VARVE} backup big.raw --repo repo`,
      [{ expect: /[1-9]\d* MiB of 400 MiB/, send: '\x03' }],
      { cwd: dir.path },
    )
    assert.equal(code, 130, text)
    assert.match(text, /stopping cleanly; once more ends at once/)
    assert.match(text, /varve: CANCELLED: /)
    await ok(['verify', '--repo', dir.file('repo')])
  })
})

describe('the command line', () => {
  test('of wrong usage: exit 2 and a hint', async () => {
    await fails(['bogus'], { code: 'USAGE', exit: 2 })
    await fails(['map'], { code: 'USAGE', exit: 2 })
    await fails(['map', 'a', 'b'], { code: 'USAGE', exit: 2 })
    await fails(['map', '--bogus', 'x'], { code: 'USAGE', exit: 2 })
    await fails(['--bogus'], { code: 'USAGE', exit: 2 })
    await fails(['map', 'x', '--format'], { code: 'USAGE', exit: 2 }, { json: false })
    const { hint } = await fails(['inspect', '--formt', 'raw', 'x'], { code: 'USAGE', exit: 2 })
    assert.match(hint, /Did you mean --format\?.*varve inspect --help/)
    assert.match((await fails(['inspct', 'x'], { code: 'USAGE', exit: 2 })).hint, /inspect/)
    const nothing = await varve([])
    assert.equal(nothing.code, 2)
    assert.equal(nothing.stdout, '')
    assert.match(nothing.stderr, /Usage: varve VERB/)
  })

  test('takes an image whose name starts with a dash after --', async () => {
    await using dir = await tempDir()
    await writeFile(dir.file('--json'), Buffer.alloc(4096))
    const text = await ok(['inspect', '--', '--json'], { cwd: dir.path })
    assert.match(text, /^--json {2}raw/)
  })

  test('--help names every verb; each verb has an example and exit codes, by both ways to ask', async () => {
    const help = await ok(['--help'])
    assert.equal(await ok(['help']), help)
    const files = (await readdir(join(ROOT, 'src/cli/verbs'))).map((name) => name.replace(/\.ts$/, '')).sort()
    assert.ok(files.length >= 10)
    assert.deepEqual(VERBS.map(({ name }) => name).sort(), files, 'every file of verbs/ is a verb')
    for (const { name, summary } of VERBS) {
      assert.match(help, new RegExp(`^ +${name} +`, 'm'))
      const text = await ok([name, '--help'])
      assert.equal(await ok(['help', name]), text)
      assert.match(text, new RegExp(`Usage: varve ${name} `))
      assert.match(text, new RegExp(`\nExamples?:\n +varve ${name} `), summary)
      assert.match(text, /\nExit codes:\n +0 +done\n/)
      assert.match(text, /\n +130 /)
    }
  })

  test('docs/cli.md has every verb and every option', async () => {
    const page = await readFile(join(ROOT, 'docs/cli.md'), 'utf8')
    for (const { name } of VERBS) {
      const section = page.split(/^## /m).find((part) => part.startsWith(`varve ${name}`))
      assert.ok(section, `docs/cli.md has a section "varve ${name}"`)
      const options = await optionsOf([name])
      assert.ok(options.length > 1)
      const common = page.split(/^## /m).find((part) => part.startsWith('Common'))!
      for (const option of options) {
        assert.ok(section.includes(`\`${option}`) || common.includes(`\`${option}`), `${name}: ${option}`)
      }
    }
  })
})
