/**
 * What stands on a device: every registered scheme, file system and foreign signature is asked, and the answer is
 * only believed when exactly one says yes.
 *
 * Rule: leftovers of an earlier life (an ext superblock under a new partition table, a GPT under a new FAT) are
 * common, and which of two signatures is the live one cannot be told from outside. So two are none.
 */
import { FILE_SYSTEM_TYPES, type FileSystemType, RAID_MEMBER } from '../filesystems/index.ts'
import { type Scope, VOLUME_SCHEMES, type VolumeScheme } from '../volumes/index.ts'
import type { ProbeCache } from './probe-cache.ts'

/** What is asked. Tests bring their own. */
export interface Registry {
  readonly schemes: readonly VolumeScheme[]
  readonly types: readonly FileSystemType[]
}

export const REGISTRY: Registry = { schemes: VOLUME_SCHEMES, types: FILE_SYSTEM_TYPES }

export type Recognized =
  | { readonly is: 'scheme'; readonly scheme: VolumeScheme }
  | { readonly is: 'file-system'; readonly type: FileSystemType }
  | { readonly is: 'unknown' }
  | { readonly is: 'ambiguous'; readonly names: readonly string[] }

export async function recognize(device: ProbeCache, scope: Scope, registry: Registry): Promise<Recognized> {
  if (await RAID_MEMBER.probe(device)) return { is: 'file-system', type: RAID_MEMBER }
  const found: (Recognized & { is: 'scheme' | 'file-system' })[] = []
  for (const scheme of registry.schemes) {
    if (!scheme.scopes.includes(scope) || !(await scheme.probe(device))) continue
    if (scheme.showsContents) return { is: 'scheme', scheme }
    found.push({ is: 'scheme', scheme })
  }
  for (const type of registry.types) {
    if (await type.probe(device)) found.push({ is: 'file-system', type })
  }
  const [only] = found
  if (!only) return { is: 'unknown' }
  if (found.length === 1) return only
  return {
    is: 'ambiguous',
    names: found.map((one) => (one.is === 'scheme' ? one.scheme.name : one.type.name)),
  }
}
