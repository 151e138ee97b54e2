"""Rows that a contributor shows: was this text in that contribution, was an adapter trained on it.
Pure.

A contribution's rows are committed by the RFC 9162 tree over their salted hashes
(`ledger.domain.rows`), whose root and size the contributor signed. One row with its path proves
itself and says nothing of the others: their salts keep the hashes on the path from being guessed.
In a bundle (docs/FORMATS.md, version 2)::

    {"contribution": <uuid>, "row": n, "value": {"completion","prompt","salt"}, "proof": [<hex>]}

Where the bundle carries a training manifest, the row must stand in one, by contribution, number and
hash: a contribution of which a run used only some rows would otherwise seem to have given them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ledger.domain.ids import check_uuid
from ledger.domain.rows import (
    MAX_COMPLETION_CHARS,
    MAX_PROMPT_CHARS,
    SALT_HEX_CHARS,
    DataRow,
)
from ledger.errors import Inconsistent, MalformedProof, NotIncluded, VerificationError
from ledger.verify.fields import (
    check_ascending,
    count_of,
    hash_of,
    list_of,
    object_of,
    text_of,
)
from ledger.verify.lineage import Lineage
from ledger.verify.merkle import MAX_INCLUSION_HASHES, verify_inclusion

MAX_DISCLOSED = 100

_FIELDS = ("contribution", "row", "value", "proof")
_VALUE_FIELDS = ("completion", "prompt", "salt")


@dataclass(frozen=True, kw_only=True)
class DisclosedRow:
    """Row `row` (from 0) of a contribution, and its path to `rows_root`, leaf's sibling first."""

    contribution: UUID
    row: int
    value: DataRow
    proof: tuple[bytes, ...]


def read_disclosed(value: Any) -> tuple[DisclosedRow, ...]:
    """The list `disclosed` of a bundle; nothing is verified. Raises MalformedProof."""
    items = list_of(value, MAX_DISCLOSED, "disclosed")
    rows = tuple(_read(item, f"disclosed[{n}]") for n, item in enumerate(items))
    check_ascending(((str(row.contribution), row.row) for row in rows), "disclosed")
    return rows


def write_disclosed(rows: Sequence[DisclosedRow]) -> list[dict[str, Any]]:
    return [
        {
            "contribution": str(row.contribution),
            "row": row.row,
            "value": {
                "completion": row.value.completion,
                "prompt": row.value.prompt,
                "salt": row.value.salt,
            },
            "proof": [node.hex() for node in row.proof],
        }
        for row in rows
    ]


def check_disclosed(rows: Sequence[DisclosedRow], lineage: Lineage) -> None:
    """Check each row against the contributions and manifests of a lineage already checked.

    Raises Inconsistent where the contribution is not in the bundle, NotIncluded where the row is
    not the contribution's or in none of the bundle's training manifests; `detail` names the item.
    """
    for n, shown in enumerate(rows):
        _check(shown, f"disclosed[{n}]", lineage)


def _check(shown: DisclosedRow, where: str, lineage: Lineage) -> None:
    id = str(shown.contribution)
    recorded = lineage.recorded.get(id)
    if recorded is None:
        raise Inconsistent(
            f"{where} shows a row of contribution {id}, which is not in the bundle",
            field=f"{where}.contribution",
        )
    body = recorded.envelope.body
    try:
        verify_inclusion(
            index=shown.row,
            size=body["rows_count"],
            leaf=shown.value.hash,
            proof=shown.proof,
            root=bytes.fromhex(body["rows_root"]),
        )
    except VerificationError as error:
        raise NotIncluded(
            f"{where} is not row {shown.row} of contribution {id}, as its contributor signed it: "
            f"{error}",
            field=where,
            entry=recorded.index,
        ) from error
    manifests = lineage.manifests.values()
    if manifests and not any(
        manifest.rows.get(id, {}).get(shown.row) == shown.value.hash for manifest in manifests
    ):
        raise NotIncluded(
            f"{where}: row {shown.row} of contribution {id} is in no training manifest of this "
            "bundle: no adapter here was trained on it",
            field=where,
            entry=recorded.index,
        )


def _read(value: Any, where: str) -> DisclosedRow:
    fields = object_of(value, _FIELDS, where)
    proof = list_of(fields["proof"], MAX_INCLUSION_HASHES, f"{where}.proof")
    return DisclosedRow(
        contribution=check_uuid(fields["contribution"], f"{where}.contribution"),
        row=count_of(fields["row"], f"{where}.row"),
        value=_row(fields["value"], f"{where}.value"),
        proof=tuple(hash_of(node, f"{where}.proof[{n}]") for n, node in enumerate(proof)),
    )


def _row(value: Any, where: str) -> DataRow:
    """Only the form that every implementation can check alike: whether a completion is blank
    depends on the Unicode tables at hand, and the log checked it when the rows came in."""
    fields = object_of(value, _VALUE_FIELDS, where)
    for name, limit in (("prompt", MAX_PROMPT_CHARS), ("completion", MAX_COMPLETION_CHARS)):
        if not 0 < len(text_of(fields[name], f"{where}.{name}")) <= limit:
            raise MalformedProof(
                f"{where}.{name} must have 1 to {limit} characters", field=f"{where}.{name}"
            )
    salt = text_of(fields["salt"], f"{where}.salt")
    if len(salt) != SALT_HEX_CHARS or set(salt) - set("0123456789abcdef"):
        raise MalformedProof(
            f"{where}.salt must be {SALT_HEX_CHARS} lower-case hex digits", field=f"{where}.salt"
        )
    return DataRow(prompt=fields["prompt"], completion=fields["completion"], salt=salt)
