"""How surprising one letter is after another, in half bits: a table of 27 by 27. Pure numpy.

For telling writing from keyboard noise. Made from the prose that documents Python, which comes with
every interpreter: `python -m workers.attribution.letter_pairs` prints it. Letters are a to z after
accents are taken off; all else is the border of a word, the last row and column. English, and yet
languages that share the alphabet stay far below noise, since vowels and consonants alternate in all
of them (docs/ATTRIBUTION.md, "Gates", has the numbers).
"""

import re
import unicodedata
from math import log2

import numpy as np
from numpy.typing import NDArray

LETTERS = 26
TABLE = (
    "va9clhesavf696vcq665cdifcm7",
    "8jcg4rrr95r6lm9frbbh6rrr7ra",
    "6tbl5tt79ta7km6hpah59tttit9",
    "cekc4ttt7qtdqnbttlagalqqft2",
    "bh98dbfigusba7obd679qdf9dx3",
    "9nso9bls5slbos5is9nb7sssfs3",
    "bjiq5lda8qqaf8fiqaac7nqqqq3",
    "6ttt2qto7ttkho7ttdmejtttjt6",
    "cb9bb9bvkvhaa46doc66vcvhvfe",
    "fmhm0mmmmmmmmmfmmmmmammmmm7",
    "cmgm2jdj8mmgmejamd9jbmdmmm4",
    "6oja5blt7qp6mm7itj998hgt8t6",
    "5anm3pssasnmai76sice9ssshs7",
    "8l878h7ibqndff8jvo86ceoseo4",
    "g9b8f8gvevfb94dav5b89dblnm7",
    "6skd5lsgask6mj78s5e6espsap8",
    "kkkkkkkkkkkkkkkkkkkk0kkkkk8",
    "7heb4hao7rjiaa8fua9acjgpbu4",
    "dvcn6jsc8qjdkkbbms769vlvdv2",
    "8mfk6mw46wwfhn8kw9aabpgrbw5",
    "9aad6ibs9so776h9s766ssssssd",
    "3ppp2ppp6pppfpappplllpppppd",
    "7ppi8pp43ppepb7ppbbppphppk6",
    "8p5j6ppi9ppplpf5ppf7ppkehp4",
    "ljfqfqqqbqqhg9c6qq98qmaqqq1",
    "6iii2dii8iiiiidiiifiiiiifi5",
    "698a99dd6jebaa8ala76ccaefjy",
)
"""Row: the letter before; column: the letter. A base 36 digit counts half bits."""

_ACCENTS = re.compile("[\u0300-\u036f]+")
_BORDER = LETTERS
_CODES = np.full(256, _BORDER, np.uint8)
_CODES[ord("a") : ord("z") + 1] = np.arange(LETTERS)
_HALF_BITS = np.array([[int(digit, 36) for digit in row] for row in TABLE], np.int64)


def surprise(text: str) -> tuple[int, int]:
    """(half bits, steps) over all steps from letter to letter and across the border of a word."""
    before, after = _steps(text)
    return int(_HALF_BITS[before, after].sum()), len(before)


def _steps(text: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    plain = text if text.isascii() else _ACCENTS.sub("", unicodedata.normalize("NFKD", text))
    data = f" {plain.casefold()} ".encode("ascii", "replace")
    codes = _CODES[np.frombuffer(data, np.uint8)]
    inside = (codes[:-1] != _BORDER) | (codes[1:] != _BORDER)
    return codes[:-1][inside], codes[1:][inside]


def _table(text: str) -> list[str]:
    """The rows of TABLE for a text; a step that never occurred counts as half a time."""
    side = LETTERS + 1
    counts = np.zeros((side, side), np.int64)
    np.add.at(counts, _steps(text), 1)
    rows = []
    for row in counts:
        bits = [log2((int(row.sum()) + side / 2) / (int(count) + 0.5)) for count in row]
        rows.append("".join(np.base_repr(min(round(2 * b), 35), 36).lower() for b in bits))
    return rows


if __name__ == "__main__":
    from pydoc_data.topics import topics

    for line in _table(" ".join(topics.values())):
        print(f'    "{line}",')
