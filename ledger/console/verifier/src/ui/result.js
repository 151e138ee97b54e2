// The verdict for people: the banner, the steps, what is proven and what must be trusted, the picture,
// what was disclosed, and everything as a list.

import { formatOpen, printable } from "../core/text.js";
import { STEP_NAMES } from "../core/verify.js";
import { showEntry, showNode } from "./detail.js";
import { h, icon, plural, short, withCode } from "./dom.js";
import { drawGraph } from "./graph.js";

const LISTED_AT_ONCE = 200;

const STEP_WORDS = [
  "The file is one bundle, in its one spelling.",
  "The log's key signed the size and root of a tree.",
  "Every entry is in that tree, at the place written in it.",
  "Every event is well-formed and signed by its author, for this log.",
  "What the subject rests on is all here, and both ends of every reference agree.",
  "A block of an EVM chain holds this log's tree.",
  "Each row shown is that row of its contribution.",
  "Each payout line is under the root that its period was closed with.",
];

const ERROR_WORDS = {
  "malformed-proof": "The file is not what it should be: damaged, cut off, or written by something else.",
  "bad-signature": "A signature does not match what it should have signed: the content or the key is not the original.",
  "not-included": "Something in the file is not what was committed to. It was changed afterwards, or was never recorded.",
  inconsistent: "Two parts of the file contradict each other.",
  "anchor-mismatch": "The part that should prove the tree on chain does not.",
};

const STATUS_CLASS = { "not reached": "idle", running: "idle", waiting: "idle" };

/** While it runs: which step, in the banner. */
export function showRunning(name, number) {
  return h("div", { class: "banner running" },
    h("span", { class: "seal", "aria-hidden": "true" }),
    h("div", {},
      h("h2", {}, "Checking"),
      h("p", {}, `${name}: step ${number}, ${STEP_NAMES[number - 1]}`)));
}

export function showVerdict({ verdict, bundle, entries }) {
  if (!verdict.verified) return showFailure(verdict);
  const subject = entries.find(({ event }) => event.id === bundle.subject);
  const steps = verdict.steps.filter(({ status }) => status === "ok").length;
  const skipped = verdict.steps.length - steps;
  return banner("ok", "Verified", [
    h("p", { class: "reason" },
      `Entry ${subject.index} of the log ${printable(bundle.log)}, ${subject.event.type}, and the ` +
        `${plural(entries.length - 1, "event")} that it came with are what the log committed to.`),
    h("p", {},
      `${plural(steps, "step")} passed${skipped ? `, ${skipped} had nothing to check and proves nothing` : ""}. Below: what that proves, and what it cannot.`),
  ]);
}

function showFailure({ error, message, failed_step: step, steps }) {
  return banner("failed", "Not verified", [
    h("p", { class: "reason" }, ERROR_WORDS[error]),
    h("p", {}, `Step ${step} of ${steps.length}, ${steps[step - 1].name}, failed. Treat nothing in this file as proven.`),
    h("p", { class: "message" }, withCode(printable(message, 600))),
  ]);
}

/** A bundle that was not even looked at, or a fault of this page: never a verdict. */
export function showProblem(title, words) {
  return banner("failed", title, [h("p", {}, words)]);
}

function banner(status, title, lines) {
  return h("div", { class: `banner ${status}` },
    h("span", { class: "seal" }, icon(status, 30)),
    h("div", {}, h("h2", {}, title), lines));
}

/** Everything under the banner. */
export function showResult(found) {
  const { verdict, bundle } = found;
  const facts = verdict.verified ? showSaid(verdict) : showFacts(found);
  const steps = h("section", { class: "panel", id: "steps" }, h("h2", {}, "Steps"), showSteps(verdict.steps));
  const claims = bundle ? [showPicture(found), showDisclosed(found), showPayouts(found)] : [];
  const parts = verdict.verified ? [facts, ...claims, steps] : [steps, facts, ...claims];
  return [...parts, bundle && showEntries(found), showJson(verdict)].filter(Boolean);
}

/** What the steps are, for a reader who has not chosen a file yet. */
export function showPlan() {
  return h("section", { class: "panel" },
    h("h2", {}, "What is checked, in this order"),
    h("ol", { class: "steps" }, STEP_NAMES.map((name, n) =>
      h("li", { class: "plan" },
        h("span", { class: "dot", "aria-hidden": "true" }, n + 1),
        h("h3", {}, name),
        h("p", {}, STEP_WORDS[n])))));
}

function showSteps(steps) {
  return h("ol", { class: "steps" }, steps.map(({ number, name, status, detail }) => {
    const look = STATUS_CLASS[status] ?? status;
    return h("li", { class: look === "skipped" ? "idle" : look, "data-step": number, "data-status": status },
      h("span", { class: "dot", "aria-hidden": "true" }, number),
      h("h3", {}, name),
      h("span", { class: `chip ${look}` }, icon(status), status),
      h("p", {}, STEP_WORDS[number - 1]),
      (status === "ok" || status === "skipped") && h("p", { class: "detail" }, printable(detail, 600)));
  }));
}

function showSaid({ proven, trusted }) {
  return h("div", { class: "grid" },
    h("section", { class: "panel said proven" },
      h("h2", {}, "Proven"),
      h("ul", {}, proven.map((line) => h("li", {}, h("span", { class: "mark" }, icon("ok")), h("span", {}, withCode(line)))))),
    h("section", { class: "panel said trusted" },
      h("h2", {}, "Still to be trusted"),
      h("ul", {}, trusted.map((line) =>
        h("li", {}, h("span", { class: "mark", "aria-hidden": "true" }, "?"), h("span", {}, withCode(line)))))));
}

/** What a failed file says about itself. */
function showFacts({ bundle, verdict }) {
  const { entry, field } = verdict.detail;
  const pair = (name, value) => value !== null && [h("dt", {}, name), h("dd", { class: "mono" }, String(value))];
  const claims = bundle && [
    h("h2", {}, "What the file claims"),
    h("dl", {},
      pair("log", printable(bundle.log)),
      pair("subject", bundle.subject),
      pair("entries", bundle.entries.length)),
  ];
  return h("section", { class: "panel facts" },
    h("div", { class: "grid" },
      h("div", {},
        h("h2", {}, "Where it failed"),
        h("dl", {},
          pair("step", `${verdict.failed_step}, ${verdict.steps[verdict.failed_step - 1].name}`),
          pair("error", verdict.error),
          pair("entry", entry),
          pair("field", field))),
      h("div", {}, claims)),
    h("p", { class: "hint more" },
      "Anyone on its way to you may have changed or damaged it. Ask for it again, best from the log itself."));
}

function showPicture(found) {
  const { verdict, bundle } = found;
  const picture = h("div", { class: "picture" });
  const opened = h("div", { class: "opened", "aria-live": "polite" });
  const open = (node) => opened.replaceChildren(...showNode(node, open));
  const { nodes, select, center } = drawGraph(picture, found, open);
  const shown = nodes.find((node) => node.isBroken) ?? nodes.find((node) => node.isSubject) ?? nodes[0];
  select(shown);
  requestAnimationFrame(() => center(shown));
  return h("section", { class: "panel", id: "lineage" },
    h("h2", {}, "Lineage"),
    !verdict.verified && h("p", { class: "claim" }, "As the file claims it. Not verified."),
    picture,
    opened);
}

function showDisclosed({ bundle, verdict }) {
  if (!bundle.disclosed.length) return null;
  return h("section", { class: "panel", id: "disclosed" },
    h("h2", {}, `Rows shown (${bundle.disclosed.length})`),
    !verdict.verified && h("p", { class: "claim" }, "As the file claims them. Not verified."),
    h("div", { class: "rows" }, bundle.disclosed.map(({ contribution, row, value }) =>
      h("div", { class: "row" },
        h("p", { class: "said-by" }, `row ${row} of contribution ${contribution}`),
        h("blockquote", {}, h("b", {}, "Prompt"), value.prompt),
        h("blockquote", {}, h("b", {}, "Completion"), value.completion)))));
}

function showPayouts({ bundle, verdict }) {
  if (!bundle.payouts.length) return null;
  return h("section", { class: "panel", id: "payouts" },
    h("h2", {}, `Payout lines (${bundle.payouts.length})`),
    !verdict.verified && h("p", { class: "claim" }, "As the file claims them. Not verified."),
    h("div", { class: "scroll" },
      h("table", {},
        h("thead", {}, h("tr", {}, h("th", {}, "Period"), h("th", {}, "Account"), h("th", { class: "number" }, "Due in all, since the first period"))),
        h("tbody", {}, bundle.payouts.map(({ period, account, cumulativeWei }) =>
          h("tr", {}, h("td", {}, String(period)), h("td", { class: "mono" }, account), h("td", { class: "number" }, formatOpen(cumulativeWei))))))));
}

function showEntries({ entries }) {
  const list = h("tbody");
  const opened = h("div", { class: "opened", hidden: true });
  const more = h("button", { type: "button", class: "more", click: add }, "Show more");
  let shown = 0;
  const open = (entry) => {
    opened.hidden = false;
    opened.replaceChildren(showEntry(entry));
  };
  function add() {
    const next = entries.slice(shown, shown + LISTED_AT_ONCE);
    shown += next.length;
    more.hidden = shown >= entries.length;
    list.append(...next.map((entry) =>
      h("tr", {},
        h("td", { class: "number" }, String(entry.index)),
        h("td", {}, h("button", { type: "button", class: "link", click: () => open(entry) }, entry.event?.type ?? "cannot be read")),
        h("td", { class: "mono" }, entry.event ? short(entry.event.actor, 24) : ""))));
  }
  add();
  return h("details", { class: "panel", id: "entries" },
    h("summary", {}, `All ${plural(entries.length, "entry", "entries")}`),
    h("div", { class: "scroll" },
      h("table", {},
        h("thead", {}, h("tr", {}, h("th", { class: "number" }, "Index"), h("th", {}, "Event"), h("th", {}, "Signer"))),
        list)),
    more,
    opened);
}

/** The verdict for programs: what `python -m ledger.verify --json` prints. */
function showJson(verdict) {
  return h("details", { class: "panel", id: "json" },
    h("summary", {}, "Verdict as JSON"),
    h("pre", { tabindex: "0" }, JSON.stringify(verdict, null, 2)));
}
