/**
 * The text format of LVM2 metadata: sections `name { … }`, `key = value`, numbers, "strings" and [arrays], `#` comments.
 * A guest's bytes: nesting and size are bounded, anything unexpected is refused.
 */
import { NotTrusted } from '../../base/index.ts'

export type Value = number | string | readonly (number | string)[]

export class Section {
  readonly values: Map<string, Value> = new Map()
  readonly sections: Map<string, Section> = new Map()

  /** @throws NotTrusted when it is not there or no non-negative integer */
  number(key: string): number {
    const value = this.values.get(key)
    if (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0) return value
    throw refuse(`found no number ${key}`)
  }

  string(key: string): string {
    const value = this.values.get(key)
    if (typeof value === 'string') return value
    throw refuse(`found no string ${key}`)
  }

  strings(key: string): readonly string[] {
    return this.list(key).filter((value) => typeof value === 'string')
  }

  /** An array, or a single value as an array of one; empty when it is not there. */
  list(key: string): readonly (number | string)[] {
    const value = this.values.get(key)
    if (value === undefined) return []
    return typeof value === 'object' ? value : [value]
  }

  section(key: string): Section {
    const section = this.sections.get(key)
    if (section) return section
    throw refuse(`found no section ${key}`)
  }
}

const DEEPEST = 8
const MOST_ENTRIES = 500_000

/** Parses a whole document. @throws NotTrusted */
export function parseText(text: string): Section {
  const tokens = text.matchAll(TOKEN)
  const root = new Section()
  const open: Section[] = [root]
  let entries = 0
  const next = (): string | undefined => {
    for (;;) {
      const token = tokens.next()
      if (token.done) return undefined
      const [all, skipped] = token.value
      if (skipped !== undefined) continue
      return all
    }
  }
  for (let token = next(); token !== undefined; token = next()) {
    if (++entries > MOST_ENTRIES) throw refuse('found too many entries')
    if (token === '}') {
      open.pop()
      if (open.length === 0) throw refuse('found an end without a section')
      continue
    }
    if (!/^[A-Za-z0-9_.+-]/.test(token))
      throw refuse(`found ${JSON.stringify(token.slice(0, 20))}, expected a name`)
    const current = open.at(-1)!
    const sign = next()
    if (sign === '{') {
      const section = new Section()
      current.sections.set(token, section)
      open.push(section)
      if (open.length > DEEPEST) throw refuse('found sections nested too deep')
    } else if (sign === '=') {
      current.values.set(token, readValue(next))
    } else {
      throw refuse(`found ${JSON.stringify(sign?.slice(0, 20))} after ${token}`)
    }
  }
  if (open.length !== 1) throw refuse('found a section without an end')
  return root
}

function readValue(next: () => string | undefined): Value {
  const token = next()
  if (token !== '[') return scalar(token)
  const list: (number | string)[] = []
  for (let item = next(); item !== ']'; item = next()) {
    if (item === ',') continue
    list.push(scalar(item))
    if (list.length > MOST_ENTRIES) throw refuse('found too long an array')
  }
  return list
}

function scalar(token: string | undefined): number | string {
  if (token === undefined) throw refuse('found no value')
  if (token.startsWith('"')) return token.slice(1, -1).replace(/\\(.)/g, '$1')
  if (/^-?\d+(\.\d+)?$/.test(token)) return Number(token)
  throw refuse(`found ${JSON.stringify(token.slice(0, 20))}, expected a value`)
}

/** White space and comments (group 1), strings, punctuation, words; a stray character is a token of its own. */
const TOKEN = /(\s+|#[^\n]*)|"(?:[^"\\]|\\.)*"|[{}[\]=,]|[A-Za-z0-9_.+-]+|./gs

function refuse(why: string): NotTrusted {
  return new NotTrusted('lvm-text-invalid', `Cannot use LVM metadata: ${why}`, { kind: 'lvm2' })
}
