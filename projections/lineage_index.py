"""Where things are in the log, answered from the projected rows: `ledger.log.ancestry.EventIndex`.

A look-up by what an event is about goes by its stream, whose id anyone can compute
(`ledger.domain.events.stream_id`): `edges` has every event of it. Of the streams that are one per
ledger only their first event is asked for that way; policies, periods and fees have rows of their
own. Every method is a constant number of statements per LOOKUP_BATCH things.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import LiteralString

from ledger.domain.events import CATALOGUE, stream_id
from projections.queries import Queries

LOOKUP_BATCH = 1_000

Thing = tuple[str, str, str]
Way = Callable[[Sequence[Thing]], Iterator[tuple[Thing, int]]]


class LineageIndex(Queries):
    """Thread-safe, like the pool; keeps nothing."""

    def position(self) -> int:
        row = self._one("SELECT events FROM projections.position")
        return int(row["events"]) if row else 0

    def firsts(self, wanted: Collection[Thing]) -> dict[Thing, int]:
        ways: dict[str, Way] = {
            "stream": self._by_stream,
            "fee": self._by_fee,
            "thing": self._by_thing,
            "period": self._by_period,
        }
        found: dict[Thing, int] = {}
        groups: dict[str, list[Thing]] = defaultdict(list)
        for thing in wanted:
            groups[_how(thing)].append(thing)
        for how, things in groups.items():
            for start in range(0, len(things), LOOKUP_BATCH):
                found.update(ways[how](things[start : start + LOOKUP_BATCH]))
        return found

    def bindings(self, account: str) -> list[int]:
        owners = self._all(
            "SELECT owner FROM projections.payees WHERE address = %s"
            " UNION SELECT actor FROM projections.addresses WHERE address = %s",
            account,
            account,
        )
        streams = [str(stream_id("identity", row["owner"])) for row in owners]
        return self._indexes(
            'SELECT "index" FROM projections.edges'
            " WHERE stream = ANY(%s) AND type = 'identity.evm_bound' ORDER BY \"index\"",
            streams,
        )

    def settlements(self, before: int) -> list[int]:
        return self._indexes(
            'SELECT cutoff_index AS "index" FROM projections.periods WHERE cutoff_index <= %s'
            ' UNION SELECT e."index" FROM projections.periods AS p'
            " JOIN projections.lineage AS l ON l.parent = p.cutoff_index AND l.field = 'period'"
            ' JOIN projections.edges AS e ON e."index" = l.child'
            " WHERE e.type IN ('payout.vetoed', 'period.abandoned') AND e.\"index\" < %s"
            ' ORDER BY "index"',
            before,
            before,
        )

    def earnings(self, owners: Collection[str], before: int, limit: int) -> list[int]:
        return self._indexes(
            'SELECT "index" FROM projections.statement_lines'
            ' WHERE owner = ANY(%(owners)s) AND "index" < %(before)s'
            " AND bucket IN ('accrued', 'withheld')"
            " AND part IN ('owner', 'operator', 'contributor', 'released')"
            # A hold moves nothing itself, and decides what an attribution after it does.
            ' UNION SELECT e."index" FROM projections.contributions AS c'
            " JOIN projections.lineage AS l ON l.parent = c.\"index\" AND l.field = 'contribution'"
            ' JOIN projections.edges AS e ON e."index" = l.child'
            ' WHERE c.contributor = ANY(%(owners)s) AND e."index" < %(before)s'
            " AND e.type IN ('contribution.held', 'contribution.released')"
            ' ORDER BY "index" LIMIT %(limit)s',
            owners=list(owners),
            before=before,
            limit=limit,
        )

    def claimed_period(self, account: str, cumulative_wei: int, before: int) -> int | None:
        row = self._one(
            "SELECT p.period FROM projections.periods AS p"
            " JOIN projections.lineage AS l ON l.parent = p.cutoff_index AND l.field = 'period'"
            " JOIN projections.edges AS e ON e.\"index\" = l.child AND e.type = 'payout.activated'"
            ' WHERE e."index" < %s AND %s = (SELECT sum(cumulative_wei)'
            "   FROM projections.payout_lines AS o WHERE o.period = p.period AND o.address = %s)"
            " ORDER BY p.period DESC LIMIT 1",
            before,
            cumulative_wei,
            account,
        )
        return None if row is None else int(row["period"])

    # -- ways to look a thing up ---------------------------------------------------------------

    def _by_stream(self, things: Sequence[Thing]) -> Iterator[tuple[Thing, int]]:
        by_key = {(str(_stream(thing)), thing[0]): thing for thing in things}
        rows = self._all(
            'SELECT DISTINCT ON (stream, type) stream, type, "index" FROM projections.edges'
            ' WHERE stream = ANY(%s) AND type = ANY(%s) ORDER BY stream, type, "index"',
            [stream for stream, _ in by_key],
            sorted({event_type for _, event_type in by_key}),
        )
        for row in rows:
            thing = by_key.get((row["stream"], row["type"]))
            if thing is not None:
                yield thing, row["index"]

    def _by_fee(self, things: Sequence[Thing]) -> Iterator[tuple[Thing, int]]:
        rows = self._all(
            "SELECT inference, fee_index FROM projections.inferences"
            " WHERE inference = ANY(%s) AND fee_index IS NOT NULL",
            [value for _, _, value in things],
        )
        for row in rows:
            yield ("fee.charged", "inference", row["inference"]), row["fee_index"]

    def _by_thing(self, things: Sequence[Thing]) -> Iterator[tuple[Thing, int]]:
        by_key = {(_THINGS[thing[0]], thing[2]): thing for thing in things}
        rows = self._all(
            'SELECT kind, id, "index" FROM projections.things'
            " WHERE kind = ANY(%s) AND id = ANY(%s)",
            sorted({kind for kind, _ in by_key}),
            [id for _, id in by_key],
        )
        for row in rows:
            thing = by_key.get((row["kind"], row["id"]))
            if thing is not None:
                yield thing, row["index"]

    def _by_period(self, things: Sequence[Thing]) -> Iterator[tuple[Thing, int]]:
        by_key = {(thing[0], thing[2]): thing for thing in things}
        rows = self._all(
            'SELECT t.id, e.type, min(e."index") AS "index" FROM projections.things AS t'
            " JOIN projections.lineage AS l ON l.parent = t.\"index\" AND l.field = 'period'"
            ' JOIN projections.edges AS e ON e."index" = l.child'
            " WHERE t.kind = 'period' AND t.id = ANY(%s) GROUP BY t.id, e.type",
            sorted({period for _, period in by_key}),
        )
        for row in rows:
            thing = by_key.get((row["type"], row["id"]))
            if thing is not None:
                yield thing, row["index"]

    def _indexes(self, query: LiteralString, *values: object, **named: object) -> list[int]:
        return [row["index"] for row in self._all(query, *values, **named)]


_THINGS: Mapping[str, str] = {"fee_policy.set": "fee_policy", "period.cutoff": "period"}
"""Event types whose first event of an id `things` knows, by the kind that it calls them."""


def _how(thing: Thing) -> str:
    event_type, name, _ = thing
    kind = CATALOGUE[event_type]
    if event_type in _THINGS:
        return "thing"
    if (event_type, name) == ("fee.charged", "inference"):
        return "fee"
    if kind.aggregate == "periods" and name == "period":
        return "period"
    assert name == (kind.key or "log"), f"no look-up of {event_type} by {name}"
    return "stream"


def _stream(thing: Thing) -> object:
    event_type, name, value = thing
    # A stream that is one per ledger has the origin itself as its key, in its own letter case.
    return stream_id(CATALOGUE[event_type].aggregate, value if name == "log" else value.lower())
