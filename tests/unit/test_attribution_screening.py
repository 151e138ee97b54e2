"""The gates: attacks are flagged, real rows hardly ever, and whoever was first never for a copy."""

import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gates_world import SHARED, Attacks, MadeRow, contribution, real
from workers.attribution import borrowing, screening
from workers.attribution.borrowing import RUN, borrowed
from workers.attribution.copies import NONE, copies
from workers.attribution.junk import junk_kind
from workers.attribution.letter_pairs import surprise
from workers.attribution.screening import Flag, screen

LANGUAGES = {
    "German": "Wer früh aufsteht, sieht den Nebel über den Feldern und hört die ersten Vögel im "
    "Garten, bevor die Straße laut wird.",
    "French": "Le chat dort toute la journée près de la fenêtre, et quand il pleut il regarde les "
    "gouttes glisser sur les vitres.",
    "Polish": "Wczoraj wieczorem poszliśmy z przyjaciółmi do kina, a potem długo rozmawialiśmy o "
    "filmie przy herbacie i szarlotce.",
    "Finnish": "Eilen illalla kävelimme järven rannalla ja katselimme kuinka aurinko laski "
    "hitaasti metsän taakse ennen yötä.",
    "Turkish": "Sabahları erken kalkıp bahçedeki çiçekleri suluyorum, sonra kahvaltı hazırlayıp "
    "gazetemi okuyorum.",
    "Czech": "Včera jsme šli s přáteli na procházku do lesa a našli jsme spoustu hub, které jsme "
    "večer usmažili s vejci.",
    "Welsh": "Mae'r plant yn chwarae yn yr ardd bob prynhawn ar ôl ysgol, ac yna maen nhw'n mynd "
    "adref i gael swper gyda'u teulu.",
    "Hungarian": "Tegnap este hosszú sétát tettünk a folyó partján, és közben arról beszélgettünk, "
    "hová utazzunk nyáron.",
    "Swahili": "Watoto walicheza mpira uwanjani mpaka jua lilipozama, kisha wakarudi nyumbani kula "
    "chakula cha jioni.",
    "Vietnamese": "Buổi sáng tôi thường uống cà phê và đọc báo trước khi đi làm, còn buổi tối tôi "
    "nấu cơm cho gia đình.",
    "Chinese": "昨天晚上我们和朋友一起去看电影，然后一边喝茶一边聊了很久。",
    "Arabic": "ذهبنا أمس مع الأصدقاء إلى السينما ثم تحدثنا طويلا عن الفيلم ونحن نشرب الشاي.",
    "Hindi": "कल शाम हम दोस्तों के साथ फ़िल्म देखने गए और फिर चाय पीते हुए देर तक बातें करते रहे।",
}
CODE = (
    "def main(argv):\n    for i in range(len(argv)):\n"
    "        print(argv[i].strip().split(',')[0])\n"
    "    sys.exit(os.EX_OK if argv else os.EX_USAGE)\n"
)
HTML = "<ul><li>Bread</li><li>Butter</li></ul><p>Buy <b>two</b> loaves before noon, please.</p>"


# --- one row -------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_writing_is_not_noise(language: str) -> None:
    assert junk_kind("What did you do?", LANGUAGES[language]) is None


def test_code_short_answers_and_lists_are_not_junk() -> None:
    for completion in (CODE, HTML, "sudo !!", "72", "yes", "猫", "A\tB\n1\t2\n3\t4\n", "é" * 5):
        assert junk_kind("Which one is it?", completion) is None, completion
    assert junk_kind("猫?", "是") is None


@pytest.mark.parametrize(
    ("completion", "kind"),
    [
        ("asdf kjlhg wqrt zxcvb plkjh gfdsq mnbvc xzlkj hgfds qwpoi rutyx kdjfh", "gibberish"),
        ("qWxhZGRpbjpvcGVuIHNlc2FtZQxyzKjHgFdSaPoIuYtReWqLkJhGfDsAmNbVcXzQqWxhZG", "gibberish"),
        ("buy now " * 20, "repetition"),
        ("0123456789" * 60, "repetition"),
        ("\x00\x01\x02 text \x7f\x80", "control"),
        ("\ufffd\ufffd\ufffd mojibake", "control"),
        ("<div><div><span></span></div><br/><br/></div>" * 3, "markup"),
        ("&nbsp;" * 20, "markup"),
    ],
)  # fmt: skip
def test_junk_has_a_kind(completion: str, kind: str) -> None:
    assert junk_kind("Which one is it?", completion) == kind
    assert junk_kind(completion, "A fine answer.") == kind


def test_almost_nothing_is_junk() -> None:
    assert junk_kind("?", "ok") == "near-empty"
    assert junk_kind(" ", "...") == "near-empty"


def test_noise_is_far_from_writing() -> None:
    draw = random.Random(5)
    noise = " ".join(
        "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6)) for _ in range(300)
    )
    half_bits, steps = surprise(noise)
    assert half_bits / steps > 14
    half_bits, steps = surprise(" ".join(LANGUAGES["Polish"] for _ in range(5)))
    assert half_bits / steps < 12
    assert surprise("") == (0, 0)
    assert surprise("Äé") == surprise("ae")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
def test_any_text_is_judged(prompt: str, completion: str) -> None:
    junk_kind(prompt, completion)


# --- borrowing against brute force ---------------------------------------------------------------


def brute_force(texts: list[str], owners: list[int]) -> list[tuple[int, int]]:
    """(borrowed words, lenders) of each row, by looking through all earlier rows."""
    found = []
    split = [text.split() for text in texts]
    for row, words in enumerate(split):
        marked: set[int] = set()
        lenders = set()
        for start in range(len(words) - RUN + 1):
            run = words[start : start + RUN]
            first = next(
                n for n in range(row + 1)
                if any(split[n][k : k + RUN] == run for k in range(len(split[n])))
            )  # fmt: skip
            if owners[first] != owners[row]:
                marked.update(range(start, start + RUN))
                lenders.add(owners[first])
        found.append((len(marked), len(lenders)))
    return found


SMALL = st.lists(st.sampled_from("ab"), max_size=14).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SMALL, st.integers(0, 2)), min_size=1, max_size=6))
def test_borrowing_matches_brute_force(rows: list[tuple[str, int]]) -> None:
    texts, owners = [text for text, _ in rows], [owner for _, owner in rows]
    found = borrowed(texts, np.array(owners))
    assert found.words.tolist() == [len(text.split()) for text in texts]
    expected = brute_force(texts, owners)
    assert list(zip(found.borrowed.tolist(), found.lenders.tolist(), strict=True)) == expected


def test_long_rows_are_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(borrowing, "MAX_WORDS", 10)
    monkeypatch.setattr(borrowing, "MIN_ROW_WORDS", 8)
    found = borrowed([" ".join(map(str, range(1_000)))] * 2, np.array([0, 1]))
    assert found.words.tolist() == found.borrowed[[1, 1]].tolist() == [8, 8]
    assert found.sources([1], 5) == [0]


# --- copies --------------------------------------------------------------------------------------


def sentence(seed: int) -> tuple[str, str]:
    own = Attacks([], seed=seed)
    return own.own(6), own.own(12)


def test_copies_lead_to_the_row_of_another() -> None:
    first, changed = sentence(1), sentence(1)[1].replace("a", "e", 2).upper()
    rows = [first, sentence(2), first, (first[0], changed), first, ("x", "y"), ("x", "y")]
    contributors = np.array([0, 0, 1, 2, 0, 0, 1])
    assert copies(rows, contributors).tolist() == [NONE, NONE, 0, 0, NONE, NONE, 5]
    assert copies([], np.zeros(0, np.int64)).tolist() == []


def test_the_same_question_and_other_answers_are_no_copies() -> None:
    template = Attacks([]).own(30)
    rows = [(template, sentence(n)[1]) for n in range(300)]
    contributors = np.arange(300)
    assert (copies(rows, contributors) == NONE).all()
    again = copies([*rows, *rows], np.concatenate([contributors, contributors + 300]))
    assert again.tolist() == [NONE] * 300 + list(range(300))


def test_a_template_costs_no_more_than_other_rows() -> None:
    """20,000 rows that all look alike: a clustering would compare 200 million pairs."""
    draw = random.Random(1)
    template = Attacks([]).own(14)
    rows = [
        (template, f"{draw.getrandbits(128):x} {draw.getrandbits(64):x}") for _ in range(20_000)
    ]
    started = time.process_time()
    assert (copies(rows, np.arange(len(rows)) % 7) == NONE).all()
    assert time.process_time() - started < 60


# --- contributions -------------------------------------------------------------------------------


def prose(name: str, registered: int, count: int = 30) -> list[MadeRow]:
    own = Attacks([], seed=registered + 100)
    return contribution(name, registered, [(own.own(8), own.own(25)) for _ in range(count)])


def victims() -> list[MadeRow]:
    return [row for n in range(12) for row in prose(f"honest {n}", n)]


def test_nothing_to_say_about_honest_rows() -> None:
    assert screen(victims()) == []
    assert screen([]) == []


@pytest.mark.parametrize("attack", Attacks([]).all())
def test_attacks_are_flagged_and_their_victims_are_not(attack: str) -> None:
    rows = victims()
    reason, make = Attacks(rows).all()[attack]
    flags = screen([*rows, *contribution("attacker", 99, make())])
    assert {flag.contribution for flag in flags} == {"attacker"}
    assert reason in {flag.reason for flag in flags}
    for flag in flags:
        assert flag.score_ppm >= flag.threshold_ppm
        assert flag.score_ppm == flag.count * 1_000_000 // flag.of
        assert all(not source.startswith("attacker") for source in flag.sources)


def test_order_of_the_rows_given_does_not_matter() -> None:
    rows = victims()
    rows += contribution("attacker", 99, Attacks(rows).stitched())
    shuffled = random.Random(1).sample(rows, len(rows))
    assert screen(shuffled) == screen(rows)


def test_whoever_was_first_is_not_flagged_for_being_copied() -> None:
    rows = victims()
    copies = [
        replace(row, contribution=f"thief {row.contribution}", registered_index=50 + n % 12)
        for n, row in enumerate(rows)
    ]
    flagged = {flag.contribution for flag in screen([*copies, *rows])}
    assert flagged == {row.contribution for row in copies}
    early = [replace(row, registered_index=-1) for row in copies]
    assert all(not flag.contribution.startswith("thief") for flag in screen([*rows, *early]))


def test_a_share_of_junk_decides() -> None:
    good, bad = prose("mixed", 5, count=10), Attacks(victims()).mash()
    pairs = [(row.prompt, row.completion) for row in good]
    assert screen(contribution("mixed", 5, [*pairs[:9], bad[0]])) == []
    (flag,) = screen(contribution("mixed", 5, [*pairs[:8], *bad[:2]]))
    assert flag == Flag(
        contribution="mixed", reason="junk", score_ppm=200_000, threshold_ppm=200_000,
        rows=(8, 9), count=2, of=10, kinds={"gibberish": 2},
    )  # fmt: skip


def test_rows_named_are_bounded() -> None:
    rows = contribution("flood", 0, [("?", ".")] * 1_000)
    (flag,) = screen(rows)
    assert flag.count == 1_000
    assert len(flag.rows) == screening.MAX_ROWS_NAMED


# --- real rows -----------------------------------------------------------------------------------


def _shared(file: str) -> Path:
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"the shared data set {file} is not here")
    return path


@pytest.mark.parametrize(
    ("file", "most"), [("tldr.jsonl", 0.005), ("gsm8k.jsonl", 0.0), ("pubmedqa.jsonl", 0.0)]
)
def test_real_contributions_are_hardly_ever_flagged_and_attackers_are(
    file: str, most: float
) -> None:
    _shared(file)
    rows = real(file)
    attacks = Attacks(rows)
    planted = {}
    more = list(rows)
    for n, (kind, (reason, make)) in enumerate(attacks.all().items()):
        planted[kind] = reason
        more += contribution(kind, 10**6 + n, make())
    flags = screen(more)
    wrong = {flag.contribution for flag in flags} - planted.keys()
    assert len(wrong) <= most * len({row.contribution for row in rows})
    caught = Counter(f.contribution for f in flags if planted.get(f.contribution) == f.reason)
    # Near-copies of very short rows are left to the clusters, which pay the first alone.
    assert set(caught) >= planted.keys() - {"copies, 5% of letters changed"}
