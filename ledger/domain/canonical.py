"""Canonical JSON: RFC 8785 (JCS) without floats. Pure; stdlib only.

Values are null, booleans, strings, lists, objects with string keys, and integers within
+-(2^53 - 1) (RFC 8785 section 3.2.2.3 and I-JSON, RFC 7493 section 2.2). Amounts travel as
decimal strings, so no float is ever needed and none is accepted. Object keys are ordered by
UTF-16 code unit (section 3.2.3). `tests/property/test_canonical.py` holds this module against
the `rfc8785` package.

Received bytes are verified as they came: `parse_canonical` refuses what is not canonical and
repairs nothing.
"""

import json
import re
from typing import Any, NoReturn

from ledger.errors import InvalidEvent

MAX_SAFE_INTEGER = 2**53 - 1
MAX_DEPTH = 32

# A string, or the rest of the input after an unclosed quote, so that no input is scanned twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
# UTF-8 of a character from U+E000 on. Below it, code points and UTF-16 code units order alike, so
# that the standard library's encoder, in C, sorts keys as RFC 8785 wants it.
_HIGH = re.compile(rb"[\xee-\xff]")
_ENCODER = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, sort_keys=True, separators=(",", ":")
)


def canonical_json(value: Any) -> bytes:
    """Serialise `value` to its one canonical form.

    Raises InvalidEvent for a float, an integer beyond 2^53 - 1, a key that is no string, a lone
    surrogate, or nesting deeper than MAX_DEPTH.
    """
    _check(value, 0)
    return _spell(value)


def parse_canonical(data: bytes) -> Any:
    """The value of `data`, which must be canonical JSON to the byte; InvalidEvent otherwise."""
    _check_nesting(data)
    try:
        value = _DECODER.decode(data.decode("utf-8"))
    except InvalidEvent:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidEvent(f"not JSON in UTF-8: {error}; send RFC 8785 canonical JSON") from error
    # The decoder let nothing through that `_check` would refuse.
    if _spell(value) != data:
        raise InvalidEvent(
            "the JSON is not canonical (RFC 8785): keys ordered by UTF-16 code unit, no spaces, "
            "no repeated keys, shortest escapes; serialise it again and sign those bytes"
        )
    return value


def _check_nesting(data: bytes) -> None:
    """Refuse deep nesting before the parser sees it: its recursion is bounded by the interpreter's
    limit only, and where a library has raised that, 60 KB of brackets overflow the C stack.

    What is left of the brackets outside of strings loses its innermost pairs MAX_DEPTH times. All
    of it runs in C: a file of nothing but brackets must not cost a minute.
    """
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", data).translate(_ONE_KIND, _NO_BRACKET)
    for _ in range(MAX_DEPTH):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise InvalidEvent(
            f"nested deeper than MAX_DEPTH = {MAX_DEPTH}, or the brackets do not match"
        )


def _spell(value: Any) -> bytes:
    """The canonical form of a checked value."""
    try:
        spelled = _ENCODER.encode(value).encode("utf-8")
        return _dump(value).encode("utf-8") if _HIGH.search(spelled) else spelled
    except UnicodeEncodeError as error:
        raise InvalidEvent("a string holds a lone surrogate; send valid Unicode") from error


def _dump(value: Any) -> str:
    if isinstance(value, dict):
        members = (f"{_string(k)}:{_dump(value[k])}" for k in sorted(value, key=_utf16))
        return "{" + ",".join(members) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_dump, value)) + "]"
    if isinstance(value, str):
        return _string(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _string(text: str) -> str:
    # json.dumps escapes just what RFC 8785 section 3.2.2.2 asks for when ensure_ascii is off.
    return json.dumps(text, ensure_ascii=False)


def _utf16(key: str) -> bytes:
    return key.encode("utf-16-be", "surrogatepass")


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidEvent(f"nested deeper than MAX_DEPTH = {MAX_DEPTH}")
    if isinstance(value, dict):
        for key, member in value.items():
            if not isinstance(key, str):
                raise InvalidEvent(f"object keys are strings, not {type(key).__name__}")
            _check(member, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, bool) or value is None or isinstance(value, str):
        return
    elif isinstance(value, int):
        if abs(value) > MAX_SAFE_INTEGER:
            raise InvalidEvent("an integer is beyond 2^53 - 1; write amounts as decimal strings")
    else:
        raise InvalidEvent(f"{type(value).__name__} has no canonical form; use strings or integers")


def _integer(text: str) -> int:
    if len(text) > 17:
        raise InvalidEvent("an integer is beyond 2^53 - 1; write amounts as decimal strings")
    value = int(text)
    if abs(value) > MAX_SAFE_INTEGER:
        raise InvalidEvent("an integer is beyond 2^53 - 1; write amounts as decimal strings")
    return value


def _no_float(text: str) -> NoReturn:
    raise InvalidEvent(f"{text[:40]} is a float; amounts are decimal strings, counts are integers")


_DECODER = json.JSONDecoder(parse_float=_no_float, parse_constant=_no_float, parse_int=_integer)


_DECODER = json.JSONDecoder(parse_float=_no_float, parse_constant=_no_float, parse_int=_integer)
