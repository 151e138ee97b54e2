"""Counts of serving engines added up over replicas and over their restarts, and what they say.

A replica's counts start again at 0 when its process does. `Totals.take` adds what is new since the
snapshot before, so that its sums never fall, and two of them can be subtracted. Knows no engine:
snapshots are the JSON of `workers.openlora.meter.Meter` and of the adapters' tiers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Stats = Mapping[str, Any]

TIERS = {"slots": "slot_hits", "host": "host_hits", "disk": "disk_loads"}
"""Where the adapter of a row was found, by the name that the tiers count it under."""
EVICTIONS = {"slots": "slot_evictions", "host": "host_evictions"}
_COUNTS = ("tokens", "prefill_tokens", "decode_steps", "decode_rows", "base_rows", "prefill_steps")


@dataclass(kw_only=True)
class Totals:
    """`counts` by name (`tokens`, `tier/slots`, `form/row`, `finished/stop`, `refused/...`),
    histogram counts by name, bounds beside them."""

    counts: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    bounds: dict[str, list[float]] = field(default_factory=dict)

    def take(self, before: Stats | None, now: Stats) -> None:
        """Add what happened in one replica between two of its snapshots. What it counted before the
        first one that we saw is not news."""
        if before is None:
            before = now
        old, new = counts_of(before), counts_of(now)
        restarted = any(new[name] < count for name, count in old.items())
        for name, count in new.items():
            self.counts[name] += count - (0 if restarted else old[name])
        olds = {} if restarted else _histograms(before)
        for name, histogram in _histograms(now).items():
            fresh = list(histogram["counts"])
            seen = olds.get(name, {}).get("counts", [0] * len(fresh))
            self.bounds[name] = list(histogram["bounds"])
            mine = self.histograms.setdefault(name, [0] * len(fresh))
            if len(mine) == len(fresh) == len(seen):
                self.histograms[name] = [
                    total + a - b for total, a, b in zip(mine, fresh, seen, strict=True)
                ]

    def copy(self) -> "Totals":
        return Totals(
            counts=Counter(self.counts),
            histograms={name: list(counts) for name, counts in self.histograms.items()},
            bounds=dict(self.bounds),
        )

    def since(self, then: "Totals") -> "Totals":
        """What came after `then`, an earlier copy of this."""
        return Totals(
            counts=Counter({n: c - then.counts[n] for n, c in self.counts.items()}),
            histograms={
                name: [a - b for a, b in zip(counts, then.histograms[name], strict=True)]
                if name in then.histograms
                else list(counts)
                for name, counts in self.histograms.items()
            },
            bounds=dict(self.bounds),
        )

    def quantile(self, name: str, q: float) -> float | None:
        return quantile(self.bounds.get(name, []), self.histograms.get(name, []), q)

    def under(self, prefix: str) -> dict[str, int]:
        """Counts named `prefix/...`, by the rest of their names."""
        return {
            n.partition("/")[2]: c for n, c in self.counts.items() if n.startswith(f"{prefix}/")
        }


def counts_of(stats: Stats) -> Counter[str]:
    """What only grows in one replica's snapshot, by flat names."""
    metrics, tiers = stats.get("metrics", {}), stats.get("adapters", {})
    found: Counter[str] = Counter({name: int(metrics.get(name, 0)) for name in _COUNTS})
    for prefix, key in (("form", "forms"), ("finished", "finished"), ("refused", "refused")):
        found.update({f"{prefix}/{name}": int(n) for name, n in metrics.get(key, {}).items()})
    found.update({f"tier/{tier}": int(tiers.get(key, 0)) for tier, key in TIERS.items()})
    found.update({f"evicted/{tier}": int(tiers.get(key, 0)) for tier, key in EVICTIONS.items()})
    return found


def _histograms(stats: Stats) -> Mapping[str, Any]:
    found: Mapping[str, Any] = stats.get("metrics", {}).get("histograms", {})
    return found


def quantile(bounds: Sequence[float], counts: Sequence[int], q: float) -> float | None:
    """The value below which a part `q` of the counts lies, taken as evenly spread in its bucket;
    None of nothing. What is above the last bound counts as the last bound."""
    total = sum(counts)
    if not total:
        return None
    wanted, below = q * total, 0
    for place, count in enumerate(counts[: len(bounds)]):
        if count and below + count >= wanted:
            low = bounds[place - 1] if place else 0.0
            return low + (bounds[place] - low) * (wanted - below) / count
        below += count
    return bounds[-1] if bounds else None
