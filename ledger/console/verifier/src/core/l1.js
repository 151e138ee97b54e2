// Does an EVM block hold (size, root)? Header -> account -> storage. RLP, nibble paths, trie and header
// after the Ethereum yellow paper, appendices B, C, D and section 4.3. Strict: every node is used, in
// order, and nothing follows.

import { equal, exact, fromHex, toBigInt, toHex } from "./bytes.js";
import { anchorMismatch, malformed } from "./errors.js";
import { keccak256 } from "./hash.js";
import { hasExactly, isInteger, isList, isString } from "./text.js";

const MAX_HEADER_BYTES = 2_048;
const MAX_NODE_BYTES = 1_024;
const MAX_NODES = 64;
const FIELDS = [
  "account_proof", "block_hash", "block_number", "chain_id", "contract", "header_rlp",
  "storage_proofs",
];
const HEX = /^0x(?:[0-9a-f]{2})*$/;
const [STATE_ROOT, NUMBER, TIMESTAMP] = [3, 8, 11];
const [STORAGE_ROOT, CODE_HASH] = [2, 3];

/** The facts of a section whose block holds `size` (BigInt) and `root` in slots 0 and 1. */
export function verifyL1(section, size, root) {
  if (!hasExactly(section, FIELDS)) {
    throw bad("l1", `must have exactly the fields ${FIELDS.join(", ")}`);
  }
  for (const field of ["chain_id", "block_number"]) {
    if (!isInteger(section[field]) || section[field] < 0) {
      throw bad(field, "must be an integer from 0 to 2^53 - 1");
    }
  }
  const contract = bytesOf(section.contract, "contract", 20, true);
  const blockHash = bytesOf(section.block_hash, "block_hash", 32, true);
  const headerRlp = bytesOf(section.header_rlp, "header_rlp", MAX_HEADER_BYTES);
  const accountNodes = nodesOf(section.account_proof, "account_proof");
  const storage = section.storage_proofs;
  if (!hasExactly(storage, ["size", "root"])) {
    throw bad("storage_proofs", "must have exactly the fields size and root");
  }
  const sizeNodes = nodesOf(storage.size, "storage_proofs.size");
  const rootNodes = nodesOf(storage.root, "storage_proofs.root");

  if (!equal(keccak256(headerRlp), blockHash)) {
    throw mismatch("header_rlp", "the header does not hash to block_hash");
  }
  const header = readHeader(headerRlp);
  if (!equal(header[NUMBER], minimalBytes(section.block_number))) {
    throw mismatch("block_number", `the header is not that of block ${section.block_number}`);
  }
  const account = readAccount(walk(accountNodes, header[STATE_ROOT], contract, "account_proof"));
  const foundSize = slot(sizeNodes, account, 0, "storage_proofs.size");
  const foundRoot = slot(rootNodes, account, 1, "storage_proofs.root");
  if (foundSize !== size) {
    throw mismatch("storage_proofs.size", `the block holds size ${foundSize}, the checkpoint has ${size}`);
  }
  if (foundRoot !== toBigInt(root)) {
    const hex = foundRoot.toString(16).padStart(64, "0");
    throw mismatch("storage_proofs.root", `the block holds root ${hex}, the checkpoint has ${toHex(root)}`);
  }
  return {
    chain_id: section.chain_id,
    contract: section.contract,
    block_number: section.block_number,
    block_hash: section.block_hash,
    block_time: exact(toBigInt(header[TIMESTAMP])),
    code_hash: `0x${toHex(account[CODE_HASH])}`,
  };
}

const isBytes = (item) => item instanceof Uint8Array;

function readHeader(rlp) {
  const header = decode(rlp, "header_rlp");
  const isHeader = isList(header) && header.length >= 15 && header.length <= 32 &&
    header.every(isBytes) && header[STATE_ROOT].length === 32 && header[TIMESTAMP].length <= 8;
  if (!isHeader) throw bad("header_rlp", "is not a block header");
  return header;
}

function readAccount(rlp) {
  const account = decode(rlp, "account_proof");
  const isAccount = isList(account) && account.length === 4 && account.every(isBytes) &&
    account[STORAGE_ROOT].length === 32 && account[CODE_HASH].length === 32;
  if (!isAccount) throw bad("account_proof", "does not end in an account");
  return account;
}

function slot(nodes, account, number, field) {
  const key = new Uint8Array(32);
  key[31] = number;
  const word = decode(walk(nodes, account[STORAGE_ROOT], key, field), field);
  if (!isBytes(word) || word.length === 0 || word.length > 32 || word[0] === 0) {
    throw bad(field, "does not end in a storage word");
  }
  return toBigInt(word);
}

/** The value under `key` in the secure trie `root`; `nodes` are the path, root first. */
function walk(nodes, root, key, field) {
  const nothing = () => mismatch(field, "the trie holds nothing under that key");
  const waiting = nodes[Symbol.iterator]();
  let path = toHex(keccak256(key));
  let reference = root;
  for (;;) {
    const node = resolve(reference, waiting, field, nothing);
    if (node.length === 17) {
      // Keys are hashes of one length, so a path never ends at a branch.
      if (!path) throw bad(field, "a branch stands where a value should");
      reference = node[parseInt(path[0], 16)];
      path = path.slice(1);
      continue;
    }
    const { nibbles, isLeaf } = compact(node[0], field);
    if (!path.startsWith(nibbles)) throw nothing();
    path = path.slice(nibbles.length);
    if (!isLeaf) {
      if (!nibbles) throw bad(field, "an extension of no length");
      reference = node[1];
      continue;
    }
    if (path || !isBytes(node[1])) throw nothing();
    if (!waiting.next().done) throw bad(field, "nodes follow the last one that the proof needs");
    return node[1];
  }
}

/** The node behind a reference: embedded in its parent when under 32 bytes, else by hash. */
function resolve(reference, waiting, field, nothing) {
  let node = reference;
  if (isBytes(reference)) {
    if (!reference.length) throw nothing();
    const { value: encoded, done } = waiting.next();
    if (done) throw bad(field, "the proof ends before the value");
    if (!equal(keccak256(encoded), reference)) {
      throw mismatch(field, "a node does not hash to what its parent names");
    }
    node = decode(encoded, field);
  }
  if (!isList(node) || ![2, 17].includes(node.length)) {
    throw bad(field, "a node is no branch, extension or leaf");
  }
  return node;
}

/** Yellow paper appendix C: nibbles as hex digits, and whether it is a leaf. */
function compact(item, field) {
  const digits = isBytes(item) ? toHex(item) : "";
  const [flag, padding] = digits;
  if (!digits || !"0123".includes(flag) || ("02".includes(flag) && padding !== "0")) {
    throw bad(field, "a node's path is not compact-encoded");
  }
  return { nibbles: digits.slice("13".includes(flag) ? 1 : 2), isLeaf: "23".includes(flag) };
}

// --- RLP (appendix B), in its one canonical spelling ---

function decode(data, field) {
  const notRlp = () => bad(field, "is not RLP");
  const item = (at) => {
    if (at >= data.length) throw notRlp();
    const first = data[at];
    if (first < 0x80) return [data.subarray(at, at + 1), at + 1];
    const base = first < 0xc0 ? 0x80 : 0xc0;
    let start = at + 1;
    let length = first - base;
    if (length > 55) {
      const digits = data.subarray(start, start + length - 55);
      start += length - 55;
      length = Number(toBigInt(digits));
      if (start > data.length || digits[0] === 0 || length <= 55) throw notRlp();
    }
    const end = start + length;
    if (end > data.length) throw notRlp();
    if (base === 0x80) {
      if (length === 1 && data[start] < 0x80) throw notRlp();
      return [data.subarray(start, end), end];
    }
    const items = [];
    for (let next = start; next < end; ) {
      const [child, after] = item(next);
      if (after > end) throw notRlp();
      items.push(child);
      next = after;
    }
    return [items, end];
  };
  const [whole, end] = item(0);
  if (end !== data.length) throw notRlp();
  return whole;
}

function minimalBytes(number) {
  const digits = number ? number.toString(16) : "";
  return fromHex(digits.length % 2 ? `0${digits}` : digits);
}

function nodesOf(value, field) {
  if (!isList(value) || !value.length || value.length > MAX_NODES) {
    throw bad(field, `must be a list of 1 to MAX_NODES = ${MAX_NODES} trie nodes`);
  }
  return value.map((node) => bytesOf(node, field, MAX_NODE_BYTES));
}

function bytesOf(value, field, limit, isExact = false) {
  if (!isString(value) || value.length > 2 + 2 * limit || !HEX.test(value)) {
    throw bad(field, `must be 0x and lower-case hex, at most ${limit} bytes`);
  }
  const bytes = fromHex(value.slice(2));
  if (isExact && bytes.length !== limit) throw bad(field, `must be ${limit} bytes`);
  return bytes;
}

const bad = (field, what) => malformed(`L1 section: ${field}: ${what}`, { field });
const mismatch = (field, what) => anchorMismatch(`L1 section: ${field}: ${what}`, { field });
