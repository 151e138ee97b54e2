"""Which rows a retrained model may see: seeded draws, the same on every machine.

Pure: stdlib alone. Two kinds, for two questions. Half subsets of rows ask whether scores foretell
what a model says that never saw the other half (`lds.py`). Orders of contributors ask what each
of them adds, on average over the moments at which he might have joined (`shapley.py`).
"""

from collections.abc import Sequence
from random import Random

from ledger.errors import InvalidEvent

MAX_SUBSETS = 4_096
MAX_ORDERS = 4_096

Subset = tuple[int, ...]
"""Row numbers, ascending."""


def half_subsets(rows: int, count: int, *, seed: int) -> list[Subset]:
    """`count` independent halves (rounded down) of `rows` rows, each drawn without replacement.

    A longer list begins with the shorter one of the same seed: raising `count` retrains only what
    is new. Raises InvalidEvent for fewer than two rows, or a count outside 1 to MAX_SUBSETS.
    """
    if rows < 2:
        raise InvalidEvent(f"{rows} rows have no halves: an evaluation needs two rows or more")
    if not 1 <= count <= MAX_SUBSETS:
        raise InvalidEvent(f"{count} subsets; expected 1 to MAX_SUBSETS = {MAX_SUBSETS}")
    return [
        tuple(sorted(_random("half", seed, rows, n).sample(range(rows), rows // 2)))
        for n in range(count)
    ]


def orders(players: int, count: int, *, seed: int) -> list[tuple[int, ...]]:
    """`count` random orders of `players`, in pairs: every second one is the last one reversed.

    A pair takes each player once early and once late, which halves the variance of a Shapley
    estimate wherever what a player adds falls with those already there (antithetic sampling,
    Mitchell et al., arXiv:2104.12199).
    """
    if players < 1:
        raise InvalidEvent("nobody contributed: there is nothing to share")
    if not 1 <= count <= MAX_ORDERS:
        raise InvalidEvent(f"{count} orders; expected 1 to MAX_ORDERS = {MAX_ORDERS}")
    out: list[tuple[int, ...]] = []
    for n in range(0, count, 2):
        order = list(range(players))
        _random("order", seed, players, n // 2).shuffle(order)
        out += [tuple(order), tuple(reversed(order))]
    return out[:count]


def rows_of(owners: Sequence[int], members: frozenset[int]) -> Subset:
    """The rows that these players own, ascending; `owners[i]` is row i's player."""
    return tuple(row for row, owner in enumerate(owners) if owner in members)


def _random(purpose: str, *numbers: int) -> Random:
    # A string seeds through SHA-512: the same draws in every process, whatever PYTHONHASHSEED.
    return Random(f"tributary/evaluation/v1 {purpose} {numbers}")  # noqa: S311 (no secret)
