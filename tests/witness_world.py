"""Logs that fork at will, and real witness servers, for the tests of witnessing."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from nacl.signing import SigningKey

from ledger.api.witness import create_witness_app
from ledger.log import tree
from ledger.log.add_checkpoint import AddCheckpoint, format_request
from ledger.log.witness import KnownLog, Witness, open_witness
from ledger.verify.checkpoint import Checkpoint, format_checkpoint
from ledger.verify.merkle import leaf_hash, tree_root
from ledger.verify.note import VerifierKey, format_note, format_vkey, sign_text, vkey_of

ORIGIN = "log.example/one"
LOG_KEY = SigningKey(b"the log's own key for tests only")
LOG_VKEY = vkey_of(ORIGIN, LOG_KEY)
NOW_US = 1_700_000_000_000_000
NOW_S = NOW_US // 1_000_000


class Clock:
    """A clock that a test may set back."""

    def __init__(self, now: int = NOW_US) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


class Branch:
    """A history of a log: from leaf `fork` on, a different one for each `name`."""

    def __init__(
        self, name: str = "", fork: int = 0, key: SigningKey = LOG_KEY, origin: str = ORIGIN
    ) -> None:
        self.name, self.fork, self.key, self.origin = name, fork, key, origin

    def leaves(self, size: int) -> list[bytes]:
        return [
            leaf_hash(f"{n} {self.name if n >= self.fork else ''}".encode()) for n in range(size)
        ]

    def root(self, size: int) -> bytes:
        return tree_root(self.leaves(size))

    def text(self, size: int) -> str:
        return format_checkpoint(Checkpoint(origin=self.origin, size=size, root=self.root(size)))

    def note(self, size: int) -> bytes:
        text = self.text(size)
        return format_note(text, [sign_text(text, self.origin, self.key)])

    def proof(self, old: int, size: int) -> Sequence[bytes]:
        if old in (0, size):
            return ()
        stored = tree.integrate(0, self.leaves(size), lambda wanted: {})
        return tree.range_hashes(tree.consistency_ranges(old, size), lambda wanted: stored)

    def request(self, old: int, size: int, proof: Sequence[bytes] | None = None) -> bytes:
        nodes = self.proof(min(old, size), size) if proof is None else proof
        return format_request(
            AddCheckpoint(old_size=old, proof=tuple(nodes), checkpoint=self.note(size))
        )


@contextmanager
def witness_at(
    folder: Path, *, name: str = "w.example/1", logs: Sequence[VerifierKey] = (LOG_VKEY,),
    clock: Clock | None = None,
) -> Iterator[Witness]:  # fmt: skip
    known = [KnownLog(origin=key.name, key=key) for key in logs]
    with open_witness(folder, logs=known, clock=clock or Clock(), name=name) as witness:
        yield witness


@contextmanager
def served(witness: Witness, *, port: int = 0, **limits: int) -> Iterator[str]:
    """The witness on a real port; its URL."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        config = uvicorn.Config(create_witness_app(witness, **limits), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def policy_text(witnesses: Sequence[tuple[str, VerifierKey, str]], k: str = "all") -> str:
    """A policy of (name, key, url) with the quorum k of all of them."""
    lines = [f"witness {name} {format_vkey(key)} {url}" for name, key, url in witnesses]
    names = " ".join(name for name, _, _ in witnesses)
    return "\n".join([*lines, f"group everyone {k} {names}", "quorum everyone", ""])


def wait_for(condition: object, within_s: float = 10.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
