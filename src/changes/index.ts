/** Rank 4: dirty bitmaps of a chain, judged and planned for. Works on images that are handed to it. */
export * from './facts.ts'
export * from './file-facts.ts'
export * from './judge.ts'
export * from './node-facts.ts'
export * from './plan.ts'
