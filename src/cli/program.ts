/**
 * The verbs and how one is run: the verb's file is loaded only when it is asked for (start-up is part of every
 * command's time), its arguments are parsed, its failure becomes a line on stderr and an exit code.
 */
import { Command, CommanderError } from 'commander'
import { VarveError } from '../base/index.ts'
import { asVarveError, reportFailure } from './failure.ts'
import { catchInterrupts } from './interrupt.ts'
import { Output } from './output.ts'
import type { Verb } from './verb.ts'
import { version } from './version.ts'

interface VerbEntry {
  readonly name: string
  readonly summary: string
  readonly load: () => Promise<{ readonly verb: Verb }>
}

/** In the order of help. test/cli proves that every file of verbs/ is here. */
export const VERBS: readonly VerbEntry[] = [
  {
    name: 'inspect',
    summary: 'what is in an image: layers, partitions, file systems, the share in use',
    load: () => import('./verbs/inspect.ts'),
  },
  {
    name: 'map',
    summary: 'extents of an image: data, zeros, holes, what is in use, where it stands',
    load: () => import('./verbs/map.ts'),
  },
  {
    name: 'convert',
    summary: 'copy an image into another format, or only what is in use of it',
    load: () => import('./verbs/convert.ts'),
  },
  {
    name: 'check',
    summary: "check an image's structure",
    load: () => import('./verbs/check.ts'),
  },
  {
    name: 'bitmap',
    summary: 'dirty bitmaps: list, judge, plan for and edit them',
    load: () => import('./verbs/bitmap.ts'),
  },
  { name: 'init', summary: 'make a repository', load: () => import('./verbs/init.ts') },
  {
    name: 'backup',
    summary: 'make restore points of images, by the blocks that matter',
    load: () => import('./verbs/backup.ts'),
  },
  {
    name: 'points',
    summary: 'list the restore points of a repository',
    load: () => import('./verbs/points.ts'),
  },
  {
    name: 'restore',
    summary: 'write a restore point into an image or a block device',
    load: () => import('./verbs/restore.ts'),
  },
  {
    name: 'verify',
    summary: 'recompute what a repository holds; compare a point with its source',
    load: () => import('./verbs/verify.ts'),
  },
  {
    name: 'reindex',
    summary: "make a repository's deduplication index anew",
    load: () => import('./verbs/reindex.ts'),
  },
]

const AFTER_HELP = `
IMAGE is the path of a disk image or block device, or repo:DISK@POINT with --repo.
\`varve VERB --help\` shows the verb's options, an example and its exit codes.

Exit codes: 0 done · 1 failed · 2 usage · 3 done in part · 10 not found · 11 locked
12 corrupt or invalid · 13 unsupported · 130 interrupted`

/** Runs one command line; prints what there is to print and returns the exit code. Never rejects. */
export async function runProgram(args: readonly string[]): Promise<number> {
  const end = args.indexOf('--')
  const output = new Output({ json: (end < 0 ? args : args.slice(0, end)).includes('--json') })
  using interrupt = catchInterrupts()
  try {
    const program = styled(new Command('varve'))
      .description("Knows which blocks of a virtual machine's disk matter, and backs up those")
      .version(`varve ${version()}`, '--version', 'print the version')
      .helpOption('--help', 'print this help')
      .helpCommand('help [VERB]', 'print the help of a verb')
      .usage('VERB [OPTIONS] …')
      .addHelpText('after', AFTER_HELP)
    const asked = args[0] === 'help' ? args[1] : args.find((arg) => !arg.startsWith('-'))
    for (const entry of VERBS) {
      const command = styled(program.command(entry.name).summary(entry.summary))
        .description(capital(entry.summary))
        .helpOption('--help', 'print this help')
      if (entry.name === asked) {
        const { verb } = await entry.load()
        verb(command, { signal: interrupt.signal, output })
      }
    }
    if (args.length === 0) {
      program.outputHelp({ error: true })
      return 2
    }
    await program.parseAsync(args, { from: 'user' })
    return output.stdoutFailed ? 1 : 0
  } catch (error) {
    if (error instanceof CommanderError) {
      // Help and version end the parsing by an exception too.
      if (error.exitCode === 0) return 0
      return reportFailure(usage(error, args), output)
    }
    return reportFailure(asVarveError(error, interrupt.signal), output)
  }
}

function styled(command: Command): Command {
  return command
    .exitOverride()
    .configureOutput({ outputError: () => {} })
    .configureHelp({
      styleTitle: (title) => (process.stdout.hasColors?.() ? `\x1b[1m${title}\x1b[22m` : title),
      subcommandTerm: (sub) => sub.name(),
      helpWidth: Math.min(process.stdout.columns ?? 100, 100),
    })
}

function usage(error: CommanderError, args: readonly string[]): VarveError {
  const verb = VERBS.find(({ name }) => name === args[0])?.name
  const [first = '', ...rest] = error.message.replace(/^error: /, '').split('\n')
  const hint =
    verb === undefined ? '`varve --help` lists the verbs.' : `\`varve ${verb} --help\` shows an example.`
  return new VarveError('USAGE', `Cannot run ${verb ?? 'varve'}: ${first}`, {
    hint: [...rest.map((line) => line.replace(/^\((.*)\)$/, '$1')), hint].join(' '),
  })
}

function capital(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1)
}
