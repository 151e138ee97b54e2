"""Which rows a retrained model may see: seeded draws, the same on every machine.

Pure: stdlib alone. Two kinds, for two questions. Half subsets of rows ask whether scores foretell
what a model says that never saw the other half (`lds.py`). Coalitions of contributors ask what
each of them adds, on average over the moments at which he might have joined (`shapley.py`).
"""

from collections.abc import Sequence
from random import Random

from ledger.errors import InvalidEvent

MAX_SUBSETS = 4_096
MAX_COALITIONS = 4_096
MIN_PLAYERS = 2

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


def coalitions(players: int, count: int, *, seed: int) -> list[frozenset[int]]:
    """`count` (made even) coalitions, neither empty nor full, drawn with the Shapley kernel.

    Each is followed by its complement, which cancels what is odd in a game and halves the error
    (Covert & Lee, arXiv:2012.01536). Sizes are drawn by the kernel's mass, 1 / (size * (players -
    size)). Raises InvalidEvent for fewer than two players.
    """
    if players < MIN_PLAYERS:
        raise InvalidEvent("one contributor alone gets everything: there is nothing to share")
    if not 1 <= count <= MAX_COALITIONS:
        raise InvalidEvent(f"{count} coalitions; expected 1 to MAX_COALITIONS = {MAX_COALITIONS}")
    sizes = range(1, players)
    mass = [1 / (size * (players - size)) for size in sizes]
    everybody = frozenset(range(players))
    out: list[frozenset[int]] = []
    for n in range(-(-count // 2)):
        random = _random("coalition", seed, players, n)
        size = random.choices(sizes, mass)[0]
        chosen = frozenset(random.sample(range(players), size))
        out += [chosen, everybody - chosen]
    return out


def rows_of(owners: Sequence[int], members: frozenset[int]) -> Subset:
    """The rows that these players own, ascending; `owners[i]` is row i's player."""
    return tuple(row for row, owner in enumerate(owners) if owner in members)


def _random(purpose: str, *numbers: int) -> Random:
    # A string seeds through SHA-512: the same draws in every process, whatever PYTHONHASHSEED.
    return Random(f"tributary/evaluation/v1 {purpose} {numbers}")  # noqa: S311 (no secret)
