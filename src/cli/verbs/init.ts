/** varve init: makes a repository. */

import { VarveError } from '../../base/index.ts'
import { printable } from '../output.ts'
import { canPrompt, givenPassword, type PasswordOptions, promptPassword } from '../password.ts'
import { addPasswordOption } from '../repository.ts'
import { formatBytes } from '../units.ts'
import { type Host, helpText, usageError, type Verb } from '../verb.ts'

interface InitOptions extends PasswordOptions {
  readonly encrypt?: true
  readonly frameSize?: number
  readonly chunkSize?: number
  readonly json?: true
}

export const verb: Verb = (command, host) => {
  addPasswordOption(
    command
      .argument('REPO', 'folder to make; it must not exist or be empty')
      .option('--encrypt', 'encrypt all that is stored; without the password nobody can read it')
      .option('--chunk-size <KIB>', 'unit of deduplication, 256 to 4096 (default 1024)', kibibytes)
      .option('--frame-size <KIB>', 'unit of compression and of random reads, 64 to 1024', kibibytes),
  )
    .option('--json', 'one JSON object')
    .addHelpText(
      'after',
      helpText({
        examples: ['init /backup/vms', 'init --encrypt --password-file /root/vms.password /backup/vms'],
        exits: { 1: 'failed, or something stands there already' },
      }),
    )
    .action((path: string, options: InitOptions) => runInit(path, options, host))
}

function kibibytes(text: string): number {
  if (!/^[1-9][0-9]{0,6}$/.test(text)) {
    throw usageError(`Cannot use size '${text}': expected a number of KiB`)
  }
  return Number(text) * 1024
}

async function runInit(path: string, options: InitOptions, host: Host): Promise<void> {
  const { output, signal } = host
  let password: string | undefined
  if (options.encrypt) {
    password = await givenPassword(options)
    if (password === undefined) {
      if (!canPrompt()) {
        throw new VarveError(
          'PASSWORD_NEEDED',
          'Cannot make an encrypted repository: found no password, expected one',
        )
      }
      password = await promptPassword(`New password for ${printable(path)}`, { signal, twice: true })
    }
  } else if (options.passwordFile !== undefined) {
    // Going on would leave a repository in the clear with an owner who believes otherwise.
    throw usageError(
      'Cannot make the repository: found --password-file without --encrypt, expected both or none',
    )
  }
  const { createRepository } = await import('../../backup/index.ts')
  await using repository = await createRepository(path, {
    password,
    chunkBytes: options.chunkSize,
    frameBytes: options.frameSize,
  })
  const { id, settings } = repository
  if (options.json) {
    await output.document({ path: repository.path, id, ...settings })
    return
  }
  await output.lines(
    `Made repository ${output.style('bold', printable(repository.path))}, ${
      settings.encrypted ? output.style('green', 'encrypted') : 'not encrypted'
    } (chunks of ${formatBytes(settings.chunkBytes)}, frames of ${formatBytes(settings.frameBytes)})`,
  )
  if (settings.encrypted) await output.lines('Keep the password safe: without it nothing can be restored.')
}
