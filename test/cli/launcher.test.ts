import assert from 'node:assert/strict'
import { chmod, cp, mkdir, readdir, symlink, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { test } from 'node:test'
import { run, tempDir } from '../kit/index.ts'
import { ok, ROOT, VARVE } from './varve.ts'

test('bin/varve says its version, as package.json has it', async () => {
  assert.match(await ok(['--version']), /^varve \d+\.\d+\.\d+\n$/)
})

test('bin/varve works through symbolic links and from any folder', async () => {
  await using dir = await tempDir()
  await mkdir(dir.file('bin'))
  await symlink(VARVE, dir.file('real'))
  await symlink('../real', dir.file('bin/varve'))
  for (const [command, cwd] of [
    [dir.file('bin/varve'), '/'],
    ['bin/varve', dir.path],
    ['./varve', dir.file('bin')],
  ] as const) {
    const { code, stdout, stderr } = await run(command, ['--version'], { cwd })
    assert.equal(code, 0, stderr)
    assert.match(stdout.toString(), /^varve /)
  }
  const byPath = await run('varve', ['--version'], {
    env: { PATH: `${dir.file('bin')}:${process.env['PATH']}` },
  })
  assert.equal(byPath.code, 0, byPath.stderr)
})

/** A folder that looks like a checkout or a package, with the launcher in it. */
async function fakeRoot(root: string, main: string): Promise<void> {
  await mkdir(join(root, 'bin'), { recursive: true })
  await mkdir(dirname(join(root, main)), { recursive: true })
  await cp(VARVE, join(root, 'bin/varve'))
  await writeFile(join(root, main), 'console.log(process.execPath, ...process.argv.slice(2))\n')
}

async function fakeNode(path: string, version: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true })
  await writeFile(path, `#!/bin/sh\necho ${version}\n`)
  await chmod(path, 0o755)
}

/** The tools that the launcher itself needs, and no node. */
async function bareTools(folder: string): Promise<string> {
  await mkdir(folder, { recursive: true })
  for (const tool of ['sh', 'readlink']) {
    const { stdout } = await run('sh', ['-c', `command -v ${tool}`])
    await symlink(stdout.toString().trim(), join(folder, tool))
  }
  return folder
}

test('bin/varve says plainly that Node is missing or too old, and what to do', async () => {
  await using dir = await tempDir()
  const tools = await bareTools(dir.file('tools'))
  await fakeRoot(dir.file('checkout'), 'src/cli/main.ts')
  await writeFile(dir.file('checkout/package-lock.json'), '{}')
  const none = await run(dir.file('checkout/bin/varve'), [], { env: { PATH: tools } })
  assert.equal(none.code, 13)
  assert.match(none.stderr, /^varve: UNSUPPORTED: Cannot start: found Node\.js none, expected 24 or newer\n/)
  assert.match(none.stderr, /npm ci/)

  await fakeNode(dir.file('old/node'), 'v20.20.2')
  const old = await run(dir.file('checkout/bin/varve'), [], { env: { PATH: `${dir.file('old')}:${tools}` } })
  assert.equal(old.code, 13)
  assert.match(old.stderr, /found Node\.js v20\.20\.2/)

  await fakeRoot(dir.file('package'), 'dist/cli/main.js')
  const packaged = await run(dir.file('package/bin/varve'), [], { env: { PATH: tools } })
  assert.equal(packaged.code, 13)
  assert.match(packaged.stderr, /Install Node\.js 24/)
})

test('bin/varve says that packages are not installed, and that its program is missing', async () => {
  await using dir = await tempDir()
  const path = `${dirname(process.execPath)}:${await bareTools(dir.file('tools'))}`
  await fakeRoot(dir.file('checkout'), 'src/cli/main.ts')
  const bare = await run(dir.file('checkout/bin/varve'), [], { env: { PATH: path } })
  assert.equal(bare.code, 10)
  assert.match(bare.stderr, /packages .* are not installed\n.*npm ci/)

  await mkdir(dir.file('empty/bin'), { recursive: true })
  await cp(VARVE, dir.file('empty/bin/varve'))
  const empty = await run(dir.file('empty/bin/varve'), [], { env: { PATH: path } })
  assert.equal(empty.code, 1)
  assert.match(empty.stderr, /found neither src\/cli\/main\.ts nor dist\/cli\/main\.js/)
})

test('bin/varve of a package takes the Node that npm put beside it, or inside', async () => {
  await using dir = await tempDir()
  const tools = await bareTools(dir.file('tools'))
  const varve = dir.file('node_modules/varve')
  await fakeRoot(varve, 'dist/cli/main.js')
  await writeFile(join(varve, 'package.json'), '{"type":"module"}')
  const beside = dir.file('node_modules/node-linux-test/bin')
  await mkdir(beside, { recursive: true })
  await symlink(process.execPath, join(beside, 'node'))
  const { code, stdout, stderr } = await run(join(varve, 'bin/varve'), ['a b', '--c'], {
    env: { PATH: tools },
  })
  assert.equal(code, 0, stderr)
  assert.equal(stdout.toString(), `${process.execPath} a b --c\n`)

  // One that does not run here (another processor or C library) is passed over.
  await mkdir(join(varve, 'node_modules/node-linux-other/bin'), { recursive: true })
  await writeFile(join(varve, 'node_modules/node-linux-other/bin/node'), 'not a program')
  await chmod(join(varve, 'node_modules/node-linux-other/bin/node'), 0o755)
  assert.equal((await run(join(varve, 'bin/varve'), [], { env: { PATH: tools } })).code, 0)
})

test('bin/varve keeps compiled code in the cache folder, and does without where it has none', async () => {
  await using dir = await tempDir()
  await ok(['--version'], { env: { XDG_CACHE_HOME: dir.path, NODE_COMPILE_CACHE: '' } })
  assert.ok((await readdir(dir.file('varve'))).length > 0)
  await ok(['--version'], { env: { XDG_CACHE_HOME: '', HOME: '', NODE_COMPILE_CACHE: '' } })
  await ok(['--version'], { env: { XDG_CACHE_HOME: '/proc/no-such-folder', NODE_COMPILE_CACHE: '' } })
  assert.ok(!(await readdir(ROOT)).includes('varve'), 'nothing is left in the checkout')
})
