"""The ground truth harness: what its measurements share. `tributary attribution evaluate`.

Three measurements over one world, each against models that were really trained without some rows:

    fidelity.py   half subsets of rows; do summed scores foretell what each model says? (LDS)
    payout.py     coalitions of contributors; are our shares the Shapley shares?
    planted.py    planted facts; is the row found that alone can have taught it?

Everything that takes long is a job (`Job`), and jobs are done by a `Dealer`: one after the other
here (`one_by_one`), on Ray in `workers/evaluate.py`. A finished job leaves a file and is skipped
next time, as are the scores of methods that are not ours (`kept.py`).

Answers are of three kinds: `held-out` texts that the model never saw, what the model `answered` to
those prompts, and what it `recalled` on prompts that it was trained on. The last two are what an
answer that earns money is: the model's own words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ledger.errors import InvalidEvent
from workers import base_model
from workers.attribution.index import file_sha256
from workers.evaluation import lds, retrain
from workers.evaluation.canaries import MAX_CANARIES
from workers.evaluation.kept import kept
from workers.evaluation.methods import METHODS
from workers.evaluation.retrain import MAX_QUERIES, Query, Trial, Unit
from workers.evaluation.scene import NotInstalled, Scene
from workers.evaluation.subsets import MAX_COALITIONS, MAX_SUBSETS, MIN_PLAYERS
from workers.evaluation.world import MIN_ROWS, World
from workers.training.config import MAX_SEED, TrainingConfig
from workers.training.trainer import ADAPTER_FILE, MAX_ROWS

Floats = NDArray[np.float64]
Scores = dict[str, Floats]
"""Method -> (queries, rows)."""

MAX_SEEDS = 64
MAX_PLAYERS = 1_000
MAX_HELD_OUT = 2 * MAX_QUERIES // 5
"""Held-out rows: each is asked about twice, and half as many recalled ones are."""

_LIMITS = {
    "subsets": (lds.MIN_SUBSETS, MAX_SUBSETS),
    "queries": (1, MAX_HELD_OUT),
    "seeds": (1, MAX_SEEDS),
    "rows": (MIN_ROWS, MAX_ROWS),
    "per_contributor": (1, MAX_ROWS),
    "coalitions": (1, MAX_COALITIONS),
    "players": (MIN_PLAYERS, MAX_PLAYERS),
    "rows_per_player": (2, MAX_ROWS),
    "canaries": (1, MAX_CANARIES),
    "seed": (0, MAX_SEED - 1),
}
"""Least and most of every amount: what lies outside is refused before anything is trained."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and how much of it. Raises InvalidEvent for an amount outside its limits."""

    subsets: int = 32
    queries: int = 24
    """Held-out rows to ask about; the model's answers to them, and half as many recalled ones,
    are measured too."""
    seeds: int = 2
    """Trainings of each subset; the second gives the ceiling."""
    rows: int = 320
    per_contributor: int = 24
    coalitions: int = 64
    players: int = 10
    rows_per_player: int = 12
    canaries: int = 40
    seed: int = 0
    methods: tuple[str, ...] = tuple(METHODS)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - METHODS.keys())
        if unknown:
            raise InvalidEvent(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
        for name, (least, most) in _LIMITS.items():
            if not least <= (given := getattr(self, name)) <= most:
                raise InvalidEvent(f"{name} is {given}; expected {least} to {most}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """`fit` trains an adapter into `out` and keeps it; `measure` does one unit."""

    what: Literal["fit", "measure"]
    trial: Trial
    unit: Unit
    key: str = ""
    out: Path | None = None

    def done(self) -> bool:
        """Whether its result lies on disk."""
        if self.what == "fit":
            assert self.out is not None
            return retrain.trained(self.out)
        return retrain.finished(self.trial, self.key) is not None


def perform(job: Job) -> list[float]:
    """Do one job; a `fit` has no result but its folder."""
    if job.what == "measure":
        return retrain.measure(job.trial, job.unit, job.key)
    assert job.out is not None
    retrain.fit(job.trial, job.unit, job.out)
    return []


Report = Callable[[str, int, int], None]
"""Called with (phase, jobs done, jobs in all)."""
Dealer = Callable[[Sequence[Job], Callable[[int, int], None]], list[list[float]]]
"""Does all jobs and returns their results in order, telling how many are done."""


def one_by_one(jobs: Sequence[Job], tell: Callable[[int, int], None]) -> list[list[float]]:
    """The dealer of this process alone."""
    results = []
    for n, job in enumerate(jobs, 1):
        results.append(perform(job))
        tell(n, len(jobs))
    return results


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where an evaluation works: the recipe, the folder, who does the jobs, who is told."""

    base_path: Path
    config: TrainingConfig
    folder: Path
    deal: Dealer = one_by_one
    report: Report = lambda phase, done, total: None

    def trial(self, world: World, queries: Sequence[Query]) -> Trial:
        return Trial(
            base_path=self.base_path,
            rows=world.rows,
            queries=tuple(queries),
            config=self.config,
            folder=self.folder / "units",
        )

    def do(self, phase: str, jobs: Sequence[Job]) -> list[list[float]]:
        self.report(phase, 0, len(jobs))
        return self.deal(jobs, lambda done, total: self.report(phase, done, total))

    def adapters(self, trial: Trial, seeds: int) -> list[Path]:
        """Adapters of all rows, one per training seed."""
        whole = tuple(range(len(trial.rows)))
        folders = [retrain.adapter_folder(trial, seed) for seed in range(seeds)]
        jobs = [
            Job(what="fit", trial=trial, unit=Unit(subset=whole, seed=seed), out=out)
            for seed, out in enumerate(folders)
        ]
        self.do("full models", jobs)
        return folders

    def outputs(self, phase: str, trial: Trial, units: Sequence[Unit]) -> Floats:
        """(queries, units) log-likelihoods in nats."""
        shared = trial.shared()
        keys = [retrain.unit_key(trial, shared, unit) for unit in units]
        jobs = [
            Job(what="measure", trial=trial, unit=unit, key=key)
            for unit, key in zip(units, keys, strict=True)
        ]
        return np.array(self.do(phase, jobs)).T


UNASKED = (Query(prompt="?", answer="?"),)
"""Stands for the queries of a trial that only trains: what to ask depends on what it says."""


def ask(trial: Trial, adapter: Path, world: World, recalled: int) -> list[Query]:
    """Held-out texts, the model's answers to their prompts, and its answers to trained prompts."""
    step = max(1, len(world.rows) // max(1, recalled))
    known = [row.prompt for row in world.rows[::step]][:recalled]
    unknown = [row.prompt for row in world.held_out]
    said = retrain.answers(trial, adapter, [*known, *unknown])
    queries = [Query(prompt=r.prompt, answer=r.completion, kind="held-out") for r in world.held_out]
    kinds = ["recalled"] * len(known) + ["answered"] * len(unknown)
    for prompt, answer, kind in zip([*known, *unknown], said, kinds, strict=True):
        if answer:  # a model that says nothing has given no answer to attribute
            queries.append(Query(prompt=prompt, answer=answer, kind=kind))
    return queries


def scene_of(
    bench: Bench, trial: Trial, adapter: Path, queries: Sequence[Query], folder: Path, seed: int
) -> Scene:
    model, tokenizer = retrain.load(trial, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    return Scene(
        model=model,
        tokenizer=tokenizer,
        rows=trial.rows,
        queries=queries,
        folder=folder,
        max_len=bench.config.max_len,
        seed=seed,
        adapter_sha256=file_sha256(adapter / ADAPTER_FILE),
        base_digest=base_model.digest(trial.base_path),
    )


def score(bench: Bench, scene: Scene, methods: Sequence[str], missing: dict[str, str]) -> Scores:
    """Every method's scores; what is not installed is named in `missing` with the reason."""
    found: Scores = {}
    for name in methods:
        try:
            found[name] = kept(bench.folder / "scores", name, scene, METHODS[name])
        except NotInstalled as error:
            missing[name] = error.message
    return found
