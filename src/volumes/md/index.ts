/** Linux md: software RAID from its superblocks, in user space. */
export { md } from './md.ts'
