"""Whose data shaped an answer: recompute it, replay its training, pass on the proof of one row.

`check` needs no ledger. The others fetch from one, and believe what a lineage bundle and a
recomputation prove.
"""

from pathlib import Path
from typing import Annotated

import typer

from ledger.cli.context import Json, out, print_json
from ledger.cli.evaluation import evaluate
from ledger.cli.places import given_key
from ledger.errors import NotFound
from ledger.verify.bundle import MAX_BUNDLE_BYTES
from ledger.verify.packet import MAX_PACKET_BYTES, check_packet

app = typer.Typer(
    name="attribution", no_args_is_help=True, help="Whose data shaped an answer, recomputed."
)

LogKey = Annotated[
    str | None, typer.Option("--key", metavar="VKEY", help="The log's key, got from elsewhere.")
]


@app.callback()
def main() -> None:
    """Keeps each command a name of its own, however few there are."""


app.command()(evaluate)


@app.command()
def check(
    packet: Annotated[Path, typer.Argument(help="An audit packet.")],
    bundle: Annotated[
        Path | None, typer.Option(help="A lineage bundle of the answer: ties it to the log.")
    ] = None,
    key: LogKey = None,
    as_json: Json = False,
) -> None:
    """Prove one row's score offline; exit 1 when the packet does not hold."""
    if key is not None:
        given_key(key)  # a slip here is no fault of the file
    verdict = check_packet(
        read_file(packet, MAX_PACKET_BYTES),
        bundle=None if bundle is None else read_file(bundle, MAX_BUNDLE_BYTES),
        trusted_vkey=key,
    )
    if as_json:
        print_json(verdict.to_json())
        return
    out.print("VERIFIED\n")
    out.print(verdict.to_text(), markup=False, end="")


def read_file(path: Path, limit: int) -> bytes:
    """At most one byte more than there may be: enough to be refused."""
    try:
        with path.open("rb") as opened:
            return opened.read(limit + 1)
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error
