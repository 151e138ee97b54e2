"""structlog where it is installed, the standard library's logging where it is not.

The engine runs on machines that have torch and little else (the GPU bench needs nothing more than
torch, transformers, triton and safetensors); the service around it brings structlog.
"""

import logging
from typing import Any, Protocol


class Log(Protocol):
    def info(self, event: str, **fields: Any) -> Any: ...

    def warning(self, event: str, **fields: Any) -> Any: ...

    def exception(self, event: str, **fields: Any) -> Any:
        """An error, with the traceback of the exception that is being handled."""
        ...


class _Plain:
    """`event key=value key=value` as one line of `logging`."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(name)

    def info(self, event: str, **fields: Any) -> None:
        self._log.info("%s", _line(event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self._log.warning("%s", _line(event, fields))

    def exception(self, event: str, **fields: Any) -> None:
        self._log.exception("%s", _line(event, fields))


def _line(event: str, fields: dict[str, Any]) -> str:
    return " ".join([event, *(f"{key}={value}" for key, value in fields.items())])


def get_logger(name: str) -> Log:
    try:
        import structlog
    except ImportError:
        return _Plain(name)
    log: Log = structlog.get_logger(name)
    return log
