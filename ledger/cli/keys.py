"""Keys on this machine: Ed25519 seeds in home/keys, mode 0600."""

from typing import Annotated

import typer

from ledger.cli.context import Json, actor, home, listing, new_key, out
from ledger.domain.ids import actor_of

app = typer.Typer(name="keys", no_args_is_help=True, help="Signing keys on this machine.")


@app.command()
def new(name: Annotated[str, typer.Argument(help="A name to remember it by.")]) -> None:
    """Make a signing key."""
    out.print(actor_of(bytes(new_key(name).verify_key)))


@app.command("list")
def list_keys(as_json: Json = False) -> None:
    """The keys in this home, and the actors they are."""
    names = sorted(path.stem for path in (home() / "keys").glob("*.key"))
    skip = {"log", "chain"}
    found = [{"name": n, "actor": actor(n)} for n in names if n not in skip and "-evm" not in n]
    listing(found, ["name", "actor"], as_json=as_json)
