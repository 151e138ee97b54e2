"""From integer scores to integer shares: the rule that pays. Pure: no tensors, no floats.

An auditor holds the committed index (rows with contributor and cluster), the scores (which
`query.scores_from_sketch` recomputes bit for bit from a committed sketch) and the placebo level,
and gets the same shares from this module, to the last ppm, on any machine.

The rule, in this order (DESIGN.md, "Attribution"):

1. Near-duplicates are one voice: only a cluster's representative (its earliest registration)
   counts; every copy counts 0, whoever sent it. A copy stays silent when its representative was
   withdrawn: else a thief would earn once the author takes the text back.
2. A row counts by what it scores *above the placebo level*, the score that the best row reaches
   for a text of the same words without sense. Below it a row counts 0: negative scores are thus
   clipped *per example*. Clipping after summing would let a contributor's harmful rows eat the
   credit of good ones, and reward splitting into two identities.
3. What is left is summed per contributor. Sums are additive in rows, so one person under ten
   names gets what one name gets.
4. The placebo is one more voice: it weighs one placebo level, and its share is the unattributed
   part, together with what rows weigh that earn nothing any more (withdrawn). An answer that no
   row stands out for is wholly unattributed; one barely above the level is barely attributed;
   there is no cliff to climb.
5. An event holds `limit` shares at most: the smallest beyond it are unattributed too, not spread
   over the others.
6. Largest remainder, ties by contributor id, exactly 1,000,000 ppm with the unattributed part.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ledger.domain.events import MAX_SHARES
from ledger.domain.money import PPM_WHOLE, split_exactly
from ledger.errors import InvalidEvent


@dataclass(frozen=True, kw_only=True)
class Shares:
    """`contributors`: (id, ppm > 0) by id; with `unattributed_ppm` they sum to PPM_WHOLE."""

    contributors: list[tuple[str, int]]
    unattributed_ppm: int


def shares_from_scores(
    scores: Sequence[int],
    contributors: Sequence[str],
    clusters: Sequence[int],
    placebo: int,
    *,
    withdrawn: Collection[int] = (),
    limit: int = MAX_SHARES,
) -> Shares:
    """Shares of one answer in ppm. Row i scored `scores[i]` and belongs to `contributors[i]`.

    `clusters[i]` is the row index of i's representative (i itself when it represents). `placebo`
    is the level in the unit of the scores; 0 attributes everything that is positive. Rows in
    `withdrawn` weigh, and earn nothing. Raises InvalidEvent when the lengths differ, a cluster
    points outside the rows or to a row that represents nobody, or a value is no integer.
    """
    voices = _voices(scores, contributors, clusters, placebo)
    earning = ((name, weight) for row, name, weight in voices if row not in withdrawn)
    lost = sum(weight for row, _, weight in voices if row in withdrawn)
    return shares_from_voices(earning, placebo=placebo, lost=lost, limit=limit)


def shares_from_voices(
    voices: Iterable[tuple[str, int]], *, placebo: int, lost: int = 0, limit: int = MAX_SHARES
) -> Shares:
    """Shares from (contributor, excess over the placebo level > 0) of the rows that count.

    `lost` is the excess of rows that earn nothing: unattributed, like the placebo's own weight.
    """
    weights: dict[str, int] = {}
    for name, weight in voices:
        weights[name] = weights.get(name, 0) + weight
    if not weights:
        return Shares(contributors=[], unattributed_ppm=PPM_WHOLE)
    kept = dict(sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:limit])
    whole = sum(weights.values()) + lost + placebo
    nobodys = whole - sum(kept.values())
    # Rounded up: a doubtful ppm is nobody's.
    unattributed = -(-nobodys * PPM_WHOLE // whole)
    paid = split_exactly(PPM_WHOLE - unattributed, kept)
    lines = sorted((name, ppm) for name, ppm in paid.items() if ppm)
    return Shares(contributors=lines, unattributed_ppm=unattributed)


def _voices(
    scores: Sequence[int], contributors: Sequence[str], clusters: Sequence[int], placebo: int
) -> list[tuple[int, str, int]]:
    """(row, contributor, excess over `placebo`) of the representatives that have any."""
    count = len(scores)
    if len(contributors) != count or len(clusters) != count:
        raise InvalidEvent(
            f"{count} scores, {len(contributors)} contributors and {len(clusters)} clusters; "
            "expected one of each per row of the index"
        )
    if not _whole(placebo) or placebo < 0:
        raise InvalidEvent(f"the placebo level is {placebo!r}; expected an integer of 0 or more")
    voices = []
    for row, (score, name, cluster) in enumerate(zip(scores, contributors, clusters, strict=True)):
        if not _whole(score) or not _whole(cluster):
            raise InvalidEvent(f"row {row}: score and cluster must be integers, not floats")
        if not 0 <= cluster < count or clusters[cluster] != cluster:
            raise InvalidEvent(f"row {row}: cluster {cluster} is not a row that represents itself")
        if cluster == row and score > placebo:
            voices.append((row, name, score - placebo))
    return voices


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
