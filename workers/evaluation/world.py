"""What is evaluated: rows by contributor, a part of them held out to ask about.

Pure. A world is drawn from a data set by a seed: whole contributors, a bounded number of rows of
each, so that an evaluation of ten thousand rows can be run on three hundred. What was held out is
never trained on; its prompts are what people ask who did not contribute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from ledger.domain.ids import sha256_hex
from ledger.errors import InvalidEvent
from workers.attribution.index import IndexedRow

MIN_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class World:
    """`rows` are trained on, `held_out` are asked about. Both are rows of the same people."""

    rows: tuple[IndexedRow, ...]
    held_out: tuple[IndexedRow, ...]

    @property
    def contributors(self) -> list[str]:
        """Everybody with a row to train on, by name."""
        return sorted({row.contributor for row in self.rows})

    def owners(self) -> list[int]:
        """Per row, the number of its contributor."""
        number = {name: n for n, name in enumerate(self.contributors)}
        return [number[row.contributor] for row in self.rows]


def draw(
    rows: Sequence[IndexedRow],
    *,
    count: int,
    held_out: int,
    per_contributor: int | None = None,
    contributors: int | None = None,
    seed: int = 0,
) -> World:
    """`count` rows to train on and `held_out` others, of contributors drawn by the seed.

    Fewer when the data has fewer. Contributors come in a drawn order, each with at most
    `per_contributor` drawn rows, until there are enough; the last one may be cut short. With
    `contributors` it is that many, those with `per_contributor` rows first. Held-out rows are drawn
    from all of them. Raises InvalidEvent when fewer than MIN_ROWS are left to train.
    """
    random = Random(f"tributary/evaluation/world {seed}")  # noqa: S311 (no secret)
    by: dict[str, list[IndexedRow]] = {}
    for row in rows:
        by.setdefault(row.contributor, []).append(row)
    names = sorted(by)
    random.shuffle(names)
    if contributors is not None:
        names.sort(key=lambda name: -min(len(by[name]), per_contributor or len(by[name])))
        names = names[:contributors]
    taken: list[IndexedRow] = []
    for name in names:
        mine = by[name]
        taken += random.sample(mine, min(len(mine), per_contributor or len(mine)))
        if len(taken) >= count + held_out:
            break
    taken = taken[: count + held_out]
    outside = set(random.sample(range(len(taken)), min(held_out, max(0, len(taken) - MIN_ROWS))))
    inside = [row for n, row in enumerate(taken) if n not in outside]
    if len(inside) < MIN_ROWS:
        raise InvalidEvent(
            f"{len(inside)} rows are left to train on; an evaluation needs MIN_ROWS = {MIN_ROWS}"
        )
    return World(
        rows=tuple(replace(r, registered_index=n) for n, r in enumerate(inside)),
        held_out=tuple(taken[n] for n in sorted(outside)),
    )


def rows_from(texts: Mapping[str, Sequence[Mapping[str, str]]]) -> list[IndexedRow]:
    """Rows of a plain data set, {contributor: [{prompt, completion}]}, as an index wants them."""
    out: list[IndexedRow] = []
    for name, rows in texts.items():
        for n, row in enumerate(rows):
            prompt, completion = row["prompt"], row["completion"]
            out.append(
                IndexedRow(
                    contribution=name,
                    index=n,
                    row_hash=sha256_hex(f"{name}\n{n}\n{prompt}\n{completion}".encode()),
                    contributor=name,
                    prompt=prompt,
                    completion=completion,
                    registered_index=len(out),
                )
            )
    return out
