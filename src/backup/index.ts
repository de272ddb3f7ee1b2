/** Rank 8: the repository: chunks, packs, map pages, points, verify, restore. */
export * from './contract.ts'
export { createRepository, openRepository } from './repository.ts'
