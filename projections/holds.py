"""Whose money waits, and for what. Tables and one question; the folds are in `consent`. Pure.

A hold is on one contribution, and money has no contribution: shares are per contributor. So while a
contributor has a hold in force in any datanet of a run, what that run's adapters earn them is
*withheld* instead of accrued, one sum for each (contributor, run). When the last such hold ends,
the whole sum accrues. Nothing else ever takes from it.
"""

import json
from collections.abc import Iterable

from ledger.domain.canonical import canonical_json
from ledger.ports import Rows
from projections.base import table

HOLDS = table(
    "holds",
    key="contribution:text",
    columns="datanet:text contributor:text active:bool reason:text note:text evidence_sha256:text? "
    "held_by:text held_index:int held_at:int released_by:text? released_index:int? "
    "release_note:text?",
)
HELD_IN = table("held_in", key="contributor:text", columns="datanets:text")
WITHHELD = table("withheld", key="contributor:text run:text", columns="amount_wei:wei")
RUNS_TABLE = "runs"
"""`catalogue.RUNS`, which cannot be imported here: that module reads what ours writes."""


def held_of(rows: Rows, contributors: Iterable[str], run: str) -> frozenset[str]:
    """Those of the contributors who have a hold in force in a datanet of the run."""
    found = {who: _datanets(rows, who) for who in contributors}
    if not any(found.values()):
        return frozenset()
    row = rows.get(RUNS_TABLE, (run,))
    asked = set(json.loads(row["datanets"])) if row else set()
    return frozenset(who for who, held in found.items() if held.keys() & asked)


def count_hold(rows: Rows, contributor: str, datanet: str, step: int) -> None:
    """One hold more (1) or less (-1) of a contributor's in a datanet."""
    held = _datanets(rows, contributor)
    left = held.pop(datanet, 0) + step
    if left > 0:
        held[datanet] = left
    if held:
        row = {"datanets": canonical_json(held).decode()}
        rows.put(HELD_IN.name, (contributor,), row)
    else:
        rows.delete(HELD_IN.name, (contributor,))


def withhold(rows: Rows, contributor: str, run: str, amount_wei: int) -> None:
    row = rows.get(WITHHELD.name, (contributor, run)) or {"amount_wei": 0}
    rows.put(WITHHELD.name, (contributor, run), {"amount_wei": row["amount_wei"] + amount_wei})


def _datanets(rows: Rows, contributor: str) -> dict[str, int]:
    """Holds in force by datanet."""
    row = rows.get(HELD_IN.name, (contributor,))
    return dict(json.loads(row["datanets"])) if row else {}
