// What version 2 of a bundle adds to the verdict, in plain words: rows shown, payouts added up. Decides
// nothing. `say` is proven, `doubt` is left to trust.

import { equal } from "./bytes.js";
import { count, formatOpen, printable } from "./text.js";

const MAX_ROW_CHARS = 160;

export function sayDisclosed(rows, lineage) {
  return rows.map((shown) => {
    const { contribution: id, row, value } = shown;
    const { actor } = lineage.recorded.get(id).event;
    const used = trainedOn(shown, lineage).map(
      (run) => ` It was part of the training manifest of ${sayAdapter(run, lineage)}.`,
    );
    return (
      `Row ${row} of the contribution ${id}, which ${actor} signed for, is: prompt ` +
      `“${cut(value.prompt)}”, completion “${cut(value.completion)}”.${used.join("")}`
    );
  });
}

export function doubtDisclosed(rows, lineage) {
  if (!rows.length) return [];
  if (!lineage.manifests.size) {
    return [
      "Whether an adapter was trained on the rows shown: this bundle carries no training manifest. " +
        "Ask for the bundle of the adapter.",
    ];
  }
  return ["That whoever gave the rows shown had the right to, and what they did to the adapter."];
}

export function sayPayouts(statements) {
  return statements.flatMap((statement) => {
    const { period, account, cumulativeWei } = statement.line;
    const said = [
      `By the root that period ${period} was closed with, ${account} is owed ` +
        `${formatOpen(cumulativeWei)} in all.`,
    ];
    if (statement.isCutOff && missingWei(statement) === 0n) {
      said.push(`${xOfY(statement)}, to the last wei${owners(statement)}.`);
    }
    return said;
  });
}

export function doubtPayouts(statements) {
  const said = statements.flatMap((statement) => {
    const { period, account } = statement.line;
    const where = `of ${account} in period ${period}`;
    const missing = missingWei(statement);
    if (!statement.isCutOff) {
      return [`All of the payout ${where}: without the period's cut-off the bundle cannot be added up.`];
    }
    if (missing > 0n) {
      return [
        `${xOfY(statement)} ${where}${owners(statement)}; the remaining ${formatOpen(missing)} are ` +
          "not accounted for here. A bundle with the account's earnings, or a replay of the whole " +
          "log, shows them.",
      ];
    }
    if (missing < 0n) {
      return [
        `Why the payout ${where} is less than the ${formatOpen(statement.accountedWei)} that the ` +
          "events of this bundle add up to: ask the log for what is not shown here.",
      ];
    }
    return [];
  });
  if (statements.some((statement) => statement.owners.length)) {
    said.push(
      "That those addresses agreed to be bound to these owners: the log checked the addresses' own " +
        "signatures, this verifier does not.",
    );
  }
  return said;
}

export function factsDisclosed(rows, lineage) {
  return rows.map((shown) => {
    const runs = trainedOn(shown, lineage);
    const published = runs.map((run) => lineage.published.get(run)).filter(Boolean);
    return {
      contribution: shown.contribution,
      row: shown.row,
      runs,
      adapters: published.map(({ event }) => event.body.adapter),
    };
  });
}

export function factsPayouts(statements) {
  return statements.map(({ line, accountedWei, events, owners: names }) => ({
    period: line.period,
    account: line.account,
    cumulative_wei: line.cumulativeWei.toString(),
    accounted_wei: accountedWei.toString(),
    events,
    owners: names,
    checked: true,
  }));
}

/** The runs of the bundle whose manifest lists exactly this row. */
function trainedOn({ contribution, row, hash }, { manifests }) {
  const lists = ({ rows }) => {
    const found = rows.get(contribution)?.get(row);
    return found && equal(found, hash);
  };
  return [...manifests].filter(([, manifest]) => lists(manifest)).map(([run]) => run);
}

function sayAdapter(run, { published }) {
  const body = published.get(run)?.event.body;
  return body ? `the adapter ${body.adapter} (${printable(body.model)})` : `the training run ${run}`;
}

const missingWei = ({ line, accountedWei }) => line.cumulativeWei - accountedWei;

function xOfY({ line, accountedWei, events }) {
  return (
    `${formatOpen(accountedWei)} of ${formatOpen(line.cumulativeWei)} of this payout are accounted ` +
    `for by ${count(events, "event")} in this bundle`
  );
}

const owners = ({ owners: names }) => (names.length ? `, earned by ${names.join(", ")}` : "");
const cut = (text) => printable(text, MAX_ROW_CHARS);
