"""Contributions: rows of prompt and completion, committed by salted hashes."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer

from ledger.cli.context import As, Json, client, home, listing, out, show
from ledger.domain.ids import check_uuid
from ledger.domain.rows import (
    MAX_ROWS_BLOB_BYTES,
    SALT_HEX_CHARS,
    DataRow,
    check_row,
    decode_rows,
    encode_rows,
    rows_root,
)
from ledger.errors import Inconsistent, InvalidEvent, NotFound, TooLarge
from ledger.files import PRIVATE, PUBLIC, write_durably
from ledger.log.disclose import contributions_of, disclose
from ledger.verify.bundle_format import MAX_BUNDLE_BYTES

app = typer.Typer(name="contribution", no_args_is_help=True, help="Give data, review it.")

COLUMNS = ["contribution", "title", "status", "held", "rows_count", "contributor"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON Lines with `prompt` and `completion`, at least. Errors name the line."""
    rows = []
    for number, line in json_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidEvent(f"{path.name} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not all(
            isinstance(row.get(f), str) and row[f].strip() for f in ("prompt", "completion")
        ):
            raise InvalidEvent(
                f"{path.name} line {number} needs prompt and completion, non-empty strings"
            )
        rows.append(row)
    if not rows:
        raise InvalidEvent(f"{path.name} has no rows")
    return rows


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a JSON Lines file that hold anything, numbered from 1.

    A line ends at a newline and nowhere else: strings of JSON may hold U+2028, U+2029 or U+0085 as
    they are, where `str.splitlines` would cut them. Raises InvalidEvent for what is no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidEvent(f"cannot read {path}: {error}") from error
    yield from ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def salted(rows: list[dict[str, Any]]) -> list[DataRow]:
    """Rows with a fresh random salt each."""
    return [
        check_row(
            {
                "prompt": row["prompt"],
                "completion": row["completion"],
                "salt": secrets.token_hex(SALT_HEX_CHARS // 2),
            },
            f"row {n}",
        )
        for n, row in enumerate(rows)
    ]


def contribution_body(
    rows: list[DataRow], *, contribution: str, datanet: str, licence: str, title: str, sha256: str
) -> dict[str, Any]:
    return {
        "contribution": contribution,
        "datanet": datanet,
        "licence": licence,
        "title": title,
        "rows_root": rows_root(rows).hex(),
        "rows_count": len(rows),
        "rows_sha256": sha256,
    }


@app.command()
def add(
    datanet: str,
    file: Annotated[Path, typer.Argument(help="JSON Lines with prompt and completion.")],
    title: Annotated[str | None, typer.Option()] = None,
    who: As = "me",
) -> None:
    """Contribute rows to a datanet."""
    rows = salted(read_rows(file))
    with client(who, login=True) as ledger:
        licence = ledger.get(f"/v1/datanets/{datanet}")["licence"]
        contribution = str(uuid4())
        # Kept first: a crash before the append leaves a file of a contribution that never was,
        # which harms nobody; the other way round the salts could be lost.
        _write(rows_path(contribution), encode_rows(rows))
        body = contribution_body(
            rows,
            contribution=contribution,
            datanet=datanet,
            licence=licence,
            title=title or file.stem,
            sha256=ledger.put_blob(encode_rows(rows)),
        )
        index = ledger.append("contribution.recorded", body)
    out.print(f"{contribution}  {len(rows)} rows at index {index}")


@app.command("rows")
def fetch_rows(
    contribution: str,
    to: Annotated[Path | None, typer.Option("--to", help="File to write.")] = None,
    who: As = "me",
) -> None:
    """Fetch the salted rows of your contribution, as `add` keeps them, and check them."""
    with client(who, login=True) as ledger:
        found = ledger.get(f"/v1/contributions/{contribution}")
        blob = ledger.get_blob(found["rows_sha256"])
    rows = decode_rows(blob)
    if (rows_root(rows).hex(), len(rows)) != (found["rows_root"], found["rows_count"]):
        raise Inconsistent(f"these are not the rows that {contribution} was recorded with")
    path = to or rows_path(str(found["contribution"]))
    _write(path, blob)
    out.print(f"{path}  {len(rows)} rows with their salts: keep them to yourself")


@app.command("disclose")
def disclose_rows(
    bundle: Annotated[Path, typer.Argument(help="A bundle that your contribution is in.")],
    row: Annotated[list[int], typer.Option("--row", help="Row to show, from 0; repeat for more.")],
    to: Annotated[Path, typer.Option("--to", help="Bundle to write.")],
    rows: Annotated[
        Path | None, typer.Option("--rows", help="Your salted rows; default: what `add` kept.")
    ] = None,
) -> None:
    """Show rows of your own contribution in a bundle, and no other row. Needs no network."""
    data = _read(bundle, MAX_BUNDLE_BYTES)
    path = rows or _kept_rows(data)
    made = disclose(data, decode_rows(_read(path, MAX_ROWS_BLOB_BYTES)), row)
    if to.exists() and to.samefile(bundle):
        raise InvalidEvent(f"{to} is the bundle itself: write the one with your rows elsewhere")
    _write(to, made, mode=PUBLIC)
    shown = sorted(set(row))
    what = f"{'row' if len(shown) == 1 else 'rows'} {', '.join(map(str, shown))}"
    out.print(f"{to}  shows {what} and no other; now: tributary verify {to}")


def rows_path(contribution: str) -> Path:
    """Where `add` keeps the rows with their salts, mode 0600: they are all that a row's hash hides
    behind."""
    return home() / "rows" / f"{check_uuid(contribution, 'contribution')}.json"


def _kept_rows(data: bytes) -> Path:
    found = [path for id in contributions_of(data) if (path := rows_path(id)).exists()]
    if len(found) == 1:
        return found[0]
    if found:
        named = ", ".join(str(path) for path in found)
        raise InvalidEvent(f"rows of several contributions are here; say which, --rows: {named}")
    raise NotFound(
        f"{home() / 'rows'} has no rows of a contribution in this bundle: name their file with "
        "--rows, or fetch it with `tributary contribution rows CONTRIBUTION`"
    )


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise TooLarge(f"{path} has more than {limit} bytes")
    return data


def _write(path: Path, data: bytes, *, mode: int = PRIVATE) -> None:
    try:
        write_durably(path, data, mode=mode)
    except OSError as error:
        raise InvalidEvent(f"cannot write {path}: {error.strerror}") from error


@app.command()
def approve(contribution: str, note: Annotated[str, typer.Option()] = "", who: As = "me") -> None:
    """Approve a contribution to a datanet that you review."""
    _decide("approved", contribution, {"note": note}, who)


@app.command()
def reject(contribution: str, reason: Annotated[str, typer.Option()], who: As = "me") -> None:
    """Reject a contribution, with a reason."""
    _decide("rejected", contribution, {"reason": reason}, who)


@app.command()
def withdraw(
    contribution: str, reason: Annotated[str, typer.Option()] = "", who: As = "me"
) -> None:
    """Withdraw your contribution: it is trained on no more, and earns no more.

    `tributary contribution adapters` lists what was trained on it before."""
    _decide("withdrawn", contribution, {"reason": reason}, who)


def _decide(what: str, contribution: str, more: dict[str, str], who: str) -> None:
    with client(who) as ledger:
        datanet = ledger.get(f"/v1/contributions/{contribution}")["datanet"]
        body = {"contribution": contribution, "datanet": datanet, **more}
        out.print(f"{what} at index {ledger.append(f'contribution.{what}', body)}")


@app.command("list")
def list_contributions(
    datanet: Annotated[str | None, typer.Option()] = None,
    status: Annotated[str | None, typer.Option(help="recorded, approved, ...")] = None,
    as_json: Json = False,
) -> None:
    """Contributions, by datanet and status."""
    with client() as ledger:
        found = list(ledger.pages("/v1/contributions", datanet=datanet, status=status))
    listing(found, COLUMNS, as_json=as_json)


@app.command("show")
def show_contribution(contribution: str, as_json: Json = False) -> None:
    """One contribution."""
    with client() as ledger:
        show(ledger.get(f"/v1/contributions/{contribution}"), as_json=as_json)
