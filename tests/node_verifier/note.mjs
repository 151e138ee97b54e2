// Ed25519, vkeys, signed notes (c2sp.org/signed-note), checkpoints (tlog-checkpoint), cosignatures
// (tlog-cosignature) and proofs of one entry (tlog-proof).

import { createPublicKey, verify } from 'node:crypto'
import { Refused, fromBase64, fromDecimal, inconsistent, malformed, sha256, utf8 } from './bytes.mjs'
import { includes } from './merkle.mjs'

const LOG = 1
const WITNESS = 4
const MAX_SIGNATURES = 100
const MAX_NOTE_BYTES = 1_000_000
const MAX_SIZE = 1n << 63n // sizes and timestamps stay below
const SPKI = Buffer.from('302a300506032b6570032100', 'hex') // RFC 8410, then the 32 bytes of the key

// OpenSSL takes keys of small order and keys whose y is not reduced; the format refuses both, and an
// R of small order. All such points by their y, the sign bit cleared; p, p + 1 stand for 0 and 1.
const SMALL_ORDER = new Set([
  '00'.repeat(32),
  '01' + '00'.repeat(31),
  '26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05',
  'c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a',
  'ec' + 'ff'.repeat(30) + '7f',
  'ed' + 'ff'.repeat(30) + '7f',
  'ee' + 'ff'.repeat(30) + '7f',
])
const P = (1n << 255n) - 19n

const y = (point) => Buffer.concat([point.subarray(0, 31), Buffer.from([point[31] & 0x7f])])
const isSmall = (point) => SMALL_ORDER.has(y(point).toString('hex'))
const isReduced = (point) => BigInt('0x' + Buffer.from(y(point)).reverse().toString('hex')) < P

export function ed25519(publicKey, message, signature) {
  if (signature.length !== 64 || isSmall(publicKey) || isSmall(signature.subarray(0, 32))) return false
  if (!isReduced(publicKey)) return false
  const key = createPublicKey({ key: Buffer.concat([SPKI, publicKey]), format: 'der', type: 'spki' })
  try {
    return verify(null, message, key, signature)
  } catch {
    return false // no point of the curve
  }
}

const keyId = (name, type, key) => sha256(name, Buffer.from([0x0a, type]), key).toString('hex', 0, 4)

export function parseVkey(text, field = 'vkey') {
  const [, name, id, encoded] = /^([^+\p{White_Space}]+)\+([0-9a-f]{8})\+(.+)$/u.exec(text) ?? []
  const bytes = fromBase64(encoded)
  if (!bytes || bytes.length !== 33) throw malformed('not name+key id+key', field)
  const [type, key] = [bytes[0], bytes.subarray(1)]
  if (type !== LOG && type !== WITNESS) throw malformed(`a key of type ${type}`, field)
  if (keyId(name, type, key) !== id) throw malformed('the key id is not that of the key', field)
  return { name, id, type, key }
}

function readNote(note) {
  if (/[\u0000-\u0009\u000b-\u001f]/.test(note)) throw malformed('a note holds control characters')
  if (Buffer.byteLength(note) > MAX_NOTE_BYTES) throw malformed('a note is too long')
  const end = note.lastIndexOf('\n\n')
  if (end < 0 || !note.endsWith('\n')) throw malformed('a note has a text, an empty line, signatures')
  const lines = note.slice(end + 2, -1).split('\n')
  if (lines.length > MAX_SIGNATURES) throw malformed(`a note has more than ${MAX_SIGNATURES} signatures`)
  const signatures = lines.map((line) => {
    const [, name, encoded] = /^— ([^+\p{White_Space}]+) (\S+)$/u.exec(line) ?? []
    const bytes = fromBase64(encoded)
    if (!bytes || bytes.length < 5) throw malformed('a note has a malformed signature line')
    return { name, id: bytes.toString('hex', 0, 4), signature: bytes.subarray(4) }
  })
  return { text: note.slice(0, end + 1), signatures }
}

// Whether the line's signature is the key's; of a witness, {time} in POSIX seconds.
function verifyLine(key, text, signature) {
  if (key.type === LOG) return ed25519(key.key, Buffer.from(text), signature)
  if (signature.length !== 72) return false
  const time = signature.readBigUInt64BE(0)
  const message = `cosignature/v1\ntime ${time}\n${text}`
  return time < MAX_SIZE && ed25519(key.key, Buffer.from(message), signature.subarray(8))
}

// A checkpoint under the log's key, with those witnesses known here that cosigned it.
export function openCheckpoint(note, logKey, witnessKeys = []) {
  const { text, signatures } = readNote(note)
  const signers = new Set()
  for (const { name, id, signature } of signatures) {
    const key = [logKey, ...witnessKeys].find((known) => known.name === name && known.id === id)
    if (!key) continue
    if (!verifyLine(key, text, signature)) {
      throw new Refused('bad-signature', `the signature of ${name} does not verify`)
    }
    signers.add(key)
  }
  if (!signers.delete(logKey)) throw new Refused('bad-signature', `${logKey.name} did not sign the note`)
  const [origin, sizeText, rootText, ...rest] = text.split('\n')
  const [size, root] = [fromDecimal(sizeText), fromBase64(rootText)]
  if (size === null || size >= MAX_SIZE || root?.length !== 32) {
    throw malformed('a checkpoint has an origin, a size and a root')
  }
  if (!origin || rest.pop() !== '' || rest.includes('')) throw malformed('a checkpoint has an empty line')
  if (size === 0n && !root.equals(sha256())) throw malformed('the tree of size 0 has another root')
  if (origin !== logKey.name) throw inconsistent(`a checkpoint of ${origin}, not of ${logKey.name}`)
  return { origin, size, root, witnesses: [...signers].map((key) => key.name) }
}

// A tlog-proof@v1; verifying it takes the leaf hash of the entry that it is for.
export function parseProof(bytes) {
  const text = utf8(bytes, 'the proof')
  const end = text.indexOf('\n\n')
  const [first, ...lines] = text.slice(0, Math.max(end, 0)).split('\n')
  if (first !== 'c2sp.org/tlog-proof@v1') throw malformed('not a tlog-proof@v1')
  const extra = lines[0]?.startsWith('extra ') ? fromBase64(lines.shift().slice(6)) : undefined
  if (extra === null) throw malformed('extra is not base64')
  const [, indexText] = /^index (.*)$/.exec(lines.shift() ?? '') ?? []
  const index = fromDecimal(indexText)
  if (index === null || index >= 1n << 64n) throw malformed('the index is not a decimal')
  const proof = lines.map(fromBase64)
  if (proof.length > 63 || proof.some((hash) => hash?.length !== 32)) {
    throw malformed('not at most 63 hashes of 32 bytes in base64')
  }
  return { index, proof, extra, checkpoint: text.slice(end + 2) }
}

export function verifyProof(bytes, leaf, logKey, witnessKeys) {
  const { index, proof, checkpoint } = parseProof(bytes)
  const { size, root, witnesses } = openCheckpoint(checkpoint, logKey, witnessKeys)
  if (!includes({ index, size, leaf, proof, root })) {
    throw new Refused('not-included', `the entry is not leaf ${index} of that tree`)
  }
  return { index, size, witnesses }
}
