// Step 5 of a bundle: what its events say of each other, in the order of the log. A failure is a
// contradiction between two signed statements, `inconsistent`; but a manifest may be malformed.

import { canonical, inconsistent, isHex, isObject, malformed, parseCanonical, sha256 } from './bytes.mjs'
import { UUID } from './events.mjs'
import { leafHash, treeRoot } from './merkle.mjs'

const CREATORS = { // the event that creates a thing, and the field of references to it
  'datanet.created': 'datanet',
  'contribution.recorded': 'contribution',
  'run.requested': 'run',
  'adapter.published': 'adapter',
  'inference.recorded': 'inference',
}
const ONCE = { // what else happens once, and to what
  'contribution.approved': 'contribution',
  'run.completed': 'run',
  'attribution.recorded': 'inference',
  'fee.charged': 'inference',
}
const NO_REFERENCE = new Set(['datanet.closed']) // names a datanet that need not be in the bundle
const MAX_RUNS = 16
const MAX_ROWS = 200_000

export const rowHash = (row) => leafHash(Buffer.from(canonical(row)))

// `blobs` is a Map of name to bytes. Returns the events by thing and the manifests by run.
export function checkLineage(events, blobs, subject) {
  const named = new Set(events.flatMap(({ body }) => Object.values(body)))
  for (const [name, bytes] of blobs) {
    if (!named.has(name)) throw inconsistent(`no event names the blob ${name}`, 'blobs')
    if (sha256(bytes).toString('hex') !== name) throw inconsistent(`a blob is not ${name}`, 'blobs')
  }
  const world = { blobs, things: new Map(), manifests: new Map(), ids: new Set() }
  for (const event of events) {
    const fail = (message, field) => { throw inconsistent(message, field, event.index) }
    if (world.ids.has(event.id)) fail('its id occurred before', 'id')
    world.ids.add(event.id)
    followReferences(world, event, fail)
    RULES[event.type]?.(world, event, fail)
    remember(world, event, fail)
  }
  if (!world.ids.has(subject)) throw inconsistent('the subject is not in the bundle', 'subject')
  return world
}

const find = (world, type, id) => world.things.get(`${type} ${id}`)

function remember(world, event, fail) {
  const field = CREATORS[event.type] ?? ONCE[event.type]
  if (!field) return
  const key = `${event.type} ${event.body[field]}`
  if (world.things.has(key)) fail(`a second ${key}`, `body.${field}`)
  world.things.set(key, event)
}

function followReferences(world, { type, body }, fail) {
  if (NO_REFERENCE.has(type)) return
  for (const [creator, field] of Object.entries(CREATORS)) {
    if (field in body && creator !== type && !find(world, creator, body[field])) {
      fail(`no such ${field} before`, `body.${field}`)
    }
  }
  for (const [i, id] of (body.datanets ?? []).entries()) {
    if (!find(world, 'datanet.created', id)) fail('no such datanet before', `body.datanets[${i}]`)
  }
}

function aboutContribution(world, { body }, fail) {
  const contribution = find(world, 'contribution.recorded', body.contribution)
  if (contribution.body.datanet !== body.datanet) fail("not the contribution's", 'body.datanet')
  return contribution
}

function aboutRow(world, event, fail) {
  const contribution = aboutContribution(world, event, fail)
  if (event.body.row >= contribution.body.rows_count) fail('no such row', 'body.row')
  return contribution
}

function judged(world, event, fail) {
  if (aboutRow(world, event, fail).actor === event.actor) fail('the contributor', 'actor')
}

// One rule per type; a second occurrence is found after it, by remember().
const RULES = {
  'contribution.recorded'(world, { body }, fail) {
    const datanet = find(world, 'datanet.created', body.datanet)
    if (datanet.body.licence !== body.licence) fail("not the datanet's licence", 'body.licence')
  },

  'contribution.approved'(world, { actor, body }, fail) {
    const contribution = find(world, 'contribution.recorded', body.contribution)
    const datanet = find(world, 'datanet.created', body.datanet)
    if (contribution.body.datanet !== body.datanet) fail("not the contribution's", 'body.datanet')
    if (actor !== datanet.actor && !datanet.body.reviewers.includes(actor)) fail('no reviewer', 'actor')
    if (actor === contribution.actor) fail('the contributor', 'actor')
  },

  'contribution.held'(world, event, fail) {
    if (aboutContribution(world, event, fail).actor === event.actor) fail('the contributor', 'actor')
  },
  'contribution.released': aboutContribution,

  'cluster.appealed'(world, event, fail) {
    if (aboutRow(world, event, fail).actor !== event.actor) fail('not the contributor', 'actor')
  },
  'cluster.split': judged,
  'cluster.upheld': judged,

  'run.completed'(world, { body }, fail) {
    if (world.manifests.size === MAX_RUNS) fail(`more than ${MAX_RUNS} runs`, 'body.run')
    const run = find(world, 'run.requested', body.run)
    const blob = world.blobs.get(body.manifest_sha256)
    if (!blob) fail('the manifest is not among the blobs', 'body.manifest_sha256')
    const manifest = readManifest(blob)
    const rows = new Map() // contribution -> [row, hash] of its rows in the manifest
    for (const row of manifest.rows) {
      rows.set(row.contribution, [...(rows.get(row.contribution) ?? []), [row.row, row.row_hash]])
    }
    const same = (field, theirs) =>
      body[field] === theirs || fail('not as in the manifest', `body.${field}`)
    same('rows_count', manifest.rows.length)
    same('contributions_count', rows.size)
    same('steps', manifest.steps)
    same('adapter_sha256', manifest.adapter_sha256)
    same('adapter_config_sha256', manifest.config_sha256)
    if (manifest.base_sha256 !== run.body.base_model) fail("not the run's base", 'body.manifest_sha256')
    for (const [id, named] of rows) checkTrained(world, run, id, named, fail)
    world.manifests.set(body.run, manifest)
  },

  'adapter.published'(world, { actor, body }, fail) {
    const completed = find(world, 'run.completed', body.run)
    const run = find(world, 'run.requested', body.run)
    if (!completed) fail('its run was not completed', 'body.run')
    if (completed.body.adapter_sha256 !== body.adapter_sha256) fail("not the run's", 'body.adapter_sha256')
    if (run.body.base_model !== body.base_model) fail("not the run's", 'body.base_model')
    if (run.actor !== actor) fail('not who requested the run', 'actor')
  },

  'adapter.recalled': aboutContribution,

  'inference.recorded'(world, { body }, fail) {
    const { body: adapter } = find(world, 'adapter.published', body.adapter)
    const fee = BigInt(body.prompt_tokens) * BigInt(adapter.input_wei_per_token) +
      BigInt(body.completion_tokens) * BigInt(adapter.output_wei_per_token)
    if (BigInt(body.fee_wei) !== fee) fail(`the fee is ${fee}`, 'body.fee_wei')
  },

  'attribution.recorded'(world, { body }, fail) {
    const inference = find(world, 'inference.recorded', body.inference)
    const adapter = find(world, 'adapter.published', body.adapter)
    const completed = find(world, 'run.completed', body.run)
    if (inference.body.adapter !== body.adapter) fail("not the inference's", 'body.adapter')
    if (adapter.body.run !== body.run) fail("not the adapter's", 'body.run')
    if (completed.body.index_sha256 !== body.index_sha256) fail("not the run's", 'body.index_sha256')
    const named = new Set(world.manifests.get(body.run).rows.map((row) => row.contribution))
    const contributors = new Set([...named].map((id) => find(world, 'contribution.recorded', id).actor))
    for (const [i, { contributor }] of body.shares.entries()) {
      if (!contributors.has(contributor)) fail('gave no row', `body.shares[${i}].contributor`)
    }
  },

  'fee.charged'(world, { body }, fail) {
    const { body: inference } = find(world, 'inference.recorded', body.inference)
    const adapter = find(world, 'adapter.published', body.adapter)
    if (inference.consumer !== body.account) fail("not the inference's", 'body.account')
    if (inference.adapter !== body.adapter) fail("not the inference's", 'body.adapter')
    if (inference.fee_wei !== body.amount_wei) fail("not the inference's", 'body.amount_wei')
    if (adapter.actor !== body.owner) fail('not who published the adapter', 'body.owner')
  },
}

// What a verifier reads of a training manifest; what else stands there is the trainer's.
function readManifest(bytes) {
  const manifest = parseCanonical(bytes, 'the manifest')
  const compared = ['base_sha256', 'adapter_sha256', 'config_sha256', 'steps'] // elsewhere
  const isRow = (row) => isObject(row) && UUID.test(row.contribution) &&
    Number.isSafeInteger(row.row) && row.row >= 0 && isHex(row.row_hash, 32)
  const good = isObject(manifest) && manifest.v === 1 && Array.isArray(manifest.rows) &&
    manifest.rows.length >= 1 && manifest.rows.length <= MAX_ROWS && manifest.rows.every(isRow) &&
    compared.every((name) => Object.hasOwn(manifest, name))
  if (!good) throw malformed('no training manifest', 'body.manifest_sha256')
  const named = new Set(manifest.rows.map((row) => `${row.contribution} ${row.row}`))
  if (named.size !== manifest.rows.length) throw malformed('a row twice', 'body.manifest_sha256')
  return manifest
}

function checkTrained(world, run, id, rows, fail) {
  const no = (message) => fail(`contribution ${id}: ${message}`, 'body.manifest_sha256')
  const { body } = find(world, 'contribution.recorded', id) ?? no('not recorded before')
  if (!run.body.datanets.includes(body.datanet)) no("not of the run's datanets")
  if (!find(world, 'contribution.approved', id)) no('not approved before')
  if (rows.some(([row]) => row >= body.rows_count)) no('a row beyond its last')
  if (rows.length < body.rows_count) return // some rows only: they prove nothing of the root
  const leaves = rows.sort(([a], [b]) => a - b).map(([, hash]) => Buffer.from(hash, 'hex'))
  if (treeRoot(leaves).toString('hex') !== body.rows_root) no('not the rows that were signed for')
}
