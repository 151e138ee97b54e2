"""`tributary contribution ...` about holds, appeals and what a withdrawal reaches."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ledger.cli.context import As, Json, client, listing, out
from ledger.client import Client
from ledger.domain.events import HOLD_REASONS
from ledger.errors import InvalidEvent

Why = StrEnum("Why", {reason: reason for reason in HOLD_REASONS})  # type: ignore[misc]
ADAPTERS = ["adapter", "model", "status", "rows", "reason"]
APPEALS = ["contribution", "row", "status", "reason", "note"]

Row = Annotated[int, typer.Option("--row", min=0, help="Number of the row, from 0.")]
Note = Annotated[str, typer.Option(help="What you saw; everybody can read it.")]


def hold(
    contribution: str,
    reason: Annotated[Why, typer.Option(help="Why it has to wait.")],
    note: Note = "",
    evidence: Annotated[
        Path | None, typer.Option(help="File for the contributor and the reviewers.")
    ] = None,
    who: As = "me",
) -> None:
    """Suspend a contribution to a datanet that you review.

    While it is held, no run that is requested uses it, and what its
    contributor earns with this datanet waits. Nothing is lost: `release`
    pays it all out, and after 30 days the contributor may release it, too."""
    with client(who, login=evidence is not None) as ledger:
        found = ledger.put_blob(_bytes(evidence)) if evidence else None
        more = {"reason": str(reason), "note": note, "evidence_sha256": found}
        _append(ledger, "contribution.held", contribution, more)


def release(contribution: str, note: Note = "", who: As = "me") -> None:
    """End a hold: the reviewers of the datanet at any time, its contributor after 30 days."""
    with client(who) as ledger:
        _append(ledger, "contribution.released", contribution, {"note": note})


def appeal(
    contribution: str,
    row: Row,
    reason: Annotated[str, typer.Option(help="Why it is nobody's copy.")],
    who: As = "me",
) -> None:
    """Say that a row of your contribution is counted for somebody else's by mistake."""
    with client(who) as ledger:
        _append(ledger, "cluster.appealed", contribution, {"row": row, "reason": reason})


def split(contribution: str, row: Row, note: Note = "", who: As = "me") -> None:
    """Decide an appeal: the row stands for itself from here on."""
    with client(who) as ledger:
        _append(ledger, "cluster.split", contribution, {"row": row, "note": note})


def uphold(contribution: str, row: Row, note: Note, who: As = "me") -> None:
    """Decide an appeal: the row stays merged with the other one."""
    with client(who) as ledger:
        _append(ledger, "cluster.upheld", contribution, {"row": row, "note": note})


def appeals(
    datanet: Annotated[str | None, typer.Option()] = None,
    contribution: Annotated[str | None, typer.Option()] = None,
    status: Annotated[str | None, typer.Option(help="open, split or upheld.")] = None,
    as_json: Json = False,
) -> None:
    """Rows whose merge was appealed, oldest first."""
    asked = {"datanet": datanet, "contribution": contribution, "status": status}
    with client() as ledger:
        listing(list(ledger.pages("/v1/appeals", **asked)), APPEALS, as_json=as_json)


def adapters(contribution: str, as_json: Json = False) -> None:
    """Adapters that were trained on a contribution, and what became of them."""
    with client() as ledger:
        path = f"/v1/contributions/{contribution}/adapters"
        listing(list(ledger.pages(path)), ADAPTERS, as_json=as_json)


def register(app: typer.Typer) -> None:
    for command in (hold, release, appeal, split, uphold, appeals, adapters):
        app.command()(command)


def _append(ledger: Client, what: str, contribution: str, more: dict[str, Any]) -> None:
    datanet = ledger.get(f"/v1/contributions/{contribution}")["datanet"]
    body = {"contribution": contribution, "datanet": datanet, **more}
    out.print(f"{what.partition('.')[2]} at index {ledger.append(what, body)}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidEvent(f"cannot read {path}: {error.strerror}") from error
