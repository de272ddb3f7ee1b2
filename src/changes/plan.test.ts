import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { Random } from '../../test/kit/index.ts'
import {
  type BitmapAction,
  type BitmapFacts,
  type BitmapPlan,
  type ChainFacts,
  type ImageFacts,
  judge,
  planBackup,
  planCommit,
  planCopy,
  planDelete,
  planPull,
} from './index.ts'

const good = (name: string, more: Partial<BitmapFacts> = {}): BitmapFacts => ({
  name,
  recording: true,
  inconsistent: false,
  persistent: true,
  busy: false,
  granularity: 65_536,
  dirtyBytes: 0,
  ...more,
})

const image = (id: string, bitmaps: readonly BitmapFacts[], format = 'qcow2'): ImageFacts => ({
  id,
  kind: 'node',
  format,
  virtualSize: 2 ** 20,
  bitmaps,
  problems: [],
  heldByWriter: false,
})

const add = (node: string, name: string, granularity = 65_536): BitmapAction => ({
  type: 'block-dirty-bitmap-add',
  data: { node, name, persistent: true, disabled: false, granularity },
})
const remove = (node: string, name: string): BitmapAction => ({
  type: 'block-dirty-bitmap-remove',
  data: { node, name },
})
const merge = (node: string, target: string, ...from: [string, string][]): BitmapAction => ({
  type: 'block-dirty-bitmap-merge',
  data: { node, target, bitmaps: from.map(([source, name]) => ({ node: source, name })) },
})

/** n1 is the top: `new` was made in it, `mid` in n2, `old` before n4 got its overlay. */
const CHAIN: ChainFacts = [
  image('n1', [good('new'), good('mid'), good('old'), good('bad')]),
  image('n2', [good('mid', { granularity: 131_072 }), good('old'), good('bad', { recording: false })]),
  image('n3', [good('old')]),
  image('n4', [good('old')]),
  image('n5', [], 'raw'),
]

describe('planBackup()', () => {
  const options = { targetNode: 'scratch', targetBitmap: 'backup-vda' }

  test('merges the bitmap of every image into a transient, disabled one', () => {
    assert.deepEqual(planBackup(CHAIN, { bitmap: 'old', ...options }), {
      actions: [
        {
          type: 'block-dirty-bitmap-add',
          data: {
            node: 'scratch',
            name: 'backup-vda',
            persistent: false,
            disabled: true,
            granularity: 65_536,
          },
        },
        merge('scratch', 'backup-vda', ['n1', 'old'], ['n2', 'old'], ['n3', 'old'], ['n4', 'old']),
      ],
      reopenReadWrite: [],
      leftOut: [],
    })
  })

  test('an invalid bitmap gives no action at all and the reasons; an unknown one is NOT_FOUND', () => {
    const plan = planBackup(CHAIN, { bitmap: 'bad', ...options })
    assert.deepEqual(plan.actions, [])
    assert.deepEqual(
      plan.leftOut[0]!.reasons.map(({ code, image: at }) => [code, at]),
      [['disabled', 'n2']],
    )
    assert.throws(() => planBackup(CHAIN, { bitmap: 'none', ...options }), { code: 'NOT_FOUND' })
  })
})

describe('planDelete()', () => {
  test('removes it everywhere, gaps and broken ones too; reopens all but the top, deepest first', () => {
    const chain = [
      image('a', [good('x')]),
      image('b', []),
      image('c', [good('x', { inconsistent: true })]),
      image('d', [good('x')]),
    ]
    assert.deepEqual(planDelete(chain, 'x'), {
      actions: [remove('a', 'x'), remove('c', 'x'), remove('d', 'x')],
      reopenReadWrite: ['d', 'c'],
      leftOut: [],
    })
    assert.deepEqual(planDelete(chain.slice(1), 'x').reopenReadWrite, ['d', 'c'])
    assert.throws(() => planDelete(chain, 'y'), { code: 'NOT_FOUND' })
  })
})

describe('planCommit()', () => {
  test('inner: makes what the base lacks, merges, in the reverse order of the top; reopens the base', () => {
    const plan = planCommit(CHAIN.slice(1), { base: 'n4', active: false })
    assert.deepEqual(plan.actions, [
      merge('n4', 'old', ['n2', 'old'], ['n3', 'old']),
      add('n4', 'mid', 131_072),
      merge('n4', 'mid', ['n2', 'mid']),
    ])
    assert.deepEqual(plan.reopenReadWrite, ['n4'])
    assert.deepEqual(
      plan.leftOut.map(({ bitmap }) => bitmap),
      ['bad'],
    )
  })

  test('active: the activewrite bitmap is the last source of each merge and is removed at the end', () => {
    const plan = planCommit(CHAIN, { base: 'n3', active: true })
    const tmp = 'libvirt-tmp-activewrite'
    assert.deepEqual(plan.actions, [
      merge('n3', 'old', ['n1', 'old'], ['n2', 'old'], ['n3', tmp]),
      add('n3', 'mid'),
      merge('n3', 'mid', ['n1', 'mid'], ['n2', 'mid'], ['n3', tmp]),
      add('n3', 'new'),
      merge('n3', 'new', ['n1', 'new'], ['n3', tmp]),
      remove('n3', tmp),
    ])
    assert.deepEqual(plan.reopenReadWrite, [])
    const named = planCommit(CHAIN, { base: 'n3', active: true, activewriteName: 'w' })
    assert.deepEqual(named.actions.at(-1), remove('n3', 'w'))
  })

  test('nothing into a raw base; what is lost is said; a base that is not below is NOT_FOUND', () => {
    const plan = planCommit(CHAIN, { base: 'n5', active: true })
    assert.deepEqual([plan.actions, plan.reopenReadWrite, plan.leftOut.length], [[], [], 4])
    for (const base of ['n1', 'zz'])
      assert.throws(() => planCommit(CHAIN, { base, active: false }), { code: 'NOT_FOUND' })
  })

  test('validity reaches to the end of the chain, not only to the base', () => {
    const chain = [image('a', [good('x')]), image('b', [good('x')]), image('c', []), image('d', [good('x')])]
    assert.deepEqual(planCommit(chain, { base: 'b', active: false }).actions, [])
  })
})

describe('planCopy() and planPull()', () => {
  test('shallow takes the top alone, deep the whole chain; nothing onto a raw mirror', () => {
    const tmp: [string, string] = ['m', 'libvirt-tmp-activewrite']
    const chain = [image('a', [good('x'), good('y')]), image('b', [good('x')])]
    const mirror = image('m', [])
    assert.deepEqual(planCopy(chain, { mirror, shallow: true }).actions, [
      add('m', 'y'),
      merge('m', 'y', ['a', 'y'], tmp),
      add('m', 'x'),
      merge('m', 'x', ['a', 'x'], tmp),
      remove('m', tmp[1]),
    ])
    assert.deepEqual(
      planCopy(chain, { mirror, shallow: false }).actions[3],
      merge('m', 'x', ['a', 'x'], ['b', 'x'], tmp),
    )
    assert.deepEqual(planCopy(chain, { mirror: image('m', [], 'raw'), shallow: true }).actions, [])
  })

  test('pull merges into the top what stood above the base', () => {
    assert.deepEqual(planPull(CHAIN, { base: 'n3' }).actions, [
      merge('n1', 'old', ['n2', 'old']),
      merge('n1', 'mid', ['n2', 'mid']),
    ])
    assert.deepEqual(
      planPull(CHAIN).actions[0],
      merge('n1', 'old', ['n2', 'old'], ['n3', 'old'], ['n4', 'old']),
    )
  })
})

/** A world in which bitmaps are sets of granules: what a transaction does to them. */
class World {
  readonly bitmaps = new Map<string, Set<number>>()
  run(actions: readonly BitmapAction[]): void {
    for (const { data, type } of actions) {
      if (type === 'block-dirty-bitmap-add') {
        assert.ok(!this.bitmaps.has(`${data.node}/${data.name}`), 'Bitmap already exists')
        this.bitmaps.set(`${data.node}/${data.name}`, new Set())
      } else if (type === 'block-dirty-bitmap-remove') {
        assert.ok(this.bitmaps.delete(`${data.node}/${data.name}`), 'Dirty bitmap not found')
      } else {
        const target = this.get(data.node, data.target)
        for (const { name, node } of data.bitmaps)
          for (const granule of this.get(node, name)) target.add(granule)
      }
    }
  }
  get(node: string, name: string): Set<number> {
    const found = this.bitmaps.get(`${node}/${name}`)
    assert.ok(found, `Dirty bitmap ${node}/${name} not found`)
    return found
  }
}

const sorted = (set: Iterable<number>): number[] => [...set].sort((a, b) => a - b)

describe('plans', () => {
  test('keep what changed since each valid bitmap, in random chains with random writes', () => {
    const random = new Random()
    let kept = 0
    for (let round = 0; round < 400; round++) {
      // A history: bitmaps are made, snapshots taken (valid bitmaps go along), granules written.
      const world = new World()
      const truth = new Map<string, Set<number>>()
      let chain: ImageFacts[] = [image('n0', [])]
      const depth = 1 + random.below(6)
      for (let at = 0; at < depth; at++) {
        if (at > 0) {
          const top = chain[0]!
          for (const { name } of top.bitmaps) world.bitmaps.set(`n${at}/${name}`, new Set())
          chain = [image(`n${at}`, top.bitmaps), ...chain]
        }
        if (random.next() < 0.7) {
          const name = `b${at}`
          chain[0] = image(chain[0]!.id, [...chain[0]!.bitmaps, good(name)])
          world.bitmaps.set(`n${at}/${name}`, new Set())
          truth.set(name, new Set())
        }
        for (let i = 0; i < 3; i++) {
          const granule = random.below(64)
          for (const { name } of chain[0]!.bitmaps) {
            world.get(`n${at}`, name).add(granule)
            truth.get(name)!.add(granule)
          }
        }
      }
      // One image breaks, sometimes. (That the deepest ones lost theirs no rule can tell.)
      if (random.next() < 0.3) {
        const at = random.below(chain.length)
        const bitmaps = chain[at]!.bitmaps.map((each) => ({ ...each, inconsistent: random.next() < 0.5 }))
        chain[at] = { ...chain[at]!, bitmaps }
      }
      const what = `seed ${random.seed}, round ${round}`
      const collect = (left: ChainFacts, name: string): Set<number> => {
        const all = new Set<number>()
        for (const { id } of left)
          for (const granule of world.bitmaps.get(`${id}/${name}`) ?? []) all.add(granule)
        return all
      }
      const valid = chain[0]!.bitmaps.map(({ name }) => name).filter((name) => judge(name, chain).valid)
      for (const name of valid) {
        world.run(planBackup(chain, { bitmap: name, targetNode: 's', targetBitmap: name }).actions)
        assert.deepEqual(sorted(world.get('s', name)), sorted(truth.get(name)!), `backup, ${what}`)
      }
      const operation = random.pick(['commit', 'copy', 'shallow', 'pull'] as const)
      const base = chain.length > 1 ? 1 + random.below(chain.length - 1) : undefined
      if ((operation === 'commit' || operation === 'pull') && base === undefined) continue
      let plan: BitmapPlan
      let left: ChainFacts
      if (operation === 'commit') {
        // What the guest writes until the pivot, recorded in the base alone.
        world.bitmaps.set(`${chain[base!]!.id}/libvirt-tmp-activewrite`, new Set([70]))
        plan = planCommit(chain, { base: chain[base!]!.id, active: true })
        left = chain.slice(base)
      } else if (operation === 'pull') {
        plan = planPull(chain, { base: chain[base!]!.id })
        left = [chain[0]!, ...chain.slice(base)]
      } else {
        world.bitmaps.set('m/libvirt-tmp-activewrite', new Set([70]))
        plan = planCopy(chain, { mirror: image('m', []), shallow: operation === 'shallow' })
        left = [image('m', []), ...(operation === 'shallow' ? chain.slice(1) : [])]
      }
      world.run(plan.actions)
      for (const name of valid) {
        kept += 1
        const expected = new Set(truth.get(name))
        if (operation !== 'pull') expected.add(70)
        assert.deepEqual(sorted(collect(left, name)), sorted(expected), `${operation}, ${what}`)
      }
      assert.ok(!plan.leftOut.some(({ bitmap }) => valid.includes(bitmap)), what)
    }
    assert.ok(kept > 200, `enough was kept to prove something: ${kept}`)
  })
})
