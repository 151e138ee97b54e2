"""A witness: cosigns what other people's logs sign, as long as they only ever append."""

import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from ledger.cli.context import err, out
from ledger.errors import ConfigError
from ledger.log.keyfile import ensure_signer_key
from ledger.log.witness import KEY_FILE, Witness, witness_key
from ledger.verify.note import COSIGNATURE, format_vkey, vkey_of

DEFAULT_PORT = 8430

app = typer.Typer(name="witness", no_args_is_help=True, help="Witness other people's logs.")

Folder = Annotated[
    Path, typer.Option("--dir", help="Folder of this witness: key, memory, evidence.")
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="Name of its key, such as witness.example/1: given once."),
]


@app.command()
def run(
    folder: Folder,
    log: Annotated[
        list[str],
        typer.Option(
            "--log",
            metavar="VKEY",
            help="A log to cosign: 'VKEY', or 'VKEY ORIGIN' if they differ.",
        ),
    ],
    name: Name = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="0 takes a free one.")
    ] = DEFAULT_PORT,
) -> None:
    """Serve c2sp.org/tlog-witness until Ctrl-C; makes the key on the first start."""
    from ledger.processes.roles import configure_logging
    from ledger.processes.witness import run_witness

    configure_logging()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    def ready(witness: Witness, url: str) -> None:
        for what, text in (
            ("witness", witness.vkey_text),
            *(("log", o) for o in witness.log_vkeys),
        ):
            out.print(f"[bold]{what:<7}[/bold]  ", end="")
            out.print(text, markup=False, soft_wrap=True)
        out.print(f"[bold green]Ready.[/bold green] {url}")
        sys.stdout.flush()
        if host not in ("127.0.0.1", "::1", "localhost"):
            err.print("plain HTTP beyond this machine: put TLS before it", markup=False)

    run_witness(
        folder=folder.expanduser().absolute(),
        logs=log,
        name=name,
        host=host,
        port=port,
        stop=stop,
        ready=ready,
    )


@app.command()
def vkey(folder: Folder, name: Name = None) -> None:
    """Print the witness's public key, for policies of others; makes it on first use."""
    folder = folder.expanduser().absolute()
    if (folder / KEY_FILE).exists():  # read without the lock: the witness may be running
        found, key = ensure_signer_key(folder / KEY_FILE, name=name)
    elif name is None:
        raise ConfigError(f"{folder} has no key yet; give --name to make one")
    else:
        with witness_key(folder, name=name) as (found, key):
            pass
    sys.stdout.write(format_vkey(vkey_of(found, key, COSIGNATURE)) + "\n")
