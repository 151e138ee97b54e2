// A log entry, the event in it, and the forms of all bodies: the catalogue of docs/FORMATS.md.
// A body is checked by itself here; what events say of each other is lineage.mjs.

import { Refused, canonical, expectFields, fromBase64, inconsistent, isHex, isHex0x, isObject,
  malformed, parseCanonical } from './bytes.mjs'
import { ed25519 } from './note.mjs'

export const UUID = /^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/
const ACTOR = /^ed25519:[0-9a-f]{64}$/
const MAX_INTEGER = Number.MAX_SAFE_INTEGER

// A form is a predicate; lists() and objects() build bigger ones.
const integer = (from, to = MAX_INTEGER) => (v) => Number.isSafeInteger(v) && v >= from && v <= to
const matching = (pattern) => (v) => typeof v === 'string' && pattern.test(v)
const prose = (from, to) => (v) =>
  typeof v === 'string' && !/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/.test(v) &&
  [...v].length >= from && [...v].length <= to
const lists = (from, to, form, key = (v) => v) => (v) =>
  Array.isArray(v) && v.length >= from && v.length <= to && v.every(form) &&
  new Set(v.map(key)).size === v.length
const oneOf = (...values) => (v) => values.includes(v)

const uuid = matching(UUID)
const actor = matching(ACTOR)
const hash = (v) => isHex(v, 32)
const hex32 = (v) => isHex0x(v, 32)
const address = matching(/^0x[0-9a-fA-F]{40}$/)
const amount = matching(/^(0|[1-9][0-9]{0,59})$/)
const name = prose(1, 120)
const text = prose(0, 2000)
const count = integer(0)
const some = integer(1)
const row = integer(0, 99_999)
const bps = integer(0, 10_000)
const ppm = integer(0, 1_000_000)
const tokens = integer(0, 1_000_000)
const role = oneOf('governance', 'operator', 'worker')
const licence = oneOf('Apache-2.0', 'BSD-2-Clause', 'BSD-3-Clause', 'CC-BY-4.0', 'CC-BY-SA-4.0',
  'CC0-1.0', 'CDLA-Permissive-2.0', 'ISC', 'MIT', 'MIT-0', 'ODC-By-1.0', 'PDDL-1.0', 'PSF-2.0',
  'Python-2.0', 'Unlicense')
const model = matching(/^[a-z0-9][a-z0-9._-]{0,38}\/[a-z0-9][a-z0-9._-]{0,58}$/)
const onChain = { chain_id: some, contract: address, tx_hash: hex32, block_number: count }
const setting = (v) => ['string', 'boolean'].includes(typeof v) || integer(-MAX_INTEGER)(v) ||
  (Array.isArray(v) && v.every((item) => typeof item === 'string'))
const config = (v) => isObject(v) && Object.keys(v).length <= 40 &&
  Object.keys(v).every((key) => [...key].length <= 120) &&
  Object.values(v).every(setting) && Buffer.byteLength(canonical(v)) <= 4000
const share = (v) => isObject(v) && Object.keys(v).sort().join() === 'contributor,ppm' &&
  actor(v.contributor) && integer(1, 1_000_000)(v.ppm)
const answer = { inference: uuid, adapter: uuid, consumer: actor, prompt_commitment: hash,
  output_commitment: hash, transcript_sha256: hash, prompt_tokens: tokens,
  completion_tokens: tokens, max_tokens: integer(1, 1_000_000), seed: count,
  temperature_ppm: integer(0, 2_000_000), top_p_ppm: ppm }

const BODIES = {
  'ledger.opened': { name },
  'role.granted': { member: actor, role },
  'role.revoked': { member: actor, role },
  'fee_policy.set': { version: some, protocol_bps: bps, owner_bps: bps, operator_bps: bps,
    contributors_bps: bps },
  'identity.registered': { name },
  'identity.evm_bound': { address, signature: prose(1, 200) },
  'datanet.created': { datanet: uuid, name, description: text, licence, reviewers: lists(0, 32, actor) },
  'datanet.closed': { datanet: uuid, reason: text },
  'datanet.policy_set': { datanet: uuid, max_rows_per_contribution: integer(1, 100_000),
    max_contributions_per_day: some, max_rows_per_day: some,
    on_withdrawal: oneOf('keep', 'retire') },
  'contribution.recorded': { contribution: uuid, datanet: uuid, licence, rows_root: hash,
    rows_count: integer(1, 100_000), rows_sha256: hash, title: name },
  'contribution.approved': { contribution: uuid, datanet: uuid, note: text },
  'contribution.rejected': { contribution: uuid, datanet: uuid, reason: text },
  'contribution.withdrawn': { contribution: uuid, datanet: uuid, reason: text },
  'contribution.held': { contribution: uuid, datanet: uuid,
    reason: oneOf('junk', 'stuffing', 'duplicate', 'dispute', 'other'), note: text,
    evidence_sha256: (v) => v === null || hash(v) },
  'contribution.released': { contribution: uuid, datanet: uuid, note: text },
  'cluster.appealed': { contribution: uuid, datanet: uuid, row, reason: text },
  'cluster.split': { contribution: uuid, datanet: uuid, row, note: text },
  'cluster.upheld': { contribution: uuid, datanet: uuid, row, note: text },
  'run.requested': { run: uuid, name, datanets: lists(1, 32, uuid), base_model: hash, base_id: name,
    config },
  'run.started': { run: uuid, attempt: integer(1, 1000), submission_id: name },
  'run.completed': { run: uuid, attempt: integer(1, 1000), manifest_sha256: hash,
    adapter_sha256: hash, adapter_config_sha256: hash, index_sha256: hash, index_root: hash,
    rows_count: some, contributions_count: some, steps: some, loss: prose(1, 40) },
  'run.failed': { run: uuid, attempt: integer(0, 1000), reason: text },
  'run.cancelled': { run: uuid, reason: text },
  'adapter.published': { adapter: uuid, run: uuid, model, adapter_sha256: hash, base_model: hash,
    input_wei_per_token: amount, output_wei_per_token: amount },
  'adapter.retired': { adapter: uuid, reason: text },
  'adapter.recalled': { adapter: uuid, contribution: uuid, datanet: uuid, reason: text },
  'inference.recorded': { ...answer, finish_reason: oneOf('stop', 'length', 'cancelled'),
    fee_wei: amount },
  'inference.interrupted': { ...answer, reason: oneOf('crashed', 'failed', 'unpaid') },
  'attribution.recorded': { inference: uuid, adapter: uuid, run: uuid, method: name,
    index_sha256: hash, evidence_sha256: hash,
    shares: lists(0, 400, share, (v) => v?.contributor), unattributed_ppm: ppm },
  'fee.charged': { account: actor, inference: uuid, adapter: uuid, policy_version: some,
    amount_wei: amount, protocol_wei: amount, owner: actor, owner_wei: amount, operator_wei: amount,
    contributors_wei: amount },
  'deposit.recorded': { account: actor, amount_wei: amount, ...onChain, log_index: count },
  'period.cutoff': { period: some },
  'period.closed': { period: some, log_size: some, root: hex32, total_wei: amount, accounts: some,
    tree_sha256: hash },
  'period.abandoned': { period: some, reason: text },
  'payout.proposed': { period: some, root: hex32, ...onChain },
  'payout.activated': { period: some, root: hex32, ...onChain },
  'payout.vetoed': { period: some, ...onChain },
  'payout.claimed': { address, amount_wei: amount, cumulative_wei: amount, ...onChain,
    log_index: count },
  'checkpoint.anchored': { size: some, root: hash, ...onChain, block_hash: hex32, l1_sha256: hash },
}

// What the numbers of one body must sum to: part of the form.
const sum = (...numbers) => numbers.reduce((total, number) => total + BigInt(number), 0n)
const SUMS = {
  'fee_policy.set': (b) =>
    sum(b.protocol_bps, b.owner_bps, b.operator_bps, b.contributors_bps) === 10_000n,
  'attribution.recorded': (b) =>
    sum(b.unattributed_ppm, ...b.shares.map((s) => s.ppm)) === 1_000_000n,
  'fee.charged': (b) =>
    sum(b.protocol_wei, b.owner_wei, b.operator_wei, b.contributors_wei) === BigInt(b.amount_wei),
}

function checkBody(type, body, entry) {
  const forms = BODIES[type]
  if (!Object.hasOwn(BODIES, type)) throw malformed(`the type ${type} is not in the catalogue`, 'type', entry)
  expectFields(body, Object.keys(forms), 'body')
  for (const [field, form] of Object.entries(forms)) {
    if (!form(body[field])) throw malformed('not of its form', `body.${field}`, entry)
  }
  if (SUMS[type]?.(body) === false) throw malformed('its parts do not sum up', 'body', entry)
}

// The event of an entry: {index, recordedAt, id, actor, type, body}. `log` is the origin it must name.
export function readEntry(entry, log) {
  if (entry.length < 17 || entry.length > 65_535) throw malformed('an entry has 17 to 65,535 bytes')
  const index = Number(entry.readBigUInt64BE(0))
  const event = parseCanonical(entry.subarray(16), 'the envelope')
  expectFields(event, ['actor', 'at', 'body', 'id', 'log', 'sig', 'type', 'v'])
  const signature = fromBase64(event.sig)
  if (event.v !== 1) throw malformed('not version 1', 'v', index)
  if (!actor(event.actor)) throw malformed('no actor', 'actor', index)
  if (!count(event.at)) throw malformed('no time', 'at', index)
  if (!uuid(event.id)) throw malformed('no id', 'id', index)
  if (event.log !== log) throw inconsistent(`an event of the log ${event.log}`, 'log', index)
  const noSignature = (message) => new Refused('bad-signature', message, { field: 'sig', entry: index })
  const { sig: _, ...signed } = event
  if (signature?.length !== 64) throw noSignature('not 64 bytes in base64')
  const message = Buffer.from(`tributary/event/v1\n${canonical(signed)}`)
  if (!ed25519(Buffer.from(event.actor.slice(8), 'hex'), message, signature)) {
    throw noSignature('not signed by its actor')
  }
  checkBody(event.type, event.body, index)
  return { index, recordedAt: entry.readBigUInt64BE(8), ...event }
}
