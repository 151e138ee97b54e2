"""Text as words: the units in which a verbatim span begins and ends.

Stdlib only. Splitting loses nothing: the pieces, joined, are the text. A piece is

- a word: a run of letters, digits, underscores and the marks that belong to them; in scripts that
  are written without spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) each character;
- one other visible character;
- a run of white space, which is no word: no span begins or ends with one.

Text is compared as it is: no case folding, no normalisation. Verbatim means verbatim.
"""

import re
import unicodedata
from functools import lru_cache
from itertools import groupby

_UNSPACED = (
    r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Kana, Han
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Myanmar, Khmer
)
_BASIC_PLANE = 0x10000


def split(text: str) -> list[str]:
    """The pieces of `text`, in order; joined they are `text`."""
    return _pattern().findall(text)


def is_word(piece: str) -> bool:
    """Whether a piece of `split` counts as a word, that is: is not white space."""
    return not piece.isspace()


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    marks = _marks()
    return re.compile(
        rf"\s+|[{_UNSPACED}][{marks}]*|(?:[^\W{_UNSPACED}][{marks}]*)+|[^\w\s]|[{marks}]"
    )


def _marks() -> str:
    """Combining marks of the basic plane as ranges for a character class: vowel signs, accents."""
    points = [n for n in range(_BASIC_PLANE) if unicodedata.category(chr(n)).startswith("M")]
    ranges = []
    for _, run in groupby(enumerate(points), lambda pair: pair[1] - pair[0]):
        members = [point for _, point in run]
        ranges.append(f"\\u{members[0]:04x}-\\u{members[-1]:04x}")
    return "".join(ranges)
