"""The graph of an answer: each rule of ledger/verify/lineage.py kept once and broken once."""

from pathlib import Path
from typing import Any

import pytest

from ledger.domain.canonical import parse_canonical
from ledger.domain.envelope import decode_entry
from ledger.errors import Inconsistent, MalformedProof, VerificationError
from ledger.verify.bundle import verify_bundle
from ledger.verify.lineage import MANIFEST, check_lineage
from ledger.verify.verdict import Verdict
from tests.unit.lineage_world import Change, World, actor, manifest, name


def verify(world: World, subject: str = "inference.recorded") -> Verdict:
    """Sign the story and check its lineage directly: the assembler is not asked."""
    world.checkpoint()
    entries = [decode_entry(entry) for entry in world.log.entries(0, world.log.size())]
    check_lineage(entries, dict(world.blobs.blobs), world.ids[subject])
    return verify_bundle(world.bundle(subject))


def set_to(**fields: Any) -> Change:
    return lambda body: {**body, **fields}


@pytest.mark.parametrize(
    "subject",
    [
        "inference.recorded",
        "attribution.recorded",
        "fee.charged",
        "adapter.published",
        "run.completed",
        "run.requested",
        "approved ann",
        "recorded ben",
        "datanet.created",
    ],
)
def test_every_event_of_the_story_can_be_the_subject(tmp_path: Path, subject: str) -> None:
    verdict = verify(World(tmp_path).tell(), subject)
    assert [step.status for step in verdict.steps] == ["ok"] * 5 + ["skipped"]


def test_what_the_verdict_says_of_an_answer(tmp_path: Path) -> None:
    text = verify(World(tmp_path).tell()).to_text()
    assert "given by the adapter dev/answers" in text
    assert "used 6 rows of 2 approved contributions by 2 contributors" in text
    assert "the rows are those that the contributors signed for" in text
    assert "60.00 %" in text
    assert "unattributed 10.00 %" in text
    assert "came from the bundle itself" in text
    assert "No witness and no chain vouches" in text


# label of the event that lies, the lie, the field that the error must name
LIES: list[tuple[str, Change | None, str]] = [
    ("datanet.created", None, "body.datanet"),
    ("recorded ann", set_to(licence="MIT"), "body.licence"),
    ("recorded ann", set_to(rows_root="00" * 32), MANIFEST),
    ("recorded ann", set_to(rows_count=2), MANIFEST),
    ("recorded ben", None, "body.contribution"),
    ("approved ann", None, MANIFEST),
    ("approved ann", set_to(datanet=name("elsewhere")), "body.datanet"),
    ("run.requested", None, "body.run"),
    ("run.requested", set_to(datanets=[name("elsewhere")]), "body.datanets"),
    ("run.requested", set_to(base_model="0f" * 32), MANIFEST),
    ("run.completed", None, "body.run"),
    ("run.completed", set_to(contributions_count=3), "body.contributions_count"),
    ("run.completed", set_to(rows_count=7), "body.rows_count"),
    ("run.completed", set_to(steps=8), "body.steps"),
    ("run.completed", set_to(adapter_sha256="0f" * 32), "body.adapter_sha256"),
    ("run.completed", set_to(adapter_config_sha256="0f" * 32), "body.adapter_config_sha256"),
    ("run.completed", set_to(index_sha256="0f" * 32), "body.index_sha256"),
    ("adapter.published", None, "body.adapter"),
    ("adapter.published", set_to(adapter_sha256="0f" * 32), "body.adapter_sha256"),
    ("adapter.published", set_to(base_model="0f" * 32), "body.base_model"),
    ("adapter.published", set_to(run=name("another run")), "body.run"),
    ("adapter.published", set_to(input_wei_per_token="11"), "body.fee_wei"),
    ("inference.recorded", None, "body.inference"),
    ("inference.recorded", set_to(completion_tokens=5), "body.fee_wei"),
    ("inference.recorded", set_to(consumer=actor("eve")), "body.account"),
    ("fee.charged", set_to(owner=actor("eve")), "body.owner"),
    (
        "fee.charged",
        set_to(amount_wei="131", contributors_wei="81"),
        "body.amount_wei",
    ),
    ("attribution.recorded", set_to(index_sha256="0f" * 32), "body.index_sha256"),
    (
        "attribution.recorded",
        set_to(shares=[{"contributor": actor("eve"), "ppm": 900_000}]),
        "body.shares[0].contributor",
    ),
]


@pytest.mark.parametrize(
    ("label", "lie", "field"), LIES, ids=[f"{label}: {field}" for label, _, field in LIES]
)
def test_a_lie_is_named(tmp_path: Path, label: str, lie: Change | None, field: str) -> None:
    world = World(tmp_path).tell({label: lie})
    with pytest.raises(Inconsistent) as caught:
        verify(world, "attribution.recorded")
    assert caught.value.detail["field"] == field
    assert f"entry {caught.value.detail['entry']}" in str(caught.value)


@pytest.mark.parametrize(
    ("label", "signer"),
    [("approved ann", "stranger"), ("approved ann", "ann"), ("adapter.published", "stranger")],
)
def test_the_wrong_actor_is_named(tmp_path: Path, label: str, signer: str) -> None:
    world = World(tmp_path).tell(signers={label: signer})
    with pytest.raises(Inconsistent) as caught:
        verify(world)
    assert caught.value.detail["field"] == "actor"


def test_nobody_approves_their_own_rows_even_as_reviewer(tmp_path: Path) -> None:
    world = World(tmp_path).tell(
        {"datanet.created": set_to(reviewers=[actor("reviewer"), actor("ann")])},
        {"approved ann": "ann"},
    )
    with pytest.raises(Inconsistent, match="their own contribution"):
        verify(world)


@pytest.mark.parametrize(
    "label", ["recorded ann", "run.completed", "attribution.recorded", "fee.charged"]
)
def test_what_happens_once_does_not_happen_twice(tmp_path: Path, label: str) -> None:
    world = World(tmp_path).tell()
    again = decode_entry(world.log.entries(0, 99)[list(world.ids).index(label)])
    world.add("worker", again.envelope.type, again.envelope.body, label="again")
    with pytest.raises(Inconsistent, match="happens only once"):
        verify(world)


def rows_of(blob: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = parse_canonical(blob)["rows"]
    return found


@pytest.mark.parametrize(
    "training",
    [
        b"",
        b"[]",
        b'{"v":1}',
        b"\xff",
        manifest(v=2),
        manifest(rows=[]),
        manifest(rows=[{"contribution": name("ann"), "row": -1, "row_hash": "00" * 32}]),
        manifest(rows=[{"contribution": name("ann"), "row": 0, "row_hash": "xx"}]),
        manifest(rows=[{"contribution": "ann", "row": 0, "row_hash": "00" * 32}]),
        manifest(rows=rows_of(manifest()) + rows_of(manifest())[:1]),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, training: bytes) -> None:
    with pytest.raises(MalformedProof):
        verify(World(tmp_path).tell(training=training))


def test_rows_that_the_contributor_did_not_sign_for(tmp_path: Path) -> None:
    rows = rows_of(manifest())
    rows[1] = {**rows[1], "row_hash": "00" * 32}
    with pytest.raises(Inconsistent, match="not those of its rows_root"):
        verify(World(tmp_path).tell(training=manifest(rows=rows)))


def test_some_rows_only_is_said_aloud(tmp_path: Path) -> None:
    training = manifest(rows=rows_of(manifest())[:5])
    world = World(tmp_path).tell({"run.completed": set_to(rows_count=5)}, training=training)
    verdict = verify(world)
    assert any("used only some" in line for line in verdict.trusted)
    assert not any("signed for" in line for line in verdict.proven)


def test_blobs_hash_to_their_names_and_are_named(tmp_path: Path) -> None:
    world = World(tmp_path).tell()
    world.checkpoint()
    entries = [decode_entry(entry) for entry in world.log.entries(0, world.log.size())]
    subject = world.ids["inference.recorded"]
    blobs = dict(world.blobs.blobs)
    (name_of,) = blobs
    for bad in ({name_of: blobs[name_of] + b" "}, {**blobs, "00" * 32: b"x"}, {}):
        with pytest.raises(VerificationError):
            check_lineage(entries, bad, subject)


def test_an_unknown_subject(tmp_path: Path) -> None:
    world = World(tmp_path).tell()
    entries = [decode_entry(entry) for entry in world.log.entries(0, world.log.size())]
    world.add("ann", "identity.registered", {"name": "late"})
    with pytest.raises(Inconsistent, match="subject"):
        check_lineage(entries, world.blobs.blobs, world.ids["identity.registered"])
