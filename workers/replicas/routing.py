"""Which replica takes a request. Pure.

An adapter has a home among the replicas: the first in its rendezvous order (highest random weight,
Thaler and Ravishankar 1998), so that its weights are in one replica's slots and not in all, and a
replica that comes or goes moves only the adapters that lived there. Loads are bounded (consistent
hashing with bounded loads, Mirrokni, Thorup, Zadimoghaddam 2018): a replica that would hold more
than LOAD_FACTOR times the mean passes the request on to the next in that adapter's order, which is
the same next each time. Requests for the base model are at home everywhere and go where there is
least to do.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

LOAD_FACTOR = 1.25
CALM_LOAD = 8
"""Requests that any replica takes for its adapters, whatever the others do: moving an adapter
costs more than sharing a small batch."""


def order(adapter: str, names: Iterable[str]) -> list[str]:
    """Replicas in this adapter's rendezvous order."""
    return sorted(names, key=lambda name: (_weight(adapter, name), name), reverse=True)


def choose(adapter: str | None, loads: Mapping[str, int]) -> str | None:
    """The replica for one more request; `loads` has the requests that each is answering now."""
    if not loads:
        return None
    if adapter is None:
        return min(loads, key=lambda name: (loads[name], name))
    limit = max(CALM_LOAD, math.ceil(LOAD_FACTOR * (sum(loads.values()) + 1) / len(loads)))
    # Some replica is at or below the mean, so below the limit.
    return next(name for name in order(adapter, loads) if loads[name] < limit)


def _weight(adapter: str, name: str) -> bytes:
    return hashlib.blake2b(f"{adapter}\n{name}".encode(), digest_size=8).digest()
