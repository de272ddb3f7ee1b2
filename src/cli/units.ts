/** Numbers for people: binary units, shares, durations. Programs get plain numbers by --json. */

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB'] as const

/** `1536` -> `1.50 KiB`: three digits that matter; whole numbers below 1 KiB and where nothing is lost. */
export function formatBytes(bytes: number): string {
  let value = bytes
  let unit = 0
  // 1023.995 would print as 1024: go on to the next unit before that.
  while (value >= 999.5 && unit < UNITS.length - 1 && (value >= 1024 || unit > 0)) {
    value /= 1024
    unit++
  }
  if (unit === 0 || Number.isInteger(value)) return `${value} ${UNITS[unit]}`
  return `${value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0)} ${UNITS[unit]}`
}

/** `part` of `whole` in per cent; a part that is there is never shown as 0 %, one that is not all never as 100 %. */
export function formatShare(part: number, whole: number): string {
  if (whole <= 0 || part <= 0) return '0%'
  const percent = (part / whole) * 100
  if (percent >= 100) return '100%'
  if (percent < 1) return '<1%'
  return `${Math.min(99, Math.round(percent))}%`
}

/** `3.2 s`, `4:05`, `1:02:03`. */
export function formatSeconds(seconds: number): string {
  if (seconds < 0.01) return `${Math.round(seconds * 1000)} ms`
  if (seconds < 10) return `${seconds.toFixed(seconds < 1 ? 2 : 1)} s`
  if (seconds < 60) return `${Math.round(seconds)} s`
  return formatClock(seconds)
}

/** `0:07`, `4:05`, `1:02:03`. */
export function formatClock(seconds: number): string {
  const whole = Math.max(0, Math.ceil(seconds))
  const two = (value: number): string => String(value).padStart(2, '0')
  const minutes = Math.floor(whole / 60)
  return minutes < 60
    ? `${minutes}:${two(whole % 60)}`
    : `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${two(whole % 60)}`
}

/** `1 new chunk`, `2 new chunks`. */
export function count(number: number, one: string, many = `${one}s`): string {
  return `${number} ${number === 1 ? one : many}`
}
