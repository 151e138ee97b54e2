// The training manifest: exactly which rows made an adapter (docs/FORMATS.md, "Training manifest").

import { fromHex, toHex } from "./bytes.js";
import { parseJson } from "./canonical.js";
import { InvalidEvent, malformed } from "./errors.js";
import { hash, uuid } from "./events.js";
import { treeRoot } from "./hash.js";
import { isInteger, isList, isObject } from "./text.js";

const MAX_ROWS = 200_000;
const SUMMARY = ["base_sha256", "adapter_sha256", "config_sha256", "steps"];

/** `{rows: contribution -> row number -> hash, rowsCount, summary}`; throws malformed-proof. */
export async function parseManifest(blob, pace) {
  try {
    return await read(parseJson(blob), pace);
  } catch (error) {
    if (!(error instanceof InvalidEvent)) throw error;
    throw malformed(`no training manifest: ${error.message}`);
  }
}

async function read(value, pace) {
  if (!isObject(value) || value.v !== 1) throw malformed("no training manifest of version 1");
  const missing = ["rows", ...SUMMARY].filter((name) => !Object.hasOwn(value, name));
  if (missing.length || !isList(value.rows) || !value.rows.length || value.rows.length > MAX_ROWS) {
    throw malformed(
      `a training manifest has 1 to ${MAX_ROWS} rows and ${SUMMARY.join(", ")}; missing here: ` +
        `${missing.join(", ") || "none"}`,
    );
  }
  const rows = new Map();
  for (const [n, item] of value.rows.entries()) {
    const { contribution, row, row_hash: rowHash } = checkRow(item, `rows[${n}]`);
    if (!rows.has(contribution)) rows.set(contribution, new Map());
    const ofOne = rows.get(contribution);
    if (ofOne.has(row)) {
      throw malformed(`rows[${n}] repeats row ${row} of contribution ${contribution}`);
    }
    ofOne.set(row, fromHex(rowHash));
    await pace();
  }
  const summary = Object.fromEntries(SUMMARY.map((name) => [name, value[name]]));
  return { rows, rowsCount: value.rows.length, summary };
}

function checkRow(item, where) {
  const isWhole = ["contribution", "row", "row_hash"].every((name) => isObject(item) && Object.hasOwn(item, name));
  if (!isWhole) throw malformed(`${where} must have contribution, row and row_hash`);
  if (!isInteger(item.row) || item.row < 0) {
    throw malformed(`${where}.row must be an integer from 0`);
  }
  uuid(item.contribution, "contribution");
  hash(item.row_hash, `${where}.row_hash`);
  return item;
}

/** Are these the rows that `contribution.recorded` committed to? Null: only some are here. */
export function rowsMatch(rows, { rows_count: count, rows_root: root }) {
  for (const row of rows.keys()) if (row >= count) return false;
  if (rows.size < count) return null;
  return toHex(treeRoot(Array.from({ length: count }, (_, n) => rows.get(n)))) === root;
}
