"""Training runs: fine-tune without code. The worker turns a request into a Ray job."""

from typing import Annotated
from uuid import uuid4

import typer

from ledger.cli.context import As, Json, client, listing, out, show
from ledger.errors import InvalidEvent

app = typer.Typer(name="run", no_args_is_help=True, help="Train LoRA adapters.")

COLUMNS = ["run", "name", "status", "attempt", "adapter_sha256"]
FINISHED = ("completed", "failed", "cancelled")


@app.command()
def request(
    name: Annotated[str, typer.Argument(help="A name for the run.")],
    datanet: Annotated[list[str], typer.Option(help="Datanets to train on; may be repeated.")],
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Training setting.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the end.")] = False,
    who: As = "me",
) -> None:
    """Request a training run on the approved rows of datanets."""
    run = str(uuid4())
    with client(who) as ledger:
        base = ledger.get("/v1/info")["base_model"]
        body = {
            "run": run,
            "name": name,
            "datanets": datanet,
            "base_model": base["digest"],
            "base_id": base["id"],
            "config": settings_from(option or []),
        }
        ledger.append("run.requested", body)
        out.print(run)
        if wait:
            done = ledger.wait_until(
                f"/v1/runs/{run}", lambda r: r["status"] in FINISHED, timeout_s=3_600
            )
            show(done, as_json=False)


@app.command()
def cancel(run: str, reason: Annotated[str, typer.Option()] = "", who: As = "me") -> None:
    """Cancel a run of yours."""
    with client(who) as ledger:
        out.print(ledger.append("run.cancelled", {"run": run, "reason": reason}))


@app.command("list")
def list_runs(status: Annotated[str | None, typer.Option()] = None, as_json: Json = False) -> None:
    """Training runs."""
    with client() as ledger:
        listing(list(ledger.pages("/v1/runs", status=status)), COLUMNS, as_json=as_json)


@app.command("show")
def show_run(run: str, as_json: Json = False) -> None:
    """One run."""
    with client() as ledger:
        show(ledger.get(f"/v1/runs/{run}"), as_json=as_json)


def settings_from(options: list[str]) -> dict[str, object]:
    """`--set r=8 --set lr=0.001 --set target_modules=q_proj,v_proj`; floats stay strings."""
    config: dict[str, object] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise InvalidEvent(f"--set takes KEY=VALUE, not {option!r}")
        if "," in value:
            config[key] = value.split(",")
        else:
            config[key] = int(value) if value.isascii() and value.isdigit() else value
    return config
