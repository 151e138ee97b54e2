"""Input for `tributary demo`: real text by real authors' units.

By default the documentation of this Python's standard library, read from its docstrings: a module
is a contributor, a documented function or method is a row. With a file: JSON Lines with `prompt`,
`completion` and, optionally, `contributor`.
"""

import contextlib
import importlib
import inspect
import io
import re
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

from ledger.cli.contributions import read_rows
from ledger.errors import InvalidEvent

MIN_CONTRIBUTORS = 20
MAX_CONTRIBUTORS = 32
MAX_ROWS_PER_CONTRIBUTOR = 40
MIN_ROWS_PER_CONTRIBUTOR = 8
MAX_CONTRIBUTOR_CHARS = 80
MAX_COMPLETION_CHARS = 220
MIN_COMPLETION_CHARS = 12
DEALT_CONTRIBUTORS = 24

Row = dict[str, str]

# Modules that import without side effects on every platform.
MODULES = (
    "argparse", "array", "asyncio", "base64", "bisect", "calendar", "cmath", "codecs",
    "collections", "configparser", "contextlib", "copy", "csv", "ctypes", "datetime", "decimal",
    "difflib", "email.message", "enum", "fileinput", "fractions", "ftplib", "functools",
    "gettext", "glob", "gzip", "hashlib", "heapq", "hmac", "html", "http.client", "imaplib",
    "inspect", "io", "ipaddress", "itertools", "json", "locale", "logging", "mailbox", "math",
    "mimetypes", "multiprocessing", "os", "os.path", "pathlib", "pickle", "pickletools",
    "platform", "plistlib", "poplib", "pprint", "queue", "random", "re", "sched", "secrets",
    "selectors", "shelve", "shlex", "shutil", "signal", "smtplib", "socket", "sqlite3", "ssl",
    "statistics", "string", "struct", "subprocess", "symtable", "sys", "tarfile", "tempfile",
    "textwrap", "threading", "time", "timeit", "tokenize", "trace", "traceback", "types", "typing",
    "unicodedata", "unittest", "urllib.parse", "urllib.request", "uuid", "wave", "weakref",
    "xml.dom.minidom", "xml.etree.ElementTree", "zipfile", "zlib",
)  # fmt: skip


def standard_library() -> dict[str, list[Row]]:
    """Rows by module, in a fixed order; the same for one Python version on every machine."""
    found: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for name in MODULES:
        with (
            contextlib.suppress(ImportError),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
            found[name] = list(islice(_new(_rows(module, name), seen), MAX_ROWS_PER_CONTRIBUTOR))
    return _choose(found)


def from_file(path: Path) -> dict[str, list[Row]]:
    """Rows by contributor. Rows that name nobody are dealt to DEALT_CONTRIBUTORS made-up ones."""
    found: dict[str, list[Row]] = {}
    for n, row in enumerate(read_rows(path)):
        named = str(row.get("contributor") or "").strip().lstrip("@")[:MAX_CONTRIBUTOR_CHARS]
        printable = "".join(c for c in named if c.isprintable())
        who = printable or f"contributor-{n % DEALT_CONTRIBUTORS + 1:02d}"
        kept = found.setdefault(who, [])
        if len(kept) < MAX_ROWS_PER_CONTRIBUTOR:
            kept.append({"prompt": row["prompt"], "completion": row["completion"]})
    return _choose(found)


def _choose(found: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The contributors with most rows, named limits, in order of size."""
    large = {who: rows for who, rows in found.items() if len(rows) >= MIN_ROWS_PER_CONTRIBUTOR}
    by_size = sorted(large, key=lambda who: (-len(large[who]), who))[:MAX_CONTRIBUTORS]
    if len(by_size) < MIN_CONTRIBUTORS:
        raise InvalidEvent(
            f"the demo needs {MIN_CONTRIBUTORS} contributors with {MIN_ROWS_PER_CONTRIBUTOR} rows "
            f"each; this input has {len(by_size)}"
        )
    return {who: large[who] for who in by_size}


def _rows(module: ModuleType, name: str) -> Iterator[Row]:
    for qualified, thing in _documented(module, name):
        text = _first_sentence(inspect.getdoc(thing) or "")
        if len(text) >= MIN_COMPLETION_CHARS:
            yield {"prompt": f"What does {qualified} do?", "completion": text}


def _new(rows: Iterator[Row], seen: set[str]) -> Iterator[Row]:
    """Rows whose completion nobody has given before."""
    for row in rows:
        if row["completion"] not in seen:
            seen.add(row["completion"])
            yield row


def _documented(module: ModuleType, name: str) -> Iterator[tuple[str, object]]:
    public = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
    for member in sorted(public):
        thing = getattr(module, member, None)
        if inspect.isroutine(thing):
            yield f"{name}.{member}", thing
        elif inspect.isclass(thing):
            yield f"{name}.{member}", thing
            for method in sorted(vars(thing)):
                if method[0] != "_" and inspect.isroutine(vars(thing)[method]):
                    yield f"{name}.{member}.{method}", getattr(thing, method)


def _first_sentence(doc: str) -> str:
    """The first sentence of a docstring, signature lines left out."""
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        text = " ".join(paragraph.split())
        if "->" in text[:80] or re.match(r"^[\w.]+\(.*\)$", text):
            text = re.sub(r"^[\w.]*\([^)]*\)\s*->\s*[\w\[\], .]+?(?=[A-Z]|$)", "", text)
        sentence = re.split(r"(?<=[a-z0-9)])\.\s", text, maxsplit=1)[0].strip()
        if len(sentence) >= MIN_COMPLETION_CHARS and sentence.isascii() and sentence[0].isalpha():
            return sentence[:MAX_COMPLETION_CHARS].rstrip(". ") + "."
    return ""
