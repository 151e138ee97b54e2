"""The evidence document: read back as written; for all else nothing but designed errors."""

import base64
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.ids import sha256_hex
from ledger.errors import Inconsistent, InvalidEvent, TooLarge
from workers.attribution.evidence import (
    MAX_EVIDENCE_BYTES,
    Evidence,
    NamedRow,
    NotAttributed,
    none_document,
    parse,
)
from workers.attribution.terms import Terms

ANN, BEN = "ed25519:" + "aa" * 32, "ed25519:" + "bb" * 32
ONE, TWO = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
SPANS: dict[str, Any] = {
    "v": 1,
    "min_tokens": 6,
    "none": False,
    "spans": [
        {
            "start": 3,
            "end": 40,
            "count": 12,
            "rows": [{"contribution": ONE, "row": 0, "contributor": ANN, "licence": "MIT"}],
        }
    ],
}
EVIDENCE = Evidence(
    inference=TWO,
    method="ekfac-lora/v1",
    index_sha256="12" * 32,
    sketch=b"a sketch",
    scores_sha256="34" * 32,
    placebo=2**60,
    terms=Terms(log_size=7, withdrawn=frozenset({TWO, ONE}), splits=frozenset({(ONE, 3)})),
    top_rows=(
        NamedRow(row=f"{ONE}/0", contributor=ANN, score=2**61),
        NamedRow(row=f"{TWO}/10", contributor=BEN, score=-4),
    ),
    against=(
        NamedRow(row=f"{ONE}/1", contributor=ANN, score=-(2**61)),
        NamedRow(row=f"{TWO}/10", contributor=BEN, score=-4),
    ),
    spans=SPANS,
)


def test_a_document_reads_back_as_written() -> None:
    for evidence in (EVIDENCE, replace(EVIDENCE, spans=None, against=(), terms=Terms())):
        data = evidence.to_bytes()
        assert parse(data) == evidence
        assert canonical_json(parse_canonical(data)) == data


def test_version_1_stays_readable() -> None:
    """The bytes that `workers/actors.py` wrote before terms were recorded."""
    data = canonical_json(
        {
            "v": 1,
            "inference": TWO,
            "method": "ekfac-lora/v1",
            "index_sha256": "12" * 32,
            "sketch": base64.b64encode(b"a sketch").decode(),
            "sketch_sha256": sha256_hex(b"a sketch"),
            "scores_sha256": "34" * 32,
            "placebo": "5",
            "top_rows": [{"row": f"{ONE}/0", "contributor": ANN, "score": "12"}],
        }
    )
    found = parse(data)
    assert isinstance(found, Evidence)
    assert (found.version, found.terms, found.against, found.spans) == (1, Terms(), (), None)
    assert found.to_bytes() == data


def test_an_answer_that_nobody_can_attribute_says_why() -> None:
    data = none_document("the answer is blank")
    assert data == b'{"method":"none/v1","reason":"the answer is blank","v":1}'
    assert parse(data) == NotAttributed(reason="the answer is blank")


def changed(**fields: Any) -> bytes:
    return canonical_json({**parse_canonical(EVIDENCE.to_bytes()), **fields})


BAD_FORM: dict[str, dict[str, Any]] = {
    "other version": {"v": 3},
    "version is a truth": {"v": True},
    "one field more": {"note": ""},
    "no uuid": {"inference": "x"},
    "no hash": {"index_sha256": "AB" * 32},
    "sketch is no text": {"sketch": 5},
    "sketch has a space": {"sketch": "YSBza2V0Y2g= "},
    "sketch ends in loose bits": {"sketch": "YSBza2V0Y2h="},
    "placebo as a number": {"placebo": 5},
    "placebo below zero": {"placebo": "-5"},
    "placebo with a zero in front": {"placebo": "05"},
    "too many rows": {"top_rows": [{}] * 11},
    "row without number": {"top_rows": [{"row": ONE, "contributor": ANN, "score": "1"}]},
    "row of nobody": {"top_rows": [{"row": f"{ONE}/1", "contributor": "Ann", "score": "1"}]},
    "terms unsorted": {"terms": {"log_size": 1, "splits": [], "withdrawn": [TWO, ONE]}},
    "terms say more": {"terms": {"log_size": 1, "splits": [], "withdrawn": [], "x": 1}},
    "terms missing": {"terms": None},
    "spans say none": {"spans": {**SPANS, "none": True}},
    "span backwards": {"spans": {**SPANS, "spans": [{**SPANS["spans"][0], "start": 40}]}},
    "span of no row": {"spans": {**SPANS, "spans": [{**SPANS["spans"][0], "rows": []}]}},
    "span quotes the row": {
        "spans": {
            **SPANS,
            "spans": [
                {
                    **SPANS["spans"][0],
                    "rows": [{**SPANS["spans"][0]["rows"][0], "text": "private words"}],
                }
            ],
        }
    },
    "none with a sketch": {"method": "none/v1"},
}


@pytest.mark.parametrize("name", BAD_FORM)
def test_another_form_is_refused(name: str) -> None:
    with pytest.raises(InvalidEvent):
        parse(changed(**BAD_FORM[name]))


ROW, WORSE = ({"row": f"{ONE}/{n}", "contributor": ANN, "score": str(-n)} for n in (1, 2))
CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "other sketch": {"sketch": base64.b64encode(b"b sketch").decode()},
    "top rows rise": {"top_rows": [WORSE, ROW]},
    "a row twice": {"top_rows": [ROW, ROW]},
    "against falls": {"against": [ROW, WORSE]},
    "against helped": {"against": [{**ROW, "score": "0"}]},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_document_against_itself_is_refused(name: str) -> None:
    with pytest.raises(Inconsistent):
        parse(changed(**CONTRADICTIONS[name]))


def test_size_is_bounded() -> None:
    with pytest.raises(TooLarge):
        parse(b" " * (MAX_EVIDENCE_BYTES + 1))


def test_every_cut_is_refused() -> None:
    data = EVIDENCE.to_bytes()
    for end in range(len(data)):
        with pytest.raises(InvalidEvent):
            parse(data[:end])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    field=st.sampled_from(sorted(parse_canonical(EVIDENCE.to_bytes()))), value=JSON, flip=st.data()
)
def test_hostile_bytes_give_designed_errors_only(field: str, value: Any, flip: Any) -> None:
    try:
        data = changed(**{field: value})
    except InvalidEvent:  # a value without a canonical form
        data = EVIDENCE.to_bytes()
    at = flip.draw(st.integers(0, len(data) - 1))
    flipped = bytes([*data[:at], data[at] ^ flip.draw(st.integers(1, 255)), *data[at + 1 :]])
    for attempt in (data, flipped):
        try:
            found = parse(attempt)
        except (InvalidEvent, Inconsistent):
            continue
        assert found.to_bytes() == attempt
