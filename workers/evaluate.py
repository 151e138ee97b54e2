"""`tributary attribution evaluate`: the evaluation of `workers/evaluation`, dealt out on Ray.

The Ray shell. Every retraining is a task of one core; a finished one leaves a file, so that an
evaluation killed in the middle (`kill -9` of this process, of a worker, of the machine) goes on
where it stood: start it again with the same data and options. A task whose worker died is tried
again by Ray; one that fails by itself ends the evaluation with its error.

The data is a ledger's run (its rows, recipe and base model) or plain rows; the folder `out` holds
the units, results.json, results.md and plot.png.
"""

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ledger.client import Client
from ledger.errors import Conflict, InvalidEvent, TooLarge
from workers import base_model, ray_cluster
from workers.attribution.index import IndexedRow
from workers.evaluation import harness, report
from workers.evaluation.costs import costs_of
from workers.evaluation.fidelity import fidelity
from workers.evaluation.harness import Bench, Job, Options
from workers.evaluation.payout import payout, small_world
from workers.evaluation.planted import planted
from workers.evaluation.retrain import MAX_QUERIES, Query
from workers.evaluation.world import World, draw
from workers.training.config import TrainingConfig

LOOK_S = 5.0
TASK_RETRIES = 4
"""How often Ray tries a task again whose worker process died; what it had trained is on disk."""
PARTS = ("fidelity", "payout", "canaries", "costs")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate. `queries` replaces the drawn ones for LDS.

    Raises InvalidEvent for an unknown part, too many queries and rows that give no world: all that
    can be known to be senseless before Ray starts and anything is trained.
    """

    rows: Sequence[IndexedRow]
    base_path: Path
    config: TrainingConfig
    options: Options
    title: str
    out: Path
    queries: Sequence[Query] = ()
    parts: Sequence[str] = PARTS

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown:
            raise InvalidEvent(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
        if len(self.queries) > MAX_QUERIES:
            raise TooLarge(f"{len(self.queries)} answers; expected at most {MAX_QUERIES=}")
        self.worlds()

    def worlds(self) -> tuple[World, World | None]:
        """What is trained on: for every part but `payout`, and, where that is asked for, for it."""
        world = draw(
            self.rows,
            count=self.options.rows,
            held_out=self.options.queries,
            per_contributor=self.options.per_contributor,
            seed=self.options.seed,
        )
        return world, small_world(self.rows, self.options) if "payout" in self.parts else None


def evaluate(request: Request, deal: harness.Dealer, tell: harness.Report) -> dict[str, Any]:
    """Measure every part, write the three files into `out`, and return what results.json holds.

    Results are written after each part: an evaluation that ends early has shown what it knew.
    """
    # This process attributes while its tasks train: more threads than one fight them for the cores.
    torch.set_num_threads(request.config.threads)
    options, missing = request.options, dict[str, str]()
    bench = Bench(
        base_path=request.base_path,
        config=request.config,
        folder=request.out,
        deal=deal,
        report=tell,
    )
    results: dict[str, Any] = {
        "v": report.RESULTS_VERSION,
        "title": request.title,
        "base_sha256": base_model.digest(request.base_path),
        "config": request.config.to_dict(),
        "seed": options.seed,
        "training_seeds": options.seeds,
        "missing": missing,
    }
    world, small = request.worlds()
    scratch = request.out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed evaluation left
    try:
        if "fidelity" in request.parts:
            found = fidelity(bench, world, options, scratch, missing, request.queries)
            results["fidelity"] = report.fidelity_json(found)
            report.write(results, request.out)
        if small is not None:
            paid = payout(bench, small, options, scratch, missing)
            results["payout"] = report.payout_json(paid)
            report.write(results, request.out)
        if "canaries" in request.parts:
            recalls = planted(bench, world, options, scratch, missing)
            results["canaries"] = report.recalls_json(recalls)
        if "costs" in request.parts:
            results["costs"] = report.cost_json(costs_of(bench, world, scratch))
        report.write(results, request.out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return results


@contextmanager
def on_ray(service_home: Path, out: Path, *, cpus: int | None = None) -> Iterator[harness.Dealer]:
    """A dealer on the worker service's Ray when it runs, else on one of our own, ended with us.

    Our own keeps its files in `out`: a service that starts meanwhile must not adopt what ends when
    we do.
    """
    home = out if ray_cluster.find(service_home) is None else service_home
    with ray_cluster.LocalRay(home, num_cpus=cpus) as cluster:
        ray_cluster.connect(cluster.info)
        try:
            yield deal
        finally:
            ray_cluster.disconnect()


def deal(jobs: Sequence[Job], tell: Callable[[int, int], None]) -> list[list[float]]:
    """Do the jobs that are not done as Ray tasks, one core each; results in the jobs' order.

    A task's error is raised here as what it was, and the other tasks are cancelled: what they had
    finished stays on disk.
    """
    import ray

    from workers.ray_errors import designed

    waiting = [n for n, job in enumerate(jobs) if not job.done()]
    finished = len(jobs) - len(waiting)
    tell(finished, len(jobs))
    task = ray.remote(num_cpus=1, max_retries=TASK_RETRIES)(_perform)
    running = {task.remote(jobs[n]): n for n in waiting}
    try:
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_S)
            if not ready:
                ray_cluster.must_answer()  # a dead cluster would never bring anything
                continue
            running.pop(ready[0])
            ray.get(ready[0])
            finished += 1
            tell(finished, len(jobs))
    except ray.exceptions.RayError as error:
        raise designed(error) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return [harness.perform(job) for job in jobs]  # all from disk


def _perform(job: Job) -> None:
    """In a Ray worker: the result goes to disk, not through Ray."""
    harness.perform(job)


def run_rows(client: Client, run: str) -> tuple[list[IndexedRow], Mapping[str, Any]]:
    """A ledger run's rows, each checked against its contribution's root, and the run itself."""
    from workers.runs import fetch_rows

    found = client.get(f"/v1/runs/{run}")
    rows = list(fetch_rows(client, run))
    if not rows:
        raise InvalidEvent(f"run {run} has no approved rows: there is nothing to evaluate")
    return rows, found


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """One evaluation per folder: two would train the same unit into the same files."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(
                f"another evaluation works in {out}; wait for it, or choose another --out"
            ) from error
        yield  # the kernel drops the lock however this process ends
