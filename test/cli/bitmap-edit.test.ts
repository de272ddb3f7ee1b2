/** The editing subcommands of varve bitmap, judged by qemu-img. */
import assert from 'node:assert/strict'
import { writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { must, needs, tempDir } from '../kit/index.ts'
import { fails, ok, okJson } from './varve.ts'

interface Info {
  'format-specific': { data: { bitmaps?: { name: string; granularity: number; flags: string[] }[] } }
}

describe('varve bitmap edits', { skip: needs('qemu-img') }, () => {
  test('add, disable, import, merge, export, remove: qemu-img sees each, and finds nothing wrong', async () => {
    await using dir = await tempDir()
    const image = dir.file('i.qcow2')
    await must('qemu-img', ['create', '-q', '-f', 'qcow2', image, '16M'])
    await ok(['bitmap', 'add', image, 'a', '--granularity', '128K'])
    await ok(['bitmap', 'disable', image, 'a'])
    await writeFile(dir.file('r.json'), JSON.stringify([{ start: 70_000, length: 10 }]))
    await ok(['bitmap', 'import', image, 'b', '--ranges', dir.file('r.json'), '--granularity', '4K'])
    assert.deepEqual(await okJson(['bitmap', 'export', image, 'b']), [{ start: 69_632, length: 4096 }])
    await ok(['bitmap', 'merge', image, 'a', 'b'])
    assert.deepEqual(await okJson(['bitmap', 'export', image, 'a']), [{ start: 0, length: 131_072 }])
    await ok(['bitmap', 'clear', image, 'b'])
    assert.deepEqual(await okJson(['bitmap', 'export', image, 'b']), [])
    await fails(['bitmap', 'add', image, 'a'], { code: 'EXISTS', exit: 1 })
    await fails(['bitmap', 'remove', image, 'zz'], { code: 'NOT_FOUND', exit: 10 })
    await fails(['bitmap', 'add', image, 'c', '--granularity', '3K'], { code: 'USAGE', exit: 2 })
    const info = JSON.parse(await must('qemu-img', ['info', '--output=json', image])) as Info
    assert.deepEqual(info['format-specific'].data.bitmaps, [
      { flags: [], name: 'a', granularity: 131_072 },
      { flags: ['auto'], name: 'b', granularity: 4096 },
    ])
    await must('qemu-img', ['check', image])
    for (const name of ['a', 'b']) await ok(['bitmap', 'remove', image, name])
    assert.match(await ok(['bitmap', 'list', image]), /No bitmaps/)
    assert.match(await ok(['bitmap', 'repair', image]), /nothing to repair/)
    await must('qemu-img', ['check', image])
  })
})
