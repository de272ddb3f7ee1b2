/**
 * Signatures of what varve recognises but does not read: offsets and magic numbers, from each project's own
 * headers and documentation as libblkid too knows them. Data only, no I/O.
 *
 * Rule: a signature names the region in print, nothing more; the region is in use as a whole in any case. So a
 * missing one costs a name, and a false one costs the savings of one region, never data.
 */
import { Bytes, rawCrc32 } from '../../base/index.ts'

/** A place and the bytes that must stand there. */
export interface Mark {
  /** Bytes from the start of the device; negative: from its end. */
  readonly at: number
  /** One character per byte. */
  readonly text: string
}

export interface Signature {
  /** The region's kind in print. */
  readonly kind: string
  /** Reason code of docs/errors.md. */
  readonly reason: ForeignReason
  /** What it is, for people: ends the sentence "found …". */
  readonly what: string
  /** Any one of these is enough. */
  readonly marks: readonly Mark[]
  /** Looks closer, at `length` bytes from `at`, where the magic number is too short to be believed. */
  readonly confirm?: {
    readonly at: number
    readonly length: number
    readonly test: (bytes: Uint8Array) => boolean
  }
}

export type ForeignReason = 'encrypted' | 'volume-member' | 'not-read'

const MIB = 1_048_576

export const SIGNATURES: readonly Signature[] = [
  // Encryption: used and unused blocks look the same from outside.
  {
    kind: 'luks',
    reason: 'encrypted',
    what: 'a LUKS encrypted volume',
    marks: [
      { at: 0, text: 'LUKS\xba\xbe' },
      { at: 0x4000, text: 'SKUL\xba\xbe' },
    ],
  },
  {
    kind: 'bitlocker',
    reason: 'encrypted',
    what: 'a BitLocker encrypted volume',
    marks: [
      { at: 3, text: '-FVE-FS-' },
      { at: 424, text: '\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01' },
    ],
  },
  {
    kind: 'integrity',
    reason: 'volume-member',
    what: 'a dm-integrity volume',
    marks: [{ at: 0, text: 'integrt\0' }],
  },
  // Volume managers and caches: what is in use is known above them only.
  {
    kind: 'bcache',
    reason: 'volume-member',
    what: 'a bcache device',
    marks: [{ at: 4096 + 24, text: '\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81' }],
  },
  {
    kind: 'dm-snapshot',
    reason: 'volume-member',
    what: 'a device-mapper snapshot store',
    marks: [{ at: 0, text: 'SnAp' }],
  },
  { kind: 'vdo', reason: 'volume-member', what: 'a VDO volume', marks: [{ at: 0, text: 'dmvdo001' }] },
  {
    kind: 'stratis',
    reason: 'volume-member',
    what: 'a Stratis pool member',
    marks: [{ at: 520, text: '!Stra0tis\x86\xff\x02^\x41rh' }],
  },
  {
    kind: 'ceph',
    reason: 'volume-member',
    what: 'a Ceph BlueStore device',
    marks: [{ at: 0, text: 'bluestore block device\n' }],
  },
  {
    kind: 'oracle-asm',
    reason: 'volume-member',
    what: 'an Oracle ASM disk',
    marks: [{ at: 32, text: 'ORCLDISK' }],
  },
  {
    kind: 'zfs',
    reason: 'volume-member',
    what: 'a ZFS pool member',
    // First pair of the label's name-value list, which starts 16 KiB into the first label.
    marks: [{ at: 0x4000 + 24, text: 'version\0' }],
    confirm: { at: 0x4000, length: 24, test: (bytes) => bytes[0]! <= 1 && bytes[1]! <= 1 && bytes[2] === 0 },
  },
  {
    kind: 'vmfs',
    reason: 'not-read',
    what: 'a VMFS volume',
    marks: [
      { at: MIB, text: '\x0d\xd0\x01\xc0' },
      { at: 2 * MIB, text: '\x5e\xf1\xab\x2f' },
    ],
  },
  // File systems without a reader here.
  { kind: 'refs', reason: 'not-read', what: 'a ReFS volume', marks: [{ at: 3, text: 'ReFS\0\0\0\0' }] },
  {
    kind: 'f2fs',
    reason: 'not-read',
    what: 'an F2FS volume',
    marks: [{ at: 1024, text: '\x10\x20\xf5\xf2' }],
  },
  { kind: 'apfs', reason: 'not-read', what: 'an APFS container', marks: [{ at: 32, text: 'NXSB' }] },
  {
    kind: 'hfs',
    reason: 'not-read',
    what: 'an HFS volume',
    marks: [{ at: 1024, text: 'BD' }],
    // Allocation block size: a multiple of 512, and a first volume bitmap block.
    confirm: {
      at: 1024,
      length: 28,
      test: (raw) => {
        const bytes = new Bytes(raw, 'big', 'HFS master directory block')
        return bytes.u32(20) > 0 && bytes.u32(20) % 512 === 0 && bytes.u16(14) > 0
      },
    },
  },
  { kind: 'jfs', reason: 'not-read', what: 'a JFS volume', marks: [{ at: 32_768, text: 'JFS1' }] },
  {
    kind: 'reiserfs',
    reason: 'not-read',
    what: 'a ReiserFS volume',
    marks: [
      { at: 65_536 + 52, text: 'ReIsEr' },
      { at: 8192 + 52, text: 'ReIsEr' },
      { at: 65_536, text: 'ReIsEr4' },
    ],
  },
  {
    kind: 'nilfs2',
    reason: 'not-read',
    what: 'a NILFS2 volume',
    marks: [{ at: 1030, text: '\x34\x34' }],
    confirm: { at: 1024, length: 1024, test: isNilfs },
  },
  {
    kind: 'udf',
    reason: 'not-read',
    what: 'a UDF volume',
    marks: [
      { at: 32_769, text: 'BEA01' },
      { at: 32_769, text: 'NSR0' },
    ],
  },
  { kind: 'iso9660', reason: 'not-read', what: 'an ISO 9660 volume', marks: [{ at: 32_769, text: 'CD001' }] },
  {
    kind: 'ufs',
    reason: 'not-read',
    what: 'a UFS volume',
    marks: [
      { at: 65_536 + 1372, text: '\x19\x01\x54\x19' },
      { at: 65_536 + 1372, text: '\x19\x54\x01\x19' },
      { at: 8192 + 1372, text: '\x54\x19\x01\0' },
      { at: 8192 + 1372, text: '\0\x01\x19\x54' },
    ],
  },
  {
    kind: 'bcachefs',
    reason: 'not-read',
    what: 'a bcachefs volume',
    marks: [{ at: 4096 + 24, text: '\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef' }],
  },
  {
    kind: 'ocfs2',
    reason: 'not-read',
    what: 'an OCFS2 volume',
    marks: [1024, 2048, 4096, 8192].map((at) => ({ at, text: 'OCFSV2' })),
  },
  {
    kind: 'gfs2',
    reason: 'not-read',
    what: 'a GFS2 volume',
    marks: [{ at: 65_536, text: '\x01\x16\x19\x70' }],
  },
  { kind: 'squashfs', reason: 'not-read', what: 'a SquashFS image', marks: [{ at: 0, text: 'hsqs' }] },
  {
    kind: 'erofs',
    reason: 'not-read',
    what: 'an EROFS image',
    marks: [{ at: 1024, text: '\xe2\xe1\xf5\xe0' }],
  },
]

/** The superblock's own checksum; two bytes of magic alone also occur in block counts of ext. */
function isNilfs(raw: Uint8Array): boolean {
  const bytes = new Bytes(raw, 'little', 'NILFS2 superblock')
  const length = bytes.u16(8)
  if (length < 200 || length > raw.length) return false
  const summed = raw.slice(0, length)
  summed.fill(0, 16, 20)
  return rawCrc32(summed, bytes.u32(12)) === bytes.u32(16)
}
