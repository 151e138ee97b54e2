"""LDS over a world: retrain on half subsets, and hold every method's forecast against the models.

`lds.py` is the arithmetic; this is the experiment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.evaluation import lds
from workers.evaluation.harness import UNASKED, Bench, Options, ask, scene_of, score
from workers.evaluation.retrain import Query, Unit
from workers.evaluation.subsets import half_subsets
from workers.evaluation.world import World

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """LDS of every method, over all answers and by kind; parts of it can be pooled over worlds."""

    comparison: lds.Comparison
    kinds: dict[str, dict[str, float]]
    agreement: lds.Estimate | None
    """Between the outputs of two training seeds; None for one seed alone."""
    seeds: int
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
    unasked = bench.trial(world, UNASKED)
    adapters = bench.adapters(unasked, options.seeds)
    queries = list(given) or ask(unasked, adapters[0], world, options.queries // 2)
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
    several = options.seeds > 1
    return Fidelity(
        comparison=lds.pooled(parts),
        kinds={
            name: {k: float(np.mean([d[k] for d in dicts])) for k in dicts[0]}
            for name, dicts in by_kind.items()
        },
        agreement=lds.agreement(by_seed[0], by_seed[1]) if several else None,
        seeds=options.seeds,
        queries={str(k): int((kinds == k).sum()) for k in sorted(set(kinds))},
        rows=len(world.rows),
        contributors=len(world.contributors),
    )
