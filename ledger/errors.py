"""Every error that Tributary raises on purpose, and how the outer rooms report it.

::

    LedgerError
     |__ InvalidEvent          the caller sent something wrong              400, exit 2
     |    |__ TooLarge         over a named limit                           413, exit 2
     |__ Unauthenticated       no valid credential                          401, exit 3
     |__ Forbidden             who they are is known, they may not          403, exit 3
     |__ PaymentRequired       the prepaid balance does not cover it        402, exit 3
     |__ NotFound              404, exit 4
     |__ Conflict              stale, replayed or out of order              409, exit 5
     |__ Backpressure          too much at once: retry after                429, exit 6
     |__ Unavailable           an engine is down or not set up              503, exit 7
     |    |__ StorageError     PostgreSQL or the blob store
     |    |__ ChainError       the EVM node or a contract
     |    |__ ComputeError     Ray, training or serving
     |    |__ NotYetIncluded   stored, but not in a checkpoint in time
     |__ ConfigError           a setting is wrong                           500, exit 8
     |__ VerificationError     their data is wrong                          422, exit 1
          |__ MalformedProof   cannot be parsed as what it claims to be
          |__ BadSignature     a signature or its key does not check
          |__ NotIncluded      an inclusion proof does not lead to the root
          |__ Inconsistent     two statements contradict each other
          |__ AnchorMismatch   the L1 section does not prove the checkpoint

A message says what was wrong, what was expected and what to do. `status`, `exit_code` and
`title` are the one mapping to HTTP problem details (RFC 9457) and to CLI exit codes.
Our own mistakes are assertions, never one of these.
"""

import re
from typing import ClassVar


class LedgerError(Exception):
    """Root of every designed error. `detail` names fields an HTTP problem or `--json` carries."""

    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 8
    title: ClassVar[str] = "Ledger error"

    def __init__(self, message: str, **detail: object) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail

    @property
    def slug(self) -> str:
        """Kebab-case class name: the last segment of a problem's `type` URI."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower()


class InvalidEvent(LedgerError):
    """The caller's fault: bytes, fields or signature are not what the format says."""

    status, exit_code, title = 400, 2, "Invalid event"


class TooLarge(InvalidEvent):
    """Over a named limit; the message names the limit."""

    status, exit_code, title = 413, 2, "Too large"


class Unauthenticated(LedgerError):
    """No credential, or one that is not known."""

    status, exit_code, title = 401, 3, "Not authenticated"


class Forbidden(LedgerError):
    """The caller is known and may not do this."""

    status, exit_code, title = 403, 3, "Forbidden"


class PaymentRequired(LedgerError):
    """The prepaid balance, holds included, does not cover the highest possible fee."""

    status, exit_code, title = 402, 3, "Payment required"


class NotFound(LedgerError):
    """Nothing is recorded under that id."""

    status, exit_code, title = 404, 4, "Not found"


class Conflict(LedgerError):
    """Stale, replayed, or not allowed in the present state. Reload and decide again."""

    status, exit_code, title = 409, 5, "Conflict"


class Backpressure(LedgerError):
    """A bounded queue is full. Retry after `retry_after_s` seconds."""

    status, exit_code, title = 429, 6, "Too many requests"

    def __init__(self, message: str, *, retry_after_s: int = 1, **detail: object) -> None:
        super().__init__(message, retry_after_s=retry_after_s, **detail)
        self.retry_after_s = retry_after_s


class Unavailable(LedgerError):
    """An engine that this needs is down or not set up. Retrying later may help."""

    status, exit_code, title = 503, 7, "Unavailable"


class StorageError(Unavailable):
    """PostgreSQL or the blob store failed; the write did not happen or its fate is unknown."""

    title = "Storage unavailable"


class ChainError(Unavailable):
    """The EVM node or a contract refused or did not answer."""

    title = "Chain unavailable"


class ComputeError(Unavailable):
    """Ray, training or serving failed."""

    title = "Compute unavailable"


class NotYetIncluded(Unavailable):
    """The event is stored, and no checkpoint covered it while its sender waited. Ask for the proof
    later; do not send another event in its place."""

    title = "Stored, not yet included"


class ConfigError(LedgerError):
    """A setting is missing or contradicts another one."""

    status, exit_code, title = 500, 8, "Configuration error"


class VerificationError(LedgerError):
    """Root of everything the verifier may raise, whatever bytes it is fed."""

    status, exit_code, title = 422, 1, "Verification failed"


class MalformedProof(VerificationError):
    """Not the format it claims to be."""

    title = "Malformed proof"


class BadSignature(VerificationError):
    """A signature, or the key it names, does not check."""

    title = "Bad signature"


class NotIncluded(VerificationError):
    """The inclusion proof does not lead from the entry to the checkpoint's root."""

    title = "Not included"


class Inconsistent(VerificationError):
    """Two statements that should agree contradict each other."""

    title = "Inconsistent"


class AnchorMismatch(VerificationError):
    """The L1 section does not prove the checkpoint that it came with."""

    title = "Anchor mismatch"
