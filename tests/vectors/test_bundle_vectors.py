"""Bundles frozen per format version, good and bad. Never edited; all must verify forever."""

import json
from pathlib import Path
from typing import Any

import pytest

from ledger.errors import VerificationError
from ledger.verify.bundle import verify_bundle
from tests.vectors import freeze_bundles

BUNDLES = Path(__file__).parent / "bundles"
VERSIONS = ("v1", "v2")
EXPECTED: dict[str, Any] = {
    version: json.loads((BUNDLES / version / "expected.json").read_bytes()) for version in VERSIONS
}
GOOD = [(version, name) for version in VERSIONS for name in EXPECTED[version]["good"]]
BAD = [(version, name) for version in VERSIONS for name in EXPECTED[version]["bad"]]


@pytest.mark.parametrize(("version", "name"), GOOD)
def test_good(version: str, name: str) -> None:
    data = (BUNDLES / version / f"{name}.lineage.json").read_bytes()
    want = EXPECTED[version]["good"][name]
    verdict = verify_bundle(
        data,
        trusted_vkey=EXPECTED[version]["vkey"],
        witness_vkeys=want.get("witness_vkeys", ()),
    )
    assert [step.status for step in verdict.steps] == want["steps"]
    assert verdict.facts["subject_index"] == want["subject_index"]
    assert verdict.facts["size"] == want["size"]
    assert verdict.facts["witnesses"] == want.get("witnesses", [])


@pytest.mark.parametrize(("version", "name"), BAD)
def test_bad(version: str, name: str) -> None:
    data = (BUNDLES / version / f"bad-{name}.lineage.json").read_bytes()
    want = EXPECTED[version]["bad"][name]
    with pytest.raises(VerificationError) as caught:
        verify_bundle(data, witness_vkeys=want.get("witness_vkeys", ()))
    error = caught.value
    assert error.slug == want["error"]
    assert error.detail.get("field") == want["field"]
    assert error.detail.get("entry") == want["entry"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_file_is_expected(version: str) -> None:
    files = {path.name for path in (BUNDLES / version).glob("*.lineage.json")}
    expected = EXPECTED[version]
    good = {f"{name}.lineage.json" for name in expected["good"]}
    assert files == good | {f"bad-{name}.lineage.json" for name in expected["bad"]}


def test_the_script_makes_the_frozen_bytes() -> None:
    there = {path.name: path.read_bytes() for path in freeze_bundles.FOLDER.iterdir()}
    assert freeze_bundles.make() == there
