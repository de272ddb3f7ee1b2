/** Opening the repository that --repo names, with its password; `DISK@POINT` names. */
import type { Command } from 'commander'
import type { PointName, Repository } from '../backup/index.ts'
import { isVarveError } from '../base/index.ts'
import { canPrompt, givenPassword, type PasswordOptions, promptPassword } from './password.ts'
import { type Host, usageError } from './verb.ts'

export interface RepositoryOptions extends PasswordOptions {
  readonly repo?: string
}

export function addRepositoryOptions(
  command: Command,
  { required }: { readonly required: boolean },
): Command {
  const text = 'folder of the repository (or set VARVE_REPO)'
  return addPasswordOption(command.option('--repo <REPO>', required ? text : `${text}, for repo:DISK@POINT`))
}

export function addPasswordOption(command: Command): Command {
  return command.option(
    '--password-file <FILE>',
    'file whose first line is the password (or set VARVE_PASSWORD; else it is asked for)',
  )
}

/** The repository of --repo or VARVE_REPO. Asks for the password only when the repository wants one. */
export async function openRepositoryOf(options: RepositoryOptions, host: Host): Promise<Repository> {
  const path = options.repo ?? process.env['VARVE_REPO']
  if (path === undefined || path === '') {
    throw usageError('Cannot open the repository: found no --repo REPO, expected the folder of one')
  }
  const { openRepository } = await import('../backup/index.ts')
  const { signal } = host
  const password = await givenPassword(options)
  try {
    return await openRepository(path, { signal, password })
  } catch (error) {
    if (!isVarveError(error, 'PASSWORD_NEEDED') || password !== undefined || !canPrompt()) throw error
  }
  const asked = await promptPassword(`Password of ${path}`, { signal })
  return openRepository(path, { signal, password: asked })
}

/** `DISK@POINT`; a disk's name may hold an @, a point's may not. `DISK` alone: its latest point. */
export function parsePointName(text: string): PointName {
  const at = text.lastIndexOf('@')
  const disk = at < 0 ? text : text.slice(0, at)
  const point = at < 0 ? 'latest' : text.slice(at + 1)
  if (disk === '' || point === '') {
    throw usageError(
      `Cannot use point name '${text}': found no disk or no point, expected DISK@POINT`,
      'Point names are listed by `varve points`; DISK@latest is the newest.',
    )
  }
  return { disk, point }
}
