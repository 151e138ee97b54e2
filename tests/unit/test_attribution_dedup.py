"""Near-duplicate clusters: copies found, templates kept apart, the earliest speaks."""

import random
import string
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.errors import InvalidEvent
from tests.attacks_world import Thief, World
from tests.gates_world import SHARED, real
from workers.attribution.candidates import CROWD, Candidates
from workers.attribution.dedup import Text, clusters, one_voice
from workers.attribution.edits import edits, edits_inside
from workers.attribution.folding import MAX_CHARS, folded, folded_words

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


def slowly(a: str, b: str) -> int:
    """Levenshtein by the book."""
    above = list(range(len(b) + 1))
    for row, x in enumerate(a, 1):
        line = [row]
        for column, y in enumerate(b, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (x != y)))
        above = line
    return above[-1]


short = st.text(alphabet="abc", max_size=9)


@given(short, short)
def test_edits_by_the_book(a: str, b: str) -> None:
    assert edits(a, b) == edits(b, a) == slowly(a, b)
    parts = [b[i:j] for i in range(len(b) + 1) for j in range(i, len(b) + 1)]
    assert edits_inside(a, b) == min(slowly(a, part) for part in parts)


def test_folding_drops_case_space_punctuation_and_width() -> None:
    assert folded_words("  Ｈello,\tWORLD!! ") == ["hello", "world"]
    assert folded("hello world") == folded("h e l l o\u200bw\u2060orld") == "helloworld"


def test_folding_sees_what_a_reader_sees() -> None:
    plain = "copy the space to another place"
    cyrillic = plain.translate(
        str.maketrans("aceopsxy", "\u0430\u0441\u0435\u043e\u0440\u0455\u0445\u0443")
    )
    assert cyrillic != plain
    assert folded(cyrillic) == folded(plain)
    assert folded("co\u0301py t\ufe0fhe \ufb01le") == "copythefile"
    # Vowel signs are letters, not accents; marks alone stay what they are.
    assert folded("\u0915\u093f") != folded("\u0915\u0940")
    assert folded("!*") != folded("!$")
    assert len(folded("\u200b" * 10 + "x" * (MAX_CHARS + 10))) == MAX_CHARS


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


def test_a_copy_of_a_silent_row_is_silent_too() -> None:
    """Else a thief would copy the rows that stand silent, changed away from who speaks for them."""
    letters = list(ROW[1])
    steps = [ROW]
    for start in (0, 8, 16, 24):  # each 8 of some 80 characters further from the first
        letters[start : start + 8] = "zqxjkvwp"
        steps.append((ROW[0], "".join(letters)))
    texts = [Text.of(*step) for step in steps]
    assert one_voice(texts[0], texts[1])
    assert one_voice(texts[1], texts[2])
    assert not one_voice(texts[0], texts[2])
    assert clusters(steps[:3], range(3), seed=0) == [0, 0, 0]
    # Who came in by a silent row brings nobody: the chain ends.
    assert clusters(steps, range(5), seed=0)[:4] == [0, 0, 0, 3]


def test_seeded_and_independent_of_empty_text() -> None:
    rows = [ROW, ("?", "!"), ("", ""), ("a", "b")]
    assert clusters(rows, range(4), seed=5) == clusters(rows, range(4), seed=5) == [0, 1, 2, 3]
    assert clusters([], [], seed=0) == []


OPEN = ("synonyms", "copied question, answer of another row")
"""Another text to the clusters; docs/ATTRIBUTION.md says what that earns."""
COPIES = tuple(Thief([], World(source="", honest={}, spare=[])).copies())


@pytest.mark.parametrize("name", [name for name in COPIES if name not in OPEN])
def test_every_way_to_copy_that_the_page_says_is_stopped(name: str) -> None:
    """A paragraph each."""
    victims = [ROW, *[(f"Where is {t} sold in {p}?", mixed(p + t)) for p, t in
                      zip(PLACES, THINGS, strict=True)]]  # fmt: skip
    world = World(source="", honest={"ann": victims}, spare=[(mixed("q"), mixed("r"))])
    made = Thief(victims, world).copies()[name]()
    assert all(pair not in victims for pair in made) or name == "exact copies"
    found = clusters([*victims, *made], range(2 * len(victims)), seed=0)
    assert found == [*range(len(victims)), *range(len(victims))]


def test_the_same_question_with_another_answer_is_no_copy() -> None:
    """Left open on purpose: it teaches something else, and silences nobody who asked first."""
    victims = [(f"Where is {t} sold?", mixed(t)) for t in THINGS]
    world = World(source="", honest={"ann": victims}, spare=[(mixed("q"), mixed("r"))])
    made = Thief(victims, world).copies()[OPEN[1]]()
    found = clusters([*victims, *made], range(len(victims) + len(made)), seed=0)
    assert found[: len(victims)] == list(range(len(victims)))
    assert all(speaker >= len(victims) for speaker in found[len(victims) :])


def mixed(seed: str) -> str:
    """A sentence of made-up words of its own."""
    draw = random.Random(seed)
    word = lambda: "".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(3))  # noqa: E731
    return " ".join(word() for _ in range(9))


def test_short_answers_that_differ_are_not_copies() -> None:
    question = "Does the following review of the restaurant on the pier speak well of its kitchen?"
    rows = [(question, said) for said in ("yes", "no", "good", "bad", "1", "2", "12", "A", "B")]
    assert clusters(rows, range(len(rows)), seed=0) == list(range(len(rows)))


def test_a_short_answer_to_another_question_is_anybodys() -> None:
    rows = [(mixed(str(n)), "It is positive.") for n in range(20)]
    assert clusters(rows, range(20), seed=0) == list(range(20))


def test_long_texts_are_compared_by_runs() -> None:
    rng = random.Random(2)
    letters = ["".join(rng.choice("acgt") for _ in range(2_000)) for _ in range(6)]
    near = mutated(letters[0], 0.04, rng)
    rows = [("read this", text) for text in [*letters, near, letters[1] + letters[5]]]
    found = clusters(rows, range(8), seed=0)
    assert found[:7] == [0, 1, 2, 3, 4, 5, 0]
    assert found[7] == 1  # padded with another row: the earlier of the two speaks


def alike(a: tuple[str, str], b: tuple[str, str]) -> bool:
    x, y = Text.of(*a), Text.of(*b)
    return x.digest == y.digest or one_voice(x, y)


@given(st.lists(st.tuples(short, short), max_size=12), st.randoms(use_true_random=False))
def test_clusters_depend_on_texts_and_time_alone(
    rows: list[tuple[str, str]], rng: random.Random
) -> None:
    """Rows in another order, with their registrations: the same clusters, whoever gave them."""
    times = list(range(len(rows)))
    before = clusters(rows, times, seed=1)
    order = rng.sample(times, len(times))
    after = clusters([rows[i] for i in order], [times[i] for i in order], seed=1)
    assert [order[leader] for leader in after] == [before[i] for i in order]
    for row, leader in enumerate(before):
        assert leader <= row
        assert before[leader] == leader
        near = [m for m in range(row) if before[m] == leader and alike(rows[row], rows[m])]
        assert leader == row or near


def test_the_letters_never_forbid_a_pair_that_the_edits_allow() -> None:
    rng = random.Random(4)
    texts = [("".join(rng.choices("abcd", k=rng.randrange(1, 9))),
              "".join(rng.choices("abcd", k=rng.randrange(1, 9)))) for _ in range(60)]  # fmt: skip
    found = Candidates(texts, seed=0).least_edits(0, np.arange(60))
    for n, (prompt, answer) in enumerate(texts):
        assert found.prompt.edits[n] <= edits(texts[0][0], prompt)
        assert found.answer.edits[n] <= edits(texts[0][1], answer)
        assert found.whole.edits[n] <= edits("".join(texts[0]), prompt + answer)
        piece, text = sorted((texts[0][1], answer), key=len)
        assert found.inside[n] <= edits_inside(piece, text)


def test_a_crowd_costs_no_more_than_its_limit() -> None:
    """Rows of one template: each is led to a bounded number of others."""
    template = f"{ROW[0]} Answer in one sentence, please."
    rows = [(template, mixed(str(n))) for n in range(600)]
    folds = [(folded(p), folded(c)) for p, c in rows]
    candidates = Candidates(folds, seed=0)
    assert len(candidates.before(599)) <= CROWD * 88
    started = time.process_time()
    assert clusters(rows, range(600), seed=0) == list(range(600))
    assert time.process_time() - started < 20
    again = clusters([*rows, *rows], range(1_200), seed=0)
    assert again[600:] == list(range(600))


@pytest.mark.skipif(not (SHARED / "tldr.jsonl").exists(), reason="no ../shared beside the checkout")
def test_few_rows_of_different_people_merge() -> None:
    rows = real("tldr.jsonl")
    found = clusters([(r.prompt, r.completion) for r in rows], range(len(rows)), seed=0)
    across = sum(
        rows[leader].contributor != r.contributor for r, leader in zip(rows, found, strict=True)
    )
    assert across / len(rows) < 0.016


def test_bad_arguments() -> None:
    with pytest.raises(InvalidEvent, match="registration"):
        clusters([ROW], [], seed=0)
    with pytest.raises(InvalidEvent, match="threshold"):
        clusters([ROW], [0], seed=0, threshold_ppm=0)
