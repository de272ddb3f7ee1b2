/**
 * Runs every *.test.ts of src/ and test/ by Node's own runner, a process per file, and ends with the line
 * `N passed, N failed, N skipped`. Failures are printed whole, skips with their reason. Exit 1 when a test failed,
 * when a file held no test, or when nothing ran.
 */
import { readdir } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { join, relative } from 'node:path'
import { run } from 'node:test'
import { inspect } from 'node:util'

const root = join(import.meta.dirname, '..')
const patterns = process.argv.slice(2)
const files = (
  await Promise.all(
    ['src', 'test'].map((folder) => readdir(join(root, folder), { recursive: true, withFileTypes: true })),
  )
)
  .flat()
  .filter((entry) => entry.isFile() && entry.name.endsWith('.test.ts'))
  .map((entry) => join(entry.parentPath, entry.name))
  .filter(
    (path) => patterns.length === 0 || patterns.some((pattern) => relative(root, path).includes(pattern)),
  )
  .sort()

const counts = { passed: 0, failed: 0, skipped: 0 }
const skips = new Map<string, number>()
const seconds = new Map<string, number>()
const seen = new Set<string>()
const started = performance.now()

const failedFiles = new Set<string>()
/** The last that each file's process printed, for a file that fails as a whole. */
const printed = new Map<string, string>()

const stream = run({
  files,
  concurrency: Math.max(2, availableParallelism()),
  timeout: 900_000,
  cwd: root,
})
for await (const event of stream) {
  if (event.type === 'test:stderr' || event.type === 'test:stdout') {
    const { file, message } = event.data
    printed.set(file, ((printed.get(file) ?? '') + message).slice(-4000))
    if (process.env['VARVE_TEST_OUTPUT']) process.stderr.write(message)
    continue
  }
  if (event.type !== 'test:pass' && event.type !== 'test:fail') continue
  const { data } = event
  // `file` is where a test is written down, which for a shared suite is not the file that ran.
  const path = (data as { entryFile?: string }).entryFile ?? data.file ?? ''
  const file = relative(root, path)
  const { error } = data.details as { error?: unknown }
  if (data.details.type === 'suite') {
    if (event.type === 'test:fail' && !isFromSubtests(error)) report(file, data.name, error)
    continue
  }
  // The file's process itself: it fails when a test of it does, which was reported then.
  if (data.name === path) {
    if (event.type === 'test:fail' && !failedFiles.has(file))
      report(file, 'the file', printed.get(path) ?? error)
    continue
  }
  seen.add(path)
  seconds.set(file, (seconds.get(file) ?? 0) + data.details.duration_ms / 1000)
  if (data.skip !== undefined && data.skip !== false) {
    counts.skipped++
    const reason = typeof data.skip === 'string' && data.skip !== '' ? data.skip : 'no reason given'
    skips.set(reason, (skips.get(reason) ?? 0) + 1)
  } else if (event.type === 'test:pass') {
    counts.passed++
  } else if (!isFromSubtests(error)) {
    report(file, data.name, error)
  }
}

function isFromSubtests(error: unknown): boolean {
  return (error as { failureType?: string } | undefined)?.failureType === 'subtestsFailed'
}

function report(file: string, name: string, error: unknown): void {
  counts.failed++
  failedFiles.add(file)
  console.log(`\nFAILED ${file}: ${name}`)
  console.log(inspect((error as { cause?: unknown } | undefined)?.cause ?? error, { depth: 4 }))
}

for (const file of files) if (!seen.has(file)) report(relative(root, file), 'the file', 'it ran no test')
console.log(`\nslowest files (${Math.round((performance.now() - started) / 1000)} s in all):`)
for (const [file, time] of [...seconds].sort((a, b) => b[1] - a[1]).slice(0, 8)) {
  console.log(`  ${time.toFixed(1).padStart(6)} s  ${file}`)
}
for (const [reason, count] of skips) console.log(`skipped ${count}: ${reason}`)
const missing = process.env['VARVE_MISSING_TOOLS']
if (missing) console.log(`missing here, so tests were skipped: ${missing.trim()}`)
console.log(`${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`)
process.exitCode = counts.failed > 0 || counts.passed === 0 ? 1 : 0
