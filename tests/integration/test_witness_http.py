"""Witnessing for real: witness processes that are killed, the API with its sequencer on PostgreSQL
behind a policy of two, and a log that forks under its own key."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from nacl.signing import SigningKey

from ledger.client import Client
from ledger.config import load_settings
from ledger.log.add_checkpoint import MAX_REQUEST_BYTES, checkpoint_path, parse_cosignature
from ledger.log.keyfile import read_signer_key
from ledger.processes.roles import run_api
from ledger.processes.supervisor import open_ledger
from ledger.verify.checkpoint import OpenedCheckpoint, open_checkpoint
from ledger.verify.evidence import check_evidence, parse_evidence
from ledger.verify.note import VerifierKey, format_vkey, parse_note, parse_vkey, vkey_of
from ledger.verify.policy import parse_policy
from tests.witness_world import (
    LOG_VKEY,
    ORIGIN,
    Branch,
    policy_text,
    served,
    wait_for,
    witness_at,
)

MAIN = Branch()
COMMAND = "from ledger.cli.main import main; main()"
# The memory is written or not, and the process is gone before the answer leaves.
KILLED_AFTER = """
import os, signal, ledger.log.witness as room
room.format_cosignature = lambda line: os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_BEFORE = """
import os, signal, ledger.log.witness as room
room.write_durably = lambda path, data: os.kill(os.getpid(), signal.SIGKILL)
"""
START_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """`tributary witness run` on one folder and port, whatever becomes of the process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.port = folder, name, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_vkey = LOG_VKEY
        made = self._command("vkey", "--name", name)
        self.vkey: VerifierKey = parse_vkey(made.strip())
        self.process: subprocess.Popen[bytes] | None = None

    def _command(self, verb: str, *more: str) -> str:
        words = [sys.executable, "-c", COMMAND, "witness", verb, "--dir", str(self.folder), *more]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def start(self, *, fault: str = "") -> None:
        words = ["witness", "run", "--dir", str(self.folder), "--port", str(self.port)]
        words += ["--log", format_vkey(self.log_vkey)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", fault + COMMAND, *words], stdout=subprocess.DEVNULL
        )
        wait_for(self.answers, START_S)

    def answers(self) -> bool:
        assert self.process
        assert self.process.poll() is None, "the witness ended"
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/livez").status_code == 200
        return False

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait(10)

    def ask(self, body: bytes) -> httpx.Response:
        return httpx.post(f"{self.url}/add-checkpoint", content=body, timeout=20)

    def evidence(self) -> list[tuple[str, bool]]:
        return evidence_in(self.folder / "evidence", self.log_vkey)


def evidence_in(folder: Path, log: VerifierKey) -> list[tuple[str, bool]]:
    found = []
    for path in sorted(folder.glob("*.json")):
        evidence = parse_evidence(path.read_bytes())
        verdict = check_evidence(evidence, format_vkey(log))
        found.append((evidence.kind, bool(verdict.facts["conclusive"])))
    return found


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    found = Process(tmp_path / "witness", "w.example/1")
    yield found
    found.kill()


def test_statuses_and_headers_over_http(tmp_path: Path) -> None:
    with witness_at(tmp_path) as witness, served(witness) as url, httpx.Client(base_url=url) as web:

        def ask(body: bytes) -> tuple[int, str, bytes]:
            answer = web.post("/add-checkpoint", content=body)
            return answer.status_code, answer.headers["content-type"], answer.content

        text = "text/plain; charset=utf-8"
        status, kind, body = ask(MAIN.request(0, 5))
        assert (status, kind) == (200, text)
        parse_cosignature(body, MAIN.text(5), witness.vkey)
        assert ask(MAIN.request(0, 9)) == (409, "text/x.tlog.size", b"5\n")
        assert ask(Branch("fork").request(5, 5))[:2] == (409, text)
        assert ask(Branch("fork").request(5, 9))[:2] == (422, text)
        assert ask(MAIN.request(9, 5))[:2] == (400, text)
        assert ask(Branch(origin="other").request(0, 5))[:2] == (404, text)
        assert ask(Branch(key=SigningKey(bytes(32))).request(5, 9))[:2] == (403, text)
        assert ask(b"x" * (MAX_REQUEST_BYTES + 1))[0] == 413
        assert web.post("/add-checkpoint", content=iter([b"old 5\n"] * 20_000)).status_code == 413
        assert web.get("/add-checkpoint").status_code == 405
        assert web.get("/nothing").status_code == 404
        note = web.get(f"/{checkpoint_path(ORIGIN)}")
        assert (note.headers["content-type"], note.headers["cache-control"]) == (text, "no-store")
        assert open_checkpoint(note.content, LOG_VKEY).checkpoint.size == 5
        assert web.get(f"/{'0' * 64}/checkpoint").status_code == 404
        about = web.get("/").json()
        assert about["vkey"] == witness.vkey_text
        assert [(log["origin"], log["size"]) for log in about["logs"]] == [(ORIGIN, 5)]
        metrics = web.get("/metrics").text
        assert f'tributary_witness_cosigned_size{{log="{ORIGIN}"}} 5.0' in metrics
        assert 'answers_total{route="add-checkpoint",status="200"} 1.0' in metrics
        assert "tributary_witness_evidence_files 2.0" in metrics


def test_a_caller_has_so_many_requests_a_minute(tmp_path: Path) -> None:
    with witness_at(tmp_path) as witness, served(witness, requests_per_minute=3) as url:
        found = [httpx.post(f"{url}/add-checkpoint", content=b"x") for _ in range(4)]
    assert [answer.status_code for answer in found] == [400, 400, 400, 429]
    assert int(found[-1].headers["retry-after"]) > 0


@pytest.mark.parametrize(("fault", "told"), [(KILLED_AFTER, b"5\n"), (KILLED_BEFORE, b"0\n")])
def test_killed_around_its_memory(process: Process, fault: str, told: bytes) -> None:
    """After: the tree is remembered and nobody has the cosignature; before: nothing happened."""
    process.start(fault=fault)
    with pytest.raises(httpx.TransportError):
        process.ask(MAIN.request(0, 5))
    assert process.process
    assert process.process.wait(10) == -signal.SIGKILL
    process.start()
    answer = process.ask(MAIN.request(3, 9))
    assert (answer.status_code, answer.content) == (409, told)
    old = int(told)
    if old:  # what it remembers binds it, though it never answered
        assert process.ask(Branch("fork").request(5, 5)).status_code == 409
        assert process.evidence() == [("split-view", True)]
    answer = process.ask(MAIN.request(old, 5))
    assert answer.status_code == 200
    parse_cosignature(answer.content, MAIN.text(5), process.vkey)


def test_a_terminated_witness_ends_in_order(process: Process) -> None:
    process.start()
    assert process.process
    assert process.ask(MAIN.request(0, 5)).status_code == 200
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(15) == 0


# --- the whole service ---


@contextmanager
def service(**settings: Any) -> Iterator[tuple[str, Path]]:
    """The API and its sequencer as `tributary up` runs them; URL and home."""
    found = load_settings(port=free_port(), **settings)
    open_ledger(found)
    stop = threading.Event()
    thread = threading.Thread(target=run_api, args=(found, stop))
    thread.start()
    try:
        yield found.url, found.root
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def readiness(url: str) -> tuple[int, str]:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=10)
    except httpx.HTTPError:
        return 0, ""
    return answer.status_code, answer.text


def head(url: str, vkey: VerifierKey, *witnesses: VerifierKey) -> OpenedCheckpoint:
    note = httpx.get(f"{url}/log/checkpoint", timeout=10).content
    return open_checkpoint(note, vkey, witnesses=witnesses)


def until(what: str, condition: Callable[[], bool], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_log_behind_two_witnesses(pg_url: str, tmp_path: Path) -> None:
    one, two = (Process(tmp_path / n, f"{n}.example") for n in ("one", "two"))
    home = tmp_path / "home"
    policy_file = tmp_path / "policy"
    rows = [(w.name, w.vkey, w.url) for w in (one, two)]
    policy_file.write_text(policy_text(rows))
    policy = parse_policy(policy_file.read_bytes())
    with ExitStack() as stack:
        for witness in (one, two):
            stack.callback(witness.kill)
        log_vkey = _log_key(home, pg_url)
        for witness in (one, two):
            witness.log_vkey = log_vkey
            witness.start()
        settings = {
            "home": home, "database_url": pg_url, "witness_policy": policy_file,
            "witness_required": True, "witness_timeout_s": 1.0,
        }  # fmt: skip
        url, _ = stack.enter_context(service(**settings))
        until("ready", lambda: readiness(url)[0] == 200)

        # Both cosigned what is published, and a stranger with the policy sees it.
        opened = head(url, log_vkey, *policy.keys)
        assert policy.satisfied_by([v.key for v in opened.witnesses])

        # One dies: appends go on, checkpoints do not, and /readyz says why.
        two.kill()
        before = opened.checkpoint.size
        with Client(url, key=SigningKey(b"ann".ljust(32, b"."))) as ann:
            ann.append("identity.registered", {"name": "Ann"})
        until("withheld", lambda: readiness(url)[0] == 503)
        assert "without two.example" in readiness(url)[1]
        time.sleep(1.5)  # some more tries of the sequencer
        assert head(url, log_vkey).checkpoint.size == before

        # It comes back with its memory: the checkpoint is out, with both lines.
        two.start()
        until("published", lambda: head(url, log_vkey).checkpoint.size > before)
        opened = head(url, log_vkey, *policy.keys)
        assert policy.satisfied_by([v.key for v in opened.witnesses])
        until("ready again", lambda: readiness(url)[0] == 200)
        assert not one.evidence() + two.evidence()

        # The same key signs another history: no witness cosigns it, and both keep the proof.
        _, key = read_signer_key(home / "keys" / "log.key")
        fork = Branch("fork", key=key, origin=log_vkey.name)
        size = opened.checkpoint.size
        for witness in (one, two):
            assert witness.ask(fork.request(size, size)).status_code == 409
            assert witness.ask(fork.request(size, size + 9)).status_code == 422
            assert ("split-view", True) in witness.evidence()
            assert witness.ask(fork.request(0, size + 9)).content == b"%d\n" % size


def _log_key(home: Path, pg_url: str) -> VerifierKey:
    from ledger.bootstrap import log_signer

    return log_signer(load_settings(home=home, database_url=pg_url)).vkey


def test_without_required_the_absent_witness_follows(
    pg_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ledger.log.cosign.RECOSIGN_S", 0.2)
    monkeypatch.setattr("ledger.log.cosign.MAX_PAUSE_S", 0.2)
    home = tmp_path / "home"
    log_vkey = _log_key(home, pg_url)
    port = free_port()
    with witness_at(tmp_path / "w", logs=[log_vkey]) as witness:
        policy_file = tmp_path / "policy"
        policy_file.write_text(policy_text([("w", witness.vkey, f"http://127.0.0.1:{port}")]))
        with service(home=home, database_url=pg_url, witness_policy=policy_file) as (url, _):
            until("ready", lambda: readiness(url)[0] == 200)  # nobody is waited for
            assert len(parse_note(httpx.get(f"{url}/log/checkpoint").content).signatures) == 1
            with served(witness, port=port):
                until(
                    "cosigned afterwards",
                    lambda: bool(head(url, log_vkey, witness.vkey).witnesses),
                )
            assert "1 of the 1 needed" in readiness(url)[1]
            assert not (home / "log" / "evidence").exists()


def test_settings_that_cannot_work(pg_url: str, tmp_path: Path) -> None:
    from ledger.bootstrap import log_cosigners
    from ledger.errors import ConfigError

    policy = tmp_path / "policy"
    other = vkey_of("other.example", SigningKey(bytes(32)))
    for text, match in {
        None: "cannot read the witness policy",
        "nonsense": "line 1 of the policy",
        f"log {format_vkey(other)}\nquorum none\n": "other logs",
    }.items():
        if text is not None:
            policy.write_text(text)
        settings = load_settings(home=tmp_path, database_url=pg_url, witness_policy=policy)
        with pytest.raises(ConfigError, match=match), log_cosigners(settings):
            pass
    settings = load_settings(home=tmp_path, database_url=pg_url, witness_required=True)
    with pytest.raises(ConfigError, match="TRIBUTARY_WITNESS_POLICY"), log_cosigners(settings):
        pass


def test_what_log_means_on_the_command_line() -> None:
    from ledger.errors import ConfigError
    from ledger.processes.witness import known_log

    text = format_vkey(LOG_VKEY)
    assert known_log(f" {text}\n").origin == ORIGIN
    assert known_log(f"{text} go.sum database tree").origin == "go.sum database tree"
    assert known_log(f"{text} x").key == LOG_VKEY
    with pytest.raises(ConfigError, match="/log/vkey"):
        known_log(ORIGIN)
