"""A folder of one's own for work that takes long, where other processes have theirs.

Whoever works in a place holds its lock shared; who gets it alone knows that nobody works there, and
that what lies there was left by a process that was killed. The kernel drops the lock however a
process ends, so nothing is ever swept from under somebody, and nothing stays for ever.
"""

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from ledger.errors import Unavailable

LOCK = "lock"
SWEEP_WAIT_S = 60.0
"""How long another may take to sweep a place before we give up."""
_POLL_S = 0.02


@contextmanager
def workplace(place: Path) -> Iterator[Path]:
    """A fresh folder in `place`, gone afterwards. What killed processes left there is swept when
    nobody else works in it; Unavailable when somebody sweeps for over SWEEP_WAIT_S."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / LOCK).open("a") as lock:
        if _locked(lock, fcntl.LOCK_EX):
            _sweep(place)
        _share(lock, place)
        with TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as work:
            yield Path(work)


def _sweep(place: Path) -> None:
    for left in place.iterdir():
        if left.name != LOCK:
            shutil.rmtree(left, ignore_errors=True)


def _share(lock: TextIO, place: Path) -> None:
    """From alone to shared, which is two steps to the kernel: another may sweep between them. It
    finds nothing of ours, since our folder is made afterwards."""
    deadline = time.monotonic() + SWEEP_WAIT_S
    while not _locked(lock, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            raise Unavailable(f"another process has been sweeping {place} for {SWEEP_WAIT_S:.0f} s")
        time.sleep(_POLL_S)


def _locked(lock: TextIO, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
