/** The files and block devices of this host, and every system call of varve. */
export * from './copy-range.ts'
export * from './fiemap.ts'
export * from './host-file.ts'
export * from './locks.ts'
export * from './open-host-file.ts'
export * from './sync-folder.ts'
export * from './system-calls.ts'
export * from './system-error.ts'
