"""When memory runs out: how to tell, and how much to ask for next.

The engine's answer has three steps. What can be spared is given back and the same work is tried
again. If that fails, the work is done in smaller parts: fewer prompt tokens, fewer rows at once.
What does not fit as the smallest part is refused, and only that request.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from ledger.errors import ComputeError

CALM_STEPS = 64
"""So many steps that went well, and twice as much is tried again."""
_PHRASES = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")

T = TypeVar("T")


def is_out_of_memory(e: BaseException) -> bool:
    """CUDA has a class for it; torch's CPU allocator raises RuntimeError with a sentence."""
    if isinstance(e, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(e, ComputeError):
        return e.detail.get("code") == "out_of_memory"
    return isinstance(e, RuntimeError) and any(p in str(e).lower() for p in _PHRASES)


def no_memory_for(what: str) -> ComputeError:
    """The refusal of one piece of work."""
    return ComputeError(
        f"the serving engine has no memory for {what}; retry later, or ask for less",
        code="out_of_memory",
    )


def with_memory(attempt: Callable[[], T], shed: Callable[[], int], what: str) -> T:
    """`attempt()`, once more after `shed()` when memory runs out, then ComputeError.

    `attempt` must be repeatable: it changes nothing, or the same thing again.
    """
    try:
        return attempt()
    except Exception as e:
        if not is_out_of_memory(e):
            raise
    shed()  # not inside `except`: the traceback holds on to the tensors of the attempt
    try:
        return attempt()
    except Exception as e:
        if not is_out_of_memory(e):
            raise
    raise no_memory_for(what)


class Allowance:
    """How much is tried at once: halves when it did not fit, doubles when all went well a while."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._calm = 0
        self.now = most

    def halve(self) -> bool:
        """Less from now on; False when it is as little as can be."""
        self._calm = 0
        if self.now == 1:
            return False
        self.now //= 2
        return True

    def worked(self) -> None:
        self._calm += 1
        if self._calm >= CALM_STEPS and self.now < self._most:
            self.now, self._calm = min(self._most, 2 * self.now), 0
