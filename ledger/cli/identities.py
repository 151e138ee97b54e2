"""Identities: a display name for a key, and the EVM address that its earnings go to."""

from typing import Annotated

import typer

from ledger.cli.context import As, Json, actor, api_url, client, key_path, new_key, out, show

app = typer.Typer(name="identity", no_args_is_help=True, help="Who you are in the ledger.")


@app.command()
def register(
    name: Annotated[str, typer.Argument(help="Your display name; a pseudonym is fine.")],
    who: As = "me",
) -> None:
    """Register your key under a name. Makes the key when there is none."""
    if not key_path(who).exists():
        new_key(who)
    with client(who) as ledger:
        index = ledger.append("identity.registered", {"name": name})
        out.print(f"registered {ledger.actor} at index {index}")


@app.command()
def bind(who: As = "me") -> None:
    """Bind an EVM address to your key, so that claims can be paid. Makes its key when needed."""
    from ledger import bootstrap  # the chain room is wired there alone

    with client(who) as ledger:
        wallet = bootstrap.wallet_of(key_path(who).with_name(f"{who}-evm.key"))
        signature = bootstrap.sign_binding(wallet, actor=ledger.actor, log=ledger.log)
        body = {"address": wallet.address, "signature": signature}
        index = ledger.append("identity.evm_bound", body)
        out.print(f"bound {wallet.address} at index {index}")


@app.command("show")
def show_identity(
    who: Annotated[str, typer.Argument(help="Key name or actor id.")] = "me", as_json: Json = False
) -> None:
    """What the ledger knows of an identity."""
    with client() as ledger:
        show(ledger.get(f"/v1/identities/{actor(who)}"), as_json=as_json, title=api_url())
