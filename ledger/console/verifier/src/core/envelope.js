// Log entry and signed event envelope: u64 index || u64 recorded_at || envelope, and Ed25519 over
// `tributary/event/v1\n` and the envelope without `sig` (docs/FORMATS.md).

import { concat, decodeBase64, fromHex, toBigInt, utf8 } from "./bytes.js";
import { canonicalText, parseCanonical } from "./canonical.js";
import { verifyEd25519 } from "./ed25519.js";
import { InvalidEvent } from "./errors.js";
import { actor as checkActor, uuid as checkUuid } from "./events.js";
import { hasExactly, isInteger, isObject, isString, isWithin, printable } from "./text.js";

const HEADER_BYTES = 16;
const MAX_ENTRY_BYTES = 65_535;
const CONTEXT = utf8("tributary/event/v1\n");
const FIELDS = ["actor", "at", "body", "id", "log", "sig", "type", "v"];

/** An entry as `{index, recordedAt, event}`, without its signature: index and time are BigInt. */
export function readEntry(entry) {
  if (entry.length <= HEADER_BYTES || entry.length > MAX_ENTRY_BYTES) {
    throw new InvalidEvent(`an entry has ${HEADER_BYTES + 1} to ${MAX_ENTRY_BYTES} bytes`);
  }
  return {
    index: toBigInt(entry.subarray(0, 8)),
    recordedAt: toBigInt(entry.subarray(8, 16)),
    event: readEnvelope(entry.subarray(HEADER_BYTES)),
  };
}

/** The entry, its envelope's form, `log` and signature checked; throws InvalidEvent. */
export async function checkEntry(bytes, log) {
  const entry = readEntry(bytes);
  const { event } = entry;
  if (event.log !== log) {
    throw new InvalidEvent(
      `the event is signed for log '${printable(event.log)}', this log is '${printable(log)}'`,
      "log",
    );
  }
  const { sig, ...unsigned } = event;
  const message = concat(CONTEXT, utf8(canonicalText(unsigned)));
  const publicKey = fromHex(event.actor.slice("ed25519:".length));
  if (!(await verifyEd25519(publicKey, message, decodeBase64(sig)))) {
    throw new InvalidEvent(`the signature does not verify under ${event.actor}`, "sig");
  }
  return entry;
}

function readEnvelope(raw) {
  const value = parseCanonical(raw);
  if (!hasExactly(value, FIELDS)) {
    throw new InvalidEvent(`an envelope has exactly the fields ${FIELDS.join(", ")}`);
  }
  if (value.v !== 1) throw new InvalidEvent("unknown envelope version; expected v = 1", "v");
  for (const [field, limit] of [["type", 64], ["log", 128]]) {
    if (!isString(value[field]) || !isWithin(value[field], 1, limit)) {
      throw new InvalidEvent(`${field} must be 1 to ${limit} characters`, field);
    }
  }
  if (!isInteger(value.at) || value.at < 0) {
    throw new InvalidEvent("at must be microseconds since 1970 UTC, an integer", "at");
  }
  if (!isObject(value.body)) throw new InvalidEvent("body must be an object", "body");
  if (!isString(value.sig) || decodeBase64(value.sig)?.length !== 64) {
    throw new InvalidEvent("sig must be a 64-byte Ed25519 signature in padded base64", "sig");
  }
  checkUuid(value.id, "id");
  checkActor(value.actor, "actor");
  return value;
}
