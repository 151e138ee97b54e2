"""The ground truth harness: retrain, attribute, compare. `tributary attribution evaluate`.

Three measurements over one world, each against models that were really trained without some rows:

    LDS        half subsets of rows; do summed scores foretell what each model says? (`lds.py`)
    payout     coalitions of contributors; are our shares the Shapley shares? (`shapley.py`)
    canaries   planted facts; is the row found that alone can have taught it? (`canaries.py`)

Everything that takes long is a job (`Job`), and jobs are done by a `Dealer`: one after the other
here (`one_by_one`), on Ray in `workers/evaluate.py`. A finished job leaves a file and is skipped
next time, as are the scores of methods that are not ours (`kept.py`).

Answers are of three kinds: `held-out` texts that the model never saw, what the model `answered` to
those prompts, and what it `recalled` on prompts that it was trained on. The last two are what an
answer that earns money is: the model's own words.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ledger.errors import InvalidEvent
from workers import base_model
from workers.attribution.index import IndexedRow, file_sha256
from workers.attribution.query import conclude, sketch_answer
from workers.evaluation import costs, lds, retrain, shapley
from workers.evaluation.canaries import NEAR, Canary, canaries, recall
from workers.evaluation.costs import Cost
from workers.evaluation.kept import kept
from workers.evaluation.methods import METHODS, index_of
from workers.evaluation.retrain import Query, Trial, Unit
from workers.evaluation.scene import NotInstalled, Scene
from workers.evaluation.subsets import coalitions, half_subsets, rows_of
from workers.evaluation.world import World, draw, rows_from
from workers.training.config import TrainingConfig
from workers.training.trainer import ADAPTER_FILE

Floats = NDArray[np.float64]
Scores = dict[str, Floats]
"""Method -> (queries, rows)."""

CANARY_CONTRIBUTOR = "canary"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and how much of it."""

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
        if self.subsets and self.subsets < lds.MIN_SUBSETS:
            raise InvalidEvent(f"{self.subsets} subsets; expected {lds.MIN_SUBSETS} or more, or 0")
        if self.seeds < 1 or self.queries < 1:
            raise InvalidEvent("an evaluation needs at least one training seed and one query")


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


# --- LDS ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """LDS of every method, over all answers and by kind; parts of it can be pooled over worlds."""

    comparison: lds.Comparison
    kinds: dict[str, dict[str, float]]
    ceiling: lds.Estimate | None
    queries: dict[str, int]
    rows: int
    contributors: int

    @property
    def part(self) -> tuple[Mapping[str, float], Mapping[str, Floats]]:
        """Means and draws, as `lds.pooled` takes them."""
        return {n: e.mean for n, e in self.comparison.scores.items()}, self.comparison.draws


def fidelity(
    bench: Bench,
    world: World,
    options: Options,
    scratch: Path,
    missing: dict[str, str],
    given: Sequence[Query] = (),
) -> Fidelity:
    """Retrain on half subsets and hold every method's forecast against what the models say.

    Outputs are means over the training seeds: what is to be foretold is what a subset teaches, not
    what a seed adds to it. Each seed's full model is attributed by every method, and means taken.
    """
    asked = Query(prompt="?", answer="?")  # replaced before anything is measured
    adapters = bench.adapters(bench.trial(world, [asked]), options.seeds)
    first = bench.trial(world, [asked])
    queries = list(given) or ask(first, adapters[0], world, options.queries // 2)
    trial = bench.trial(world, queries)
    subsets = half_subsets(len(world.rows), options.subsets, seed=options.seed)
    units = [Unit(subset=s, seed=seed) for seed in range(options.seeds) for s in subsets]
    outputs = bench.outputs("half subsets", trial, units)
    by_seed = np.split(outputs, options.seeds, axis=1)
    measured = np.mean(by_seed, axis=0)
    members = lds.members_of(subsets, len(world.rows))

    parts, kinds = [], np.array([q.kind for q in queries])
    by_kind: dict[str, list[dict[str, float]]] = {}
    for seed, adapter in enumerate(adapters):
        bench.report("attribution", seed, len(adapters))
        scene = scene_of(bench, trial, adapter, queries, scratch / f"seed-{seed}", seed)
        scores = score(bench, scene, options.methods, missing)
        predicted = {name: lds.predictions(s, members) for name, s in scores.items()}
        found = lds.compare(predicted, measured, seed=options.seed)
        parts.append(({n: e.mean for n, e in found.scores.items()}, found.draws))
        for name, values in predicted.items():
            each = lds.lds(values, measured)
            by_kind.setdefault(name, []).append(
                {k: float(each[kinds == k].mean()) for k in sorted(set(kinds))}
            )
    bench.report("attribution", len(adapters), len(adapters))
    ceiling = lds.ceiling(by_seed[0], by_seed[1]) if options.seeds > 1 else None
    return Fidelity(
        comparison=lds.pooled(parts),
        kinds={
            name: {k: float(np.mean([d[k] for d in dicts])) for k in dicts[0]}
            for name, dicts in by_kind.items()
        },
        ceiling=ceiling,
        queries={str(k): int((kinds == k).sum()) for k in sorted(set(kinds))},
        rows=len(world.rows),
        contributors=len(world.contributors),
    )


# --- payout -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Payout:
    """Payout error of our shares, and of other scores divided the same way without a level."""

    ours: shapley.PayoutError
    methods: dict[str, shapley.PayoutError]
    players: int
    rows: int
    coalitions: int
    unattributed: float
    value_error: float
    """Mean standard error of a Shapley value over the mean value of the grand coalition."""


def payout(
    bench: Bench, world: World, options: Options, scratch: Path, missing: dict[str, str]
) -> Payout:
    """Sampled Shapley values of the contributors of `world` to the model's own answers."""
    asked = Query(prompt="?", answer="?")
    (adapter,) = bench.adapters(bench.trial(world, [asked]), 1)
    names, owners = world.contributors, world.owners()
    recalled = 2 * len(names)
    queries = [
        q
        for q in ask(bench.trial(world, [asked]), adapter, world, recalled)
        if q.kind != "held-out"
    ]
    trial = bench.trial(world, queries)
    drawn = coalitions(len(names), options.coalitions, seed=options.seed)
    everybody = frozenset(range(len(names)))
    units = [Unit(subset=rows_of(owners, c), seed=0) for c in [frozenset(), everybody, *drawn]]
    outputs = bench.outputs("coalitions", trial, units)
    worth = outputs[:, 2:] - outputs[:, :1]
    whole = outputs[:, 1] - outputs[:, 0]
    members = lds.members_of([tuple(sorted(c)) for c in drawn], len(names))
    truth = shapley.sampled(members, worth, whole, seed=options.seed)

    bench.report("shares", 0, 1)
    scene = scene_of(bench, trial, adapter, queries, scratch / "payout", 0)
    index = index_of(scene)
    sketches = [
        sketch_answer(scene.model, scene.tokenizer, index, q.prompt, q.answer) for q in queries
    ]
    shares = [dict(conclude(index, sketch).shares) for sketch in sketches]
    scores = score(bench, scene, options.methods, missing)
    bench.report("shares", 1, 1)
    return Payout(
        ours=shapley.payout_error(truth, shares, names),
        methods={
            name: shapley.payout_error(truth, _divided(s, owners, names), names)
            for name, s in scores.items()
        },
        players=len(names),
        rows=len(world.rows),
        coalitions=len(drawn),
        unattributed=1 - float(np.mean([sum(s.values()) / 1e6 for s in shares])),
        value_error=float(truth.errors.mean() / whole.mean()),
    )


def _divided(scores: Floats, owners: Sequence[int], names: Sequence[str]) -> list[dict[str, int]]:
    """Scores as shares without a placebo level: positive parts, summed by contributor."""
    positive = scores.clip(min=0.0)
    sums = np.zeros((len(scores), len(names)))
    np.add.at(sums.T, list(owners), positive.T)
    whole = sums.sum(axis=1, keepdims=True)
    parts = np.divide(sums, whole, out=np.zeros_like(sums), where=whole > 0)
    return [
        {name: round(1e6 * float(part)) for name, part in zip(names, line, strict=True)}
        for line in parts
    ]


# --- canaries -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recalls:
    """Per method: recall@1 of verbatim answers, recall@NEAR and @1 of reworded ones."""

    planted: int
    told: int
    """Reworded questions that the model answered rightly; only these have a known source."""
    methods: dict[str, dict[str, float]]


def planted(
    bench: Bench, world: World, options: Options, scratch: Path, missing: dict[str, str]
) -> Recalls:
    """Plant facts among the world's rows, train once, and look for their rows."""
    facts = canaries(options.canaries, seed=options.seed)
    texts = [{"prompt": f.prompt, "completion": f.completion} for f in facts]
    rows = [*world.rows, *rows_from({CANARY_CONTRIBUTOR: texts})]
    mixed = World(
        rows=tuple(replace(r, registered_index=n) for n, r in enumerate(rows)), held_out=()
    )
    asked = bench.trial(mixed, [Query(prompt="?", answer="?")])
    (adapter,) = bench.adapters(asked, 1)
    own = range(len(world.rows), len(rows))
    said = retrain.answers(asked, adapter, [f.reworded for f in facts])
    told = [n for n, fact in enumerate(facts) if fact.told_by(said[n])]
    queries = [_verbatim(f) for f in facts]
    queries += [Query(prompt=facts[n].reworded, answer=said[n], kind="reworded") for n in told]
    scene = scene_of(bench, asked, adapter, queries, scratch / "canaries", 0)
    found: dict[str, dict[str, float]] = {}
    for name, scores in score(bench, scene, options.methods, missing).items():
        literal, asked_again = scores[: len(facts)], scores[len(facts) :]
        found[name] = {"verbatim@1": recall(literal, own, 1)}
        if told:
            truth = [own[n] for n in told]
            found[name] |= {
                "reworded@1": recall(asked_again, truth, 1),
                f"reworded@{NEAR}": recall(asked_again, truth, NEAR),
            }
    return Recalls(planted=len(facts), told=len(told), methods=found)


def _verbatim(fact: Canary) -> Query:
    return Query(prompt=fact.prompt, answer=fact.completion, kind="verbatim")


# --- costs --------------------------------------------------------------------------------------


def costs_of(
    bench: Bench,
    world: World,
    scratch: Path,
    *,
    sizes: Sequence[int] | None = None,
    queries: int = 12,
) -> list[Cost]:
    """CPU time a query over the first `sizes` rows; by default a half of them, and all."""
    asked = [Query(prompt=r.prompt, answer=r.completion) for r in world.rows[:queries]]
    trial = bench.trial(world, asked)
    (adapter,) = bench.adapters(trial, 1)
    count = len(world.rows)
    bench.report("costs", 0, 1)
    scene = scene_of(bench, trial, adapter, asked, scratch / "costs", 0)
    found = costs.growth(scene, sizes or [count // 2, count])
    bench.report("costs", 1, 1)
    return found


def small_world(rows: Sequence[IndexedRow], options: Options) -> World:
    """The world of the payout game: few players, whose every coalition trains in seconds."""
    asked = options.players
    return draw(
        rows,
        count=options.players * options.rows_per_player - asked,
        held_out=asked,
        per_contributor=options.rows_per_player,
        contributors=options.players,
        seed=options.seed + 1,
    )
