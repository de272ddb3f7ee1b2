/**
 * The refusal of a reader of the guest's structures (partition tables, volume managers, file systems): "I cannot
 * vouch for this". The room `inuse` answers it by taking the whole region as in use, with the reason.
 */
import { VarveError } from './errors.ts'

/** Why a region is taken as wholly in use. The codes are listed in docs/errors.md. */
export class NotTrusted extends VarveError {
  /** Kebab-case, prefixed by the reader's name: `fat-size-mismatch`. */
  readonly reason: string
  /** What is known of the region all the same (kind, label, uuid), for print. */
  readonly about: {
    readonly kind?: string
    readonly uuid?: string | undefined
    readonly label?: string | undefined
  }

  constructor(reason: string, message: string, about: NotTrusted['about'] = {}) {
    super('UNSUPPORTED', message, { fields: { reason } })
    this.reason = reason
    this.about = about
  }
}
