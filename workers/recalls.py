"""Adapters out of service whose data was withdrawn, where the datanet's policy says so.

Knows the client and the outbox. The ledger says which recalls are due: published adapters whose
training manifest names a contribution that was withdrawn since, of a datanet whose policy is to
retire them. One event each, with an id derived from the adapter, so that a loop killed anywhere
repeats itself harmlessly. Serving follows by itself: it looks at the adapter's status.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from ledger.client import Client
from ledger.domain.events import MAX_TEXT_CHARS
from ledger.domain.ids import derived_id
from ledger.errors import LedgerError, Unavailable
from workers.outbox import Outbox

log = structlog.get_logger(__name__)

POLL_S = 3.0
AGAIN_S = 60.0
"""The listing follows the log at a distance; and what the ledger refused may be due again."""


class Recalls:
    """`step()` recalls what is due, at most every POLL_S seconds."""

    def __init__(
        self, client: Client, outbox: Outbox, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._outbox = outbox
        self._clock = clock
        self._next = clock()
        self._tried: dict[str, float] = {}

    def step(self) -> int:
        """How many were recalled. Raises Unavailable when the ledger does not answer; what it
        refuses is logged, and holds up no other."""
        now = self._clock()
        if now < self._next:
            return 0
        self._next = now + POLL_S
        self._tried = {name: until for name, until in self._tried.items() if until > now}
        done = 0
        for due in self._client.pages("/v1/adapters", recall="due"):
            if due["adapter"] not in self._tried:
                self._tried[due["adapter"]] = now + AGAIN_S
                done += self._recall(due)
        return done

    def _recall(self, due: Mapping[str, Any]) -> int:
        adapter = str(due["adapter"])
        said = f": {due['withdrawal']}" if due["withdrawal"] else ""
        body = {
            "adapter": adapter,
            "contribution": due["contribution"],
            "datanet": due["datanet"],
            "reason": f"a contribution that it was trained on was withdrawn{said}"[:MAX_TEXT_CHARS],
        }
        try:
            self._outbox.append(
                "adapter.recalled", body, id=derived_id("adapter.recalled", adapter)
            )
        except Unavailable:
            raise
        except LedgerError as error:
            log.warning("not recalled", adapter=adapter, error=error.slug, why=error.message)
            return 0
        log.info("adapter recalled", adapter=adapter, contribution=due["contribution"])
        return 1
