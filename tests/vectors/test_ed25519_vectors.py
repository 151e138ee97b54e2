"""Ed25519 at its edges: what libsodium accepts is what every verifier of ours accepts.

The cases were made once with group arithmetic (small orders and their sums added to A and R, other
encodings, S beyond the order) and `valid` is frozen. tests/browser holds the JavaScript verifier
against the same file, once with crypto.subtle and once without.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "ed25519_edges.json").read_bytes()
)["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_libsodium_answers_as_frozen(case: dict[str, Any]) -> None:
    key = VerifyKey(bytes.fromhex(case["public_key"]))
    message, signature = bytes.fromhex(case["message"]), bytes.fromhex(case["signature"])
    try:
        key.verify(message, signature)
        valid = True
    except BadSignatureError:
        valid = False
    assert valid is case["valid"]


def test_both_answers_are_there() -> None:
    assert {case["valid"] for case in CASES} == {True, False}
