/**
 * The mutator: golden images with a few bytes wrong. Whatever stands in an image, the answer is one clear error or
 * `assumed`; never a hang, never another exception, never much memory, and never a map that frees what the unmutated
 * image needs where checksums protect it. VARVE_FUZZ_SECONDS (default 60) is shared by all; VARVE_SEED repeats.
 */
import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { Worker } from 'node:worker_threads'
import type { FuzzJob, FuzzMessage } from './worker.ts'

const MiB = 2 ** 20
const SECONDS = Number(process.env['VARVE_FUZZ_SECONDS'] ?? 60)
const SEED = Number(process.env['VARVE_SEED'] ?? Date.now() % 2 ** 31)
const HANG_MS = 20_000
const MEMORY_MIB = 512

/** Byte ranges whose allocation metadata carries checksums: ext4 with metadata_csum; XFS v5. */
const KEEPS: ReadonlyMap<string, readonly (readonly [number, number])[]> = new Map([
  ['disk-gpt-ext4-fat-swap.qcow2', [[5 * MiB, 37 * MiB]]],
  ['disk-xfs-clean.qcow2', [[0, 320 * MiB]]],
])

const goldens = readdirSync(join(import.meta.dirname, '../golden')).filter((name) =>
  /^(disk|image)-/.test(name),
)
const jobs: Omit<FuzzJob, 'seconds'>[] = goldens.flatMap((golden) => {
  const keeps = KEEPS.get(golden)
  const free = { golden, seed: SEED }
  return keeps ? [free, { golden, seed: SEED, keeps }] : [free]
})

describe(`mutated images (VARVE_SEED=${SEED})`, () => {
  test('there are golden images', () => assert.ok(goldens.length >= 10))
  for (const job of jobs) {
    test(`${job.golden}${job.keeps ? ': what is in use stays in use' : ''}`, async () => {
      const result = await runJob({ ...job, seconds: SECONDS / jobs.length })
      assert.ok(result.done > 0, 'no case ran')
      assert.ok(result.rssMiB < MEMORY_MIB, `used ${result.rssMiB} MiB`)
    })
  }
})

async function runJob(job: FuzzJob): Promise<{ done: number; rssMiB: number }> {
  const worker = new Worker(new URL('./worker.ts', import.meta.url), { workerData: job })
  let seed = job.seed
  let watchdog: NodeJS.Timeout | undefined
  try {
    return await new Promise((resolve, reject) => {
      const alive = (): void => {
        clearTimeout(watchdog)
        watchdog = setTimeout(() => reject(new Error(`hangs; repeat with VARVE_SEED=${seed}`)), HANG_MS)
      }
      alive()
      worker.on('message', (message: FuzzMessage) => {
        alive()
        if ('case' in message) seed = message.seed
        else if ('failure' in message) reject(new Error(`VARVE_SEED=${message.seed}: ${message.failure}`))
        else resolve(message)
      })
      worker.on('error', (error) =>
        reject(new Error(`VARVE_SEED=${seed}: ${String(error)}`, { cause: error })),
      )
    })
  } finally {
    clearTimeout(watchdog)
    await worker.terminate()
  }
}
