/** npm start: the example from beginning to end, and `npm start -- ARGUMENTS`. */
import assert from 'node:assert/strict'
import { mkdir, readdir, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { must, needs, run, tempDir } from '../kit/index.ts'
import { EXAMPLES, onTerminal, ROOT } from './varve.ts'

const START = join(ROOT, 'scripts/start.sh')

test('the example backs up twice, verifies, restores, finds both equal, and says what is next', async () => {
  await using dir = await tempDir()
  const { code, stdout, stderr } = await run('sh', [START], { env: { TMPDIR: dir.path } })
  const text = stdout.toString()
  assert.equal(code, 0, text + stderr)
  assert.equal(stderr, '')
  const [folder] = await readdir(dir.path)
  assert.ok(folder && text.includes(join(dir.path, folder)), 'it tells where it works')
  const stored = [...text.matchAll(/stored +\S+ \S+ +(\d+) new chunks?, (\d+) reused/g)].map((match) =>
    match.slice(1).map(Number),
  )
  assert.equal(stored.length, 2)
  assert.ok(stored[0]![0]! > stored[1]![0]! && stored[1]![1]! > 0, 'the second stores only what is new')
  for (const word of [
    'skipped',
    'everything is whole: 2 points',
    'equals the image',
    '✓ equal, byte for byte',
  ]) {
    assert.ok(text.includes(word), word)
  }
  assert.match(text, /Done in \d+ s\. Next:\n +\S*varve inspect /)
  assert.deepEqual((await readdir(join(dir.path, folder))).sort(), [
    'monday.qcow2',
    'repo',
    'restored.raw',
    'source.raw',
    'tuesday.qcow2',
  ])
})

test('arguments go to varve, with paths as the person means them', async () => {
  await using dir = await tempDir()
  await mkdir(dir.file('sub'))
  await writeFile(dir.file('sub/disk image.raw'), Buffer.alloc(4096))
  const { code, stdout, stderr } = await run('sh', [START, 'inspect', 'sub/disk image.raw'], {
    cwd: ROOT,
    env: { INIT_CWD: dir.path },
  })
  assert.equal(code, 0, stderr)
  assert.match(stdout.toString(), /^sub\/disk image\.raw {2}raw · 4 KiB/)
  assert.equal((await run('sh', [START, 'inspect', 'no-such'], { cwd: ROOT })).code, 10)
})

test('Ctrl-C ends the example', { skip: needs('script') }, async () => {
  await using dir = await tempDir()
  const { code, text } = await onTerminal(`env TMPDIR=${dir.path} sh ${START}`, [
    { expect: /varve backup monday/, send: '\x03' },
  ])
  assert.notEqual(code, 0, text)
  assert.doesNotMatch(text, /Done in/)
})

test('the example images are small, sound, and one disk in two states', {
  skip: needs('qemu-img'),
}, async () => {
  for (const name of ['monday.qcow2', 'tuesday.qcow2']) {
    const path = join(EXAMPLES, name)
    assert.ok((await stat(path)).size < 1024 * 1024)
    await must('qemu-img', ['check', '-q', path])
  }
  const info = JSON.parse(
    await must('qemu-img', ['info', '--output=json', join(EXAMPLES, 'tuesday.qcow2')]),
  ) as Record<string, unknown>
  assert.equal(info['backing-filename'], 'monday.qcow2')
  assert.equal(info['backing-filename-format'], 'qcow2')
})
