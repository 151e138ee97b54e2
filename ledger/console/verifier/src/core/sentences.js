// A verdict in plain words; decides nothing. The sentences are those of ledger/verify/sentences.py, but
// for the one that tells how to give a key to this page.

import { printable } from "./text.js";

const MAX_SHARES_SAID = 5;
const WEI_DIGITS = 18;
const LAST_SECOND_OF_9999 = 253_402_300_799n;

/** What the steps have shown. */
export function sayProven({ head, key, count, lineage, witnesses, anchor }) {
  return [
    `The log ${printable(head.origin)} signed a tree of ${head.size} entries (key id ${key.id}).`,
    `All ${count} entries of this bundle are in that tree, each at the index written in it.`,
    "Every event was signed by its actor's key, for this log and no other.",
    ...sayLineage(lineage),
    ...witnesses.map(
      (witness) =>
        `The witness ${printable(witness.key.name)} saw the same tree at ${time(witness.timestamp ?? 0n)}.`,
    ),
    ...(anchor ? [`${sayL1(anchor)}.`] : []),
  ];
}

/** What no step can show. */
export function sayTrusted({ key, lineage, witnesses, anchor, isOwnKey }) {
  const name = printable(key.name);
  const said = [
    isOwnKey
      ? `That the key you gave is that of the log ${name}.`
      : `The log's key came from the bundle itself: compare id ${key.id} of ${name} with one ` +
        "that you got elsewhere, or enter it under What you already trust.",
  ];
  if (!witnesses.length && !anchor) {
    said.push(
      "No witness and no chain vouches for this tree: the log could have shown others another one.",
    );
  } else if (!anchor) {
    said.push("That the witnesses are independent of the log.");
  }
  if (anchor) {
    said.push(
      `That block ${anchor.block_hash} is on chain ${anchor.chain_id}, as the bundle claims (no ` +
        `header names its chain), and that ${anchor.contract} is this log's anchor contract: ask ` +
        "a node that you trust.",
    );
    if (BigInt(anchor.anchored_size) <= lineage.subject.index) {
      said.push(
        `The chain holds the first ${anchor.anchored_size} entries; entry ` +
          `${lineage.subject.index}, the subject, came after them.`,
      );
    }
  }
  if (lineage.partial.length) {
    said.push(
      `That the rows used of ${lineage.partial.length} contributions belong to them: the run used ` +
        "only some, so the root over all their rows cannot be recomputed here.",
    );
  }
  said.push(
    "That the log let only those act who had the role for it, and what it recorded after these " +
      "entries (a withdrawal, say).",
  );
  if (lineage.run || lineage.inference) {
    said.push(
      "That training, answer and attribution were computed as recorded: the bundle proves who " +
        "recorded what and when, not the computation.",
    );
  }
  return said;
}

/** What the L1 proof shows; not the chain's number, which no header holds. */
export function sayL1(anchor) {
  return (
    `The EVM block ${anchor.block_number} of hash ${anchor.block_hash} holds the log's first ` +
    `${anchor.anchored_size} entries as this tree has them`
  );
}

function sayLineage({ subject, inference, adapter, run, attribution, fee, ...lineage }) {
  const said = [
    `The subject is entry ${subject.index}, ${subject.event.type} ${subject.event.id}, recorded ` +
      `${time(subject.recordedAt / 1_000_000n)} by the log's clock, signed by ${subject.event.actor}.`,
  ];
  if (inference && adapter) {
    said.push(
      `The answer of inference ${inference.event.body.inference} is recorded as given by the ` +
        `adapter ${adapter.event.body.model}.`,
    );
  }
  if (run) {
    const bound = lineage.partial.length ? "" : "; the rows are those that the contributors signed for";
    const people = new Set([...lineage.contributions.values()].map(({ event }) => event.actor));
    said.push(
      `Its training run ${run.event.body.run} used ${lineage.rowsCount} rows of ` +
        `${lineage.contributions.size} approved contributions by ${people.size} contributors, all ` +
        `of them in this bundle${bound}.`,
    );
  }
  if (attribution) said.push(sayShares(attribution.event.body));
  if (fee) {
    const { amount_wei: amount, contributors_wei: contributors } = fee.event.body;
    said.push(`The fee was ${formatOpen(amount)}, of which ${formatOpen(contributors)} to contributors.`);
  }
  return said;
}

function sayShares({ shares, unattributed_ppm: unattributed }) {
  const sorted = [...shares].sort(
    (a, b) => b.ppm - a.ppm || (a.contributor < b.contributor ? -1 : 1),
  );
  const named = sorted
    .slice(0, MAX_SHARES_SAID)
    .map(({ contributor, ppm }) => `${contributor.slice(0, 20)}… ${percent(ppm)} %`);
  if (sorted.length > MAX_SHARES_SAID) named.push(`${sorted.length - MAX_SHARES_SAID} more`);
  named.push(`unattributed ${percent(unattributed)} %`);
  return `The attribution recorded for it: ${named.join(", ")}.`;
}

/** Parts per million with two decimals of a percent, an exact half to the even digit. */
export function percent(ppm) {
  const isHalf = ppm % 1_250 === 0 && (ppm / 1_250) % 2 === 1;
  const below = (ppm - 50) / 100;
  return (isHalf ? (below % 2 ? below + 1 : below) / 100 : ppm / 10_000).toFixed(2);
}

/** Base units for people: `1.5 OPEN`. Exact, never rounded. */
export function formatOpen(wei) {
  const digits = BigInt(wei).toString().padStart(WEI_DIGITS + 1, "0");
  const fraction = digits.slice(-WEI_DIGITS).replace(/0+$/, "");
  return `${digits.slice(0, -WEI_DIGITS)}${fraction && `.${fraction}`} OPEN`;
}

/** POSIX seconds (BigInt) as UTC; numbers that no calendar has come back as they are. */
export function time(seconds) {
  if (seconds > LAST_SECOND_OF_9999) return `time ${seconds}`;
  const iso = new Date(Number(seconds) * 1_000).toISOString();
  return `${iso.slice(0, 10)} ${iso.slice(11, 19)} UTC`;
}
