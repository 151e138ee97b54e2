"""Hostile bytes to every parser: only the designed errors, in bounded time and memory.

Targets, samples and mutations are those of tests/fuzz, which `make soak` drives with atheris for
longer. What that found once lies under tests/fuzz/found and is tried here in every run.
"""

import ast
import json
import time
import tracemalloc
from functools import cache
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import mutate_alone
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
NAMES = sorted(TARGETS)
# Those that hash and sign hundreds of times per input; what they add is reached with fewer.
SLOW = {"bundle", "story"}
MUTATIONS = 150
MAX_SECONDS_PER_MB = 2.0
MAX_TIMES_INPUT = 60
FREE_BYTES = 2_000_000


@cache
def seeds(name: str) -> list[bytes]:
    found = TARGETS[name].seeds()
    assert found
    return found


def target(name: str) -> Target:
    return TARGETS[name]


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_good_enough_to_start_from(name: str) -> None:
    """A mutation of what is refused at once would try nothing."""
    accepted = [target(name).run(seed) for seed in seeds(name)]
    assert any(accepted) or name == "merkle"
    for data in target(name).found():
        target(name).run(data)


@pytest.mark.parametrize("name", NAMES)
def test_mutated_samples_fail_as_designed(name: str) -> None:
    count = MUTATIONS // 5 if name in SLOW else MUTATIONS

    @settings(
        max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(seed=st.sampled_from(seeds(name)), at=st.integers(0, 2**64))
    def attempt(seed: bytes, at: int) -> None:
        rng = Random(at)
        for _ in range(4):
            target(name).run(mutated(seed, rng))

    attempt()


@pytest.mark.parametrize("name", NAMES)
def test_random_bytes_and_text_fail_as_designed(name: str) -> None:
    words = st.sampled_from([seed[:n] for seed in seeds(name)[:4] for n in (1, 8, 64, 200)])
    text = st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass"))

    @settings(max_examples=60, deadline=None, database=None)
    @given(parts=st.lists(st.one_of(words, text, st.binary(max_size=40)), max_size=6))
    def attempt(parts: list[bytes]) -> None:
        target(name).run(b"".join(parts))

    attempt()


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_of_a_sample_fails_as_designed(name: str) -> None:
    seed = min((seed for seed in seeds(name) if target(name).run(seed)), key=len, default=b"")
    step = max(1, len(seed) // (20 if name in SLOW else 200))
    for end in range(0, len(seed), step):
        target(name).run(seed[:end])
        target(name).run(seed[end:])


# --- time and memory --------------------------------------------------------------------------

MB = 300_000
BOMBS = {
    "brackets": b"[" * MB,
    "nested objects": b'{"a":' * (MB // 5),
    "quotes": b'"' * MB,
    "backslashes": b'"' + b"\\" * MB,
    "integers": b"[" + b"0," * (MB // 2) + b"0]",
    "lists": b"[" + b"[]," * (MB // 3) + b"[]]",
    "objects": b"[" + b"{}," * (MB // 3) + b"{}]",
    "one integer": b"9" * MB,
    "one negative integer": b'{"a":-' + b"9" * MB + b"}",
    "keys": b"{" + b",".join(b'"%07d":0' % n for n in range(MB // 12)) + b"}",
    "surrogates": b'["' + b"\\ud800" * (MB // 6) + b'"]',
    "base64": b"A" * MB,
    "newlines": b"\n" * MB,
    "spaces": b" " * MB,
    "not ASCII": "é".encode() * (MB // 2),
    "signature lines": b"text\n\n" + "— a AAAAAAAA\n".encode() * (MB // 16),
    "names of spaces": b"text\n\n" + "— \u2003 AAAAAAAA\n".encode() * (MB // 18),
    "hash lines": b"c2sp.org/tlog-proof@v1\nindex 0\n" + (b"A" * 43 + b"=\n") * (MB // 45),
    "path": b"tile/0/" + b"x000/" * (MB // 5) + b"000",
    "members": b"group g any " + b"g " * (MB // 2),
    "groups": b"".join(b"group g%d any g\n" % n for n in range(MB // 16)),
    "hashes": json.dumps(
        {"format": "tributary/lineage-bundle/v1", "hashes": ["ab" * 32] * (MB // 70)},
        separators=(",", ":"),
    ).encode(),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_time_and_memory_are_bounded_by_the_input(bomb: str) -> None:
    data = BOMBS[bomb]
    for name in NAMES:
        tracemalloc.start()
        started = time.process_time()
        try:
            target(name).run(data)
        finally:
            took = time.process_time() - started
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak <= MAX_TIMES_INPUT * len(data) + FREE_BYTES, (name, peak)
        # Watched allocations cost some five times their time; a square would be far beyond this.
        assert took <= 5 * MAX_SECONDS_PER_MB * len(data) / 1e6 + 0.5, (name, took)


# --- completeness -----------------------------------------------------------------------------

NOT_A_PARSER = {
    # Read what another parser of the list has taken apart; tried through it.
    "read_disclosed": "bundle", "read_payouts": "bundle", "open_checkpoint": "signed-checkpoint",
    "open_note": "note", "verify_note": "note", "parse_cosignature": "note",
    "decode_hash_line": "tlog-proof", "verify_receipt": "receipt", "parse_bundle": "bundle",
    "decode_envelope": "envelope", "parse_note": "note", "read_entry": "entry-fault",
    "parse_json": "bundle",
}  # fmt: skip


def parsers() -> set[str]:
    """Every public function of `verify` whose name says that it reads."""
    found = set()
    for path in (ROOT / "ledger" / "verify").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
    return {n for n in found if n.startswith(("parse_", "decode_", "read_", "open_"))}


def test_no_parser_of_verify_is_left_out() -> None:
    source = (ROOT / "tests" / "fuzz" / "targets.py").read_text()
    missing = {name for name in parsers() if name not in source and name not in NOT_A_PARSER}
    assert missing == set(), "add a target to tests/fuzz/targets.py"
    assert set(NOT_A_PARSER.values()) <= set(TARGETS)


# --- the driver -------------------------------------------------------------------------------


def broken_by_x(data: bytes) -> None:
    if b"x" in data:
        raise KeyError("not designed")


def test_the_driver_stops_at_an_error_that_nobody_designed_and_keeps_the_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = Target(name="broken", call=broken_by_x, seeds=lambda: [b"text\nwith an x\n"])
    monkeypatch.setitem(TARGETS, "broken", broken)
    with pytest.raises(KeyError):
        mutate_alone("broken", 20, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert b"x" in kept.read_bytes()
