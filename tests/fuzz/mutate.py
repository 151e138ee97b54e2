"""Bend valid bytes: JSON by its values, text by its lines, base64 inside either, bytes by bits."""

import base64
import binascii
import json
from collections.abc import Callable
from random import Random
from typing import Any

MAX_BYTES = 200_000
MAX_WALK = 5_000

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**40, -(2**53),
    "", " ", "0", "00", "-1", "1e9", "٣", "a" * 300, "\x00", "\n", "\r\n", "\ud800", "é", "é",
    "𝕏", "\u202e", "'", "null", "[]", "{}", "%00", "../..", "0x", "0X00", "ff" * 32, "FF" * 32,
    "=", "A===", "AAAA", [], {}, [[]], [None], {"": None}, {"__class__": 1}, 1.5, 1e400,
)  # fmt: skip
LINES = (
    "", " ", "0", "-1", "+1", "01", "9" * 19, "9" * 400, "18446744073709551615", "— ", "— a AAAA",
    "— \u2003 AAAAAAAA", "index 0", "index -0", "extra ", "old 0", "quorum none", "group g any g",
    "log", "witness w", "\x00", "\t", "é", "\ud7ff", "A" * 5_000, "=" * 44, "A" * 43 + "=",
)  # fmt: skip


def mutated(data: bytes, rng: Random) -> bytes:
    """One to four changes, each of a kind that fits what the bytes are."""
    for _ in range(rng.randint(1, 4)):
        data = _once(data, rng)
    return data[:MAX_BYTES]


def _once(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.75:
        for change in (_json, _lines):
            changed = change(data, rng)
            if changed is not None:
                return changed
    return _bytes(data, rng)


# --- JSON ---


def _json(data: bytes, rng: Random) -> bytes | None:
    if data[:1] not in (b"{", b"["):
        return None
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places = _places(root)
    if not places:
        return None
    holder, at = rng.choice(places)
    _change(holder, at, places, rng)
    return dumped(root, sort=rng.random() < 0.97)


def dumped(value: Any, *, sort: bool = True) -> bytes:
    """As canonical JSON writes it, but of anything, floats and lone surrogates included."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=sort, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value below the root, breadth first, so many at most."""
    found: list[tuple[Any, Any]] = []
    queue = [root]
    while queue and len(found) < MAX_WALK:
        holder = queue.pop(0)
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for at in keys:
            found.append((holder, at))
            if isinstance(holder[at], dict | list):
                queue.append(holder[at])
    return found


def _change(holder: Any, at: Any, places: list[tuple[Any, Any]], rng: Random) -> None:
    value = holder[at]
    choice = rng.randrange(8)
    if isinstance(value, str) and choice < 4:
        holder[at] = _string(value, rng)
    elif isinstance(value, int) and not isinstance(value, bool) and choice < 4:
        holder[at] = value + rng.choice((-1, 1, 256, -256, 2**32, 2**53))
    elif choice < 5:
        holder[at] = rng.choice(NASTY)
    elif choice == 5:
        other, there = rng.choice(places)
        holder[at] = json.loads(dumped(other[there]))  # a copy: the tree must stay a tree
    elif choice == 6 and isinstance(holder, dict):
        del holder[at]
    elif isinstance(holder, list):
        copies = rng.choice((0, 2, 2, 50))
        holder[at : at + 1] = [value] * copies
    else:
        holder[rng.choice(("", "v", "x", str(at) + "2", "𝕏", "\uffff"))] = value


def _string(text: str, rng: Random) -> Any:
    """Inside base64 and JSON that travel as strings, the same again."""
    if rng.random() < 0.6 and len(text) >= 16:
        try:
            inner = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            inner = b""
        if inner:
            return base64.b64encode(_once(inner, rng)).decode()
    if rng.random() < 0.2:
        return rng.choice(NASTY)
    return _bytes(text.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")


# --- lines ---


def _lines(data: bytes, rng: Random) -> bytes | None:
    if b"\n" not in data or not data.strip():
        return None
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    other = lines[rng.randrange(len(lines))]
    choice = rng.randrange(7)
    if choice == 0:
        del lines[at]
    elif choice == 1:
        lines[at:at] = [other] * rng.choice((1, 2, 120))
    elif choice == 2:
        lines[at] = rng.choice(LINES).encode("utf-8", "surrogatepass")
    elif choice == 3:
        words = lines[at].split(b" ")
        words[rng.randrange(len(words))] = rng.choice(LINES).encode("utf-8", "surrogatepass")
        lines[at] = b" ".join(words)
    elif choice == 4:
        words = lines[at].split(b" ")
        inner = _string(words[-1].decode("utf-8", "replace"), rng)
        words[-1] = str(inner).encode("utf-8", "surrogatepass")
        lines[at] = b" ".join(words)
    elif choice == 5:
        lines[at] += rng.choice((b" ", b"\r", b"=", other))
    else:
        lines[at] = _bytes(lines[at], rng)
    return b"\n".join(lines)


# --- bytes ---


def _bytes(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    width = rng.choice((1, 1, 2, 4, 8, 32, 64))
    edits: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at],
        lambda: data[:at] + data[at + width :],
        lambda: data[:at] + rng.randbytes(width) + data[at:],
        lambda: data[:at] + rng.randbytes(width) + data[at + width :],
        lambda: data[:at] + data[at : at + width] * 3 + data[at + width :],
        lambda: (
            data[:at] + rng.choice((b"\x00", b"\xff", b"\xff" * 8)) * width + data[at + width :]
        ),
        lambda: (
            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            if at < len(data)
            else data + b"\n"
        ),
    )
    return rng.choice(edits)()
