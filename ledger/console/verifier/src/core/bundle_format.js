// The bytes of a lineage bundle, versions 1 and 2: parsed, believed in nothing. A file that a writer
// following docs/FORMATS.md would have spelled otherwise is refused.

import { fromBase64, toHex } from "./bytes.js";
import { parseJson } from "./canonical.js";
import { readDisclosed } from "./disclosed.js";
import { InvalidEvent, malformed } from "./errors.js";
import { hash, uuid } from "./events.js";
import { checkAscending, countOf, hashOf, listOf, objectOf, textOf } from "./fields.js";
import { MAX_CONSISTENCY_HASHES, MAX_INCLUSION_HASHES } from "./merkle.js";
import { readPayouts } from "./payouts.js";
import { isInteger, isObject, printable } from "./text.js";

export const FORMAT = "tributary/lineage-bundle/v1";
export const FORMAT_V2 = "tributary/lineage-bundle/v2";
export const MAX_BUNDLE_BYTES = 64 * 2 ** 20;
const MAX_ENTRIES = 20_000;
const MAX_BLOBS = 64;
const FIELDS = ["blobs", "checkpoint", "entries", "format", "hashes", "l1", "log", "subject", "vkey"];
const V2_FIELDS = [...FIELDS, "disclosed", "payouts"];

/** A bundle's parts, decoded. `pace` is awaited between heavy pieces. */
export async function parseBundle(data, pace) {
  if (data.length > MAX_BUNDLE_BYTES) {
    throw malformed(`a bundle has at most MAX_BUNDLE_BYTES = ${MAX_BUNDLE_BYTES} bytes`);
  }
  try {
    const value = parseJson(data);
    await pace();
    return await read(value, pace);
  } catch (error) {
    if (!(error instanceof InvalidEvent)) throw error;
    throw malformed(`the file is no lineage bundle: ${error.message}`, { field: error.field });
  }
}

async function read(value, pace) {
  const version = isObject(value) ? value.format : FORMAT;
  if (version !== FORMAT && version !== FORMAT_V2) {
    throw malformed(`the format is neither ${FORMAT} nor ${FORMAT_V2}`, { field: "format" });
  }
  const second = version === FORMAT_V2;
  const fields = objectOf(value, second ? V2_FIELDS : FIELDS, "the bundle");
  const hashes = listOf(fields.hashes, Infinity, "hashes").map((h, n) => hashOf(h, `hashes[${n}]`));
  await pace();
  const items = listOf(fields.entries, MAX_ENTRIES, "entries");
  const entries = [];
  for (const [n, item] of items.entries()) {
    entries.push(readEntryOf(item, n, hashes));
    await pace();
  }
  if (!entries.length) throw malformed("entries must hold at least one", { field: "entries" });
  checkAscending(entries, (a, b) => a.index < b.index, "entries");
  const bundle = {
    format: version,
    log: textOf(fields.log, "log"),
    vkey: textOf(fields.vkey, "vkey"),
    subject: checked(uuid, fields.subject, "subject"),
    checkpoint: textOf(fields.checkpoint, "checkpoint"),
    entries,
    blobs: await readBlobs(fields.blobs, pace),
    l1: fields.l1 === null ? null : readAnchored(fields.l1),
    disclosed: second ? readDisclosed(fields.disclosed) : [],
    payouts: second ? readPayouts(fields.payouts) : [],
  };
  if (second && !bundle.disclosed.length && !bundle.payouts.length) {
    throw malformed(`a bundle without disclosed rows and payouts is spelled as ${FORMAT}`, {
      field: "format",
    });
  }
  checkSpelling(items, hashes);
  return bundle;
}

function readEntryOf(value, n, hashes) {
  const where = `entries[${n}]`;
  const fields = objectOf(value, ["index", "entry", "proof"], where);
  const index = countOf(fields.index, `${where}.index`);
  const path = listOf(fields.proof, MAX_INCLUSION_HASHES, `${where}.proof`);
  if (!path.every((at) => isInteger(at) && 0 <= at && at < hashes.length)) {
    throw malformed(`${where}.proof must hold positions in hashes, 0 to ${hashes.length - 1}`, {
      field: `${where}.proof`,
      entry: index,
    });
  }
  const entry = fromBase64(textOf(fields.entry, `${where}.entry`), `${where}.entry`);
  return { index, entry, proof: path.map((at) => hashes[at]) };
}

async function readBlobs(value, pace) {
  if (!isObject(value) || Object.keys(value).length > MAX_BLOBS) {
    throw malformed(`blobs must be an object of at most ${MAX_BLOBS}`, { field: "blobs" });
  }
  const blobs = new Map();
  for (const name of Object.keys(value).sort()) {
    hash(name, "blobs");
    blobs.set(name, fromBase64(textOf(value[name], "blobs"), `blobs.${printable(name)}`));
    await pace();
  }
  return blobs;
}

function readAnchored(value) {
  const fields = objectOf(value, ["checkpoint", "consistency", "section"], "l1");
  const nodes = listOf(fields.consistency, MAX_CONSISTENCY_HASHES, "l1.consistency");
  if (!isObject(fields.section)) {
    throw malformed("l1.section must be an object", { field: "l1.section" });
  }
  return {
    checkpoint: textOf(fields.checkpoint, "l1.checkpoint"),
    consistency: nodes.map((node, n) => hashOf(node, `l1.consistency[${n}]`)),
    section: fields.section,
  };
}

/** Each hash stands once, in the order of first use by the proofs. */
function checkSpelling(items, hashes) {
  let used = 0;
  for (const { proof } of items) {
    for (const at of proof) {
      if (at > used) used = Infinity;
      if (at === used) used++;
    }
  }
  if (used !== hashes.length || new Set(hashes.map(toHex)).size !== hashes.length) {
    throw malformed(
      "the bundle is not in its one spelling: hashes must stand once, in the order of first use " +
        "by the proofs",
    );
  }
}

function checked(check, value, where) {
  check(value, where);
  return value;
}
