"""What rests on what: one edge per thing that an event refers to, as leaf indexes. Pure.

The body fields that `ledger.domain.events.references` names lead to the event that created the
thing. Four edges follow from the order of the log instead, and are what makes an answer's ancestry
complete:

- `run.requested` rests on the approval of every contribution that was approved, and neither
  withdrawn nor held, in its datanets at that index (field `inputs`): the rows that a run may train
  on. What it did train on is in the manifest that `run.completed` commits to.
- `adapter.published` rests on the `run.completed` whose adapter hash it carries (`completed`).
- `fee.charged` rests on the `fee_policy.set` of its version (`policy_version`).
- later events of a period rest on its `period.cutoff` (`period`).

So the ancestry of any event is one recursive query (`queries.lineage_of`), and a bundle is its
entries with their proofs. Edges only point back: a parent's index is lower than its child's.
"""

from collections.abc import Iterator

from ledger.domain.envelope import Entry
from ledger.domain.events import CATALOGUE, CREATES, references, stream_of
from ledger.ports import Key, Rows
from projections.base import Projection, table
from projections.catalogue import CONTRIBUTIONS
from projections.holds import HOLDS

EDGES = table(
    "edges", key="index:int", columns="event:text type:text actor:text stream:text at:int"
)
LINEAGE = table("lineage", key="child:int n:int", columns="parent:int field:text")
THINGS = table("things", key="kind:text id:text", columns="index:int")
INPUTS = table("inputs", key="datanet:text contribution:text", columns="index:int")

_DECIDES_INPUTS = (
    "contribution.approved",
    "contribution.rejected",
    "contribution.withdrawn",
    "contribution.held",
    "contribution.released",
)
_CREATED_BY = {type_name: kind for kind, type_name in CREATES.items()}
_PERIOD_EVENTS = (
    "period.closed",
    "payout.proposed",
    "payout.activated",
    "payout.vetoed",
    "period.abandoned",
)


def fold_any(rows: Rows, entry: Entry) -> None:
    """The edge of an event of any type, then its parents."""
    event = entry.envelope
    edge = {
        "event": str(event.id),
        "type": event.type,
        "actor": event.actor,
        "stream": str(stream_of(event.type, event.log, event.actor, event.body)),
        "at": entry.recorded_at,
    }
    rows.put(EDGES.name, (entry.index,), edge)
    for n, (field, parent) in enumerate(_parents(rows, entry)):
        assert parent < entry.index, "lineage points back"
        rows.put(LINEAGE.name, (entry.index, n), {"parent": parent, "field": field})
    _remember(rows, entry)


def _parents(rows: Rows, entry: Entry) -> Iterator[tuple[str, int]]:
    for field, kind, key in _named(entry):
        thing = rows.get(THINGS.name, (kind, key))
        if thing is not None:
            yield field, thing["index"]
    if entry.envelope.type == "run.requested":
        for datanet in entry.envelope.body["datanets"]:
            for _, approval in rows.scan(INPUTS.name, (datanet,)):
                yield "inputs", approval["index"]


def _named(entry: Entry) -> list[tuple[str, str, str]]:
    """(field, kind, id) of every thing that the event rests on, the derived ones included."""
    body, type_name = entry.envelope.body, entry.envelope.type
    found = references(type_name, body)
    if type_name == "adapter.published":
        found.append(("completed", "completed", f"{body['run']}/{body['adapter_sha256']}"))
    elif type_name == "fee.charged":
        found.append(("policy_version", "fee_policy", str(body["policy_version"])))
    elif type_name in _PERIOD_EVENTS:
        found.append(("period", "period", str(body["period"])))
    return found


def _remember(rows: Rows, entry: Entry) -> None:
    """What later events will refer to. The first event of a kind and id stands for it."""
    body, type_name = entry.envelope.body, entry.envelope.type
    thing = _created(entry)
    if thing is not None and rows.get(THINGS.name, thing) is None:
        rows.put(THINGS.name, thing, {"index": entry.index})
    if type_name in _DECIDES_INPUTS:
        approval = _approval(rows, body["contribution"])
        key = (body["datanet"], body["contribution"])
        if approval is None:
            rows.delete(INPUTS.name, key)
        else:
            rows.put(INPUTS.name, key, {"index": approval})


def _approval(rows: Rows, contribution: str) -> int | None:
    """Where the contribution was approved, if a run requested now may use it. `catalogue` and
    `consent` have folded this event before us."""
    row = rows.get(CONTRIBUTIONS.name, (contribution,))
    hold = rows.get(HOLDS.name, (contribution,))
    if row is None or row["status"] != "approved" or (hold and hold["active"]):
        return None
    return int(row["decided_index"])


def _created(entry: Entry) -> tuple[str, str] | None:
    body, type_name = entry.envelope.body, entry.envelope.type
    if type_name in _CREATED_BY:
        kind = _CREATED_BY[type_name]
        return kind, body[kind]
    if type_name == "run.completed":
        return "completed", f"{body['run']}/{body['adapter_sha256']}"
    if type_name == "fee_policy.set":
        return "fee_policy", str(body["version"])
    if type_name == "period.cutoff":
        return "period", str(body["period"])
    return None


def _wants(entry: Entry) -> list[tuple[str, Key]]:
    wanted: list[tuple[str, Key]] = [(THINGS.name, (kind, id)) for _, kind, id in _named(entry)]
    thing = _created(entry)
    if entry.envelope.type in _DECIDES_INPUTS:
        key = (entry.envelope.body["contribution"],)
        wanted += [(CONTRIBUTIONS.name, key), (HOLDS.name, key)]
    return [*wanted, (THINGS.name, thing)] if thing else wanted


PROJECTION = Projection(
    name="lineage",
    tables=(EDGES, LINEAGE, THINGS, INPUTS),
    folds=dict.fromkeys(CATALOGUE, fold_any),
    wants=_wants,
)
