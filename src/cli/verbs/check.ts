/** varve check: the structure of one image file, by its format's own rules. Reads only. */
import { VarveError } from '../../base/index.ts'
import { openHostFile } from '../../device/index.ts'
import { type CheckFinding, formatByName, probeFormat } from '../../formats/index.ts'
import { type Output, printable } from '../output.ts'
import { count } from '../units.ts'
import { type Host, helpText, usageError, type Verb } from '../verb.ts'

interface CheckOptions {
  readonly format?: string
  readonly json?: true
}

export const verb: Verb = (command, host) => {
  command
    .argument('IMAGE', 'image; its backing files are not looked at')
    .option('--format <FORMAT>', 'format of IMAGE (else its magic decides)')
    .option('--json', 'one JSON object')
    .addHelpText(
      'after',
      helpText({
        examples: ['check web01.qcow2'],
        exits: {
          3: 'space is leaked, but nothing is wrong',
          12: 'the image is corrupt',
          13: 'its format has no check',
        },
      }),
    )
    .action((path: string, options: CheckOptions) => runCheck(path, options, host))
}

async function runCheck(path: string, options: CheckOptions, { output, signal }: Host): Promise<void> {
  const named = options.format === undefined ? undefined : formatByName(options.format)
  if (options.format !== undefined && !named) {
    throw usageError(`Cannot check ${path}: found format '${options.format}', expected one that is known`)
  }
  await using file = await openHostFile(path)
  const format = named ?? (await probeFormat(file, signal))
  if (!format.check) {
    throw new VarveError('UNSUPPORTED', `Cannot check ${path}: format ${format.name} has no check`, {
      fields: { path, format: format.name },
      hint:
        format.name === 'raw'
          ? 'A raw image has no structure of its own; `varve inspect` looks at what is inside.'
          : 'This format is read, but it has no check yet; `varve inspect` says whether it opens.',
    })
  }
  const findings = await format.check(file, { signal })
  const errors = findings.filter(({ severity }) => severity === 'error').length
  const leaks = findings.filter(({ severity }) => severity === 'leak').length
  if (options.json) await output.document({ path, format: format.name, errors, leaks, findings })
  else await output.stream(textOf(path, format.name, findings, output))
  if (errors > 0) {
    throw new VarveError('CORRUPT', `Cannot call ${path} whole: found ${count(errors, 'error')}`, {
      fields: { path, errors, leaks },
      hint: 'Do not write to it. Copy it first.',
    })
  }
  if (leaks > 0) {
    throw new VarveError(
      'PARTIAL',
      `Cannot call ${path} clean: found ${count(leaks, 'leak')} of space, no error`,
      {
        fields: { path, leaks },
        hint: 'Leaked space does no harm; `qemu-img check -r leaks` gives it back.',
      },
    )
  }
}

function textOf(path: string, format: string, findings: readonly CheckFinding[], output: Output): string[] {
  if (findings.length === 0)
    return [`${output.style('green', '✓')} ${printable(path)}: ${format}, nothing wrong`]
  return findings.map(({ severity, text, offset }) => {
    const style = severity === 'error' ? 'red' : severity === 'leak' ? 'yellow' : 'dim'
    return `${output.style(style, severity)}  ${printable(text)}${offset === undefined ? '' : ` (at ${offset})`}`
  })
}
