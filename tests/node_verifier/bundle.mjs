// Lineage bundles v1 and v2: parse, then the steps in the order of docs/FORMATS.md. Any failure ends
// it with a Refused that carries the number of its step.

import { Refused, expectFields, expectList, fromBase64, fromDecimal, inconsistent, isHex, isHex0x,
  isObject, malformed, parseCanonical } from './bytes.mjs'
import { UUID, readEntry } from './events.mjs'
import { keccak256 } from './keccak.mjs'
import { checkSection } from './l1.mjs'
import { checkLineage, rowHash } from './lineage.mjs'
import { extends_, includes, leafHash } from './merkle.mjs'
import { openCheckpoint, parseVkey } from './note.mjs'

const V1 = 'tributary/lineage-bundle/v1'
const V2 = 'tributary/lineage-bundle/v2'
const FIELDS = ['format', 'log', 'vkey', 'subject', 'checkpoint', 'entries', 'hashes', 'blobs', 'l1']
const LISTS = ['disclosed', 'payouts']
const MAX_BYTES = 64 * 1024 * 1024

// With `logKeys`, the bundle's key must be one of them: without, it is as good as the bundle itself.
// Throws Refused; else {steps: ['ok' | 'skipped', ...], subject_index, size, witnesses}.
export function verifyBundle(bytes, { logKeys = [], witnessKeys = [] } = {}) {
  const steps = []
  const step = (work) => {
    try {
      const result = work()
      steps.push(result === undefined ? 'skipped' : 'ok')
      return result
    } catch (error) {
      if (error instanceof Refused) error.step = steps.length + 1
      throw error
    }
  }
  const bundle = step(() => parse(bytes))
  const tree = step(() => openBundleCheckpoint(bundle, logKeys, witnessKeys))
  step(() => bundle.entries.map((entry) => checkIncluded(entry, tree)))
  const events = step(() => bundle.entries.map(({ entry }) => readEntry(entry, bundle.log)))
  const world = step(() => checkLineage(events, bundle.blobs, bundle.subject))
  step(() => (bundle.l1 ? checkL1(bundle, tree) : undefined))
  if (bundle.version === 2) {
    step(() => checkDisclosed(bundle.disclosed, world))
    step(() => checkPayouts(bundle.payouts, events))
  }
  const { index } = events.find(({ id }) => id === bundle.subject)
  return { steps, subject_index: index, size: Number(tree.size), witnesses: tree.witnesses }
}

function parse(bytes) {
  if (bytes.length > MAX_BYTES) throw malformed('more than 64 MiB')
  const bundle = parseCanonical(bytes, 'the bundle')
  const version = isObject(bundle) && bundle.format === V2 ? 2 : 1
  if (isObject(bundle) && ![V1, V2].includes(bundle.format)) throw malformed('unknown', 'format')
  expectFields(bundle, version === 2 ? [...FIELDS, ...LISTS] : FIELDS, 'the bundle')
  for (const name of ['log', 'vkey', 'checkpoint']) {
    if (typeof bundle[name] !== 'string') throw malformed('not a string', name)
  }
  if (!UUID.test(bundle.subject)) throw malformed('not an id', 'subject')
  const blobs = parseBlobs(bundle.blobs)
  const entries = parseEntries(bundle)
  if (bundle.l1 !== null) parseL1(bundle.l1)
  if (version === 2) parseLists(bundle)
  return { ...bundle, version, entries, blobs }
}

function parseBlobs(blobs) {
  if (!isObject(blobs) || Object.keys(blobs).length > 64) throw malformed('not up to 64', 'blobs')
  return new Map(Object.entries(blobs).map(([name, text]) => {
    const bytes = fromBase64(text)
    if (!isHex(name, 32) || !bytes) throw malformed('not hex and base64', 'blobs')
    return [name, bytes]
  }))
}

// Entries with their proofs as hashes. Positions count up at first use, so nothing is unused.
function parseEntries({ entries, hashes }) {
  expectList(entries, { min: 1, max: 20_000 }, 'entries')
  expectList(hashes, { max: 20_000 * 63 }, 'hashes')
  if (!hashes.every((hash) => isHex(hash, 32))) throw malformed('not hashes', 'hashes')
  if (new Set(hashes).size !== hashes.length) throw malformed('one hash twice', 'hashes')
  const nodes = hashes.map((hash) => Buffer.from(hash, 'hex'))
  let [used, last] = [0, -1]
  const read = entries.map((item, i) => {
    expectFields(item, ['index', 'entry', 'proof'], `entries[${i}]`)
    const entry = fromBase64(item.entry)
    if (!Number.isSafeInteger(item.index) || item.index <= last) throw malformed('not ascending', 'entries')
    if (!entry) throw malformed('not base64', `entries[${i}].entry`)
    expectList(item.proof, { max: 63 }, `entries[${i}].proof`)
    for (const position of item.proof) {
      if (!Number.isSafeInteger(position) || position < 0 || position > used) {
        throw malformed('not in order of first use', `entries[${i}].proof`)
      }
      if (position === used) used++
    }
    if (used > nodes.length) throw malformed('beyond the hashes', `entries[${i}].proof`)
    last = item.index
    return { index: item.index, entry, proof: item.proof.map((position) => nodes[position]) }
  })
  if (used !== nodes.length) throw malformed('a hash is unused')
  return read
}

function parseL1(l1) {
  expectFields(l1, ['checkpoint', 'consistency', 'section'], 'l1')
  if (typeof l1.checkpoint !== 'string') throw malformed('not a string', 'l1.checkpoint')
  expectList(l1.consistency, { max: 64 }, 'l1.consistency')
  if (!l1.consistency.every((hash) => isHex(hash, 32))) throw malformed('not hashes', 'l1.consistency')
}

function parseLists(bundle) {
  for (const name of LISTS) {
    const list = bundle[name]
    expectList(list, { max: 100 }, name)
    for (const [i, item] of list.entries()) ITEMS[name](item, `${name}[${i}]`)
    const keys = list.map(ORDER[name])
    if (keys.some((key, i) => i > 0 && keys[i - 1] >= key)) throw malformed('not ascending', name)
  }
  if (!LISTS.some((name) => bundle[name].length)) throw malformed('both lists are empty', 'format')
}

const padded = (number) => String(number).padStart(16, '0')
const ORDER = { // keys that compare as text
  disclosed: ({ contribution, row }) => `${contribution} ${padded(row)}`,
  payouts: ({ period, account }) => `${padded(period)} ${account}`,
}

const ITEMS = {
  disclosed(item, at) {
    expectFields(item, ['contribution', 'row', 'value', 'proof'], at)
    const isText = (v) => typeof v === 'string' && [...v].length >= 1 && [...v].length <= 8000
    if (!UUID.test(item.contribution)) throw malformed('not an id', `${at}.contribution`)
    if (!Number.isSafeInteger(item.row) || item.row < 0) throw malformed('no row', `${at}.row`)
    expectFields(item.value, ['completion', 'prompt', 'salt'], `${at}.value`)
    for (const name of ['completion', 'prompt']) {
      if (!isText(item.value[name])) throw malformed('not 1 to 8,000 letters', `${at}.value.${name}`)
    }
    if (!isHex(item.value.salt, 16)) throw malformed('not 32 hex digits', `${at}.value.salt`)
    expectHashes(item.proof, 63, (hash) => isHex(hash, 32), `${at}.proof`)
  },
  payouts(item, at) {
    expectFields(item, ['period', 'account', 'cumulative_wei', 'proof'], at)
    if (!Number.isSafeInteger(item.period) || item.period < 1) throw malformed('no period', `${at}.period`)
    if (!isHex0x(item.account, 20)) throw malformed('no address', `${at}.account`)
    if (fromDecimal(item.cumulative_wei) === null || item.cumulative_wei.length > 60) {
      throw malformed('no amount', `${at}.cumulative_wei`)
    }
    expectHashes(item.proof, 64, (hash) => isHex0x(hash, 32), `${at}.proof`)
  },
}

function expectHashes(list, max, form, at) {
  expectList(list, { max }, at)
  for (const [i, hash] of list.entries()) if (!form(hash)) throw malformed('no hash', `${at}[${i}]`)
}

function openBundleCheckpoint({ vkey, log, checkpoint }, trusted, witnessKeys) {
  const key = parseVkey(vkey)
  if (key.type !== 1) throw malformed('not the key of a log', 'vkey')
  if (trusted.length && !trusted.some(({ name, id }) => name === key.name && id === key.id)) {
    throw new Refused('bad-signature', 'not the key that you trust', { field: 'vkey' })
  }
  if (key.name !== log) throw inconsistent(`a key of ${key.name}, a bundle of ${log}`, 'log')
  return openCheckpoint(checkpoint, key, witnessKeys)
}

function checkIncluded({ index, entry, proof }, { size, root }) {
  const leaf = leafHash(entry)
  if (!includes({ index: BigInt(index), size, leaf, proof, root })) {
    throw new Refused('not-included', `entry ${index} is not in the tree`, { entry: index })
  }
  const inside = BigInt(`0x0${entry.toString('hex', 0, 8)}`)
  if (inside !== BigInt(index)) throw inconsistent('another index', 'index', index)
}

function checkL1({ vkey, l1 }, { size, root }) {
  const anchored = openCheckpoint(l1.checkpoint, parseVkey(vkey))
  const proof = l1.consistency.map((hash) => Buffer.from(hash, 'hex'))
  if (!extends_({ oldSize: anchored.size, oldRoot: anchored.root, size, root, proof })) {
    throw inconsistent('the checkpoint does not extend the anchored one')
  }
  checkSection(l1.section, anchored.size, anchored.root)
  return true
}

function checkDisclosed(items, { things, manifests }) {
  for (const [i, { contribution, row, value, proof }] of items.entries()) {
    const at = `disclosed[${i}]`
    const recorded = things.get(`contribution.recorded ${contribution}`)
    if (!recorded) throw inconsistent('its contribution is not here', `${at}.contribution`)
    const no = (message) => {
      throw new Refused('not-included', `${at}: ${message}`, { field: at, entry: recorded.index })
    }
    const { rows_count: count, rows_root: root } = recorded.body
    const leaf = rowHash(value)
    const place = { index: BigInt(row), size: BigInt(count), root: Buffer.from(root, 'hex') }
    const path = proof.map((hash) => Buffer.from(hash, 'hex'))
    if (!includes({ ...place, leaf, proof: path })) no('not that row')
    const isIt = (r) => r.contribution === contribution && r.row === row && r.row_hash === leaf.toString('hex')
    if (manifests.size && ![...manifests.values()].some(({ rows }) => rows.some(isIt))) no('trained nothing')
  }
  return items.length || undefined
}

// OpenZeppelin's StandardMerkleTree over (address, uint256).
export function payoutRoot(account, amount, proof) {
  const word = (hex) => Buffer.from(hex.padStart(64, '0'), 'hex')
  const leaf = Buffer.concat([word(account.slice(2)), word(BigInt(amount).toString(16))])
  return proof.reduce((node, other) => keccak256(...[node, other].sort(Buffer.compare)), keccak256(keccak256(leaf)))
}

function checkPayouts(items, events) {
  const closed = items.map(({ period }, i) => {
    const event = events.find(({ type, body }) => type === 'period.closed' && body.period === period)
    if (!event) throw inconsistent('its period is not here', `payouts[${i}].period`)
    return event
  })
  for (const [i, { account, cumulative_wei: amount, proof }] of items.entries()) {
    const at = { field: `payouts[${i}]`, entry: closed[i].index }
    const path = proof.map((hash) => Buffer.from(hash.slice(2), 'hex'))
    const overflows = BigInt(amount) >> 256n
    if (overflows || `0x${payoutRoot(account, amount, path).toString('hex')}` !== closed[i].body.root) {
      throw new Refused('not-included', `${at.field} is no line of that tree`, at)
    }
  }
  return items.length || undefined
}
