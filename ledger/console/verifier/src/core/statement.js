// What a payout line rests on, added up again from the events of a bundle (docs/FORMATS.md, "What a
// payout rests on"), and whether fees were split as their policy says. Exact integers; events that are
// not in the bundle are not missed: hence "X of Y".

const UNATTRIBUTED = "unattributed";
const NOTHING = { accountedWei: 0n, events: 0, owners: [] };

/** Parts of `amount` in proportion to weights (largest remainder, ties by key); they sum to it. */
export function splitExactly(amount, weights) {
  const total = Object.values(weights).reduce((sum, weight) => sum + BigInt(weight), 0n);
  const parts = Object.entries(weights).map(([key, weight]) => ({
    key,
    part: (amount * BigInt(weight)) / total,
    left: (amount * BigInt(weight)) % total,
  }));
  let rest = amount - parts.reduce((sum, { part }) => sum + part, 0n);
  const byRemainder = [...parts].sort((a, b) =>
    a.left === b.left ? (a.key < b.key ? -1 : 1) : a.left > b.left ? -1 : 1,
  );
  for (const share of byRemainder) if (rest-- > 0n) share.part += 1n;
  return Object.fromEntries(parts.map(({ key, part }) => [key, part]));
}

/** What the contributors' part of a fee comes to for each of an attribution's shares. */
export function splitPool({ shares, unattributed_ppm: unattributed }, poolWei) {
  const weights = Object.fromEntries(shares.map(({ contributor, ppm }) => [contributor, ppm]));
  if (unattributed) weights[UNATTRIBUTED] = unattributed;
  return splitExactly(poolWei, weights);
}

/** Fees of a bundle against its fee policies: `{asPolicy, unknown, odd}`, odd by leaf index. */
export function checkFees(entries) {
  const policies = new Map();
  const found = { asPolicy: 0, unknown: 0, odd: [] };
  for (const { index, event: { type, body } } of entries) {
    if (type === "fee_policy.set" && !policies.has(body.version)) policies.set(body.version, body);
    if (type !== "fee.charged") continue;
    const policy = policies.get(body.policy_version);
    if (!policy) found.unknown++;
    else if (isSplitBy(policy, body)) found.asPolicy++;
    else found.odd.push(index);
  }
  return found;
}

function isSplitBy(policy, body) {
  const parts = ["protocol", "owner", "operator", "contributors"];
  const weights = Object.fromEntries(parts.map((part) => [part, policy[`${part}_bps`]]));
  const split = splitExactly(BigInt(body.amount_wei), weights);
  return parts.every((part) => split[part] === BigInt(body[`${part}_wei`]));
}

/** For each payout line what the entries account for of it: `{line, accountedWei, events, owners,
 * isCutOff}`. Entries are in log order, their bodies checked. */
export function statements(entries, lines) {
  const replay = new Replay(entries, lines);
  for (const entry of entries) replay[entry.event.type]?.(entry);
  return lines.map((line) => {
    const known = replay.seen.get(line.period);
    return { line, isCutOff: Boolean(known), ...(known?.get(line.account) ?? NOTHING) };
  });
}

/** Money as the ledger moves it, for the owners of the accounts asked about and nobody else. Methods
 * are named by the events that they follow. */
class Replay {
  constructor(entries, lines) {
    this.accounts = new Set(lines.map(({ account }) => account));
    this.periods = new Set(lines.map(({ period }) => period));
    this.owners = new Set(
      entries
        .filter(({ event }) => event.type === "identity.evm_bound" && this.accounts.has(event.body.address.toLowerCase()))
        .map(({ event }) => event.actor),
    );
    this.accrued = new Map(); // owner -> wei
    this.earnedBy = new Map(); // owner -> indexes of events
    this.addressOf = new Map();
    this.holderOf = new Map();
    this.ready = new Set(); // bound owners with something accrued
    this.pools = new Map(); // inference -> wei for its contributors
    this.waiting = new Map(); // inference -> attribution that came before its fee
    this.datanetsOf = new Map(); // run -> datanets
    this.contributorOf = new Map(); // contribution -> owner
    this.holds = new Map(); // contribution held now -> datanet
    this.heldIn = new Map(); // owner -> datanet -> holds in force
    this.withheld = new Map(); // owner -> run -> wei
    this.total = new Map(); // "address owner" -> wei in payout trees
    this.moved = new Map(); // period -> "address owner" -> wei
    this.seen = new Map(); // period asked about -> account -> statement
  }

  earn({ index }, owner, wei) {
    if (!this.owners.has(owner) || !wei) return;
    this.accrue(owner, wei);
    if (!this.earnedBy.has(owner)) this.earnedBy.set(owner, new Set());
    this.earnedBy.get(owner).add(index);
  }

  accrue(owner, wei) {
    this.accrued.set(owner, (this.accrued.get(owner) ?? 0n) + wei);
    if (this.addressOf.has(owner)) this.ready.add(owner);
  }

  /** Whether the owner has a hold in force in a datanet of the run. */
  waits(owner, run) {
    const held = this.heldIn.get(owner);
    return Boolean(held?.size) && (this.datanetsOf.get(run) ?? []).some((datanet) => held.has(datanet));
  }

  "run.requested"({ event: { body } }) {
    if (!this.datanetsOf.has(body.run)) this.datanetsOf.set(body.run, body.datanets);
  }

  "contribution.recorded"({ event: { actor, body: { contribution } } }) {
    if (this.owners.has(actor) && !this.contributorOf.has(contribution)) {
      this.contributorOf.set(contribution, actor);
    }
  }

  "contribution.held"({ event: { body: { contribution, datanet } } }) {
    const owner = this.contributorOf.get(contribution);
    if (!owner || this.holds.has(contribution)) return;
    this.holds.set(contribution, datanet);
    if (!this.heldIn.has(owner)) this.heldIn.set(owner, new Map());
    const held = this.heldIn.get(owner);
    held.set(datanet, (held.get(datanet) ?? 0) + 1);
  }

  "contribution.released"({ index, event: { body: { contribution } } }) {
    const datanet = this.holds.get(contribution);
    if (!datanet) return;
    this.holds.delete(contribution);
    const owner = this.contributorOf.get(contribution);
    const held = this.heldIn.get(owner);
    const left = held.get(datanet) - 1;
    if (left) held.set(datanet, left);
    else held.delete(datanet);
    for (const [run, wei] of [...(this.withheld.get(owner) ?? [])]) {
      if (this.waits(owner, run)) continue;
      this.withheld.get(owner).delete(run);
      this.earn({ index }, owner, wei);
    }
  }

  "identity.evm_bound"({ event: { actor, body } }) {
    const address = body.address.toLowerCase();
    if (!this.owners.has(actor) || this.holderOf.has(address)) return;
    this.holderOf.delete(this.addressOf.get(actor));
    this.addressOf.set(actor, address);
    this.holderOf.set(address, actor);
    if (this.accrued.get(actor)) this.ready.add(actor);
  }

  "fee.charged"(entry) {
    const { actor, body } = entry.event;
    if (this.pools.has(body.inference)) return;
    this.earn(entry, body.owner, BigInt(body.owner_wei));
    this.earn(entry, actor, BigInt(body.operator_wei));
    this.pools.set(body.inference, BigInt(body.contributors_wei));
    const waiting = this.waiting.get(body.inference);
    this.waiting.delete(body.inference);
    if (waiting) this["attribution.recorded"](waiting);
  }

  /** Pays once per inference, as soon as fee and attribution are both there. */
  "attribution.recorded"(entry) {
    const { body } = entry.event;
    const pool = this.pools.get(body.inference);
    if (pool === undefined) {
      if (!this.waiting.has(body.inference)) this.waiting.set(body.inference, entry);
      return;
    }
    this.pools.set(body.inference, 0n);
    if (!body.shares.some(({ contributor }) => this.owners.has(contributor))) return;
    for (const [owner, wei] of Object.entries(splitPool(body, pool))) {
      if (this.owners.has(owner) && wei && this.waits(owner, body.run)) {
        if (!this.withheld.has(owner)) this.withheld.set(owner, new Map());
        const mine = this.withheld.get(owner);
        mine.set(body.run, (mine.get(body.run) ?? 0n) + wei);
      } else this.earn(entry, owner, wei);
    }
  }

  "period.cutoff"({ event: { body: { period } } }) {
    if (this.moved.has(period)) return;
    const due = new Map();
    for (const owner of this.ready) {
      const payee = `${this.addressOf.get(owner)} ${owner}`;
      due.set(payee, this.accrued.get(owner));
      this.total.set(payee, (this.total.get(payee) ?? 0n) + this.accrued.get(owner));
      this.accrued.set(owner, 0n);
    }
    this.ready.clear();
    this.moved.set(period, due);
    if (this.periods.has(period)) this.seen.set(period, this.totals());
  }

  "payout.vetoed"({ event: { body: { period } } }) {
    for (const [payee, wei] of this.moved.get(period) ?? []) {
      this.total.set(payee, this.total.get(payee) - wei);
      this.accrue(payee.split(" ")[1], wei);
    }
    if (this.moved.has(period)) this.moved.set(period, new Map());
  }

  "period.abandoned"(entry) {
    this["payout.vetoed"](entry);
  }

  totals() {
    const found = new Map();
    for (const payee of [...this.total.keys()].sort()) {
      const [address, owner] = payee.split(" ");
      const wei = this.total.get(payee);
      if (!this.accounts.has(address) || !wei) continue;
      const { accountedWei, events, owners } = found.get(address) ?? NOTHING;
      found.set(address, {
        accountedWei: accountedWei + wei,
        events: events + (this.earnedBy.get(owner)?.size ?? 0),
        owners: [...owners, owner],
      });
    }
    return found;
  }
}
