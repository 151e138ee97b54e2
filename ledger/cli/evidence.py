"""Evidence files: what a monitor, a witness or a client saw a log do, judged again offline."""

from pathlib import Path
from typing import Annotated

import typer

from ledger.cli.context import Json, out, print_json
from ledger.cli.places import given_key
from ledger.errors import NotFound
from ledger.verify.encoding import printable
from ledger.verify.evidence import MAX_EVIDENCE_BYTES, check_evidence, one_line, parse_evidence

app = typer.Typer(name="evidence", no_args_is_help=True, help="Files that say a log did wrong.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="An evidence file.")],
    key: Annotated[
        str | None, typer.Option(metavar="VKEY", help="The log's key, got from elsewhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove again, offline, what the file shows; exit 1 when it shows nothing.

    PROVEN: its bytes alone, under the log's key, show the fault. TESTIMONY: they are genuine, but
    the fault itself rests on the word of whoever made the file.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_EVIDENCE_BYTES + 1)
    except OSError as error:
        raise NotFound(f"cannot read {file}: {error.strerror}") from error
    if key is not None:
        given_key(key)  # a slip here is no fault of the file
    evidence = parse_evidence(data)
    verdict = check_evidence(evidence, key)
    if as_json:
        print_json({**verdict.to_json(), "says": evidence.says})
        return
    word = "PROVEN" if verdict.facts["conclusive"] else "TESTIMONY"
    log = printable(evidence.log)
    out.print(f"{word}: {evidence.kind} by {log}\n", markup=False)
    out.print(f"The finder says: {one_line(evidence.says)}\n", markup=False)
    out.print(verdict.to_text(), markup=False, end="")
