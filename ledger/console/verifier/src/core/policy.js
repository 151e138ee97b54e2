// Trust policies (c2sp.org/tlog-policy): which logs and which witnesses are enough to believe a
// checkpoint. Lines `log`, `witness`, `group`, `quorum`; the rules of ledger/verify/policy.py.

import { equal, utf8 } from "./bytes.js";
import { VerificationError, badSignature, malformed } from "./errors.js";
import { COSIGNATURE, ED25519, parseVkey, sameKey } from "./note.js";
import { printable } from "./text.js";

const MAX_POLICY_BYTES = 65_536;
const MAX_LINES_OF_A_KIND = 64;
const NONE = "none";

/** Does this text look like a policy, rather than a list of keys? */
export const isPolicy = (text) => /^[ \t]*(?:log|witness|group|quorum)[ \t]/m.test(text);

/** `{logs, witnesses, groups, quorum}`; throws malformed-proof that names the line. */
export function parsePolicy(text) {
  if (utf8(text).length > MAX_POLICY_BYTES) {
    throw malformed(`a policy has at most MAX_POLICY_BYTES = ${MAX_POLICY_BYTES} bytes`);
  }
  if (/[\x00-\x08\x0b-\x1f\x7f]/.test(text)) {
    throw malformed("a policy holds no control characters but tab and line feed");
  }
  const draft = { logs: [], witnesses: [], groups: [], quorums: [], names: new Set(), members: new Set() };
  text.split("\n").forEach((line, n) => {
    const words = line.split(/[ \t]+/).filter(Boolean);
    if (!words.length || words[0].startsWith("#")) return;
    try {
      readLine(draft, words);
    } catch (error) {
      if (!(error instanceof VerificationError)) throw error;
      throw error.about(`line ${n + 1} of the policy`);
    }
  });
  if (draft.quorums.length !== 1) {
    throw malformed(
      `the policy has ${draft.quorums.length} quorum lines; exactly one says which witness or ` +
        "group is needed ('quorum none' asks for no witness)",
    );
  }
  const { logs, witnesses, groups, quorums } = draft;
  return { logs, witnesses, groups, quorum: quorums[0] };
}

/** What the quorum has, in words, or null where the policy asks for no witness; throws bad-signature
 * unless cosignatures by these keys, all verified, make it. */
export function requireQuorum(policy, keys) {
  if (policy.quorum === null) return null;
  const isThere = ({ key }) => keys.some((known) => sameKey(known, key));
  const weights = new Map();
  for (const witness of policy.witnesses) {
    const has = Number(isThere(witness));
    weights.set(witness.name, { isMet: has === 1, has, wants: 1 });
  }
  for (const { name, threshold, members } of policy.groups) {
    const has = members.filter((member) => weights.get(member).isMet).length;
    weights.set(name, { isMet: has >= threshold, has, wants: threshold });
  }
  const { isMet, has, wants } = weights.get(policy.quorum);
  const silent = policy.witnesses.filter((witness) => !isThere(witness)).map(({ name }) => printable(name));
  const without = silent.length ? `; without ${silent.join(", ")}` : "";
  const said = `${has} of the ${wants} needed in ${printable(policy.quorum)}${without}`;
  if (!isMet) throw badSignature(`the checkpoint is not witnessed as the policy demands: ${said}`);
  return said;
}

function readLine(draft, [keyword, ...rest]) {
  if (keyword === "log" && [1, 2].includes(rest.length)) {
    draft.logs.push({ key: newKey(rest[0], ED25519, draft.logs, "log") });
  } else if (keyword === "witness" && [2, 3].includes(rest.length)) {
    const key = newKey(rest[1], COSIGNATURE, draft.witnesses, "witness");
    define(draft, rest[0]);
    draft.witnesses.push({ name: rest[0], key });
  } else if (keyword === "group" && rest.length >= 3) {
    addGroup(draft, rest);
  } else if (keyword === "quorum" && rest.length === 1) {
    draft.quorums.push(rest[0] === NONE ? null : defined(draft, rest[0]));
  } else {
    throw malformed(
      "expected 'log <vkey> [<url>]', 'witness <name> <vkey> [<url>]', 'group <name> " +
        "<k>|any|all <member>...' or 'quorum <name>|none'",
    );
  }
}

function addGroup(draft, [name, k, ...members]) {
  for (const member of members) {
    if (draft.members.has(defined(draft, member))) {
      throw malformed(`'${printable(member)}' is a member twice; each name counts in one group`);
    }
    draft.members.add(member);
  }
  const isNumber = /^[1-9][0-9]{0,3}$/.test(k);
  const threshold = k === "any" ? 1 : k === "all" ? members.length : isNumber ? Number(k) : 0;
  if (threshold < 1 || threshold > members.length) {
    throw malformed(`a group's threshold is 1 to ${members.length} here, any or all`);
  }
  checkRoom(draft.groups);
  define(draft, name);
  draft.groups.push({ name, threshold, members });
}

function newKey(vkey, type, known, kind) {
  const key = parseVkey(vkey);
  if (key.type !== type) throw malformed(`the key ${printable(key.name)} is no ${kind} key`);
  // Two vkeys around one public key are one party under two names: it would count twice.
  if (known.some((other) => equal(other.key.publicKey, key.publicKey))) {
    throw malformed(`the public key of ${printable(key.name)} stands on two ${kind} lines`);
  }
  checkRoom(known);
  return key;
}

function checkRoom(found) {
  if (found.length >= MAX_LINES_OF_A_KIND) {
    throw malformed(`a policy has at most ${MAX_LINES_OF_A_KIND} of these lines`);
  }
}

function define(draft, name) {
  if (name === NONE || draft.names.has(name)) throw malformed(`the name '${printable(name)}' is taken`);
  draft.names.add(name);
}

function defined(draft, name) {
  if (!draft.names.has(name)) {
    throw malformed(`'${printable(name)}' is no witness or group defined on an earlier line`);
  }
  return name;
}
