"""What a monitor finds: alarms, each with the strongest evidence that could be had.

Every attempt at evidence is judged before it is kept (`kept_evidence`), so an attempt may fail: the
caller then tries something weaker. The file is on disk before anybody hears of the alarm.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ledger.log.kept_evidence import EvidenceFolder
from ledger.ports import Clock
from ledger.verify.evidence import one_line
from ledger.verify.note import VerifierKey

MAX_ALARMS_PER_LOOK = 16

Items = Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A rule was broken. `path` is the evidence file's, None when nothing could be written;
    `conclusive` when its bytes alone convince others."""

    kind: str
    says: str
    path: Path | None
    conclusive: bool


class Stop(Exception):
    """An alarm after which this look cannot go on."""


@dataclass(kw_only=True)
class Look:
    """What one look at the log has gathered so far. `spoiled`: an entry is bad, so the state must
    not move past it unasked; `more` counts alarms beyond MAX_ALARMS_PER_LOOK."""

    alarms: list[Alarm] = field(default_factory=list)
    more: int = 0
    unchecked: list[str] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    witnesses: tuple[str, ...] = ()
    entries: int = 0
    spoiled: bool = False


class Findings:
    """Turns findings about one log into alarms of the present look."""

    def __init__(self, folder: Path, *, log: str, key: VerifierKey, clock: Clock) -> None:
        self._folder = EvidenceFolder(folder, clock=clock)
        self._log, self._key = log, key
        self.look = Look()

    def attempt(self, kind: str, says: str, items: Items) -> bool:
        """An alarm, if the items show it."""
        path = self._folder.keep(kind, log=self._log, key=self._key, says=says, items=items)
        if path is not None:
            self._raise(kind, says, path)
        return path is not None

    def alarm(self, kind: str, says: str, items: Items) -> None:
        """An alarm in any case: a full disk or folder must not silence it."""
        if not self.attempt(kind, says, items):
            self._raise(kind, says, None)

    def stop(self, kind: str, says: str, items: Items) -> NoReturn:
        self.alarm(kind, says, items)
        raise Stop

    def stop_if(self, kind: str, says: str, items: Items) -> None:
        """Stop, if the items show it."""
        if self.attempt(kind, says, items):
            raise Stop

    def _raise(self, kind: str, says: str, path: Path | None) -> None:
        if len(self.look.alarms) >= MAX_ALARMS_PER_LOOK:
            self.look.more += 1
            return
        conclusive = path is not None and path.name.startswith("proven-")
        self.look.alarms.append(
            Alarm(kind=kind, says=one_line(says), path=path, conclusive=conclusive)
        )
