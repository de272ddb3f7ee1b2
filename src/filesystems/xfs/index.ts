/** XFS v4 and v5. */
export { XfsFileSystem, xfsType } from './xfs.ts'
