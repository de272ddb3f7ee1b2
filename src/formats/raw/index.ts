/** The format `raw`: the file's bytes are the disk's bytes. See docs/formats/raw.md. */
import type { ImageFormat } from '../image-format.ts'
import { createRaw, openRaw } from './raw-layer.ts'

export { RawLayer } from './raw-layer.ts'

export const rawFormat: ImageFormat = {
  name: 'raw',
  aliases: ['img'],
  // No magic: raw is what is left when no other format recognises the bytes (probeFormat).
  probe: () => false,
  open: openRaw,
  create: createRaw,
}
