/**
 * What the rest of varve sees of a repository. The format is described in docs/formats/repository.md.
 *
 * Rules: a point that is listed verifies; a backup that failed or was interrupted leaves no point; nothing that was
 * written is ever changed. Several writers may work on one repository at the same time.
 */
import type { Context, VarveError } from '../base/index.ts'
import type { BlockDevice } from '../device/index.ts'
import type { RangeSet } from '../extents/index.ts'

export interface CreateRepositoryOptions {
  /** Encrypts the repository; without it the repository is readable by whoever reads the folder. */
  readonly password?: string | undefined
  /** Unit of deduplication and of change: a power of two from 256 KiB to 4 MiB; default 1 MiB. */
  readonly chunkBytes?: number | undefined
  /** Unit of compression and of random reads: a power of two from 64 KiB to 1 MiB, at most a chunk. */
  readonly frameBytes?: number | undefined
  /** A pack is closed at this size: 1 MiB to 1 GiB, default 64 MiB. */
  readonly packBytes?: number | undefined
  /** Threads that hash, compress and decode; default: one a processor, at most 4. */
  readonly workers?: number | undefined
}

export interface OpenRepositoryOptions extends Context {
  readonly password?: string | undefined
  /** Threads that hash, compress and decode; default: one a processor, at most 4. */
  readonly workers?: number | undefined
}

export interface RepositorySettings {
  readonly version: number
  readonly chunkBytes: number
  readonly frameBytes: number
  /** Chunks that one map page covers. */
  readonly pageEntries: number
  readonly packBytes: number
  readonly encrypted: boolean
  /** ISO 8601, UTC. */
  readonly created: string
}

/** One disk, frozen: nothing may write to it while the backup runs. */
export interface BackupSource {
  /** Name of the disk in the repository. */
  readonly disk: string
  readonly device: BlockDevice
  /** Bytes that are kept; the rest of the disk is not read and reads as zeros from the point. */
  readonly inUse: RangeSet
  /** Verdict per region, as `inspect` prints it; kept in the point as JSON. */
  readonly regions?: unknown
  /** Further facts of the source for people (path, format); kept in the point as JSON. */
  readonly about?: unknown
  /**
   * Bytes that may differ from the point `parent`. Chunks outside it are taken from that point without being read,
   * unless they are in use now and were not kept then.
   */
  readonly changed?: { readonly ranges: RangeSet; readonly parent: string } | undefined
}

export interface BackupOptions extends Context {}

export interface BackupResult {
  readonly disk: string
  /** Id of the new point (a ULID). */
  readonly point: string
  readonly virtualSize: number
  readonly inUseBytes: number
  /** Bytes read from the disk. */
  readonly readBytes: number
  /** Bytes in chunks that differ from the disk's latest point; all that is kept when there is none. */
  readonly changedBytes: number
  /** Bytes added to the repository, metadata included. */
  readonly storedBytes: number
  readonly newChunks: number
  /** Chunks with content that stood in the repository already, or were met twice in this backup. */
  readonly reusedChunks: number
  readonly seconds: number
}

export interface PointInfo {
  readonly disk: string
  readonly point: string
  /** ISO 8601, UTC. */
  readonly created: string
  readonly virtualSize: number
  /** Logical sector size of the disk. */
  readonly blockBytes: number
  readonly inUseBytes: number
  /** What this backup added. */
  readonly storedBytes: number
  readonly readBytes: number
  readonly changedBytes: number
  readonly newChunks: number
  readonly reusedChunks: number
  readonly seconds: number
  readonly regions: unknown
  readonly about: unknown
  /** Set when the manifest cannot be read; the figures are then zero. */
  readonly error?: VarveError
}

/** Names one point: an id, a prefix that only one id of the disk has, or `latest`. */
export interface PointName {
  readonly disk: string
  readonly point: string
}

/** A restore point as a device: reads decode only the frames that are touched. */
export interface PointDevice extends BlockDevice {
  readonly info: PointInfo
  /** What was kept of `[start, end)`; the rest was not in use and reads as zeros. */
  inUse(start?: number, end?: number): Promise<RangeSet>
}

export interface VerifyOptions extends Context {
  readonly disk?: string | undefined
  /** As in `PointName`; needs `disk`. */
  readonly point?: string | undefined
}

export interface Finding {
  readonly code: 'CORRUPT' | 'NOT_FOUND' | 'UNSUPPORTED' | 'IO'
  readonly object: 'config' | 'manifest' | 'page' | 'pack' | 'chunk'
  /** Name of the stored object in the repository folder. */
  readonly name: string
  readonly message: string
  /** Id of the chunk or page, in hex, where it is known. */
  readonly id?: string
  /** Place inside the object, in bytes. */
  readonly offset?: number
  /** The points that cannot be restored in full because of it. Empty: nothing refers to it. */
  readonly points: readonly { readonly disk: string; readonly point: string }[]
}

export interface VerifyResult {
  readonly ok: boolean
  readonly points: number
  readonly pages: number
  readonly packs: number
  readonly chunks: number
  /** Bytes of the repository that were read and recomputed. */
  readonly bytes: number
  readonly findings: readonly Finding[]
  readonly seconds: number
}

export interface VerifyAgainstResult extends PointName {
  readonly equal: boolean
  readonly comparedBytes: number
  /** The first differing ranges (at most 100), ascending, to the exact byte. */
  readonly differences: readonly { readonly start: number; readonly length: number }[]
  /** Bytes of the disk that are in use but that the point did not keep: they were in use later. */
  readonly notKeptBytes: number
  readonly seconds: number
}

export interface ReindexResult {
  readonly packs: number
  readonly chunks: number
  /** Packs whose trailer could not be read; they are left out. */
  readonly damaged: readonly string[]
  readonly seconds: number
}

export interface Repository extends AsyncDisposable {
  readonly id: string
  readonly path: string
  readonly settings: RepositorySettings
  /**
   * Makes a restore point of a disk.
   * @throws CANCELLED when the signal fired, NO_SPACE, IO, and whatever reading the source throws; no point is left
   */
  backup(source: BackupSource, options?: BackupOptions): Promise<BackupResult>
  /** The points, oldest first, grouped by disk name. A disk that has none: an empty list. */
  points(disk?: string): Promise<PointInfo[]>
  /** @throws NOT_FOUND, USAGE (prefix fits several), CORRUPT, UNSUPPORTED */
  openPoint(name: PointName, options?: Context): Promise<PointDevice>
  /** Recomputes everything: of one point, of one disk, or of the whole repository. Damage is in the result. */
  verify(options?: VerifyOptions): Promise<VerifyResult>
  /** Compares a point with a disk, byte by byte, over what is in use on the disk. Differences are in the result. */
  verifyAgainst(
    name: PointName,
    source: { readonly device: BlockDevice; readonly inUse: RangeSet },
    options?: Context,
  ): Promise<VerifyAgainstResult>
  /** Makes the deduplication index anew from the packs. */
  reindex(options?: Context): Promise<ReindexResult>
}
