// Bytes and their one spelling as text (docs/FORMATS.md, "Conventions").

import { malformed } from "./errors.js";

const HEX = /^(?:[0-9a-f]{2})*$/;
const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const SEXTET = new Uint8Array(128).fill(255);
for (let n = 0; n < 64; n++) SEXTET[ALPHABET.charCodeAt(n)] = n;
const DIGITS = Array.from({ length: 256 }, (_, n) => n.toString(16).padStart(2, "0"));
const encoder = new TextEncoder();

export const utf8 = (text) => encoder.encode(text);

export function toHex(bytes) {
  let text = "";
  for (const byte of bytes) text += DIGITS[byte];
  return text;
}

/** Bytes of lower-case hex; null when it is none. */
export function fromHex(text) {
  if (!HEX.test(text)) return null;
  const bytes = new Uint8Array(text.length / 2);
  for (let n = 0; n < bytes.length; n++) bytes[n] = parseInt(text.slice(2 * n, 2 * n + 2), 16);
  return bytes;
}

export function toBase64(bytes) {
  let text = "";
  for (let n = 0; n < bytes.length; n += 3) {
    const left = bytes.length - n;
    const word = (bytes[n] << 16) | ((bytes[n + 1] ?? 0) << 8) | (bytes[n + 2] ?? 0);
    text += ALPHABET[word >> 18] + ALPHABET[(word >> 12) & 63];
    text += left > 1 ? ALPHABET[(word >> 6) & 63] : "=";
    text += left > 2 ? ALPHABET[word & 63] : "=";
  }
  return text;
}

/** Bytes of padded standard base64 in its canonical spelling (RFC 4648 sections 3.5 and 4). */
export function fromBase64(text, what) {
  const bytes = decodeBase64(text);
  if (!bytes) throw malformed(`${what} is not padded standard base64 (RFC 4648 section 4)`);
  return bytes;
}

/** The same, or null. */
export function decodeBase64(text) {
  if (text.length % 4) return null;
  const padding = text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0;
  const bytes = new Uint8Array((text.length / 4) * 3 - padding);
  const digits = text.length - padding;
  let word = 0;
  let bits = 0;
  let at = 0;
  for (let n = 0; n < digits; n++) {
    const code = text.charCodeAt(n);
    const six = code < 128 ? SEXTET[code] : 255;
    if (six === 255) return null;
    word = ((word << 6) | six) & 0xffff;
    bits += 6;
    if (bits >= 8) {
      bits -= 8;
      bytes[at++] = (word >> bits) & 255;
    }
  }
  // The bits left over must be zero, or a second spelling of the same bytes would pass.
  return word & ((1 << bits) - 1) ? null : bytes;
}

export function concat(...parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

export function equal(a, b) {
  if (a.length !== b.length) return false;
  for (let n = 0; n < a.length; n++) if (a[n] !== b[n]) return false;
  return true;
}

/** Unsigned big-endian number. */
export function toBigInt(bytes) {
  return bytes.length ? BigInt(`0x${toHex(bytes)}`) : 0n;
}

/** A number for JSON where it is exact, else its decimal digits. */
export function exact(number) {
  return number <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(number) : number.toString();
}
