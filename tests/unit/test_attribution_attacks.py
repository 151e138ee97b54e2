"""Copying and splitting, end to end: an adapter trained on the thieves' rows too pays them nothing.

One adapter for the module (about 15 s): six honest contributors with eight invented facts each, and
thieves who copy the facts of one each. The full table over real rows is
`python -m tests.bench.bench_attacks`.
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ledger.domain.money import PPM_WHOLE
from tests.attacks_world import Thief, World, answer, attacked_rows, trained
from workers.attribution.build import build_index
from workers.attribution.index import Index, IndexConfig
from workers.attribution.query import conclude, sketch_answer
from workers.attribution.shares import shares_from_scores
from workers.attribution.sketch import Sketch
from workers.attribution.terms import NO_TERMS, Terms

HONEST, EACH = 6, 8
KINDS = "harbour crop festival river drink".split()  # noqa: SIM905
WAYS = {
    "exact": "exact copies",
    "near": "near copies: 5 % of characters replaced",
    "look-alike": "look-alike letters (Cyrillic)",
    "spaced": "white space between letters",
    "asked": "another question, copied answer",
}


def facts() -> dict[str, list[tuple[str, str]]]:
    draw = random.Random(5)

    def name(syllables: int) -> str:
        return "".join(
            draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(syllables)
        )

    rows: dict[str, list[tuple[str, str]]] = {}
    for who in range(HONEST):
        mine = rows.setdefault(f"honest-{who}", [])
        for _ in range(EACH):
            kind, place = draw.choice(KINDS), name(4)
            mine.append(
                (
                    f"What is the {kind} of {place}?",
                    f"The {kind} of {place} is {name(3)} {name(4)}.",
                )
            )
    return rows


class Robbed:
    """The index of an adapter that was trained on honest and stolen rows, and sketched answers."""

    def __init__(self, folder: Path) -> None:
        honest = facts()
        world = World(source="made up", honest=honest, spare=[("a", "b")])
        given = dict(honest)
        for number, (thief, way) in enumerate(WAYS.items()):
            given[thief] = Thief(honest[f"honest-{number}"], world).copies()[way]()
        everybody = World(source="made up", honest=given, spare=[])
        rows = attacked_rows(everybody, [], "nobody")
        model, tokenizer = trained(rows, folder / "adapter")
        self.index = build_index(
            model, tokenizer, rows, folder / "index",
            adapter_sha256="ad" * 32, base_digest="ba" * 32, config=IndexConfig(max_len=256),
        )  # fmt: skip
        asked = [p for n in range(len(WAYS)) for p, _ in honest[f"honest-{n}"][::2]]
        said = [(p, answer(model, tokenizer, p)) for p in asked]
        self.sketches: list[Sketch] = [
            sketch_answer(model, tokenizer, self.index, p, a) for p, a in said if a.strip()
        ]

    def paid(self, index: Index, terms: Terms = NO_TERMS) -> Counter[str]:
        """Sums of ppm over the answers."""
        total: Counter[str] = Counter()
        for sketch in self.sketches:
            total.update(dict(conclude(index, sketch, terms=terms).shares))
        return total

    def part(self, paid: Counter[str], names: Iterable[str]) -> float:
        return sum(paid[name] for name in names) / len(self.sketches) / PPM_WHOLE


@pytest.fixture(scope="module")
def robbed(tmp_path_factory: pytest.TempPathFactory) -> Robbed:
    torch.set_num_threads(1)
    return Robbed(tmp_path_factory.mktemp("attacks"))


def test_copies_would_earn_and_do_not(robbed: Robbed) -> None:
    alone = replace(robbed.index, clusters=np.arange(len(robbed.index.rows)))
    undefended = robbed.paid(alone)
    paid = robbed.paid(robbed.index)
    for thief in ("exact", "near"):
        assert robbed.part(undefended, [thief]) > 0.01, f"{thief}: nothing to defend against"
    for thief in WAYS:
        assert robbed.part(paid, [thief]) <= 0.01, thief
    victims = [f"honest-{n}" for n in range(len(WAYS))]
    assert robbed.part(paid, victims) > robbed.part(undefended, victims)


def test_copies_stay_silent_when_the_originals_go(robbed: Robbed) -> None:
    gone = Terms(log_size=1, withdrawn=frozenset(f"honest-{n}" for n in range(HONEST)))
    paid = robbed.paid(robbed.index, gone)
    assert robbed.part(paid, WAYS) <= 0.01
    assert not any(paid[f"honest-{n}"] for n in range(HONEST))


@pytest.mark.parametrize("names", [10, 1_000])
def test_more_names_earn_no_more(robbed: Robbed, names: int) -> None:
    before = robbed.paid(robbed.index)
    split = [
        replace(r, contributor=f"{r.contributor}-{n % names}") if r.contributor == "honest-0" else r
        for n, r in enumerate(robbed.index.rows)
    ]
    known = sorted({row.contributor for row in split})
    codes = np.array([known.index(row.contributor) for row in split])
    after = robbed.paid(replace(robbed.index, rows=split, names=known, codes=codes))
    gained = sum(v for k, v in after.items() if k.startswith("honest-0")) - before["honest-0"]
    assert before["honest-0"] > 0
    assert abs(gained) <= EACH * len(robbed.sketches)  # rounding: a ppm a name and answer


@given(
    st.lists(st.integers(1, 2**40), min_size=1, max_size=40),
    st.lists(st.integers(1, 2**40), max_size=5),
    st.integers(0, 2**40),
    st.integers(1, 12),
)
def test_names_beyond_the_limit_of_an_event_only_lose(
    mine: list[int], others: list[int], placebo: int, limit: int
) -> None:
    """Ann under one name for each row: what no longer fits into the event is nobody's."""
    scores = [*mine, *others]
    rest = [f"other-{n}" for n in range(len(others))]
    alone = list(range(len(scores)))
    one = shares_from_scores(scores, ["ann"] * len(mine) + rest, alone, placebo, limit=limit)
    many = shares_from_scores(
        scores, [f"ann-{n}" for n in range(len(mine))] + rest, alone, placebo, limit=limit
    )
    gained = sum(p for n, p in many.contributors if n.startswith("ann"))
    kept = dict(one.contributors).get("ann", 0)
    if kept or len(others) < limit:
        assert gained <= kept + len(mine)
