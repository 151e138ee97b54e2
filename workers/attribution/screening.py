"""The gates before training: which contributions a person should look at first, and why.

Pure text and integers; no model, no files, no network. `screen` flags contributions, never people,
and a flag is a hold that reviewers end (`workers.screen`), not a verdict. Three reasons, each a
share of the contribution's rows in millionths against its threshold:

    junk        rows without content (`junk.py`)
    duplicate   rows that are the copy of another contributor's earlier row (`copies.py`)
    stuffing    rows made of others' words (`borrowing.py`), in one of three ways:
                  stitched   pieces of LENDERS or more contributors in one row
                  snippets   a piece in almost every row, of LENDERS or more contributors in all
                  refrain    a piece in nearly all rows, whoever lent it

Copies are judged as copies: they do not count as stuffing, neither way. The limits are chosen for
few false alarms on real rows; docs/ATTRIBUTION.md, "Gates", has the rates and what slips through.
Rows are compared with earlier ones only, so whoever was first is never flagged for being copied.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ledger.domain.money import PPM_WHOLE
from workers.attribution.borrowing import Borrowed, borrowed
from workers.attribution.copies import NONE, copies
from workers.attribution.junk import junk_kind

JUNK, DUPLICATE, STUFFING = "junk", "duplicate", "stuffing"
JUNK_PPM = 200_000
DUPLICATE_PPM, MIN_DUPLICATES = 900_000, 5
BORROWED_PPM = 400_000
"""Share of a row's words that lie in borrowed runs, from which the row counts as borrowing."""
LENDERS = 3
STITCHED_PPM, MIN_STITCHED = 250_000, 2
SNIPPETS_PPM, MIN_SNIPPETS = 700_000, 3
REFRAIN_PPM, MIN_REFRAIN = 900_000, 5
MAX_ROWS_NAMED = 100
MAX_SOURCES_NAMED = 10


class Row(Protocol):
    """What is read of a row; `IndexedRow` has it."""

    @property
    def contribution(self) -> str: ...
    @property
    def contributor(self) -> str: ...
    @property
    def registered_index(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def prompt(self) -> str: ...
    @property
    def completion(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Why one contribution should wait. `score_ppm` is at or above `threshold_ppm`.

    `rows` are numbers in the contribution, the first MAX_ROWS_NAMED of `count`; `kinds` says how
    many rows showed what; `sources` are rows of others, `<contribution>/<row>`.
    """

    contribution: str
    reason: str
    score_ppm: int
    threshold_ppm: int
    rows: tuple[int, ...]
    count: int
    of: int
    kinds: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


def screen(rows: Sequence[Row]) -> list[Flag]:
    """The flags of all contributions in `rows`, by contribution in order of registration; at most
    one for each reason. The answer depends on texts and registration alone."""
    ordered = sorted(rows, key=lambda row: (row.registered_index, row.contribution, row.index))
    view = _View(ordered)
    flags = []
    for contribution, members in view.members.items():
        for judge in (_junk, _duplicate, _stuffing):
            if flag := judge(view, contribution, members):
                flags.append(flag)
    return flags


class _View:
    """Rows in order of registration, and what is known about each."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.members: dict[str, list[int]] = defaultdict(list)
        numbers: dict[str, int] = {}
        for number, row in enumerate(rows):
            self.members[row.contribution].append(number)
            numbers.setdefault(row.contributor, len(numbers))
        self.contributors = np.array([numbers[row.contributor] for row in rows], np.int64)
        self.junk = [junk_kind(row.prompt, row.completion) for row in rows]
        self.copy_of = copies([(row.prompt, row.completion) for row in rows], self.contributors)
        self.copied = self.copy_of != NONE
        self.lent: Borrowed = borrowed(
            [f"{row.prompt} {row.completion}" for row in rows], self.contributors
        )

    def borrows(self, number: int) -> bool:
        words, taken = self.lent.words[number], self.lent.borrowed[number]
        return bool(taken and taken * PPM_WHOLE >= BORROWED_PPM * words)

    def name(self, number: int) -> str:
        return f"{self.rows[number].contribution}/{self.rows[number].index}"

    def flag(
        self,
        contribution: str,
        reason: str,
        found: Sequence[int],
        of: int,
        threshold_ppm: int,
        *,
        kinds: Mapping[str, int],
        sources: Sequence[int] = (),
    ) -> Flag:
        return Flag(
            contribution=contribution,
            reason=reason,
            score_ppm=len(found) * PPM_WHOLE // of,
            threshold_ppm=threshold_ppm,
            rows=tuple(self.rows[number].index for number in found[:MAX_ROWS_NAMED]),
            count=len(found),
            of=of,
            kinds=dict(kinds),
            sources=tuple(self.name(number) for number in sources),
        )


Judge = Callable[[_View, str, Sequence[int]], Flag | None]


def _junk(view: _View, contribution: str, members: Sequence[int]) -> Flag | None:
    found = [number for number in members if view.junk[number]]
    if not found or len(found) * PPM_WHOLE < JUNK_PPM * len(members):
        return None
    kinds = Counter(str(view.junk[number]) for number in found)
    return view.flag(contribution, JUNK, found, len(members), JUNK_PPM, kinds=kinds)


def _duplicate(view: _View, contribution: str, members: Sequence[int]) -> Flag | None:
    found = [number for number in members if view.copied[number]]
    if len(found) < MIN_DUPLICATES or len(found) * PPM_WHOLE < DUPLICATE_PPM * len(members):
        return None
    copied = Counter(int(view.copy_of[number]) for number in found)
    sources = [number for number, _ in copied.most_common(MAX_SOURCES_NAMED)]
    return view.flag(
        contribution, DUPLICATE, found, len(members), DUPLICATE_PPM,
        kinds={"copies": len(found)}, sources=sources,
    )  # fmt: skip


def _stuffing(view: _View, contribution: str, members: Sequence[int]) -> Flag | None:
    own = [number for number in members if not view.copied[number]]
    found = [number for number in own if view.borrows(number)]
    stitched = [number for number in found if view.lent.lenders[number] >= LENDERS]
    lenders = view.lent.lenders_of(found, view.contributors) if found else 0
    ways = (
        ("stitched", stitched, STITCHED_PPM, MIN_STITCHED, True),
        ("snippets", found, SNIPPETS_PPM, MIN_SNIPPETS, lenders >= LENDERS),
        ("refrain", found, REFRAIN_PPM, MIN_REFRAIN, True),
    )
    for kind, rows, threshold_ppm, least, applies in ways:
        if applies and len(rows) >= least and len(rows) * PPM_WHOLE >= threshold_ppm * len(own):
            return view.flag(
                contribution, STUFFING, rows, len(own), threshold_ppm,
                kinds={kind: len(rows), "lenders": view.lent.lenders_of(rows, view.contributors)},
                sources=view.lent.sources(rows, MAX_SOURCES_NAMED),
            )  # fmt: skip
    return None
