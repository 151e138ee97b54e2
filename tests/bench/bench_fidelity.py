"""How faithful attribution is, beside its peers: what retrained models say.

    python -m tests.bench.bench_fidelity [--quick] [--methods index,grad-dot] [--work DIR]

Retrained units are kept in the work folder, so that another engine is measured against the same
outputs without retraining.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from random import Random

import numpy as np
import torch

from workers import base_model
from workers.attribution.index import IndexedRow
from workers.evaluation import lds, retrain
from workers.evaluation.methods import METHODS
from workers.evaluation.retrain import Query, Trial, Unit
from workers.evaluation.scene import NotInstalled, Scene
from workers.evaluation.subsets import half_subsets
from workers.training.config import TrainingConfig

WORK = Path(tempfile.gettempdir()) / "tributary-fidelity"
TLDR = Path(__file__).parents[3] / "shared" / "data" / "tldr.jsonl"
ROWS, HELD_OUT, RECALLED = 320, 24, 12


def tldr(count: int, seed: int) -> list[IndexedRow]:
    """Rows of whole contributors of like size, drawn by the seed."""
    by: dict[str, list[dict[str, str]]] = {}
    for line in TLDR.read_text().splitlines():
        r = json.loads(line)
        by.setdefault(r["contributor"], []).append(r)
    names = sorted(n for n, rows in by.items() if len(rows) >= 15)
    random = Random(f"tldr {seed}")
    random.shuffle(names)
    rows = []
    for name in names:
        for r in random.sample(by[name], min(len(by[name]), 22)):
            rows.append((name, r["prompt"], r["completion"]))
        if len(rows) >= count:
            break
    return [row(n, *r) for n, r in enumerate(rows[:count])]


def row(n: int, contributor: str, prompt: str, completion: str) -> IndexedRow:
    return IndexedRow(
        contribution=contributor,
        index=n,
        row_hash=hashlib.sha256(f"{n}{prompt}".encode()).hexdigest(),
        contributor=contributor,
        prompt=prompt,
        completion=completion,
        registered_index=n,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = tldr(ROWS + HELD_OUT, 0)
    held = sorted(Random("held").sample(range(len(every)), HELD_OUT))
    rows = tuple(r for n, r in enumerate(every) if n not in held)
    queries = [
        Query(prompt=every[n].prompt, answer=every[n].completion, kind="held-out") for n in held
    ]
    config = TrainingConfig()
    base = base_model.BUNDLED
    bare = Trial(
        base_path=base, rows=rows, queries=tuple(queries), config=config, folder=options.work
    )
    full = options.work / f"full-{hashlib.sha256(repr((rows, config)).encode()).hexdigest()[:16]}"
    everything = tuple(range(len(rows)))
    adapters = []
    for seed in range(options.seeds):
        retrain.fit(bare, Unit(subset=everything, seed=seed), full / str(seed))
        adapters.append(full / str(seed))
    prompts = [r.prompt for n, r in enumerate(rows) if n % (len(rows) // RECALLED) == 0][:RECALLED]
    said = retrain.answers(bare, adapters[0], prompts + [q.prompt for q in queries])
    asked = prompts + [q.prompt for q in queries]
    for n, (prompt, answer) in enumerate(zip(asked, said, strict=True)):
        if answer:
            kind = "recalled" if n < len(prompts) else "answered"
            queries.append(Query(prompt=prompt, answer=answer, kind=kind))
    trial = Trial(
        base_path=base, rows=rows, queries=tuple(queries), config=config, folder=options.work
    )
    subsets = half_subsets(len(rows), options.subsets, seed=0)
    shared = trial.shared()
    outputs = []
    for seed in range(options.seeds):
        started = time.monotonic()
        values = []
        for n, subset in enumerate(subsets):
            unit = Unit(subset=subset, seed=seed)
            values.append(retrain.measure(trial, unit, retrain.unit_key(trial, shared, unit)))
            if n == 0:
                print(f"unit took {time.monotonic() - started:.1f} s", flush=True)
        outputs.append(np.array(values).T)
    kinds = np.array([q.kind for q in queries])
    if len(outputs) > 1:
        roof = lds.spearman(outputs[0], outputs[1])
        print(
            "ceiling",
            f"{roof.mean():.3f}",
            {k: round(float(roof[kinds == k].mean()), 3) for k in sorted(set(kinds))},
        )
    members = lds.members_of(subsets, len(rows))
    for seed in range(options.seeds):
        model, tokenizer = retrain.load(trial, adapters[seed])
        with tempfile.TemporaryDirectory() as folder:
            scene = Scene(
                model=model,
                tokenizer=tokenizer,
                rows=rows,
                queries=queries,
                folder=Path(folder),
                max_len=config.max_len,
                seed=seed,
            )
            for name in options.methods.split(","):
                started = time.process_time()
                try:
                    scores = METHODS[name](scene)
                except NotInstalled as error:
                    print(f"seed {seed} {name:12} {error.message}")
                    continue
                predicted = lds.predictions(scores, members)
                mine = lds.lds(predicted, outputs[seed])
                mean = lds.lds(predicted, np.mean(outputs, axis=0))
                print(
                    f"seed {seed} {name:12} LDS {mine.mean():.3f}  mean-output {mean.mean():.3f} ",
                    {k: round(float(mine[kinds == k].mean()), 3) for k in sorted(set(kinds))},
                    f"{time.process_time() - started:.1f} s CPU",
                    flush=True,
                )


if __name__ == "__main__":
    main()
