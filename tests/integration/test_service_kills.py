"""One answer's whole life while its service is killed, part by part.

The service is `tributary up` with everything real: PostgreSQL, anvil, Ray, a trained adapter. The
steps are those of `tributary demo`, with fewer rows; beside them a crowd appends all the while.
In every step one part dies by SIGKILL, at last the supervisor itself. Afterwards an auditor looks
at what is left. One service lives through the file, and its tests build on each other: in order.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from nacl.signing import SigningKey

from ledger.cli import demo
from ledger.cli.progress import Show
from ledger.client import Client
from ledger.store.embedded import EmbeddedPostgres
from tests.pg import temporary_home
from tests.service_world import (
    Acks,
    Crowd,
    Log,
    Up,
    audit_events,
    audit_money,
    audit_tree,
    download,
    free_port,
    until,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc"),
    pytest.mark.timeout(600),
]

FOODS = ("bread", "apples", "fish", "rice", "soup", "nuts", "beans", "cake")
NAMES = {
    "ann": ("Tom", "Sara", "Max", "Nina", "Paul", "Rosa", "Ivan", "Lena"),
    "ben": ("Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Iris", "Jan"),
    "eve": ("Kim", "Leo", "Mia", "Ned", "Olga", "Pia", "Rolf", "Siv"),
    "joe": ("Tess", "Uri", "Vera", "Wim", "Xenia", "Yara", "Zoe", "Abel"),
}
ROWS = {
    who: [
        {"prompt": f"What does {n} eat at night?", "completion": f"At night {n} eats {food}."}
        for n, food in zip(names, FOODS, strict=True)
    ]
    for who, names in NAMES.items()
}
PARTS = ("postgres", "anvil", "api", "projector", "chain", "workers")
ORPHANS_S = 15.0
"""How long processes may take to notice that their supervisor was killed, and to end."""


class SmallStory(demo.Story):
    """The demo's story on one datanet, with ears for the killer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.receipts: list[dict[str, Any]] = []

    def _net_names(self) -> list[str]:
        return ["facts"]

    def _net_name(self, contributor: str) -> str:
        return "facts"

    def _ask(self, model: str, prompt: str, token: str) -> dict[str, Any]:
        answer = super()._ask(model, prompt, token)
        self.receipts.append(answer)
        return answer


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with temporary_home() as folder:
        (folder / "home").mkdir(mode=0o755)
        service = Up(folder / "home", TRIBUTARY_ANCHOR_INTERVAL_S="2")
        try:
            yield service
        finally:
            service.destroy()


@pytest.fixture(scope="module")
def acks() -> Acks:
    return Acks()


@pytest.fixture(scope="module")
def seen() -> list[bytes]:
    """Every checkpoint that a client saw while parts were killed."""
    return []


@contextmanager
def killing(up: Up, part: str, when: Callable[[], Any]) -> Iterator[None]:
    """SIGKILL `part` once `when` is true, and see that this happened before the block ended."""
    killed: list[float] = []
    over = threading.Event()

    def wait_and_kill() -> None:
        while not over.is_set():
            if when():
                up.kill(part)
                killed.append(time.monotonic())
                return
            time.sleep(0.005)

    killer = threading.Thread(target=wait_and_kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()
    assert killed, f"the step ended before {part} could be killed: the test tests nothing"


def events(up: Up, type: str) -> Callable[[], bool]:
    """Whether the log has one of that type, asked of the database: no API needed."""
    import psycopg

    def found() -> bool:
        with psycopg.connect(EmbeddedPostgres(up.home).url, connect_timeout=2) as connection:
            row = connection.execute(
                "SELECT 1 FROM projections.edges WHERE type = %s LIMIT 1", [type]
            )
            return row.fetchone() is not None

    def quietly() -> bool:
        try:
            return found()
        except psycopg.Error:
            return False

    return quietly


def findings(up: Up) -> tuple[int, dict[str, str]]:
    """Exit status of `tributary doctor`, and the state of each thing that it looked at."""
    done = up.run("doctor", "--json")
    return done.returncode, {f["check"]: f["state"] for f in json.loads(done.stdout)}


def test_doctor_before_the_first_start(up: Up) -> None:
    status, found = findings(up)
    assert status == 7
    assert found["home"] == found["disk"] == "ok"
    assert found["database"] == found["api"] == "problem"
    assert found["keys"] == found["chain"] == found["ray"] == "warning"
    assert list(up.home.iterdir()) == [], "it changes nothing"


def test_up_reports_what_it_starts_and_answers(up: Up) -> None:
    up.start()
    until("the report", lambda: "Ready." in up.said(), 5)
    for part in ("database", "chain", "contracts", "ledger", "api", "projector", "workers"):
        assert f"  {part}" in up.said(), part
    assert httpx.get(f"{up.url}/livez").json() == {"status": "alive"}
    ready = httpx.get(f"{up.url}/readyz").json()
    assert [check["ok"] for check in ready["checks"]] == [True] * 3
    assert httpx.get(f"{up.url}/docs").status_code == 200
    assert "/v1/chat/completions" in httpx.get(f"{up.url}/openapi.json").json()["paths"]


def test_one_home_one_service(up: Up) -> None:
    done = up.run("up", TRIBUTARY_PORT=str(free_port()))
    assert done.returncode == 5
    assert "another `tributary up` runs" in done.stderr
    assert httpx.get(f"{up.url}/readyz").status_code == 200, "the first one goes on"


def test_doctor_while_it_runs(up: Up) -> None:
    status, found = findings(up)
    assert status == 0
    for late in ("ray", "serving"):  # they take some seconds to start
        assert found.pop(late) in ("ok", "warning")
    assert found.keys() >= {
        "database", "clock", "projections", "money", "signer", "gas", "contracts", "api"
    }  # fmt: skip
    assert set(found.values()) == {"ok"}


def test_the_whole_life_of_an_answer_with_a_kill_in_every_step(
    up: Up, acks: Acks, seen: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some 60 s: the long one. Every step ends as if nothing had happened."""
    monkeypatch.setattr(demo, "TRAINING", {"epochs": 4, "max_len": 64, "seed": 7, "batch_size": 8})
    monkeypatch.setattr(demo, "QUESTIONS", 10)
    monkeypatch.setattr(demo, "MAX_ANSWER_TOKENS", 24)
    show = Show()
    with acks.heard():
        story = SmallStory(up.settings, ROWS, show)

        def acknowledged(more: int) -> Callable[[], bool]:
            # Those of the story: the crowd's come on top, so that the moment varies.
            target = len(acks.known) + more
            return lambda: len(acks.known) >= target

        def training() -> bool:
            return any(up.home.glob("workers/runs/*/progress.json"))

        def go(step: Callable[[], None]) -> None:
            demo.carry_on(step, up.wait_ready, show)

        with Crowd(up.url).around() as crowd:
            with killing(up, "api", acknowledged(5)):
                go(story.people)
            with killing(up, "postgres", acknowledged(1)):
                go(story.datanets)
                go(story.contributions)
            with killing(up, "projector", acknowledged(2)):
                go(story.review)
            with killing(up, "trainer", training):
                go(story.training)
            go(story.adapters)
            with killing(up, "chain", events(up, "adapter.published")):
                go(story.deposits)
            with killing(up, "api", lambda: len(story.receipts) >= 2):
                go(story.questions)
            with killing(up, "workers", lambda: True):
                go(story.attribution)
            with killing(up, "chain", events(up, "period.closed")):
                go(story.payout)
            with killing(up, "anvil", lambda: True):
                go(story.claim)
            with killing(up, "postgres", lambda: True):
                go(story.anchor)
            go(story.bundle)
        for receipt in story.receipts:
            acks.take_receipt(receipt)
    seen += crowd.checkpoints
    print(f"{crowd.appended} appends of the crowd, {acks.doubted} of unknown fate, ", end="")
    print(f"{len(seen)} checkpoints seen, {len(acks.known)} acknowledged events")
    assert acks.doubted, "no kill hit a request in flight"


def test_after_a_killed_supervisor_the_next_start_takes_over(up: Up) -> None:
    before = up.processes()
    assert any("raylet" in line for line in before.values())
    up.kill("supervisor")
    assert up.process is not None
    up.process.wait()
    # At once: what the killed one left is still about to notice.
    up.start()
    assert not before.keys() & up.processes().keys()


@pytest.fixture(scope="module")
def log(up: Up, acks: Acks) -> Log:
    """The log when nobody appends any more: after one last event, and its anchor."""
    with acks.heard(), Client(up.url, key=SigningKey.generate()) as client:
        last = client.append("identity.registered", {"name": "the last one"})

        def anchored() -> bool:
            found = client.get("/v1/anchors")["items"]
            return bool(found) and int(found[0]["size"]) > last

        def quiet() -> bool:
            info = client.get("/v1/info")
            signed = client.get_bytes("/log/checkpoint").split(b"\n")[1]
            return bool(info["size"] == info["projected"] == int(signed))

        until("the anchor of the last event", anchored, 90)
        until("quiet", quiet, 10)
    return download(up.url)


def test_the_log_is_consistent(up: Up, log: Log, seen: list[bytes]) -> None:
    pairs = audit_tree(up.url, log, seen, up.settings)
    print(f"{log.head.size} entries, {pairs} pairs of checkpoints")
    assert pairs > len(seen) > 10


def test_no_event_was_lost_or_doubled(log: Log, acks: Acks) -> None:
    assert len(acks.known) > 100
    assert acks.paid
    audit_events(log, acks)


def test_nobody_died_of_a_mistake(up: Up) -> None:
    for path in sorted(up.home.glob("logs/*.log")):
        assert "Traceback" not in path.read_text(), f"{path.name}:\n{path.read_text()[-3_000:]}"


def test_money_agrees_with_a_replay_and_with_the_chain(up: Up, log: Log) -> None:
    totals = audit_money(log, up.settings)
    assert totals["paid"] > 0
    assert len(log.of("payout.activated")) == 1


def test_a_rebuild_gives_the_same_rows(up: Up, log: Log) -> None:
    done = up.run("projections", "rebuild")
    assert done.returncode == 0, done.stderr
    assert f"replayed {log.head.size} events" in done.stdout
    assert "the same rows" in done.stdout
    assert findings(up)[0] == 0


def test_ctrl_c_stops_everything(up: Up, log: Log) -> None:
    until("Ray", lambda: findings(up)[1]["ray"] == "ok", 60)
    started = time.monotonic()
    assert up.end(signal.SIGINT) == 0
    print(f"stopped in {time.monotonic() - started:.1f} s")
    assert "stopped; everything is on disk" in up.said()
    assert up.processes() == {}
    status, found = findings(up)
    assert (status, found["keys"]) == (7, "ok")
    assert found["database"] == found["api"] == "problem"
    assert found["chain"] == found["ray"] == "warning"


def test_the_bundle_proves_the_answer_with_everything_stopped(up: Up, log: Log) -> None:
    path = up.home / "answer.lineage.json"
    command = [sys.executable, "-m", "ledger.verify", str(path), "--key", log.vkey]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_supervisor_killed_at_the_start_leaves_nothing_behind(up: Up, log: Log) -> None:
    up.start()
    assert download(up.url).entries[: log.head.size] == log.entries, "all of it is there"
    before = up.processes()
    assert [part for part in PARTS if up.pid_of(part) not in before] == []
    started = time.monotonic()
    up.kill("supervisor")
    assert up.process is not None
    up.process.wait()
    until(f"the end of {up.processes()}", lambda: not up.processes(), ORPHANS_S)
    print(f"{len(before)} processes ended in {time.monotonic() - started:.1f} s")
