/** Rank 1: Extent, RangeSet, Bitmap. Pure, no I/O. */
export * from './bitmap.ts'
export * from './extent.ts'
export * from './range-set.ts'
