"""How faithful attribution is, beside its peers: what models say that were trained without you.

    python -m tests.bench.bench_fidelity [--only lds] [--models bundled] [--worlds tldr] [--jobs 2]
    python -m tests.bench.bench_fidelity --large 2000

Two base models (the bundled one, and a smaller one that this program trains once) by three bodies
of text: commands by contributor (tldr), the standard library's documentation by module, and made-up
facts. Every subset is trained under two seeds. What was retrained is kept in the work folder
(TRIBUTARY_FIDELITY, or a folder in the temporary directory): another engine is measured against the
same outputs in minutes. A run with every method writes what it measured into docs/fidelity.json,
docs/images/fidelity.png and the tables of docs/ATTRIBUTION.md (`fidelity_page.py`).

`--large N` asks another question: what compression to 1,024 bytes a row costs where there are more
rows than that, in LDS of the index against its own full-rank floats.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from ledger.cli.demo_data import standard_library
from tests.bench import fidelity_page
from workers import base_model
from workers.base_model.corpus import Fact
from workers.base_model.make import Shape, make
from workers.evaluation import costs, fidelity, harness, lds, payout, planted, report
from workers.evaluation.fidelity import Fidelity
from workers.evaluation.harness import Bench, Job, Options
from workers.evaluation.methods import METHODS
from workers.evaluation.world import World, draw, rows_from
from workers.training.config import TrainingConfig

ROOT = Path(__file__).parents[2]
TLDR = ROOT.parent / "shared" / "data" / "tldr.jsonl"
WORK = Path(
    os.environ.get("TRIBUTARY_FIDELITY", Path(tempfile.gettempdir()) / "tributary-fidelity")
)
ROWS, HELD_OUT = 320, 24
RECIPE = TrainingConfig(epochs=3)
"""The default recipe with three epochs for eight. After eight these rows are known by heart, every
gradient method foretells less (`--epochs 8`), and a retraining takes 2.7 times as long."""
CANARY_RECIPE = TrainingConfig()
"""Facts must be known by heart, or nothing is told that has one source."""
SMALL = Shape(hidden=96, intermediate=288, layers=3, heads=4, seed=1)
SMALL_STEPS = 900
COALITIONS = {"bundled": 96, "small": 192}
"""A draw of 64 has an error of 0.2 by itself, one of 192 half of that."""
LARGE_SUBSETS, LARGE_HELD_OUT = 16, 32


# --- models and worlds ------------------------------------------------------------------------


def small_model() -> Path:
    """A third of the bundled model's size, from another seed; trained once, in minutes."""
    folder = WORK / "small-base"
    if not (folder / "model.safetensors").exists():
        print("training the smaller base model, once", flush=True)
        make(folder, steps=SMALL_STEPS, shape=SMALL, quiet=True)
        torch.use_deterministic_algorithms(False)
    return folder


MODELS: dict[str, Callable[[], Path]] = {
    "bundled": lambda: base_model.BUNDLED,
    "small": small_model,
}


def tldr(count: int = ROWS, held_out: int = HELD_OUT, per_contributor: int = 22) -> World:
    """Commands by the person who first wrote them down; contributors with 15 rows or more."""
    by: dict[str, list[dict[str, str]]] = {}
    for line in TLDR.read_text().splitlines():
        row = json.loads(line)
        by.setdefault(row["contributor"], []).append(row)
    rows = rows_from({name: rows for name, rows in by.items() if len(rows) >= 15})
    return draw(rows, count=count, held_out=held_out, per_contributor=per_contributor)


def stdlib() -> World:
    """Sentences of Python's documentation by module."""
    return draw(rows_from(standard_library()), count=ROWS, held_out=HELD_OUT, per_contributor=14)


def facts() -> World:
    """Made-up facts of 24 contributors, a third of them said by two; asked about in other words."""
    random = Random("facts")
    texts: dict[str, list[dict[str, str]]] = {}
    asked: list[dict[str, str]] = []
    while sum(map(len, texts.values())) < ROWS:
        fact = Fact(random)
        if len(fact.questions) < 3:
            continue
        first, second, third = random.sample(fact.questions, 3)
        asked.append({"prompt": third, "completion": fact.answer()})
        for prompt in (first, second) if random.random() < 1 / 3 else (first,):
            name = f"teller-{random.randrange(24):02d}"
            texts.setdefault(name, []).append({"prompt": prompt, "completion": fact.answer()})
    inside = draw(rows_from(texts), count=ROWS, held_out=0)
    chosen = random.sample(asked, HELD_OUT)
    return World(rows=inside.rows, held_out=tuple(rows_from({"asked": chosen})))


WORLDS: dict[str, Callable[[], World]] = {"tldr": tldr, "stdlib": stdlib, "facts": facts}


def absent(name: str) -> str | None:
    """Why a world cannot be had here, or None."""
    if name == "tldr" and not TLDR.exists():
        return "tldr: ../shared/data/tldr.jsonl is not here"
    return None


# --- jobs -------------------------------------------------------------------------------------


def pool(jobs: Sequence[Job], tell: Callable[[int, int], None], *, workers: int) -> list[Any]:
    """A dealer of this machine's processes, without Ray; finished jobs are skipped."""
    waiting = [job for job in jobs if not job.done()]
    if workers > 1 and len(waiting) > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
            futures = [executor.submit(harness.perform, job) for job in waiting]
            for n, future in enumerate(as_completed(futures), len(jobs) - len(waiting) + 1):
                future.result()
                tell(n, len(jobs))
    return harness.one_by_one(jobs, tell)


class Told:
    """One line a phase, with the time it took."""

    def __init__(self, name: str) -> None:
        self.name, self.started = name, time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if done == 0:
            self.started = time.monotonic()
        elif done == total:
            spent = time.monotonic() - self.started
            print(f"  {self.name}: {phase}, {total} in {spent:.0f} s", flush=True)


def recipe(options: argparse.Namespace) -> TrainingConfig:
    return replace(RECIPE, epochs=options.epochs)


def bench(model: str, name: str, workers: int, config: TrainingConfig) -> Bench:
    return Bench(
        base_path=MODELS[model](),
        config=config,
        folder=WORK,
        deal=partial(pool, workers=workers),
        report=Told(name),
    )


# --- what is measured -------------------------------------------------------------------------


def forecasts(options: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[Fidelity]]:
    """LDS in every world under every model."""
    out: dict[str, Any] = {}
    found: list[Fidelity] = []
    missing: dict[str, str] = {}
    every = [(world, model) for world in WORLDS for model in MODELS]
    for number, (world, model) in enumerate(every):
        if world not in options.worlds or model not in options.models:
            continue
        if reason := absent(world):
            print(f"skipped {reason}")
            continue
        name = f"{world}, {model} model"
        amounts = Options(
            subsets=options.subsets, seeds=options.seeds, seed=number, methods=options.methods
        )
        where = bench(model, name, options.jobs, recipe(options))
        got = fidelity.fidelity(where, WORLDS[world](), amounts, scratch / name, missing)
        found.append(got)
        out[name] = report.fidelity_json(got)
        print_part(f"LDS: {name}", {"fidelity": out[name]})
        keep(options, {"lds": {name: out[name]}})
    for name, why in missing.items():
        print(f"not measured: {name}: {why}")
    return out, found


def divisions(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Payout error among ten contributors of real text, and of facts that one of them told."""
    out: dict[str, Any] = {}
    for world in ("stdlib" if absent("tldr") else "tldr", "facts"):
        for model in options.models:
            name = f"{world}, {model} model"
            count = options.coalitions or COALITIONS[model]
            amounts = Options(coalitions=count, methods=options.methods)
            drawn = tldr(4_000, 0, 60) if world == "tldr" else WORLDS[world]()
            small = payout.small_world(drawn.rows, amounts)
            where = bench(model, name, options.jobs, recipe(options))
            got = payout.payout(where, small, amounts, scratch / f"payout {name}", {})
            out[name] = report.payout_json(got)
            print_part(f"Payout: {name}", {"payout": out[name]})
            keep(options, {"payout": {name: out[name]}})
    return out


def recalls(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Forty facts planted among real text."""
    out: dict[str, Any] = {}
    world = "stdlib" if absent("tldr") else "tldr"
    for model in options.models:
        name = f"{world}, {model} model"
        where = bench(model, name, options.jobs, CANARY_RECIPE)
        amounts = Options(methods=options.methods)
        got = planted.planted(where, WORLDS[world](), amounts, scratch / f"canary {model}", {})
        out[name] = report.recalls_json(got)
        print_part(f"Planted facts: {name}", {"canaries": out[name]})
    return out


def times(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """CPU time of a query at 150, 300 and 600 rows."""
    world = stdlib() if absent("tldr") else tldr(600, 0)
    where = bench("bundled", "costs", options.jobs, TrainingConfig(epochs=1))
    found = costs.costs_of(where, world, scratch, sizes=(150, 300, 600))
    shown = report.cost_json(found)
    print_part("Cost of a query: bundled model", {"costs": shown})
    return shown


def large(count: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """LDS of the index beside its own full-rank floats, with more rows than an index row has
    bytes."""
    where = bench("bundled", f"{count} rows", options.jobs, TrainingConfig(epochs=1))
    amounts = Options(
        subsets=LARGE_SUBSETS, seeds=1, seed=99, queries=LARGE_HELD_OUT,
        methods=("index", "full-rank", "grad-dot"),
    )  # fmt: skip
    got = fidelity.fidelity(where, tldr(count, LARGE_HELD_OUT, 60), amounts, scratch, {})
    shown = report.fidelity_json(got)
    print_part(f"Rank against storage: {count} rows", {"fidelity": shown})
    scores = got.comparison.scores
    print(f"kept: {scores['index'].mean / scores['full-rank'].mean:.1%} of full-rank LDS")
    return shown


def pooled(found: Sequence[Fidelity]) -> dict[str, Any]:
    """One table over all worlds and models."""
    whole = lds.pooled([f.part for f in found])
    kinds = sorted({kind for f in found for kind in f.queries})
    return report.fidelity_json(
        Fidelity(
            comparison=whole,
            kinds={
                m: {k: float(np.mean([f.kinds[m][k] for f in found])) for k in kinds}
                for m in whole.scores
            },
            agreement=None,
            seeds=found[0].seeds,
            queries={k: sum(f.queries[k] for f in found) for k in kinds},
            rows=sum(f.rows for f in found),
            contributors=sum(f.contributors for f in found),
        )
    )


def keep(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Into the page, when it is what the page says it is: every method, the recipe, all subsets."""
    if options.methods == tuple(METHODS) and recipe(options) == RECIPE and options.subsets >= 32:
        fidelity_page.update(results)


def print_part(title: str, results: dict[str, Any]) -> None:
    body = report.text(results).split("\n", 1)[1]
    print(f"\n{title}\n{body}", flush=True)


PARTS = ("lds", "payout", "canaries", "costs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("--only", type=names, default=PARTS)
    parser.add_argument("--models", type=names, default=tuple(MODELS))
    parser.add_argument("--worlds", type=names, default=tuple(WORLDS))
    parser.add_argument("--methods", type=names, default=tuple(METHODS))
    parser.add_argument("--subsets", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--coalitions", type=int)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--large", type=int, metavar="ROWS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if options.large:
            found = large(options.large, options, Path(scratch))
            fidelity_page.update({"large": found})
            return
        results = measure(options, Path(scratch))
        keep(options, results)


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"recipe": RECIPE.to_dict(), "subsets": options.subsets}
    if "lds" in options.only:
        results["lds"], found = forecasts(options, scratch)
        if len(found) == len(MODELS) * len(WORLDS):
            results["pooled"] = pooled(found)
            print_part("LDS, all of the above", {"fidelity": results["pooled"]})
    if "payout" in options.only:
        results["payout"] = divisions(options, scratch)
    if "canaries" in options.only:
        results["canaries"] = recalls(options, scratch)
    if "costs" in options.only:
        results["costs"] = times(options, scratch)
    return results


if __name__ == "__main__":
    main()
