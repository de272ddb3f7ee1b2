/**
 * How long do set operations on a million ranges take? To reach: union and intersect of two sets of a million
 * ranges each together under 100 ms. Run: `node bench/range-set.ts [RANGES]`.
 */
import { Bitmap, RangeSet, RangeSetBuilder } from '../src/extents/index.ts'

const RANGES = Number(process.argv[2] ?? 1_000_000)
const ROUNDS = 7

/** Ranges with gaps, both of changing length, as allocation bitmaps have them. */
function make(seed: number): RangeSet {
  const builder = new RangeSetBuilder()
  let state = seed
  let at = 0
  for (let i = 0; i < RANGES; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    const start = at + 1 + (state >>> 28)
    at = start + 1 + ((state >>> 20) & 31)
    builder.add(start * 4096, at * 4096)
  }
  return builder.build()
}

function report(name: string, work: () => unknown): number {
  const times: number[] = []
  for (let round = 0; round < ROUNDS; round++) {
    const started = performance.now()
    work()
    times.push(performance.now() - started)
  }
  times.sort((a, b) => a - b)
  const [best, median] = [times[0]!, times[Math.floor(ROUNDS / 2)]!]
  console.log(`${name.padEnd(28)} ${best.toFixed(1).padStart(8)} ms   median ${median.toFixed(1)}`)
  return best
}

console.log(`${RANGES} ranges in each set; best of ${ROUNDS} rounds`)
const a = make(1)
const b = make(2)
report('build, ascending input', () => make(3))
const both = report('union', () => a.union(b)) + report('intersect', () => a.intersect(b))
report('subtract', () => a.subtract(b))
report('complement', () => a.complement(0, a.end!))
report('coarsen to 64 KiB', () => a.coarsen(65536))
report('size', () => a.size)
const blocks = Math.ceil(a.end! / 4096)
const inBlocks = new RangeSetBuilder()
for (const { start, end } of a) inBlocks.add(start / 4096, end / 4096)
const ofBlocks = inBlocks.build()
const bitmap = Bitmap.fromRanges(ofBlocks, blocks)
report(`to bitmap of ${blocks} bits`, () => Bitmap.fromRanges(ofBlocks, blocks))
report('from bitmap', () => bitmap.toRanges())
report('count of bitmap', () => bitmap.count)
{
  const shuffled = new Float64Array(RANGES * 2)
  for (let i = 0; i < RANGES; i++) {
    const j = (i * 611_953) % RANGES
    shuffled[i * 2] = a.startAt(j)
    shuffled[i * 2 + 1] = a.endAt(j)
  }
  report('build, shuffled input', () => {
    const builder = new RangeSetBuilder()
    for (let i = 0; i < shuffled.length; i += 2) builder.add(shuffled[i]!, shuffled[i + 1]!)
    return builder.build()
  })
}
console.log(`union + intersect: ${both.toFixed(1)} ms, to reach: under 100 ms for 1000000 ranges`)
process.exitCode = RANGES === 1_000_000 && both >= 100 ? 1 : 0
