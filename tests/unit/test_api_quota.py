"""The daily limits by themselves, over rows that show things late and a clock set by hand."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from ledger.api.quota import PENDING_US, Quota
from ledger.domain.datanets import DAY_US, DatanetPolicy
from ledger.domain.envelope import Envelope, decode_envelope
from ledger.errors import Backpressure, LedgerError, TooLarge
from tests.actors import ANN, BEN, Actor, H

NET, OTHER = str(uuid4()), str(uuid4())


class Stored:
    """The port `Given`: rows by contribution, put there by hand."""

    def __init__(self, count: int, rows: int) -> None:
        self.limits = DatanetPolicy(max_contributions_per_day=count, max_rows_per_day=rows)
        self.rows: dict[str, tuple[str, str, int, int]] = {}

    def policy(self, datanet: str) -> DatanetPolicy:
        return self.limits

    def _recent(self, datanet: str, contributor: str, since_us: int) -> dict[str, tuple[int, int]]:
        return {
            id: (at, n)
            for id, (net, who, at, n) in self.rows.items()
            if (net, who) == (datanet, contributor) and at > since_us
        }

    def given_since(
        self, datanet: str, contributor: str, since_us: int, among: Sequence[str]
    ) -> tuple[int, int, set[str]]:
        found = self._recent(datanet, contributor, since_us)
        return len(found), sum(n for _, n in found.values()), found.keys() & set(among)

    def oldest_given(self, datanet: str, contributor: str, since_us: int) -> list[dict[str, int]]:
        found = sorted(self._recent(datanet, contributor, since_us).values())
        return [{"at": at, "rows_count": n} for at, n in found]


class World:
    def __init__(self, count: int, rows: int) -> None:
        self.now = 20_000 * DAY_US
        self.stored = Stored(count, rows)
        self.quota = Quota(self.stored, lambda: self.now)

    def offer(self, *rows: int, who: Actor = ANN, net: str = NET) -> list[Envelope]:
        """Contributions of so many rows each, in one append."""
        events = [event(who, net, count) for count in rows]
        self.quota.check(events)
        return events

    def show(self, events: Sequence[Envelope]) -> None:
        for one in events:
            body = one.body
            row = (body["datanet"], one.actor, self.now, body["rows_count"])
            self.stored.rows[body["contribution"]] = row


def event(who: Actor, net: str, rows: int, contribution: str | None = None) -> Envelope:
    body = {
        "contribution": contribution or str(uuid4()), "datanet": net, "licence": "MIT",
        "rows_root": H, "rows_count": rows, "rows_sha256": H, "title": "t",
    }  # fmt: skip
    return decode_envelope(who.sign("contribution.recorded", body))


def test_what_the_rows_do_not_show_yet_counts_once() -> None:
    world = World(3, 9)
    passed = world.offer(4)
    with pytest.raises(Backpressure, match="you gave 1 with 4 rows, these are 1 with 6"):
        world.offer(6)
    world.show(passed)
    world.offer(4)
    with pytest.raises(Backpressure, match="you gave 2 with 8 rows"):
        world.offer(2)
    world.offer(1)
    with pytest.raises(Backpressure, match="max_contributions_per_day = 3"):
        world.offer(1)


def test_others_and_other_datanets_have_days_of_their_own() -> None:
    world = World(1, 5)
    world.offer(5)
    world.offer(5, who=BEN)
    world.offer(5, net=OTHER)
    for again in ({}, {"who": BEN}, {"net": OTHER}):
        with pytest.raises(Backpressure):
            world.offer(1, **again)  # type: ignore[arg-type]


def test_a_contribution_that_is_sent_again_counts_once() -> None:
    world = World(1, 5)
    mine = event(ANN, NET, 5)
    for _ in range(3):
        world.quota.check([mine])


def test_of_one_contribution_sent_twice_at_once_the_larger_counts() -> None:
    """The rules refuse the second, once the first is stored; the gate may see both before."""
    world = World(9, 10)
    large = event(ANN, NET, 8)
    small = event(ANN, NET, 1, contribution=large.body["contribution"])
    world.quota.check([large])
    world.quota.check([small])
    with pytest.raises(Backpressure, match="you gave 1 with 8 rows"):
        world.offer(3)
    world.offer(2)


def test_what_passed_and_never_came_is_forgotten() -> None:
    world = World(1, 5)
    world.offer(5)
    world.now += PENDING_US - 1
    with pytest.raises(Backpressure):
        world.offer(1)
    world.now += 1
    world.offer(5)
    assert sum(len(stripe.queue) for stripe in world.quota._stripes) == 1


def test_the_time_to_wait_is_when_there_is_room_and_no_sooner() -> None:
    world = World(3, 10)
    start = world.now
    for hour, rows in ((0, 2), (1, 5), (2, 3)):
        world.now = start + hour * DAY_US // 24
        world.show(world.offer(rows))
    for rows, free_at in ((2, start), (3, start + DAY_US // 24), (10, start + 2 * DAY_US // 24)):
        with pytest.raises(Backpressure) as caught:
            world.offer(rows)
        before = world.now
        world.now = free_at + DAY_US - 1
        with pytest.raises(Backpressure):
            world.offer(rows)
        world.now = before + caught.value.retry_after_s * 1_000_000
        world.offer(rows)
        world.now = before
        for stripe in world.quota._stripes:
            stripe.forget(2**62)


def test_what_no_day_has_room_for_is_too_large() -> None:
    world = World(2, 5)
    with pytest.raises(TooLarge, match="max_rows_per_day = 5"):
        world.offer(6)
    with pytest.raises(TooLarge, match="max_contributions_per_day = 2"):
        world.offer(1, 1, 1)
    with pytest.raises(TooLarge, match="max_rows_per_day = 5"):
        world.offer(3, 3)
    world.offer(2, 3)


def test_of_many_at_once_just_so_many_pass() -> None:
    world = World(7, 100)
    ready = threading.Barrier(16)

    def one(_: int) -> bool:
        ready.wait(10)
        try:
            world.offer(1)
        except LedgerError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(one, range(16))) == 7
