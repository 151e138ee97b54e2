"""From the ledger's queue of training runs to Ray Jobs, and back to terminal events.

The ledger owns queue and retries; Ray only executes. One `step` looks at every active run and
does the next thing for it, so that a dispatcher killed anywhere goes on at its next `step`:

    ledger says             Ray says           next
    requested               -                  run.started (attempt 1), then submit
    started, attempt n      no such job        submit the same submission id again
    started, attempt n      pending, running   wait
    started, attempt n      succeeded          replay the run's outbox; else as failed
    started, attempt n      failed, stopped    replay; else attempt n + 1, or run.failed
    cancelled               pending, running   stop the job

Every event has an id derived from run and attempt, every job a submission id that is run and
attempt: repeating a step that a crash cut short does nothing twice. The crash between
`run.started` and the submission is the second line of the table.

A job that Ray does not know was lost with its cluster. It is submitted again under the same id,
but only MAX_SUBMISSIONS times (counted on disk): a run that takes the whole cluster down with it
must end too. One dispatcher per ledger: two with different clusters would train everything twice,
and the ledger would still hold each event once. On its way it recalls what is due (`recalls`).
"""

import shlex
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import structlog

from ledger.client import Client
from ledger.domain.ids import derived_id
from ledger.errors import ComputeError, Conflict, LedgerError, Unavailable
from workers import jobs, ray_cluster
from workers.bounded import bounded
from workers.link import WorkerSpec
from workers.outbox import Outbox
from workers.recalls import Recalls

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 3
MAX_CONCURRENT_RUNS = 1
MAX_SUBMISSIONS = 3
POLL_S = 1.0
MAX_PAUSE_S = 15.0
JOBS_TIMEOUT_S = 60.0
SETTLE_S = 10.0
"""The ledger's listings follow its log at a distance. A job that succeeded is given this long for
its terminal event to show before it counts as failed."""

PENDING, RUNNING = "PENDING", "RUNNING"
SUCCEEDED, FAILED, STOPPED = "SUCCEEDED", "FAILED", "STOPPED"
_ALIVE = (PENDING, RUNNING)


class JobRunner(Protocol):
    """What the dispatcher asks of Ray Jobs. Errors are ComputeError."""

    def statuses(self) -> Mapping[str, str]:
        """Submission id -> status, of every job that was submitted through here."""
        ...

    def submit(self, submission_id: str, run: str, attempt: int) -> None:
        """Submitting an id that exists already is a success."""
        ...

    def stop(self, submission_id: str) -> None: ...

    def log_tail(self, submission_id: str) -> str: ...


class RayJobs:
    """Ray Jobs over its HTTP interface. `cluster` is asked each time: it may have restarted."""

    def __init__(self, cluster: Callable[[], ray_cluster.ClusterInfo], spec: WorkerSpec) -> None:
        self._cluster = cluster
        self._spec = spec
        self._known: tuple[str, Any] | None = None

    def statuses(self) -> Mapping[str, str]:
        found = self._call(lambda client: client.list_jobs())
        ours = str(self._spec.home)
        return {
            str(job.submission_id): str(job.status.value)
            for job in found
            if job.submission_id and (job.metadata or {}).get("home") == ours
        }

    def submit(self, submission_id: str, run: str, attempt: int) -> None:
        words = jobs.entrypoint(self._cluster().python, self._spec, run, attempt)

        def call(client: Any) -> None:
            client.submit_job(
                entrypoint=shlex.join(words),
                submission_id=submission_id,
                metadata={"run": run, "attempt": str(attempt), "home": str(self._spec.home)},
                # The actor that the job starts holds the core; the job holding one too would
                # deadlock a machine with two.
                entrypoint_num_cpus=0,
            )

        try:
            self._call(call)
        except ComputeError:
            if submission_id not in self.statuses():
                raise

    def stop(self, submission_id: str) -> None:
        self._call(lambda client: client.stop_job(submission_id))

    def log_tail(self, submission_id: str) -> str:
        try:
            return str(self._call(lambda client: client.get_job_logs(submission_id)))[-500:]
        except ComputeError:
            return ""

    def _call(self, work: Callable[[Any], Any]) -> Any:
        info = self._cluster()
        ray_cluster.prepare(info)
        from ray.exceptions import RayError

        try:
            # A dashboard that takes a request and never answers must not stop the dispatcher.
            where = f"Ray Jobs at {info.jobs_url}"
            return bounded(where, lambda: work(self._client(info.jobs_url)), JOBS_TIMEOUT_S)
        except (RayError, RuntimeError, ConnectionError, OSError) as error:
            self._known = None
            raise ComputeError(f"Ray Jobs at {info.jobs_url}: {str(error)[:300]}") from error

    def _client(self, jobs_url: str) -> Any:
        if self._known is None or self._known[0] != jobs_url:
            from ray.job_submission import JobSubmissionClient

            self._known = (jobs_url, JobSubmissionClient(jobs_url))
        return self._known[1]


class Dispatcher:
    """`run(stop)` steps until told to stop; `step()` is one look at everything."""

    def __init__(
        self,
        spec: WorkerSpec,
        client: Client,
        outbox: Outbox,
        runner: JobRunner,
        *,
        max_concurrent: int = MAX_CONCURRENT_RUNS,
        max_attempts: int = MAX_ATTEMPTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._client = client
        self._outbox = outbox
        self._runner = runner
        self._max_concurrent = max_concurrent
        self._max_attempts = max_attempts
        self._clock = clock
        self._recalls = Recalls(client, outbox, clock=clock)
        self._succeeded_at: dict[str, float] = {}
        self._begun: set[str] = set()
        self._ended: set[str] = set()

    def run(self, stop: threading.Event) -> None:
        """Until `stop`; pauses longer while ledger or Ray do not answer."""
        pause_s = POLL_S
        while not stop.is_set():
            try:
                self.step()
                pause_s = POLL_S
            except Unavailable as error:
                pause_s = min(MAX_PAUSE_S, 2 * pause_s)
                log.warning("dispatch waits", error=error.slug, why=error.message, pause_s=pause_s)
            except LedgerError as error:
                log.error("dispatch failed", error=error.slug, why=error.message)
            stop.wait(pause_s)

    def step(self) -> None:
        """Raises Unavailable when ledger or Ray do not answer; a run that fails for itself is
        logged and does not hold up the others."""
        self._outbox.replay()
        active = list(self._client.pages("/v1/runs", status="requested,started"))
        statuses = self._runner.statuses()
        started = [run for run in active if run["status"] == "started"]
        for run in started:
            self._guarded(self._follow, run, statuses)
        waiting = [run for run in active if run["status"] == "requested"]
        for run in waiting[: max(0, self._max_concurrent - len(started))]:
            self._guarded(self._begin, run, 1)
        self._stop_orphans({str(run["run"]) for run in active}, statuses)
        self._recalls.step()

    def _guarded(self, work: Callable[..., None], run: Mapping[str, Any], *more: Any) -> None:
        try:
            work(run, *more)
        except Unavailable:
            raise
        except Conflict as error:
            log.info("the ledger moved on", run=run["run"], reason=error.message)
        except LedgerError as error:
            log.error("run skipped", run=run["run"], error=error.slug, why=error.message)

    def _begin(self, run: Mapping[str, Any], attempt: int) -> None:
        """The next attempt: the event, then the job. A crash between leaves a started run without
        a job, which `_follow` submits."""
        name = str(run["run"])
        submission = submission_id(name, attempt)
        if submission in self._begun:
            return  # the listing does not show it yet
        self._outbox.append(
            "run.started",
            {"run": name, "attempt": attempt, "submission_id": submission},
            id=derived_id("run.started", name, attempt),
        )
        self._begun.add(submission)
        log.info("run started", run=name, attempt=attempt)
        self._submit(name, attempt)

    def _follow(self, run: Mapping[str, Any], statuses: Mapping[str, str]) -> None:
        name, attempt = str(run["run"]), int(run["attempt"])
        submission = submission_id(name, attempt)
        status = statuses.get(submission)
        if status in _ALIVE:
            return
        if jobs.outbox_of(self._spec, name, self._client).replay():
            return  # it had finished, and only its event was missing
        if status is None:
            if self._submissions(name, attempt) < MAX_SUBMISSIONS:
                log.info("job submitted again", run=name, attempt=attempt)
                self._submit(name, attempt)
                return
        elif status == SUCCEEDED:
            since = self._succeeded_at.setdefault(submission, self._clock())
            if self._clock() - since < SETTLE_S:
                return
        fresh = self._client.get(f"/v1/runs/{name}")
        if fresh["status"] != "started" or int(fresh["attempt"]) != attempt:
            return
        self._retry(name, attempt, status)

    def _retry(self, run: str, attempt: int, status: str | None) -> None:
        tail = self._runner.log_tail(submission_id(run, attempt)) if status else ""
        log.warning("attempt lost", run=run, attempt=attempt, job=status, tail=tail)
        if attempt < self._max_attempts:
            self._begin({"run": run}, attempt + 1)
            return
        how = {None: "was lost with its cluster", SUCCEEDED: "ended without a result"}.get(
            status, "failed"
        )
        reason = (
            f"{attempt} attempts, and the last one {how}. The workers' log of the job "
            f"{submission_id(run, attempt)} says why; request the run again once that is settled"
        )
        jobs.fail(self._outbox, run, attempt, reason)

    def _submit(self, run: str, attempt: int) -> None:
        # Counted before: a submission that kills the cluster must count.
        path = self._spec.run_folder(run) / f"submissions-{attempt}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(self._submissions(run, attempt) + 1))
        self._runner.submit(submission_id(run, attempt), run, attempt)

    def _submissions(self, run: str, attempt: int) -> int:
        try:
            return int((self._spec.run_folder(run) / f"submissions-{attempt}").read_text())
        except (OSError, ValueError):
            return 0

    def _stop_orphans(self, active: set[str], statuses: Mapping[str, str]) -> None:
        """Jobs of runs that were cancelled. A completed run's job is just about to end by itself,
        and a run that is missing for another reason is none of ours to kill."""
        for submission, status in statuses.items():
            run = submission.rpartition("-")[0]
            if status in _ALIVE and run not in active and submission not in self._ended:
                if self._client.get(f"/v1/runs/{run}")["status"] != "cancelled":
                    continue
                log.info("job stopped, its run was cancelled", run=run)
                self._runner.stop(submission)
                self._ended.add(submission)  # Ray takes some seconds over it


def submission_id(run: str, attempt: int) -> str:
    """One per attempt; Ray refuses a second job of the same id."""
    return f"{run}-{attempt}"
