/** NTFS: in-use map from $Bitmap, trusted only on a clean volume. */
export { ntfsType } from './ntfs.ts'
