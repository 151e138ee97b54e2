"""The log: its checkpoint, entries, lineage bundles and verifying them; export and import."""

import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, urlencode

import typer

from ledger.cli.context import Json, client, listing, out, show
from ledger.errors import ConfigError, InvalidEvent, NotFound

app = typer.Typer(name="log", no_args_is_help=True, help="The append-only log.")


@app.command()
def checkpoint() -> None:
    """The newest signed checkpoint (a C2SP signed note)."""
    with client() as ledger:
        sys.stdout.write(ledger.get_bytes("/log/checkpoint").decode())


@app.command()
def entry(event: Annotated[str, typer.Argument(help="Event id or leaf index.")]) -> None:
    """One event, as recorded."""
    with client() as ledger:
        show(ledger.get(f"/v1/events/{event}"), as_json=True)


@app.command("list")
def list_events(
    after: Annotated[int, typer.Option(help="Start behind this leaf index.")] = -1,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 50,
    as_json: Json = False,
) -> None:
    """Events in log order."""
    with client() as ledger:
        found = ledger.get("/v1/events", after=after, limit=limit)["items"]
    listing(found, ["index", "type", "event", "actor"], as_json=as_json)


@app.command()
def bundle(
    subject: Annotated[str, typer.Argument(help="Inference, adapter, run, ... or event id.")],
    to: Annotated[Path | None, typer.Option("--to", help="File to write.")] = None,
    account: Annotated[
        str | None,
        typer.Option(help="Of a period's event: the payout line of this EVM address too."),
    ] = None,
    earnings: Annotated[
        bool, typer.Option(help="With a payout line: everything that was earned for it.")
    ] = True,
) -> None:
    """Download a lineage bundle: the whole ancestry with proofs, to verify offline."""
    path = to or Path(f"{subject}.lineage.json")
    asked = {"earnings": "true" if earnings else "false"} | (
        {"account": account} if account else {}
    )
    with client() as ledger:
        data = ledger.get_bytes(f"/v1/bundles/{quote(subject, safe='')}?{urlencode(asked)}")
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InvalidEvent(f"cannot write {path}: {error.strerror}") from error
    out.print(f"{path}  {len(data)} bytes; now: tributary verify {path}")


@app.command()
def anchors(as_json: Json = False) -> None:
    """Checkpoints that the L1 holds."""
    with client() as ledger:
        found = list(ledger.pages("/v1/anchors"))
    listing(found, ["size", "root", "chain_id", "block_number", "tx_hash"], as_json=as_json)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write, or to go on in.")],
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="URL|DIR|DATABASE_URL", help="Else this home's database."),
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="VKEY", help="The log's key.")] = None,
) -> None:
    """Write the log as static files (c2sp.org/tlog-tiles); again: only what is new."""
    from ledger.cli.places import to_copy
    from ledger.config import load_settings
    from ledger.log.export import export_log

    with to_copy(source, key, load_settings()) as (found, vkey):
        done = export_log(found, folder, vkey)
    out.print(
        f"{folder} serves {done.size} entries, root {done.root.hex()} (before: "
        f"{done.previous_size}); {done.written} files written, {done.bytes_written} bytes",
        markup=False,
    )


@app.command("import")
def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `log export` wrote.")],
    key: Annotated[str | None, typer.Option(metavar="VKEY", help="The log's key.")] = None,
    signatures: Annotated[bool, typer.Option(help="Check each event's signature.")] = True,
) -> None:
    """Restore an empty database from an exported folder, whole or not at all."""
    from ledger import bootstrap
    from ledger.cli.places import folder_key
    from ledger.config import load_settings
    from ledger.log.restore import import_log
    from ledger.log.sources import FolderSource
    from ledger.store.migrate import migrate

    if not folder.is_dir():
        raise NotFound(f"{folder} is no folder: give the one that `tributary log export` wrote")
    settings, source = load_settings(), FolderSource(folder)
    vkey = folder_key(source, key)
    if vkey.name != settings.log_origin:
        raise ConfigError(
            f"the folder is the log {vkey.name}, this home is for {settings.log_origin}: set "
            f"TRIBUTARY_LOG_ORIGIN={vkey.name}"
        )
    with bootstrap.reachable_database(settings) as url:
        migrate(url)
        done = import_log(source, vkey, bootstrap.empty_store(url), signatures=signatures)
    out.print(
        f"restored {done.size} entries and {done.checkpoints} checkpoints, root {done.root.hex()}",
        markup=False,
    )
    out.print(
        "Blobs, keys and the signer's memory are not in a log: restore them too, the memory from "
        "this moment or a later one. The projector replays its views by itself."
    )


def register(root: typer.Typer) -> None:
    """`tributary verify`: the same verifier as `python -m ledger.verify`."""

    @root.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )
    def verify(context: typer.Context) -> None:
        """Verify a lineage bundle offline (see `tributary verify --help`)."""
        from ledger.verify.__main__ import main

        raise typer.Exit(main(context.args))
