/**
 * What a map costs on file systems of 4 and 16 TiB (sparse files, made in seconds): bytes read and reads done, which
 * no busy machine changes, and the time and memory of a process of its own. docs/benchmarks.md has figures.
 */
import assert from 'node:assert/strict'
import { truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { CountingDevice, openHostFile } from '../../src/device/index.ts'
import { mapInUse } from '../../src/inuse/index.ts'
import { must, needs, tempDir } from '../kit/index.ts'

const MIB = 2 ** 20
const TIB = 2 ** 40
/** ext4, the file system below, ends a file one block short of 16 TiB. */
const SIXTEEN_TIB = 16 * TIB - MIB

interface Huge {
  readonly name: string
  readonly tool: string
  readonly bytes: number
  readonly args: readonly string[]
  /** Most that the map may read: one and a half times what it does. */
  readonly mostReads: number
  readonly mostBytes: number
  readonly inUse: readonly [least: number, most: number]
}

const HUGE: readonly Huge[] = [
  {
    name: 'ext4 of 16 TiB',
    tool: 'mkfs.ext4',
    bytes: SIXTEEN_TIB,
    args: ['-q', '-F', '-E', 'lazy_itable_init=1,lazy_journal_init=1,nodiscard', '-J', 'size=64'],
    // 131072 groups: descriptors of 64 bytes, and the bitmaps that are initialized, one of each flex group.
    mostReads: 12_400,
    mostBytes: 63 * MIB,
    inUse: [100 * 2 ** 30, 200 * 2 ** 30],
  },
  {
    name: 'XFS of 16 TiB',
    tool: 'mkfs.xfs',
    bytes: SIXTEEN_TIB,
    args: ['-q', '-K', '-l', 'size=64m'],
    mostReads: 100,
    mostBytes: 175_000,
    inUse: [64 * MIB, 80 * MIB],
  },
  {
    name: 'NTFS of 4 TiB',
    tool: 'mkntfs',
    bytes: 4 * TIB,
    args: ['-q', '-Q', '-F', '-p', '0', '-H', '0', '-S', '0'],
    // $Bitmap: one bit for each of 2^30 clusters.
    mostReads: 75,
    mostBytes: 140 * MIB,
    inUse: [128 * MIB, 256 * MIB],
  },
]

describe('cost of a map', () => {
  for (const { name, tool, bytes, args, mostReads, mostBytes, inUse } of HUGE) {
    test(name, { skip: needs(tool) }, async (context) => {
      await using dir = await tempDir()
      const image = dir.file('image')
      await writeFile(image, '')
      await truncate(image, bytes)
      await must(tool, [...args, image])

      await using file = await openHostFile(image)
      const device = new CountingDevice(file)
      const map = await mapInUse(device)
      const { reads, bytesRead } = device.counts
      assert.equal(map.regions[0]!.trust, 'exact', map.regions[0]!.reason?.text ?? '')
      assert.ok(map.inUseBytes > inUse[0] && map.inUseBytes < inUse[1], `${map.inUseBytes} in use`)
      assert.ok(reads <= mostReads, `${reads} reads`)
      assert.ok(bytesRead <= mostBytes, `${bytesRead} bytes`)

      const script = `
        import { openHostFile } from ${source('device')}
        import { mapInUse } from ${source('inuse')}
        await using device = await openHostFile(process.argv[1])
        const from = performance.now()
        await mapInUse(device)
        const { userCPUTime, systemCPUTime, maxRSS } = process.resourceUsage()
        const cpuMs = (userCPUTime + systemCPUTime) / 1000
        console.log(JSON.stringify({ ms: performance.now() - from, cpuMs, rssMiB: maxRSS / 1024 }))`
      const facts = JSON.parse(
        await must(process.execPath, ['--input-type=module', '-e', script, image]),
      ) as Record<'ms' | 'cpuMs' | 'rssMiB', number>
      context.diagnostic(JSON.stringify({ reads, bytesRead, ...facts }))
      // Of the processor's time: a machine that does other work at the same time must not decide.
      assert.ok(facts.cpuMs < 3000, `${facts.cpuMs} ms of the processor`)
      assert.ok(facts.rssMiB < 300, `${facts.rssMiB} MiB`)
    })
  }
})

function source(room: string): string {
  return JSON.stringify(join(import.meta.dirname, `../../src/${room}/index.ts`))
}
