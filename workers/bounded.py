"""A call that may never return, with a limit.

Ray's own calls (`init`, `shutdown`, `get_actor`, making an actor) have no time limit of their own,
or one that a dead cluster does not keep. Here such a call runs on a daemon thread: past its limit
the caller goes on, and the thread is left to hang. It keeps whatever Ray holds in this process, so
a process that has seen `Hangs` should end itself, with `os._exit` where nothing may wait.

Never an executor's thread: Python joins those when it ends, without a limit.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ledger.errors import ComputeError

T = TypeVar("T")


class Hangs(ComputeError):
    """A call did not return in time, and may never."""


def bounded(what: str, call: Callable[[], T], limit_s: float) -> T:
    """What `call` returns or raises. Raises Hangs after `limit_s` seconds."""
    box: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            box.append((call(), None))
        except BaseException as error:
            box.append((None, error))

    thread = threading.Thread(target=run, name=f"bounded {what}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not box:
        raise Hangs(f"{what} did not return within {limit_s:g} s")
    value, error = box[0]
    if error is not None:
        raise error
    found: T = value
    return found
