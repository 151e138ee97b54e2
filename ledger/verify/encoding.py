"""JSON, base64 and decimals with exactly one spelling, and text that is safe to show. Pure.

A second spelling of the same value (a stray bit in base64 padding, a leading zero) would let two
different files claim to be the same proof, so it is refused. RFC 4648 section 4 and 3.5.
"""

import re
from binascii import Error, a2b_base64, b2a_base64
from typing import Any

from ledger.domain.canonical import parse_canonical
from ledger.errors import InvalidEvent, MalformedProof

MAX_COMMAS = 4_000_000
"""In a bundle, and in a manifest: what JSON costs to read goes by its values, not by its bytes. The
largest bundle that the other limits allow has about half of it."""

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")


def parse_json(data: bytes) -> Any:
    """The value of canonical JSON (`ledger.domain.canonical`) of at most MAX_COMMAS commas.

    Raises InvalidEvent; each caller says what the data should have been.
    """
    if data.count(b",") > MAX_COMMAS:
        raise InvalidEvent(f"more than MAX_COMMAS = {MAX_COMMAS} commas")
    return parse_canonical(data)


def decode_base64(text: str, what: str) -> bytes:
    """The bytes of padded standard base64 in its one canonical spelling; MalformedProof."""
    try:
        data = a2b_base64(text)
    except (Error, ValueError):
        data = None
    # The decoder is lenient; writing it again is what refuses every spelling but one.
    if data is None or encode_base64(data) != text:
        raise MalformedProof(f"{what} is not padded standard base64 (RFC 4648 section 4)")
    return data


def encode_base64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode("ascii")


def decode_hash_line(text: str, what: str) -> bytes:
    """A 32-byte hash in base64."""
    data = decode_base64(text, what)
    if len(data) != 32:
        raise MalformedProof(f"{what} has {len(data)} bytes, expected a SHA-256 of 32")
    return data


def decode_decimal(text: str, what: str) -> int:
    """An ASCII decimal below 2^63 without leading zeroes."""
    if not _DECIMAL.fullmatch(text) or int(text) >= 2**63:
        raise MalformedProof(
            f"{what} is {printable(text)!r}, expected a decimal below 2^63 without leading zeroes"
        )
    return int(text)


def printable(text: str, limit: int = 80) -> str:
    """`text` with every control or otherwise unprintable character as `?`, cut to `limit`.

    Names in a bundle are written by strangers: none of them may move a terminal's cursor.
    """
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in short)
