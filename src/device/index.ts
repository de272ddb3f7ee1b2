/** Rank 2: the interface in the middle and its wrappers; `host/` holds every system call. */
export * from './block-device.ts'
export * from './host/index.ts'
export * from './memory.ts'
export * from './overlay.ts'
export * from './slice.ts'
