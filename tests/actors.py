"""People and keys for tests, and a ledger in memory with the library's own recorder."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

from nacl.signing import SigningKey

from ledger.aggregates.application import Appended, Gate, Ledger
from ledger.domain.envelope import encode_entry, sign_event
from ledger.domain.ids import actor_of

LOG = "ledger.example/test"
NOW = 1_700_000_000_000_000
H = "ab" * 32
HEX = "0x" + "cd" * 32
ADDRESS = "0x" + "12" * 20


class Actor:
    """A key that signs events for one log. `seed` makes the same person every time."""

    def __init__(self, seed: int, log: str = LOG) -> None:
        self.key = SigningKey(seed.to_bytes(32, "big"))
        self.id = actor_of(bytes(self.key.verify_key))
        self.log = log

    def sign(
        self, type: str, body: Mapping[str, Any], *, id: UUID | None = None, at: int = NOW
    ) -> bytes:
        return sign_event(self.key, type=type, log=self.log, body=body, id=id or uuid4(), at=at)


OPERATOR, OWNER, ANN, BEN, DEV, EVE = (Actor(n) for n in range(1, 7))


class MemoryLedger:
    """A Ledger on the library's in-memory recorder, opened, with every actor registered."""

    def __init__(self, gates: Mapping[str, Gate] | None = None, *, opened: bool = True) -> None:
        self.entries: dict[UUID, bytes] = {}
        self.ledger = Ledger(
            log=LOG,
            operator=OPERATOR.id,
            clock=lambda: NOW,
            entries_of=self._entries_of,
            gates=gates,
        )
        if opened:
            self.do(OPERATOR, "ledger.opened", {"name": "test"})
            for n, actor in enumerate((OPERATOR, OWNER, ANN, BEN, DEV, EVE)):
                self.do(actor, "identity.registered", {"name": f"actor {n}"})

    def do(
        self, actor: Actor, type: str, body: Mapping[str, Any], *, id: UUID | None = None
    ) -> Appended:
        return self.append(actor.sign(type, body, id=id))

    def append(self, raw: bytes) -> Appended:
        return self.append_all([raw])[0]

    def append_all(self, raws: Sequence[bytes]) -> list[Appended]:
        stored = self.ledger.append_all(raws)
        for one in stored:
            entry = encode_entry(one.index, one.recorded_at, one.envelope.raw)
            self.entries[one.envelope.id] = entry
        return stored

    def _entries_of(self, ids: Sequence[UUID]) -> dict[UUID, bytes]:
        return {id: self.entries[id] for id in ids if id in self.entries}
