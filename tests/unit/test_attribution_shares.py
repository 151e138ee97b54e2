"""The rule that pays, alone: integers in, integers out."""

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.domain.events import MAX_SHARES
from ledger.domain.money import PPM_WHOLE
from ledger.errors import InvalidEvent
from workers.attribution.shares import (
    WEIGHT_BITS,
    shares_from_scores,
    shift_of,
    weight_of,
)

rows_of_an_answer = st.lists(
    st.tuples(st.integers(-(2**48), 2**48), st.sampled_from(["ann", "bob", "cyd", "dan"])),
    max_size=30,
)


def alone(count: int) -> list[int]:
    return list(range(count))


@given(rows_of_an_answer, st.integers(0, 2**48), st.integers(0, 2**48))
def test_always_the_whole_and_never_negative(
    rows: list[tuple[int, str]], placebo: int, noise: int
) -> None:
    scores, names = [r[0] for r in rows], [r[1] for r in rows]
    shares = shares_from_scores(scores, names, alone(len(rows)), placebo, noise=noise)
    assert sum(ppm for _, ppm in shares.contributors) + shares.unattributed_ppm == PPM_WHOLE
    assert all(ppm > 0 for _, ppm in shares.contributors)
    assert shares.contributors == sorted(shares.contributors)
    if max(scores, default=0) <= max(placebo, noise):
        assert shares.unattributed_ppm == PPM_WHOLE


@given(
    rows_of_an_answer,
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.randoms(use_true_random=False),
)
def test_splitting_an_identity_gains_nothing(
    rows: list[tuple[int, str]], placebo: int, noise: int, rng: random.Random
) -> None:
    scores, names = [r[0] for r in rows], [r[1] for r in rows]
    split = [f"ann-{rng.randrange(10)}" if name == "ann" else name for name in names]
    whole = alone(len(rows))
    before = dict(shares_from_scores(scores, names, whole, placebo, noise=noise).contributors)
    after = shares_from_scores(scores, split, whole, placebo, noise=noise).contributors
    gained = sum(ppm for name, ppm in after if name.startswith("ann-")) - before.get("ann", 0)
    assert gained <= 10  # rounding: less than one ppm for each name


def test_negatives_are_clipped_per_example_not_after_summing() -> None:
    # Summed first, ann would have 0; clipped first she has half.
    shares = shares_from_scores([50, -100, 50], ["ann", "ann", "bob"], alone(3), 0)
    assert shares.contributors == [("ann", 500_000), ("bob", 500_000)]


def test_a_copy_earns_nothing_and_costs_nothing() -> None:
    before = shares_from_scores([90, 10], ["ann", "bob"], [0, 1], 5)
    after = shares_from_scores([90, 10, 90, 90], ["ann", "bob", "eve", "eve"], [0, 1, 0, 0], 5)
    assert after == before


def test_a_row_weighs_what_stands_out_of_the_noise() -> None:
    weights = [weight_of(score, 100, 0) for score in (-500, 0, 100, 101, 150, 200, 1000)]
    assert weights[:3] == [0, 0, 0]
    exact = [s - 100**4 / s**3 for s in (101, 150, 200, 1000)]
    assert all(abs(w - e) <= 2 for w, e in zip(weights[3:], exact, strict=True))


@given(st.integers(0, 2**54), st.integers(0, 2**54), st.integers(0, 2**54))
def test_more_score_hardly_ever_weighs_less(a: int, b: int, noise: int) -> None:
    """Never by more than the rounding of three divisions."""
    low, high = sorted((a, b))
    shift = shift_of(high, noise)
    assert 0 <= weight_of(low, noise, shift) <= weight_of(high, noise, shift) + 3
    assert weight_of(high, noise, shift) <= high >> shift < 2**WEIGHT_BITS


def test_what_does_not_clear_the_placebo_is_nobodys() -> None:
    parts = [
        shares_from_scores([best, 5], ["ann", "bob"], alone(2), 10, noise=5).unattributed_ppm
        for best in (9, 10, 11, 20, 100)
    ]
    assert parts == [1_000_000, 1_000_000, 826_447, 250_000, 10_000]


def test_what_is_withdrawn_is_unattributed_and_its_copies_stay_silent() -> None:
    names, clusters = ["ann", "bob", "eve"], [0, 1, 0]
    shares = shares_from_scores([30, 30, 30], names, clusters, 0, withdrawn={0})
    assert shares.contributors == [("bob", 500_000)]
    assert shares.unattributed_ppm == 500_000


def test_remainder_ties_go_by_id() -> None:
    shares = shares_from_scores([1, 1, 1], ["c", "b", "a"], alone(3), 0)
    assert shares.contributors == [("a", 333_334), ("b", 333_333), ("c", 333_333)]


def test_ten_thousand_contributors() -> None:
    names = [f"ed25519:{n:064x}" for n in range(10_000)]
    scores = [random.Random(1).randrange(2**40) + n for n in range(10_000)]
    everyone = shares_from_scores(scores, names, alone(10_000), 1000, limit=10_000)
    assert sum(p for _, p in everyone.contributors) + everyone.unattributed_ppm == PPM_WHOLE
    assert len(everyone.contributors) == 10_000

    event = shares_from_scores(scores, names, alone(10_000), 1000)
    assert len(event.contributors) == MAX_SHARES
    # What does not fit is nobody's; those who fit get what they had, not more.
    had = dict(everyone.contributors)
    assert all(abs(ppm - had[name]) <= 1 for name, ppm in event.contributors)
    assert event.unattributed_ppm > 900_000


def test_a_noise_level_is_a_whole_number_too() -> None:
    with pytest.raises(InvalidEvent, match="noise"):
        shares_from_scores([1], ["a"], [0], 0, noise=-1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1], ["a", "b"], [0], 0), "one of each per row"),
        (([1.0], ["a"], [0], 0), "not floats"),
        (([1], ["a"], [1], 0), "represents itself"),
        (([1, 1, 1], ["a", "b", "c"], [0, 0, 1], 0), "represents itself"),
        (([1], ["a"], [0], -1), "placebo"),
        (([1], ["a"], [0], 0.5), "placebo"),
        (([1], ["a"], [0], True), "placebo"),
    ],
)
def test_bad_input_is_named(arguments: tuple, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InvalidEvent, match=words):
        shares_from_scores(*arguments)


def test_an_auditor_needs_no_torch() -> None:
    code = (
        "import sys, workers.attribution.shares; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
