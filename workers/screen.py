"""The gates before training: what `attribution.screening` flags is held, and left out of the run.

Knows the client; no Ray, no model. A hold is an event by the worker, `contribution.held`, with a
small report (no text of rows) as its evidence. It takes nothing away: money waits, and a reviewer,
after 30 days the contributor, releases it. Its id follows from contribution and reason, so a retry
after a crash holds nothing twice, and what a reviewer released is not held again for the same
reason: the worker then trains on it.

Events go before training: a crash between two of them leaves some held, and the next attempt finds
those gone from the run's listing and holds the rest.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import structlog

from ledger.client import Client
from ledger.domain.canonical import canonical_json
from ledger.domain.ids import derived_id
from ledger.errors import Conflict, Forbidden
from workers.attribution.screening import Flag, Row, screen

log = structlog.get_logger(__name__)

REPORT_FORMAT = "tributary/screening/v1"
_SAYS = {
    "junk": "rows without content",
    "duplicate": "rows that copy rows which others registered before",
    "stuffing": "rows made of words that others registered before",
}

R = TypeVar("R", bound=Row)


def screened(client: Client, run: str, rows: Sequence[R]) -> list[R]:
    """The rows that the run may train on, in their order; holds are recorded on the way.

    Raises what the client raises, Unavailable for one, and is then safe to call again.
    """
    flags: dict[str, Flag] = {}
    for flag in screen(rows):
        flags.setdefault(flag.contribution, flag)  # one hold at a time
    if not flags:
        return list(rows)
    datanets = {
        str(found["contribution"]): str(found["datanet"])
        for found in client.pages(f"/v1/runs/{run}/contributions")
    }
    out = set()
    for contribution, flag in flags.items():
        # Not listed any more: withdrawn or held by somebody since the rows were read.
        if contribution not in datanets or _hold(client, run, datanets[contribution], flag):
            out.add(contribution)
    return [row for row in rows if row.contribution not in out]


def report(flag: Flag) -> bytes:
    """The evidence of a hold: canonical JSON, scores and row numbers, none of the rows' text."""
    return canonical_json(
        {
            "format": REPORT_FORMAT,
            "contribution": flag.contribution,
            "reason": flag.reason,
            "score_ppm": flag.score_ppm,
            "threshold_ppm": flag.threshold_ppm,
            "rows": list(flag.rows),
            "count": flag.count,
            "of": flag.of,
            "kinds": dict(flag.kinds),
            "sources": list(flag.sources),
        }
    )


def _hold(client: Client, run: str, datanet: str, flag: Flag) -> bool:
    """Record the hold; whether the contribution is held now."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(flag.kinds.items()))
    body: dict[str, Any] = {
        "contribution": flag.contribution,
        "datanet": datanet,
        "reason": flag.reason,
        "note": f"{flag.count} of {flag.of} {_SAYS[flag.reason]} ({kinds})",
        "evidence_sha256": client.put_blob(report(flag)),
    }
    id = derived_id("contribution.held", flag.contribution, flag.reason)
    about = {"contribution": flag.contribution, "reason": flag.reason, "run": run}
    try:
        client.append_raw(client.sign("contribution.held", body, id=id))
    except Conflict as error:
        if error.detail.get("replayed") == str(id):
            return _still_held(client, run, flag.contribution, int(str(error.detail["index"])))
        log.info("contribution left out", why=error.message, **about)
        return True
    except Forbidden as error:  # the worker's own contribution: for others to judge
        log.warning("contribution not held", why=error.message, **about)
        return False
    log.info("contribution held", score_ppm=flag.score_ppm, **about)
    return True


def _still_held(client: Client, run: str, contribution: str, index: int) -> bool:
    """Whether the hold at leaf `index`, of an earlier attempt or run, is in force."""
    terms = client.wait_until(f"/v1/runs/{run}/terms", lambda found: found["log_size"] > index)
    if contribution in terms["held"]:
        return True
    log.info("contribution was released, and is trained on", contribution=contribution, run=run)
    return False
