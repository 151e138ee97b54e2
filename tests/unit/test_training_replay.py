"""A recorded run trained again: the same, different, or not to be compared, and never confused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.errors import Inconsistent
from tests.unit.test_training_trainer import CONFIG, ROWS, STEPS
from workers import base_model
from workers.training.replay import replay, wanted_rows
from workers.training.trainer import MANIFEST_FILE, TrainingRow, train

# As the ledger names them: a replay fetches rows by contribution id.
KNOWN = [
    replace(row, contribution=f"00000000-0000-4000-8000-{n:012}") for n, row in enumerate(ROWS)
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("recorded")
    train(CONFIG, base_model.BUNDLED, KNOWN, folder)
    return (folder / MANIFEST_FILE).read_bytes()


def changed(manifest: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    value = parse_canonical(manifest)
    change(value)
    return canonical_json(value)


def fetched(manifest: bytes) -> list[TrainingRow]:
    known = {(row.contribution, row.index): row for row in KNOWN}
    return [known[name, number] for name, number, _ in wanted_rows(manifest)]


def test_the_same_rows_give_the_same_adapter(recorded: bytes, tmp_path: Path) -> None:
    seen: list[int] = []
    found = replay(
        recorded, fetched(recorded), base_model.BUNDLED, tmp_path,
        on_progress=lambda done, total, loss: seen.append(done),
    )  # fmt: skip
    assert (found.outcome, found.reasons, found.loss_apart) == ("same", (), "0.000000")
    assert found.found_sha256 == found.expected_sha256
    assert found.steps == STEPS == len(seen)


def test_an_adapter_that_other_rows_made_is_different(recorded: bytes, tmp_path: Path) -> None:
    """The worker recorded these rows, and trained on others."""
    folder = tmp_path / "secret"
    other = [replace(KNOWN[0], completion="It runs nothing."), *KNOWN[1:]]
    made = train(CONFIG, base_model.BUNDLED, other, folder)
    lie = changed(recorded, lambda v: v.update(adapter_sha256=made.adapter_sha256))
    found = replay(lie, fetched(lie), base_model.BUNDLED, tmp_path / "replay")
    assert found.outcome == "different"
    assert found.found_sha256 != made.adapter_sha256 == found.expected_sha256
    assert "adapter_sha256" in found.reasons[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["versions"].update(torch="1.0"),
        lambda v: v["versions"].update(magic="1"),
        lambda v: v["versions"].pop("peft"),
        lambda v: v["platform"].update(cpu_capability="VSX"),
        lambda v: v.update(base_sha256="ab" * 32),
        lambda v: v.update(platform="mainframe"),
    ],
)
def test_another_environment_is_not_comparable_and_never_different(
    change: Any, recorded: bytes, tmp_path: Path
) -> None:
    other = changed(recorded, change)
    out = tmp_path / "replay"
    found = replay(other, fetched(other), base_model.BUNDLED, out)
    assert (found.outcome, found.found_sha256) == ("not-comparable", None)
    assert found.reasons
    assert not out.exists(), "and nothing was trained for it"


def test_anyway_can_still_conclude_that_it_is_the_same(recorded: bytes, tmp_path: Path) -> None:
    other = changed(recorded, lambda v: v["versions"].update(torch="1.0"))
    found = replay(other, fetched(other), base_model.BUNDLED, tmp_path / "a", anyway=True)
    assert found.outcome == "same"
    forged = changed(other, lambda v: v.update(adapter_sha256="ab" * 32))
    found = replay(forged, fetched(forged), base_model.BUNDLED, tmp_path / "b", anyway=True)
    assert found.outcome == "not-comparable"
    assert found.found_sha256 is not None


def test_rows_must_be_the_manifests(recorded: bytes, tmp_path: Path) -> None:
    rows = fetched(recorded)
    for given, said in (
        (rows[:-1], "9 rows were given"),
        ([rows[1], rows[0], *rows[2:]], "row 0 of the manifest"),
        ([replace(rows[0], row_hash="ab" * 32), *rows[1:]], "row 0 of the manifest"),
    ):
        with pytest.raises(Inconsistent, match=said):
            replay(recorded, given, base_model.BUNDLED, tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        b"", b"[]", b'{"v":2}',
        lambda v: v.update(config={"r": 0}), lambda v: v.update(config=None),
        lambda v: v.update(rows=[{}]), lambda v: v.update(rows=3), lambda v: v.update(threads=2),
        lambda v: v.pop("losses"), lambda v: v.update(steps="9"),
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_manifest_is_refused(bad: Any, recorded: bytes, tmp_path: Path) -> None:
    manifest = bad if isinstance(bad, bytes) else changed(recorded, bad)
    with pytest.raises(Inconsistent):
        replay(manifest, KNOWN, base_model.BUNDLED, tmp_path)
