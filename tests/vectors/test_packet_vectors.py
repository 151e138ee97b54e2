"""Audit packets frozen, good and bad. Never edited; the good must verify forever."""

import json
from pathlib import Path
from typing import Any

import pytest

from ledger.errors import VerificationError
from ledger.verify.packet import check_packet
from tests.vectors import freeze_packets
from tests.vectors.freeze_packets import BUNDLE, FOLDER, SUFFIX

EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_bytes())


def check(path: Path) -> dict[str, Any]:
    bundle = (FOLDER / BUNDLE).read_bytes()
    verdict = check_packet(path.read_bytes(), bundle=bundle, trusted_vkey=EXPECTED["vkey"])
    assert {step.status for step in verdict.steps} == {"ok"}
    return dict(verdict.facts)


@pytest.mark.parametrize("name", EXPECTED["good"])
def test_good(name: str) -> None:
    assert check(FOLDER / f"{name}{SUFFIX}").items() >= EXPECTED["good"][name].items()


@pytest.mark.parametrize("name", EXPECTED["bad"])
def test_bad(name: str) -> None:
    with pytest.raises(VerificationError) as caught:
        check(FOLDER / f"bad-{name}{SUFFIX}")
    found = {"error": caught.value.slug, "step": caught.value.detail["step"]}
    assert found == EXPECTED["bad"][name]


def test_the_bad_fail_in_every_step() -> None:
    assert {want["step"] for want in EXPECTED["bad"].values()} == {1, 2, 3, 4, 5}


def test_the_script_makes_the_frozen_bytes() -> None:
    there = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.name != BUNDLE}
    assert freeze_packets.make() == there
