"""Payout error over a world of few contributors: our shares beside sampled Shapley shares.

`shapley.py` is the arithmetic; this is the experiment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ledger.errors import InvalidEvent
from workers.attribution.index import IndexedRow
from workers.attribution.query import conclude, sketch_answer
from workers.evaluation import lds, shapley
from workers.evaluation.harness import UNASKED, Bench, Options, ask, scene_of, score
from workers.evaluation.methods import index_of
from workers.evaluation.retrain import Unit
from workers.evaluation.subsets import MIN_PLAYERS, coalitions, rows_of
from workers.evaluation.world import World, draw

Floats = NDArray[np.float64]


def small_world(rows: Sequence[IndexedRow], options: Options) -> World:
    """The world of the payout game: few players, whose every coalition trains in seconds.

    Raises InvalidEvent for rows of one contributor alone, and what `draw` raises.
    """
    asked = options.players
    world = draw(
        rows,
        count=options.players * options.rows_per_player - asked,
        held_out=asked,
        per_contributor=options.rows_per_player,
        contributors=options.players,
        seed=options.seed + 1,
    )
    if len(world.contributors) < MIN_PLAYERS:
        raise InvalidEvent(
            f"the payout game needs rows of MIN_PLAYERS = {MIN_PLAYERS} contributors or more: give "
            "more data, or measure the other parts alone"
        )
    return world


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
    unasked = bench.trial(world, UNASKED)
    (adapter,) = bench.adapters(unasked, 1)
    names, owners = world.contributors, world.owners()
    recalled = 2 * len(names)
    queries = [q for q in ask(unasked, adapter, world, recalled) if q.kind != "held-out"]
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
