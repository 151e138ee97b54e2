"""What every command shares: where the ledger is, who acts, and how results are shown."""

import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from nacl.signing import SigningKey
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ledger.client import Client, load_key
from ledger.domain.canonical import canonical_json
from ledger.domain.ids import actor_of
from ledger.domain.money import format_open
from ledger.errors import ConfigError, NotFound
from ledger.files import write_durably

DEFAULT_API = "http://127.0.0.1:8420"
MAX_CELL_CHARS = 80
MAX_VALUE_CHARS = 2_000

# Ids and hashes are there to be copied: nothing is cropped, and a pipe gets whole lines.
PIPE_WIDTH = 240
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)

As = Annotated[
    str, typer.Option("--as", metavar="KEY", help="Name of the key that acts (see `keys list`).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def home() -> Path:
    return Path(os.environ.get("TRIBUTARY_HOME", ".tributary")).expanduser().absolute()


def api_url() -> str:
    return os.environ.get("TRIBUTARY_API", DEFAULT_API)


def key_path(name: str) -> Path:
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"{name!r} is no key name; use letters, digits and dashes")
    return home() / "keys" / f"{name}.key"


def new_key(name: str) -> SigningKey:
    """Make a key file (mode 0600, never overwritten)."""
    path = key_path(name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = SigningKey.generate()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists; choose another name, keys are not overwritten"
        ) from error
    with os.fdopen(fd, "w") as file:
        file.write(bytes(key).hex() + "\n")
    return key


def client(name: str | None = None, *, login: bool = False) -> Client:
    """A client that acts with the key of that name; `login` obtains a credential first."""
    if name is None:
        return Client(api_url())
    path = key_path(name)
    if not path.exists():
        raise NotFound(f"no key {name!r} in {path.parent}; make it: tributary keys new {name}")
    found = Client(api_url(), key=load_key(path), keep_receipt=keep_receipt)
    if login:
        found.login("cli")
    return found


def receipt_path(event: UUID) -> Path:
    return home() / "receipts" / f"{event}.json"


def keep_receipt(event: UUID, receipt: Mapping[str, Any]) -> None:
    """Keep the log's promise: with it, its owner can show what was dropped. The event is stored
    whether or not this succeeds, so failing is said and no more."""
    try:
        write_durably(receipt_path(event), canonical_json(dict(receipt)))
    except OSError as error:
        err.print(
            f"the receipt could not be kept in {receipt_path(event)}: {error.strerror}; ask again "
            f"with `tributary receipt get {event}`",
            markup=False,
        )


def actor(name_or_actor: str) -> str:
    """An actor id, given as such or as the name of a local key."""
    if name_or_actor.startswith("ed25519:"):
        return name_or_actor
    return actor_of(bytes(load_key(key_path(name_or_actor)).verify_key))


def show(value: Any, *, as_json: bool, title: str = "") -> None:
    """A record as two columns, or as JSON."""
    if as_json:
        print_json(value)
        return
    if title:
        out.print(f"[bold]{title}[/bold]")
    width = max(map(len, value), default=0)
    for key, item in value.items():
        out.print(f"[dim]{key:<{width}}[/dim]  {_cell(key, item, limit=MAX_VALUE_CHARS)}")


def listing(items: list[dict[str, Any]], columns: list[str], *, as_json: bool) -> None:
    """A list as a table of the given columns, or as JSON."""
    if as_json:
        print_json(items)
        return
    if not items:
        out.print("nothing yet")
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for item in items:
        table.add_row(*(_cell(c, item.get(c), limit=MAX_CELL_CHARS) for c in columns))
    out.print(table)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def _cell(name: str, value: Any, *, limit: int) -> str:
    if value is None:
        return "-"
    if name.endswith("_wei"):
        return format_open(int(value))
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return escape("".join(map(_shown, text)))


def plain(text: str) -> str:
    """Lines of text in which nothing moves the terminal's cursor: some come from strangers."""
    return "".join(c if c == "\n" else _shown(c) for c in text)


def _shown(char: str) -> str:
    return char if char.isprintable() else "\N{REPLACEMENT CHARACTER}"
