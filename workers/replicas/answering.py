"""One answer on its way through the router: what was produced so far, and how long it may go on.

Pure but for the clock that is passed in. `ids` are all tokens that the caller was given, in order:
with them any replica continues the answer token for token, as the seed is the request's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ledger.errors import Backpressure, ComputeError, LedgerError
from ledger.ports import ChatDelta, ChatRequest
from workers.replicas.protocol import Ended, Failed, Piece

READY_WITHIN_S = 30.0
"""How long a new request waits for a replica to be ready: one may be starting."""
RESUME_WITHIN_S = 90.0
"""How long an answer that broke off waits for a replica that continues it: time for Ray to be
started again and a model to be loaded."""
MAX_RESUMES = 3
"""A request that brings down one replica after another ends with the third."""
FIRST_PIECE_TIMEOUT_S = 120.0
"""Until the first piece from a replica: its queue, a cold adapter."""
PIECE_TIMEOUT_S = 60.0
MIN_TIMEOUT_S = 0.001


@dataclass(kw_only=True)
class Answering:
    """`timeout_s` and all limits count from `submitted`, or from the break that they are about."""

    request: ChatRequest
    clock: Callable[[], float]
    submitted: float
    ids: list[int] = field(default_factory=list)
    resumes: int = 0
    broke_off: float | None = None
    """When the replica was lost that answered last; None while one answers."""
    full: dict[str, Backpressure] = field(default_factory=dict)
    """Replicas that refused it in this round, with what they said."""
    cancelled: bool = False

    @property
    def begun(self) -> bool:
        """Whether a replica has had it: then it is resumed, and no longer refused."""
        return bool(self.ids) or self.resumes > 0

    def left_s(self) -> float | None:
        """What is left of the caller's own time limit; None without one."""
        if self.request.timeout_s is None:
            return None
        return self.submitted + self.request.timeout_s - self.clock()

    def timeout_s(self) -> float | None:
        """The same for an engine, which takes none that is not above zero."""
        left_s = self.left_s()
        return None if left_s is None else max(left_s, MIN_TIMEOUT_S)

    def wait_s(self) -> float:
        """How long it may still wait for a replica."""
        since, limit_s = self.submitted, READY_WITHIN_S
        if self.broke_off is not None:
            since, limit_s = self.broke_off, RESUME_WITHIN_S
        return since + limit_s - self.clock()

    def piece_timeout_s(self, first: bool) -> float:
        return FIRST_PIECE_TIMEOUT_S if first else PIECE_TIMEOUT_S

    def take(self, piece: Piece) -> ChatDelta:
        """What the caller gets for a piece that is no failure."""
        self.ids += piece.token_ids
        self.broke_off = None
        end = piece.end
        assert not isinstance(end, Failed)
        if isinstance(end, Ended):
            return ChatDelta(
                text=piece.text,
                finish_reason=end.reason,
                prompt_tokens=end.prompt_tokens,
                # A request that was cancelled before the engine had it knows of no tokens.
                completion_tokens=max(end.completion_tokens, len(self.ids)),
                logprobs=piece.chances,
            )
        return ChatDelta(text=piece.text, completion_tokens=len(self.ids), logprobs=piece.chances)

    def cut(self, reason: str) -> ChatDelta:
        """The last piece of an answer that no replica is there to end."""
        return ChatDelta(finish_reason=reason, completion_tokens=len(self.ids))

    def broken(self, error: LedgerError) -> None:
        """It broke off in a way that another replica may mend; raises when that was enough."""
        if self.resumes >= MAX_RESUMES:
            raise ComputeError(
                f"the answer broke off {self.resumes + 1} times (MAX_RESUMES); retry: "
                f"{error.message}",
            ) from error
        self.resumes += 1
        if self.broke_off is None:
            self.broke_off = self.clock()
