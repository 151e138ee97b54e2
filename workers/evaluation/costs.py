"""What a query costs, beside kronfluence's, in CPU seconds of this process, and how that grows.

Ours: one gradient, one sketch, one integer scan, the shares. kronfluence: the query's gradient,
preconditioned, against the gradients of every training row, which it computes anew for each call
(it keeps factors, not rows); given many queries at once it shares that walk between them, so both
numbers are measured, one query a call (an answer is attributed when it was given) and a batch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from workers.attribution.query import conclude, sketch_answer
from workers.evaluation.harness import Bench, scene_of
from workers.evaluation.methods import index_of
from workers.evaluation.retrain import Query
from workers.evaluation.scene import Scene
from workers.evaluation.world import World

PEER_CALLS = 3
TIMED = 12


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds per query over `rows` rows; the peer's are None when it is not installed."""

    rows: int
    index: float
    """Median CPU seconds of one query of ours."""
    build: float
    """CPU seconds to build the index, once."""
    peer: float | None
    """Of one kronfluence query, asked alone."""
    peer_batched: float | None
    """Of one kronfluence query among all of the scene's."""
    peer_factors: float | None

    @property
    def ratio(self) -> float | None:
        """How many times cheaper ours is than the peer's, one answer at a time."""
        return self.peer / self.index if self.peer else None


def measure(scene: Scene) -> Cost:
    """Time this scene's index and, where it is installed, kronfluence."""
    fresh = replace(scene, folder=scene.folder / "costs", memo={})
    fresh.folder.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    index = index_of(fresh)
    build = time.process_time() - started
    seconds = []
    for query in list(scene.queries)[:TIMED]:
        started = time.process_time()
        sketch = sketch_answer(scene.model, scene.tokenizer, index, query.prompt, query.answer)
        conclude(index, sketch)
        seconds.append(time.process_time() - started)
    peer, batched, factors = _peer(fresh)
    return Cost(
        rows=len(scene.rows),
        index=float(np.median(seconds)),
        build=build,
        peer=peer,
        peer_batched=batched,
        peer_factors=factors,
    )


def growth(scene: Scene, sizes: Sequence[int]) -> list[Cost]:
    """The same over the first `sizes` rows, to see what grows with the number of rows."""
    return [
        measure(
            replace(
                scene,
                rows=scene.rows[:size],
                folder=Path(scene.folder) / f"rows-{size}",
                memo={},
            )
        )
        for size in sizes
        if size <= len(scene.rows)
    ]


def _peer(scene: Scene) -> tuple[float | None, float | None, float | None]:
    try:
        from workers.evaluation import peer_kronfluence
    except ImportError:
        return None, None, None
    fitted = peer_kronfluence.fit(scene)
    examples = scene.query_examples()
    alone = [
        fitted.scores([example], damping=None, query_batch=1)[1]
        for example in examples[:PEER_CALLS]
    ]
    together = fitted.scores(examples, damping=None, query_batch=len(examples))[1]
    return float(np.median(alone)), together / len(examples), fitted.seconds


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
    found = growth(scene, sizes or [count // 2, count])
    bench.report("costs", 1, 1)
    return found
