/**
 * VHDs by recipe, byte by byte from the specification and without any code of src/: no tool here makes
 * differencing ones. The layout is that of XenServer's tap: footer copy, header, table, batmap, locators, blocks,
 * footer.
 */

export interface RecipeLocator {
  readonly code: string
  readonly data: Uint8Array
  /** The field `data_space`: bytes when a multiple of 512, else sectors. Default: bytes. */
  readonly spaceField?: number
  /** Default: where the recipe puts the data. */
  readonly offset?: number
  readonly lengthField?: number
}

export interface VhdRecipe {
  readonly type: 'dynamic' | 'differencing'
  readonly size: number
  readonly blockBytes?: number
  readonly uuid?: string
  /** Four characters; default `tap\0`. */
  readonly creator?: string
  readonly creatorVersion?: number
  readonly geometry?: readonly [number, number, number]
  readonly hidden?: boolean
  readonly parentUuid?: string
  readonly parentName?: string
  readonly locators?: readonly RecipeLocator[]
  /** Entries reserved in the table; default: as many as the size needs. */
  readonly maxTableEntries?: number
  /** Version of a batmap; none when not given. */
  readonly batmap?: number
  /** Bits that the batmap claims beside those of full blocks. */
  readonly batmapExtra?: readonly number[]
  /** Sectors that the file holds, by number, with content; a block is allocated when one of its sectors is here. */
  readonly sectors?: ReadonlyMap<number, Uint8Array>
  /** Blocks to allocate with an empty bitmap. */
  readonly emptyBlocks?: readonly number[]
  /** Order of blocks in the file; default ascending. */
  readonly order?: (blocks: number[]) => number[]
  /** What stands in sectors of allocated blocks whose bit is clear. Default 0xee, so that a wrong read shows. */
  readonly filler?: number
  readonly footer?: 'whole' | 'short' | 'killed' | 'missing' | 'poisoned'
}

export const RECIPE_UUID = '11111111-2222-3333-4444-555555555555'
const UNALLOCATED = 0xffffffff

export interface MadeVhd {
  readonly bytes: Buffer
  readonly tableOffset: number
  readonly batmapOffset: number | undefined
  /** Sector of each allocated block's bitmap. */
  readonly placed: ReadonlyMap<number, number>
}

export function makeVhd(recipe: VhdRecipe): MadeVhd {
  const blockBytes = recipe.blockBytes ?? 2 * 1024 * 1024
  const perBlock = blockBytes / 512
  const blocks = Math.ceil(recipe.size / blockBytes)
  const maxTable = recipe.maxTableEntries ?? blocks
  const bitmapBytes = up(Math.ceil(perBlock / 8), 512)

  const tableOffset = 1536
  let at = tableOffset + up(maxTable * 4, 512)
  const parts: { offset: number; bytes: Uint8Array }[] = []

  const held = new Map<number, Map<number, Uint8Array>>()
  for (const block of recipe.emptyBlocks ?? []) held.set(block, new Map())
  for (const [sector, content] of recipe.sectors ?? []) {
    const block = Math.floor(sector / perBlock)
    let inside = held.get(block)
    if (!inside) held.set(block, (inside = new Map()))
    inside.set(sector % perBlock, content)
  }

  let batmapOffset: number | undefined
  if (recipe.batmap !== undefined) {
    const covered = Math.max(1, Math.ceil(Math.floor(recipe.size / 2 ** 24) / 512)) * 512
    const sectors = Math.max(1, Math.ceil(Math.ceil(maxTable / 8) / 512))
    const map = Buffer.alloc(sectors * 512)
    const full = [...held].filter(([, inside]) => inside.size === perBlock).map(([block]) => block)
    for (const block of [...full, ...(recipe.batmapExtra ?? [])]) {
      if (block < covered * 8) map[block >> 3]! |= 0x80 >> (block & 7)
    }
    let sum = 0
    for (const byte of map.subarray(0, covered))
      sum += recipe.batmap === 0x10001 && byte > 127 ? byte - 256 : byte
    const header = Buffer.alloc(512)
    header.write('tdbatmap', 0, 'latin1')
    header.writeBigUInt64BE(BigInt(at + 512), 8)
    header.writeUInt32BE(sectors, 16)
    header.writeUInt32BE(recipe.batmap, 20)
    header.writeUInt32BE(~sum >>> 0, 24)
    batmapOffset = at
    parts.push({ offset: at, bytes: header }, { offset: at + 512, bytes: map })
    at += 512 + map.length
  }

  const header = Buffer.alloc(1024)
  header.write('cxsparse', 0, 'latin1')
  header.writeBigUInt64BE(0xffffffffffffffffn, 8)
  header.writeBigUInt64BE(BigInt(tableOffset), 16)
  header.writeUInt32BE(0x10000, 24)
  header.writeUInt32BE(maxTable, 28)
  header.writeUInt32BE(blockBytes, 32)
  header.set(uuid(recipe.parentUuid), 40)
  header.writeUInt32BE(0x2a000000, 56)
  header.set(utf16be(recipe.parentName ?? ''), 64)
  for (const [slot, locator] of (recipe.locators ?? []).entries()) {
    const space = up(Math.max(locator.data.length, 1), 512)
    const entry = 576 + slot * 24
    header.write(locator.code, entry, 'latin1')
    header.writeUInt32BE(locator.spaceField ?? space, entry + 4)
    header.writeUInt32BE(locator.lengthField ?? locator.data.length, entry + 8)
    header.writeBigUInt64BE(BigInt(locator.offset ?? at), entry + 16)
    parts.push({ offset: at, bytes: locator.data })
    at += space
  }
  sumInto(header, 36)

  const table = Buffer.alloc(up(maxTable * 4, 512), 0xff)
  for (let i = 0; i < maxTable; i++) table.writeUInt32BE(UNALLOCATED, i * 4)
  const placed = new Map<number, number>()
  let sector = Math.ceil(at / 512)
  const order = recipe.order ?? ((list: number[]) => list.sort((a, b) => a - b))
  for (const block of order([...held.keys()])) {
    // Data starts on 4 KiB.
    while ((sector + bitmapBytes / 512) % 8 !== 0) sector++
    placed.set(block, sector)
    table.writeUInt32BE(sector, block * 4)
    const bitmap = Buffer.alloc(bitmapBytes)
    const data = Buffer.alloc(blockBytes, recipe.filler ?? 0xee)
    for (const [index, content] of held.get(block)!) {
      bitmap[index >> 3]! |= 0x80 >> (index & 7)
      data.set(content, index * 512)
    }
    parts.push({ offset: sector * 512, bytes: bitmap }, { offset: sector * 512 + bitmapBytes, bytes: data })
    sector += (bitmapBytes + blockBytes) / 512
  }
  const footerAt = sector * 512

  const footer = Buffer.alloc(512)
  footer.write('conectix', 0, 'latin1')
  footer.writeUInt32BE(2, 8)
  footer.writeUInt32BE(0x10000, 12)
  footer.writeBigUInt64BE(512n, 16)
  footer.writeUInt32BE(0x2a000000, 24)
  footer.write(recipe.creator ?? 'tap\0', 28, 'latin1')
  footer.writeUInt32BE(recipe.creatorVersion ?? 0x10003, 32)
  footer.writeBigUInt64BE(BigInt(recipe.size), 40)
  footer.writeBigUInt64BE(BigInt(recipe.size), 48)
  const [cylinders, heads, sectors] = recipe.geometry ?? [65535, 16, 255]
  footer.writeUInt16BE(cylinders, 56)
  footer.writeUInt8(heads, 58)
  footer.writeUInt8(sectors, 59)
  footer.writeUInt32BE(recipe.type === 'dynamic' ? 3 : 4, 60)
  footer.set(uuid(recipe.uuid ?? RECIPE_UUID), 68)
  footer.writeUInt8(recipe.hidden ? 1 : 0, 85)
  sumInto(footer, 64)

  const primary = Buffer.from(footer)
  if (recipe.footer === 'killed') primary.fill(0xc7)
  if (recipe.footer === 'poisoned') primary.write('v_poison', 0, 'latin1')
  const tail =
    recipe.footer === 'missing'
      ? Buffer.alloc(0)
      : recipe.footer === 'short'
        ? primary.subarray(0, 511)
        : primary
  const bytes = Buffer.alloc(footerAt + tail.length)
  footer.copy(bytes, 0)
  header.copy(bytes, 512)
  table.copy(bytes, tableOffset)
  for (const part of parts) bytes.set(part.bytes, part.offset)
  tail.copy(bytes, footerAt)
  return { bytes, tableOffset, batmapOffset, placed }
}

/** The three locators of tap, all saying `path`. */
export function tapLocators(path: string): RecipeLocator[] {
  const windows = `.\\${path.replaceAll('/', '\\')}`
  return [
    { code: 'MacX', data: Buffer.from(`file://./${path}`) },
    { code: 'W2ku', data: Buffer.from(windows, 'utf16le') },
    { code: 'W2ru', data: Buffer.from(windows, 'utf16le') },
  ]
}

/** Writes the ones' complement of the byte sum, the field itself as zero, into the field at `at`. */
export function sumInto(bytes: Buffer, at: number): void {
  bytes.writeUInt32BE(0, at)
  let sum = 0
  for (const byte of bytes) sum += byte
  bytes.writeUInt32BE(~sum >>> 0, at)
}

function utf16be(text: string): Buffer {
  return Buffer.from(text, 'utf16le').swap16()
}

function uuid(text = '00000000-0000-0000-0000-000000000000'): Buffer {
  return Buffer.from(text.replaceAll('-', ''), 'hex')
}

function up(value: number, unit: number): number {
  return Math.ceil(value / unit) * unit
}
