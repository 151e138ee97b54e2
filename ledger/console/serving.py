"""The live page of serving: HTML with every number in it already, and a script that renews them.

Pages are templates of Jinja2 (everything escaped). Style and script stand in the page, named by
their hashes in its content security policy; it may fetch from its own server only, which is where
its events come from. Without a script it is a snapshot. Imports `errors` only.
"""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent / "serving_page"


def serving_page(figures: Mapping[str, Any], *, name: str) -> bytes:
    """`figures` as `ledger.api.serving_view` makes them; `name` is the ledger's."""
    template = _environment().get_template("page.html")
    style, script = Markup(_file("page.css")), Markup(_file("page.js"))  # noqa: S704  our own files
    return template.render(figures, name=name, style=style, script=script).encode()


@cache
def serving_headers() -> Mapping[str, str]:
    policy = (
        f"default-src 'none'; script-src '{_hash('page.js')}'; style-src '{_hash('page.css')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-store",
    }


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _file(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def _hash(name: str) -> str:
    digest = hashlib.sha256(_file(name).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
