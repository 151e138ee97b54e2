"""The daily limits of a datanet, for one contributor: a gate of `contribution.recorded`.

An aggregate sees single streams, and a day's contributions are many: so they are counted in the
projected rows, and on top what this process has let pass and the rows do not show yet. In one API
process that is exact. Two of them do not see each other's for as long as the projector is behind,
a second or so, and may together let a little more pass; the log then holds it, and it counts. What
passed the gate and was not stored after all counts for PENDING_US too.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock
from typing import Protocol

from ledger.domain.datanets import DAY_US, DatanetPolicy
from ledger.domain.envelope import Envelope
from ledger.errors import Backpressure, TooLarge

PENDING_US = 60 * 1_000_000
"""How long the projected rows may take to show what passed here."""
STRIPES = 64
"""Locks: one is held over a query, and contributors should not wait for each other's."""

Pair = tuple[str, str]
"""(datanet, contributor)"""


class Given(Protocol):
    """What was given lately; `projections.consent_queries` answers it."""

    def policy(self, datanet: str) -> DatanetPolicy: ...

    def given_since(
        self, datanet: str, contributor: str, since_us: int, among: Sequence[str]
    ) -> tuple[int, int, set[str]]: ...

    def oldest_given(
        self, datanet: str, contributor: str, since_us: int
    ) -> list[dict[str, int]]: ...


@dataclass(kw_only=True)
class _Stripe:
    """What passed lately, as rows by contribution, of the pairs that share a lock."""

    lock: Lock = field(default_factory=Lock)
    passed: dict[Pair, dict[str, int]] = field(default_factory=dict)
    queue: deque[tuple[int, Pair, str]] = field(default_factory=deque)

    def forget(self, before: int) -> None:
        while self.queue and self.queue[0][0] <= before:
            _, pair, contribution = self.queue.popleft()
            self.passed.get(pair, {}).pop(contribution, None)
            if not self.passed.get(pair):
                self.passed.pop(pair, None)

    def add(self, now: int, pair: Pair, asked: dict[str, int]) -> None:
        passed = self.passed.setdefault(pair, {})
        for contribution, rows in asked.items():
            # Of two events with one contribution, sent at once, either may be the one that is
            # stored: the larger counts.
            passed[contribution] = max(rows, passed.get(contribution, 0))
            self.queue.append((now, pair, contribution))


class Quota:
    """`check` lets contributions pass or raises. Thread-safe."""

    def __init__(self, given: Given, clock: Callable[[], int]) -> None:
        self._given = given
        self._clock = clock
        self._stripes = [_Stripe() for _ in range(STRIPES)]

    def check(self, events: Sequence[Envelope]) -> None:
        """Raises TooLarge for what no day has room for, Backpressure with the time to wait for
        what today has not."""
        asked: dict[Pair, list[Envelope]] = defaultdict(list)
        for event in events:
            asked[event.body["datanet"], event.actor].append(event)
        for pair, mine in asked.items():
            self._check(pair, {str(e.body["contribution"]): e.body["rows_count"] for e in mine})

    def _check(self, pair: Pair, asked: dict[str, int]) -> None:
        policy, now = self._given.policy(pair[0]), self._clock()
        rows = sum(asked.values())
        _refuse_at_all(policy, len(asked), rows)
        stripe = self._stripes[hash(pair) % STRIPES]
        with stripe.lock:
            # Held over the query, or two at once would both find the last place.
            stripe.forget(now - PENDING_US)
            passed = stripe.passed.get(pair, {})
            count, given_rows, known = self._given.given_since(*pair, now - DAY_US, list(passed))
            unseen = [n for id, n in passed.items() if id not in known and id not in asked]
            given = (count + len(unseen), given_rows + sum(unseen))
            if (
                given[0] + len(asked) > policy.max_contributions_per_day
                or given[1] + rows > policy.max_rows_per_day
            ):
                raise self._later(pair, policy, given, (len(asked), rows), now)
            stripe.add(now, pair, asked)

    def _later(
        self,
        pair: Pair,
        policy: DatanetPolicy,
        given: tuple[int, int],
        asked: tuple[int, int],
        now: int,
    ) -> Backpressure:
        count, rows = given
        free_at = now + PENDING_US
        for one in self._given.oldest_given(*pair, now - DAY_US):
            count, rows = count - 1, rows - one["rows_count"]
            free_at = one["at"] + DAY_US
            if (
                count + asked[0] <= policy.max_contributions_per_day
                and rows + asked[1] <= policy.max_rows_per_day
            ):
                break
        when = datetime.fromtimestamp(free_at // 1_000_000 + 1, UTC)
        return Backpressure(
            "in any 24 hours this datanet takes of one contributor max_contributions_per_day = "
            f"{policy.max_contributions_per_day} and max_rows_per_day = {policy.max_rows_per_day}; "
            f"you gave {given[0]} with {given[1]} rows, these are {asked[0]} with {asked[1]}: come "
            f"again at {when:%Y-%m-%d %H:%M:%S} UTC",
            retry_after_s=max(1, (free_at - now) // 1_000_000 + 1),
        )


def _refuse_at_all(policy: DatanetPolicy, count: int, rows: int) -> None:
    for name, limit, asked in (
        ("max_contributions_per_day", policy.max_contributions_per_day, count),
        ("max_rows_per_day", policy.max_rows_per_day, rows),
    ):
        if asked > limit:
            raise TooLarge(
                f"this datanet takes {name} = {limit} of one contributor in any 24 hours; these "
                f"are {asked}: split them over several days",
                field="body.rows_count",
            )
