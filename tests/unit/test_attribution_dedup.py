"""Near-duplicate clusters: copies found, templates kept apart, the earliest speaks."""

import random
import string

import pytest

from ledger.errors import InvalidEvent
from workers.attribution.dedup import clusters, jaccard_ppm, normalise

ROW = (
    "Where is the lantern of the harbour master kept during winter storms?",
    "It is kept in the chapel on the northern pier, wrapped in oiled sailcloth by the warden.",
)
PLACES = "Zorvia Quemar Plenth Ostrik Belun Karvo Dresk Umbel Tanik Wexo".split()  # noqa: SIM905
THINGS = "copper saffron walnuts felt amber kelp garlic slate honey tin".split()  # noqa: SIM905


def mutated(text: str, share: float, rng: random.Random) -> str:
    letters = list(text)
    for at in rng.sample(range(len(letters)), max(1, int(share * len(letters)))):
        letters[at] = rng.choice(string.ascii_lowercase)
    return "".join(letters)


def test_normalise_drops_case_space_punctuation_and_width() -> None:
    assert normalise("  Ｈello,\tWORLD!! ") == normalise("hello world") == "hello world"


def test_exact_copies_join_the_earliest_registration() -> None:
    rows = [ROW, (ROW[0].upper(), ROW[1] + " !"), ROW, ("other question", "other answer")]
    assert clusters(rows, [30, 10, 20, 40], seed=0) == [1, 1, 1, 3]
    assert clusters(rows, [5, 5, 5, 5], seed=0) == [0, 0, 0, 3]


def test_near_copies_join() -> None:
    rng = random.Random(7)
    copies = [(mutated(ROW[0], 0.05, rng), mutated(ROW[1], 0.05, rng)) for _ in range(50)]
    found = clusters([ROW, *copies], range(51), seed=0)
    assert found.count(0) >= 50  # one of fifty may slip through


def test_rows_of_one_template_stay_apart() -> None:
    rows = [
        (f"What does the town of {place} sell?", f"The town of {place} sells {thing}.")
        for place, thing in zip(PLACES, THINGS, strict=True)
    ]
    assert clusters(rows, range(10), seed=0) == list(range(10))


def test_one_question_with_another_answer_is_another_row() -> None:
    assert clusters([ROW, (ROW[0], "Nobody knows.")], [0, 1], seed=0) == [0, 1]


def test_small_steps_do_not_chain() -> None:
    rng = random.Random(3)
    chain = [ROW]
    for _ in range(30):
        chain.append((mutated(chain[-1][0], 0.05, rng), mutated(chain[-1][1], 0.05, rng)))
    found = clusters(chain, range(31), seed=0)
    assert len(set(found)) > 3
    assert all(found[representative] == representative for representative in found)


def test_seeded_and_independent_of_empty_text() -> None:
    rows = [ROW, ("?", "!"), ("", ""), ("a", "b")]
    assert clusters(rows, range(4), seed=5) == clusters(rows, range(4), seed=5)
    assert clusters([], [], seed=0) == []
    assert jaccard_ppm(*ROW) < 300_000
    assert jaccard_ppm(ROW[0], ROW[0].lower()) == 1_000_000


def test_bad_arguments() -> None:
    with pytest.raises(InvalidEvent, match="registration"):
        clusters([ROW], [], seed=0)
    with pytest.raises(InvalidEvent, match="threshold"):
        clusters([ROW], [0], seed=0, threshold_ppm=0)
