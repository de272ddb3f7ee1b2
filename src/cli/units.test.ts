import assert from 'node:assert/strict'
import { test } from 'node:test'
import { count, formatBytes, formatClock, formatSeconds, formatShare } from './units.ts'

test('formatBytes() keeps three digits and goes on to the next unit before four', () => {
  const cases: readonly (readonly [number, string])[] = [
    [0, '0 B'],
    [1, '1 B'],
    [999, '999 B'],
    [1023, '1023 B'],
    [1024, '1 KiB'],
    [1536, '1.50 KiB'],
    [10_240, '10 KiB'],
    [10_752, '10.5 KiB'],
    [1024 * 999, '999 KiB'],
    [1024 * 1000, '0.98 MiB'],
    [1024 * 1024 - 1, '1.00 MiB'],
    [1024 ** 2, '1 MiB'],
    [1.5 * 1024 ** 3, '1.50 GiB'],
    [123.4 * 1024 ** 3, '123 GiB'],
    [2 ** 53 - 1, '8.00 PiB'],
  ]
  for (const [bytes, text] of cases) assert.equal(formatBytes(bytes), text, String(bytes))
})

test('formatShare() shows no part as nothing and no rest as everything', () => {
  assert.equal(formatShare(0, 100), '0%')
  assert.equal(formatShare(1, 1_000_000), '<1%')
  assert.equal(formatShare(999_999, 1_000_000), '99%')
  assert.equal(formatShare(1_000_000, 1_000_000), '100%')
  assert.equal(formatShare(0, 0), '0%')
  assert.equal(formatShare(1, 2), '50%')
})

test('durations read as people say them', () => {
  assert.equal(formatSeconds(0.004), '4 ms')
  assert.equal(formatSeconds(0.25), '0.25 s')
  assert.equal(formatSeconds(3.21), '3.2 s')
  assert.equal(formatSeconds(42.4), '42 s')
  assert.equal(formatSeconds(245), '4:05')
  assert.equal(formatClock(3723), '1:02:03')
  assert.equal(formatClock(0.2), '0:01')
  assert.equal(formatClock(3600), '1:00:00')
})

test('count() says one of one and many of others', () => {
  assert.equal(count(1, 'row'), '1 row')
  assert.equal(count(0, 'row'), '0 rows')
})
