import assert from 'node:assert/strict'
import { open, readFile, rmdir, writeFile } from 'node:fs/promises'
import { describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  ERRORS,
  type ErrorCode,
  fromSystem,
  isVarveError,
  assert as ours,
  throwIfAborted,
  VarveError,
} from './errors.ts'
import { LIMITS, within } from './limits.ts'

describe('the table of errors', () => {
  test('has sane rows', () => {
    for (const [code, row] of Object.entries(ERRORS)) {
      assert.match(code, /^[A-Z][A-Z_]*$/)
      assert.ok([1, 2, 3, 10, 11, 12, 13, 130].includes(row.exit), code)
      assert.ok(row.http === 207 || (row.http >= 400 && row.http <= 599), code)
      assert.match(row.whatToDo, /^[A-Z].*[.]$/, `${code} says what to do in a sentence`)
    }
  })
})

describe('VarveError', () => {
  test('carries code, fields, cause, hint and exit code', () => {
    const cause = new Error('below')
    const error = new VarveError('CORRUPT', 'Cannot read x', { cause, fields: { offset: 5 } })
    assert.ok(error instanceof Error)
    assert.equal(error.cause, cause)
    assert.deepEqual(error.fields, { offset: 5 })
    assert.equal(error.hint, ERRORS.CORRUPT.whatToDo)
    assert.equal(error.exitCode, 12)
    assert.equal(new VarveError('IO', 'x', { hint: 'do this' }).hint, 'do this')
    assert.ok(!('cause' in new VarveError('IO', 'x')), 'no cause is no property')
  })

  test('isVarveError() asks for any of the codes', () => {
    const error = new VarveError('IO', 'x')
    assert.ok(isVarveError(error) && isVarveError(error, 'IO') && isVarveError(error, 'CORRUPT', 'IO'))
    assert.ok(!isVarveError(error, 'CORRUPT') && !isVarveError(new Error('x')) && !isVarveError(undefined))
  })

  test('assert() throws INTERNAL', () => {
    ours(true, 'x')
    assert.throws(
      () => ours(false, 'the sky is up'),
      (error) => isVarveError(error, 'INTERNAL') && /the sky/.test(String(error)),
    )
  })
})

describe('fromSystem()', () => {
  test('knows what Node really throws', async () => {
    const cases: readonly (readonly [ErrorCode, () => Promise<unknown>])[] = [
      ['NOT_FOUND', () => readFile('/nowhere/at/all')],
      ['NOT_FOUND', () => readFile('/etc/passwd/x')],
      ['EXISTS', () => open('/etc/passwd', 'wx')],
      ['IO', () => readFile('/etc')],
      ['IO', () => rmdir('/usr')],
      ['CANCELLED', () => sleep(1000, undefined, { signal: AbortSignal.abort() })],
      ['CANCELLED', () => writeFile('/dev/null', 'x', { signal: AbortSignal.abort() })],
      ['NO_SPACE', () => writeFile('/dev/full', 'x')],
    ]
    for (const [code, work] of cases) {
      const error = await work().then(
        () => assert.fail(`${code}: nothing was thrown`),
        (thrown: unknown) => thrown,
      )
      const found = fromSystem(error, 'use', '/the/path')
      assert.equal(found.code, code, String(error))
      assert.match(found.message, /^Cannot use \/the\/path: /)
      assert.equal(found.cause, error)
      assert.equal(found.fields['path'], '/the/path')
    }
  })

  test('sorts errno into codes', () => {
    const errno: Record<string, ErrorCode> = {
      ENOENT: 'NOT_FOUND',
      EACCES: 'ACCESS_DENIED',
      EPERM: 'ACCESS_DENIED',
      EEXIST: 'EXISTS',
      ENOSPC: 'NO_SPACE',
      EDQUOT: 'NO_SPACE',
      EFBIG: 'NO_SPACE',
      EROFS: 'READ_ONLY',
      EBUSY: 'LOCKED',
      EAGAIN: 'LOCKED',
      ETXTBSY: 'LOCKED',
      EOPNOTSUPP: 'UNSUPPORTED',
      ENOSYS: 'UNSUPPORTED',
      EIO: 'IO',
      EMFILE: 'IO',
    }
    for (const [name, code] of Object.entries(errno)) {
      const found = fromSystem(
        Object.assign(new Error(`${name}: x, read '/p'`), { code: name }),
        'read',
        '/p',
      )
      assert.equal(found.code, code, name)
      assert.equal(found.fields['errno'], name)
    }
  })

  test('leaves ours as they are and takes anything else', () => {
    const mine = new VarveError('LIMIT', 'x')
    assert.equal(fromSystem(mine, 'read', '/p'), mine)
    assert.equal(fromSystem('text', 'read', '/p').message, 'Cannot read /p: text')
    assert.equal(fromSystem(undefined, 'read', '/p').code, 'IO')
    assert.equal(fromSystem(null, 'read', '/p').code, 'IO')
  })
})

test('throwIfAborted() throws CANCELLED with the reason, once the signal has fired', () => {
  throwIfAborted(undefined)
  const controller = new AbortController()
  throwIfAborted(controller.signal)
  controller.abort('because')
  assert.throws(
    () => throwIfAborted(controller.signal),
    (error) => isVarveError(error, 'CANCELLED') && error.cause === 'because',
  )
})

test('within() lets through integers from 0 to the limit', () => {
  assert.equal(within(0, 5, 'x'), 0)
  assert.equal(within(5, 5, 'x'), 5)
  for (const bad of [-1, 6, 1.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 60]) {
    assert.throws(
      () => within(bad, 5, 'the count'),
      (error) => isVarveError(error, 'LIMIT') && /the count/.test(error.message),
    )
  }
  for (const [name, value] of Object.entries(LIMITS))
    assert.ok(Number.isSafeInteger(value) && value > 0, name)
})
