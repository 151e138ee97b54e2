// What the picture shows: entries of a bundle as nodes in columns, from datanets to payouts. Many of a
// kind become one node with a count; the subject and what failed always stand for themselves.

import { formatOpen, percent, printable } from "../core/text.js";
import { plural, short } from "./dom.js";

const MAX_SHOWN = 6;

/** kind -> column and words. The order of the columns is the order of an answer's life. */
export const KINDS = {
  datanet: { column: 0, one: "datanet", many: "datanets" },
  other: { column: 0, one: "other event", many: "other events" },
  contribution: { column: 1, one: "contribution", many: "contributions" },
  run: { column: 2, one: "training run", many: "training runs" },
  adapter: { column: 3, one: "adapter", many: "adapters" },
  inference: { column: 4, one: "inference", many: "inferences" },
  attribution: { column: 5, one: "attribution", many: "attributions" },
  fee: { column: 5, one: "fee", many: "fees" },
  period: { column: 6, one: "payout period", many: "payout periods" },
  payout: { column: 7, one: "payout", many: "payouts" },
};

// Event type -> [kind, how to name its node]; types of one thing share a node.
const THINGS = {
  "datanet.created": ["datanet", "datanet"],
  "datanet.closed": ["datanet", "datanet"],
  "datanet.policy_set": ["datanet", "datanet"],
  "contribution.recorded": ["contribution", "contribution"],
  "contribution.approved": ["contribution", "contribution"],
  "contribution.rejected": ["contribution", "contribution"],
  "contribution.withdrawn": ["contribution", "contribution"],
  "contribution.held": ["contribution", "contribution"],
  "contribution.released": ["contribution", "contribution"],
  "cluster.appealed": ["contribution", "contribution"],
  "cluster.split": ["contribution", "contribution"],
  "cluster.upheld": ["contribution", "contribution"],
  "run.requested": ["run", "run"],
  "run.started": ["run", "run"],
  "run.completed": ["run", "run"],
  "run.failed": ["run", "run"],
  "run.cancelled": ["run", "run"],
  "adapter.published": ["adapter", "adapter"],
  "adapter.retired": ["adapter", "adapter"],
  "adapter.recalled": ["adapter", "adapter"],
  "inference.recorded": ["inference", "inference"],
  "inference.interrupted": ["inference", "inference"],
  "attribution.recorded": ["attribution", "inference"],
  "fee.charged": ["fee", "inference"],
  "period.cutoff": ["period", "period"],
  "period.closed": ["period", "period"],
  "period.abandoned": ["period", "period"],
  "payout.proposed": ["period", "period"],
  "payout.activated": ["period", "period"],
  "payout.vetoed": ["period", "period"],
  "payout.claimed": ["payout", "address"],
};

/** `{nodes, edges}`. A node: `{id, kind, title, sub, entries, rows, lines, isSubject, isBroken}`. */
export function graphOf({ bundle, entries, lineage, verdict }) {
  const things = gather(bundle, entries, verdict);
  const links = linksOf(things, lineage);
  const nodeOf = collapse(things);
  const edges = new Map();
  for (const [from, to] of links) {
    const [a, b] = [nodeOf.get(from), nodeOf.get(to)];
    if (!a || !b || a === b) continue;
    const key = `${a.id} ${b.id}`;
    edges.set(key, { from: a, to: b, count: (edges.get(key)?.count ?? 0) + 1 });
  }
  return { nodes: [...new Set(nodeOf.values())], edges: [...edges.values()] };
}

function gather(bundle, entries, verdict) {
  const things = new Map();
  const failedAt = verdict.verified ? null : verdict.detail.entry;
  const thing = (kind, key) => {
    const id = `${kind} ${key}`;
    if (!things.has(id)) things.set(id, { id, kind, key, entries: [], rows: [], lines: [] });
    return things.get(id);
  };
  for (const entry of entries) {
    const [kind, field] = THINGS[entry.event?.type] ?? ["other", null];
    const found = thing(kind, field ? entry.event.body[field] : entry.index);
    found.entries.push(entry);
    found.isSubject ||= entry.event?.id === bundle.subject;
    found.isBroken ||= Number(entry.index) === failedAt;
  }
  for (const row of bundle.disclosed) thing("contribution", row.contribution).rows.push(row);
  for (const line of bundle.payouts) thing("payout", line.account).lines.push(line);
  for (const found of things.values()) Object.assign(found, wordsOf(found));
  return things;
}

/** Pairs of thing ids: what stands left is what the right one rests on. */
function linksOf(things, lineage) {
  const pairs = [];
  const of = (kind) => [...things.values()].filter((thing) => thing.kind === kind);
  const body = (thing, type) => thing.entries.find(({ event }) => event?.type === type)?.event.body;
  const answerOf = (thing) => body(thing, "inference.recorded") ?? body(thing, "inference.interrupted");
  for (const thing of of("contribution")) {
    const recorded = body(thing, "contribution.recorded");
    if (recorded) pairs.push([`datanet ${recorded.datanet}`, thing.id]);
  }
  for (const thing of of("run")) {
    const trained = lineage?.manifests.get(thing.key)?.rows;
    const datanets = body(thing, "run.requested")?.datanets ?? [];
    for (const contribution of of("contribution")) {
      const datanet = body(contribution, "contribution.recorded")?.datanet;
      if (trained ? trained.has(contribution.key) : datanets.includes(datanet)) {
        pairs.push([contribution.id, thing.id]);
      }
    }
    if (!of("contribution").length) pairs.push(...datanets.map((id) => [`datanet ${id}`, thing.id]));
  }
  for (const thing of of("adapter")) pairs.push([`run ${body(thing, "adapter.published")?.run}`, thing.id]);
  for (const thing of of("inference")) {
    pairs.push([`adapter ${answerOf(thing)?.adapter}`, thing.id]);
  }
  for (const thing of [...of("attribution"), ...of("fee")]) {
    pairs.push([`inference ${thing.key}`, thing.id]);
    // Everything before a cutoff belongs to its period, or to one before it.
    const period = of("period").find((p) => lastIndex(p) > lastIndex(thing));
    if (period) pairs.push([thing.id, period.id]);
  }
  for (const thing of of("payout")) {
    for (const { period } of thing.lines) pairs.push([`period ${period}`, thing.id]);
    if (!thing.lines.length) pairs.push(...of("period").slice(-1).map((p) => [p.id, thing.id]));
  }
  return pairs;
}

const lastIndex = ({ entries }) => entries.at(-1)?.index ?? -1n;

/** thing id -> node; where there are many of a kind, those that are nothing special share one. */
function collapse(things) {
  const nodeOf = new Map();
  for (const kind of Object.keys(KINDS)) {
    const all = [...things.values()].filter((thing) => thing.kind === kind);
    const isSpecial = (thing) => thing.isSubject || thing.isBroken;
    const plain = all.filter((thing) => !isSpecial(thing));
    const isMany = kind === "other" ? plain.length > 1 : all.length > MAX_SHOWN;
    if (isMany && plain.length > 1) {
      const group = groupOf(kind, plain);
      for (const thing of plain) nodeOf.set(thing.id, group);
    }
    for (const thing of all) if (!nodeOf.has(thing.id)) nodeOf.set(thing.id, thing);
  }
  return nodeOf;
}

function groupOf(kind, things) {
  const actors = new Set(things.flatMap(({ entries }) => entries.slice(0, 1).map((e) => e.event?.actor)));
  const { many } = KINDS[kind];
  return {
    id: `all ${kind}`,
    kind,
    members: things,
    entries: things.flatMap(({ entries }) => entries).sort((a, b) => (a.index < b.index ? -1 : 1)),
    rows: things.flatMap(({ rows }) => rows),
    lines: things.flatMap(({ lines }) => lines),
    label: many,
    title: `${things.length.toLocaleString("en")} ${many}`,
    sub: kind === "contribution" ? `by ${plural(actors.size, "contributor")}` : "",
    isSubject: false,
    isBroken: false,
  };
}

/** Label, title and second line of a node; names are strangers' text. */
function wordsOf({ kind, key, entries, rows, lines }) {
  const bodies = Object.fromEntries(entries.map(({ event }) => [event?.type, event?.body]));
  const first = entries[0];
  const label = KINDS[kind].one;
  const words = (title, sub) => ({ label, title: printable(title, 60), sub });
  switch (kind) {
    case "datanet": {
      const body = bodies["datanet.created"];
      return words(body?.name ?? key, body?.licence ?? "");
    }
    case "contribution": {
      const body = bodies["contribution.recorded"];
      const shown = rows.length ? `, ${rows.length} shown` : "";
      const sub = body ? `${plural(body.rows_count, "row")}${shown}` : "";
      return words(body?.title ?? key, sub);
    }
    case "run": {
      const completed = bodies["run.completed"];
      return words(bodies["run.requested"]?.name ?? key, completed ? `${plural(completed.rows_count, "row")} trained on` : "");
    }
    case "adapter":
      return words(bodies["adapter.published"]?.model ?? key, "LoRA adapter");
    case "inference": {
      const broken = bodies["inference.interrupted"];
      const body = bodies["inference.recorded"] ?? broken;
      return words(broken ? "Broken answer" : "Answer", body ? `${plural(body.completion_tokens, "token")}` : "");
    }
    case "attribution": {
      const body = bodies["attribution.recorded"];
      const named = 1_000_000 - body.unattributed_ppm;
      return words(plural(body.shares.length, "contributor"), `${percent(named)} % attributed`);
    }
    case "fee":
      return words(shortOpen(bodies["fee.charged"].amount_wei), "charged");
    case "period":
      return words(`Period ${key}`, bodies["period.closed"] ? "closed" : "");
    case "payout": {
      const wei = lines.at(-1)?.cumulativeWei ?? bodies["payout.claimed"]?.cumulative_wei;
      return words(shortOpen(wei ?? 0), short(key, 14));
    }
    default:
      return { label: first.event?.type ?? "unreadable entry", title: `Entry ${first.index}`, sub: first.event ? "" : "cannot be read" };
  }
}

/** An amount for a small space: at most six decimals, said to be rounded where it is. */
function shortOpen(wei) {
  const [number, unit] = formatOpen(wei).split(" ");
  const [whole, fraction = ""] = number.split(".");
  if (fraction.length <= 6) return `${number} ${unit}`;
  if (whole === "0" && /^0{6}/.test(fraction)) return `${BigInt(wei).toLocaleString("en")} wei`;
  return `≈ ${whole}.${fraction.slice(0, 6)} ${unit}`;
}
