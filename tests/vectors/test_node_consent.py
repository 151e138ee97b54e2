"""Holds, appeals, recalls and policies under the Node verifier: it refuses what ours refuses."""

import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ledger.errors import VerificationError
from ledger.verify.bundle import verify_bundle
from tests.unit.lineage_world import World, consent_story, name
from tests.vectors.test_node_verifier import _verify

pytest.importorskip("playwright", reason="the bundles are made by the browser tests' world")
from tests.browser.verifier_world import whole_bundle

STRANGE: list[Any] = [
    None, True, 0, -1, 2, 3, 99_999, 100_000, 100_001, 2**53 - 1, "", "x", "retire", "other", [],
    {}, "ab" * 32, "AB" * 32, name("nobody's"), name("ann"), name("net"), name("ben"), "a\x07b",
    "é" * 2_000, "é" * 2_001,
]  # fmt: skip
SIGNERS = [("held", "ann"), ("appealed", "owner"), ("split", "ann"), ("upheld", "ann")]


def _ours(bundle: bytes) -> dict[str, Any]:
    try:
        verify_bundle(bundle)
    except VerificationError as error:
        slug = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(error).__name__).lower()
        return {"error": slug, "entry": error.detail.get("entry")}
    return {}


def test_both_verifiers_say_the_same(tmp_path: Path) -> None:
    chance = random.Random(5)
    told: dict[str, World] = {}
    for label, (_, _, body) in consent_story().items():
        for field in body:
            for n, value in enumerate(chance.sample(STRANGE, 8)):
                change = partial(lambda field, value, body: {**body, field: value}, field, value)
                (folder := tmp_path / f"{label}-{field}-{n}").mkdir()
                told[folder.name] = World(folder).tell().tell_consent({label: change})
    for label, signer in SIGNERS:
        (folder := tmp_path / f"{label}-by-{signer}").mkdir()
        told[folder.name] = World(folder).tell().tell_consent(signers={label: signer})
    (tmp_path / "true").mkdir()
    told["true"] = World(tmp_path / "true").tell().tell_consent()
    files, expected = [], {}
    for title, world in told.items():
        file = tmp_path / f"{title}.lineage.json"
        file.write_bytes(whole_bundle(world, "attribution.recorded"))
        files.append(file)
        expected[title] = _ours(file.read_bytes())
    for file, verdict in _verify(files).items():
        title = file.name.removesuffix(".lineage.json")
        got = {key: verdict[key] for key in ("error", "entry") if key in verdict}
        assert got == expected[title], (title, json.dumps(verdict))
    errors = {found.get("error", "none") for found in expected.values()}
    assert errors == {"none", "malformed-proof", "inconsistent"}
    assert not expected["true"]
