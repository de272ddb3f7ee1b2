/** Rank 7: running VMs: the QMP client. */
export * from './qmp.ts'
