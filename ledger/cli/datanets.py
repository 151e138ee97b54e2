"""Datanets: collections of data under one licence, with an owner and reviewers."""

from enum import StrEnum
from typing import Annotated
from uuid import uuid4

import typer

from ledger.cli.context import As, Json, actor, client, listing, out, show
from ledger.domain.events import ON_WITHDRAWAL

app = typer.Typer(name="datanet", no_args_is_help=True, help="Gather, license and review data.")

COLUMNS = ["datanet", "name", "licence", "status", "contributions", "approved", "rows"]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the datanet.")],
    licence: Annotated[str, typer.Option(help="SPDX identifier.")] = "CC-BY-4.0",
    description: Annotated[str, typer.Option()] = "",
    reviewer: Annotated[list[str] | None, typer.Option(help="Key name or actor id.")] = None,
    who: As = "me",
) -> None:
    """Create a datanet that you own."""
    datanet = str(uuid4())
    body = {
        "datanet": datanet,
        "name": name,
        "description": description,
        "licence": licence,
        "reviewers": [actor(r) for r in reviewer or []],
    }
    with client(who) as ledger:
        ledger.append("datanet.created", body)
    out.print(datanet)


@app.command()
def close(datanet: str, reason: Annotated[str, typer.Option()] = "", who: As = "me") -> None:
    """Take no further contributions."""
    with client(who) as ledger:
        out.print(ledger.append("datanet.closed", {"datanet": datanet, "reason": reason}))


OnWithdrawal = StrEnum("OnWithdrawal", {word: word for word in ON_WITHDRAWAL})  # type: ignore[misc]


@app.command()
def policy(
    datanet: str,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of one contribution, at most.")
    ] = None,
    max_contributions_per_day: Annotated[
        int | None, typer.Option(min=1, help="Of one contributor, in any 24 hours.")
    ] = None,
    max_rows_per_day: Annotated[
        int | None, typer.Option(min=1, help="Of one contributor, in any 24 hours.")
    ] = None,
    on_withdrawal: Annotated[
        OnWithdrawal | None,
        typer.Option(help="Of adapters that used what is withdrawn: keep or retire them."),
    ] = None,
    who: As = "me",
    as_json: Json = False,
) -> None:
    """The rules of a datanet; with options, its owner sets those and keeps the others."""
    changes = {
        "max_rows_per_contribution": max_rows,
        "max_contributions_per_day": max_contributions_per_day,
        "max_rows_per_day": max_rows_per_day,
        "on_withdrawal": str(on_withdrawal) if on_withdrawal else None,
    }
    asked = {name: value for name, value in changes.items() if value is not None}
    with client(who if asked else None) as ledger:
        found = {**ledger.get(f"/v1/datanets/{datanet}")["policy"], **asked}
        if asked:
            index = ledger.append("datanet.policy_set", {"datanet": datanet, **found})
            found["index"] = index
    show(found, as_json=as_json)


@app.command("list")
def list_datanets(as_json: Json = False) -> None:
    """All datanets."""
    with client() as ledger:
        listing(list(ledger.pages("/v1/datanets")), COLUMNS, as_json=as_json)


@app.command("show")
def show_datanet(datanet: str, as_json: Json = False) -> None:
    """One datanet."""
    with client() as ledger:
        show(ledger.get(f"/v1/datanets/{datanet}"), as_json=as_json)
