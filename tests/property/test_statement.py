"""A payout recomputed from events alone, against what the projections hold, on random histories."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.domain.envelope import Entry
from ledger.verify.payouts import PayoutLine
from ledger.verify.statement import statements
from projections.memory import MemoryRows
from projections.payouts import cumulative_lines
from projections.registry import TABLES, fold, read_entry
from tests.projections_world import POLICY, World, actor, address, random_history


def told(raws: Sequence[bytes]) -> tuple[list[Entry], MemoryRows, dict[int, dict[str, int]]]:
    """The entries that the rules of money allowed, the rows, and each period's payout tree."""
    rows = MemoryRows(TABLES)
    allowed, trees = [], {}
    for raw in raws:
        entry = read_entry(raw)
        before = sum(1 for _ in rows.scan("anomalies"))
        fold(rows, entry)
        if sum(1 for _ in rows.scan("anomalies")) == before:
            allowed.append(entry)
            if entry.envelope.type == "period.cutoff":
                period = entry.envelope.body["period"]
                trees[period] = dict(cumulative_lines(rows, period))
    return allowed, rows, trees


def lines_of(trees: dict[int, dict[str, int]]) -> list[PayoutLine]:
    return [
        PayoutLine(period=period, account=account, cumulative_wei=wei, proof=())
        for period, tree in trees.items()
        for account, wei in tree.items()
    ]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_payout_is_accounted_for_to_the_last_wei(seed: int) -> None:
    entries, _, trees = told(random_history(seed, 250))
    found = statements(entries, lines_of(trees))
    for statement in found:
        assert statement.missing_wei == 0, statement
        assert statement.cut_off
        assert bool(statement.events) == bool(statement.line.cumulative_wei)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_what_is_left_out_is_missing(seed: int, data: st.DataObject) -> None:
    """Without one event that gave money, its part is missing: no more, no less, and at no time is
    anything made up."""
    entries, rows, trees = told(random_history(seed, 250))
    lines = lines_of(trees)
    if not lines:
        return
    left_out = data.draw(st.integers(0, len(entries) - 1))
    line = data.draw(st.sampled_from(lines))
    whole = statements(entries, [line])[0]
    kind = entries[left_out].envelope.type
    if kind not in ("attribution.recorded", "fee.charged"):
        return
    part = statements(entries[:left_out] + entries[left_out + 1 :], [line])[0]
    assert part.accounted_wei <= whole.accounted_wei
    if kind == "attribution.recorded":
        index = entries[left_out].index
        cutoff = int((rows.get("periods", (line.period,)) or {})["cutoff_index"])
        given_wei = sum(
            row["amount_wei"]
            for owner in whole.owners
            for key, row in rows.scan("statement_lines", (owner, index))
            if row["bucket"] == "accrued"
        )
        waits = any(
            row["bucket"] == "withheld"
            for owner in whole.owners
            for _, row in rows.scan("statement_lines", (owner, index))
        )
        # What a hold keeps back may come before the cut-off or after it. An owner who moved to
        # another address keeps there what came after: then it is less.
        steady = len(whole.owners) == 1 and _never_moved(entries, whole.owners[0])
        if index < cutoff and steady and not waits:
            assert part.missing_wei == given_wei


def _never_moved(entries: Sequence[Entry], owner: str) -> bool:
    bound = [e for e in entries if e.envelope.type == "identity.evm_bound"]
    return sum(e.envelope.actor == owner for e in bound) == 1


# --- by hand ---

ANN, BEN, DEV, EVE = (actor(n) for n in (11, 12, 13, 14))
A = address(1).lower()


@pytest.fixture
def world() -> World:
    world = World()
    world.open()
    world.deposit(EVE, 10**30)
    return world


def answered(world: World, fee_wei: int, shares: dict[str, int], *, owner: str = DEV) -> None:
    inference = world.new_id()
    world.charge(EVE, world.new_id(), inference, owner, fee_wei)
    rest = 1_000_000 - sum(shares.values())
    world.attribute(world.new_id(), world.new_id(), inference, shares, rest)


def line(period: int, wei: int, account: str = A) -> PayoutLine:
    return PayoutLine(period=period, account=account, cumulative_wei=wei, proof=())


def state(world: World, *lines: PayoutLine) -> Any:
    return statements([read_entry(raw) for raw in world.entries], lines)


def test_shares_are_rounded_as_the_ledger_rounds_them(world: World) -> None:
    """Half of 7 wei is for contributors (3 or 4, by largest remainder), a third of it each."""
    assert POLICY["contributors_bps"] == 5_000
    world.bind(ANN, address(1))
    answered(world, 7, {ANN: 333_333, BEN: 333_333})
    world.cutoff(1)
    (found,) = state(world, line(1, 1))
    assert (found.accounted_wei, found.events, found.owners) == (1, 1, (ANN,))
    assert found.missing_wei == 0


def test_owner_and_operator_earn_too(world: World) -> None:
    world.bind(DEV, address(1))
    answered(world, 1_000, {})
    world.cutoff(1)
    (found,) = state(world, line(1, 250))
    assert found.missing_wei == 0


def test_what_comes_after_the_cut_off_counts_in_the_next_period(world: World) -> None:
    world.bind(ANN, address(1))
    answered(world, 1_000, {ANN: 1_000_000})
    world.cutoff(1)
    answered(world, 1_000, {ANN: 1_000_000})
    world.activate(1)
    world.cutoff(2)
    first, second = state(world, line(1, 500), line(2, 1_001))
    assert (first.accounted_wei, first.events, first.missing_wei) == (500, 1, 0)
    assert (second.accounted_wei, second.events, second.missing_wei) == (1_000, 2, 1)


def test_a_veto_gives_back(world: World) -> None:
    world.bind(ANN, address(1))
    answered(world, 1_000, {ANN: 1_000_000})
    world.cutoff(1)
    world.veto(1)
    world.cutoff(2)
    world.cutoff(2)
    assert [s.accounted_wei for s in state(world, line(1, 500), line(2, 500))] == [500, 500]


def test_whoever_binds_late_takes_what_was_earned_before(world: World) -> None:
    answered(world, 1_000, {ANN: 1_000_000})
    world.cutoff(1)
    world.bind(ANN, address(1))
    world.bind(BEN, address(1))  # taken: changes nothing
    answered(world, 1_000, {BEN: 1_000_000})
    world.cutoff(2)
    first, second = state(world, line(1, 0), line(2, 500))
    assert (first.accounted_wei, first.owners) == (0, ())
    assert (second.accounted_wei, second.owners) == (500, (ANN,))


def test_without_the_cut_off_nothing_is_said(world: World) -> None:
    world.bind(ANN, address(1))
    answered(world, 1_000, {ANN: 1_000_000})
    (found,) = state(world, line(1, 500))
    assert not found.cut_off
    assert found.accounted_wei == 0


def test_more_than_the_line_is_said_too(world: World) -> None:
    world.bind(ANN, address(1))
    answered(world, 1_000, {ANN: 1_000_000})
    world.cutoff(1)
    (found,) = state(world, line(1, 499))
    assert found.missing_wei == -1


def test_an_address_that_somebody_else_holds_is_not_taken(world: World) -> None:
    """BEN's binding was asked about by nobody, and it counts: ANN keeps the address she has."""
    world.bind(BEN, address(2))
    world.bind(ANN, address(1))
    world.bind(ANN, address(2))
    answered(world, 1_000, {ANN: 1_000_000})
    world.cutoff(1)
    (found,) = state(world, line(1, 500))
    assert (found.missing_wei, found.owners) == (0, (ANN,))
