"""What a payout line rests on, added up again from the events of a bundle. Pure integer arithmetic.

Money moves as the ledger's own projections move it (`ledger.domain.accrual`), for the owners of the
accounts that are asked about and nobody else:

- fee.charged gives its owner's and its operator's part to them, accrued; the contributors' part
  waits until the answer is attributed, and is then split by largest remainder;
- while a contribution of an owner's is held in a datanet of the answer's run, the owner's part
  waits on, for that run; contribution.released accrues it once nothing is held there any more;
- period.cutoff moves what an owner has accrued to the address that the owner is bound to, for good
  (amounts in payout trees are cumulative);
- payout.vetoed and period.abandoned give back what that period's cut-off moved;
- identity.evm_bound binds an address to the first actor who names it, until that actor names
  another one.

A sum says only what the given events add up to. Events that are not in the bundle are not missed:
hence "X of Y", and the rest is for the reader to trust or to ask for.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ledger.domain.accrual import ACCRUED, WITHHELD, Posting, attribution, fee
from ledger.domain.envelope import Entry
from ledger.domain.fees import FeePolicy
from ledger.verify.payouts import PayoutLine


@dataclass(frozen=True, kw_only=True)
class Statement:
    """`accounted_wei` of the line's `cumulative_wei` come from `events` events; `owners` are the
    actors that the address was bound to. `cut_off` is False when the bundle has no period.cutoff of
    that period, so that nothing can be said."""

    line: PayoutLine
    accounted_wei: int
    events: int
    owners: tuple[str, ...]
    cut_off: bool

    @property
    def missing_wei(self) -> int:
        """What these events do not account for; below 0 where they give more than the line."""
        return self.line.cumulative_wei - self.accounted_wei


def statements(entries: Iterable[Entry], lines: Sequence[PayoutLine]) -> tuple[Statement, ...]:
    """A statement for each line, from entries in log order whose bodies were checked."""
    entries = list(entries)
    replay = _Replay(accounts={line.account for line in lines}, periods={p.period for p in lines})
    replay.owners = _owners(entries, replay.accounts)
    for entry in entries:
        rule = _RULES.get(entry.envelope.type)
        if rule is not None:
            rule(replay, entry)
    return tuple(replay.statement(line) for line in lines)


@dataclass(frozen=True, kw_only=True)
class Fees:
    """Fees of a bundle held against its fee policies: how many are split `as_policy`, how many name
    a policy that is not there, and the leaf indexes of those that are split in another way."""

    as_policy: int
    unknown: int
    odd: tuple[int, ...]


def check_fees(entries: Iterable[Entry]) -> Fees:
    """Split every fee.charged again, by the fee_policy.set of its version."""
    policies: dict[int, FeePolicy] = {}
    as_policy, unknown, odd = 0, 0, []
    for entry in entries:
        body = entry.envelope.body
        if entry.envelope.type == "fee_policy.set":
            policies.setdefault(body["version"], FeePolicy.of(body))
        elif entry.envelope.type == "fee.charged":
            policy = policies.get(body["policy_version"])
            if policy is None:
                unknown += 1
            elif any(
                int(body[f"{part}_wei"]) != wei
                for part, wei in policy.split(int(body["amount_wei"])).items()
            ):
                odd.append(entry.index)
            else:
                as_policy += 1
    return Fees(as_policy=as_policy, unknown=unknown, odd=tuple(odd))


def _owners(entries: Iterable[Entry], accounts: set[str]) -> set[str]:
    """Every actor who was ever bound to one of the accounts."""
    return {
        entry.envelope.actor
        for entry in entries
        if entry.envelope.type == "identity.evm_bound"
        and entry.envelope.body["address"].lower() in accounts
    }


@dataclass(kw_only=True)
class _Replay:
    """The state of the replay. All amounts in wei; `ready` has the bound owners with something
    accrued, so that a cut-off costs what it moves and no more. `holds` in force: the datanet of a
    contribution; `held_in` counts them by owner; `withheld` is by owner and run."""

    accounts: set[str]
    periods: set[int]
    owners: set[str] = field(default_factory=set)
    accrued: dict[str, int] = field(default_factory=dict)
    earned_by: dict[str, set[int]] = field(default_factory=dict)
    address_of: dict[str, str] = field(default_factory=dict)
    holder_of: dict[str, str] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    pools: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, Entry] = field(default_factory=dict)
    datanets_of: dict[str, frozenset[str]] = field(default_factory=dict)
    contributor_of: dict[str, str] = field(default_factory=dict)
    holds: dict[str, str] = field(default_factory=dict)
    held_in: dict[str, Counter[str]] = field(default_factory=dict)
    withheld: dict[str, dict[str, int]] = field(default_factory=dict)
    total: dict[tuple[str, str], int] = field(default_factory=dict)
    moved: dict[int, dict[tuple[str, str], int]] = field(default_factory=dict)
    seen: dict[int, dict[str, tuple[int, int, tuple[str, ...]]]] = field(default_factory=dict)

    def earn(self, entry: Entry, postings: Iterable[Posting]) -> None:
        for posting in postings:
            if posting.owner in self.owners and posting.bucket == ACCRUED and posting.amount_wei:
                self.accrue(posting.owner, posting.amount_wei)
                self.earned_by.setdefault(posting.owner, set()).add(entry.index)

    def waits(self, owner: str, run: str) -> bool:
        """Whether the owner has a hold in force in a datanet of the run."""
        held = self.held_in.get(owner)
        return held is not None and not self.datanets_of.get(run, frozenset()).isdisjoint(held)

    def withhold(self, run: str, postings: Iterable[Posting]) -> None:
        for posting in postings:
            if posting.bucket == WITHHELD and posting.amount_wei:
                mine = self.withheld.setdefault(posting.owner, {})
                mine[run] = mine.get(run, 0) + posting.amount_wei

    def accrue(self, owner: str, amount_wei: int) -> None:
        self.accrued[owner] = self.accrued.get(owner, 0) + amount_wei
        if owner in self.address_of:
            self.ready.add(owner)

    def statement(self, line: PayoutLine) -> Statement:
        known = self.seen.get(line.period, {})
        accounted_wei, events, owners = known.get(line.account, (0, 0, ()))
        return Statement(
            line=line,
            accounted_wei=accounted_wei,
            events=events,
            owners=owners,
            cut_off=line.period in self.seen,
        )


def _bound(replay: _Replay, entry: Entry) -> None:
    actor, address = entry.envelope.actor, entry.envelope.body["address"].lower()
    if address in replay.holder_of:
        return
    former = replay.address_of.get(actor)
    if former is not None:
        del replay.holder_of[former]
    replay.address_of[actor] = address
    replay.holder_of[address] = actor
    if replay.accrued.get(actor):
        replay.ready.add(actor)


def _charged(replay: _Replay, entry: Entry) -> None:
    body = entry.envelope.body
    if body["inference"] in replay.pools:
        return
    replay.earn(entry, fee(body, entry.envelope.actor))
    replay.pools[body["inference"]] = int(body["contributors_wei"])
    waiting = replay.waiting.pop(body["inference"], None)
    if waiting is not None:
        _attributed(replay, waiting)


def _attributed(replay: _Replay, entry: Entry) -> None:
    """Pays once per inference, as soon as fee and attribution are both there."""
    body = entry.envelope.body
    pool_wei = replay.pools.get(body["inference"])
    if pool_wei is None:
        replay.waiting.setdefault(body["inference"], entry)
        return
    replay.pools[body["inference"]] = 0
    ours = replay.owners & {share["contributor"] for share in body["shares"]}
    if ours:
        held = {owner for owner in ours if replay.waits(owner, body["run"])}
        postings = attribution(body, pool_wei, held)
        replay.earn(entry, postings)
        replay.withhold(body["run"], postings)


def _requested(replay: _Replay, entry: Entry) -> None:
    body = entry.envelope.body
    replay.datanets_of.setdefault(body["run"], frozenset(body["datanets"]))


def _recorded(replay: _Replay, entry: Entry) -> None:
    if entry.envelope.actor in replay.owners:
        contribution = entry.envelope.body["contribution"]
        replay.contributor_of.setdefault(contribution, entry.envelope.actor)


def _held(replay: _Replay, entry: Entry) -> None:
    body = entry.envelope.body
    owner = replay.contributor_of.get(body["contribution"])
    if owner is not None and body["contribution"] not in replay.holds:
        replay.holds[body["contribution"]] = body["datanet"]
        replay.held_in.setdefault(owner, Counter())[body["datanet"]] += 1


def _released(replay: _Replay, entry: Entry) -> None:
    contribution = entry.envelope.body["contribution"]
    datanet = replay.holds.pop(contribution, None)
    if datanet is None:
        return
    owner = replay.contributor_of[contribution]
    replay.held_in[owner][datanet] -= 1
    replay.held_in[owner] += Counter()  # what is at 0 goes
    for run, amount_wei in list(replay.withheld.get(owner, {}).items()):
        if not replay.waits(owner, run):
            del replay.withheld[owner][run]
            replay.accrue(owner, amount_wei)
            replay.earned_by.setdefault(owner, set()).add(entry.index)


def _cut_off(replay: _Replay, entry: Entry) -> None:
    period = entry.envelope.body["period"]
    if period in replay.moved:
        return
    due = {(replay.address_of[owner], owner): replay.accrued[owner] for owner in replay.ready}
    for payee, amount_wei in due.items():
        replay.accrued[payee[1]] = 0
        replay.total[payee] = replay.total.get(payee, 0) + amount_wei
    replay.ready.clear()
    replay.moved[period] = due
    if period in replay.periods:
        replay.seen[period] = _totals(replay)


def _totals(replay: _Replay) -> dict[str, tuple[int, int, tuple[str, ...]]]:
    """(wei, events, owners) of each account asked about, as of now."""
    found: dict[str, tuple[int, int, tuple[str, ...]]] = {}
    for (address, owner), amount_wei in sorted(replay.total.items()):
        if address in replay.accounts and amount_wei:
            wei, events, owners = found.get(address, (0, 0, ()))
            more = len(replay.earned_by.get(owner, ()))
            found[address] = (wei + amount_wei, events + more, (*owners, owner))
    return found


def _given_back(replay: _Replay, entry: Entry) -> None:
    for payee, amount_wei in replay.moved.get(entry.envelope.body["period"], {}).items():
        replay.total[payee] -= amount_wei
        replay.accrue(payee[1], amount_wei)
    if entry.envelope.body["period"] in replay.moved:
        replay.moved[entry.envelope.body["period"]] = {}


_RULES: Mapping[str, Any] = {
    "identity.evm_bound": _bound,
    "run.requested": _requested,
    "contribution.recorded": _recorded,
    "contribution.held": _held,
    "contribution.released": _released,
    "fee.charged": _charged,
    "attribution.recorded": _attributed,
    "period.cutoff": _cut_off,
    "payout.vetoed": _given_back,
    "period.abandoned": _given_back,
}
