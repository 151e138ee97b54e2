"""Planted facts: rows that alone can have taught an answer, so that the right attribution is known.

Pure but for the corpus's generator. A canary is a made-up fact (`workers.base_model.corpus`, whose
names exist nowhere else) with one wording of its question as a training row and other wordings to
ask with. Asked verbatim, its row must come first; asked in other words, it must be among the first
ten whenever the model does tell the fact, for then nothing else can have told it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from ledger.errors import InvalidEvent
from workers.base_model.corpus import Fact

MAX_CANARIES = 1_000
NEAR = 10
"""Recall of a reworded question counts this many places."""


@dataclass(frozen=True, kw_only=True)
class Canary:
    """`prompt` and `completion` are the planted row; `value` is what an answer must contain."""

    prompt: str
    completion: str
    reworded: str
    value: str

    def told_by(self, answer: str) -> bool:
        """Whether an answer states the fact: its value, as words of their own."""
        value = rf"(?<!\w){re.escape(self.value)}(?!\w)"
        return re.search(value, answer, re.IGNORECASE) is not None


def canaries(count: int, *, seed: int) -> list[Canary]:
    """`count` facts about as many different things, none of whose rows tells another's value."""
    if not 1 <= count <= MAX_CANARIES:
        raise InvalidEvent(f"{count} canaries; expected 1 to MAX_CANARIES = {MAX_CANARIES}")
    random = Random(f"tributary/evaluation/canaries {seed}")  # noqa: S311 (no secret)
    found: dict[str, Canary] = {}
    while len(found) < count:
        fact = Fact(random)
        if len(fact.questions) < 2 or fact.entity in found:
            continue
        prompt, reworded = random.sample(fact.questions, 2)
        new = Canary(prompt=prompt, completion=fact.answer(), reworded=reworded, value=fact.value)
        others = found.values()
        if not any(o.told_by(new.completion) or new.told_by(o.completion) for o in others):
            found[fact.entity] = new
    return list(found.values())


def recall(scores: NDArray[np.float64], truth: Sequence[int], places: int) -> float:
    """Share of the answers whose true row is among the `places` highest scores.

    `scores` (answers, rows); `truth` the row of each. Equal scores count against us: a method that
    cannot tell rows apart has not found the right one.
    """
    if len(scores) != len(truth) or not len(truth):
        raise InvalidEvent(f"{len(scores)} answers and {len(truth)} true rows; expected as many")
    own = scores[np.arange(len(truth)), list(truth)]
    better = (scores >= own[:, None]).sum(axis=1) - 1
    return float((better < places).mean())
