"""The attribution loop: pending inferences in, `attribution.recorded` out.

Knows the client, the outbox and a handle that attributes; the engine itself sits behind the
handle (`actors.AttributionActor`), which takes the answers of one adapter several at a time. The
evidence is stored before the event that names its hash; the
event's id is derived from the inference, so a loop killed anywhere repeats itself harmlessly.

An event holds MAX_SHARES shares at most (`ledger.domain.events`). With more contributors the
largest are kept and what the others would get is *unattributed*, never spread over the kept ones.

What cannot be attributed now (a blob is missing, the actor restarts) is tried again, later and
later. It is never recorded as unattributed for that: a share lost to a hiccup would be lost for
good.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import structlog

from ledger.client import Client
from ledger.domain.events import MAX_SHARES
from ledger.domain.ids import derived_id
from ledger.errors import Conflict, LedgerError, Unavailable
from workers.outbox import Outbox

log = structlog.get_logger(__name__)

POLL_S = 0.5
MAX_PAUSE_S = 15.0
RETRY_S = 2.0
MAX_RETRY_S = 300.0
MAX_BATCH = 200
"""Inferences per step, so that the outbox and `stop` get their turn."""
TOGETHER = 16
"""Inferences of one adapter that the engine takes at once."""


@dataclass(frozen=True, kw_only=True)
class Attributed:
    """What `attribution.recorded` needs, and the evidence to store before it (canonical JSON).

    `shares` is (contributor, ppm); with `unattributed_ppm` it sums to 1,000,000.
    """

    run: str
    method: str
    index_sha256: str
    shares: list[tuple[str, int]]
    unattributed_ppm: int
    evidence: bytes


Inference = Mapping[str, Any]
Attribute = Callable[[Sequence[Inference]], Sequence[Attributed | LedgerError]]
"""Inferences of one adapter in, a result for each out. What it raises concerns all of them."""


class Attributor:
    """`run(stop)` steps until told to stop; `step()` attributes what is pending now."""

    def __init__(
        self,
        client: Client,
        outbox: Outbox,
        attribute: Attribute,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._outbox = outbox
        self._attribute = attribute
        self._clock = clock
        self._retry_at: dict[str, tuple[float, float]] = {}
        self._recorded: dict[str, None] = {}
        self._alone: set[str] = set()

    def run(self, stop: threading.Event) -> None:
        """Until `stop`; pauses longer while ledger or Ray do not answer."""
        pause_s = POLL_S
        while not stop.is_set():
            try:
                done = self.step(stop)
                pause_s = 0.0 if done == MAX_BATCH else POLL_S
            except Unavailable as error:
                pause_s = min(MAX_PAUSE_S, max(POLL_S, 2 * pause_s))
                log.warning("attribution waits", error=error.slug, why=error.message)
            except LedgerError as error:
                log.error("attribution failed", error=error.slug, why=error.message)
                pause_s = MAX_PAUSE_S
            stop.wait(pause_s)

    def step(self, stop: threading.Event | None = None) -> int:
        """How many were recorded. Raises Unavailable when ledger or Ray do not answer."""
        self._outbox.replay()
        done = 0
        for group in self._groups():
            if stop is not None and stop.is_set():
                break
            done += self._attributed(group)
        return done

    def _groups(self) -> list[list[Inference]]:
        """What is pending and due now, MAX_BATCH at most, by adapter, oldest first."""
        by_adapter: dict[str, list[Inference]] = {}
        alone: list[list[Inference]] = []
        for inference in islice(self._due(), MAX_BATCH):
            if inference["inference"] in self._alone:
                alone.append([inference])
            else:
                by_adapter.setdefault(str(inference["adapter"]), []).append(inference)
        together = [
            waiting[start : start + TOGETHER]
            for waiting in by_adapter.values()
            for start in range(0, len(waiting), TOGETHER)
        ]
        return together + alone

    def _due(self) -> Iterator[Inference]:
        for inference in self._client.pages("/v1/inferences", attribution="pending"):
            name = str(inference["inference"])
            wait_until, _ = self._retry_at.get(name, (0.0, 0.0))
            if name not in self._recorded and self._clock() >= wait_until:
                yield inference

    def _attributed(self, group: list[Inference]) -> int:
        try:
            results = self._attribute(group)
        except Unavailable as error:
            # Should one of these take the engine down, it must not take the others with it again.
            if len(group) == 1:
                self._later(str(group[0]["inference"]), error)
            self._alone |= {str(inference["inference"]) for inference in group}
            raise
        except LedgerError as error:
            for inference in group:
                self._later(str(inference["inference"]), error)
            return 0
        return sum(
            self._one(str(inference["inference"]), inference, found)
            for inference, found in zip(group, results, strict=True)
        )

    def _one(self, name: str, inference: Inference, found: Attributed | LedgerError) -> int:
        try:
            if isinstance(found, LedgerError):
                raise found
            shares, unattributed_ppm = limit_shares(found.shares, found.unattributed_ppm)
            body = {
                "inference": name,
                "adapter": inference["adapter"],
                "run": found.run,
                "method": found.method,
                "index_sha256": found.index_sha256,
                "evidence_sha256": self._client.put_blob(found.evidence),
                "shares": [{"contributor": who, "ppm": ppm} for who, ppm in shares],
                "unattributed_ppm": unattributed_ppm,
            }
            self._outbox.append("attribution.recorded", body, id=derived_id("attribution", name))
        except Unavailable as error:
            self._later(name, error)
            raise
        except Conflict as error:  # attributed already, by another worker
            log.info("not ours any more", inference=name, reason=error.message)
        except LedgerError as error:
            self._later(name, error)
            return 0
        self._retry_at.pop(name, None)
        self._alone.discard(name)
        self._remember(name)
        return 1

    def _later(self, name: str, error: LedgerError) -> None:
        limit_s = MAX_PAUSE_S if isinstance(error, Unavailable) else MAX_RETRY_S
        _, pause_s = self._retry_at.get(name, (0.0, RETRY_S / 2))
        pause_s = min(limit_s, 2 * pause_s)
        self._retry_at[name] = (self._clock() + pause_s, pause_s)
        log.warning("not attributed yet", inference=name, error=error.slug, why=error.message)

    def _remember(self, name: str) -> None:
        """The listing follows the log at a distance: do not attribute the same one meanwhile."""
        self._recorded[name] = None
        while len(self._recorded) > 10 * MAX_BATCH:
            del self._recorded[next(iter(self._recorded))]


def limit_shares(
    shares: Sequence[tuple[str, int]], unattributed_ppm: int, limit: int = MAX_SHARES
) -> tuple[list[tuple[str, int]], int]:
    """At most `limit` shares, the largest (ties by id); the rest becomes unattributed."""
    ranked = sorted(shares, key=lambda item: (-item[1], item[0]))
    kept, dropped = ranked[:limit], ranked[limit:]
    return sorted(kept), unattributed_ppm + sum(ppm for _, ppm in dropped)
