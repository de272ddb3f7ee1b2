/** Columns for people: two spaces between them, no lines around; cells may carry colours. */
import { stripVTControlCharacters } from 'node:util'

export interface Column {
  readonly title: string
  readonly align?: 'left' | 'right'
}

/**
 * Lines of a table: the titles, then a line a row. The last column is not padded, so that nothing trails. Columns
 * whose every cell is empty are left out.
 */
export function table(
  columns: readonly Column[],
  rows: readonly (readonly string[])[],
  style: (title: string) => string = (title) => title,
): string[] {
  const shown = columns
    .map((column, index) => ({ ...column, index }))
    .filter(({ index }) => rows.length === 0 || rows.some((row) => (row[index] ?? '') !== ''))
  const widths = shown.map(({ title, index }) =>
    rows.reduce((most, row) => Math.max(most, width(row[index] ?? '')), width(title)),
  )
  const line = (cells: readonly string[]): string =>
    cells
      .map((cell, at) => {
        const fill = ' '.repeat(Math.max(0, widths[at]! - width(cell)))
        return shown[at]!.align === 'right' ? fill + cell : cell + fill
      })
      .join('  ')
      .trimEnd()
  return [
    style(line(shown.map(({ title }) => title))),
    ...rows.map((row) => line(shown.map(({ index }) => row[index] ?? ''))),
  ]
}

/** Columns that the text takes on a terminal: colours take none, East Asian wide characters two, marks none. */
export function width(text: string): number {
  const plain = stripVTControlCharacters(text)
  if (/^[\x20-\x7e]*$/.test(plain)) return plain.length
  let columns = 0
  for (const char of plain) {
    if (/\p{Mark}|\u200d/u.test(char)) continue
    columns += WIDE.test(char) ? 2 : 1
  }
  return columns
}

const WIDE =
  /[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{1f300}-\u{1faff}\u{20000}-\u{3fffd}]/u
