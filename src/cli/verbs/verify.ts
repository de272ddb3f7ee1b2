/** varve verify: recomputes what is stored; with --against, compares a point with its source byte by byte. */
import type { Finding, Repository, VerifyAgainstResult, VerifyResult } from '../../backup/index.ts'
import { VarveError } from '../../base/index.ts'
import { RangeSet } from '../../extents/index.ts'
import { addImageOptions, type ImageOptions, openImage } from '../image.ts'
import { type Output, printable } from '../output.ts'
import { progressLine } from '../progress.ts'
import { addRepositoryOptions, openRepositoryOf, parsePointName } from '../repository.ts'
import { count, formatBytes, formatSeconds } from '../units.ts'
import { type Host, helpText, usageError, type Verb } from '../verb.ts'

interface VerifyVerbOptions extends ImageOptions {
  readonly against?: string
  readonly json?: true
}

export const verb: Verb = (command, host) => {
  addRepositoryOptions(addImageOptions(command), { required: true })
    .argument('[DISK[@POINT]]', 'only this point, or all points of this disk (default: everything)')
    .option('--against <IMAGE>', 'compare the point with this image, which must be unchanged since')
    .option('--json', 'one JSON object')
    .addHelpText(
      'after',
      helpText({
        examples: [
          'verify --repo /backup/vms',
          'verify web01@latest --against web01.qcow2 --repo /backup/vms',
        ],
        exits: {
          11: 'a running VM or another program writes to the image',
          12: 'something is damaged, or the image differs; the output names it',
        },
      }),
    )
    .action((target: string | undefined, options: VerifyVerbOptions) => runVerify(target, options, host))
}

async function runVerify(target: string | undefined, options: VerifyVerbOptions, host: Host): Promise<void> {
  if (options.against !== undefined && target === undefined) {
    throw usageError('Cannot verify against an image: found no point, expected DISK@POINT')
  }
  if (options.against === undefined && (options.format !== undefined || options.allowBacking)) {
    throw usageError('Cannot run verify: found options of an image, expected --against IMAGE with them')
  }
  await using repository = await openRepositoryOf(options, host)
  if (options.against !== undefined) await compare(repository, target!, options.against, options, host)
  else await recompute(repository, target, options, host)
}

async function recompute(
  repository: Repository,
  target: string | undefined,
  options: VerifyVerbOptions,
  { output, signal }: Host,
): Promise<void> {
  const scope = target === undefined ? {} : target.includes('@') ? parsePointName(target) : { disk: target }
  const result = await (async () => {
    using line = progressLine(target ?? '')
    return await repository.verify({ ...scope, signal, progress: line.listener })
  })()
  if (options.json) await output.document(result)
  else await output.stream(verifyText(result, output))
  if (!result.ok) {
    const first = result.findings[0]
    throw new VarveError(
      'CORRUPT',
      `Cannot vouch for ${repository.path}: found ${count(result.findings.length, 'damaged object')}${first ? `, first ${first.name}` : ''}`,
      {
        fields: { findings: result.findings.length },
        hint: 'Points that are not named above are whole. Back the disks up again; keep the repository as it is.',
      },
    )
  }
}

function verifyText(result: VerifyResult, output: Output): string[] {
  const facts = `${count(result.points, 'point')}, ${count(result.pages, 'map page')}, ${count(result.chunks, 'chunk')} in ${count(result.packs, 'pack')}; ${formatBytes(result.bytes)} read in ${formatSeconds(result.seconds)}`
  if (result.ok) return [`${output.style('green', '✓')} everything is whole: ${facts}`]
  return [...result.findings.flatMap((finding) => findingText(finding, output)), '', `Looked at ${facts}`]
}

const SHOWN_POINTS = 5

function findingText(finding: Finding, output: Output): string[] {
  const place = finding.offset === undefined ? '' : ` at ${finding.offset}`
  const lines = [
    `${output.style('red', '✗')} ${finding.object} ${printable(finding.name)}${place}: ${printable(finding.message)} (${finding.code})`,
  ]
  if (finding.points.length > 0) {
    const names = finding.points
      .slice(0, SHOWN_POINTS)
      .map(({ disk, point }) => `${printable(disk)}@${point}`)
    const more = finding.points.length - names.length
    lines.push(`    touches ${names.join(', ')}${more > 0 ? ` and ${more} more` : ''}`)
  }
  return lines
}

async function compare(
  repository: Repository,
  target: string,
  against: string,
  options: VerifyVerbOptions,
  host: Host,
): Promise<void> {
  const { output, signal } = host
  const name = parsePointName(target)
  const { mapInUse } = await import('../../inuse/index.ts')
  await using image = await openImage(against, options, host, { still: true })
  const result = await (async () => {
    using line = progressLine(name.disk)
    // A point that kept every block is compared in every block.
    const whole = await keptAllBlocks(repository, name, signal)
    const inUse = whole
      ? RangeSet.of(0, image.device.size)
      : (await mapInUse(image.device, { signal, progress: line.listener })).ranges
    return await repository.verifyAgainst(
      name,
      { device: image.device, inUse },
      { signal, progress: line.listener },
    )
  })()
  if (options.json) await output.document(result)
  else await output.stream(againstText(result, output))
  if (result.equal) return
  const first = result.differences[0]
  throw new VarveError(
    'MISMATCH',
    first
      ? `Cannot call ${against} equal to ${result.disk}@${result.point}: found the first difference at ${first.start}, ${first.length} bytes`
      : `Cannot call ${against} equal to ${result.disk}@${result.point}: found ${result.notKeptBytes} bytes in use that the point did not keep`,
    { fields: { disk: result.disk, point: result.point, offset: first?.start } },
  )
}

async function keptAllBlocks(
  repository: Repository,
  name: { readonly disk: string; readonly point: string },
  signal: AbortSignal,
): Promise<boolean> {
  await using point = await repository.openPoint(name, { signal })
  return (point.info.about as { readonly allBlocks?: boolean } | undefined)?.allBlocks === true
}

function againstText(result: VerifyAgainstResult, output: Output): string[] {
  const name = `${printable(result.disk)}@${result.point}`
  const facts = `${formatBytes(result.comparedBytes)} compared in ${formatSeconds(result.seconds)}`
  if (result.equal) return [`${output.style('green', '✓')} ${name} equals the image: ${facts}`]
  const lines = result.differences.map(
    ({ start, length }) => `${output.style('red', '✗')} differs at ${start}, ${length} bytes`,
  )
  if (result.notKeptBytes > 0) {
    lines.push(`${output.style('red', '✗')} ${formatBytes(result.notKeptBytes)} in use now were not kept`)
  }
  return [...lines, `${name}: ${facts}`]
}
