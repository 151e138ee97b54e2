// Signed notes and checkpoints: who signed which tree (c2sp.org/signed-note, tlog-checkpoint,
// tlog-cosignature). Signatures of unknown keys are ignored; one of a known key that does not verify
// refuses the note.

import { concat, equal, fromBase64, toBigInt, toHex, utf8 } from "./bytes.js";
import { verifyEd25519 } from "./ed25519.js";
import { badSignature, inconsistent, malformed } from "./errors.js";
import { sha256 } from "./hash.js";
import { isKeyName, printable } from "./text.js";

export const ED25519 = 0x01;
export const COSIGNATURE = 0x04;
const MAX_NOTE_BYTES = 1_000_000;
const MAX_SIGNATURES = 100;
const MAX_KEY_CHARS = 1_000;
const DASH = "— ";
const DECIMAL = /^(?:0|[1-9][0-9]{0,18})$/;
const EMPTY_ROOT = sha256(new Uint8Array());

/** `name+keyid+base64(type || key)` as `{name, type, publicKey, id}`. */
export function parseVkey(text) {
  const [name, claimed] = text.split("+", 2);
  const rest = text.slice(`${name}+${claimed}+`.length);
  const parts = text.split("+").length;
  if ([...text].length > MAX_KEY_CHARS || parts < 3 || !isKeyName(name)) {
    throw malformed("a verifier key has the form name+keyid+base64");
  }
  const material = fromBase64(rest, "the third part of a verifier key");
  if (material.length !== 33 || ![ED25519, COSIGNATURE].includes(material[0])) {
    throw malformed(
      `the key ${printable(name)} is of an unknown type: expected 0x01 (Ed25519) or 0x04 ` +
        "(cosignature) and 32 bytes",
    );
  }
  const id = toHex(sha256(concat(utf8(`${name}\n`), material)).subarray(0, 4));
  if (id !== claimed) {
    throw malformed(
      `the key ${printable(name)} claims the id ${printable(claimed)}, its bytes give ${id}: it ` +
        "was mistyped or altered",
    );
  }
  return { name, type: material[0], publicKey: material.subarray(1), id };
}

export const sameKey = (a, b) =>
  a.name === b.name && a.type === b.type && equal(a.publicKey, b.publicKey);

/** `{text, signatures}` of a note; nothing is verified. */
export function parseNote(note) {
  if (utf8(note).length > MAX_NOTE_BYTES) {
    throw malformed(`a note has at most MAX_NOTE_BYTES = ${MAX_NOTE_BYTES} bytes`);
  }
  if (/[\x00-\x09\x0b-\x1f]/.test(note)) {
    throw malformed("a note holds no control character but the newline");
  }
  const blank = note.lastIndexOf("\n\n");
  const lines = note.slice(blank + 2);
  if (blank === -1 || !lines.endsWith("\n")) {
    throw malformed("a note is text, an empty line, and signature lines; this one is not");
  }
  const rows = lines.slice(0, -1).split("\n");
  if (rows.length > MAX_SIGNATURES) {
    throw malformed(`a note has at most MAX_SIGNATURES = ${MAX_SIGNATURES} signatures`);
  }
  return { text: note.slice(0, blank + 1), signatures: rows.map(signatureLine) };
}

function signatureLine(row) {
  const plain = row.startsWith(DASH) ? row.slice(DASH.length) : row;
  const space = plain.indexOf(" ");
  const name = space === -1 ? plain : plain.slice(0, space);
  if (!row.startsWith(DASH) || !isKeyName(name)) {
    throw malformed(`the line '${printable(row)}' is no signature: expected '— <key name> <base64>'`);
  }
  const what = `the signature of ${printable(name)}`;
  const blob = fromBase64(space === -1 ? "" : plain.slice(space + 1), what);
  if (blob.length <= 4) throw malformed(`${what} is too short to be one`);
  return { name, id: toHex(blob.subarray(0, 4)), signature: blob.subarray(4) };
}

/** The signatures of known keys, `{key, timestamp}`; at least one must be there. */
async function verifyNote(note, keys) {
  const identity = (name, id) => `${name}\n${id}`;
  const known = new Map(keys.map((key) => [identity(key.name, key.id), key]));
  const verified = new Map();
  for (const line of note.signatures) {
    const who = identity(line.name, line.id);
    if (!known.has(who) || verified.has(who)) continue;
    verified.set(who, await checkLine(note.text, line, known.get(who)));
  }
  if (!verified.size) {
    const names = [...new Set(keys.map((key) => printable(key.name)))].sort().join(", ");
    throw badSignature(`the note has no signature by a known key; known: ${names || "none"}`);
  }
  return [...verified.values()];
}

async function checkLine(text, line, key) {
  let signature = line.signature;
  let timestamp = null;
  let message = text;
  if (key.type === COSIGNATURE) {
    timestamp = toBigInt(signature.subarray(0, 8));
    signature = signature.subarray(8);
    message = `cosignature/v1\ntime ${timestamp}\n${text}`;
  }
  const whole = signature.length === 64 && (timestamp ?? 0n) < 2n ** 63n;
  if (!whole || !(await verifyEd25519(key.publicKey, utf8(message), signature))) {
    throw badSignature(
      `the signature of ${printable(key.name)} (${key.id}) does not verify: the note or its ` +
        "signature was altered",
    );
  }
  return { key, timestamp };
}

/** `{origin, size, root}` in a note's text; size is a BigInt. */
export function parseCheckpoint(text) {
  const lines = text.slice(0, -1).split("\n");
  if (!text.endsWith("\n")) throw malformed("a checkpoint's last line ends in a newline");
  if (lines.length < 3 || lines.includes("")) {
    throw malformed(
      "a checkpoint has three or more lines (origin, size, root), none empty; this one has " +
        `${lines.length}`,
    );
  }
  if (!DECIMAL.test(lines[1]) || BigInt(lines[1]) >= 2n ** 63n) {
    throw malformed(
      `the checkpoint's tree size is '${printable(lines[1])}', expected a decimal below 2^63 ` +
        "without leading zeroes",
    );
  }
  const root = fromBase64(lines[2], "the checkpoint's root hash");
  if (root.length !== 32) {
    throw malformed(`the checkpoint's root hash has ${root.length} bytes, expected a SHA-256 of 32`);
  }
  const size = BigInt(lines[1]);
  if (size === 0n && !equal(root, EMPTY_ROOT)) {
    throw malformed("the root of the empty tree is SHA-256 of nothing");
  }
  return { origin: lines[0], size, root };
}

/** The tree head of a note that `key` signed, and the known witnesses that cosigned it. */
export async function openCheckpoint(note, key, origin, witnesses = []) {
  if (key.type !== ED25519) {
    throw malformed(`the key ${printable(key.name)} is a witness's (type 0x04); a log signs by type 0x01`, {
      field: "vkey",
    });
  }
  const parsed = parseNote(note);
  const verified = await verifyNote(parsed, [key, ...witnesses]);
  if (!verified.some((found) => sameKey(found.key, key))) {
    throw badSignature(
      `the checkpoint is not signed by ${printable(key.name)} (${key.id}), only by witnesses: a ` +
        "cosignature does not replace the log's own",
    );
  }
  const head = parseCheckpoint(parsed.text);
  if (head.origin !== origin) {
    throw inconsistent(
      `the checkpoint is of log '${printable(head.origin)}', expected '${printable(origin)}': ` +
        "another log's proof",
    );
  }
  return { head, witnesses: verified.filter((found) => !sameKey(found.key, key)) };
}

