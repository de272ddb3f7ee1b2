import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { Random } from '../../test/kit/index.ts'
import type { VarveError } from '../base/index.ts'
import { judge, judgeAll, readNodeReport, type Verdict } from './index.ts'

/** State of one bitmap in one image, as the rules speak of it. */
type State = 'absent' | 'good' | 'disabled' | 'transient' | 'inconsistent' | 'disabled transient' | 'busy'

const STATES: readonly State[] = [
  'good',
  'disabled',
  'transient',
  'inconsistent',
  'disabled transient',
  'busy',
]

interface Drawn {
  readonly states: readonly State[]
  readonly granularities: readonly number[]
  readonly sizes: readonly number[]
}

/** Good runs are likely, so that valid bitmaps are drawn too. */
function draw(random: Random): Drawn {
  const depth = 1 + random.below(6)
  const present = random.below(depth + 1)
  const states = Array.from({ length: depth }, (_, at): State => {
    if (random.next() < 0.12) return random.pick(STATES)
    if (random.next() < 0.08) return 'absent'
    return at < present ? 'good' : 'absent'
  })
  return {
    states,
    granularities: states.map(() => (random.next() < 0.1 ? 131_072 : 65_536)),
    sizes: states.map(() => (random.next() < 0.1 ? 2 ** 21 : 2 ** 20)),
  }
}

const node = (at: number): string => `libvirt-${at + 1}-format`

/** As query-named-block-nodes tells it, with what else stands in such a report. */
function report({ granularities, sizes, states }: Drawn, name: string, random: Random): unknown {
  const nodes = states.flatMap((state, at) => {
    const bitmap = {
      name,
      recording: !state.includes('disabled') && state !== 'inconsistent',
      persistent: !state.includes('transient'),
      busy: state === 'busy',
      granularity: granularities[at],
      count: 0,
      ...(state === 'inconsistent' ? { inconsistent: true } : {}),
    }
    const others = [
      { recording: false, persistent: false, busy: false, granularity: 65_536, count: 1 },
      { name: 'other', recording: true, persistent: true, busy: false, granularity: 65_536, count: 1 },
    ]
    const bitmaps = [...(random.next() < 0.5 ? others : []), ...(state === 'absent' ? [] : [bitmap])]
    const below = at + 1 < states.length ? { backing_file: `/i/${at + 1}` } : {}
    // On disk it is always fine: that list must not count.
    const stored = [{ name, flags: ['auto'], granularity: 65_536 }]
    return [
      {
        'node-name': `libvirt-${at + 1}-storage`,
        drv: 'file',
        file: `/i/${at}`,
        image: { filename: `/i/${at}` },
      },
      {
        'node-name': node(at),
        drv: 'qcow2',
        file: `/i/${at}`,
        backing_file_depth: 0,
        ...below,
        image: {
          filename: `/i/${at}`,
          'virtual-size': sizes[at],
          'format-specific': { type: 'qcow2', data: { bitmaps: stored } },
        },
        ...(bitmaps.length > 0 ? { 'dirty-bitmaps': bitmaps } : {}),
      },
    ]
  })
  return random.next() < 0.5 ? nodes : { return: nodes, id: 'libvirt-377' }
}

/** The rules, evaluated by trying every length of the run that they speak of. */
function isValid(states: readonly State[]): boolean {
  for (let run = 1; run <= states.length; run++) {
    const good = states.slice(0, run).every((state) => state === 'good' || state === 'busy')
    if (good && states.slice(run).every((state) => state === 'absent')) return true
  }
  return false
}

/** Every reason as `code@depth`, rule by rule. */
function reasonsOf({ granularities, sizes, states }: Drawn): string[] {
  const at = (test: (state: State, depth: number) => boolean, code: string): string[] =>
    states.flatMap((state, depth) => (test(state, depth) ? [`${code}@${depth}`] : []))
  const has = (state: State): boolean => state !== 'absent'
  return [
    ...(has(states[0]!) ? [] : ['missing-in-top@0']),
    ...at((state, depth) => depth > 0 && !has(state) && states.slice(depth + 1).some(has), 'gap'),
    ...at((state) => state.includes('disabled'), 'disabled'),
    ...at((state) => state.includes('transient'), 'transient'),
    ...at((state) => state === 'inconsistent', 'inconsistent'),
    ...at((state) => state === 'busy', 'busy'),
    ...at(
      (state, depth) => has(state) && has(states[0]!) && granularities[depth] !== granularities[0],
      'granularity-differs',
    ),
    ...at((state, depth) => has(state) && sizes[depth] !== sizes[0], 'size-differs'),
  ].sort()
}

const told = (verdict: Verdict): string[] =>
  verdict.reasons.map(({ code, image }) => `${code}@${Number(image.split('-')[1]) - 1}`).sort()

describe('judge()', () => {
  test('agrees with the rules on random chains, verdict and every reason', () => {
    const random = new Random()
    let valid = 0
    for (let round = 0; round < 3000; round++) {
      const drawn = draw(random)
      const what = `seed ${random.seed}, round ${round}: ${JSON.stringify(drawn)}`
      const nodes = readNodeReport(report(drawn, 'b', random))
      for (const chain of [nodes.chainFrom(node(0)), nodes.chain(drawn.states.map((_, at) => node(at)))]) {
        assert.equal(chain.length, drawn.states.length, what)
        const verdict = judge('b', chain)
        assert.equal(verdict.valid, isValid(drawn.states), what)
        assert.deepEqual(told(verdict), reasonsOf(drawn), what)
        assert.deepEqual(
          verdict.images.map(({ bitmap }) => bitmap !== undefined),
          drawn.states.map((state) => state !== 'absent'),
        )
        for (const { text, whatToDo } of verdict.reasons) assert.ok(text !== '' && whatToDo !== '')
      }
      if (isValid(drawn.states)) valid += 1
    }
    assert.ok(valid > 300 && valid < 2700, `both verdicts are drawn: ${valid}`)
  })

  test('an image that a writer holds makes it unknown, and hides what its file says', () => {
    const [image] = readNodeReport([{ 'node-name': 'a', drv: 'qcow2' }]).chain(['a'])
    const verdict = judge('b', [{ ...image!, heldByWriter: true }])
    assert.equal(verdict.valid, false)
    assert.deepEqual(
      verdict.reasons.map(({ code }) => code),
      ['open-by-writer'],
    )
  })

  test('an empty chain is not valid', () => {
    assert.equal(judge('b', []).valid, false)
    assert.deepEqual(judgeAll([]), [])
  })
})

describe('readNodeReport()', () => {
  const image = (filename: string): Record<string, unknown> => ({ filename, 'virtual-size': 1024 })

  test('a node that the report lacks is an image without bitmaps', () => {
    const chain = readNodeReport([]).chain(['x', 'y'])
    assert.deepEqual(
      chain.map(({ bitmaps, id }) => [id, bitmaps.length]),
      [
        ['x', 0],
        ['y', 0],
      ],
    )
    assert.deepEqual(
      readNodeReport([])
        .chainFrom('x')
        .map(({ id }) => id),
      ['x'],
    )
  })

  test('follows nested backing images, children of newer QEMUs, and stored names where nothing else is told', () => {
    const nodes = [
      { 'node-name': 'top', drv: 'qcow2', image: { ...image('/t'), 'backing-image': image('/m') } },
      {
        'node-name': 'mid',
        drv: 'qcow2',
        image: image('/m'),
        children: [
          { child: 'file', 'node-name': 'f' },
          { child: 'backing', 'node-name': 'base' },
        ],
      },
      { 'node-name': 'base', drv: 'qcow2', image: { ...image('/b'), 'full-backing-filename': '/r' } },
      { 'node-name': 'rawfile', drv: 'file', image: image('/r') },
      { 'node-name': 'raw', drv: 'raw', image: image('/r') },
    ]
    assert.deepEqual(
      readNodeReport(nodes)
        .chainFrom('top')
        .map(({ id }) => id),
      ['top', 'mid', 'base', 'raw'],
    )
  })

  test('does not follow the name in the image where the node was opened without a backing file', () => {
    const nodes = [
      {
        'node-name': 'top',
        drv: 'qcow2',
        backing_file_depth: 0,
        image: { ...image('/t'), 'full-backing-filename': '/m' },
      },
      { 'node-name': 'mid', drv: 'qcow2', backing_file_depth: 0, image: image('/m') },
    ]
    assert.deepEqual(
      readNodeReport(nodes)
        .chainFrom('top')
        .map(({ id }) => id),
      ['top'],
    )
  })

  test('filters over a backing image are not taken for it; two images are not guessed between', () => {
    const top = { 'node-name': 'top', drv: 'qcow2', backing_file: '/m', image: image('/t') }
    const mid = { 'node-name': 'mid', drv: 'qcow2', image: image('/m') }
    const filter = { 'node-name': 'filter', drv: 'copy-before-write', image: image('/m') }
    const ids = (nodes: unknown[]): string[] =>
      readNodeReport(nodes)
        .chainFrom('top')
        .map(({ id }) => id)
    assert.deepEqual(ids([top, filter, mid]), ['top', 'mid'])
    assert.throws(
      () => ids([top, mid, { ...mid, 'node-name': 'again' }]),
      (error: VarveError) => error.code === 'USAGE' && error.hint.includes('--chain'),
    )
  })

  test('ends at a loop with an error, and refuses what is no report', () => {
    const loop = [
      { 'node-name': 'a', drv: 'qcow2', backing_file: '/b', image: image('/a') },
      { 'node-name': 'b', drv: 'qcow2', backing_file: '/a', image: image('/b') },
    ]
    assert.throws(() => readNodeReport(loop).chainFrom('a'), { code: 'CHAIN_LOOP' })
    for (const bad of [undefined, null, 1, 'x', {}, { return: {} }, { error: { class: 'GenericError' } }]) {
      assert.throws(() => readNodeReport(bad), { code: 'CORRUPT' })
    }
  })

  test('fields of other types are as good as missing', () => {
    const nodes = [
      null,
      7,
      { 'node-name': 5 },
      {
        'node-name': 'a',
        drv: 1,
        image: [],
        'dirty-bitmaps': [
          null,
          3,
          {},
          { name: '' },
          { name: 'b', recording: 'yes', count: -1, granularity: 1.5 },
        ],
      },
      { 'node-name': 'c', image: null, 'dirty-bitmaps': {} },
    ]
    const [a, c] = readNodeReport(nodes).chain(['a', 'c'])
    assert.deepEqual(a!.bitmaps, [
      {
        name: 'b',
        recording: false,
        inconsistent: false,
        persistent: false,
        busy: false,
        granularity: 0,
        dirtyBytes: undefined,
      },
    ])
    assert.deepEqual(c!.bitmaps, [])
  })
})
