/**
 * What varve recognises but does not read, as file-system types whose `open` refuses: the region is named in print
 * and taken as wholly in use.
 */
import { NotTrusted } from '../../base/index.ts'
import { type BlockDevice, readBytes } from '../../device/index.ts'
import type { FileSystemType } from '../file-system.ts'
import { findRaidMember } from './raid.ts'
import { type Mark, SIGNATURES, type Signature } from './table.ts'

/** One type per signature of the table. */
export const foreign: readonly FileSystemType[] = SIGNATURES.map((signature) => ({
  name: signature.kind,
  probe: (device: BlockDevice) => matches(device, signature),
  async open(): Promise<never> {
    throw refusal(signature)
  },
}))

/**
 * Members of a RAID whose metadata stands at the end: the contents of the array may show at their start, so this
 * type wins over whatever else is recognised there.
 */
export const raidMember: FileSystemType = {
  name: 'raid-member',
  probe: async (device: BlockDevice) => (await findRaidMember(device)) !== undefined,
  async open(device: BlockDevice): Promise<never> {
    const kind = (await findRaidMember(device)) ?? 'raid-member'
    throw new NotTrusted('volume-member', `Cannot read the volume: found a member of a RAID (${kind})`, {
      kind,
    })
  },
}

async function matches(device: BlockDevice, signature: Signature): Promise<boolean> {
  for (const mark of signature.marks) {
    if ((await standsAt(device, mark)) && (await confirmed(device, signature))) return true
  }
  return false
}

async function standsAt(device: BlockDevice, { at, text }: Mark): Promise<boolean> {
  const from = at < 0 ? device.size + at : at
  if (from < 0 || from + text.length > device.size) return false
  const found = await readBytes(device, from, text.length)
  return found.every((byte, i) => byte === text.charCodeAt(i))
}

async function confirmed(device: BlockDevice, { confirm }: Signature): Promise<boolean> {
  if (!confirm) return true
  if (confirm.at + confirm.length > device.size) return false
  return confirm.test(await readBytes(device, confirm.at, confirm.length))
}

function refusal({ kind, reason, what }: Signature): NotTrusted {
  const about = { kind }
  if (reason === 'encrypted') {
    return new NotTrusted('encrypted', `Cannot tell used from unused blocks: found ${what}`, about)
  }
  if (reason === 'volume-member') {
    return new NotTrusted('volume-member', `Cannot read the volume: found ${what}`, about)
  }
  return new NotTrusted('not-read', `Cannot read what stands here: found ${what}`, about)
}
