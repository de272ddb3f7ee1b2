/** Rank 0: byte cursor, integers, checksums, error table, log interface, limits, progress. Imports no room. */
export * from './bytes.ts'
export * from './checksums.ts'
export * from './concurrency.ts'
export * from './errors.ts'
export * from './limits.ts'
export * from './log.ts'
export * from './not-trusted.ts'
