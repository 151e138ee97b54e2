"""One log through every fault: append, integrate, sign, publish and export, each of their steps
failed and killed, life after life, on one database, one home and one exported folder.

A step is a statement that reaches PostgreSQL (BEGIN and COMMIT too) or a system call that writes
a file. An undisturbed life says which there are. Then, for every one of them and every mode, a
life in a process of its own meets that fault; what it leaves is what the next life starts from:

* lost: the step does not happen, and an error is reported; a connection is cut.
* kept: the step happens, is on disk, and is reported failed.
* killed: SIGKILL right after the step, which is right before the next one.

A step that only reads is lost and no more: it leaves the same whatever became of its answer.

In every third life the clock stands four minutes back. A client outside keeps what it was told:
receipts, checkpoints, the exported checkpoint. It sends what was not acknowledged again, to the
byte. In the end the audit (our tree and pymerkle's, all signatures) and that client judge.
"""

import errno
import functools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pymerkle
import pytest
from nacl.signing import SigningKey

from ledger import bootstrap, files
from ledger.aggregates.application import Appended
from ledger.config import Settings, load_settings
from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import sign_event
from ledger.errors import Conflict, Unavailable
from ledger.log.audit import audit_log
from ledger.log.audit_files import FilesOpener
from ledger.log.audit_rows import RowsOpener
from ledger.log.export import export_log
from ledger.log.receipts import hold_against
from ledger.log.sequencer import Sequencer
from ledger.log.serving import LogFiles
from ledger.log.sources import FolderSource, StoreSource
from ledger.processes.supervisor import open_ledger
from ledger.store import recorder
from ledger.store.archive import ArchiveOpener
from ledger.store.postgres import PostgresEntryLog, connect
from ledger.store.recorder import system_clock
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.receipt import verify_receipt

PHASES = ("append", "sequence", "export")
TABLES = ("append_events", "stored_events", "log_head", "log_tiles", "log_checkpoints", "advisory")
CALLS = ("open", "fchmod", "fsync", "replace", "mkdir")
WRITES = {"INSERT", "COMMIT", "fsync", "replace", "mkdir"}
TRIES = 5
OPENING_EVENTS = 5
"""Of `open_ledger`."""
CLOCK_BACK_NS = 240 * 10**9
"""Within MAX_CLOCK_SKEW_US: beyond it a server refuses events from its own future."""


Faults = Mapping[str, str]
"""Modes by the name of their step: `phase what n`, the n-th of its kind in that phase."""


# --- one life, in a child process ---------------------------------------------------------------


class Steps:
    """Counts the steps of a life and lets its faults happen. Installed over the driver's statements
    and the system calls of `ledger.files`; nothing of the ledger itself is replaced."""

    def __init__(self, faults: Faults, tell: Callable[[Any], None]) -> None:
        self.phase = ""
        self._faults, self._tell = faults, tell
        self._seen: Counter[str] = Counter()

    def begin(self, phase: str) -> None:
        self.phase = phase

    def take(self, what: str, do: Callable[[], Any], fail: Callable[[], Exception]) -> Any:
        if not self.phase:
            return do()
        kind = f"{self.phase} {what}"
        self._seen[kind] += 1
        name = f"{kind} {self._seen[kind]}"
        self._tell({"step": name})
        mode = self._faults.get(name)
        if mode == "lost":
            raise fail()
        result = do()
        if mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "kept":
            raise fail()
        return result

    def install(self) -> None:
        real_execute = psycopg.Cursor.execute
        real_enter, real_exit = psycopg.Transaction.__enter__, psycopg.Transaction.__exit__

        def cut(connection: Any) -> Callable[[], Exception]:
            def fail() -> Exception:
                connection.close()
                return psycopg.OperationalError("server closed the connection unexpectedly")

            return fail

        def execute(cursor: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            def do() -> Any:
                return real_execute(cursor, query, *args, **kwargs)

            text = query if isinstance(query, str) else query.as_string()
            table = next((table for table in TABLES if table in text), None)
            if table is None:  # SET, LISTEN, the pool's own questions
                return do()
            return self.take(f"{text.split()[0]} {table}", do, cut(cursor.connection))

        def enter(transaction: Any) -> Any:
            return self.take("BEGIN", lambda: real_enter(transaction), cut(transaction.connection))

        def leave(transaction: Any, *error: Any) -> Any:
            def do() -> Any:
                return real_exit(transaction, *error)

            return do() if error[0] else self.take("COMMIT", do, cut(transaction.connection))

        psycopg.Cursor.execute = execute  # type: ignore[assignment,method-assign]
        psycopg.Transaction.__enter__ = enter  # type: ignore[method-assign]
        psycopg.Transaction.__exit__ = leave  # type: ignore[assignment,method-assign]
        vars(files)["os"] = _System(self)


class _System:
    """`os`, as `ledger.files` sees it."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real
        return lambda *args, **kwargs: self._steps.take(
            name, lambda: real(*args, **kwargs), lambda: OSError(errno.EIO, "Input/output error")
        )


def live(settings: Settings, raws: list[list[bytes]], steps: Steps, tell: Any) -> None:
    """Append, sequence, export; what fails is tried again, as senders, `Sequencer.run` and an
    operator's timer do."""
    with bootstrap.store(settings, pool_size=2) as box, bootstrap.application(box) as ledger:
        signer = bootstrap.log_signer(settings)
        issuer = bootstrap.receipt_issuer(settings, signer, box.tiles)
        sequencer = Sequencer(log=box.entries, tiles=box.tiles, signer=signer, clock=system_clock)

        def receipt(appended: list[Appended]) -> dict[str, Any]:
            return issuer.issue(
                first_index=appended[0].index,
                leaf_hashes=[a.leaf_hash for a in appended],
                recorded_at=appended[0].recorded_at,
                fresh=not appended[0].replayed,
            )

        def sequence() -> None:
            with box.tiles.sequencer_lock() as held:
                if not held:
                    raise Conflict("the killed one's session has not ended yet")
                while sequencer.step():
                    pass

        steps.begin("append")
        for number, together in enumerate(raws):
            appended = patiently(functools.partial(ledger.append_all, together))
            tell({"stored": number, "receipt": receipt(appended)})
        steps.begin("sequence")
        patiently(sequence)
        steps.begin("export")
        source = StoreSource(LogFiles(log=box.entries, tiles=box.tiles), vkey=signer.vkey_text)
        patiently(lambda: export_log(source, settings.root / "export", signer.vkey))
        steps.begin("")


def patiently(do: Callable[[], Any]) -> Any:
    for _ in range(TRIES):
        with suppress(Unavailable, Conflict):
            return do()
        time.sleep(0.05)
    return do()


def be_born(settings: Settings, raws: list[list[bytes]], faults: Faults, back: bool) -> list[Any]:
    """A life in a child; what it told until its end, which must be the one its faults ask for."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)

            def tell(said: Any) -> None:
                os.write(writing, json.dumps(said).encode() + b"\n")

            if back:
                real_ns = time.time_ns
                time.time_ns = lambda: real_ns() - CLOCK_BACK_NS
            recorder.RETRY_WAIT_S = 0.01  # nobody else is there to wait for
            steps = Steps(faults, tell)
            steps.install()
            live(settings, raws, steps, tell)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(3)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        told = [json.loads(line) for line in said]
    _, status = os.waitpid(child, 0)
    killed = any({"step": step} in told for step, mode in faults.items() if mode == "killed")
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if killed else 0), faults
    return told


# --- the client outside -------------------------------------------------------------------------


@dataclass
class Client:
    """Sends until acknowledged, and forgets nothing that it was told."""

    settings: Settings
    pending: list[list[bytes]] = field(default_factory=list)
    receipts: list[tuple[list[bytes], dict[str, Any]]] = field(default_factory=list)
    notes: dict[bytes, None] = field(default_factory=dict)
    lives: int = 0

    def through_a_life(self, faults: Faults) -> list[str]:
        """The steps it took. One event alone, and three together, new in each life."""
        self.pending += [[self.event()], [self.event(), self.event(), self.event()]]
        sent = list(self.pending)
        told = be_born(self.settings, sent, faults, back=self.lives % 3 == 2)
        self.lives += 1
        stored = {said["stored"]: said["receipt"] for said in told if "stored" in said}
        self.receipts += [(sent[n], receipt) for n, receipt in stored.items()]
        self.pending = [raws for n, raws in enumerate(sent) if n not in stored]
        self.look()
        return [said["step"] for said in told if "step" in said]

    def event(self) -> bytes:
        return sign_event(
            SigningKey.generate(),
            type="identity.registered",
            log=self.settings.log_origin,
            body={"name": "somebody"},
            id=uuid4(),
            at=system_clock(),
        )

    def look(self) -> None:
        """Keep the checkpoints that are served now, by the database and by the folder."""
        newest = "SELECT note FROM log_checkpoints ORDER BY size DESC LIMIT 1"
        with psycopg.connect(str(self.settings.database_url)) as connection:
            for (note,) in connection.execute(newest):
                self.notes[bytes(note)] = None
        served = self.settings.root / "export" / "checkpoint"
        if served.exists():
            self.notes[served.read_bytes()] = None


@pytest.fixture
def client(pg_url: str, tmp_path: Path) -> Client:
    settings = load_settings(home=tmp_path, database_url=pg_url, log_origin="log.example/faults")
    open_ledger(settings)
    return Client(settings)


def lives(steps: list[str]) -> Iterator[Faults]:
    """Every step lost; every write kept, too, and killed right after. One death a life, of the
    failures one in each phase. (What only reads leaves the same when its answer is lost.)"""
    for mode in ("lost", "kept"):
        chosen = [step for step in steps if mode == "lost" or is_write(step)]
        by_phase = [[step for step in chosen if step.startswith(phase)] for phase in PHASES]
        for together in zip_longest(*by_phase):
            yield dict.fromkeys(filter(None, together), mode)
    for step in filter(is_write, steps):
        yield {step: "killed"}


def is_write(step: str) -> bool:
    return step.split()[1] in WRITES or "append_events" in step


@pytest.mark.timeout(240)
def test_every_step_lost_kept_and_killed(client: Client) -> None:
    client.through_a_life({})
    undisturbed = client.through_a_life({})
    assert {step.partition(" ")[0] for step in undisturbed} == set(PHASES)
    met: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for faults in lives(undisturbed):
        # What the last life left may need fewer steps of a kind; the one after has them again.
        left = dict(faults)
        for _ in range(3):
            taken = client.through_a_life(left)
            met.update(left[step] for step in taken if step in left)
            left = {step: mode for step, mode in left.items() if step not in taken}
            if not left:
                break
        wanted.update(faults.values())
    assert met == wanted, "a fault that did not happen tests nothing"
    client.through_a_life({})
    assert not client.pending
    print(f"{len(undisturbed)} steps, {dict(met)} in {client.lives} lives, {judge(client)} entries")


def judge(client: Client) -> int:
    """The audit of database and folder; the client's receipts and checkpoints. Entries."""
    settings, folder = client.settings, client.settings.root / "export"
    key = bootstrap.log_signer(settings).vkey
    opener = RowsOpener(open_archive=ArchiveOpener(url=str(settings.database_url)))
    report = audit_log(opener, key)
    files_opener = FilesOpener(open_source=functools.partial(FolderSource, folder))
    exported = audit_log(files_opener, key, signatures=False)
    for found in (report, exported):
        assert found.ok, [str(finding) for finding in found.findings]
    assert report.size == exported.size
    # Nothing acknowledged is lost or moved, nothing is doubled: by its receipt, and by its bytes.
    with connect(str(settings.database_url)) as pool:
        entries = PostgresEntryLog(pool).entries(0, report.size)
    raws = [entry[16:] for entry in entries]
    assert len(set(raws)) == len(raws)
    source = FolderSource(folder)
    for sent, told in client.receipts:
        receipt = verify_receipt(canonical_json(told), key)
        first = receipt.promise.first_index
        assert raws[first : first + len(sent)] == sent
        assert hold_against(source, receipt, key, now=system_clock()).state == "kept"
    told_of = {raw for sent, _ in client.receipts for raw in sent}
    assert len(client.receipts) == 2 * client.lives
    assert len(raws) - len(told_of) == OPENING_EVENTS, "and nothing else is there"
    # Every checkpoint that was ever seen is the root of its first entries.
    heads = [open_checkpoint(note, key).checkpoint for note in client.notes]
    roots = {head.size: head.root for head in heads}
    assert len({(head.size, head.root) for head in heads}) == len(roots), "one size, two roots"
    oracle = pymerkle.InmemoryTree(algorithm="sha256")
    for size, entry in enumerate(entries, 1):
        oracle.append_entry(entry)
        assert roots.get(size, oracle.get_root()) == oracle.get_root(), size
    assert report.size in roots
    return report.size
