/** Rank 5: a chain as one disk under one path policy; its map; the copy engine; convert. */
export * from './convert.ts'
export * from './copy-device.ts'
export * from './create-image.ts'
export * from './disk.ts'
export * from './map-disk.ts'
export * from './open-disk.ts'
