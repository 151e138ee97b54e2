"""The in-browser verifier: one HTML file to give away with a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from ledger.cli.context import out
from ledger.console.pages import verifier_page
from ledger.errors import InvalidEvent

app = typer.Typer(name="verifier", no_args_is_help=True, help="The verifier for a browser.")


@app.callback()
def main() -> None:
    """Keeps `export` a command of its own, however few there are."""


@app.command()
def export(file: Annotated[Path, typer.Argument(help="HTML file to write.")]) -> None:
    """Write the verifier as one HTML file: open it, drop a bundle on it; no network is needed."""
    page = verifier_page()
    try:
        file.write_bytes(page)
    except OSError as error:
        raise InvalidEvent(f"cannot write {file}: {error.strerror}") from error
    out.print(f"{file}  {len(page)} bytes; open it in a browser, no server is needed")
