"""What Ray raises, as the errors of `ledger.errors`. Knows Ray's exceptions and nothing else."""

from ray import exceptions as rx

from ledger.errors import ComputeError, LedgerError
from workers.replicas.errors import plain


def designed(error: BaseException) -> LedgerError:
    """The designed error behind what a Ray call raised; ComputeError (retryable) for the rest.

    An error of an inner room comes back as its ancestor in `ledger.errors`, whose name the API's
    clients know; message and detail stay.
    """
    if isinstance(error, LedgerError):
        return plain(error)
    if isinstance(error, rx.RayTaskError):
        if isinstance(error.cause, LedgerError):
            return plain(error.cause)
        return ComputeError(
            f"a worker made a mistake ({type(error.cause).__name__}: {error.cause}); its log in "
            "<home>/workers/ray/logs says where"
        )
    if isinstance(error, rx.TaskCancelledError):
        return ComputeError("the work was cancelled")
    if isinstance(error, rx.RayActorError | rx.WorkerCrashedError | rx.NodeDiedError):
        return ComputeError("the worker process died; it is being restarted, retry")
    if isinstance(error, rx.GetTimeoutError | TimeoutError):
        return ComputeError("the worker did not answer in time; retry")
    return ComputeError(f"Ray failed: {type(error).__name__}: {str(error)[:300]}")
