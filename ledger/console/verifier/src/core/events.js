// The event catalogue (docs/FORMATS.md, "Event catalogue"; ledger/domain/events.py): every type, the
// fields of its body, the earlier things it refers to, and what happens only once.
// tests/browser/test_verifier_core.py compares this table with Python's.

import { canonicalText } from "./canonical.js";
import { InvalidEvent } from "./errors.js";
import { hasExactly, isInteger, isList, isObject, isString, isWithin } from "./text.js";

const MAX_CONFIG_KEYS = 40;
const MAX_CONFIG_BYTES = 4_000;
const MAX_SHARES = 400;
const PPM_WHOLE = 1_000_000;
const BPS_WHOLE = 10_000;
const MAX_CONTRIBUTED = 100_000;
const ROLES = ["governance", "operator", "worker"];
const HOLD_REASONS = ["junk", "stuffing", "duplicate", "dispute", "other"];
const LICENCES = [
  "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0",
  "CDLA-Permissive-2.0", "ISC", "MIT", "MIT-0", "ODC-By-1.0", "PDDL-1.0", "PSF-2.0",
  "Python-2.0", "Unlicense",
];

// --- checks of one value: each throws an InvalidEvent that names the field ---

function check(holds, field, must) {
  if (!holds) throw new InvalidEvent(`${field} must be ${must}`, field);
}

const matching = (pattern, must) => (value, field) =>
  check(isString(value) && pattern.test(value), field, must);

export const uuid = matching(/^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/, "a lower-case UUID with dashes");
export const hash = matching(/^[0-9a-f]{64}$/, "a SHA-256 as 64 lower-case hex digits");
export const actor = matching(/^ed25519:[0-9a-f]{64}$/, "ed25519: and 64 lower-case hex digits");
export const amount = matching(/^(?:0|[1-9][0-9]{0,59})$/, "base units as a decimal string of at most 60 digits");
const address = matching(/^0x[0-9a-fA-F]{40}$/, "an EVM address, 0x and 40 hex digits");
const hex32 = matching(/^0x[0-9a-f]{64}$/, "0x and 64 lower-case hex digits");
const modelName = matching(/^[a-z0-9][a-z0-9._-]{0,38}\/[a-z0-9][a-z0-9._-]{0,58}$/, "like owner/name in lower case");

// No escapes, no bells, no NUL; line feed and tab may be.
const CONTROL = /[\x00-\x08\x0b-\x1f\x7f-\x9f]/;

const text = (low, high) => (value, field) => {
  check(isString(value) && isWithin(value, low, high), field, `a string of at most ${high} characters`);
  check(!CONTROL.test(value), field, "without control characters");
};

const integer = (low, high = Number.MAX_SAFE_INTEGER) => (value, field) =>
  check(isInteger(value) && low <= value && value <= high, field, `an integer from ${low} to ${high}`);

const oneOf = (choices) => (value, field) =>
  check(choices.includes(value), field, `one of ${choices.join(", ")}`);

const listOf = (item, low, high) => (value, field) => {
  check(isList(value) && low <= value.length && value.length <= high, field, `a list of ${low} to ${high} items`);
  value.forEach((part, n) => item(part, `${field}[${n}]`));
  check(new Set(value.map(canonicalText)).size === value.length, field, "without repeated items");
};

function config(value, field) {
  check(isObject(value) && Object.keys(value).length <= MAX_CONFIG_KEYS, field, `an object of at most ${MAX_CONFIG_KEYS} keys`);
  const spelled = new TextEncoder().encode(canonicalText(value));
  check(spelled.length <= MAX_CONFIG_BYTES, field, `no longer than ${MAX_CONFIG_BYTES} bytes`);
  for (const [name, item] of Object.entries(value)) {
    const plain = isString(item) || isInteger(item) || typeof item === "boolean" ||
      (isList(item) && item.every(isString));
    if (!plain || !isWithin(name, 0, 120)) {
      throw new InvalidEvent(`${field} holds what is no string, integer or list of strings`, field);
    }
  }
}

function share(value, field) {
  check(hasExactly(value, ["contributor", "ppm"]), field, "an object of contributor and ppm");
  actor(value.contributor, `${field}.contributor`);
  integer(1, PPM_WHOLE)(value.ppm, `${field}.ppm`);
}

const name = text(1, 120);
const prose = text(0, 2_000);
const licence = oneOf(LICENCES);
const bps = integer(0, BPS_WHOLE);
const ppm = integer(0, PPM_WHOLE);
const tokens = integer(0, 1_000_000);
const onChain = { chain_id: integer(1), contract: address, tx_hash: hex32, block_number: integer(0) };
const contribution = { contribution: uuid, datanet: uuid };
const ofRow = { ...contribution, row: integer(0, MAX_CONTRIBUTED - 1) };
const ofAnswer = {
  inference: uuid, adapter: uuid, consumer: actor, prompt_commitment: hash,
  output_commitment: hash, transcript_sha256: hash, prompt_tokens: tokens,
  completion_tokens: tokens, max_tokens: integer(1, 1_000_000), seed: integer(0),
  temperature_ppm: integer(0, 2 * PPM_WHOLE), top_p_ppm: ppm,
};

/** The field is always there; null says that there is none. */
const optional = (checkValue) => (value, field) => value === null || checkValue(value, field);

// --- the catalogue ---

/** type -> body field -> check; in the order in which they are checked. */
export const FIELDS = {
  "ledger.opened": { name },
  "role.granted": { member: actor, role: oneOf(ROLES) },
  "role.revoked": { member: actor, role: oneOf(ROLES) },
  "fee_policy.set": {
    version: integer(1), protocol_bps: bps, owner_bps: bps, operator_bps: bps, contributors_bps: bps,
  },
  "identity.registered": { name },
  "identity.evm_bound": { address, signature: text(1, 200) },
  "datanet.created": {
    datanet: uuid, name, description: prose, licence, reviewers: listOf(actor, 0, 32),
  },
  "datanet.closed": { datanet: uuid, reason: prose },
  "datanet.policy_set": {
    datanet: uuid, max_rows_per_contribution: integer(1, MAX_CONTRIBUTED),
    max_contributions_per_day: integer(1), max_rows_per_day: integer(1),
    on_withdrawal: oneOf(["keep", "retire"]),
  },
  "contribution.recorded": {
    ...contribution, licence, rows_root: hash, rows_count: integer(1, MAX_CONTRIBUTED), rows_sha256: hash,
    title: name,
  },
  "contribution.approved": { ...contribution, note: prose },
  "contribution.rejected": { ...contribution, reason: prose },
  "contribution.withdrawn": { ...contribution, reason: prose },
  "contribution.held": {
    ...contribution, reason: oneOf(HOLD_REASONS), note: prose, evidence_sha256: optional(hash),
  },
  "contribution.released": { ...contribution, note: prose },
  "cluster.appealed": { ...ofRow, reason: prose },
  "cluster.split": { ...ofRow, note: prose },
  "cluster.upheld": { ...ofRow, note: prose },
  "run.requested": {
    run: uuid, name, datanets: listOf(uuid, 1, 32), base_model: hash, base_id: name, config,
  },
  "run.started": { run: uuid, attempt: integer(1, 1_000), submission_id: name },
  "run.completed": {
    run: uuid, attempt: integer(1, 1_000), manifest_sha256: hash, adapter_sha256: hash,
    adapter_config_sha256: hash, index_sha256: hash, index_root: hash, rows_count: integer(1),
    contributions_count: integer(1), steps: integer(1), loss: text(1, 40),
  },
  "run.failed": { run: uuid, attempt: integer(0, 1_000), reason: prose },
  "run.cancelled": { run: uuid, reason: prose },
  "adapter.published": {
    adapter: uuid, run: uuid, model: modelName, adapter_sha256: hash, base_model: hash,
    input_wei_per_token: amount, output_wei_per_token: amount,
  },
  "adapter.retired": { adapter: uuid, reason: prose },
  "adapter.recalled": { adapter: uuid, ...contribution, reason: prose },
  "inference.recorded": {
    ...ofAnswer, finish_reason: oneOf(["stop", "length", "cancelled"]), fee_wei: amount,
  },
  "inference.interrupted": { ...ofAnswer, reason: oneOf(["crashed", "failed", "unpaid"]) },
  "attribution.recorded": {
    inference: uuid, adapter: uuid, run: uuid, method: name, index_sha256: hash,
    evidence_sha256: hash, shares: listOf(share, 0, MAX_SHARES), unattributed_ppm: ppm,
  },
  "fee.charged": {
    account: actor, inference: uuid, adapter: uuid, policy_version: integer(1), amount_wei: amount,
    protocol_wei: amount, owner: actor, owner_wei: amount, operator_wei: amount,
    contributors_wei: amount,
  },
  "deposit.recorded": { account: actor, amount_wei: amount, ...onChain, log_index: integer(0) },
  "period.cutoff": { period: integer(1) },
  "period.closed": {
    period: integer(1), log_size: integer(1), root: hex32, total_wei: amount, accounts: integer(1),
    tree_sha256: hash,
  },
  "period.abandoned": { period: integer(1), reason: prose },
  "payout.proposed": { period: integer(1), root: hex32, ...onChain },
  "payout.activated": { period: integer(1), root: hex32, ...onChain },
  "payout.vetoed": { period: integer(1), ...onChain },
  "payout.claimed": {
    address, amount_wei: amount, cumulative_wei: amount, ...onChain, log_index: integer(0),
  },
  "checkpoint.anchored": {
    size: integer(1), root: hash, ...onChain, block_hash: hex32, l1_sha256: hash,
  },
};

/** kind of thing -> the type of the event that makes it. */
export const CREATES = {
  datanet: "datanet.created",
  contribution: "contribution.recorded",
  run: "run.requested",
  adapter: "adapter.published",
  inference: "inference.recorded",
};

const OF_CONTRIBUTION = { contribution: "contribution", datanet: "datanet" };

/** type -> body field -> the kind of thing that it refers to. */
export const REFERENCES = {
  "datanet.policy_set": { datanet: "datanet" },
  "contribution.recorded": { datanet: "datanet" },
  "contribution.approved": OF_CONTRIBUTION,
  "contribution.rejected": OF_CONTRIBUTION,
  "contribution.withdrawn": OF_CONTRIBUTION,
  "contribution.held": OF_CONTRIBUTION,
  "contribution.released": OF_CONTRIBUTION,
  "cluster.appealed": OF_CONTRIBUTION,
  "cluster.split": OF_CONTRIBUTION,
  "cluster.upheld": OF_CONTRIBUTION,
  "run.requested": { datanets: "datanet" },
  "run.started": { run: "run" },
  "run.completed": { run: "run" },
  "run.failed": { run: "run" },
  "run.cancelled": { run: "run" },
  "adapter.published": { run: "run" },
  "adapter.retired": { adapter: "adapter" },
  "adapter.recalled": { adapter: "adapter", ...OF_CONTRIBUTION },
  "inference.recorded": { adapter: "adapter" },
  "inference.interrupted": { adapter: "adapter" },
  "attribution.recorded": { inference: "inference", adapter: "adapter", run: "run" },
  "fee.charged": { inference: "inference", adapter: "adapter" },
};

/** type -> the kind of thing for which it happens at most once. */
export const ONCE = {
  ...Object.fromEntries(Object.entries(CREATES).map(([kind, type]) => [type, kind])),
  "contribution.approved": "contribution",
  "run.completed": "run",
  "attribution.recorded": "inference",
  "fee.charged": "inference",
};

/** `[body field, kind, id]` of every earlier thing that an event names. */
export function references({ type, body }) {
  return Object.entries(REFERENCES[type] ?? {}).flatMap(([field, kind]) =>
    [body[field]].flat().map((id) => [field, kind, id]),
  );
}

/** Throws an InvalidEvent unless the body is exactly that of its type. */
export function checkBody(type, body) {
  const fields = Object.hasOwn(FIELDS, type) ? FIELDS[type] : null;
  if (!fields) throw new InvalidEvent("unknown event type; docs/FORMATS.md lists the catalogue", "type");
  if (!hasExactly(body, Object.keys(fields))) {
    throw new InvalidEvent(`${type} has exactly the fields ${Object.keys(fields).join(", ")}`, "body");
  }
  for (const [field, checkField] of Object.entries(fields)) checkField(body[field], `body.${field}`);
  WHOLES[type]?.(body);
}

const WHOLES = {
  "fee_policy.set": (body) => {
    const sum = body.protocol_bps + body.owner_bps + body.operator_bps + body.contributors_bps;
    if (sum !== BPS_WHOLE) throw new InvalidEvent(`the shares must sum to ${BPS_WHOLE}`, "body");
  },
  "attribution.recorded": ({ shares, unattributed_ppm }) => {
    const field = "body.shares";
    check(new Set(shares.map((s) => s.contributor)).size === shares.length, field, "without a contributor twice");
    const sum = shares.reduce((all, s) => all + s.ppm, unattributed_ppm);
    if (sum !== PPM_WHOLE) {
      throw new InvalidEvent(`shares and unattributed_ppm must sum to ${PPM_WHOLE}`, field);
    }
  },
  "fee.charged": (body) => {
    const parts = [body.protocol_wei, body.owner_wei, body.operator_wei, body.contributors_wei];
    const sum = parts.reduce((all, part) => all + BigInt(part), 0n);
    if (sum !== BigInt(body.amount_wei)) {
      throw new InvalidEvent("the four parts must sum to amount_wei", "body.amount_wei");
    }
  },
};
