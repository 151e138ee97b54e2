// The RFC 9162 tree: section 2.1.1 (the tree), 2.1.3.2 (inclusion), 2.1.4.2 (consistency). Sizes and
// indexes are BigInt, since a checkpoint may name any u64. Answers are yes or no.

import { sha256 } from './bytes.mjs'

const LEAF = Buffer.from([0])
const NODE = Buffer.from([1])
export const leafHash = (entry) => sha256(LEAF, entry)
const node = (left, right) => sha256(NODE, left, right)

export function treeRoot(leaves) {
  if (leaves.length === 0) return sha256()
  if (leaves.length === 1) return leaves[0]
  let split = 1
  while (2 * split < leaves.length) split *= 2
  return node(treeRoot(leaves.slice(0, split)), treeRoot(leaves.slice(split)))
}

export function includes({ index, size, leaf, proof, root }) {
  if (index < 0n || index >= size || proof.length > 63) return false
  let [fn, sn, hash] = [index, size - 1n, leaf]
  for (const sibling of proof) {
    if (sn === 0n) return false
    if (fn & 1n || fn === sn) {
      hash = node(sibling, hash)
      while (!(fn & 1n) && fn !== 0n) [fn, sn] = [fn >> 1n, sn >> 1n]
    } else {
      hash = node(hash, sibling)
    }
    ;[fn, sn] = [fn >> 1n, sn >> 1n]
  }
  return sn === 0n && hash.equals(root)
}

export function extends_({ oldSize, oldRoot, size, root, proof }) {
  if (oldSize > size || proof.length > 64) return false
  if (oldSize === size) return proof.length === 0 && oldRoot.equals(root)
  if (oldSize === 0n) return proof.length === 0 && oldRoot.equals(sha256())
  if (proof.length === 0) return false
  const path = oldSize & (oldSize - 1n) ? [...proof] : [oldRoot, ...proof]
  let [fn, sn] = [oldSize - 1n, size - 1n]
  while (fn & 1n) [fn, sn] = [fn >> 1n, sn >> 1n]
  let [before, after] = [path[0], path[0]]
  for (const hash of path.slice(1)) {
    if (sn === 0n) return false
    if (fn & 1n || fn === sn) {
      ;[before, after] = [node(hash, before), node(hash, after)]
      while (!(fn & 1n) && fn !== 0n) [fn, sn] = [fn >> 1n, sn >> 1n]
    } else {
      after = node(after, hash)
    }
    ;[fn, sn] = [fn >> 1n, sn >> 1n]
  }
  return sn === 0n && before.equals(oldRoot) && after.equals(root)
}
