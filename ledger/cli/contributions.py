"""Contributions: rows of prompt and completion, committed by salted hashes."""

import json
import secrets
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer

from ledger.cli.context import As, Json, client, listing, out, show
from ledger.domain.rows import SALT_HEX_CHARS, DataRow, check_row, encode_rows, rows_root
from ledger.errors import InvalidEvent

app = typer.Typer(name="contribution", no_args_is_help=True, help="Give data, review it.")

COLUMNS = ["contribution", "title", "status", "rows_count", "contributor"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON Lines with `prompt` and `completion`, at least. Errors name the line."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidEvent(f"cannot read {path}: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
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
    """Withdraw your contribution: it is not trained on any more."""
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
