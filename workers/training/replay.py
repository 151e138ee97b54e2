"""Train a recorded run again and compare: for a dispute about where an adapter came from.

The manifest has every row in order, the settings, the seeds, the thread count and the versions; on
the same platform they give the same bytes (`trainer.py`). So there are three outcomes, not two:

- `same`             the adapter has the recorded hash: these rows, in this order, made it;
- `different`        on what the manifest says is the same platform, other bytes came out;
- `not-comparable`   versions, platform or base model here are not the manifest's. Other bytes
                     would mean nothing, so nothing is trained unless that is asked for, and then
                     only `same` can be concluded from it.

Known weak spot: the manifest names instruction set and libraries, not the make of the CPU. Where
`different` would be an accusation, look at `loss_apart` (last bits that drift are another CPU,
another dataset is not) and repeat it on the machine of the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ledger.domain.canonical import parse_canonical
from ledger.domain.ids import check_hash, sha256_hex
from ledger.errors import Inconsistent, InvalidEvent
from workers import base_model
from workers.training.config import TrainingConfig
from workers.training.trainer import (
    MANIFEST_FILE,
    MANIFEST_VERSION,
    Progress,
    Row,
    environment,
    train,
)

Outcome = Literal["same", "different", "not-comparable"]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """`reasons` says why it is not comparable, or what differs. `found_sha256` is None when nothing
    was trained. `loss_apart` is the largest difference of a step's loss, as a decimal string."""

    outcome: Outcome
    expected_sha256: str
    found_sha256: str | None
    steps: int
    loss_apart: str | None
    reasons: tuple[str, ...]


def wanted_rows(manifest: bytes) -> list[tuple[str, int, str]]:
    """(contribution, row, row hash) in the manifest's order: what to fetch. Raises Inconsistent."""
    value = _read(manifest)
    try:
        return [
            (str(row["contribution"]), int(row["row"]), check_hash(row["row_hash"], "row_hash"))
            for row in value["rows"]
        ]
    except (KeyError, TypeError, ValueError, InvalidEvent) as error:
        raise Inconsistent(f"the manifest lists its rows in another form: {error}") from error


def replay(
    manifest: bytes,
    rows: Sequence[Row],
    base: Path,
    out_dir: Path,
    *,
    anyway: bool = False,
    on_progress: Progress | None = None,
) -> Replayed:
    """Train what `manifest` describes, on `rows` as the caller fetched and hashed them.

    `out_dir` is fresh, or that of a replay that was killed. Raises Inconsistent when the rows are
    not the manifest's or it contradicts itself, and what `train` raises. `anyway` trains where the
    outcome can only be `same` or `not-comparable`.
    """
    value = _read(manifest)
    config = _config(value)
    _check_rows(wanted_rows(manifest), rows)
    reasons = _differences(value, config, base)
    expected = check_hash(value.get("adapter_sha256"), "adapter_sha256")
    steps = int(value["steps"])
    if reasons and not anyway:
        return Replayed(
            outcome="not-comparable", expected_sha256=expected, found_sha256=None, steps=steps,
            loss_apart=None, reasons=reasons,
        )  # fmt: skip
    result = train(config, base, rows, out_dir, on_progress=on_progress)
    again = (out_dir / MANIFEST_FILE).read_bytes()
    same, comparable = result.adapter_sha256 == expected, not reasons
    if comparable and sha256_hex(again) != sha256_hex(manifest):
        reasons = (f"the manifests differ in {_fields_apart(value, again)}",)
    return Replayed(
        outcome="same" if same else "different" if comparable else "not-comparable",
        expected_sha256=expected,
        found_sha256=result.adapter_sha256,
        steps=steps,
        loss_apart=_apart(value, again),
        reasons=reasons,
    )


def _read(manifest: bytes) -> dict[str, Any]:
    try:
        value = parse_canonical(manifest)
    except InvalidEvent as error:
        raise Inconsistent(f"the training manifest is damaged: {error.message}") from error
    if not isinstance(value, dict) or value.get("v") != MANIFEST_VERSION:
        raise Inconsistent(f"expected a training manifest of version {MANIFEST_VERSION}")
    if type(value.get("steps")) is not int or not isinstance(value.get("losses"), list):
        raise Inconsistent("the training manifest has no steps or losses")
    return value


def _config(value: Mapping[str, Any]) -> TrainingConfig:
    try:
        return TrainingConfig.from_dict(value["config"])
    except (KeyError, TypeError, InvalidEvent) as error:
        raise Inconsistent(f"the manifest's settings cannot be trained with: {error}") from error


def _check_rows(wanted: Sequence[tuple[str, int, str]], rows: Sequence[Row]) -> None:
    given = [(row.contribution, row.index, row.row_hash) for row in rows]
    if len(given) != len(wanted):
        raise Inconsistent(f"{len(given)} rows were given; the manifest lists {len(wanted)}")
    for n, (have, want) in enumerate(zip(given, wanted, strict=True)):
        if have != want:
            raise Inconsistent(
                f"row {n} of the manifest is {want[0]}/{want[1]} with hash {want[2]}; given was "
                f"{have[0]}/{have[1]} with {have[2]}"
            )


def _differences(value: Mapping[str, Any], config: TrainingConfig, base: Path) -> tuple[str, ...]:
    """What here is not as the manifest says, one sentence each."""
    found: list[str] = []
    digest = base_model.digest(base)
    if value.get("base_sha256") != digest:
        found.append(f"the base model was {value.get('base_sha256')}, here it is {digest}")
    if value.get("threads") != config.threads:
        raise Inconsistent("the manifest's thread count is not that of its own settings")
    for part, here in environment().items():
        recorded = value.get(part)
        recorded = recorded if isinstance(recorded, Mapping) else {}
        found += [
            f"{name} was {recorded.get(name)}, here it is {here.get(name)}"
            for name in sorted({*recorded, *here})
            if recorded.get(name) != here.get(name)
        ]
    return tuple(found)


def _fields_apart(value: Mapping[str, Any], again: bytes) -> str:
    other = parse_canonical(again)
    return ", ".join(n for n in sorted({*value, *other}) if value.get(n) != other.get(n)) or "none"


def _apart(value: Mapping[str, Any], again: bytes) -> str | None:
    """Largest difference between the losses of a step; None when the steps are not as many."""
    losses, other = value["losses"], parse_canonical(again)["losses"]
    try:
        return f"{max(abs(float(a) - float(b)) for a, b in zip(losses, other, strict=True)):.6f}"
    except ValueError:
        return None
