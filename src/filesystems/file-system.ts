/**
 * What a file system is to the rest of varve: it recognises itself and says which bytes of its device it needs.
 *
 * Rule 1 of the design: nothing in use is ever skipped. A reader that meets anything it cannot vouch for (parse
 * error, checksum mismatch, unknown feature bit, size mismatch, a journal that cannot be replayed) throws
 * `NotTrusted` (or any VarveError): the room `inuse` then takes the whole region as in use, with that reason.
 */
import type { Context } from '../base/index.ts'
import type { BlockDevice } from '../device/index.ts'
import type { RangeSet } from '../extents/index.ts'

export { NotTrusted } from '../base/index.ts'

/** `exact`: on-disk metadata alone decides · `replayed`: after a journal replay in memory · `assumed`: all in use. */
export type Trust = 'exact' | 'replayed' | 'assumed'

export interface UsedMap {
  /**
   * Bytes of the device that are needed. Must include what lies outside the file system's own block map: boot
   * areas, and the tail from the end of the file system to the end of the device.
   */
  readonly ranges: RangeSet
  readonly trust: 'exact' | 'replayed'
  /** For people: `clean`, `dirty: journal replayed`, … */
  readonly state: string
}

export interface FileSystem {
  /** `ext4`, `fat32`, `swap`, …: the region's kind in print. */
  readonly kind: string
  readonly uuid?: string | undefined
  readonly label?: string | undefined
  /** Bytes of the device that the file system says are its own. */
  readonly size: number
  /** The unit of its block map, bytes. */
  readonly blockBytes: number
  used(context: Context): Promise<UsedMap>
  /**
   * A second opinion, from the other side: every byte that some inode, record or extent item owns, found by walking
   * those and not the block map. All of it must be in `used`. May read much more than `used` does.
   */
  audit?(context: Context): Promise<RangeSet>
  /** Bytes of page, swap and hibernation files: in use, but a guest makes their content anew when it starts. */
  pageFiles?(context: Context): Promise<RangeSet>
}

export interface FileSystemType {
  /** The folder's name, and the prefix of its reasons. */
  readonly name: string
  /**
   * True when the device carries this type's signature. Reads little: the device given caches small pages, so
   * that many probes of the same page cost one read. Throws nothing but I/O errors.
   */
  probe(device: BlockDevice): Promise<boolean>
  /** Parses what is needed to describe it. @throws NotTrusted, CORRUPT, LIMIT */
  open(device: BlockDevice, context: Context): Promise<FileSystem>
  /** For file systems that may spread over several devices (Btrfs); absent where there is one device each. */
  readonly together?: {
    /** Identity of the file system when this device is one of several, else undefined: then `open` reads it. */
    group(device: BlockDevice, context: Context): Promise<string | undefined>
    /** All devices of one identity that the caller could find, in any order; one result per device. @throws as `open` */
    open(devices: readonly BlockDevice[], context: Context): Promise<readonly FileSystem[]>
  }
}
