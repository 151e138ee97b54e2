"""The integer half of a query: terms, and the fast shares held against the rule as written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.errors import InvalidEvent
from workers.attribution.index import LEVEL_SHIFT, Index, RowMeta
from workers.attribution.query import conclude_from_scores, shares_from_index
from workers.attribution.shares import shares_from_scores
from workers.attribution.sketch import NORM_UNIT, Sketch
from workers.attribution.terms import MAX_TERMS, NO_TERMS, Terms

UUIDS = [f"00000000-0000-4000-8000-{n:012x}" for n in range(40)]
SKETCH = Sketch(vector=np.ones(4, dtype=np.int8), norm=NORM_UNIT)
NOTHING: Any = None


def index_of(clusters: list[int], givers: list[int], placebo: int, noise: int = 0) -> Index:
    """An index of rows without vectors: the scores come from the test."""
    rows = [
        RowMeta(
            contribution=UUIDS[giver],
            index=n,
            row_hash="00" * 32,
            contributor=f"person-{giver % 7}",
            registered_index=n,
            cluster=cluster,
        )
        for n, (cluster, giver) in enumerate(zip(clusters, givers, strict=True))
    ]
    names = sorted({row.contributor for row in rows})
    # A sketch of norm NORM_UNIT has its levels at exactly these scores.
    levels = [str((level << LEVEL_SHIFT) // NORM_UNIT) for level in (placebo, noise)]
    return Index(
        path=Path(),
        manifest={
            "method": "ekfac-lora/v2",
            "placebo_level": levels[0],
            "noise_level": levels[1],
        },
        manifest_sha256="ab" * 32,
        rows=rows,
        clusters=np.array(clusters, dtype=np.int64),
        names=names,
        codes=np.array([names.index(row.contributor) for row in rows], dtype=np.int64),
        vectors=np.zeros((len(rows), 4), dtype=np.int8),
        scales=np.ones(len(rows), dtype=np.uint32),
        whitener=NOTHING,
        coordinates=NOTHING,
        matrix=NOTHING,
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Index, Any, Terms]:
    count = draw(st.integers(1, 30))
    clusters: list[int] = []
    for row in range(count):
        leaders = [r for r in range(row) if clusters[r] == r]
        clusters.append(draw(st.sampled_from([row, *leaders])))
    givers = draw(st.lists(st.integers(0, 39), min_size=count, max_size=count))
    size = st.integers(-(2**54), 2**54) | st.integers(-5, 5)
    scores = draw(st.lists(size, min_size=count, max_size=count))
    gone = draw(st.sets(st.sampled_from(givers), max_size=3))
    split = draw(st.sets(st.integers(0, count - 1), max_size=3))
    terms = Terms(
        log_size=9,
        withdrawn=frozenset(UUIDS[g] for g in gone),
        splits=frozenset((UUIDS[givers[row]], row) for row in split),
    )
    placebo, noise = draw(st.integers(0, 2**54)), draw(st.integers(0, 2**54))
    return index_of(clusters, givers, placebo, noise), np.array(scores, dtype=np.int64), terms


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_the_fast_rule_is_the_written_one(world: tuple[Index, Any, Terms]) -> None:
    index, scores, terms = world
    clusters = [
        n if (row.contribution, row.index) in terms.splits else row.cluster
        for n, row in enumerate(index.rows)
    ]
    # A row that was split off may have led others: they stay silent behind it.
    expected = shares_from_scores(
        scores.tolist(),
        [row.contributor for row in index.rows],
        clusters,
        index.placebo(SKETCH),
        noise=index.noise(SKETCH),
        withdrawn={n for n, row in enumerate(index.rows) if row.contribution in terms.withdrawn},
    )
    assert shares_from_index(index, SKETCH, scores, terms=terms) == expected


def test_what_a_withdrawn_row_weighs_is_nobodys() -> None:
    index = index_of([0, 1, 1], [0, 1, 2], placebo=0)
    scores = np.array([100, 100, 100], dtype=np.int64)
    before = shares_from_index(index, SKETCH, scores)
    assert before.contributors == [("person-0", 500_000), ("person-1", 500_000)]
    terms = Terms(log_size=5, withdrawn=frozenset({UUIDS[1]}))
    after = shares_from_index(index, SKETCH, scores, terms=terms)
    assert after.contributors == [("person-0", 500_000)], "the other gains nothing, nor the copy"
    assert after.unattributed_ppm == 500_000


def test_a_split_gives_a_row_its_voice_back() -> None:
    index = index_of([0, 1, 1], [0, 1, 2], placebo=0)
    scores = np.array([100, 100, 100], dtype=np.int64)
    terms = Terms(log_size=5, splits=frozenset({(UUIDS[2], 2)}))
    found = conclude_from_scores(index, SKETCH, scores, terms=terms)
    assert [name for name, _ in found.shares] == ["person-0", "person-1", "person-2"]
    assert len(found.top_rows) == 3
    assert found.terms == terms


def test_rows_against_are_named_and_cost_nothing() -> None:
    index = index_of(list(range(14)), list(range(14)), placebo=0)
    scores = np.array([50, *[-n for n in range(13)]], dtype=np.int64)
    found = conclude_from_scores(index, SKETCH, scores)
    assert [score for _, _, score in found.against] == list(range(-12, -2))
    assert found.shares == [("person-0", 1_000_000)]


def test_terms_have_one_spelling() -> None:
    terms = Terms(
        log_size=7, withdrawn=frozenset({UUIDS[2], UUIDS[1]}), splits=frozenset({(UUIDS[3], 0)})
    )
    assert Terms.from_dict(terms.to_dict()) == terms
    assert terms.to_dict()["withdrawn"] == sorted(terms.withdrawn)
    assert Terms.from_dict({**NO_TERMS.to_dict(), "held": []}) == NO_TERMS, "as the API answers"


@pytest.mark.parametrize(
    "bad",
    [
        None,
        {},
        {"log_size": -1, "withdrawn": [], "splits": []},
        {"log_size": 1.0, "withdrawn": [], "splits": []},
        {"log_size": 1, "withdrawn": ["x"], "splits": []},
        {"log_size": 1, "withdrawn": UUIDS[0], "splits": []},
        {"log_size": 1, "withdrawn": [], "splits": [[UUIDS[0]]]},
        {"log_size": 1, "withdrawn": [], "splits": [[UUIDS[0], True]]},
        {"log_size": 1, "withdrawn": [UUIDS[0]] * (MAX_TERMS + 1), "splits": []},
    ],
)
def test_other_terms_are_refused(bad: object) -> None:
    with pytest.raises(InvalidEvent, match=r"terms|UUID"):
        Terms.from_dict(bad)
