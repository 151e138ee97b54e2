"""Holds, appeals, recalls in a bundle: each rule of the verifier for them, kept and broken."""

from pathlib import Path
from typing import Any

import pytest

from ledger.errors import Inconsistent, MalformedProof
from ledger.verify.bundle import verify_bundle
from tests.unit.lineage_world import H, World, consent_story, name, paid_after_a_hold
from tests.unit.test_verify_lineage import set_to, verify

ELSEWHERE = set_to(datanet=name("elsewhere net"))


@pytest.mark.parametrize("label", consent_story())
def test_each_event_can_be_the_subject(tmp_path: Path, label: str) -> None:
    verdict = verify(World(tmp_path).tell().tell_consent(), label)
    assert [step.status for step in verdict.steps] == ["ok"] * 5 + ["skipped"]


def test_what_the_verdict_says(tmp_path: Path) -> None:
    world = World(tmp_path).tell().tell_consent()
    ann = name("ann")
    for label, said in {
        "policy": "in a day 2 contributions and 20 rows of one contributor",
        "held": f"the contribution {ann} was held: junk",
        "released": f"the hold of the contribution {ann} was ended",
        "appealed": f"row 2 of the contribution {ann} is said to be nobody's copy: my own words",
        "split": f"row 2 of the contribution {ann} stands for itself again",
        "upheld": f"row 0 of the contribution {ann} stays merged with another",
        "recalled": f"was retired because the contribution {ann} was withdrawn",
    }.items():
        assert said in verify(world, label).to_text()


@pytest.mark.parametrize(
    ("label", "changes", "field"),
    [
        ("held", {"contribution": name("nobody's")}, "body.contribution"),
        ("split", {"row": 3}, "body.row"),
        ("appealed", {"row": 3}, "body.row"),
        ("upheld", {"row": 99_999}, "body.row"),
        ("recalled", {"adapter": name("none")}, "body.adapter"),
        ("policy", {"datanet": name("none")}, "body.datanet"),
    ],
)
def test_a_lie_is_named(tmp_path: Path, label: str, changes: dict[str, Any], field: str) -> None:
    world = World(tmp_path).tell().tell_consent({label: set_to(**changes)})
    with pytest.raises(Inconsistent) as caught:
        verify(world)
    assert caught.value.detail["field"] == field


@pytest.mark.parametrize("label", ["held", "released", "appealed", "split", "upheld", "recalled"])
def test_the_datanet_is_the_contributions(tmp_path: Path, label: str) -> None:
    world = World(tmp_path).tell()
    other = {
        "datanet": name("elsewhere net"), "name": "other", "description": "", "licence": "MIT",
        "reviewers": [],
    }  # fmt: skip
    world.add("owner", "datanet.created", other, label="other")
    world.tell_consent({label: ELSEWHERE})
    with pytest.raises(Inconsistent, match=r"is .*, but entry") as caught:
        verify(world)
    assert caught.value.detail["field"] == "body.datanet"


@pytest.mark.parametrize(
    ("label", "signer"),
    [("held", "ann"), ("appealed", "owner"), ("split", "ann"), ("upheld", "ann")],
)
def test_the_wrong_actor_is_named(tmp_path: Path, label: str, signer: str) -> None:
    world = World(tmp_path).tell().tell_consent(signers={label: signer})
    with pytest.raises(Inconsistent) as caught:
        verify(world)
    assert caught.value.detail["field"] == "actor"


@pytest.mark.parametrize(
    ("label", "changes"),
    [
        ("policy", {"max_rows_per_contribution": 100_001}),
        ("policy", {"max_contributions_per_day": 0}),
        ("policy", {"on_withdrawal": "delete"}),
        ("held", {"reason": "dislike"}),
        ("held", {"evidence_sha256": "xx"}),
        ("split", {"row": 100_000}),
        ("split", {"row": -1}),
    ],
)
def test_a_body_has_its_form(tmp_path: Path, label: str, changes: dict[str, Any]) -> None:
    world = World(tmp_path).tell().tell_consent({label: set_to(**changes)})
    world.checkpoint()
    with pytest.raises(MalformedProof):
        verify_bundle(world.bundle(label))


def test_a_hold_may_name_its_evidence(tmp_path: Path) -> None:
    world = World(tmp_path).tell().tell_consent({"held": set_to(evidence_sha256=H)})
    assert verify(world, "held").to_text()


@pytest.mark.parametrize(("released", "wei", "events"), [(False, 48, 1), (True, 88, 2)])
def test_a_payout_is_added_up_without_what_is_withheld(
    tmp_path: Path, released: bool, wei: int, events: int
) -> None:
    verdict = verify_bundle(paid_after_a_hold(World(tmp_path).tell(), released=released))
    (payout,) = verdict.facts["payouts"]
    assert (payout["accounted_wei"], payout["cumulative_wei"]) == (str(wei), str(wei))
    assert payout["events"] == events
    assert "to the last wei" in verdict.to_text()


def test_a_payout_of_what_is_withheld_is_not_accounted_for(tmp_path: Path) -> None:
    world = World(tmp_path).tell()
    verdict = verify_bundle(paid_after_a_hold(world, released=False, claims_all=True))
    (payout,) = verdict.facts["payouts"]
    assert (payout["accounted_wei"], payout["cumulative_wei"]) == ("48", "88")
    assert "to the last wei" not in verdict.to_text()
