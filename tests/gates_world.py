"""Rows for the gates: real contributions from ../shared, and attacks made of them. Seeded."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHARED = Path(__file__).parents[2] / "shared" / "data"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS_EACH = 20


@dataclass(frozen=True, kw_only=True)
class MadeRow:
    """What `screening.Row` asks for; contribution and contributor are one here."""

    contribution: str
    registered_index: int
    index: int
    prompt: str
    completion: str

    @property
    def contributor(self) -> str:
        return self.contribution


def contribution(name: str, registered: int, pairs: Sequence[tuple[str, str]]) -> list[MadeRow]:
    return [
        MadeRow(
            contribution=name,
            registered_index=registered,
            index=number,
            prompt=prompt,
            completion=completion,
        )
        for number, (prompt, completion) in enumerate(pairs)
    ]


def real(file: str, *, each: int = 10, data: Path = SHARED) -> list[MadeRow]:
    """All rows of a file: by contributor where it names them, else `each` rows a contribution."""
    lines = [json.loads(line) for line in (data / file).read_text().split("\n") if line]
    groups: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(lines):
        name = line.get("contributor", f"{file}-{number // each}")
        prompt = "\n".join(filter(None, (line.get("context"), line["prompt"])))
        groups.setdefault(name, []).append((prompt, line["completion"]))
    return [
        row
        for registered, (name, pairs) in enumerate(groups.items())
        for row in contribution(name, registered, pairs)
    ]


class Attacks:
    """Contributions against the rows of others. Each makes ROWS_EACH (prompt, completion)."""

    def __init__(self, victims: Sequence[MadeRow], seed: int = 7) -> None:
        self.random = random.Random(seed)
        self.victims = victims

    def all(self) -> dict[str, tuple[str, Callable[[], list[tuple[str, str]]]]]:
        """Name -> (the reason it deserves, its maker)."""
        return {
            "random letters": ("junk", self.letters),
            "keyboard mash": ("junk", self.mash),
            "one word over and over": ("junk", self.chorus),
            "control characters": ("junk", self.controls),
            "tags without text": ("junk", self.tags),
            "almost nothing": ("junk", self.nothing),
            "rows stitched of pieces": ("stuffing", self.stitched),
            "own words, three snippets": ("stuffing", self.three_snippets),
            "own words, one snippet": ("stuffing", self.one_snippet),
            "one popular snippet in all": ("stuffing", self.refrain),
            "copies of others' rows": ("duplicate", self.copies),
            "copies, 5% of letters changed": ("duplicate", self.near_copies),
        }

    def letters(self) -> list[tuple[str, str]]:
        return self._rows(lambda: self._noise(LETTERS, 20))

    def mash(self) -> list[tuple[str, str]]:
        return self._rows(lambda: self._noise("asdfghjklqwertyuiop", 20))

    def chorus(self) -> list[tuple[str, str]]:
        return self._rows(lambda: f"{self._noise(LETTERS, 1)} " * 30)

    def controls(self) -> list[tuple[str, str]]:
        return self._rows(lambda: "\x00\x07\x1b".join(self._noise(LETTERS, 1) for _ in range(6)))

    def tags(self) -> list[tuple[str, str]]:
        tag = self.random.choice
        return self._rows(
            lambda: "".join(f"<{tag(('div', 'b', 'span'))} id='{n}'></i>" for n in range(9))
        )

    def nothing(self) -> list[tuple[str, str]]:
        return [("?", self.random.choice((".", "-", "ok", "x"))) for _ in range(ROWS_EACH)]

    def stitched(self) -> list[tuple[str, str]]:
        return [
            (self.piece(), " ".join(self.piece() for _ in range(self.random.randint(2, 4))))
            for _ in range(ROWS_EACH)
        ]

    def three_snippets(self) -> list[tuple[str, str]]:
        return [(self.own(12), " ".join(self.piece() for _ in range(3))) for _ in range(ROWS_EACH)]

    def one_snippet(self) -> list[tuple[str, str]]:
        return [(self.own(5), f"{self.own(5)} {self.piece()}") for _ in range(ROWS_EACH)]

    def refrain(self) -> list[tuple[str, str]]:
        snippet = self.piece(12, 16)
        return [(self.own(6), f"{self.own(6)} {snippet}") for _ in range(ROWS_EACH)]

    def copies(self) -> list[tuple[str, str]]:
        return [self._row() for _ in range(ROWS_EACH)]

    def near_copies(self) -> list[tuple[str, str]]:
        return [(self._changed(p), self._changed(c)) for p, c in self.copies()]

    def piece(self, low: int = 8, high: int = 12) -> str:
        """Some words of somebody's row, in their order."""
        size = self.random.randint(low, high)
        while True:
            words = " ".join(self._row()).split()
            if len(words) >= size:
                start = self.random.randrange(len(words) - size + 1)
                return " ".join(words[start : start + size])

    def own(self, count: int) -> str:
        """Words that nobody else has, pronounceable."""
        say = self.random.choice
        return " ".join(
            "".join(say("bdfgklmnprst") + say("aeiou") for _ in range(4)) for _ in range(count)
        )

    def _row(self) -> tuple[str, str]:
        row = self.random.choice(self.victims)
        return row.prompt, row.completion

    def _rows(self, completion: Callable[[], str]) -> list[tuple[str, str]]:
        return [(self._row()[0], completion()) for _ in range(ROWS_EACH)]

    def _noise(self, letters: str, count: int) -> str:
        pick = self.random.choice
        return " ".join(
            "".join(pick(letters) for _ in range(self.random.randint(3, 9))) for _ in range(count)
        )

    def _changed(self, text: str) -> str:
        return "".join(
            self.random.choice(LETTERS) if c.isalpha() and self.random.random() < 0.05 else c
            for c in text
        )
