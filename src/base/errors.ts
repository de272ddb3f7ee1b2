/**
 * The one table of errors: code -> exit code, HTTP status, errno and what the person can do.
 *
 * Rules: a code never changes its meaning once released; the message is free text and may change; `cause` is
 * kept. A message reads "Cannot <do> <object>: found <this>, expected <that>", capital first, no full stop.
 * A caller's own mistake (wrong argument types, offsets outside the device) is a TypeError or RangeError, not
 * one of these. docs/errors.md lists the same codes; test/architecture.test.ts ties the two together.
 */

interface ErrorRow {
  /** Exit code of the command line, docs/cli.md. */
  readonly exit: 1 | 2 | 3 | 10 | 11 | 12 | 13 | 130
  /** HTTP status that the daemon answers with. */
  readonly http: number
  /** What a FUSE or NBD client is told. */
  readonly errno:
    | 'EIO'
    | 'EINVAL'
    | 'ENOENT'
    | 'EACCES'
    | 'EAGAIN'
    | 'ENOSPC'
    | 'EROFS'
    | 'EOPNOTSUPP'
    | 'EINTR'
  /** One sentence for the person at 3 a.m. */
  readonly whatToDo: string
}

export type ErrorCode =
  | 'USAGE'
  | 'NOT_FOUND'
  | 'EXISTS'
  | 'ACCESS_DENIED'
  | 'IO'
  | 'NO_SPACE'
  | 'LOCKED'
  | 'READ_ONLY'
  | 'CORRUPT'
  | 'MISMATCH'
  | 'UNSUPPORTED'
  | 'ENCRYPTED'
  | 'LIMIT'
  | 'BACKING_DENIED'
  | 'BACKING_MISSING'
  | 'BACKING_FORMAT'
  | 'CHAIN_LOOP'
  | 'CHAIN_DEPTH'
  | 'WRONG_PASSWORD'
  | 'PASSWORD_NEEDED'
  | 'CANCELLED'
  | 'PARTIAL'
  | 'INTERNAL'

export const ERRORS: Readonly<Record<ErrorCode, ErrorRow>> = {
  USAGE: { exit: 2, http: 400, errno: 'EINVAL', whatToDo: 'Run the verb with --help; it shows an example.' },
  NOT_FOUND: {
    exit: 10,
    http: 404,
    errno: 'ENOENT',
    whatToDo: 'Check the name; `varve points` lists what a repository holds.',
  },
  EXISTS: {
    exit: 1,
    http: 409,
    errno: 'EINVAL',
    whatToDo: 'Choose another name, or remove what stands there first.',
  },
  ACCESS_DENIED: {
    exit: 1,
    http: 403,
    errno: 'EACCES',
    whatToDo: 'Give this user the right to read (or write) the path, or run as another user.',
  },
  IO: {
    exit: 1,
    http: 500,
    errno: 'EIO',
    whatToDo: 'The operating system refused; look at its own log (dmesg) and at the medium.',
  },
  NO_SPACE: {
    exit: 1,
    http: 507,
    errno: 'ENOSPC',
    whatToDo: 'Free space on the target and run the same command again; nothing that was there is lost.',
  },
  LOCKED: {
    exit: 11,
    http: 423,
    errno: 'EAGAIN',
    whatToDo: 'Another program holds it; wait for it or end it, then try again.',
  },
  READ_ONLY: {
    exit: 1,
    http: 403,
    errno: 'EROFS',
    whatToDo: 'Open it for writing, or choose a target that can be written.',
  },
  CORRUPT: {
    exit: 12,
    http: 422,
    errno: 'EIO',
    whatToDo: 'Do not write to it. Copy it first; then `varve check` says what is wrong.',
  },
  MISMATCH: {
    exit: 12,
    http: 409,
    errno: 'EIO',
    whatToDo: 'The two differ where they should be equal; the message names the first place.',
  },
  UNSUPPORTED: {
    exit: 13,
    http: 501,
    errno: 'EOPNOTSUPP',
    whatToDo: 'This feature of the format is not handled; convert the image with the tool that made it.',
  },
  ENCRYPTED: {
    exit: 13,
    http: 501,
    errno: 'EOPNOTSUPP',
    whatToDo: 'The image is encrypted by its own format; decrypt it with the tool that made it.',
  },
  LIMIT: {
    exit: 12,
    http: 422,
    errno: 'EIO',
    whatToDo: 'The image claims more than a sane image can need, so it was not believed.',
  },
  BACKING_DENIED: {
    exit: 1,
    http: 403,
    errno: 'EACCES',
    whatToDo: 'If you trust the image, allow the folder of its backing file with --allow-backing DIR.',
  },
  BACKING_MISSING: {
    exit: 10,
    http: 404,
    errno: 'ENOENT',
    whatToDo: 'Bring the backing file back to the place that the image names.',
  },
  BACKING_FORMAT: {
    exit: 12,
    http: 422,
    errno: 'EIO',
    whatToDo:
      'The image does not say what format its backing file has; write it in with `qemu-img rebase -u -F FORMAT`.',
  },
  CHAIN_LOOP: {
    exit: 12,
    http: 422,
    errno: 'EIO',
    whatToDo: 'An image of the chain names one above it as its backing file; no reader can open that.',
  },
  CHAIN_DEPTH: {
    exit: 12,
    http: 422,
    errno: 'EIO',
    whatToDo: 'The chain is deeper than 256 layers; merge some of them.',
  },
  WRONG_PASSWORD: {
    exit: 1,
    http: 403,
    errno: 'EACCES',
    whatToDo: 'Try the password again; without it nobody can read an encrypted repository.',
  },
  PASSWORD_NEEDED: {
    exit: 2,
    http: 401,
    errno: 'EACCES',
    whatToDo: 'Give --password-file FILE or set VARVE_PASSWORD, or run on a terminal.',
  },
  CANCELLED: {
    exit: 130,
    http: 499,
    errno: 'EINTR',
    whatToDo: 'Run the command again when you want it done; nothing is left half made.',
  },
  PARTIAL: {
    exit: 3,
    http: 207,
    errno: 'EIO',
    whatToDo: 'Some of it was done; the output names what was not and why.',
  },
  INTERNAL: {
    exit: 1,
    http: 500,
    errno: 'EIO',
    whatToDo: 'This is a bug in varve; please report it with the whole message.',
  },
}

/** Facts beside the message; programs read these, never the prose. */
export type ErrorFields = Readonly<Record<string, string | number | boolean | undefined>>

export interface VarveErrorOptions {
  readonly fields?: ErrorFields
  readonly cause?: unknown
  /** Replaces the table's `whatToDo` where a better hint is known. */
  readonly hint?: string
}

/** Any failure that the world can cause. Bugs throw plain Errors (see `assert`). */
export class VarveError extends Error {
  override readonly name = 'VarveError'
  readonly code: ErrorCode
  readonly fields: ErrorFields
  readonly hint: string

  constructor(code: ErrorCode, message: string, options: VarveErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.code = code
    this.fields = options.fields ?? {}
    this.hint = options.hint ?? ERRORS[code].whatToDo
  }

  get exitCode(): number {
    return ERRORS[this.code].exit
  }
}

export function isVarveError(error: unknown, ...codes: readonly ErrorCode[]): error is VarveError {
  return error instanceof VarveError && (codes.length === 0 || codes.includes(error.code))
}

/** Says that only a bug in varve can make `condition` false. What the world can break throws a VarveError. */
export function assert(condition: unknown, what: string): asserts condition {
  if (!condition) throw new VarveError('INTERNAL', `Assertion failed: ${what}`)
}

/** Turns what Node or a system call threw into one of ours; VarveErrors pass through unchanged. */
export function fromSystem(error: unknown, doing: string, path: string): VarveError {
  if (error instanceof VarveError) return error
  const errno = (error as NodeJS.ErrnoException | undefined)?.code
  const options = { cause: error, fields: { path, ...(errno === undefined ? {} : { errno }) } }
  const why = error instanceof Error ? error.message.replace(/, .*$/, '') : String(error)
  switch (errno) {
    case 'ENOENT':
    case 'ENOTDIR':
    case 'ENXIO':
      return new VarveError('NOT_FOUND', `Cannot ${doing} ${path}: no such file`, options)
    case 'EACCES':
    case 'EPERM':
      return new VarveError('ACCESS_DENIED', `Cannot ${doing} ${path}: permission denied`, options)
    case 'EEXIST':
      return new VarveError('EXISTS', `Cannot ${doing} ${path}: it exists already`, options)
    case 'ENOSPC':
    case 'EDQUOT':
    case 'EFBIG':
      return new VarveError('NO_SPACE', `Cannot ${doing} ${path}: no space left`, options)
    case 'EROFS':
      return new VarveError('READ_ONLY', `Cannot ${doing} ${path}: read-only file system`, options)
    case 'EAGAIN':
    case 'EBUSY':
    case 'ETXTBSY':
      return new VarveError('LOCKED', `Cannot ${doing} ${path}: it is in use`, options)
    case 'EOPNOTSUPP':
    case 'ENOTSUP':
    case 'ENOSYS':
      return new VarveError('UNSUPPORTED', `Cannot ${doing} ${path}: this host does not offer it`, options)
    case 'ABORT_ERR':
      return new VarveError('CANCELLED', `Cannot ${doing} ${path}: interrupted`, options)
    default:
      return new VarveError('IO', `Cannot ${doing} ${path}: ${why}`, options)
  }
}

/** Throws CANCELLED once the signal has fired. Call it in every loop that may run long. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted)
    throw new VarveError('CANCELLED', 'Cannot go on: interrupted', { cause: signal.reason })
}
