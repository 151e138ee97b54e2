"""Which contributions a run may train on, kept in memory: no later event changes them.

`run.requested` fixes them: one edge to each approval that was in force (`lineage`). What became of
a contribution since, withdrawn or held, is not in here and is read anew each time
(`consent_queries.run_terms`). Part of the queries, and no fold: readers' threads share it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock

MAX_KEPT = 500_000
"""Contributions that are kept, of all runs together: some 70 MB. The run read last always is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """`datanets` are those that the contributions were given to."""

    contributions: frozenset[str]
    contributors: frozenset[str]
    datanets: frozenset[str]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, str]]) -> "RunInputs":
        """From rows of contribution, contributor and datanet."""
        given = [(row["contribution"], row["contributor"], row["datanet"]) for row in rows]
        return cls(
            contributions=frozenset(one for one, _, _ in given),
            contributors=frozenset(who for _, who, _ in given),
            datanets=frozenset(datanet for _, _, datanet in given),
        )


class KeptInputs:
    """By run. Thread-safe. What is empty is not kept: the run may not be projected yet."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, RunInputs] = OrderedDict()
        self._count = 0
        self._lock = Lock()

    def get(self, run: str) -> RunInputs | None:
        with self._lock:
            if run in self._kept:
                self._kept.move_to_end(run)
            return self._kept.get(run)

    def keep(self, run: str, inputs: RunInputs) -> None:
        with self._lock:
            if run in self._kept or not inputs.contributions:
                return
            self._kept[run] = inputs
            self._count += len(inputs.contributions)
            while self._count > MAX_KEPT and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._count -= len(oldest.contributions)
