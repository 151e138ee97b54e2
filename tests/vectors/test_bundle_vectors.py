"""Bundles frozen per format version, good and bad. Never edited; all must verify forever."""

import json
from pathlib import Path
from typing import Any

import pytest

from ledger.errors import VerificationError
from ledger.verify.bundle import verify_bundle

BUNDLES = Path(__file__).parent / "bundles" / "v1"
EXPECTED: dict[str, Any] = json.loads((BUNDLES / "expected.json").read_bytes())


@pytest.mark.parametrize("name", EXPECTED["good"])
def test_good(name: str) -> None:
    data = (BUNDLES / f"{name}.lineage.json").read_bytes()
    verdict = verify_bundle(data, trusted_vkey=EXPECTED["vkey"])
    want = EXPECTED["good"][name]
    assert [step.status for step in verdict.steps] == want["steps"]
    assert verdict.facts["subject_index"] == want["subject_index"]
    assert verdict.facts["size"] == want["size"]


@pytest.mark.parametrize("name", EXPECTED["bad"])
def test_bad(name: str) -> None:
    data = (BUNDLES / f"bad-{name}.lineage.json").read_bytes()
    with pytest.raises(VerificationError) as caught:
        verify_bundle(data)
    error, want = caught.value, EXPECTED["bad"][name]
    assert error.slug == want["error"]
    assert error.detail.get("field") == want["field"]
    assert error.detail.get("entry") == want["entry"]


def test_every_file_is_expected() -> None:
    files = {path.name for path in BUNDLES.glob("*.lineage.json")}
    good = {f"{name}.lineage.json" for name in EXPECTED["good"]}
    assert files == good | {f"bad-{name}.lineage.json" for name in EXPECTED["bad"]}
