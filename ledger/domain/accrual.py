"""Double entry: which postings an event makes. Pure.

An account is (owner, bucket). Owners are actors, or the ledger's own: `world` (money outside),
`protocol`, `pool` (contributor shares that wait for attribution), `unattributed`. Buckets of an
actor: `prepaid` (a consumer's), `accrued` -> `held` (a payout root waits for its challenge
window) -> `available` (claimable on chain) -> `paid` (what the chain shows); and `withheld`, which
a contributor's shares go to while a contribution of theirs is held, and leave for `accrued` only.
The postings of every event sum to zero, and only `world` may go below zero.

Postings that depend on earlier events take what they need as arguments: the pool of the inference,
the lines of the period. The caller (a fold) keeps those rows; a replay gives the same postings.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from ledger.domain.money import split_exactly

ASSET = "OPEN"
WORLD, PROTOCOL, POOL, UNATTRIBUTED = "world", "protocol", "pool", "unattributed"
PREPAID, ACCRUED, WITHHELD, HELD, AVAILABLE, PAID, MAIN = (
    "prepaid", "accrued", "withheld", "held", "available", "paid", "main",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Posting:
    """`amount_wei` added to the balance of (owner, bucket); negative takes away."""

    owner: str
    bucket: str
    amount_wei: int


def transfer(
    source: tuple[str, str], target: tuple[str, str], amount_wei: int
) -> tuple[Posting, Posting]:
    return (
        Posting(owner=source[0], bucket=source[1], amount_wei=-amount_wei),
        Posting(owner=target[0], bucket=target[1], amount_wei=amount_wei),
    )


def deposit(body: Mapping[str, Any]) -> list[Posting]:
    return list(transfer((WORLD, MAIN), (body["account"], PREPAID), int(body["amount_wei"])))


def fee(body: Mapping[str, Any], operator: str) -> list[Posting]:
    """fee.charged: the consumer pays; the contributors' part waits in the pool."""
    source = (body["account"], PREPAID)
    targets = (
        ((PROTOCOL, MAIN), "protocol_wei"),
        ((body["owner"], ACCRUED), "owner_wei"),
        ((operator, ACCRUED), "operator_wei"),
        ((POOL, MAIN), "contributors_wei"),
    )
    return [p for target, part in targets for p in transfer(source, target, int(body[part]))]


def attribution(
    body: Mapping[str, Any], pool_wei: int, held: Set[str] = frozenset()
) -> list[Posting]:
    """attribution.recorded: the pool of that inference goes to those whose data shaped it; the
    part of a contributor who is `held` waits."""
    weights = {s["contributor"]: s["ppm"] for s in body["shares"]}
    if body["unattributed_ppm"]:
        weights[UNATTRIBUTED] = body["unattributed_ppm"]
    postings: list[Posting] = []
    for owner, amount in split_exactly(pool_wei, weights).items():
        bucket = WITHHELD if owner in held else ACCRUED
        bucket = MAIN if owner == UNATTRIBUTED else bucket
        postings += transfer((POOL, MAIN), (owner, bucket), amount)
    return postings


def move(owners: Iterable[tuple[str, int]], source: str, target: str) -> list[Posting]:
    """Move each owner's amount from one bucket to the next."""
    return [
        p for owner, amount in owners for p in transfer((owner, source), (owner, target), amount)
    ]
