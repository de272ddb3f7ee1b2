/** XFS v4 and v5. */
export { xfsType } from './xfs.ts'
