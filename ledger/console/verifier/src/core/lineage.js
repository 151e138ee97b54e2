// What the events of a bundle claim of each other: every reference ends at an earlier event of the
// bundle, and both ends agree (docs/FORMATS.md: the rules in the event catalogue). The same rules as
// ledger/verify/lineage.py, in the same order.

import { canonicalText } from "./canonical.js";
import { VerificationError, inconsistent, malformed } from "./errors.js";
import { CREATES, ONCE, references } from "./events.js";
import { sha256Hex } from "./hash.js";
import { parseManifest, rowsMatch } from "./manifest.js";
import { isString, printable } from "./text.js";

const MAX_RUNS = 16;
const MANIFEST = "body.manifest_sha256";

/** Checks every rule between the entries (ascending, verified) and their blobs; the graph. */
export async function checkLineage(entries, blobs, subject, pace) {
  await checkBlobs(entries, blobs, pace);
  if (entries.filter(({ event }) => event.type === "run.completed").length > MAX_RUNS) {
    throw malformed(`a bundle has at most MAX_RUNS = ${MAX_RUNS} completed runs`);
  }
  const graph = new Graph(entries, blobs, pace);
  for (const entry of entries) {
    for (const [field, kind, id] of references(entry.event)) {
      graph.created(entry, `body.${field}`, kind, id);
    }
    await RULES[entry.event.type]?.(graph, entry);
    await pace();
  }
  return around(graph, entries, subject);
}

class Graph {
  constructor(entries, blobs, pace) {
    this.blobs = blobs;
    this.pace = pace;
    this.ids = new Map();
    this.firsts = new Map();
    this.manifests = new Map();
    for (const entry of entries) {
      if (this.ids.has(entry.event.id)) {
        fail(entry, "id", `event ${entry.event.id} stands in the log twice`);
      }
      this.ids.set(entry.event.id, entry);
      for (const kind of Object.keys(CREATES)) {
        if (Object.hasOwn(entry.event.body, kind)) this.place(entry, kind);
      }
    }
  }

  place(entry, kind) {
    const { type, body } = entry.event;
    const key = `${type} ${kind} ${body[kind]}`;
    const first = this.firsts.get(key);
    if (!first) this.firsts.set(key, entry);
    else if (ONCE[type] === kind) {
      fail(entry, `body.${kind}`, `repeats entry ${first.index}; this happens only once`);
    }
  }

  /** The first event of a type about a thing, if it stands before another event. */
  first(type, kind, id, before = null) {
    const found = this.firsts.get(`${type} ${kind} ${id}`);
    return found && (!before || found.index < before.index) ? found : null;
  }

  /** The event that made what `entry` refers to. */
  created(entry, field, kind, id) {
    const type = CREATES[kind];
    const found = this.first(type, kind, id, entry);
    if (!found) {
      fail(entry, field, `names ${kind} ${id}, but no earlier ${type} of it is in the bundle`);
    }
    return found;
  }

  /** The run.completed before `entry`, whose body names the run. */
  completed(entry) {
    const found = this.first("run.completed", "run", entry.event.body.run, entry);
    if (!found) fail(entry, "body.run", "no earlier run.completed of it is in the bundle");
    return found;
  }

  /** The training manifest that a run.completed names. */
  async manifest(completed) {
    const name = completed.event.body.manifest_sha256;
    if (!this.blobs.has(name)) {
      fail(completed, MANIFEST, "the training manifest of that hash is not in the bundle");
    }
    if (!this.manifests.has(name)) {
      try {
        this.manifests.set(name, await parseManifest(this.blobs.get(name), this.pace));
      } catch (error) {
        if (!(error instanceof VerificationError)) throw error;
        throw error.about(where(completed, MANIFEST), detail(completed, MANIFEST));
      }
    }
    return this.manifests.get(name);
  }

  /** contribution.recorded by contribution, for every contribution of a run's manifest. */
  async trainedOn(completed) {
    const { rows } = await this.manifest(completed);
    return new Map(
      [...rows.keys()].map((id) => [id, this.created(completed, MANIFEST, "contribution", id)]),
    );
  }
}

/** Each blob hashes to its name, and some event names it. */
async function checkBlobs(entries, blobs, pace) {
  const named = new Set(entries.flatMap(({ event }) => Object.values(event.body).filter(isString)));
  for (const [name, blob] of blobs) {
    const actual = sha256Hex(blob);
    const field = `blobs.${name}`;
    if (actual !== name) throw inconsistent(`blob ${name} hashes to ${actual}: altered`, { field });
    if (!named.has(name)) throw inconsistent(`no event here names blob ${name}`, { field });
    await pace();
  }
}

/** The contribution.recorded of what an event speaks of, whose datanet must be the event's. */
function aboutContribution(graph, entry) {
  const id = entry.event.body.contribution;
  const recorded = graph.created(entry, "body.contribution", "contribution", id);
  agree(entry, "datanet", recorded);
  return recorded;
}

function aboutRow(graph, entry) {
  const recorded = aboutContribution(graph, entry);
  if (entry.event.body.row >= recorded.event.body.rows_count) {
    fail(entry, "body.row", "is beyond the contribution's last row");
  }
  return recorded;
}

function judged(graph, entry) {
  const recorded = aboutRow(graph, entry);
  if (entry.event.actor === recorded.event.actor) fail(entry, "actor", "decides their own appeal");
}

const RULES = {
  "contribution.recorded": (graph, entry) => {
    agree(entry, "licence", graph.created(entry, "body.datanet", "datanet", entry.event.body.datanet));
  },

  "contribution.approved": (graph, entry) => {
    const { actor, body } = entry.event;
    const recorded = graph.created(entry, "body.contribution", "contribution", body.contribution);
    const datanet = graph.created(entry, "body.datanet", "datanet", body.datanet);
    agree(entry, "datanet", recorded);
    if (actor !== datanet.event.actor && !datanet.event.body.reviewers.includes(actor)) {
      fail(entry, "actor", "is neither owner nor reviewer of the datanet");
    }
    if (actor === recorded.event.actor) fail(entry, "actor", "approves their own contribution");
  },

  "contribution.held": (graph, entry) => {
    const recorded = aboutContribution(graph, entry);
    if (entry.event.actor === recorded.event.actor) fail(entry, "actor", "holds their own contribution");
  },

  "contribution.released": aboutContribution,

  "cluster.appealed": (graph, entry) => {
    const recorded = aboutRow(graph, entry);
    if (entry.event.actor !== recorded.event.actor) fail(entry, "actor", "is not the contributor");
  },

  "cluster.split": judged,

  "cluster.upheld": judged,

  "run.completed": async (graph, entry) => {
    const { body } = entry.event;
    const requested = graph.created(entry, "body.run", "run", body.run).event.body;
    const { rows, rowsCount, summary } = await graph.manifest(entry);
    const contributions = await graph.trainedOn(entry);
    for (const [field, have, want] of [
      ["body.contributions_count", body.contributions_count, contributions.size],
      ["body.rows_count", body.rows_count, rowsCount],
      ["body.steps", body.steps, summary.steps],
      ["body.adapter_sha256", body.adapter_sha256, summary.adapter_sha256],
      ["body.adapter_config_sha256", body.adapter_config_sha256, summary.config_sha256],
      [MANIFEST, requested.base_model, summary.base_sha256],
    ]) {
      if (have !== want) {
        const said = isString(want) ? want : canonicalText(want);
        fail(entry, field, `the training manifest says ${printable(said)}, not ${have}`);
      }
    }
    for (const [id, recorded] of contributions) {
      if (!requested.datanets.includes(recorded.event.body.datanet)) {
        fail(entry, MANIFEST, `contribution ${id} is of a datanet the run did not ask for`);
      }
      if (!graph.first("contribution.approved", "contribution", id, entry)) {
        fail(entry, MANIFEST, `no earlier approval of contribution ${id} is in the bundle`);
      }
      if (rowsMatch(rows.get(id), recorded.event.body) === false) {
        fail(entry, MANIFEST, `its rows of contribution ${id} are not those of its rows_root`);
      }
      await graph.pace();
    }
  },

  "adapter.published": (graph, entry) => {
    const requested = graph.created(entry, "body.run", "run", entry.event.body.run);
    agree(entry, "adapter_sha256", graph.completed(entry));
    agree(entry, "base_model", requested);
    if (entry.event.actor !== requested.event.actor) {
      fail(entry, "actor", "is not the actor that requested the run");
    }
  },

  "adapter.recalled": aboutContribution,

  "inference.recorded": (graph, entry) => {
    const { body } = entry.event;
    const adapter = graph.created(entry, "body.adapter", "adapter", body.adapter).event.body;
    const price =
      BigInt(body.prompt_tokens) * BigInt(adapter.input_wei_per_token) +
      BigInt(body.completion_tokens) * BigInt(adapter.output_wei_per_token);
    if (BigInt(body.fee_wei) !== price) {
      fail(entry, "body.fee_wei", `at the adapter's prices the fee is ${price}`);
    }
  },

  "attribution.recorded": async (graph, entry) => {
    const { body } = entry.event;
    const inference = graph.created(entry, "body.inference", "inference", body.inference);
    const adapter = graph.created(entry, "body.adapter", "adapter", body.adapter);
    agree(entry, "adapter", inference);
    agree(entry, "run", adapter);
    const completed = graph.completed(entry);
    agree(entry, "index_sha256", completed);
    const trainedOn = await graph.trainedOn(completed);
    const contributors = new Set([...trainedOn.values()].map(({ event }) => event.actor));
    body.shares.forEach(({ contributor }, n) => {
      if (!contributors.has(contributor)) {
        fail(
          entry,
          `body.shares[${n}].contributor`,
          `${contributor} contributed nothing that the run was trained on`,
        );
      }
    });
  },

  "fee.charged": (graph, entry) => {
    const { body } = entry.event;
    const inference = graph.created(entry, "body.inference", "inference", body.inference);
    const adapter = graph.created(entry, "body.adapter", "adapter", body.adapter);
    agree(entry, "adapter", inference);
    agree(entry, "account", inference, "consumer");
    agree(entry, "amount_wei", inference, "fee_wei");
    if (body.owner !== adapter.event.actor) {
      fail(entry, "body.owner", "is not who published the adapter");
    }
  },
};

/** `entry`'s body field must equal that of an event it rests on. */
function agree(entry, field, other, otherField = field) {
  const have = entry.event.body[field];
  const want = other.event.body[otherField];
  if (have !== want) {
    fail(entry, `body.${field}`, `is ${have}, but entry ${other.index} (${other.event.type}) has ${want}`);
  }
}

const where = (entry, field) => `entry ${entry.index} (${entry.event.type}), ${field}`;
const detail = (entry, field) => ({ entry: Number(entry.index), field });

function fail(entry, field, problem) {
  throw inconsistent(`${where(entry, field)}: ${problem}`, detail(entry, field));
}

/** What stands around the subject, for the verdict's sentences, and what the bundle holds. */
async function around(graph, entries, subject) {
  const entry = graph.ids.get(subject);
  if (!entry) {
    throw inconsistent(`the bundle's subject, event ${subject}, is not in it`, { field: "subject" });
  }
  const first = (type, kind, owner) =>
    owner && isString(owner.event.body[kind]) ? graph.first(type, kind, owner.event.body[kind]) : null;
  const inference = first("inference.recorded", "inference", entry);
  const adapter = first("adapter.published", "adapter", inference ?? entry);
  const run = first("run.completed", "run", adapter ?? entry);
  const rows = run ? (await graph.manifest(run)).rows : new Map();
  const contributions = run ? await graph.trainedOn(run) : new Map();
  const manifests = new Map();
  for (const [id, completed] of firstBy(entries, "run.completed", "run")) {
    manifests.set(id, await graph.manifest(completed));
  }
  return {
    subject: entry,
    run,
    adapter,
    inference,
    attribution: first("attribution.recorded", "inference", inference),
    fee: first("fee.charged", "inference", inference),
    contributions,
    partial: [...contributions].filter(([id, e]) => rows.get(id).size < e.event.body.rows_count)
      .map(([id]) => id),
    rowsCount: [...rows.values()].reduce((sum, ofOne) => sum + ofOne.size, 0),
    recorded: firstBy(entries, "contribution.recorded", "contribution"),
    manifests,
    published: firstBy(entries, "adapter.published", "run"),
    closed: firstBy(entries, "period.closed", "period"),
  };
}

/** The first event of a type for each value of a body field. */
function firstBy(entries, type, field) {
  const found = new Map();
  for (const entry of entries) {
    const key = entry.event.body[field];
    if (entry.event.type === type && !found.has(key)) found.set(key, entry);
  }
  return found;
}
