import assert from 'node:assert/strict'
import { test } from 'node:test'
import { renderProgress } from './progress.ts'
import { width } from './table.ts'

const MIB = 1024 * 1024

test('renderProgress() says phase, share, bytes that matter, rate and time left', () => {
  const line = renderProgress(
    'web01',
    { phase: 'read', doneBytes: 300 * MIB, totalBytes: 1200 * MIB },
    100 * MIB,
    120,
  )
  assert.match(line, /^web01 read ━+─+ +25% · 300 MiB of 1.17 GiB · 100 MiB\/s · 0:09 left$/)
})

test('renderProgress() never takes more columns than there are', () => {
  for (let columns = 1; columns < 130; columns++) {
    for (const totalBytes of [0, 5000 * MIB]) {
      const line = renderProgress(
        'web01',
        { phase: 'read', doneBytes: 77 * MIB, totalBytes },
        33 * MIB,
        columns,
      )
      assert.ok(width(line) <= columns, `${columns}: ${line}`)
    }
  }
})

test('renderProgress() without a total claims neither share nor time', () => {
  assert.equal(renderProgress('', { phase: 'scan', doneBytes: 1024, totalBytes: 0 }, 0, 80), 'scan 1 KiB')
})
