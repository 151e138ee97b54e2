"""The log's memory of what it signed, put to the test on the running service: the API and its
sequencer as `tributary up` runs them, one real witness over HTTP, copies of the database.

What remembers: `log/signed.json` in the home, the newest checkpoint in the database, and what
others hold. An older copy of one is refused by the other (of the memory: test_log_signer.py), of
both together by the witness.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey
from psycopg.conninfo import conninfo_to_dict

from ledger.bootstrap import log_signer
from ledger.client import Client
from ledger.config import load_settings
from ledger.processes.roles import run_api
from ledger.processes.supervisor import open_ledger
from ledger.verify.note import VerifierKey
from tests.integration.test_witness_http import evidence_in, head, readiness, until
from tests.pg import create_database, drop_database
from tests.service_world import free_port
from tests.witness_world import policy_text, served, witness_at

MEMORY = Path("log", "signed.json")


class Place:
    """A home and its log; whichever database it is pointed at."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.home = home
        self._settings = settings
        self.vkey: VerifierKey = log_signer(load_settings(home=home)).vkey
        self.witness: dict[str, Any] = {}

    @contextmanager
    def serving(self, url: str) -> Iterator[tuple[str, threading.Thread]]:
        """Its URL; the thread ends by itself where the service stops itself."""
        settings = load_settings(home=self.home, database_url=url, port=free_port(), **self.witness)
        open_ledger(settings)
        stop = threading.Event()
        thread = threading.Thread(target=run_api, args=(settings, stop))
        thread.start()
        try:
            yield settings.url, thread
        finally:
            stop.set()
            thread.join(20)
            assert not thread.is_alive()

    def grow(self, url: str, name: str) -> int:
        """One event; its index."""
        until("an answer", lambda: readiness(url)[0] != 0)
        with Client(url, key=SigningKey(name.encode().ljust(32, b"."))) as client:
            return client.append("identity.registered", {"name": name})

    def live(self, url: str, names: list[str]) -> int:
        """A service that runs for a while, with an event by each name; the size it signed."""
        with self.serving(url) as (at, _):
            until("ready", lambda: readiness(at)[0] == 200)
            size = 1 + [self.grow(at, name) for name in names][-1]
            until("signed", lambda: head(at, self.vkey).checkpoint.size == size)
        return size


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "home")


@pytest.fixture
def copies(pg_server: str) -> Iterator[Any]:
    """Makes copies of a database that nobody uses, as from a backup."""
    made: list[str] = []

    def copy(url: str) -> str:
        made.append(create_database(pg_server, template=str(conninfo_to_dict(url)["dbname"])))
        return made[-1]

    yield copy
    for url in made:
        drop_database(pg_server, url)


def test_an_older_database_is_not_signed_again(place: Place, pg_url: str, copies: Any) -> None:
    place.live(pg_url, ["ann"])
    older = copies(pg_url)
    place.live(pg_url, ["ben", "cid"])
    memory = (place.home / MEMORY).read_bytes()
    with place.serving(older) as (_, service):
        service.join(20)
        assert not service.is_alive(), "the service stops rather than promise"
    assert (place.home / MEMORY).read_bytes() == memory
    place.live(pg_url, ["dan"])  # the newer data is back: as if nothing had happened


def test_a_memory_that_is_damaged_while_it_runs_stops_the_service(
    place: Place, pg_url: str
) -> None:
    """Without its sequencer it would go on to promise checkpoints that nobody signs."""
    with place.serving(pg_url) as (at, service):
        until("ready", lambda: readiness(at)[0] == 200)
        (place.home / MEMORY).write_text("{}")
        place.grow(at, "ann")
        service.join(20)
        assert not service.is_alive()


def test_both_restored_together_are_caught_by_the_witness(
    place: Place, pg_url: str, copies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ledger.log.cosign.CONFLICT_PAUSE_S", 0.2)
    with witness_at(tmp_path / "w", logs=[place.vkey]) as witness, served(witness) as at_witness:
        policy = tmp_path / "policy"
        policy.write_text(policy_text([("w", witness.vkey, at_witness)]))
        place.witness = {"witness_policy": policy, "witness_required": True}
        restored_size = place.live(pg_url, ["ann"])
        older = copies(pg_url)
        shutil.copy(place.home / MEMORY, tmp_path / "older")
        size = place.live(pg_url, ["ben", "cid", "dan"])

        shutil.copy(tmp_path / "older", place.home / MEMORY)
        evidence = place.home / "log" / "evidence"
        with place.serving(older) as (at, _):
            place.grow(at, "eve")  # smaller than what the witness has seen
            until("withheld", lambda: readiness(at)[0] == 503)
            until("evidence", lambda: bool(evidence_in(evidence, place.vkey)))
            assert "older backup" in readiness(at)[1]
            for name in ("fay", "gus", "hal"):  # and larger, but another history
                place.grow(at, name)
            until("proof", lambda: ("inconsistent", True) in evidence_in(evidence, place.vkey))
            assert head(at, place.vkey).checkpoint.size == restored_size < size
        latest = witness.latest(place.vkey.name)
        assert latest is not None
        assert latest.head.size == size
        assert witness.evidence
