// Rows that a contributor shows: was this text in that contribution, was an adapter trained on it.

import { equal, fromHex, utf8 } from "./bytes.js";
import { canonicalText } from "./canonical.js";
import { VerificationError, inconsistent, malformed, notIncluded } from "./errors.js";
import { uuid } from "./events.js";
import { checkAscending, countOf, hashOf, listOf, objectOf, textOf } from "./fields.js";
import { leafHash } from "./hash.js";
import { MAX_INCLUSION_HASHES, verifyInclusion } from "./merkle.js";
import { isWithin } from "./text.js";

const MAX_DISCLOSED = 100;
const MAX_CHARS = 8_000;
const SALT = /^[0-9a-f]{32}$/;

export function readDisclosed(value) {
  const rows = listOf(value, MAX_DISCLOSED, "disclosed").map((item, n) => readRow(item, `disclosed[${n}]`));
  const isAfter = (a, b) =>
    a.contribution < b.contribution || (a.contribution === b.contribution && a.row < b.row);
  checkAscending(rows, isAfter, "disclosed");
  return rows;
}

function readRow(item, where) {
  const fields = objectOf(item, ["contribution", "row", "value", "proof"], where);
  const proof = listOf(fields.proof, MAX_INCLUSION_HASHES, `${where}.proof`);
  uuid(fields.contribution, `${where}.contribution`);
  countOf(fields.row, `${where}.row`);
  const value = readValue(fields.value, `${where}.value`);
  return {
    contribution: fields.contribution,
    row: fields.row,
    value,
    hash: leafHash(utf8(canonicalText(value))),
    proof: proof.map((node, n) => hashOf(node, `${where}.proof[${n}]`)),
  };
}

function readValue(value, where) {
  objectOf(value, ["completion", "prompt", "salt"], where);
  for (const name of ["prompt", "completion"]) {
    if (!isWithin(textOf(value[name], `${where}.${name}`), 1, MAX_CHARS)) {
      throw malformed(`${where}.${name} must have 1 to ${MAX_CHARS} characters`, {
        field: `${where}.${name}`,
      });
    }
  }
  if (!SALT.test(textOf(value.salt, `${where}.salt`))) {
    throw malformed(`${where}.salt must be 32 lower-case hex digits`, { field: `${where}.salt` });
  }
  return value;
}

/** Each row against the contributions and manifests of a lineage that was checked. */
export function checkDisclosed(rows, lineage) {
  rows.forEach((shown, n) => checkRow(shown, `disclosed[${n}]`, lineage));
}

function checkRow(shown, where, { recorded, manifests }) {
  const entry = recorded.get(shown.contribution);
  if (!entry) {
    throw inconsistent(
      `${where} shows a row of contribution ${shown.contribution}, which is not in the bundle`,
      { field: `${where}.contribution` },
    );
  }
  const detail = { field: where, entry: Number(entry.index) };
  const { rows_count: count, rows_root: root } = entry.event.body;
  try {
    verifyInclusion({
      index: BigInt(shown.row),
      size: BigInt(count),
      leaf: shown.hash,
      proof: shown.proof,
      root: fromHex(root),
    });
  } catch (error) {
    if (!(error instanceof VerificationError)) throw error;
    throw notIncluded(
      `${where} is not row ${shown.row} of contribution ${shown.contribution}, as its ` +
        `contributor signed it: ${error.message}`,
      detail,
    );
  }
  const isListed = (manifest) => {
    const rowHash = manifest.rows.get(shown.contribution)?.get(shown.row);
    return rowHash && equal(rowHash, shown.hash);
  };
  if (manifests.size && ![...manifests.values()].some(isListed)) {
    throw notIncluded(
      `${where}: row ${shown.row} of contribution ${shown.contribution} is in no training ` +
        "manifest of this bundle: no adapter here was trained on it",
      detail,
    );
  }
}
