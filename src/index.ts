/** The library: the doors of the rooms that other programs build on. */
export * from './backup/index.ts'
export * from './base/index.ts'
export * from './chain/index.ts'
export * from './device/index.ts'
export * from './extents/index.ts'
export * from './formats/index.ts'
export * from './inuse/index.ts'
