"""What one API process knows of its answers: those under way, those that the ledger still owes an
event, those whose client may ask again, and the journal on disk."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock

from ledger.api.answers.answer import Answer
from ledger.api.answers.journal import Intent, Journal
from ledger.errors import Unavailable

MAX_OWED = 10_000
"""Answers that wait for the ledger to come back; beyond it no answer is begun."""
MAX_UNDELIVERED = 4_096
"""Answers that are remembered for a client who asks again because this one did not reach him."""


@dataclass(kw_only=True)
class Running:
    """An answer under way. `request_sha256` is that of the request; `over` is set at its end."""

    request_sha256: str
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, kw_only=True)
class Owed:
    """An answer that the ledger could not take. `reason` where it broke off, None where it is
    whole and was delivered: then its fee stays held."""

    answer: Answer
    intent: Intent
    reason: str | None


class Desk:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.running: dict[str, Running] = {}
        self.owed: dict[str, Owed] = {}
        self.unsettled: frozenset[str] = frozenset()
        """Answers of processes that died, which the ledger does not have yet."""
        self.looked = False
        """Whether the journals of processes before us have been read."""
        self._undelivered: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._lock = Lock()

    def check_room(self) -> None:
        if len(self.owed) >= MAX_OWED:
            raise Unavailable(
                f"{len(self.owed)} answers wait to be recorded, MAX_OWED = {MAX_OWED}: the ledger "
                "cannot be reached; retry later"
            )

    def not_delivered(self, consumer: str, request_sha256: str, inference: str) -> None:
        """From the beginning of an answer until its client has it."""
        with self._lock:
            self._undelivered[consumer, request_sha256] = inference
            while len(self._undelivered) > MAX_UNDELIVERED:
                self._undelivered.popitem(last=False)

    def delivered(self, consumer: str, request_sha256: str, inference: str) -> None:
        with self._lock:
            if self._undelivered.get((consumer, request_sha256)) == inference:
                del self._undelivered[consumer, request_sha256]

    def undelivered(self, consumer: str, request_sha256: str) -> str | None:
        """The id of the newest answer to this very request that did not reach its client."""
        with self._lock:
            return self._undelivered.get((consumer, request_sha256))
