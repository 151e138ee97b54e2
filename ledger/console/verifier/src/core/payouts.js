// Payout lines: is this amount for that account under the root that a period was closed with. The tree
// is OpenZeppelin's StandardMerkleTree over ["address", "uint256"].

import { concat, equal, fromHex, toHex } from "./bytes.js";
import { inconsistent, malformed, notIncluded } from "./errors.js";
import { amount } from "./events.js";
import { checkAscending, countOf, listOf, objectOf, textOf } from "./fields.js";
import { keccak256 } from "./hash.js";

const MAX_PAYOUTS = 100;
const MAX_PAYOUT_HASHES = 64;
const ACCOUNT = /^0x[0-9a-f]{40}$/;
const HEX32 = /^0x[0-9a-f]{64}$/;

export function readPayouts(value) {
  const lines = listOf(value, MAX_PAYOUTS, "payouts").map((item, n) => readLine(item, `payouts[${n}]`));
  const isAfter = (a, b) => a.period < b.period || (a.period === b.period && a.account < b.account);
  checkAscending(lines, isAfter, "payouts");
  return lines;
}

function readLine(item, where) {
  const fields = objectOf(item, ["period", "account", "cumulative_wei", "proof"], where);
  const proof = listOf(fields.proof, MAX_PAYOUT_HASHES, `${where}.proof`);
  const period = countOf(fields.period, `${where}.period`, 1);
  const account = matching(ACCOUNT, fields.account, `${where}.account`, "0x and 40");
  amount(fields.cumulative_wei, `${where}.cumulative_wei`);
  return {
    period,
    account,
    cumulativeWei: BigInt(fields.cumulative_wei),
    proof: proof.map((node, n) =>
      fromHex(matching(HEX32, node, `${where}.proof[${n}]`, "0x and 64").slice(2)),
    ),
  };
}

/** Each line against the root of its period (`closed`: period.closed by number). */
export function checkPayouts(lines, closed) {
  lines.forEach((line, n) => {
    if (!closed.has(line.period)) {
      throw inconsistent(
        `payouts[${n}] is of period ${line.period}, whose period.closed is not in the bundle`,
        { field: `payouts[${n}].period` },
      );
    }
  });
  lines.forEach((line, n) => {
    const entry = closed.get(line.period);
    if (toHex(rootOf(line)) !== entry.event.body.root.slice(2)) {
      throw notIncluded(
        `payouts[${n}]: the root that period ${line.period} was closed with does not hold ` +
          `${line.cumulativeWei} wei for ${line.account}`,
        { field: `payouts[${n}]`, entry: Number(entry.index) },
      );
    }
  });
}

function rootOf({ account, cumulativeWei, proof }) {
  const amountHex = cumulativeWei.toString(16).padStart(64, "0");
  const leaf = concat(new Uint8Array(12), fromHex(account.slice(2)), fromHex(amountHex));
  let node = keccak256(keccak256(leaf));
  for (const sibling of proof) {
    node = keccak256(isLess(node, sibling) ? concat(node, sibling) : concat(sibling, node));
  }
  return node;
}

const isLess = (a, b) => !equal(a, b) && toHex(a) < toHex(b);

function matching(form, value, where, what) {
  if (!form.test(textOf(value, where))) {
    throw malformed(`${where} must be ${what} lower-case hex digits`, { field: where });
  }
  return value;
}
