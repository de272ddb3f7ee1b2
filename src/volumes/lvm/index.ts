/** LVM2: volume groups from their text metadata, in user space. */
export { lvm } from './lvm.ts'
