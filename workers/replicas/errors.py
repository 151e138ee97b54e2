"""Designed errors between processes: class name, message and fields, and back.

Only the classes of `ledger.errors` travel. An error of an inner room arrives as its ancestor there,
whose name the API's clients know; message and detail stay. Knows no Ray and no gRPC.
"""

from collections.abc import Mapping
from typing import Any

from ledger import errors
from ledger.errors import Backpressure, ComputeError, LedgerError

MAX_MESSAGE_CHARS = 2_000

_CLASSES: Mapping[str, type[LedgerError]] = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, LedgerError)
}
_SCALARS = (str, int, float, bool, type(None))


def plain(error: LedgerError) -> LedgerError:
    """The error as an instance of its nearest class in `ledger.errors`."""
    return _made(_known(error), error.message, error.detail)


def to_wire(error: LedgerError) -> dict[str, Any]:
    detail = {k: v if isinstance(v, _SCALARS) else str(v) for k, v in error.detail.items()}
    return {
        "error": _known(error).__name__,
        "message": error.message[:MAX_MESSAGE_CHARS],
        "detail": detail,
    }


def from_wire(value: Mapping[str, Any]) -> LedgerError:
    """What `to_wire` was given, plain. A class that this version does not know is ComputeError."""
    cls = _CLASSES.get(str(value.get("error")), ComputeError)
    return _made(cls, str(value.get("message", "")), value.get("detail") or {})


def _known(error: LedgerError) -> type[LedgerError]:
    found = next(c for c in type(error).__mro__ if c.__module__ == errors.__name__)
    assert issubclass(found, LedgerError)
    return found


def _made(cls: type[LedgerError], message: str, detail: Mapping[str, Any]) -> LedgerError:
    fields = {str(k): v for k, v in detail.items()}
    if issubclass(cls, Backpressure):
        seconds = int(str(fields.pop("retry_after_s", 1)))
        return cls(message, retry_after_s=seconds, **fields)
    return cls(message, **fields)
