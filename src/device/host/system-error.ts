/**
 * What a system call answers when it fails: errno as Node's own errors carry it (`code` = 'EIO'), so that
 * `fromSystem` of base turns both kinds into ours.
 */
import { constants } from 'node:os'
import { getSystemErrorMessage } from 'node:util'

export class SystemError extends Error {
  override readonly name = 'SystemError'
  /** Symbolic: 'ENOSPC'; `E<number>` for one that Node has no name for. */
  readonly code: string
  readonly errno: number
  readonly syscall: string

  constructor(syscall: string, errno: number) {
    const code = NAMES.get(errno) ?? `E${errno}`
    super(`${code}: ${getSystemErrorMessage(-errno)}, ${syscall}`)
    this.code = code
    this.errno = errno
    this.syscall = syscall
  }
}

/**
 * True for "this host, file system or kind of file does not offer that call": the caller takes the plain path.
 * EPERM is among them because containers refuse unknown calls with it (seccomp); EINVAL because file systems
 * answer it for what they lack. A caller that sends a wrong argument sees the plain path, never a wrong result.
 */
export function isNotOffered(error: unknown): boolean {
  return error instanceof SystemError && NOT_OFFERED.has(error.code)
}

const NOT_OFFERED: ReadonlySet<string> = new Set([
  'ENOSYS',
  'EOPNOTSUPP',
  'ENOTSUP',
  'ENOTTY',
  'EINVAL',
  'EXDEV',
  'EPERM',
  'ETXTBSY',
])

// Some numbers have two names; the first is the one that Node uses (EAGAIN, not EWOULDBLOCK).
const NAMES: ReadonlyMap<number, string> = new Map(
  Object.entries(constants.errno)
    .map(([name, value]): [number, string] => [value, name])
    .reverse(),
)
