// Verify a lineage bundle: the numbered steps of docs/FORMATS.md, in order; any failure ends it.
//
// No DOM, no network, no clock. The same steps, errors and verdict as ledger/verify/bundle.py, against
// which tests/browser holds this folder: every frozen bundle, and mutations of them.

import { exact, toHex } from "./bytes.js";
import { FORMAT_V2, parseBundle } from "./bundle_format.js";
import { checkDisclosed } from "./disclosed.js";
import { checkEntry, readEntry } from "./envelope.js";
import {
  InvalidEvent,
  VerificationError,
  anchorMismatch,
  badSignature,
  inconsistent,
  malformed,
} from "./errors.js";
import { checkBody } from "./events.js";
import { leafHash } from "./hash.js";
import { verifyL1 } from "./l1.js";
import { checkLineage } from "./lineage.js";
import { verifyConsistency, verifyInclusion } from "./merkle.js";
import { openCheckpoint, parseVkey, sameKey } from "./note.js";
import { checkPayouts } from "./payouts.js";
import { requireQuorum } from "./policy.js";
import { sayL1, sayProven, sayTrusted } from "./sentences.js";
import {
  doubtDisclosed,
  doubtPayouts,
  factsDisclosed,
  factsPayouts,
  sayDisclosed,
  sayPayouts,
} from "./sentences_v2.js";
import { checkFees, statements } from "./statement.js";
import { count, printable, trim } from "./text.js";

export const STEP_NAMES = [
  "parse",
  "checkpoint signature",
  "inclusion",
  "events",
  "lineage",
  "L1 anchor",
  "disclosed rows",
  "payouts",
];
const V1_STEPS = 6;

const NO_PACE = () => {};

/**
 * What a reader brings along; every field may be left out.
 * @typedef {object} Trust
 * @property {string} [vkey] the log's public key, got from elsewhere
 * @property {string[]} [witnessVkeys] witnesses that the reader knows
 * @property {object} [policy] a parsed policy: logs, witnesses and how many of them are enough
 * @property {boolean} [requireL1] fail unless the L1 part checks
 */

/**
 * The verdict, as `python -m ledger.verify --json` has it, and for showing it `bundle`, `entries` and
 * `lineage`: where the verdict says that it is not verified, what the file claims, as far as it can
 * be read (`bundle` and `lineage` may be null).
 * @param {Uint8Array} data
 * @param {Trust} trust
 * @param {{pace?: () => (Promise<void>|void), onStep?: (steps: object[], running: number) => void}} hooks
 */
export async function verifyBundle(data, trust = {}, { pace = NO_PACE, onStep = NO_PACE } = {}) {
  const run = { data, trust, pace, onStep, steps: [], bundle: null, entries: [], lineage: null };
  let verdict;
  try {
    verdict = await verify(run);
  } catch (error) {
    if (!(error instanceof VerificationError)) throw error;
    verdict = failure(run, error);
    run.entries = await claimed(run);
  }
  const { bundle, entries, lineage } = run;
  return { verdict, bundle, entries, lineage };
}

async function verify(run) {
  const { data, trust, pace } = run;

  // 1. Parse.
  begin(run);
  const bundle = await parseBundle(data, pace);
  run.bundle = bundle;
  done(run, `${bundle.format}, ${data.length} bytes`);

  // 2. Checkpoint signature and witnesses.
  begin(run);
  const { key, isOwnKey } = logKey(bundle, trust);
  const known = [
    ...(trust.witnessVkeys ?? []).map(parseVkey),
    ...(trust.policy?.witnesses ?? []).map((witness) => witness.key),
  ];
  const { head, witnesses } = await openCheckpoint(bundle.checkpoint, key, bundle.log, known);
  const quorum = trust.policy ? requireQuorum(trust.policy, witnesses.map((w) => w.key)) : null;
  const signed = `${printable(key.name)} signed size ${head.size}, root ${toHex(head.root)}`;
  done(run, quorum ? `${signed}; ${quorum}` : signed);

  // 3. Every entry under the root, at the index written inside it.
  begin(run);
  for (const bundled of bundle.entries) {
    checkPlace(bundled, head);
    await pace();
  }
  done(run, `${bundle.entries.length} entries lead to the root, each at its own index`);

  // 4. Every event: form, log, signature.
  begin(run);
  const entries = [];
  for (const bundled of bundle.entries) {
    entries.push(await checkEvent(bundled, bundle.log));
    await pace();
  }
  run.entries = entries;
  const actors = new Set(entries.map(({ event }) => event.actor)).size;
  done(run, `${entries.length} events signed by ${actors} keys for this log`);

  // 5. Lineage.
  begin(run);
  const lineage = await checkLineage(entries, bundle.blobs, bundle.subject, pace);
  run.lineage = lineage;
  done(run, `complete around ${lineage.subject.event.type} ${bundle.subject}`);

  // 6. L1.
  begin(run);
  const anchor = await checkL1(bundle, key, head, trust.requireL1);
  if (anchor) done(run, sayL1(anchor));
  else skipped(run, "the bundle carries no L1 section");

  // 7 and 8. What version 2 adds.
  if (bundle.format === FORMAT_V2) {
    begin(run);
    checkDisclosed(bundle.disclosed, lineage);
    if (bundle.disclosed.length) done(run, sayChecked(bundle.disclosed, lineage));
    else skipped(run, "the bundle shows no row");
    begin(run);
    checkPayouts(bundle.payouts, lineage.closed);
    if (bundle.payouts.length) done(run, `${count(bundle.payouts.length, "line")} under the roots of their periods`);
    else skipped(run, "the bundle carries no payout line");
  }

  const fees = checkFees(entries);
  const accounts = statements(entries, bundle.payouts);
  const found = { head, key, entries, lineage, witnesses, quorum, anchor, isOwnKey, fees };
  return {
    format: "tributary/verdict/v1",
    verified: true,
    steps: run.steps,
    proven: [
      ...sayProven(found),
      ...sayDisclosed(bundle.disclosed, lineage),
      ...sayPayouts(accounts),
    ],
    trusted: [
      ...sayTrusted(found),
      ...doubtDisclosed(bundle.disclosed, lineage),
      ...doubtPayouts(accounts),
    ],
    facts: {
      log: bundle.log,
      vkey: bundle.vkey,
      subject: bundle.subject,
      subject_type: lineage.subject.event.type,
      subject_index: exact(lineage.subject.index),
      size: exact(head.size),
      root: toHex(head.root),
      entries: bundle.entries.map(({ index }) => index),
      witnesses: witnesses.map((witness) => witness.key.name),
      policy: quorum,
      l1: anchor,
      disclosed: factsDisclosed(bundle.disclosed, lineage),
      payouts: factsPayouts(accounts),
    },
  };
}

/** The bundle's own key, or the same one given by the reader. */
function logKey(bundle, { vkey, policy }) {
  const key = parseVkey(bundle.vkey);
  const logs = policy?.logs ?? [];
  const mine = printable(bundle.vkey, 200);
  if (vkey !== undefined && !sameKey(parseVkey(trim(vkey)), key)) {
    throw badSignature(
      `the bundle is of the key ${mine}, you trust ${printable(vkey, 200)}: another log's bundle, ` +
        "or a forged one",
      { field: "vkey" },
    );
  }
  if (key.name !== bundle.log) {
    throw inconsistent(
      `the bundle is of the log '${printable(bundle.log)}', its key is named ` +
        `'${printable(key.name)}': a log's key bears the log's origin`,
      { field: "log" },
    );
  }
  if (logs.length && !logs.some((log) => sameKey(log.key, key))) {
    throw badSignature(
      `the bundle is of the key ${mine}, which is none of the ${logs.length} logs of your policy: ` +
        "another log's bundle, or a forged one",
      { field: "vkey" },
    );
  }
  return { key, isOwnKey: vkey !== undefined || logs.length > 0 };
}

/** Inclusion at the claimed index, and the same index inside the entry: a proof binds only a path. */
function checkPlace({ index, entry, proof }, head) {
  try {
    verifyInclusion({ index: BigInt(index), size: head.size, leaf: leafHash(entry), proof, root: head.root });
  } catch (error) {
    if (!(error instanceof VerificationError)) throw error;
    throw error.about(`entry ${index}`, { entry: index });
  }
  const written = entry.length < 8 ? null : new DataView(entry.buffer, entry.byteOffset).getBigUint64(0);
  if (written !== BigInt(index)) {
    throw inconsistent(`entry ${index} says inside that it is entry ${written}: it was moved`, {
      entry: index,
      field: "index",
    });
  }
}

async function checkEvent({ index, entry }, log) {
  try {
    const checked = await checkEntry(entry, log);
    checkBody(checked.event.type, checked.event.body);
    return checked;
  } catch (error) {
    if (!(error instanceof InvalidEvent)) throw error;
    const kind = { sig: badSignature, log: inconsistent }[error.field] ?? malformed;
    throw kind(`entry ${index}: ${error.message}`, { entry: index, field: error.field });
  }
}

/** The facts that the L1 section shows, or null where there is none and none is required. */
async function checkL1(bundle, key, head, isRequired) {
  if (!bundle.l1) {
    if (!isRequired) return null;
    throw anchorMismatch("an L1 proof was required, but the bundle carries no L1 section", {
      field: "l1",
    });
  }
  const { head: anchored } = await openCheckpoint(bundle.l1.checkpoint, key, bundle.log);
  verifyConsistency({
    size1: anchored.size,
    size2: head.size,
    root1: anchored.root,
    root2: head.root,
    proof: bundle.l1.consistency,
  });
  const facts = verifyL1(bundle.l1.section, anchored.size, anchored.root);
  return { ...facts, anchored_size: exact(anchored.size) };
}

function sayChecked(rows, { manifests }) {
  const listed = manifests.size
    ? `found in ${count(manifests.size, "training manifest")}`
    : "the bundle has no training manifest to find them in";
  return `${count(rows.length, "row")} under the root that the contributor signed; ${listed}`;
}

// --- the list of steps ---

function begin(run) {
  run.onStep(run.steps, run.steps.length + 1);
}

function add(run, status, detail) {
  const number = run.steps.length + 1;
  run.steps.push({ number, name: STEP_NAMES[number - 1], status, detail });
}

const done = (run, detail) => add(run, "ok", detail);
const skipped = (run, detail) => add(run, "skipped", detail);

/** The verdict of a bundle that failed: which step did, and that none after it was taken. */
function failure(run, error) {
  const { field = null, entry = null } = error.detail;
  add(run, "failed", error.message);
  const failed = run.steps.length;
  const all = run.bundle?.format === FORMAT_V2 ? STEP_NAMES.length : V1_STEPS;
  while (run.steps.length < Math.max(all, failed)) add(run, "not reached", "an earlier step failed");
  return {
    verified: false,
    error: error.slug,
    message: error.message,
    detail: { field, entry },
    failed_step: failed,
    steps: run.steps,
  };
}

/** The entries of a bundle that failed, as far as they can be read; nothing in them is verified. */
async function claimed({ bundle, entries, pace }) {
  if (entries.length || !bundle) return entries;
  const found = [];
  for (const { index, entry: bytes } of bundle.entries) {
    found.push({ ...readable(bytes), index: BigInt(index) });
    await pace();
  }
  return found;
}

function readable(bytes) {
  try {
    const entry = readEntry(bytes);
    checkBody(entry.event.type, entry.event.body);
    return entry;
  } catch (error) {
    if (!(error instanceof InvalidEvent)) throw error;
    return { recordedAt: 0n, event: null };
  }
}

