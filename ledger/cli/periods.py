"""Payout periods."""

from typing import Annotated

import typer

from ledger.cli.context import As, Json, client, listing, out, show

app = typer.Typer(name="period", no_args_is_help=True, help="Payout periods.")

COLUMNS = ["period", "status", "total_wei", "accounts", "log_size", "root"]


@app.command()
def close(
    wait: Annotated[bool, typer.Option(help="Wait until the payout root is in force.")] = True,
    who: As = "operator",
) -> None:
    """Close the running period: cut off, publish the payout root on chain, activate it."""
    with client(who, login=True) as ledger:
        period = ledger.post("/v1/periods")["period"]
        out.print(f"period {period} is cut off")
        if wait:
            done = ledger.wait_until(
                f"/v1/periods/{period}",
                lambda p: p["status"] in ("activated", "vetoed", "abandoned"),
                timeout_s=600,
            )
            show({k: done[k] for k in COLUMNS}, as_json=False)


@app.command()
def abandon(
    period: int,
    reason: Annotated[str, typer.Option(help="Why; it is recorded.")],
    who: As = "operator",
) -> None:
    """Give up a period before anything of it is on chain; what it held is accrued again."""
    with client(who) as ledger:
        index = ledger.append("period.abandoned", {"period": period, "reason": reason})
        out.print(f"abandoned at index {index}")


@app.command("list")
def list_periods(as_json: Json = False) -> None:
    """Periods, newest first."""
    with client() as ledger:
        listing(list(ledger.pages("/v1/periods")), COLUMNS, as_json=as_json)


@app.command("show")
def show_period(period: int, as_json: Json = False) -> None:
    """One period and who is paid how much."""
    with client() as ledger:
        found = ledger.get(f"/v1/periods/{period}")
        lines = found.pop("lines")
        if as_json:
            show({**found, "lines": lines}, as_json=True)
            return
        show(found, as_json=False)
        listing(lines, ["address", "amount_wei", "cumulative_wei", "owner"], as_json=False)
