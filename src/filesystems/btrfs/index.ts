/** Btrfs: in-use map of single and several devices. */
export { btrfsType, openBtrfs } from './btrfs.ts'
