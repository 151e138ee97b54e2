// Hashes: RFC 9162 section 2.1.1 over SHA-256, and Keccak-256 for what an EVM chain holds.
//
// SHA-256 is not taken from crypto.subtle: it is asynchronous, which costs more per hash than the
// hash, and absent on plain http.

import { sha256 } from "@noble/hashes/sha2.js";
import { keccak_256 } from "@noble/hashes/sha3.js";
import { toHex } from "./bytes.js";

export const keccak256 = keccak_256;
export { sha256 };

export const sha256Hex = (bytes) => toHex(sha256(bytes));

export function leafHash(entry) {
  return sha256.create().update(Uint8Array.of(0)).update(entry).digest();
}

export function nodeHash(left, right) {
  const joined = new Uint8Array(65);
  joined[0] = 1;
  joined.set(left, 1);
  joined.set(right, 33);
  return sha256(joined);
}

/** RFC 9162 tree over leaf hashes: neighbours are paired, an odd last node is carried up. */
export function treeRoot(leaves) {
  if (!leaves.length) return sha256(new Uint8Array());
  let level = leaves;
  while (level.length > 1) {
    const above = [];
    for (let n = 0; n + 1 < level.length; n += 2) above.push(nodeHash(level[n], level[n + 1]));
    if (level.length % 2) above.push(level.at(-1));
    level = above;
  }
  return level[0];
}
