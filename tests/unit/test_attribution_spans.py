"""Verbatim spans: small worlds against brute force, real rows, damaged folders."""

import json
import math
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.errors import Inconsistent, InvalidEvent, NotFound, TooLarge
from workers.attribution import span_index, spans
from workers.attribution.span_index import SpanIndex, SpanRow, build_span_index, load_span_index
from workers.attribution.span_words import is_word, split
from workers.attribution.spans import find_spans, span_scores, spans_document
from workers.attribution.suffix_array import suffix_array

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tldr.jsonl"
POEM = "The lantern in Oslo is red, and nobody knows who painted it."
OTHER = "Every second Thursday the ferry to Bergen leaves an hour late."


def rows_of(texts: Sequence[tuple[str, str]], *, contribution: str = "c") -> list[SpanRow]:
    return [
        SpanRow(
            contribution=f"{contribution}{n}", row=0, contributor=f"who{n}", licence="CC0-1.0",
            registered_index=n, prompt=prompt, completion=completion,
        )
        for n, (prompt, completion) in enumerate(texts)
    ]  # fmt: skip


def build(texts: Sequence[tuple[str, str]], folder: Path) -> SpanIndex:
    return build_span_index(rows_of(texts), folder / "index")


# --- words and suffixes --------------------------------------------------------------------------


@given(st.text(max_size=200))
def test_splitting_loses_nothing(text: str) -> None:
    assert "".join(split(text)) == text


def test_words_keep_their_marks_and_unspaced_scripts_fall_into_characters() -> None:
    assert split("snake_case, e\u0301te!") == ["snake_case", ",", " ", "e\u0301te", "!"]
    assert split("नमस्ते दुनिया") == ["नमस्ते", " ", "दुनिया"]
    assert split("我喜欢\u3000tea") == ["我", "喜", "欢", "\u3000", "tea"]
    assert not is_word("\u3000")
    assert is_word("'")


@given(st.lists(st.integers(0, 3), max_size=60))
def test_the_suffix_array_is_the_sorted_suffixes(tokens: list[int]) -> None:
    expected = sorted(range(len(tokens)), key=lambda start: tokens[start:])
    assert suffix_array(np.array(tokens, np.uint32)).tolist() == expected


@pytest.mark.parametrize("block", [1, 2, 7])
def test_the_suffix_array_does_not_depend_on_the_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.Generator(np.random.PCG64(3))
    tokens = np.concatenate([random.integers(0, 4, 500), np.zeros(200), np.tile([1, 2], 100)])
    whole = tokens.astype(np.uint32)
    expected = suffix_array(whole)
    monkeypatch.setattr("workers.attribution.suffix_array.BLOCK", block)
    assert suffix_array(whole).tolist() == expected.tolist()


# --- spans against brute force -------------------------------------------------------------------


def holding(texts: Sequence[tuple[str, str]], run: Sequence[str]) -> set[str]:
    """The distinct texts that have this run of pieces."""
    found = set()
    for text in {text for pair in texts for text in pair}:
        pieces = split(text)
        if any(pieces[n : n + len(run)] == list(run) for n in range(len(pieces))):
            found.add(text)
    return found


def brute_force(texts: Sequence[tuple[str, str]], answer: str) -> list[tuple[int, int, list[int]]]:
    """(start, end, rows) by trying every run of the answer."""
    words = [w for text in {t for pair in texts for t in pair} for w in split(text) if is_word(w)]
    pieces = split(answer)
    runs = [
        (first, last)
        for first in range(len(pieces))
        for last in range(first + 1, len(pieces) + 1)
        if is_word(pieces[first])
        and is_word(pieces[last - 1])
        and holding(texts, pieces[first:last])
    ]
    said = []
    for first, last in runs:
        inside = [w for w in pieces[first:last] if is_word(w)]
        bits = sum(round(1000 * math.log2(len(words) / words.count(w))) for w in inside)
        found = holding(texts, pieces[first:last])
        if (
            len(inside) >= spans.MIN_TOKENS
            and bits > round(1000 * (math.log2(len(words)) + spans.MARGIN_BITS))
            and len(found) <= spans.COMMON_TEXTS
            and not any(a <= first and last <= b and (a, b) != (first, last) for a, b in runs)
        ):
            holders = [n for n, pair in enumerate(texts) if found & set(pair)]
            start = len("".join(pieces[:first]))
            end = start + len("".join(pieces[first:last]))
            said.append((-bits, start, end, holders))
    return [(start, end, holders) for _, start, end, holders in sorted(said)]


PIECE = st.sampled_from(["a", "b", "é", "猫", " ", "  ", "\n", ",", "un"])
TEXT = st.lists(PIECE, max_size=14).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6), TEXT, st.sampled_from([1, 2, 5]))
def test_small_worlds_match_brute_force(
    texts: list[tuple[str, str]], answer: str, common: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(spans, "MIN_TOKENS", 2)
        patch.setattr(spans, "MARGIN_BITS", -2)
        patch.setattr(spans, "COMMON_TEXTS", common)
        index = build(texts, Path(folder))
        found = find_spans(index, answer)
        assert [(s.start, s.end, s.rows.tolist()) for s in found] == brute_force(texts, answer)
        for span in found:
            for row in span.rows:
                assert any(answer[span.start : span.end] in text for text in texts[row])


def test_a_span_names_row_contributor_and_licence(tmp_path: Path) -> None:
    index = build([("Where?", OTHER), ("What?", POEM), ("Who?", POEM)], tmp_path)
    answer = f"I think: {POEM} Perhaps."
    document = spans_document(index, answer)
    assert document["v"] == 1
    assert document["min_tokens"] == spans.MIN_TOKENS
    assert document["none"] is False
    (span,) = document["spans"]
    assert answer[span["start"] : span["end"]] == POEM
    assert span["count"] == 2
    assert span["rows"] == [
        {"contribution": f"c{n}", "row": 0, "contributor": f"who{n}", "licence": "CC0-1.0"}
        for n in (1, 2)
    ]
    assert POEM not in json.dumps(document)


def test_no_verbatim_match_is_said(tmp_path: Path) -> None:
    index = build([("What?", POEM)], tmp_path)
    for answer in ("", "   \n", "Nothing of this was ever contributed by anyone.", "the lantern"):
        document = spans_document(index, answer)
        assert document["spans"] == []
        assert document["none"] is True
        assert span_scores(index, answer).shape == (1,)


def test_a_span_never_crosses_a_border(tmp_path: Path) -> None:
    """Neither from prompt to completion nor from row to row, nor into the middle of a word."""
    head, tail = "who ever painted the", "lantern in Oslo green"
    index = build([(head, tail), (tail, head)], tmp_path)
    for answer in (f"{head} {tail}", f"{head}\n{tail}", f"{head}{tail}"):
        assert spans_document(index, answer)["none"]
    whole = build([("x", "one two three four five sixty")], tmp_path / "b")
    assert spans_document(whole, "one two three four five six")["spans"][0]["end"] == 23
    assert spans_document(whole, "lone two three four five six")["none"]


def test_earliest_registration_first_whatever_the_order_given(tmp_path: Path) -> None:
    rows = [
        SpanRow(
            contribution=f"c{n}", row=row, contributor="w", licence="MIT",
            registered_index=100 - n, prompt=f"p{n}", completion=POEM,
        )
        for n in range(8)
        for row in (1, 0)
    ]  # fmt: skip
    index = build_span_index(rows, tmp_path / "index")
    (span,) = spans_document(index, POEM)["spans"]
    assert span["count"] == 16
    named = [(r["contribution"], r["row"]) for r in span["rows"]]
    assert named == [(f"c{n}", row) for n in (7, 6, 5, 4, 3) for row in (0, 1)]


def test_copies_do_not_make_a_text_common(tmp_path: Path) -> None:
    fillers = [(f"question {n}", f"word{n} and more{n}") for n in range(300)]
    copies = [("what?", POEM)] * 150
    phrase = "as everybody in this very town"
    common = [(f"q{n}", f"{phrase} number{n}") for n in range(spans.COMMON_TEXTS + 1)]
    index = build(fillers + copies + common, tmp_path)
    assert spans_document(index, POEM)["spans"][0]["count"] == 150
    assert spans_document(index, phrase)["none"]


def test_scores_follow_what_a_row_covers(tmp_path: Path) -> None:
    texts = [("What?", POEM), ("Where?", OTHER), ("Half?", "Once the lantern in Oslo is red")]
    index = build(texts, tmp_path)
    scores = span_scores(index, POEM)
    assert scores.dtype == np.int64
    assert scores[0] > scores[2] > 0
    assert scores[0] > 10 * scores[1]
    assert span_scores(index, OTHER).argmax() == 1
    assert not span_scores(index, "zebra quux").any()


def test_long_answers_and_many_spans_are_bounded(tmp_path: Path) -> None:
    sentences = [f"alpha{n} beta{n} gamma{n} delta{n} omega{n}" for n in range(60)]
    index = build([("p", s) for s in sentences], tmp_path)
    document = spans_document(index, " | ".join(sentences))
    assert len(document["spans"]) == spans.MAX_SPANS
    filler = "no " * spans.MAX_ANSWER_PIECES
    assert spans_document(index, filler + sentences[0])["none"]


# --- the folder ----------------------------------------------------------------------------------


def test_bad_input_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidEvent, match="at least one row"):
        build_span_index([], tmp_path / "index")
    twice = rows_of([("p", "c")]) * 2
    with pytest.raises(InvalidEvent, match="twice"):
        build_span_index(twice, tmp_path / "index")
    monkeypatch.setattr(span_index, "MAX_SPAN_TOKENS", 3)
    with pytest.raises(TooLarge, match="MAX_SPAN_TOKENS"):
        build([("p", POEM)], tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFound):
        load_span_index(tmp_path / "index")


def test_any_damage_is_noticed(tmp_path: Path) -> None:
    index = build([("What?", POEM), ("Where?", OTHER)], tmp_path)
    for path in sorted(index.path.iterdir()):
        data = path.read_bytes()
        for damaged in (data[:-1], data + b"\0", b"", bytes([data[0] ^ 1]) + data[1:]):
            path.write_bytes(damaged)
            with pytest.raises(Inconsistent):
                load_span_index(index.path)
        path.write_bytes(data)
    manifest = index.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows":2', b'"rows":1'))
    with pytest.raises(Inconsistent):
        load_span_index(index.path)


def test_the_folder_is_private_and_the_first_writer_wins(tmp_path: Path) -> None:
    first = build([("What?", POEM)], tmp_path)
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in first.path.iterdir()} == {0o600}
    again = build([("What?", OTHER)], tmp_path)
    assert spans_document(again, POEM)["spans"][0]["count"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_equal_rows_make_equal_bytes(tmp_path: Path) -> None:
    texts = [("What?", POEM), ("What?", OTHER), ("Why?", POEM)]
    one, two = build(texts, tmp_path / "a"), build(texts, tmp_path / "b")
    for path in one.path.iterdir():
        assert path.read_bytes() == (two.path / path.name).read_bytes()


# --- real rows -----------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data set tldr.jsonl is not here")
def test_every_real_row_is_found_again(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in SHARED.read_text().splitlines()]
    texts = [(line["prompt"], line["completion"]) for line in lines]
    index = build(texts, tmp_path)
    asked = found = best = 0
    for n in range(0, len(texts), 40):
        answer = f"Try this:\n{texts[n][1]}"
        words = sum(map(is_word, split(texts[n][1])))
        if words < 8:
            continue
        asked += 1
        span = next((s for s in find_spans(index, answer) if n in s.rows), None)
        found += span is not None and answer[span.start : span.end] == texts[n][1].strip()
        scores = span_scores(index, answer)
        best += scores[n] == scores.max()
    assert asked > 250
    assert found / asked > 0.95  # the rest stands in over COMMON_TEXTS other texts, or is too plain
    assert best / asked > 0.95
