// A verdict in plain words; decides nothing. The sentences are those of ledger/verify/sentences.py, but
// for the one that tells how to give a key to this page.

import { splitPool } from "./statement.js";
import { sayAbout } from "./subjects.js";
import { count, formatOpen, percent, printable, time } from "./text.js";

const MAX_SHARES_SAID = 5;
const MAX_ODD_SAID = 5;

/** What the steps have shown. */
export function sayProven({ head, key, entries, lineage, witnesses, quorum, anchor, fees }) {
  const said = [
    `The log ${printable(head.origin)} signed a tree of ${head.size} entries (key id ${key.id}).`,
    `All ${entries.length} entries of this bundle are in that tree, each at the index written in it.`,
    "Every event was signed by its actor's key, for this log and no other.",
    ...sayLineage(lineage),
    ...witnesses.map(
      (witness) =>
        `The witness ${printable(witness.key.name)} saw the same tree at ${time(witness.timestamp ?? 0n)}.`,
    ),
  ];
  if (quorum) said.push(`Enough witnesses saw it for the policy you gave: ${quorum}.`);
  if (anchor) said.push(`${sayL1(anchor)}.`);
  if (fees.asPolicy) {
    said.push(`What became of ${count(fees.asPolicy, "fee")} is as the fee policy in this bundle says.`);
  }
  return said;
}

/** What no step can show. */
export function sayTrusted(found) {
  const { key, lineage, isOwnKey, fees } = found;
  const { body } = lineage.subject.event;
  const name = printable(key.name);
  const said = [
    isOwnKey
      ? `That the key you gave is that of the log ${name}.`
      : `The log's key came from the bundle itself: compare id ${key.id} of ${name} with one ` +
        "that you got elsewhere, or enter it under What you already trust.",
    ...doubtOthers(found),
  ];
  if (Object.hasOwn(body, "tx_hash")) {
    said.push(
      `That transaction ${body.tx_hash} is on chain ${body.chain_id} and did what the event says: ` +
        "ask a node that you trust.",
    );
  }
  if (fees.unknown) {
    said.push(`How ${count(fees.unknown, "fee")} had to be split: the fee policy is not in this bundle.`);
  }
  for (const index of fees.odd.slice(0, MAX_ODD_SAID)) {
    said.push(`Why the fee of entry ${index} is not split as the fee policy in this bundle says.`);
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
  if (lineage.inference || lineage.manifests.size) {
    said.push(
      "That training, answer and attribution were computed as recorded: the bundle proves who " +
        "recorded what and when, not the computation.",
    );
  }
  return said;
}

/** Whether others were shown the same log. */
function doubtOthers({ witnesses, anchor, lineage }) {
  if (!anchor) {
    return [
      witnesses.length
        ? "That the witnesses are independent of the log, and of each other."
        : "No witness and no chain vouches for this tree: the log could have shown others another one.",
    ];
  }
  const said = [
    `That block ${anchor.block_hash} is on chain ${anchor.chain_id}, as the bundle claims (no ` +
      `header names its chain), and that ${anchor.contract} is this log's anchor contract: ask ` +
      "a node that you trust.",
  ];
  if (BigInt(anchor.anchored_size) <= lineage.subject.index) {
    said.push(
      `The chain holds the first ${anchor.anchored_size} entries; entry ` +
        `${lineage.subject.index}, the subject, came after them.`,
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
    `This bundle is about entry ${subject.index}, ${subject.event.type} ${subject.event.id}, which ` +
      `says: ${sayAbout(subject)}. It was signed by ${subject.event.actor} and recorded ` +
      `${time(subject.recordedAt / 1_000_000n)} by the log's clock.`,
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
  if (attribution) said.push(sayShares(attribution.event.body, fee));
  if (fee) {
    const { amount_wei: amount, contributors_wei: contributors } = fee.event.body;
    said.push(`The fee was ${formatOpen(amount)}, of which ${formatOpen(contributors)} to contributors.`);
  }
  return said;
}

/** Shares, largest first, and what each came to where the fee is known. */
function sayShares(body, fee) {
  const paid = fee ? splitPool(body, BigInt(fee.event.body.contributors_wei)) : {};
  const shares = [...body.shares].sort(
    (a, b) => b.ppm - a.ppm || (a.contributor < b.contributor ? -1 : 1),
  );
  const named = shares.slice(0, MAX_SHARES_SAID).map(({ contributor, ppm }) => {
    const amount = fee ? ` (${formatOpen(paid[contributor])})` : "";
    return `${contributor.slice(0, 20)}… ${percent(ppm)} %${amount}`;
  });
  if (shares.length > MAX_SHARES_SAID) named.push(`${shares.length - MAX_SHARES_SAID} more`);
  named.push(`unattributed ${percent(body.unattributed_ppm)} %`);
  return `The attribution recorded for it: ${named.join(", ")}.`;
}
