"""Adapters: publish what a run made, and ask it."""

from contextlib import suppress
from typing import Annotated
from uuid import uuid4

import typer

from ledger.cli.context import As, Json, client, listing, out, show
from ledger.client import Client
from ledger.domain.accrual import POOL
from ledger.domain.money import format_open, parse_open
from ledger.errors import NotFound

app = typer.Typer(name="adapter", no_args_is_help=True, help="Publish, retire and ask adapters.")

COLUMNS = ["adapter", "model", "status", "input_wei_per_token", "output_wei_per_token"]


@app.command()
def publish(
    run: str,
    model: Annotated[str, typer.Argument(help="owner/name, in lower case.")],
    input_price: Annotated[str, typer.Option(help="OPEN a prompt token.")] = "0.00001",
    output_price: Annotated[str, typer.Option(help="OPEN a completion token.")] = "0.00002",
    who: As = "me",
) -> None:
    """Publish the adapter of a completed run of yours under a model name and a price."""
    adapter = str(uuid4())
    with client(who) as ledger:
        made = ledger.get(f"/v1/runs/{run}")
        body = {
            "adapter": adapter,
            "run": run,
            "model": model,
            "adapter_sha256": made["adapter_sha256"],
            "base_model": made["base_model"],
            "input_wei_per_token": str(parse_open(input_price)),
            "output_wei_per_token": str(parse_open(output_price)),
        }
        ledger.append("adapter.published", body)
    out.print(adapter)


@app.command()
def retire(adapter: str, reason: Annotated[str, typer.Option()] = "", who: As = "me") -> None:
    """Take an adapter out of service."""
    with client(who) as ledger:
        out.print(ledger.append("adapter.retired", {"adapter": adapter, "reason": reason}))


@app.command("list")
def list_adapters(as_json: Json = False) -> None:
    """Adapters."""
    with client() as ledger:
        listing(list(ledger.pages("/v1/adapters")), COLUMNS, as_json=as_json)


@app.command()
def ask(model: str, prompt: str, who: As = "me", as_json: Json = False) -> None:
    """Ask a model once, and see whom the answer paid."""
    with client(who, login=True) as ledger:
        answer = ledger.chat(model, [{"role": "user", "content": prompt}])
        receipt = answer["tributary"]
        if not as_json:
            out.print(answer["choices"][0]["message"]["content"], markup=False)
        done = ledger.wait_until(
            receipt["attribution"], lambda i: i["attribution"] is not None, timeout_s=60
        )
        if as_json:
            show(done, as_json=True)
            return
        out.print(f"\n{format_open(int(done['fee_wei']))} for {done['completion_tokens']} tokens")
        for posting in done["postings"]:
            wei = int(posting["amount_wei"])
            if wei > 0 and posting["owner"] != POOL:
                share = f"{posting['ppm'] / 10_000:.1f}%" if posting["ppm"] else posting["part"]
                out.print(f"  {format_open(wei):<26} {share:<12} {_name(ledger, posting['owner'])}")
        out.print(f"proof: tributary log bundle {receipt['inference']}")


def _name(ledger: Client, owner: str) -> str:
    """The display name of an actor; the ledger's own accounts are called by theirs."""
    if not owner.startswith("ed25519:"):
        return owner
    with suppress(NotFound):
        return f"{ledger.get(f'/v1/identities/{owner}')['name']}  {owner}"
    return owner
