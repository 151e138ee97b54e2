"""Money is conserved: a hypothesis state machine against an independent model of the rules.

The model shares no code with the folds or `ledger.domain.accrual`: it splits with fractions, keeps
plain dictionaries, and never sees an entry. After every step every balance must agree, all of them
must sum to zero, none but the world's may be negative, and statements must add up to balances.
"""

from collections import defaultdict
from fractions import Fraction
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from projections.memory import MemoryRows
from projections.payouts import cumulative_lines
from projections.registry import TABLES, digest_of, fold, read_entry
from tests.projections_world import OPERATOR, POLICY, Folding, World, actor, address

PEOPLE = [actor(n) for n in range(10, 14)]
ADDRESSES = [address(n) for n in range(3)]
OWNER = PEOPLE[0]


def largest_remainder(amount: int, weights: dict[str, int]) -> dict[str, int]:
    exact = {key: Fraction(amount * w, sum(weights.values())) for key, w in weights.items()}
    parts = {key: int(value) for key, value in exact.items()}
    order = sorted(exact, key=lambda key: (parts[key] - exact[key], key))
    for key in order[: amount - sum(parts.values())]:
        parts[key] += 1
    return parts


class Model:
    """The rules of DESIGN.md 'Money', in plain dictionaries."""

    def __init__(self) -> None:
        self.money: dict[tuple[str, str], int] = defaultdict(int)
        self.pools: dict[str, int] = {}
        self.waiting: dict[str, tuple[dict[str, int], frozenset[str]]] = {}
        self.held: set[tuple[str, str, int]] = set()
        self.withheld: dict[tuple[str, frozenset[str]], int] = defaultdict(int)
        self.attributed: set[str] = set()
        self.payout_address: dict[str, str] = {}
        self.lines: dict[int, dict[tuple[str, str], int]] = {}
        self.settled: dict[int, str] = {}
        self.owed: dict[tuple[str, str], int] = defaultdict(int)
        self.due: dict[tuple[str, str], int] = defaultdict(int)
        self.claims: dict[str, list[int]] = defaultdict(list)

    def _give(self, source: tuple[str, str], target: tuple[str, str], amount: int) -> None:
        self.money[source] -= amount
        self.money[target] += amount

    def deposit(self, who: str, amount: int) -> None:
        self._give(("world", "main"), (who, "prepaid"), amount)

    def charge(self, who: str, inference: str, amount: int) -> None:
        if self.money[who, "prepaid"] < amount or inference in self.pools:
            return
        part = largest_remainder(amount, {k.removesuffix("_bps"): v for k, v in POLICY.items()})
        self._give((who, "prepaid"), ("protocol", "main"), part["protocol"])
        self._give((who, "prepaid"), (OWNER, "accrued"), part["owner"])
        self._give((who, "prepaid"), (OPERATOR, "accrued"), part["operator"])
        self._give((who, "prepaid"), ("pool", "main"), part["contributors"])
        self.pools[inference] = part["contributors"]
        if inference in self.waiting:
            self._share(inference, *self.waiting.pop(inference))

    def attribute(
        self, inference: str, shares: dict[str, int], rest: int, nets: frozenset[str]
    ) -> None:
        if inference in self.attributed:
            return
        self.attributed.add(inference)
        weights = {**shares, "unattributed": rest} if rest else dict(shares)
        if inference in self.pools:
            self._share(inference, weights, nets)
        else:
            self.waiting[inference] = (weights, nets)

    def _share(self, inference: str, weights: dict[str, int], nets: frozenset[str]) -> None:
        for who, amount in largest_remainder(self.pools[inference], weights).items():
            bucket = "main" if who == "unattributed" else "accrued"
            if self._waits(who, nets):
                bucket = "withheld"
                self.withheld[who, nets] += amount
            self._give(("pool", "main"), (who, bucket), amount)

    def _waits(self, who: str, nets: frozenset[str]) -> bool:
        return any(who == holder and net in nets for holder, net, _ in self.held)

    def hold(self, who: str, net: str, n: int) -> None:
        self.held.add((who, net, n))

    def release(self, who: str, net: str, n: int) -> None:
        self.held.discard((who, net, n))
        for (whose, nets), amount in list(self.withheld.items()):
            if whose == who and not self._waits(who, nets):
                self._give((who, "withheld"), (who, "accrued"), amount)
                del self.withheld[whose, nets]

    def bind(self, who: str, to: str) -> None:
        if to not in self.payout_address.values():
            self.payout_address[who] = to

    def cutoff(self, period: int) -> None:
        self.lines[period] = {}
        for who, to in self.payout_address.items():
            amount = self.money[who, "accrued"]
            self._give((who, "accrued"), (who, "held"), amount)
            self.lines[period][to, who] = amount
            self.owed[to, who] += amount

    def settle(self, period: int, activated: bool) -> None:
        for (to, who), amount in self.lines[period].items():
            target = "available" if activated else "accrued"
            self._give((who, "held"), (who, target), amount)
            self.due[to, who] += amount if activated else 0
            self.owed[to, who] -= 0 if activated else amount
        self.settled[period] = "activated" if activated else "vetoed"
        for to in sorted({to for to, _ in self.lines[period]}) if activated else ():
            self._pay(to)

    def claim(self, to: str, amount: int) -> None:
        self.claims[to].append(amount)
        self._pay(to)

    def _pay(self, to: str) -> None:
        queue = self.claims[to]
        payees = sorted(who for address_, who in self.due if address_ == to)
        while queue and queue[0] <= sum(self.due[to, who] for who in payees):
            left = queue.pop(0)
            for who in payees:
                taken = min(left, self.due[to, who])
                left -= taken
                self.due[to, who] -= taken
                self._give((who, "available"), (who, "paid"), taken)


people, addresses = st.sampled_from(PEOPLE), st.sampled_from(ADDRESSES)
amounts = st.one_of(st.integers(0, 2_000), st.integers(0, 10**30))
earnings = st.integers(100, 5_000)
runs = st.integers(0, 2)


class Money(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world, self.model = World(), Model()
        self.folding = Folding(self.world)
        self.world.open()
        self.nets = [self.world.datanet(OWNER) for _ in range(2)]
        self.given = {
            (who, net, n): self.world.contribute(who, net)
            for who in PEOPLE
            for net in self.nets
            for n in range(2)
        }
        asked = ([self.nets[0]], [self.nets[1]], self.nets)
        self.runs = {frozenset(nets): self.world.request_run(OWNER, *nets) for nets in asked}
        self.adapter = self.world.new_id()
        self.answers: list[tuple[str, str, int]] = []
        self.period, self.open_period = 0, False

    @rule(who=people, amount=amounts)
    def deposit(self, who: str, amount: int) -> None:
        self.world.deposit(who, amount)
        self.model.deposit(who, amount)

    @rule(who=people, amount=amounts, at_once=st.booleans())
    def answer(self, who: str, amount: int, at_once: bool) -> None:
        amount = min(amount, self.model.money[who, "prepaid"]) if at_once else amount
        inference = self.world.infer(who, self.adapter, amount)
        self.answers.append((inference, who, amount))
        if at_once:
            self.charge(self.answers[-1])

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def charge_later(self, data: st.DataObject) -> None:
        self.charge(data.draw(st.sampled_from(self.answers)))

    @precondition(lambda self: self.answers)
    @rule(missing=st.integers(-1, 3))
    def charge_at_the_edge(self, missing: int) -> None:
        """Prepaid that just covers a fee, or misses it by a few wei."""
        who = self.answers[-1][1]
        amount = self.model.money[who, "prepaid"] + missing
        if amount > 0:
            inference = self.world.infer(who, self.adapter, amount)
            self.answers.append((inference, who, amount))
            self.charge(self.answers[-1])

    def charge(self, answer: tuple[str, str, int]) -> None:
        inference, who, amount = answer
        self.world.charge(who, self.adapter, inference, OWNER, amount)
        self.model.charge(who, inference, amount)

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), chosen=st.lists(people, unique=True), rest=st.booleans(), run=runs)
    def attribute(self, data: st.DataObject, chosen: list[str], rest: bool, run: int) -> None:
        inference, _, _ = data.draw(st.sampled_from(self.answers[-4:]))
        ends = data.draw(
            st.lists(
                st.integers(1, 999_999), min_size=len(chosen), max_size=len(chosen), unique=True
            )
        )
        ends = sorted(ends)
        if chosen and not rest:
            ends[-1] = 1_000_000
        pairs = zip(chosen, [0, *ends], ends, strict=False)
        shares = {who: high - low for who, low, high in pairs}
        left = 1_000_000 - sum(shares.values())
        self.attribute_for(run, inference, shares, left)

    def attribute_for(self, run: int, inference: str, shares: dict[str, int], left: int) -> None:
        nets, run_id = list(self.runs.items())[run]
        self.world.attribute(self.adapter, run_id, inference, shares, left)
        self.model.attribute(inference, shares, left, nets)

    @rule(who=people, net=st.integers(0, 1), n=st.integers(0, 1))
    def hold_or_release(self, who: str, net: int, n: int) -> None:
        key = (who, self.nets[net], n)
        held = key in self.model.held
        step, mirror = (
            (self.world.release, self.model.release) if held else (self.world.hold, self.model.hold)
        )
        step(OWNER, key[1], self.given[key])
        mirror(*key)

    @rule(who=people, net=st.integers(0, 1), n=st.integers(0, 1))
    def out_of_order(self, who: str, net: int, n: int) -> None:
        """A hold of what is held, a release of what is not: nothing moves."""
        key = (who, self.nets[net], n)
        step = self.world.hold if key in self.model.held else self.world.release
        step(OWNER, key[1], self.given[key])

    @rule(
        who=people, to=people, other=people, ppm=st.integers(1, 999_999), amount=earnings, run=runs
    )
    def earn(self, who: str, to: str, other: str, ppm: int, amount: int, run: int) -> None:
        """A whole answer at once, so that later steps have money to move."""
        self.deposit(who, amount)
        self.answer(who, amount, True)
        shares = {to: 1_000_000} if to == other else {to: ppm, other: 1_000_000 - ppm}
        inference, _, _ = self.answers[-1]
        self.attribute_for(run, inference, shares, 0)

    @initialize(to=st.permutations(ADDRESSES))
    def some_are_bound(self, to: list[str]) -> None:
        for who, where in zip(PEOPLE, to[:2], strict=False):
            self.bind(who, where)

    @rule(who=people, to=addresses)
    def bind(self, who: str, to: str) -> None:
        self.world.bind(who, to)
        self.model.bind(who, to.lower())

    @precondition(lambda self: not self.open_period)
    @rule()
    def cutoff(self) -> None:
        self.period, self.open_period = self.period + 1, True
        self.world.cutoff(self.period)
        self.model.cutoff(self.period)

    @precondition(lambda self: self.open_period)
    @rule(activated=st.booleans(), ahead=st.lists(st.tuples(addresses, st.integers(0, 3))))
    def settle(self, activated: bool, ahead: list[tuple[str, int]]) -> None:
        """With claims that are seen before the activation that covers them, or half of them."""
        self.open_period = False
        self.world.close(self.period)
        self.world.propose(self.period)
        lines = self.model.lines[self.period]
        for to, halves in ahead:
            coming = sum(w for (at, _), w in lines.items() if at == to.lower())
            self.world.claim(to, halves * coming // 2)
            self.model.claim(to.lower(), halves * coming // 2)
        (self.world.activate if activated else self.world.veto)(self.period)
        self.model.settle(self.period, activated)

    @rule(to=addresses, data=st.data())
    def claim(self, to: str, data: st.DataObject) -> None:
        due = sum(wei for (where, _), wei in self.model.due.items() if where == to.lower())
        held = sum(self.model.money[who, "held"] for who in PEOPLE)
        amount = data.draw(st.one_of(st.just(due), st.integers(0, due), st.integers(0, due + held)))
        self.world.claim(to, amount)
        self.model.claim(to.lower(), amount)

    @invariant()
    def balances_are_the_models(self) -> None:
        rows = self.folding.catch_up()
        found = {key: row["amount_wei"] for key, row in rows.scan("balances")}
        assert {k: v for k, v in found.items() if v} == {
            k: v for k, v in self.model.money.items() if v
        }
        assert sum(found.values()) == 0
        assert all(amount >= 0 for (owner, _), amount in found.items() if owner != "world")

    @invariant()
    def statements_add_up(self) -> None:
        sums: dict[tuple[str, str], int] = defaultdict(int)
        events: dict[int, int] = defaultdict(int)
        rows = self.folding.catch_up()
        lines: list[tuple[Any, Any]] = sorted(
            rows.scan("statement_lines"), key=lambda item: item[0][1:]
        )
        for (owner, index, _), line in lines:
            sums[owner, line["bucket"]] += line["amount_wei"]
            events[index] += line["amount_wei"]
            assert line["balance_wei"] == sums[owner, line["bucket"]]
        assert not any(events.values()), "the postings of every event sum to zero"
        found = {key: row["amount_wei"] for key, row in rows.scan("balances")}
        assert {k: v for k, v in sums.items() if v} == {k: v for k, v in found.items() if v}

    @invariant()
    def what_is_withheld_is_known_and_has_a_reason(self) -> None:
        rows = self.folding.catch_up()
        run_of = {run: nets for nets, run in self.runs.items()}
        found = {(who, run_of[run]): row["amount_wei"]
                 for (who, run), row in rows.scan("withheld")}  # fmt: skip
        assert found == {key: wei for key, wei in self.model.withheld.items() if wei}
        for who, nets in found:
            assert self.model._waits(who, nets)
        for who in PEOPLE:
            mine = sum(wei for (whose, _), wei in found.items() if whose == who)
            assert self.folding.balance(who, "withheld") == mine

    @invariant()
    def pools_hold_what_is_not_attributed(self) -> None:
        waiting = sum(w for key, w in self.model.pools.items() if key not in self.model.attributed)
        assert self.folding.balance("pool", "main") == waiting

    @invariant()
    def the_payout_tree_is_what_addresses_are_owed(self) -> None:
        if self.open_period:
            owed: dict[str, int] = defaultdict(int)
            for (to, _), amount in self.model.owed.items():
                owed[to] += amount
            leaves = cumulative_lines(self.folding.catch_up(), self.period)
            assert dict(leaves) == {to: amount for to, amount in owed.items() if amount}
            assert [to for to, _ in leaves] == sorted(dict(leaves))

    @invariant()
    def nothing_waits_that_was_paid(self) -> None:
        rows = self.folding.catch_up()
        unpaid = [
            row["amount_wei"] for _, row in rows.scan("claims") if row["applied_index"] is None
        ]
        assert sorted(unpaid) == sorted(
            wei for queue in self.model.claims.values() for wei in queue
        )
        waiting = {key[0] for key, row in rows.scan("pools") if row["waiting"] is not None}
        assert waiting == set(self.model.waiting)

    def teardown(self) -> None:
        self.everything_withheld_comes_out()
        again = MemoryRows(TABLES)
        for data in self.world.entries:
            fold(again, read_entry(data))
        assert digest_of(again) == digest_of(self.folding.catch_up())

    def everything_withheld_comes_out(self) -> None:
        for key in sorted(self.model.held):
            self.world.release(OWNER, key[1], self.given[key])
            self.model.release(*key)
        self.balances_are_the_models()
        assert not any(self.model.money[who, "withheld"] for who in PEOPLE)


Money.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestMoney = Money.TestCase
