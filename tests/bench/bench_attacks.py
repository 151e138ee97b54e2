"""What attackers earn: copies, near-copies, ten names, junk, against the engine that pays.

    python -m tests.bench.bench_attacks [--only WORDS] [--data ../shared/data]

Twelve contributors with ten rows each, the bundled base model. For each attack an adapter is
trained on the honest rows *and* the attacker's, as a real attacker's rows would be; the model
answers 40 questions; each answer is attributed. The pool is all answers, one million ppm each. The
attacker registers last and copies the three contributors who earn most, row by row, so a third of
the pool is at stake. Columns, in percent of the pool:

    alone      the attacker, if every row spoke for itself (no clusters)
    earns      the attacker, as it is paid, of all there is; and of what is attributed
    victims    what the copied earn, less what they earn where there is no attacker
    merged     the attacker's rows that the clusters silence
    gate       what `screening` holds the contribution for, before it trains at all
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.attacks_world import Pair, Thief, World, answer, attacked_rows, honest_world, trained
from tests.gates_world import SHARED, contribution
from workers.attribution.build import build_index
from workers.attribution.index import Index, IndexConfig
from workers.attribution.query import conclude, sketch_answer
from workers.attribution.screening import screen
from workers.attribution.sketch import Sketch
from workers.attribution.terms import NO_TERMS, Terms

CONTRIBUTORS, VICTIMS = 12, 3
ASK_EVERY = 3
ATTACKER = "attacker"
Attacks = dict[str, Callable[[], list[Pair]]]
NAMES = 10


@dataclass(frozen=True, kw_only=True)
class Paid:
    """Sums of ppm over all answers, by name, and how many answers there were."""

    by_name: Counter[str]
    answers: int

    def part(self, *names: str) -> float:
        """Percent of the pool."""
        return sum(self.by_name[name] for name in names) / self.answers / 1e4

    def attributed(self, name: str) -> float:
        """Percent of what is attributed to anybody."""
        return 100 * self.by_name[name] / max(1, sum(self.by_name.values()))


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table; percent."""

    attack: str
    alone: float
    earns: float
    of_attributed: float
    victims: float
    merged: float
    gate: str


@dataclass(frozen=True, kw_only=True)
class Lived:
    """A trained world: its index, and a sketch of each answer that the model gave."""

    index: Index
    sketches: list[Sketch]

    def paid(self, index: Index | None = None, terms: Terms = NO_TERMS) -> Paid:
        by_name: Counter[str] = Counter()
        for sketch in self.sketches:
            result = conclude(index or self.index, sketch, terms=terms)
            by_name.update(dict(result.shares))
        return Paid(by_name=by_name, answers=len(self.sketches))

    def unclustered(self) -> Index:
        return replace(self.index, clusters=np.arange(len(self.index.rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--only", default="", help="numbers of attacks, such as 0,3,4; else all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    world = honest_world(CONTRIBUTORS, data=options.data)
    honest = live(world, [])
    before = honest.paid()
    victims = [name for name, _ in before.by_name.most_common(VICTIMS)]
    stolen = [pair for name in victims for pair in world.honest[name]]
    nobody = 100 - before.part(*before.by_name)
    print(
        f"{world.source}: {len(world.honest)} contributors, {len(world.pairs)} rows, "
        f"{before.answers} answers; unattributed {nobody:.1f} %; the {VICTIMS} who earn most: "
        + ", ".join(f"{before.part(name):.1f} %" for name in victims)
    )
    ten_names(honest, victims[0])
    print(f"\n{'attack':<62} alone  earns (attr.)  victims  merged  gate")
    lines = []
    wanted = set(options.only.split(",")) if options.only else None
    for number, name in enumerate(attacks(stolen, world, seed=0)):
        if wanted is None or str(number) in wanted:
            pairs = attacks(stolen, world, seed=number)[name]()
            lived = live(world, pairs)
            lines.append(measure(name, world, lived, pairs, victims, before))
            show(lines[-1])
            if name in ("exact copies", "near copies: 5 % of characters replaced"):
                lines += [after(name, lived, victims, before), first(name, lived, victims, before)]
                show(lines[-2])
                show(lines[-1])
    print(f"\n{time.process_time() - started:.0f} s of CPU time")
    print(json.dumps({"attacks": [asdict(line) for line in lines]}, indent=2))


def attacks(stolen: Sequence[Pair], world: World, *, seed: int) -> Attacks:
    thief = Thief(stolen, world, seed=seed)
    return {**thief.copies(), **thief.floods()}


def live(world: World, attack: Sequence[Pair]) -> Lived:
    """Train on everything, answer, and sketch the answers."""
    rows = attacked_rows(world, attack, ATTACKER)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = trained(rows, Path(folder) / "adapter")
        index = build_index(
            model, tokenizer, rows, Path(folder) / "index",
            adapter_sha256="ad" * 32, base_digest="ba" * 32, config=IndexConfig(max_len=256),
        )  # fmt: skip
        said = [(p, answer(model, tokenizer, p)) for p, _ in world.pairs[::ASK_EVERY]]
        sketches = [sketch_answer(model, tokenizer, index, p, a) for p, a in said if a.strip()]
        return Lived(index=index, sketches=sketches)


def measure(
    name: str,
    world: World,
    lived: Lived,
    pairs: Sequence[Pair],
    victims: Sequence[str],
    before: Paid,
) -> Line:
    paid = lived.paid()
    own = [n for n, row in enumerate(lived.index.rows) if row.contributor == ATTACKER]
    return Line(
        attack=name,
        alone=lived.paid(lived.unclustered()).part(ATTACKER),
        earns=paid.part(ATTACKER),
        of_attributed=paid.attributed(ATTACKER),
        victims=paid.part(*victims) - before.part(*victims),
        merged=100 * float(np.mean(lived.index.clusters[own] != own)),
        gate=held(world, pairs),
    )


def after(name: str, lived: Lived, victims: Sequence[str], before: Paid) -> Line:
    """The victims withdraw everything: the attacker's copies stay silent."""
    terms = Terms(log_size=1, withdrawn=frozenset(victims))
    paid = lived.paid(terms=terms)
    return Line(
        attack=f"  ... and the originals are withdrawn ({name.split(':')[0]})",
        alone=lived.paid(lived.unclustered(), terms).part(ATTACKER),
        earns=paid.part(ATTACKER),
        of_attributed=paid.attributed(ATTACKER),
        victims=-before.part(*victims),
        merged=0,
        gate="",
    )


def first(name: str, lived: Lived, victims: Sequence[str], before: Paid) -> Line:
    """The attacker registers before the victims: then the clusters speak for the attacker."""
    clusters = lived.index.clusters.copy()
    for row, leader in enumerate(clusters.tolist()):
        if lived.index.rows[row].contributor == ATTACKER and leader != row:
            clusters[clusters == leader] = row
    paid = lived.paid(replace(lived.index, clusters=clusters))
    return Line(
        attack=f"  ... and registered before the originals ({name.split(':')[0]})",
        alone=0,
        earns=paid.part(ATTACKER),
        of_attributed=paid.attributed(ATTACKER),
        victims=paid.part(*victims) - before.part(*victims),
        merged=0,
        gate="",
    )


def held(world: World, pairs: Sequence[Pair]) -> str:
    """The reasons for which the gates hold the attacker's contribution."""
    rows = [
        row
        for registered, (name, given) in enumerate([*world.honest.items(), (ATTACKER, pairs)])
        for row in contribution(name, registered, given)
    ]
    return ", ".join(f.reason for f in screen(rows) if f.contribution == ATTACKER) or "-"


def ten_names(honest: Lived, name: str) -> None:
    """The best earner under one name, under ten, and under a name for each row."""
    one = honest.paid().part(name)
    for many in (NAMES, 1_000):
        split = [
            replace(row, contributor=f"{name}-{n % many}") if row.contributor == name else row
            for n, row in enumerate(honest.index.rows)
        ]
        paid = honest.paid(renamed(honest.index, split))
        ten = sum(v for k, v in paid.by_name.items() if k.startswith(name)) / paid.answers / 1e4
        print(f"identity split into {min(many, 10)}: {one:.4f} % -> {ten:.4f} % of the pool")


def renamed(index: Index, rows: list[Any]) -> Index:
    names = sorted({row.contributor for row in rows})
    codes = np.array([names.index(row.contributor) for row in rows])
    return replace(index, rows=rows, names=names, codes=codes)


def show(line: Line) -> None:
    print(
        f"{line.attack:<62} {line.alone:5.1f} {line.earns:6.2f} {line.of_attributed:7.2f} "
        f"{line.victims:8.1f} {line.merged:7.0f}  {line.gate}",
        flush=True,
    )


if __name__ == "__main__":
    main()
