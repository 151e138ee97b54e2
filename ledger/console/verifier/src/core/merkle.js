// Merkle proofs: is this leaf in that tree, is this tree the beginning of that one. RFC 9162 sections
// 2.1.3.2 and 2.1.4.2. Sizes and indexes are BigInt: a checkpoint may claim up to 2^63 - 1.

import { equal, toHex } from "./bytes.js";
import { inconsistent, malformed, notIncluded } from "./errors.js";
import { nodeHash, sha256 } from "./hash.js";

export const MAX_INCLUSION_HASHES = 63;
export const MAX_CONSISTENCY_HASHES = 64;
const EMPTY_ROOT = sha256(new Uint8Array());

/** Throws unless `leaf` stands at `index` of the tree of `size` leaves under `root`. */
export function verifyInclusion({ index, size, leaf, proof, root }) {
  checkCount(proof, MAX_INCLUSION_HASHES);
  if (index < 0n || index >= size) {
    throw notIncluded(`index ${index} is outside of a tree of ${size} leaves`);
  }
  const wrongLength = (than) =>
    notIncluded(`the proof has ${proof.length} hashes: ${than} than a leaf at ${index} of ${size} has`);
  let [position, last, node] = [index, size - 1n, leaf];
  for (const sibling of proof) {
    if (last === 0n) throw wrongLength("more");
    if (position & 1n || position === last) {
      node = nodeHash(sibling, node);
      while (!(position & 1n) && position) [position, last] = [position >> 1n, last >> 1n];
    } else {
      node = nodeHash(node, sibling);
    }
    [position, last] = [position >> 1n, last >> 1n];
  }
  if (last !== 0n) throw wrongLength("fewer");
  if (!equal(node, root)) {
    throw notIncluded(
      `the proof for index ${index} of ${size} leads to root ${toHex(node)}, expected ` +
        `${toHex(root)}: this leaf is not what that tree holds there`,
    );
  }
}

/** Throws unless the tree (size1, root1) is the beginning of the tree (size2, root2). */
export function verifyConsistency({ size1, size2, root1, root2, proof }) {
  checkCount(proof, MAX_CONSISTENCY_HASHES);
  if (size1 > size2) {
    throw inconsistent(`a tree of ${size1} leaves cannot be the beginning of one of ${size2}`);
  }
  for (const [size, root] of [[size1, root1], [size2, root2]]) {
    if (size === 0n && !equal(root, EMPTY_ROOT)) {
      throw inconsistent("the root of the empty tree is SHA-256 of nothing, not this one");
    }
  }
  if (size1 === 0n || size1 === size2) {
    if (proof.length) {
      throw inconsistent("between equal trees, or from the empty one, the proof is empty");
    }
    if (size1 === size2 && !equal(root1, root2)) {
      throw inconsistent(`two roots for one size, ${size1}: ${toHex(root1)} and ${toHex(root2)}: a fork`);
    }
    return;
  }
  verifyPrefix({ size1, size2, root1, root2, proof });
}

function verifyPrefix({ size1, size2, root1, root2, proof }) {
  const problem = (what) => inconsistent(`the proof from ${size1} to ${size2} leaves ${what}`);
  // A size that is a power of two is one whole subtree, and its hash is root1 itself: the proof
  // leaves it out.
  const path = size1 & (size1 - 1n) ? proof : [root1, ...proof];
  if (!path.length) throw problem("is empty");
  let [position, last] = [size1 - 1n, size2 - 1n];
  while (position & 1n) [position, last] = [position >> 1n, last >> 1n];
  let [older, newer] = [path[0], path[0]];
  for (const node of path.slice(1)) {
    if (last === 0n) throw problem("has too many hashes");
    if (position & 1n || position === last) {
      [older, newer] = [nodeHash(node, older), nodeHash(node, newer)];
      while (!(position & 1n) && position) [position, last] = [position >> 1n, last >> 1n];
    } else {
      newer = nodeHash(newer, node);
    }
    [position, last] = [position >> 1n, last >> 1n];
  }
  if (last !== 0n) throw problem("has too few hashes");
  for (const [size, have, want] of [[size1, older, root1], [size2, newer, root2]]) {
    if (!equal(have, want)) {
      throw problem(
        `leads to root ${toHex(have)} at size ${size}, expected ${toHex(want)}: the log was not ` +
          "only appended to, or the proof is another one's",
      );
    }
  }
}

function checkCount(proof, limit) {
  if (proof.length > limit) {
    throw malformed(`a proof of ${proof.length} hashes; no tree needs more than ${limit}`);
  }
}
