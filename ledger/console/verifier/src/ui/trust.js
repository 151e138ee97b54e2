// What the reader brings along: read from the form, each mistake said beside its field.

import { VerificationError } from "../core/errors.js";
import { parseVkey } from "../core/note.js";
import { isPolicy, parsePolicy } from "../core/policy.js";
import { trim } from "../core/text.js";
import { byId } from "./dom.js";

/** The form as a Trust, or null where a field cannot be understood. */
export function readTrust() {
  const trust = { requireL1: byId("l1").checked };
  const isRight = [
    readField("vkey", (text) => {
      parseVkey(text);
      trust.vkey = text;
    }),
    readField("witnesses", (text) => {
      if (isPolicy(text)) trust.policy = parsePolicy(text);
      else trust.witnessVkeys = text.split(/\s+/).filter(Boolean).map((vkey) => parseVkey(vkey) && vkey);
    }),
  ].every(Boolean);
  const given = [trust.vkey && "log key", trust.witnessVkeys && "witnesses", trust.policy && "policy", trust.requireL1 && "L1 required"];
  byId("trusting").textContent = given.filter(Boolean).join(", ");
  return isRight ? trust : null;
}

function readField(id, take) {
  const field = byId(id);
  const problem = byId(`${id}-error`);
  const text = trim(field.value);
  try {
    if (text) take(text);
  } catch (error) {
    if (!(error instanceof VerificationError)) throw error;
    problem.textContent = error.message;
    field.setAttribute("aria-invalid", "true");
    byId("trust").open = true;
    return false;
  }
  problem.textContent = "";
  field.removeAttribute("aria-invalid");
  return true;
}
