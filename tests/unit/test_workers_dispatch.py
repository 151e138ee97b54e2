"""The dispatcher's table, line by line, against a real ledger and a scripted Ray."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ledger.domain.ids import derived_id
from ledger.errors import ComputeError, Conflict, Unavailable
from tests.actors import DEV
from tests.workers_api import WorkersApi, write_key
from workers import jobs
from workers.dispatch import (
    FAILED,
    MAX_SUBMISSIONS,
    RUNNING,
    SETTLE_S,
    STOPPED,
    SUCCEEDED,
    Dispatcher,
    submission_id,
)
from workers.link import WorkerClient, WorkerSpec
from workers.outbox import Outbox


class ScriptedRay:
    """The port JobRunner, with statuses set by hand."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.submissions: list[str] = []
        self.stopped: list[str] = []
        self.broken = False

    def statuses(self) -> Mapping[str, str]:
        return dict(self.jobs)

    def submit(self, submission_id: str, run: str, attempt: int) -> None:
        if self.broken:
            raise ComputeError("Ray is down")
        self.submissions.append(submission_id)
        self.jobs.setdefault(submission_id, RUNNING)

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)
        self.jobs[submission_id] = STOPPED

    def log_tail(self, submission_id: str) -> str:
        return "Traceback"


class World:
    """A ledger, a Ray, and as many lives of a dispatcher as a test wants."""

    def __init__(self, api: WorkersApi, folder: Path) -> None:
        self.api = api
        self.ray = ScriptedRay()
        self.now = 0.0
        self.spec = WorkerSpec(api=api.url, key_file=write_key(folder), home=folder / "home")
        self.client = WorkerClient(api.url, self.spec.key_file)

    def dispatcher(self) -> Dispatcher:
        outbox = Outbox(self.client, self.spec.home / "outbox")
        return Dispatcher(self.spec, self.client, outbox, self.ray, clock=lambda: self.now)

    def finish(self, run: str, attempt: int) -> None:
        """What a job leaves when it ends between `put` and the ledger's answer."""
        box = jobs.outbox_of(self.spec, run, self.client)
        hashes = ("manifest_sha256", "adapter_sha256", "adapter_config_sha256", "index_sha256")
        body = {
            "run": run, "attempt": attempt, **dict.fromkeys(hashes, "ab" * 32),
            "index_root": "cd" * 32, "rows_count": 1, "contributions_count": 1, "steps": 1,
            "loss": "0.5",
        }  # fmt: skip
        box.put("run.completed", body, id=jobs.completed_id(run))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with WorkersApi() as api:
        yield World(api, tmp_path)


def test_requested_runs_start_one_at_a_time(world: World) -> None:
    first, second = world.api.facts_run(), world.api.facts_run()
    dispatcher = world.dispatcher()
    for _ in range(3):
        dispatcher.step()
    assert len(world.ray.submissions) == 1, "MAX_CONCURRENT_RUNS"
    event = world.api.events("run.started")[0]
    run = event["run"]
    assert event["event"] == str(derived_id("run.started", run, 1))
    assert event["submission_id"] == world.ray.submissions[0] == f"{run}-1"
    world.finish(run, 1)
    world.ray.jobs[f"{run}-1"] = SUCCEEDED
    for _ in range(3):
        dispatcher.step()
    assert world.api.run(run)["status"] == "completed"
    other = ({first, second} - {run}).pop()
    assert world.ray.submissions == [f"{run}-1", f"{other}-1"]


def test_killed_between_the_event_and_the_submission(world: World) -> None:
    run = world.api.facts_run()
    world.ray.broken = True
    with pytest.raises(Unavailable):
        world.dispatcher().step()
    assert world.api.run(run)["status"] == "started"
    assert world.ray.submissions == []
    world.ray.broken = False
    reborn = world.dispatcher()
    for _ in range(3):
        reborn.step()
    assert world.ray.submissions == [f"{run}-1"]
    assert len(world.api.events("run.started")) == 1


def test_killed_before_the_ledger_answered(world: World) -> None:
    run = world.api.facts_run()
    assert world.client.log
    world.api.lose_answers = 1
    with pytest.raises(Unavailable):
        world.dispatcher().step()
    reborn = world.dispatcher()
    for _ in range(3):
        reborn.step()
    assert world.ray.submissions == [f"{run}-1"]
    assert len(world.api.events("run.started")) == 1


@pytest.mark.parametrize("status", [FAILED, STOPPED])
def test_failed_jobs_are_tried_again_and_then_given_up(world: World, status: str) -> None:
    run = world.api.facts_run()
    dispatcher = world.dispatcher()
    for attempt in (1, 2, 3):
        dispatcher.step()
        assert world.ray.submissions[-1] == f"{run}-{attempt}"
        world.ray.jobs[f"{run}-{attempt}"] = status
    for _ in range(3):
        dispatcher.step()
    assert len(world.ray.submissions) == 3
    failed = world.api.events("run.failed")
    assert [f["attempt"] for f in failed] == [3]
    assert "3 attempts" in failed[0]["reason"]


def test_a_lost_job_is_submitted_again_but_not_for_ever(world: World) -> None:
    run = world.api.facts_run()
    dispatcher = world.dispatcher()
    for _ in range(3 * MAX_SUBMISSIONS + 3):
        dispatcher.step()
        world.ray.jobs.clear()  # this run takes the cluster down each time
    names = [submission_id(run, n) for n in (1, 2, 3)]
    assert [world.ray.submissions.count(name) for name in names] == [MAX_SUBMISSIONS] * 3
    assert world.api.run(run)["status"] == "failed"


def test_success_without_an_event_is_a_lost_attempt(world: World) -> None:
    run = world.api.facts_run()
    dispatcher = world.dispatcher()
    dispatcher.step()
    world.ray.jobs[f"{run}-1"] = SUCCEEDED
    dispatcher.step()
    assert world.ray.submissions == [f"{run}-1"], "the listing may lag behind the log"
    world.now += SETTLE_S
    dispatcher.step()
    assert world.ray.submissions == [f"{run}-1", f"{run}-2"]


def test_an_event_kept_by_a_dead_job_ends_the_run(world: World) -> None:
    run = world.api.facts_run()
    dispatcher = world.dispatcher()
    dispatcher.step()
    world.finish(run, 1)
    world.ray.jobs[f"{run}-1"] = FAILED
    dispatcher.step()
    assert world.api.run(run)["status"] == "completed"
    assert world.ray.submissions == [f"{run}-1"]
    # The same event once more, from whoever still holds it, changes nothing.
    world.finish(run, 1)
    jobs.outbox_of(world.spec, run, world.client).replay()
    assert len(world.api.events("run.completed")) == 1


def test_cancelled_runs_stop_their_job(world: World) -> None:
    run = world.api.facts_run()
    dispatcher = world.dispatcher()
    dispatcher.step()
    world.api.do(DEV, "run.cancelled", {"run": run, "reason": ""})
    world.dispatcher().step()  # another life: it learns of the job from Ray
    assert world.ray.stopped == [f"{run}-1"]
    dispatcher.step()
    assert len(world.ray.submissions) == 1
    world.finish(run, 1)
    box = jobs.outbox_of(world.spec, run, world.client)
    with pytest.raises(Conflict):
        box.append("run.failed", {"run": run, "attempt": 1, "reason": ""}, id=jobs.failed_id(run))
    assert box.replay() == []


def test_a_job_that_is_just_ending_is_left_alone(world: World) -> None:
    run = world.api.facts_run()
    dispatcher = world.dispatcher()
    dispatcher.step()
    world.finish(run, 1)
    jobs.outbox_of(world.spec, run, world.client).replay()
    dispatcher.step()
    assert world.ray.stopped == []
