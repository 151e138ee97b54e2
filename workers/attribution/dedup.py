"""Near-duplicate clusters over the text of rows: whoever registered a text first speaks for it.

Pure text and integers (numpy); no model, no files. Texts are compared as they look (`folding.py`),
by the edits between them (`edits.py`). Two rows are one voice when one of these holds:

    copy     at most EDITS_PPM of the whole row and ANSWER_EDITS_PPM of its completion are edited,
             as the text stands or with its words in alphabetical order
    answer   the completions have at least MIN_ANSWER characters, and at most EDITS_PPM are edited:
             an answer is somebody's, whatever question is put before it
    padded   the prompts are alike, and one completion, of at least MIN_PADDED characters, stands
             within the other but for EDITS_PPM of it

`candidates.py` finds the few to compare without comparing all pairs. Rows join, in order of
registration, the earliest *representative* among these that is one voice with them; failing
that, the representative of the earliest row that joined one directly: else a thief would copy rows
that stand silent, and speak. Rows that joined in this way bring nobody after them, so a row is
within twice the limits of its representative, and a chain of small changes cannot tie unrelated
rows together. Otherwise they represent themselves. Who gave a row is not asked.

Thresholds were set on real rows (docs/ATTRIBUTION.md, "Attacks"): they find what has 5 % of its
characters changed and merge as few rows of different people as that allows. Known weak spots:
a paraphrase is another text; `xzgrep` and `bzgrep` in one sentence look like a copy; where many
give the same long answer to different questions, the first speaks for all.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ledger.errors import InvalidEvent
from workers.attribution.candidates import RUN, Bounds, Candidates, Gaps, long_runs
from workers.attribution.edits import edits, edits_inside
from workers.attribution.folding import folded_words

WHOLE_PPM = 1_000_000
EDITS_PPM = 100_000
"""Edits for a million characters of the longer text, up to which two texts are one."""
THRESHOLD_PPM = WHOLE_PPM - EDITS_PPM
"""Similarity of whole rows from which they may be copies: what is not edited."""
ANSWER_EDITS_PPM = 150_000
"""The same for completions: one changed letter weighs more in a short text."""
LETTERS_AN_EDIT, FREE_EDITS = 5, 2
"""A completion may have one edit for this many characters, up to FREE_EDITS, whatever its share:
"yes" and "no" stay apart, and `ls -la` is a copy with one letter changed."""
MIN_ANSWER = 16
MIN_PADDED = 8
LONG = 600
"""Characters from which edits are estimated by shared runs: exact ones cost the product."""
UTF8 = ("utf-8", "surrogatepass")


def clusters(
    rows: Sequence[tuple[str, str]],
    registered: Sequence[int],
    *,
    seed: int,
    threshold_ppm: int = THRESHOLD_PPM,
) -> list[int]:
    """For each (prompt, completion) the index of its representative: the earliest, or itself.

    `registered[i]` orders the rows in time (ties: lower index first). The answer depends on
    texts, order and seed alone. About two kilobytes of memory for each distinct row. Raises
    InvalidEvent on unequal lengths or a threshold outside 1..1,000,000.
    """
    if len(rows) != len(registered):
        raise InvalidEvent(f"{len(rows)} rows but {len(registered)} registration indexes")
    if not 1 <= threshold_ppm <= WHOLE_PPM:
        raise InvalidEvent(f"threshold is {threshold_ppm} ppm; expected 1 to 1,000,000")
    place_of: dict[bytes, int] = {}
    texts: list[Text] = []
    first: list[int] = []
    places = [0] * len(rows)
    for row in sorted(range(len(rows)), key=lambda i: (registered[i], i)):
        text = Text.of(*rows[row])
        places[row] = place_of.setdefault(text.digest, len(texts))
        if places[row] == len(texts):
            texts.append(text)
            first.append(row)
    leaders = _leaders(texts, seed, WHOLE_PPM - threshold_ppm)
    return [first[leaders[place]] for place in places]


@dataclass(frozen=True)
class Text:
    """A row folded for comparison: no spaces, one case, one script."""

    prompt: str
    completion: str
    in_order: tuple[str, str]
    """Prompt and completion with their words in alphabetical order."""

    @classmethod
    def of(cls, prompt: str, completion: str) -> "Text":
        asked, said = folded_words(prompt), folded_words(completion)
        return cls("".join(asked), "".join(said), ("".join(sorted(asked)), "".join(sorted(said))))

    @property
    def digest(self) -> bytes:
        """Equal for rows that look the same."""
        return hashlib.sha256(f"{self.prompt}\n{self.completion}".encode(*UTF8)).digest()


def one_voice(a: Text, b: Text, *, edits_ppm: int = EDITS_PPM) -> bool:
    """Whether one of two rows is a copy of the other, by the three rules above. Symmetric."""
    shorter, longer = sorted((a.completion, b.completion), key=len)
    return (
        (len(shorter) >= MIN_ANSWER and _within(shorter, longer, EDITS_PPM))
        or _copy((a.prompt, a.completion), (b.prompt, b.completion), edits_ppm)
        or _copy(a.in_order, b.in_order, edits_ppm)
        or (
            len(shorter) >= MIN_PADDED
            and _inside(shorter, longer)
            and _within(a.prompt, b.prompt, ANSWER_EDITS_PPM)
        )
    )


def _leaders(texts: Sequence[Text], seed: int, edits_ppm: int) -> list[int]:
    """For each text, in order of time, the place of its representative."""
    candidates = Candidates([(text.prompt, text.completion) for text in texts], seed=seed)
    leaders = np.arange(len(texts))
    second_hand = np.zeros(len(texts), np.bool_)

    def alike(place: int, others: NDArray[np.int64]) -> int | None:
        """The earliest of `others` that is one voice with `place`."""
        likely = others[_likely(candidates.least_edits(place, others), edits_ppm)]
        for other in candidates.nearest(place, likely).tolist():
            if one_voice(texts[place], texts[other], edits_ppm=edits_ppm):
                return int(other)
        return None

    for place in range(len(texts)):
        met = candidates.before(place)
        found = alike(place, np.unique(leaders[met]))
        if found is None:
            silent = met[(leaders[met] != met) & ~second_hand[met]]
            found = alike(place, silent) if len(silent) else None
            second_hand[place] = found is not None
        if found is not None:
            leaders[place] = leaders[found]
    represented: list[int] = leaders.tolist()
    return represented


def _likely(least: Bounds, edits_ppm: int) -> NDArray[np.bool_]:
    """Whom the letters allow to be one voice, by each rule; `one_voice` looks at no one else."""
    longer = least.answer.longer
    free = np.minimum(FREE_EDITS, longer // LETTERS_AN_EDIT)
    limit = np.maximum(ANSWER_EDITS_PPM * longer, free * WHOLE_PPM)
    copy = (least.answer.edits * WHOLE_PPM <= limit) & _may(least.whole, edits_ppm)
    answer = (least.shorter >= MIN_ANSWER) & _may(least.answer, EDITS_PPM)
    padded = (
        (least.shorter >= MIN_PADDED)
        & _may(least.prompt, ANSWER_EDITS_PPM)
        & (least.inside * WHOLE_PPM <= EDITS_PPM * least.shorter)
    )
    likely: NDArray[np.bool_] = copy | answer | padded
    return likely


def _may(gaps: Gaps, ppm: int) -> NDArray[np.bool_]:
    may: NDArray[np.bool_] = gaps.edits * WHOLE_PPM <= ppm * gaps.longer
    return may


def _copy(a: tuple[str, str], b: tuple[str, str], edits_ppm: int) -> bool:
    longer = max(len(a[1]), len(b[1]))
    free = min(FREE_EDITS, longer // LETTERS_AN_EDIT)
    limit = max(ANSWER_EDITS_PPM, free * WHOLE_PPM // max(longer, 1))
    return _within(a[1], b[1], limit) and _within("".join(a), "".join(b), edits_ppm)


def _within(a: str, b: str, ppm: int) -> bool:
    """Whether at most `ppm` of the longer text is edited."""
    shorter, longer = sorted((len(a), len(b)))
    if (longer - shorter) * WHOLE_PPM > ppm * longer:
        return False
    if shorter <= LONG:
        return edits(a, b) * WHOLE_PPM <= ppm * longer
    x, y = long_runs(a), long_runs(b)
    both = len(np.intersect1d(x, y, assume_unique=True))
    either = len(x) + len(y) - both
    # An edit spoils RUN runs on either side: of a share e, (1 - RUN e) / (1 + RUN e) survive.
    return (either - both) * WHOLE_PPM <= ppm * RUN * (either + both)


def _inside(piece: str, text: str) -> bool:
    """Whether `piece` stands in `text` but for EDITS_PPM of it."""
    if len(text) <= LONG:
        return edits_inside(piece, text) * WHOLE_PPM <= EDITS_PPM * len(piece)
    runs = long_runs(piece)
    lost = len(np.setdiff1d(runs, long_runs(text), assume_unique=True))
    return lost * WHOLE_PPM <= EDITS_PPM * RUN * len(runs)
