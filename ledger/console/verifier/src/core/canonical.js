// Canonical JSON: RFC 8785 without floats. What is not canonical to the byte is refused.

import { InvalidEvent } from "./errors.js";

export const MAX_DEPTH = 32;
export const MAX_COMMAS = 4_000_000;
const LONE_SURROGATE = /\p{Cs}/u;
const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const COMMA = 0x2c;

/** The value of `bytes`, which must be canonical JSON; InvalidEvent otherwise. */
export function parseCanonical(bytes) {
  checkNesting(bytes);
  let text;
  let value;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    value = JSON.parse(text);
  } catch {
    throw new InvalidEvent("not JSON in UTF-8");
  }
  if (canonicalText(value) !== text) {
    throw new InvalidEvent(
      "the JSON is not canonical (RFC 8785): keys ordered by UTF-16 code unit, no spaces, no " +
        "repeated keys, shortest escapes",
    );
  }
  return value;
}

/** The same for a bundle or a manifest: what JSON costs to read goes by its values, not its bytes. */
export function parseJson(bytes) {
  let commas = 0;
  for (const byte of bytes) if (byte === COMMA) commas++;
  if (commas > MAX_COMMAS) throw new InvalidEvent(`more than MAX_COMMAS = ${MAX_COMMAS} commas`);
  return parseCanonical(bytes);
}

/** The one canonical text of a value; InvalidEvent for a float, a large integer, a lone surrogate. */
export function canonicalText(value) {
  if (typeof value === "string") return canonicalString(value);
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "number") {
    if (!Number.isSafeInteger(value)) {
      throw new InvalidEvent(
        "a number is a float or beyond 2^53 - 1; amounts are decimal strings, counts integers",
      );
    }
    return String(value);
  }
  if (Array.isArray(value)) return `[${value.map(canonicalText).join(",")}]`;
  // Array.prototype.sort compares UTF-16 code units, as RFC 8785 section 3.2.3 asks.
  const members = Object.keys(value)
    .sort()
    .map((name) => `${canonicalString(name)}:${canonicalText(value[name])}`);
  return `{${members.join(",")}}`;
}

function canonicalString(text) {
  if (LONE_SURROGATE.test(text)) throw new InvalidEvent("a string holds a lone surrogate");
  // JSON.stringify escapes just what RFC 8785 section 3.2.2.2 asks for.
  return JSON.stringify(text);
}

/** Deep nesting is refused before the parser. */
function checkNesting(bytes) {
  let depth = 0;
  for (let n = 0; n < bytes.length; n++) {
    const byte = bytes[n];
    if (byte === QUOTE) {
      n = endOfString(bytes, n);
    } else if (byte === 0x5b || byte === 0x7b) {
      if (++depth > MAX_DEPTH) {
        throw new InvalidEvent(`nested deeper than MAX_DEPTH = ${MAX_DEPTH}`);
      }
    } else if (byte === 0x5d || byte === 0x7d) {
      depth--;
    }
  }
}

/** Where the string that starts at `start` ends, or the last byte. */
function endOfString(bytes, start) {
  let at = start;
  for (;;) {
    at = bytes.indexOf(QUOTE, at + 1);
    if (at === -1) return bytes.length;
    let escapes = 0;
    while (bytes[at - 1 - escapes] === BACKSLASH) escapes++;
    if (escapes % 2 === 0) return at;
  }
}
