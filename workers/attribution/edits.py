"""How many characters apart two texts are. Pure, standard library.

Myers, "A fast bit-vector algorithm for approximate string matching based on dynamic programming"
(1999): one column of the edit matrix is a whole number, a step for each character of the longer
text. Python's numbers have any length, so the shorter text may too; the price grows with the
product of both.
"""


def edits(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements from `a` to `b`."""
    short, long = sorted((a, b), key=len)
    if not short:
        return len(long)
    return _walk(short, long, anchored=True)[0]


def edits_inside(piece: str, text: str) -> int:
    """Edits between `piece` and the part of `text` that is nearest to it (Sellers)."""
    return _walk(piece, text, anchored=False)[1] if piece else 0


def _walk(pattern: str, text: str, *, anchored: bool) -> tuple[int, int]:
    """Distance from `pattern` to all of `text`, and to the nearest part that ends anywhere.

    `anchored`: the part begins where `text` does.
    """
    where: dict[str, int] = {}
    for place, character in enumerate(pattern):
        where[character] = where.get(character, 0) | 1 << place
    all_ones = (1 << len(pattern)) - 1
    last = 1 << (len(pattern) - 1)
    plus, minus = all_ones, 0  # where a column grows, or falls, by one
    score = best = len(pattern)
    for character in text:
        equal = where.get(character, 0)
        rises = equal | minus
        crosses = (((equal & plus) + plus) ^ plus) | equal
        up = minus | all_ones & ~(crosses | plus)
        down = plus & crosses
        score += bool(up & last) - bool(down & last)
        best = min(best, score)
        up = (up << 1 | anchored) & all_ones
        down = down << 1 & all_ones
        plus = down | all_ones & ~(rises | up)
        minus = up & rises
    return score, best
