// Ed25519 (RFC 8032) with exactly libsodium's strictness, which the Python verifier has.
//
// Verifiers differ at the edges. libsodium refuses an S of L or more, keys and Rs of small order,
// keys that are not in their canonical encoding, and compares R byte for byte (no cofactor).
// Browsers do the last and the first but accept small orders; @noble/ed25519's own `verify` multiplies
// by the cofactor and so accepts more. Therefore: the small and uncanonical points are refused here,
// then crypto.subtle decides where it has Ed25519, else the same equation over noble's points.
// tests/vectors/ed25519_edges.json holds both ways against libsodium.

import { Point } from "@noble/ed25519";
import { sha512 } from "@noble/hashes/sha2.js";
import { concat, equal, toBigInt } from "./bytes.js";

const P = 2n ** 255n - 19n;
const L = 2n ** 252n + 27742317777372353535851937790883648493n;
// The y coordinates of the eight points whose order divides 8.
const SMALL_ORDER_Y = new Set([
  0n,
  1n,
  P - 1n,
  0x7a03ac9277fdc74ec6cc392cfa53202a0f67100d760b3cba4fd83d3d706a17c7n,
  0x05fc536d880238b13933c6d305acdfd5f098eff289f4c345b027b2c28f95e826n,
]);

let subtleWorks = Boolean(globalThis.crypto?.subtle);

/** Does `signature` (64 bytes) of `message` verify under `publicKey` (32 bytes)? */
export async function verifyEd25519(publicKey, message, signature) {
  const r = signature.subarray(0, 32);
  if (littleEndian(signature.subarray(32)) >= L) return false;
  if (!isSafePoint(publicKey) || !isSafePoint(r)) return false;
  if (subtleWorks) {
    try {
      const key = await crypto.subtle.importKey("raw", publicKey, "Ed25519", false, ["verify"]);
      return await crypto.subtle.verify("Ed25519", key, signature, message);
    } catch (error) {
      // A key that is no point, or a browser without Ed25519: the equation below says which.
      if (error.name === "NotSupportedError") subtleWorks = false;
    }
  }
  return verifyByEquation(publicKey, message, signature);
}

/** encode(sB - kA) = R, with k = SHA-512(R || A || message). */
export function verifyByEquation(publicKey, message, signature) {
  const r = signature.subarray(0, 32);
  const s = littleEndian(signature.subarray(32));
  if (s >= L || !isSafePoint(publicKey) || !isSafePoint(r)) return false;
  let a;
  try {
    a = Point.fromBytes(publicKey, false);
  } catch {
    return false;
  }
  const k = littleEndian(sha512(concat(r, publicKey, message))) % L;
  const found = Point.BASE.multiply(s, false).subtract(a.multiply(k, false));
  return equal(found.toBytes(), r);
}

/** Canonically encoded, and not of small order. Whether it is on the curve is asked later. */
function isSafePoint(encoded) {
  const y = littleEndian(encoded) & (2n ** 255n - 1n);
  return y < P && !SMALL_ORDER_Y.has(y);
}

const littleEndian = (bytes) => toBigInt(Uint8Array.from(bytes).reverse());
