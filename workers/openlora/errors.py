"""What only the serving room can refuse, each with a stable `detail["code"]` for API clients.

The classes stay inside the hierarchy of `ledger.errors`, so that one place maps them to HTTP.
"""

from ledger.errors import InvalidEvent, NotFound, StorageError


class UnsupportedAdapter(InvalidEvent):
    """The adapter is well formed but this engine cannot serve it faithfully."""

    title = "Unsupported adapter"

    def __init__(self, message: str, **detail: object) -> None:
        super().__init__(message, code="unsupported_adapter", **detail)


class CorruptAdapter(StorageError):
    """The bytes on disk are not the bytes that were published."""

    title = "Corrupt adapter"

    def __init__(self, message: str, **detail: object) -> None:
        super().__init__(message, code="corrupt_adapter", **detail)


class PromptTooLong(InvalidEvent):
    """The prompt leaves no room for an answer in the context window."""

    title = "Prompt too long"

    def __init__(self, message: str, **detail: object) -> None:
        super().__init__(message, code="context_length_exceeded", **detail)


class UnknownAdapter(NotFound):
    """No adapter is published under that id, or it was retired."""

    title = "Unknown adapter"

    def __init__(self, adapter_id: str) -> None:
        super().__init__(
            f"adapter {adapter_id!r} is not published here or was retired; list the published ones",
            code="model_not_found",
            adapter=adapter_id,
        )
