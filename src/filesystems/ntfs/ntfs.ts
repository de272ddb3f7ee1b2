/**
 * NTFS: used ranges from $Bitmap (MFT record 6), trusted only when the volume is clean.
 *
 * Windows logs changes of $Bitmap in $LogFile, which is not replayed here. So the map is believed only when nothing is
 * left to replay: no flag in $Volume, $LogFile closed cleanly (or freshly made), no hibernated Windows, no fast start-up.
 * Anything else is `assumed` with the exact reason; a running Windows is not clean unless VSS flushed it.
 *
 * What stands outside $Bitmap: the sectors after the last whole cluster, above all the backup boot sector.
 * Clusters that only an older VSS shadow copy needs are free in $Bitmap: shadow copies are not kept by a map.
 */
import { Bytes, type Context, LIMITS, NotTrusted, throwIfAborted, within } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import { Bitmap, type RangeSet, RangeSetBuilder } from '../../extents/index.ts'
import type { FileSystem, FileSystemType, UsedMap } from '../file-system.ts'
import {
  ATTRIBUTE,
  applyFixups,
  BOOT_BYTES,
  type BootSector,
  decodeBoot,
  decodeIndexEntries,
  decodeRestartPage,
  decodeRuns,
  hasOemId,
  INDEX_BLOCK_HEADER,
  INDEX_ROOT_HEADER,
  type MftRecord,
  RECORD,
  type RestartPage,
  utf16,
} from './layout.ts'
import { clusterRanges, Mft, pieces, type Stream } from './mft.ts'

/** $Bitmap is read in pieces of this many bytes: 4 TiB of 4 KiB clusters have 128 MiB of it. */
const BITMAP_PIECE = 4 << 20
const HIBERNATION_FILE = 'hiberfil.sys'
/** Files whose content Windows makes anew at each start. */
const PAGE_FILES: readonly string[] = ['pagefile.sys', 'swapfile.sys', HIBERNATION_FILE]

export const ntfsType: FileSystemType = {
  name: 'ntfs',

  async probe(device) {
    if (device.size < BOOT_BYTES * 2) return false
    return hasOemId(await readBytes(device, 0, BOOT_BYTES)) || (await backupBoot(device)) !== undefined
  },

  async open(device) {
    const first = await readBytes(device, 0, BOOT_BYTES)
    if (!hasOemId(first)) {
      const backup = await backupBoot(device)
      throw new NotTrusted(
        'ntfs-boot-damaged',
        'Cannot use NTFS volume: found its boot sector only as the backup at the end',
        {
          kind: 'ntfs',
          uuid: backup?.serial,
        },
      )
    }
    const boot = decodeBoot(first)
    const about = { kind: 'ntfs', uuid: boot.serial }
    if (boot.totalSectors * boot.sectorBytes > device.size) {
      throw new NotTrusted(
        'ntfs-size-mismatch',
        `Cannot use NTFS volume: found ${boot.totalSectors} sectors, which the device does not hold`,
        about,
      )
    }
    const mft = await Mft.open(device, boot)
    const volume = await mft.record(RECORD.volume)
    const name = volume.attributes.find((attribute) => attribute.type === ATTRIBUTE.volumeName)?.value
    return new Ntfs(device, mft, volume, name && name.length > 0 ? utf16(name) : undefined)
  },
}

/** The last sector of the device, when it is an NTFS boot sector whose volume fills the device. */
async function backupBoot(device: BlockDevice): Promise<BootSector | undefined> {
  const at = device.size - BOOT_BYTES
  if (at % BOOT_BYTES !== 0) return undefined
  const bytes = await readBytes(device, at, BOOT_BYTES)
  if (!hasOemId(bytes)) return undefined
  try {
    return decodeBoot(bytes)
  } catch {
    return undefined
  }
}

export class Ntfs implements FileSystem {
  readonly kind = 'ntfs'
  readonly uuid: string
  readonly label: string | undefined
  readonly size: number
  readonly blockBytes: number
  readonly #device: BlockDevice
  readonly #mft: Mft
  readonly #volume: MftRecord

  constructor(device: BlockDevice, mft: Mft, volume: MftRecord, label: string | undefined) {
    const { boot } = mft
    this.#device = device
    this.#mft = mft
    this.#volume = volume
    this.uuid = boot.serial
    this.label = label
    this.size = boot.totalSectors * boot.sectorBytes
    this.blockBytes = boot.clusterBytes
  }

  async used(context: Context): Promise<UsedMap> {
    this.#checkVolumeFlags()
    await this.#checkLogFile()
    await this.#checkHibernation()
    const clusters = await this.#usedClusters(context)
    const { clusterCount, clusterBytes } = this.#mft.boot
    const builder = new RangeSetBuilder().addAll(clusters.scale(clusterBytes))
    builder.add(clusterCount * clusterBytes, this.#device.size)
    return { ranges: builder.build(), trust: 'exact', state: 'clean' }
  }

  /**
   * Bytes of the page, swap and hibernation files in the root folder: allocated, but Windows makes their content anew.
   * The first cluster of the hibernation file is kept, so that no stale header can appear there.
   */
  async pageFiles(): Promise<RangeSet> {
    const builder = new RangeSetBuilder()
    for (const { record, name } of await this.#rootFiles(PAGE_FILES)) {
      const stream = await this.#dataOf(record)
      if (!stream) continue
      const skip = name === HIBERNATION_FILE ? 1 : 0
      for (const run of stream.runs) {
        if (run.lcn === undefined) continue
        const from = run.vcn < skip ? Math.min(skip - run.vcn, run.clusters) : 0
        builder.add((run.lcn + from) * this.blockBytes, (run.lcn + run.clusters) * this.blockBytes)
      }
    }
    return builder.build()
  }

  /** Bytes that some file or directory owns, from a walk over every MFT record: the second opinion on $Bitmap. */
  async audit(context: Context): Promise<RangeSet> {
    const { clusterBytes, clusterCount } = this.#mft.boot
    const owned = new Bitmap(clusterCount)
    owned.set(0)
    for await (const record of this.#mft.allRecords()) {
      throwIfAborted(context.signal)
      for (const attribute of record.attributes) {
        if (!attribute.nonResident) continue
        // $BadClus:$Bad maps the whole volume as one hole; its runs with clusters are the bad ones.
        const { mappingPairs, lowestVcn } = attribute.nonResident
        const runs = decodeRuns(mappingPairs, lowestVcn, Math.max(clusterCount, 1), `record ${record.number}`)
        for (const { start, end } of clusterRanges(runs)) owned.setRange(start, end)
      }
    }
    return owned.toRanges().scale(clusterBytes)
  }

  #checkVolumeFlags(): void {
    const information = this.#volume.attributes.find(
      (attribute) => attribute.type === ATTRIBUTE.volumeInformation,
    )?.value
    if (!information) throw this.#not('ntfs-record-invalid', 'found no $VOLUME_INFORMATION')
    const flags = new Bytes(information, 'little', '$VOLUME_INFORMATION').u16(10)
    if ((flags & 1) !== 0) throw this.#not('ntfs-dirty', 'found the volume marked dirty')
    if (flags !== 0)
      throw this.#not('ntfs-volume-flags', `found volume flags 0x${flags.toString(16)}, expected none`)
  }

  /** Clean: the newer restart page has no open client (or says so), and its log is not of a fast start-up. */
  async #checkLogFile(): Promise<void> {
    const log = await this.#mft.stream(await this.#mft.record(RECORD.logFile), ATTRIBUTE.data, '')
    const length = within(Math.min(log.dataBytes, 65536), 65536, 'bytes of $LogFile')
    if (length < 8192) throw this.#not('ntfs-log-invalid', `found $LogFile of ${log.dataBytes} bytes`)
    const head = await this.#mft.readStream(log, 0, length)
    // As mkntfs leaves it: never opened, nothing in it.
    if (head.every((byte) => byte === 0xff)) return
    const first = restartPage(head, 0)
    const pageBytes = first?.systemPageBytes ?? 4096
    if (!(pageBytes >= 512 && pageBytes <= length / 2))
      throw this.#not('ntfs-log-invalid', `found log pages of ${pageBytes} bytes`)
    const second = restartPage(head, pageBytes)
    const newer = !first ? second : !second || first.lsn >= second.lsn ? first : second
    if (!newer || !first || !second)
      throw this.#not('ntfs-log-invalid', 'found a damaged restart page of $LogFile')
    if (newer.majorVersion > 1)
      throw this.#not(
        'ntfs-fast-startup',
        `found $LogFile version ${newer.majorVersion}, kept open by Windows`,
      )
    if (!newer.clean)
      throw this.#not('ntfs-log-not-clean', 'found $LogFile open: changes of the map may wait in it')
  }

  async #checkHibernation(): Promise<void> {
    for (const { record } of await this.#rootFiles([HIBERNATION_FILE])) {
      const stream = await this.#dataOf(record)
      if (!stream || stream.dataBytes < 4096) continue
      const head = await this.#mft.readStream(stream, 0, 4096)
      const magic = new Bytes(head, 'little').text(0, 4).toLowerCase()
      if (magic === 'wake' || head.every((byte) => byte === 0)) continue
      throw this.#not(
        'ntfs-hibernated',
        `found ${HIBERNATION_FILE} with header ${JSON.stringify(magic)}: Windows is hibernated`,
      )
    }
  }

  async #usedClusters(context: Context): Promise<RangeSet> {
    const { clusterCount, clusterBytes } = this.#mft.boot
    const stream = await this.#mft.stream(await this.#mft.record(RECORD.bitmap), ATTRIBUTE.data, '')
    const bytes = Math.ceil(clusterCount / 8)
    if (stream.initializedBytes < bytes) {
      throw this.#not(
        'ntfs-bitmap-invalid',
        `found $Bitmap of ${stream.initializedBytes} bytes, expected ${bytes}`,
      )
    }
    if ((stream.flags & 0xc0ff) !== 0 || stream.runs.some((run) => run.lcn === undefined)) {
      throw this.#not('ntfs-bitmap-invalid', 'found $Bitmap compressed, encrypted or with holes')
    }
    const builder = new RangeSetBuilder()
    for (const piece of pieces(bytes, BITMAP_PIECE)) {
      throwIfAborted(context.signal)
      const first = piece.offset * 8
      const raw = await this.#mft.readStream(stream, piece.offset, piece.length)
      const bits = Math.min(piece.length * 8, clusterCount - first)
      Bitmap.fromBytes(raw, bits).eachRun((start, end) => builder.add(first + start, first + end))
    }
    const used = builder.build()
    // What was just read through is certainly in use; a map that denies it is not a map of this volume.
    for (const { start, end } of [
      { start: 0, end: 1 },
      ...clusterRanges(stream.runs),
      ...clusterRanges(this.#mft.runs),
    ]) {
      if (!used.covers(start, end)) {
        throw this.#not(
          'ntfs-bitmap-invalid',
          `found clusters ${start}..${end} of its own tables free in $Bitmap (cluster ${clusterBytes} bytes)`,
        )
      }
    }
    return used
  }

  /** Records of the files of the root folder whose name (any case) is in `names`. */
  async #rootFiles(names: readonly string[]): Promise<{ record: MftRecord; name: string }[]> {
    const root = await this.#mft.record(RECORD.root)
    const attributes = await this.#mft.attributes(root)
    const isNames = (type: number) => (attribute: { type: number; name: string }) =>
      attribute.type === type && attribute.name === '$I30'
    const index = attributes.find(isNames(ATTRIBUTE.indexRoot))?.value
    if (!index) throw this.#not('ntfs-record-invalid', 'found no index of the root folder')
    const view = new Bytes(index, 'little', 'index of the root folder')
    const entries = decodeIndexEntries(view, INDEX_ROOT_HEADER)
    if (attributes.some(isNames(ATTRIBUTE.indexAllocation))) {
      const blockBytes = view.u32(8)
      if (!(blockBytes >= 512 && blockBytes <= 65536 && blockBytes % 512 === 0)) {
        throw this.#not('ntfs-record-invalid', `found index blocks of ${blockBytes} bytes`)
      }
      const stream = await this.#mft.stream(root, ATTRIBUTE.indexAllocation, '$I30')
      const bytes = await this.#mft.readStream(
        stream,
        0,
        within(stream.dataBytes, LIMITS.tableBytes, 'bytes of the root folder'),
      )
      for (let at = 0; at + blockBytes <= bytes.length; at += blockBytes) {
        const block = bytes.subarray(at, at + blockBytes)
        // Blocks that the index does not use any more may hold anything.
        if (new Bytes(block, 'little').text(0, 4) !== 'INDX') continue
        entries.push(
          ...decodeIndexEntries(
            applyFixups(block, 'INDX', 'index block of the root folder'),
            INDEX_BLOCK_HEADER,
          ),
        )
      }
    }
    const found = new Map<number, { record: MftRecord; name: string }>()
    for (const entry of entries) {
      const name = entry.name.toLowerCase()
      if (!names.includes(name) || found.has(entry.record)) continue
      const record = await this.#mft.record(entry.record)
      if (record.inUse) found.set(entry.record, { record, name })
    }
    return [...found.values()]
  }

  /** The unnamed $DATA of a file; undefined when it is resident (small). */
  async #dataOf(record: MftRecord): Promise<Stream | undefined> {
    const all = await this.#mft.attributes(record)
    const data = all.find((attribute) => attribute.type === ATTRIBUTE.data && attribute.name === '')
    return data?.nonResident ? this.#mft.stream(record, ATTRIBUTE.data, '') : undefined
  }

  #not(reason: string, why: string): NotTrusted {
    return new NotTrusted(reason, `Cannot trust the map of the NTFS volume: ${why}`, {
      kind: 'ntfs',
      uuid: this.uuid,
      label: this.label,
    })
  }
}

function restartPage(head: Uint8Array, at: number): RestartPage | undefined {
  try {
    const probe = new Bytes(head, 'little', '$LogFile').u32(at + 16)
    const bytes = head.slice(at, at + (probe >= 512 && probe <= 32768 ? probe : 4096))
    return decodeRestartPage(applyFixups(bytes, 'RSTR', 'restart page of $LogFile'))
  } catch {
    return undefined
  }
}
