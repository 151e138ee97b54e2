// Bytes, text and canonical JSON, as docs/FORMATS.md spells them; nothing here knows what they mean.
// Whatever has a second spelling is refused: a verifier that repairs its input proves something else.

import { createHash } from 'node:crypto'

const MAX_DEPTH = 32 // containers inside each other, the outermost counted

// Why something is no proof. `error` is the class, `field` and `entry` say where, `step` which step.
export class Refused extends Error {
  constructor(error, message, { field, entry } = {}) {
    super(message)
    Object.assign(this, { error, field, entry })
  }
}

export const malformed = (message, field, entry) =>
  new Refused('malformed-proof', field ? `${field}: ${message}` : message, { field, entry })
export const inconsistent = (message, field, entry) =>
  new Refused('inconsistent', message, { field, entry })

export const sha256 = (...parts) => {
  const hash = createHash('sha256')
  for (const part of parts) hash.update(part)
  return hash.digest()
}

export const isHex = (text, bytes) =>
  typeof text === 'string' && text.length === 2 * bytes && /^[0-9a-f]*$/.test(text)

// `0x` and lower-case hex, of that many bytes, or of any whole number of them.
export const isHex0x = (text, bytes) =>
  typeof text === 'string' &&
  /^0x(?:[0-9a-f]{2})*$/.test(text) &&
  (bytes === undefined || text.length === 2 + 2 * bytes)

// Padded standard base64 in its one spelling, else null: Buffer alone would overlook what is odd.
export function fromBase64(text) {
  if (typeof text !== 'string') return null
  const bytes = Buffer.from(text, 'base64')
  return bytes.toString('base64') === text ? bytes : null
}

// A decimal without sign or leading zero, else null.
export const fromDecimal = (text) =>
  typeof text === 'string' && /^(0|[1-9][0-9]*)$/.test(text) ? BigInt(text) : null

export function utf8(bytes, what) {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch {
    throw malformed(`${what} is not UTF-8`)
  }
}

export const isObject = (value) =>
  value !== null && typeof value === 'object' && !Array.isArray(value)

// RFC 8785 without floats; throws what is beyond the format.
export function canonical(value, depth = 0) {
  if (value === null || typeof value === 'boolean') return String(value)
  if (typeof value === 'number') {
    if (!Number.isSafeInteger(value)) throw malformed('a number is no integer within 2^53 - 1')
    return JSON.stringify(value)
  }
  if (typeof value === 'string') {
    if (!value.isWellFormed()) throw malformed('a string holds half of a surrogate pair')
    return JSON.stringify(value)
  }
  if (depth >= MAX_DEPTH) throw malformed(`nested deeper than ${MAX_DEPTH}`)
  if (Array.isArray(value)) return `[${value.map((item) => canonical(item, depth + 1)).join()}]`
  const members = Object.keys(value).sort() // by UTF-16 code unit, as RFC 8785 asks
  return `{${members.map((key) => `${canonical(key)}:${canonical(value[key], depth + 1)}`).join()}}`
}

const MAX_COMMAS = 4_000_000

// The value that canonical bytes say. Two of one key, floats, spaces: all fail the comparison.
export function parseCanonical(bytes, what) {
  let commas = 0
  for (const byte of bytes) if (byte === 0x2c) commas++
  if (commas > MAX_COMMAS) throw malformed(`${what} has more than ${MAX_COMMAS} commas`)
  const text = utf8(bytes, what)
  let value
  try {
    value = JSON.parse(text)
  } catch {
    throw malformed(`${what} is not JSON`)
  }
  if (canonical(value) !== text) throw malformed(`${what} is not canonical JSON`)
  return value
}

// An object with exactly these fields.
export function expectFields(value, names, field) {
  if (!isObject(value)) throw malformed('not an object', field)
  const found = Object.keys(value).sort().join()
  if (found !== [...names].sort().join()) throw malformed(`has fields ${found}`, field)
}

export function expectList(value, { min = 0, max }, field) {
  if (!Array.isArray(value) || value.length < min || value.length > max) {
    throw malformed(`not a list of ${min} to ${max}`, field)
  }
}
