"""Show some rows of one's own contribution in a bundle, and no other row. Pure.

The contributor holds the rows with their salts; the log holds their root alone. What goes into the
bundle is the shown rows and, for each, hashes on its path: salted, so that no other row can be
guessed from them (`ledger.verify.disclosure`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from ledger.domain.envelope import decode_entry
from ledger.domain.events import check_body
from ledger.domain.rows import DataRow, tree_path, tree_root
from ledger.errors import InvalidEvent, MalformedProof, NotFound, TooLarge
from ledger.verify.bundle import verify_bundle
from ledger.verify.bundle_format import Bundle, format_bundle, parse_bundle
from ledger.verify.disclosure import MAX_DISCLOSED, DisclosedRow


def disclose(data: bytes, rows: Sequence[DataRow], numbers: Collection[int]) -> bytes:
    """The bundle `data` with these rows (from 0) of the contribution whose rows are `rows`.

    Rows that it shows already stay. The result is verified before it is handed out: a bundle that
    does not hold, or a row that none of its training runs used, raises that VerificationError.
    Raises NotFound when the bundle has no contribution of these rows, InvalidEvent for a row number
    beyond them, TooLarge beyond MAX_DISCLOSED.
    """
    bundle = parse_bundle(data)
    beyond = [number for number in numbers if not 0 <= number < len(rows)]
    if beyond or not numbers:
        raise InvalidEvent(f"rows are numbered 0 to {len(rows) - 1}: {beyond or 'none was asked'}")
    hashes = [row.hash for row in rows]
    contributions = _contributions(bundle, tree_root(hashes).hex(), len(rows))
    if not contributions:
        raise NotFound(
            "this bundle has no contribution of these rows: ask for the bundle of your "
            "contribution, or of an adapter, run or answer that rests on it"
        )
    shown = {(str(row.contribution), row.row): row for row in bundle.disclosed}
    for contribution in contributions:
        for number in numbers:
            shown[str(contribution), number] = DisclosedRow(
                contribution=contribution,
                row=number,
                value=rows[number],
                proof=tuple(tree_path(hashes, number)),
            )
    if len(shown) > MAX_DISCLOSED:
        raise TooLarge(f"a bundle shows at most MAX_DISCLOSED = {MAX_DISCLOSED} rows")
    disclosed = tuple(row for _, row in sorted(shown.items()))
    made = format_bundle(replace(bundle, disclosed=disclosed))
    verify_bundle(made)
    return made


def contributions_of(data: bytes) -> list[str]:
    """Ids of the contributions in a bundle, in log order."""
    return [body["contribution"] for body in _recorded(parse_bundle(data))]


def _contributions(bundle: Bundle, root: str, count: int) -> list[UUID]:
    return [
        UUID(body["contribution"])
        for body in _recorded(bundle)
        if (body["rows_root"], body["rows_count"]) == (root, count)
    ]


def _recorded(bundle: Bundle) -> Iterator[Mapping[str, Any]]:
    """Bodies of contribution.recorded; a bundle that lies about them will not verify."""
    for bundled in bundle.entries:
        try:
            event = decode_entry(bundled.entry, verify=False).envelope
            check_body(event.type, event.body)
        except InvalidEvent as error:
            raise MalformedProof(f"entry {bundled.index}: {error}", entry=bundled.index) from error
        if event.type == "contribution.recorded":
            yield event.body
