"""The evaluation's arithmetic against brute force: worlds whose answer is known beforehand."""

import itertools
from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray

from ledger.errors import InvalidEvent
from workers.evaluation import lds, shapley
from workers.evaluation.subsets import coalitions, half_subsets, rows_of

Floats = NDArray[np.float64]
RANDOM = np.random.default_rng(7)


# --- subsets ----------------------------------------------------------------------------------


def test_halves_are_halves_and_the_longer_list_begins_with_the_shorter() -> None:
    found = half_subsets(31, 12, seed=3)
    assert all(len(s) == 15 and list(s) == sorted(set(s)) and s[-1] < 31 for s in found)
    assert half_subsets(31, 5, seed=3) == found[:5]
    assert half_subsets(31, 5, seed=4) != found[:5]
    assert len(set(found)) == 12


def test_every_row_is_drawn_as_often_as_any_other() -> None:
    members = lds.members_of(half_subsets(10, 2_000, seed=0), 10)
    assert np.abs(members.mean(axis=0) - 0.5).max() < 0.05


def test_coalitions_come_in_pairs_with_the_kernels_sizes() -> None:
    found = coalitions(6, 4_000, seed=1)
    assert all(
        a | b == set(range(6)) and not a & b for a, b in zip(found[::2], found[1::2], strict=True)
    )
    assert all(0 < len(c) < 6 for c in found)
    mass = np.array([1 / (s * (6 - s)) for s in range(1, 6)])
    seen = np.bincount([len(c) for c in found], minlength=6)[1:] / len(found)
    assert np.abs(seen - mass / mass.sum()).max() < 0.03


def test_rows_of_players() -> None:
    assert rows_of([0, 1, 0, 2, 1], frozenset({0, 2})) == (0, 2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: half_subsets(1, 3, seed=0),
        lambda: half_subsets(9, 0, seed=0),
        lambda: half_subsets(9, 10_000, seed=0),
        lambda: coalitions(1, 8, seed=0),
        lambda: coalitions(4, 0, seed=0),
    ],
)
def test_what_cannot_be_drawn_is_refused(call: object) -> None:
    with pytest.raises(InvalidEvent):
        call()  # type: ignore[operator]


# --- LDS --------------------------------------------------------------------------------------


def linear_world(queries: int = 5, rows: int = 20, count: int = 24) -> tuple[Floats, Floats]:
    """True scores, and outputs that are exactly their sums over each subset."""
    truth = RANDOM.normal(size=(queries, rows))
    members = lds.members_of(half_subsets(rows, count, seed=0), rows)
    return truth, truth @ members.T.astype(float)


def members() -> NDArray[np.bool_]:
    return lds.members_of(half_subsets(20, 24, seed=0), 20)


def test_the_true_scores_of_a_linear_world_have_lds_one() -> None:
    truth, outputs = linear_world()
    assert lds.lds(lds.predictions(truth, members()), outputs) == pytest.approx(np.ones(5))
    assert lds.lds(lds.predictions(-truth, members()), outputs) == pytest.approx(-np.ones(5))


def test_lds_does_not_care_about_monotone_outputs_nor_about_a_constant_per_row() -> None:
    truth, outputs = linear_world()
    # Halves have one size: a constant added to every score adds the same to every subset.
    shifted = lds.predictions(3 * truth + 5, members())
    assert lds.lds(shifted, np.exp(outputs)) == pytest.approx(np.ones(5))


def test_scores_that_say_nothing_have_lds_zero() -> None:
    _, outputs = linear_world()
    same = lds.predictions(np.ones((5, 20)), members())
    assert lds.lds(same, outputs) == pytest.approx(np.zeros(5))
    random = lds.predictions(RANDOM.normal(size=(5, 20)), members())
    assert abs(lds.lds(random, outputs).mean()) < 0.35


def naive_spearman(left: Floats, right: Floats) -> float:
    def ranks(values: Floats) -> Floats:
        return np.array(
            [np.mean([i for i, w in enumerate(sorted(values)) if w == v]) for v in values]
        )

    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def test_spearman_with_ties_against_the_definition() -> None:
    left = RANDOM.integers(0, 6, (40, 9)).astype(float)
    right = RANDOM.integers(0, 6, (40, 9)).astype(float)
    expected = [naive_spearman(a, b) for a, b in zip(left, right, strict=True)]
    assert lds.spearman(left, right) == pytest.approx(np.array(expected))


def test_intervals_cover_and_differences_are_paired() -> None:
    truth, outputs = linear_world(queries=30)
    noisy = truth + RANDOM.normal(size=truth.shape)
    worse = noisy + 0.3 * RANDOM.normal(size=truth.shape)
    predicted = {
        "noisy": lds.predictions(noisy, members()),
        "worse": lds.predictions(worse, members()),
        "again": lds.predictions(noisy, members()),
    }
    found = lds.compare(predicted, outputs, draws=300)
    one = found.scores["noisy"]
    assert one.low < one.mean < one.high
    difference = found.against["noisy", "worse"]
    spread = (one.high - one.low) + (found.scores["worse"].high - found.scores["worse"].low)
    assert difference.high - difference.low < spread / 2  # what both share cancels
    assert found.against["noisy", "again"] == lds.Estimate(mean=0.0, low=0.0, high=0.0)
    assert found.against["worse", "noisy"].mean == pytest.approx(-difference.mean)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Fresh queries and subsets each time; the true LDS is what very many of them give."""

    def sample(queries: int, count: int) -> tuple[Floats, Floats]:
        truth = RANDOM.normal(size=(queries, 30))
        inside = lds.members_of(half_subsets(30, count, seed=int(RANDOM.integers(10**9))), 30)
        outputs = truth @ inside.T.astype(float)
        return lds.predictions(truth + 1.2 * RANDOM.normal(size=truth.shape), inside), outputs

    real = np.mean([lds.lds(*sample(100, 24)).mean() for _ in range(20)])
    held = 0
    for _ in range(40):
        predicted, outputs = sample(20, 24)
        found = lds.compare({"m": predicted}, outputs, draws=200).scores["m"]
        held += found.low <= real <= found.high
    assert held >= 33


def test_the_ceiling_is_what_the_truth_reaches_on_noisy_outputs() -> None:
    truth, outputs = linear_world(queries=60)
    assert lds.agreement(outputs, outputs).mean == pytest.approx(1.0)
    spread = outputs.std(axis=1, keepdims=True)
    one, two = (outputs + spread * RANDOM.normal(size=outputs.shape) for _ in range(2))
    agreement = lds.agreement(one, two).mean
    assert 0.35 < agreement < 0.6  # equal parts of signal and noise: 0.5
    best = lds.predictions(truth, members())
    assert lds.lds(best, one).mean() == pytest.approx(lds.ceiling(agreement, 1), abs=0.06)
    both = lds.lds(best, (one + two) / 2).mean()
    assert both == pytest.approx(lds.ceiling(agreement, 2), abs=0.06)
    assert lds.ceiling(-0.1, 2) == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: lds.predictions(np.zeros((2, 3)), np.zeros((4, 5), dtype=bool)),
        lambda: lds.predictions(np.full((2, 3), np.nan), np.zeros((4, 3), dtype=bool)),
        lambda: lds.lds(np.zeros((2, 5)), np.zeros((3, 5))),
        lambda: lds.lds(np.zeros((2, 2)), np.zeros((2, 2))),
    ],
)
def test_what_does_not_fit_is_refused(call: object) -> None:
    with pytest.raises(InvalidEvent):
        call()  # type: ignore[operator]


# --- Shapley ----------------------------------------------------------------------------------

PLAYERS = 5
EVERYBODY = frozenset(range(PLAYERS))
ALL = [frozenset(c) for n in range(PLAYERS + 1) for c in itertools.combinations(EVERYBODY, n)]
PROPER = [c for c in ALL if 0 < len(c) < PLAYERS]


def game(seed: int) -> dict[frozenset[int], float]:
    """A game with every interaction in it; the empty coalition is worth nothing."""
    random = np.random.default_rng(seed)
    return {c: float(random.normal()) if c else 0.0 for c in ALL}


def by_orders(worth: dict[frozenset[int], float]) -> Floats:
    """The definition: what each adds, averaged over all orders."""
    values = np.zeros(PLAYERS)
    orders = list(itertools.permutations(range(PLAYERS)))
    for order in orders:
        for n, player in enumerate(order):
            values[player] += worth[frozenset(order[: n + 1])] - worth[frozenset(order[:n])]
    return values / len(orders)


def rows(found: list[frozenset[int]], players: int = PLAYERS) -> NDArray[np.bool_]:
    return lds.members_of([tuple(sorted(c)) for c in found], players)


@pytest.mark.parametrize("seed", range(4))
def test_enumeration_is_the_average_over_all_orders(seed: int) -> None:
    worth = game(seed)
    assert shapley.exact(worth, PLAYERS) == pytest.approx(by_orders(worth))


@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_fit_over_all_coalitions_is_the_shapley_value(seed: int) -> None:
    worth = game(seed)
    outputs = np.array([[worth[c] for c in PROPER]])
    weights = np.array([shapley.kernel_weight(PLAYERS, len(c)) for c in PROPER])
    found = shapley.fit(rows(PROPER), outputs, np.array([worth[EVERYBODY]]), weights)
    assert found[0] == pytest.approx(by_orders(worth), abs=1e-6)
    assert found.sum() == pytest.approx(worth[EVERYBODY])


def test_sampled_values_come_within_their_errors_of_the_exact_ones() -> None:
    games = [game(seed) for seed in range(12)]
    drawn = coalitions(PLAYERS, 160, seed=2)
    outputs = np.array([[worth[c] for c in drawn] for worth in games])
    whole = np.array([worth[EVERYBODY] for worth in games])
    found = shapley.sampled(rows(drawn), outputs, whole)
    truth = np.array([by_orders(worth) for worth in games])
    away = np.abs(found.values - truth) / found.errors
    assert (away < 2).mean() > 0.85
    assert (away < 4).all()
    assert found.values.sum(axis=1) == pytest.approx(whole)


def test_an_additive_game_is_found_exactly_from_few_coalitions() -> None:
    each = np.array([3.0, 0.0, 1.0, -2.0, 0.5])
    drawn = coalitions(PLAYERS, 16, seed=0)
    outputs = np.array([[sum(each[p] for p in c) for c in drawn]])
    found = shapley.sampled(rows(drawn), outputs, np.array([each.sum()]), draws=40)
    assert found.values[0] == pytest.approx(each, abs=1e-5)


def test_shares_are_positive_parts() -> None:
    assert shapley.shares(np.array([3.0, -5.0, 1.0])) == pytest.approx([0.75, 0.0, 0.25])
    assert shapley.shares(np.array([-1.0, 0.0])) is None


def values_of(*each: list[float]) -> shapley.Values:
    values = np.array(each)
    return shapley.Values(values=values, errors=np.zeros_like(values), draws=values[None])


def test_payout_error_by_hand() -> None:
    truth = values_of([3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 0.0])
    ours = [{"a": 600_000, "b": 200_000}, {"a": 500_000, "b": 500_000}, {}]
    found = shapley.payout_error(truth, ours, ["a", "b", "c", "d"])
    assert (found.answers, found.skipped) == (2, 1)
    # The first answer: what was attributed is divided rightly, a fifth of the money is nobody's.
    assert found.each == pytest.approx([0.0, 0.5])
    assert found.attributed == pytest.approx(0.25)
    assert found.paid == pytest.approx((0.2 + 0.5) / 2)
    assert found.each_uniform == pytest.approx([0.5, 0.0])
    # Both answers in one period: a 1.25/2, b 0.75/2 against 1/2, 1/4, 1/8, 1/8.
    assert found.period == pytest.approx(0.25)
    assert found.noise == pytest.approx(0.0)


def test_an_answer_attributed_to_nobody_is_compared_as_uniform() -> None:
    found = shapley.payout_error(values_of([1.0, 0.0]), [{}], ["a", "b"])
    assert found.each == pytest.approx([0.5])
    assert found.paid == pytest.approx(1.0)


def test_a_game_without_gain_has_no_payout_to_compare_with() -> None:
    with pytest.raises(InvalidEvent):
        shapley.payout_error(values_of([-1.0, 0.0]), [{}], ["a", "b"])


def test_kernel_weights_are_those_of_the_paper() -> None:
    assert shapley.kernel_weight(4, 2) == pytest.approx(3 / (comb(4, 2) * 2 * 2))
