"""Canonical JSON, money and envelopes against independent judges."""

import contextlib
import json
import sys
import time
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from ledger.domain.canonical import (
    MAX_DEPTH,
    MAX_SAFE_INTEGER,
    canonical_json,
    parse_canonical,
)
from ledger.domain.envelope import decode_entry, encode_entry, parse_envelope, sign_event
from ledger.domain.ids import derived_id
from ledger.domain.money import format_open, parse_open, split_exactly
from ledger.errors import InvalidEvent

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


@given(values)
@settings(max_examples=300)
def test_equals_the_rfc8785_package_and_round_trips(value: Any) -> None:
    ours = canonical_json(value)
    assert ours == rfc8785.dumps(value)
    assert parse_canonical(ours) == value


@given(values)
def test_any_other_spelling_is_refused(value: Any) -> None:
    spaced = json.dumps(value, ensure_ascii=True, indent=1).encode()
    if spaced != canonical_json(value):
        with pytest.raises(InvalidEvent):
            parse_canonical(spaced)


@pytest.mark.parametrize(
    "bad",
    [
        b'{"a":1.5}', b'{"a":1e3}', b'{"a":NaN}', b'{"a":1,"a":1}', b'{"b":1,"a":1}', b'"\\u0041"',
        b'"\\/"', b"-0", b"01", b'"\xed\xa0\x80"', b'{"a":9007199254740992}', b"", b"\xff", b"[1,]",
        b'"\\ud800"', b"[" * 100_000, b"1" * 5000,
    ],
)  # fmt: skip
def test_what_is_not_canonical_is_refused(bad: bytes) -> None:
    with pytest.raises(InvalidEvent):
        parse_canonical(bad)


def test_keys_beyond_the_bmp_are_ordered_by_code_unit() -> None:
    """U+1D54F comes before U+FFFF as UTF-16 has it, and after it by code point."""
    right = '{"a":0,"\U0001d54f":1,"\uffff":{"\U0001d54f":2,"\uffff":3}}'.encode()
    wrong = '{"a":0,"\uffff":{"\U0001d54f":2,"\uffff":3},"\U0001d54f":1}'.encode()
    assert canonical_json(json.loads(right)) == canonical_json(json.loads(wrong)) == right
    assert rfc8785.dumps(json.loads(right)) == right
    assert parse_canonical(right) == json.loads(right)
    for bad in (wrong, right.replace('"\U0001d54f":2,"\uffff":3'.encode(),
                                     '"\uffff":3,"\U0001d54f":2'.encode())):  # fmt: skip
        with pytest.raises(InvalidEvent, match="not canonical"):
            parse_canonical(bad)


@pytest.mark.parametrize("opener", [b"[", b'{"a":', b'[{"a":'])
def test_deep_nesting_is_refused_before_the_parser_recurses(opener: bytes) -> None:
    """In a process whose recursion limit a library has raised, the C parser would crash."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        with pytest.raises(InvalidEvent, match="nested deeper"):
            parse_canonical(opener * 20_000)
    finally:
        sys.setrecursionlimit(before)


def test_brackets_in_strings_are_no_nesting_and_nothing_is_scanned_twice() -> None:
    value = {"a": "[[{{" * 1_000, "b": ['"[' * 500]}
    assert parse_canonical(canonical_json(value)) == value
    started = time.process_time()
    with pytest.raises(InvalidEvent):
        parse_canonical(b"[" * 40 + b'"' + b'\\"' * 30_000)
    assert time.process_time() - started < 2


@given(st.binary(max_size=80))
def test_hostile_bytes_raise_only_the_designed_error(data: bytes) -> None:
    for parse in (parse_canonical, parse_envelope, decode_entry):
        with contextlib.suppress(InvalidEvent):
            parse(data)


def test_every_flipped_byte_of_an_envelope_is_refused() -> None:
    key = SigningKey(b"\x01" * 32)
    raw = sign_event(
        key,
        type="identity.registered",
        log="x/y",
        body={"name": "Zoë ☃"},
        id=derived_id("flip"),
        at=1,
    )
    assert parse_envelope(raw, log="x/y").body["name"] == "Zoë ☃"
    for n in range(len(raw)):
        flipped = raw[:n] + bytes([raw[n] ^ 1]) + raw[n + 1 :]
        with pytest.raises(InvalidEvent):
            parse_envelope(flipped, log="x/y")
    entry = encode_entry(7, 9, raw)
    assert (decode_entry(entry).index, decode_entry(entry).recorded_at) == (7, 9)


@given(
    st.integers(0, 10**30),
    st.dictionaries(text, st.integers(0, 10**9), min_size=1, max_size=8),
)
def test_a_split_sums_exactly_and_is_fair(amount: int, weights: dict[str, int]) -> None:
    total = sum(weights.values())
    if total == 0:
        if amount:
            with pytest.raises(InvalidEvent):
                split_exactly(amount, weights)
        return
    parts = split_exactly(amount, weights)
    assert sum(parts.values()) == amount
    for key, part in parts.items():
        exact = amount * weights[key]
        assert exact // total <= part <= exact // total + (exact % total > 0)
    assert split_exactly(amount, dict(reversed(list(weights.items())))) == parts


@given(st.integers(0, 10**40))
def test_open_amounts_round_trip(amount: int) -> None:
    assert parse_open(format_open(amount).removesuffix(" OPEN")) == amount


@given(
    type=text.filter(bool),
    body=st.dictionaries(text, text, max_size=3),
    decoy=st.sampled_from(['","sig":"', ',"sig":"AAAA"', '\\","sig":"', "sig"]),
)
def test_the_signature_is_cut_out_where_it_stands(
    type: str, body: dict[str, str], decoy: str
) -> None:
    """What is verified is the canonical JSON without `sig`, whatever other strings look like it."""
    key = SigningKey(b"k" * 32)
    for name in (type, decoy + type):
        told = {**body, "x": decoy, decoy: "y"}
        raw = sign_event(key, type=name, log="a/b", body=told, id=derived_id("x"), at=1)
        event = parse_envelope(raw)
        assert (event.type, event.body) == (name, told)


@given(st.data())
def test_depth_is_counted_outside_of_strings_and_to_the_last_level(data: st.DataObject) -> None:
    """One branch of a known depth among shallow ones, brackets and quotes in every string."""
    depth = data.draw(st.integers(1, 40))
    value: Any = data.draw(st.sampled_from(['[{"', "]}\\", '\\"[', ""]))
    for level in range(depth):
        beside = data.draw(st.sampled_from([[], {}, [[], []], '[["', "\\"]))
        value = {"a": beside, "[": value} if level % 2 else [beside, value, beside]
    text = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    if _depth(value) <= MAX_DEPTH:
        assert parse_canonical(text) == value
    else:
        with pytest.raises(InvalidEvent, match="nested deeper"):
            parse_canonical(text)


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0
