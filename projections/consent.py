"""What contributors and reviewers settle between them: policies, holds, appeals. Pure.

Holds move money when they end (`holds` says which). A row is in `appeals` from its first appeal on,
with the newest state: open, split or upheld; all of its history is the contribution's stream.
"""

from ledger.domain.accrual import ACCRUED
from ledger.domain.accrual import WITHHELD as WITHHELD_BUCKET
from ledger.domain.envelope import Entry
from ledger.ports import Key, Rows
from projections.balances import BALANCES, Journal, move_lines
from projections.base import Fold, Projection, anomaly, change, table
from projections.catalogue import CONTRIBUTIONS
from projections.holds import HELD_IN, HOLDS, WITHHELD, count_hold, held_of

DATANET_POLICIES = table(
    "datanet_policies",
    key="datanet:text",
    columns="max_rows_per_contribution:int max_contributions_per_day:int max_rows_per_day:int "
    "on_withdrawal:text index:int at:int",
)
APPEALS = table(
    "appeals",
    key="contribution:text row:int",
    columns="datanet:text status:text reason:text note:text appealed_index:int appealed_at:int "
    "decided_index:int? decided_by:text?",
)


def _policy_set(rows: Rows, entry: Entry) -> None:
    policy = dict(entry.envelope.body)
    key = (policy.pop("datanet"),)
    rows.put(DATANET_POLICIES.name, key, {**policy, "index": entry.index, "at": entry.recorded_at})


def _held(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    key = (body["contribution"],)
    contribution, before = rows.get(CONTRIBUTIONS.name, key), rows.get(HOLDS.name, key)
    if contribution is None or (before and before["active"]):
        problem = "is held already" if before else "was never recorded"
        anomaly(rows, entry, "hold_out_of_order", f"contribution {key[0]} {problem}")
        return
    hold = dict.fromkeys(HOLDS.columns, None) | {
        **{field: body[field] for field in ("datanet", "reason", "note", "evidence_sha256")},
        "contributor": contribution["contributor"],
        "active": True,
        "held_by": entry.envelope.actor,
        "held_index": entry.index,
        "held_at": entry.envelope.at,
    }
    rows.put(HOLDS.name, key, hold)
    count_hold(rows, contribution["contributor"], body["datanet"], 1)


def _released(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    key = (body["contribution"],)
    hold = rows.get(HOLDS.name, key)
    if hold is None or not hold["active"]:
        anomaly(rows, entry, "hold_out_of_order", f"contribution {key[0]} is not held")
        return
    ended = {
        "active": False,
        "released_by": entry.envelope.actor,
        "released_index": entry.index,
        "release_note": body["note"],
    }
    rows.put(HOLDS.name, key, {**hold, **ended})
    count_hold(rows, hold["contributor"], hold["datanet"], -1)
    _accrue(rows, entry, hold["contributor"])


def _accrue(rows: Rows, entry: Entry, contributor: str) -> None:
    """What was withheld for runs in whose datanets nothing is held any more."""
    total_wei = 0
    for key, row in list(rows.scan(WITHHELD.name, (contributor,))):
        if not held_of(rows, [contributor], key[1]):
            total_wei += row["amount_wei"]
            rows.delete(WITHHELD.name, key)
    due = [(contributor, total_wei)]
    posted = Journal(rows, entry).post(move_lines(due, WITHHELD_BUCKET, ACCRUED, part="released"))
    assert posted, "the bucket does not hold what was withheld"


def _appealed(rows: Rows, entry: Entry) -> None:
    body = entry.envelope.body
    appeal = {
        "datanet": body["datanet"],
        "status": "open",
        "reason": body["reason"],
        "note": "",
        "appealed_index": entry.index,
        "appealed_at": entry.recorded_at,
        "decided_index": None,
        "decided_by": None,
    }
    rows.put(APPEALS.name, (body["contribution"], body["row"]), appeal)


def _judged(status: str) -> Fold:
    def fold(rows: Rows, entry: Entry) -> None:
        body = entry.envelope.body
        change(
            rows,
            entry,
            APPEALS.name,
            (body["contribution"], body["row"]),
            status=status,
            note=body["note"],
            decided_index=entry.index,
            decided_by=entry.envelope.actor,
        )

    return fold


def _wants(entry: Entry) -> list[tuple[str, Key]]:
    body, kind = entry.envelope.body, entry.envelope.type
    if kind.startswith("cluster."):
        return [(APPEALS.name, (body["contribution"], body["row"]))]
    if kind == "datanet.policy_set":
        return [(DATANET_POLICIES.name, (body["datanet"],))]
    actor = entry.envelope.actor
    return [
        (HOLDS.name, (body["contribution"],)),
        (CONTRIBUTIONS.name, (body["contribution"],)),
        # A release after MAX_HOLD_US is the contributor's own.
        (HELD_IN.name, (actor,)),
        (BALANCES.name, (actor, ACCRUED)),
    ]


PROJECTION = Projection(
    name="consent",
    tables=(DATANET_POLICIES, HOLDS, HELD_IN, WITHHELD, APPEALS),
    folds={
        "datanet.policy_set": _policy_set,
        "contribution.held": _held,
        "contribution.released": _released,
        "cluster.appealed": _appealed,
        "cluster.split": _judged("split"),
        "cluster.upheld": _judged("upheld"),
    },
    wants=_wants,
)
