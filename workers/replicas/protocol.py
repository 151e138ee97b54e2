"""What a client and a replica say to each other: method names, messages, limits. Bytes are msgpack.

    Session   stream <-> stream   a client's process holds one to each replica
        client:   {"submit": {...}}, {"cancel": number}
        replica:  {"hello": {...}} first, then {"pieces": [...], "state": s, "others": n}
    Count     messages or prompt -> tokens
    Stats     the engine's counts
    Health    the hello
    Drain     refuse what is new; the hello

A request is known by its number within its session. The replica sends one message for all that an
engine step brought to a client's requests, and one every HEARTBEAT_S when there is nothing to say:
a session that is silent for SILENCE_S is dead, whatever TCP says. `others` is how many requests of
other clients the replica has, so that every client knows its load.

Every call carries the home's secret (`registry.secret`) as `authorization: Bearer <secret>`. Within
one machine that is all; between machines the network must be private, as it must be for Ray.
Knows neither gRPC's library nor torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgpack

from ledger.errors import ComputeError, InvalidEvent, LedgerError
from ledger.ports import ChatRequest, TokenChance
from workers.replicas import errors

SERVICE = "tributary.replica.v1.Replica"
SESSION, COUNT, STATS, HEALTH, DRAIN = "Session", "Count", "Stats", "Health", "Drain"

MAX_MESSAGE_BYTES = 8 * 2**20
"""Of one message either way; a prompt of `chat.MAX_CHARS` characters fits."""
MAX_SESSIONS = 64
MAX_REQUESTS_PER_SESSION = 4_096
MAX_PENDING = 65_536
"""Tokens, log probabilities counted too, that wait for one client to read. Beyond it that client's
requests are cancelled: the engine's rows are for those who read."""
MAX_UNREAD_TOKENS = 16_384
"""Tokens that the client's process keeps for one reader who does not come for them."""
HEARTBEAT_S = 1.0
SILENCE_S = 20.0
"""Many heartbeats: loading a model or a long prompt may hold the interpreter for seconds."""

READY, DRAINING = "ready", "draining"

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # No proxy of the environment stands between two processes of ours.
    ("grpc.enable_http_proxy", 0),
)


CLIENT_OPTIONS = (
    *CHANNEL_OPTIONS,
    # Else a new channel inherits the old one's pause before it may connect, up to two minutes.
    ("grpc.use_local_subchannel_pool", 1),
)


def path(method: str) -> str:
    return f"/{SERVICE}/{method}"


def credentials(secret: str) -> tuple[tuple[str, str], ...]:
    """Call metadata."""
    return (("authorization", f"Bearer {secret}"),)


def pack(value: Any) -> bytes:
    data: bytes = msgpack.packb(value)
    return data


def unpack(data: bytes) -> Any:
    return msgpack.unpackb(data)


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Who answers. `instance` is new with every start of a process."""

    name: str
    instance: str
    pid: int
    base_model: str
    state: str
    stuck_s: float = 0.0
    """For how long the engine has had work and made no step."""

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, value: Mapping[str, Any]) -> "Hello":
        return cls(**_known(cls, value))


@dataclass(frozen=True, kw_only=True)
class Submit:
    """A request. `resume_ids` are the tokens that another replica produced for it already; they
    are part of the answer and are not sent again. `timeout_s` is what is left of its time."""

    number: int
    request: ChatRequest
    resume_ids: tuple[int, ...] = ()
    timeout_s: float | None = None

    def to_wire(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "request": asdict(self.request),
            "resume_ids": list(self.resume_ids),
            "timeout_s": self.timeout_s,
        }

    @classmethod
    def from_wire(cls, value: Mapping[str, Any]) -> "Submit":
        """Raises InvalidEvent when it is none."""
        try:
            return cls(
                number=int(value["number"]),
                request=ChatRequest(**_known(ChatRequest, value["request"])),
                resume_ids=tuple(int(i) for i in value["resume_ids"]),
                timeout_s=value["timeout_s"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidEvent(f"not a request of this protocol: {error!r:.200}") from error


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an answer ended; the counts include resumed tokens."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Why an answer broke off. `resumable`: another replica, or this one later, could go on."""

    error: LedgerError
    resumable: bool = False


@dataclass(frozen=True, kw_only=True)
class Piece:
    """New tokens of one request, and the text that they made certain; the last one has `end`."""

    number: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    chances: tuple[TokenChance, ...] = ()
    end: Ended | Failed | None = None

    @property
    def weight(self) -> int:
        """What it counts for under MAX_PENDING."""
        return len(self.token_ids) + sum(1 + len(c.top) for c in self.chances)

    def to_wire(self) -> list[Any]:
        chances = [[c.text, c.raw, c.logprob, [list(t) for t in c.top]] for c in self.chances]
        return [self.number, self.text, list(self.token_ids), chances, _end_to_wire(self.end)]

    @classmethod
    def from_wire(cls, value: Any) -> "Piece":
        number, text, ids, chances, end = value
        return cls(
            number=number,
            text=text,
            token_ids=tuple(ids),
            chances=tuple(
                TokenChance(text=t, raw=raw, logprob=p, top=tuple((a, b, c) for a, b, c in top))
                for t, raw, p, top in chances
            ),
            end=_end_from_wire(end),
        )

    def then(self, later: "Piece") -> "Piece":
        """This piece and the next one of the same request as one."""
        assert self.number == later.number
        assert self.end is None, "nothing follows the last piece"
        return Piece(
            number=self.number,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            chances=self.chances + later.chances,
            end=later.end,
        )


def _end_to_wire(end: Ended | Failed | None) -> Any:
    if isinstance(end, Ended):
        return asdict(end)
    if isinstance(end, Failed):
        return {**errors.to_wire(end.error), "resumable": end.resumable}
    return None


def _end_from_wire(value: Any) -> Ended | Failed | None:
    if value is None:
        return None
    if "error" in value:
        return Failed(error=errors.from_wire(value), resumable=bool(value.get("resumable")))
    return Ended(**_known(Ended, value))


def _known(cls: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this version knows: a peer may be one version ahead."""
    names = {f.name for f in fields(cls)}
    return {k: v for k, v in value.items() if k in names}


class Lost(ComputeError):
    """The way to a replica broke, or it cannot go on: what it was answering may be resumed."""
