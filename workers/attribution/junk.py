"""Rows that teach nothing: noise, one thing over and over, markup without text, almost nothing.

Pure text. `junk_kind` looks at one row and errs on the side of the row: each limit stands
well outside of what real rows measure (docs/ATTRIBUTION.md, "Gates"). It judges form, never sense:
fluent nonsense is not junk here. Only letters a to z are held against the letter table, so a script
of its own is never called noise.
"""

import re
import zlib
from itertools import islice

from workers.attribution.letter_pairs import surprise

MAX_CHARS = 8_000
"""Characters of each field that are looked at."""
MIN_LETTER_BYTES = 4
"""UTF-8 bytes of letters and digits that a row has at least; one Han character has three."""
NOISE_HALF_BITS = 13
"""Mean surprise of a letter, in half bits, from which a field is noise: random letters have 15."""
MIN_STEPS = 60
MIN_REPEATED_WORDS = 12
DISTINCT_PPM = 150_000
"""Distinct words below this share of all are repetition; real rows are above 200,000."""
MIN_SQUEEZED_BYTES = 300
SQUEEZED_PPM = 100_000
"""A field that deflate brings below this share of its size repeats itself; real rows: 300,000."""
MIN_CONTROL, CONTROL_PPM = 3, 50_000
MIN_MARKUP_CHARS, TEXT_PPM = 80, 100_000
"""A field of that many visible characters, of which fewer than this share are outside of tags."""

GIBBERISH, REPETITION, CONTROL, MARKUP, EMPTY = (
    "gibberish",
    "repetition",
    "control",
    "markup",
    "near-empty",
)
_WHOLE = 1_000_000
_WORD = re.compile(r"\w+")
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufffd\U000f0000-\U0010ffff]"
)
"""Control characters but tab and line ends, surrogates, private use, and the replacement sign."""
_TAG = re.compile(r"<[^<>]{1,300}>|&#?\w{1,31};")


def junk_kind(prompt: str, completion: str) -> str | None:
    """Why a row is junk: one of the kinds above, or None."""
    fields = (prompt[:MAX_CHARS], completion[:MAX_CHARS])
    letters = islice((c for field in fields for c in field if c.isalnum()), MIN_LETTER_BYTES)
    if len("".join(letters).encode()) < MIN_LETTER_BYTES:
        return EMPTY
    for field in fields:
        for kind, found in _TESTS:
            if found(field):
                return kind
    return None


def _controlled(text: str) -> bool:
    count = len(_CONTROL.findall(text))
    return count >= MIN_CONTROL and count * _WHOLE >= CONTROL_PPM * len(text)


def _marked_up(text: str) -> bool:
    visible = len("".join(text.split()))
    outside = len("".join(_TAG.sub(" ", text).split()))
    return visible >= MIN_MARKUP_CHARS and outside * _WHOLE < TEXT_PPM * visible


def _repeated(text: str) -> bool:
    words = _WORD.findall(text.casefold())
    if len(words) >= MIN_REPEATED_WORDS and len(set(words)) * _WHOLE < DISTINCT_PPM * len(words):
        return True
    data = text.encode("utf-8", "surrogatepass")
    if len(data) < MIN_SQUEEZED_BYTES:
        return False
    return len(zlib.compress(data, 6)) * _WHOLE < SQUEEZED_PPM * len(data)


def _noisy(text: str) -> bool:
    half_bits, steps = surprise(text)
    return steps >= MIN_STEPS and half_bits >= NOISE_HALF_BITS * steps


_TESTS = (
    (CONTROL, _controlled),
    (MARKUP, _marked_up),
    (REPETITION, _repeated),
    (GIBBERISH, _noisy),
)
