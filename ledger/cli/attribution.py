"""Whose data shaped an answer: recompute it, replay its training, pass on the proof of one row.

`check` needs no ledger. The others fetch from one, and believe what a lineage bundle and a
recomputation prove.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ledger.cli.context import Json, api_url, client, err, home, out, print_json
from ledger.cli.evaluation import evaluate
from ledger.cli.places import given_key
from ledger.errors import Inconsistent, NotFound, Unavailable
from ledger.files import PUBLIC, write_durably
from ledger.processes import auditor
from ledger.processes.audit_files import AuditFiles
from ledger.remote import HttpSource
from ledger.verify.bundle import MAX_BUNDLE_BYTES
from ledger.verify.packet import MAX_PACKET_BYTES, check_packet

app = typer.Typer(
    name="attribution", no_args_is_help=True, help="Whose data shaped an answer, recomputed."
)

LogKey = Annotated[
    str | None, typer.Option("--key", metavar="VKEY", help="The log's key, got from elsewhere.")
]

MaybeAs = Annotated[
    str | None,
    typer.Option("--as", metavar="KEY", help="A key that may read transcript or rows."),
]
BaseModel = Annotated[Path | None, typer.Option(help="Folder of the base model; else the bundled.")]


@app.callback()
def main() -> None:
    """Keeps each command a name of its own, however few there are."""


app.command()(evaluate)


@app.command()
def verify(
    answer: Annotated[str, typer.Argument(metavar="EVENT|INFERENCE", help="An attributed answer.")],
    weights: Annotated[bool, typer.Option("--weights", help="Make the sketch again.")] = False,
    index: Annotated[bool, typer.Option("--index", help="Build the index again, too.")] = False,
    base_model: BaseModel = None,
    key: LogKey = None,
    who: MaybeAs = None,
    as_json: Json = False,
) -> None:
    """Recompute an answer's attribution; exit 1 names the step that does not come out the same.

    Shares must agree to the last ppm. `--weights` needs the transcript: a key (`--as`) of who paid,
    of a worker or the operator; `--index` the rows: a worker or the operator.
    """
    with _files(key, who) as files, HttpSource(f"{api_url()}/log") as log:
        report = auditor.verify(files, log, answer, weights=weights, index=index, base=base_model)
    if as_json:
        print_json(report.to_json())
        return
    out.print("VERIFIED\n")
    out.print(report.to_text(), markup=False, end="")


@app.command()
def packet(
    answer: Annotated[str, typer.Argument(metavar="EVENT|INFERENCE", help="An attributed answer.")],
    row: Annotated[str, typer.Option(metavar="CONTRIBUTION/ROW", help="The row it is about.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="File to write.")],
    bundle: Annotated[Path | None, typer.Option(help="Write the lineage bundle here, too.")] = None,
    key: LogKey = None,
) -> None:
    """Write an audit packet: the proof of one row's score on one answer, to be checked offline."""
    with _files(key, None) as files:
        data, lineage = auditor.packet(files, answer, row)
    for path, content in ((to, data), *(((bundle, lineage),) if bundle else ())):
        write_file(path, content)
        out.print(f"{path}  {len(content)} bytes", markup=False)
    beside = f" --bundle {bundle}" if bundle else ""
    out.print(f"now: tributary attribution check {to}{beside}", markup=False)


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="A completed training run.")],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Train even where other bytes would prove nothing.")
    ] = False,
    base_model: BaseModel = None,
    key: LogKey = None,
    who: MaybeAs = None,
    as_json: Json = False,
) -> None:
    """Train a run again from its manifest and compare the adapter.

    SAME: exit 0. DIFFERENT, on the same platform and versions: exit 1. NOT COMPARABLE, another
    platform or version: exit 7. Needs a key (`--as`) that may read the rows.
    """
    with _files(key, who) as files:
        found, folder = auditor.replay(files, run, base=base_model, anyway=anyway, tell=_progress)
    if as_json:
        print_json({**vars(found), "reasons": list(found.reasons)})
    said = "; ".join(found.reasons) or "every byte"
    if found.outcome == "same":
        if not as_json:
            out.print(
                f"SAME: {found.steps} steps give the adapter {found.found_sha256}", markup=False
            )
        return
    if found.outcome == "different":
        raise Inconsistent(
            f"DIFFERENT: the run recorded {found.expected_sha256}, replaying it gives "
            f"{found.found_sha256} ({folder}); losses are up to {found.loss_apart} apart. {said}"
        )
    raise Unavailable(
        f"NOT COMPARABLE, which says nothing against the run: {said}. Replay it on its own "
        "platform and versions"
    )


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


@contextmanager
def _files(key: str | None, who: str | None) -> Iterator[AuditFiles]:
    """What an audit fetches, kept under `audit/` of this home."""
    if key is not None:
        given_key(key)
    with client(who, login=who is not None) as ledger:
        yield AuditFiles(ledger, home() / "audit", vkey=key)


def _progress(done: int, total: int, loss: float) -> None:
    if sys.stderr.isatty():
        err.print(f"step {done:,} of {total:,}, loss {loss:.3f}  ", end="\r")


def write_file(path: Path, data: bytes) -> None:
    try:
        write_durably(path, data, mode=PUBLIC)
    except OSError as error:
        raise NotFound(f"cannot write {path}: {error.strerror}") from error


def read_file(path: Path, limit: int) -> bytes:
    """At most one byte more than there may be: enough to be refused."""
    try:
        with path.open("rb") as opened:
            return opened.read(limit + 1)
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error
