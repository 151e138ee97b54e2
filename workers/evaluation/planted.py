"""Planted facts over a world: is the row found that alone can have taught an answer?

`canaries.py` makes and recognises the facts; this is the experiment.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from workers.evaluation import retrain
from workers.evaluation.canaries import NEAR, Canary, canaries, recall
from workers.evaluation.harness import UNASKED, Bench, Options, scene_of, score
from workers.evaluation.retrain import Query
from workers.evaluation.world import World, rows_from

CANARY_CONTRIBUTOR = "canary"


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
    asked = bench.trial(mixed, UNASKED)
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
