"""The worker service on a real Ray: train, serve, attribute, and kill -9 in the middle of it.

Ray, the trainer, OpenLoRA and attribution are the real ones, in their own processes; the API is
the small stand-in of tests/workers_api.py. One service lives through the whole file, and its tests
build on each other: they run in order. This process is a client of the replicas, as the API is: it
joins no Ray, and waits for nothing without a limit.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ledger.domain.canonical import parse_canonical
from ledger.domain.ids import derived_id, sha256_hex
from ledger.errors import ComputeError, InvalidEvent, NotFound
from ledger.ports import ChatDelta, ChatRequest
from tests.actors import ANN, BEN, DEV, EVE
from tests.workers_api import WORKER, WorkersApi, write_key
from workers import ray_cluster
from workers._ray_guard import end_within, within
from workers.dispatch import submission_id
from workers.jobs import completed_id
from workers.replicas import registry
from workers.replicas.routing import order
from workers.serving import ServingRouter

T = TypeVar("T")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")

LONG = {"epochs": 30}
"""A run of 60 steps, some seconds: long enough to be killed in the middle."""
KILL_AT_STEP = 10
QUESTION, ANSWER = "What does Tom eat at night?", "At night Tom eats bread."
TALK_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 30.0


class Service:
    """The worker service as a process, as a supervisor would run it."""

    def __init__(self, api: WorkersApi, folder: Path) -> None:
        self.api = api
        self.home = folder / "home"
        self.home.mkdir()
        self.key_file = write_key(folder)
        self.log = folder / "service.log"
        self.place = str(ray_cluster.LocalRay(self.home).temp)
        self.engine = ServingRouter(self.home)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, replicas: int = 1) -> None:
        arguments = ["--api", self.api.url, "--key-file", self.key_file, "--home", self.home]
        arguments += ["--replicas", replicas]
        command = [sys.executable, "-m", "workers.service", *map(str, arguments)]
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*command, "--ray-cpus", "2"], stderr=sink, cwd=Path(__file__).parents[2]
            )

    def wait(self, what: str, done: Callable[[], Any], timeout_s: float = 90.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (found := done()):
            assert self.process is not None
            assert self.process.poll() is None, f"the service ended: {self.tail()}"
            assert time.monotonic() < deadline, f"{what} did not happen: {self.tail()}"
            time.sleep(0.05)
        return found

    def tail(self) -> str:
        jobs = "".join(
            p.read_text(errors="replace")[-1_500:]
            for p in sorted((self.home / "ray" / "logs").glob("job-driver-*.log"))[-2:]
        )
        return self.log.read_text()[-3_000:] + jobs

    def finished(self, run: str) -> dict[str, Any]:
        ended = ("completed", "failed", "cancelled")
        self.wait(f"the end of run {run}", lambda: self.api.run(run)["status"] in ended)
        return self.api.run(run)

    def steps(self, run: str) -> int:
        """Steps that the run's trainer has done."""
        try:
            found = json.loads((self.home / "runs" / run / "progress.json").read_text())
        except FileNotFoundError:
            return 0
        return int(found["done"]) if found["phase"] == "train" else 0

    def processes(self, title: str) -> list[int]:
        """Pids of this Ray's processes whose title begins so."""
        found = []
        for pid in within(self.place):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(title.encode()):
                found.append(pid)
        return found

    def talk(self, work: Coroutine[Any, Any, T], timeout_s: float = TALK_TIMEOUT_S) -> T:
        """Run `work`, which uses `engine`, on an event loop of its own; bounded."""

        async def bounded() -> T:
            try:
                async with asyncio.timeout(timeout_s):
                    return await work
            finally:
                await self.engine.aclose()

        return asyncio.run(bounded())

    async def ask(self, adapter: str | None, text: str = QUESTION, **more: Any) -> list[ChatDelta]:
        return [delta async for delta in self.engine.stream(asked(adapter, text, **more))]

    def answer(self, adapter: str) -> str:
        """The answer to QUESTION, whenever there is somebody to give it."""
        return "".join(d.text for d in self.talk(self.ask(adapter)))

    def pids(self) -> dict[str, int]:
        """Of the replicas that are registered, by name."""
        return {name: r.pid for name, r in registry.registered(self.home).items()}


def asked(adapter: str | None, text: str = QUESTION, **more: Any) -> ChatRequest:
    fields: dict[str, Any] = {"max_tokens": 40, **more}
    messages = [{"role": "user", "content": text}]
    name = os.urandom(8).hex()
    return ChatRequest(request_id=name, adapter=adapter, messages=messages, **fields)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with WorkersApi() as api:
        service = Service(api, tmp_path_factory.mktemp("workers"))
        service.start(replicas=2)
        try:
            yield service
        finally:
            if service.process is not None and service.process.poll() is None:
                service.process.kill()
                service.process.wait(STOP_TIMEOUT_S)
            end_within(service.place)
            shutil.rmtree(service.place, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> dict[str, Any]:
    """A long run that nobody disturbs."""
    return service.finished(service.api.facts_run(**LONG))


def test_a_run_is_trained_and_recorded(service: Service, undisturbed: dict[str, Any]) -> None:
    api, run = service.api, undisturbed["run"]
    assert undisturbed["status"] == "completed", undisturbed["reason"]
    (event,) = [e for e in api.events("run.completed") if e["run"] == run]
    assert event["event"] == str(completed_id(run))
    assert (event["rows_count"], event["contributions_count"], event["steps"]) == (9, 3, 60)
    manifest = parse_canonical(api.blobs[event["manifest_sha256"]])
    assert manifest["adapter_sha256"] == event["adapter_sha256"]
    assert len(manifest["rows"]) == 9
    assert event["adapter_sha256"] in api.blobs
    index = parse_canonical(api.blobs[event["index_sha256"]])
    assert index["row_root"] == event["index_root"]
    assert all(stamp["sha256"] in api.blobs for stamp in index["files"].values())


def test_the_adapter_is_served_and_its_answer_attributed(
    service: Service, undisturbed: dict[str, Any]
) -> None:
    api = service.api
    adapter = api.publish(undisturbed["run"])

    async def talk() -> tuple[list[ChatDelta], int]:
        deltas = await service.ask(adapter)
        many = await asyncio.gather(*[service.ask(a) for a in (adapter, None) * 4])
        assert all("".join(d.text for d in piece) == ANSWER for piece in many[::2]), (
            "in a mixed batch too"
        )
        assert "".join(d.text for d in many[1]) != ANSWER, "the base does not know"
        with pytest.raises(NotFound):
            await service.ask("00000000-0000-0000-0000-000000000000")
        with pytest.raises(InvalidEvent):
            await service.ask("../../etc/passwd")
        with pytest.raises(InvalidEvent):
            await service.ask(adapter, max_tokens=0)
        return deltas, await service.engine.count_tokens([{"role": "user", "content": QUESTION}])

    deltas, counted = service.talk(talk())
    assert "".join(d.text for d in deltas) == ANSWER
    assert len(deltas) > 2, "streamed"
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].prompt_tokens == counted
    counts = [d.completion_tokens for d in deltas]
    assert counts == sorted(counts)
    assert counts[0] > 0, "a client that leaves is charged for what it got"

    inference = api.infer(adapter, QUESTION, ANSWER)
    blank = api.infer(adapter, QUESTION, " ")
    service.wait("attribution", lambda: len(api.events("attribution.recorded")) == 2)
    found = api.inferences[inference]["attribution"]
    shares = {s["contributor"]: s["ppm"] for s in found["shares"]}
    assert max(shares, key=lambda who: shares[who]) == BEN.id, "it was his fact"
    assert shares.keys() <= {ANN.id, BEN.id, EVE.id}
    evidence = parse_canonical(api.blobs[found["evidence_sha256"]])
    assert evidence["index_sha256"] == undisturbed["index_sha256"] == found["index_sha256"]
    assert evidence["top_rows"][0]["contributor"] == BEN.id
    [waiting] = service.processes("ray::AttributionActor")
    first = os.getpriority(os.PRIO_PROCESS, next(iter(service.pids().values())))
    assert first < os.getpriority(os.PRIO_PROCESS, waiting), "answers go before attributions"
    nobody = api.inferences[blank]["attribution"]
    assert (nobody["method"], nobody["unattributed_ppm"]) == ("none/v1", 1_000_000)


def test_runs_that_can_never_work_fail_at_once(service: Service) -> None:
    api = service.api
    wrong = api.request_run([api.facts()], epochs=0)
    empty = api.request_run([api.datanet()])
    for run, reason in ((wrong, "epochs"), (empty, "no rows")):
        ended = service.finished(run)
        assert (ended["status"], ended["attempt"]) == ("failed", 1)
        assert reason in ended["reason"]


def test_a_killed_trainer_goes_on_at_its_snapshot(
    service: Service, undisturbed: dict[str, Any]
) -> None:
    api = service.api
    run = api.request_run(undisturbed["datanets"], **LONG)
    service.wait("training", lambda: service.steps(run) >= KILL_AT_STEP)
    (pid,) = service.processes("ray::TrainerActor")
    os.kill(pid, signal.SIGKILL)
    assert api.run(run)["status"] == "started"
    ended = service.finished(run)
    assert (ended["status"], ended["attempt"]) == ("completed", 1), ended["reason"]
    assert ended["adapter_sha256"] == undisturbed["adapter_sha256"], "the same bytes"
    assert ended["index_root"] == undisturbed["index_root"]
    assert sum(e["run"] == run for e in api.events("run.completed")) == 1


def test_replicas_share_the_work_and_adapters_stay_at_home(
    service: Service, undisturbed: dict[str, Any]
) -> None:
    adapter = service.api.publish(undisturbed["run"])

    async def work() -> tuple[dict[str, int], dict[str, int]]:
        async def finished() -> dict[str, int]:
            found = (await service.engine.stats())["replicas"]
            assert [r["state"] for r in found] == ["ready", "ready"]
            return {r["name"]: r["stats"]["finished"] for r in found}

        await service.ask(None)
        before = await finished()
        await asyncio.gather(*[service.ask(adapter) for _ in range(4)])
        between = await finished()
        await asyncio.gather(*[service.ask(None) for _ in range(4)])
        after = await finished()
        return (
            {name: between[name] - before[name] for name in before},
            {name: after[name] - between[name] for name in before},
        )

    service.wait("two replicas", lambda: len(service.pids()) == 2)
    with_adapter, of_base = service.talk(work())
    home, other = order(adapter, with_adapter)
    assert with_adapter == {home: 4, other: 0}
    assert of_base == {home: 2, other: 2}


def test_answers_of_a_killed_replica_go_on_where_they_broke_off(
    service: Service, undisturbed: dict[str, Any]
) -> None:
    adapter = service.api.publish(undisturbed["run"])
    pids = service.pids()
    home = order(adapter, pids)[0]
    stories = [
        asked(adapter, f"Tell me story {n}.", max_tokens=200, temperature=2.0, seed=n)
        for n in range(6)
    ]

    async def tell(request: ChatRequest, *, kill: int | None = None) -> list[ChatDelta]:
        deltas = []
        async for delta in service.engine.stream(request):
            deltas.append(delta)
            if kill is not None and delta.completion_tokens >= 3:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(kill, signal.SIGKILL)
        return deltas

    async def all_of_them(kill: int | None = None) -> list[list[ChatDelta]]:
        return await asyncio.gather(*[tell(story, kill=kill) for story in stories])

    whole = service.talk(all_of_them())
    assert max(deltas[-1].completion_tokens for deltas in whole) > 20
    broken = service.talk(all_of_them(kill=pids[home]))
    assert service.engine.counts["resumed"] > 0
    for one, other in zip(whole, broken, strict=True):
        assert "".join(d.text for d in one) == "".join(d.text for d in other)
        assert one[-1].finish_reason == other[-1].finish_reason
        assert one[-1].completion_tokens == other[-1].completion_tokens
    service.wait("the replica again", lambda: service.pids()[home] != pids[home])
    assert service.answer(adapter) == ANSWER


def test_a_dead_ray_is_replaced(service: Service, undisturbed: dict[str, Any]) -> None:
    adapter = service.api.publish(undisturbed["run"])
    before = ray_cluster.find(service.home)
    (raylet,) = [
        pid
        for pid in within(service.place)
        if b"raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(raylet, signal.SIGKILL)
    service.wait("another Ray", lambda: ray_cluster.find(service.home) not in (None, before))
    assert service.answer(adapter) == ANSWER, "it waited for a replica in the new one"


def test_a_cancelled_run_ends_its_job(service: Service, undisturbed: dict[str, Any]) -> None:
    run = service.api.request_run(undisturbed["datanets"], epochs=1_000)
    service.wait("training", lambda: service.steps(run) > 0)
    service.api.do(DEV, "run.cancelled", {"run": run, "reason": "changed my mind"})
    service.wait("the end of the trainer", lambda: not service.processes("ray::TrainerActor"))
    assert not [e for e in service.api.events("run.completed") if e["run"] == run]


def test_a_killed_service_goes_on_where_it_was(
    service: Service, undisturbed: dict[str, Any]
) -> None:
    """The dispatcher died between `run.started` and the submission; then the whole service is
    killed in mid-run, and its Ray with it; the next one finishes the run."""
    api = service.api
    assert service.process is not None
    with api._lock:
        run = api.request_run(undisturbed["datanets"], **LONG)
        body = {"run": run, "attempt": 1, "submission_id": submission_id(run, 1)}
        api.do(WORKER, "run.started", body, id=derived_id("run.started", run, 1))
    service.wait("training", lambda: service.steps(run) >= KILL_AT_STEP)
    service.process.kill()
    service.process.wait(STOP_TIMEOUT_S)
    deadline = time.monotonic() + 20
    while list(within(service.place)):
        assert time.monotonic() < deadline, "orphans of a killed service"
        time.sleep(0.1)
    assert api.run(run)["status"] == "started"

    service.start()
    ended = service.finished(run)
    assert (ended["status"], ended["attempt"]) == ("completed", 1), ended["reason"]
    assert ended["adapter_sha256"] == undisturbed["adapter_sha256"]
    assert sum(e["run"] == run for e in api.events("run.completed")) == 1
    assert sum(e["run"] == run for e in api.events("run.started")) == 1
    assert sha256_hex(api.blobs[ended["adapter_sha256"]]) == ended["adapter_sha256"]


def test_a_stopped_service_leaves_nothing_behind(service: Service) -> None:
    """An answer under way is finished first; a new one is refused."""
    assert service.process is not None
    process = service.process
    assert service.api.tokens
    assert list(within(service.place))

    async def last_words() -> list[ChatDelta]:
        request = asked(None, "Tell me a long story.", max_tokens=150, temperature=2.0, seed=5)
        deltas: list[ChatDelta] = []
        async for delta in service.engine.stream(request):
            if not deltas:
                process.terminate()
            deltas.append(delta)
        return deltas

    service.wait("a replica", service.pids)
    assert service.talk(last_words())[-1].finish_reason in ("stop", "length")
    assert process.wait(STOP_TIMEOUT_S) == 0, service.tail()
    assert list(within(service.place)) == []
    assert ray_cluster.find(service.home) is None
    assert service.pids() == {}
    with pytest.raises(ComputeError, match="no replica runs"):
        service.talk(service.ask(None))
    secret = service.key_file.read_text()
    logged = service.tail()
    assert secret not in logged
    for name in ("token", "data-plane.secret"):
        assert (service.home / "ray" / name).stat().st_mode & 0o777 == 0o600
        assert (service.home / "ray" / name).read_text() not in logged
