"""Payout periods, claims seen on chain, and anchored checkpoints."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self
from uuid import UUID

from ledger.aggregates.base import (
    OPERATOR,
    Aggregate,
    World,
    need_role,
    need_state,
    need_status,
)
from ledger.aggregates.inferences import chain_event_id
from ledger.domain.envelope import Envelope
from ledger.errors import Conflict, InvalidEvent

SETTLED = ("activated", "vetoed", "abandoned")


@dataclass(frozen=True, kw_only=True)
class Periods(Aggregate):
    """All periods of a ledger, one at a time:
    cutoff -> closed -> proposed -> activated | vetoed, then the next cutoff. Before anything is
    proposed on chain the operator may abandon a period."""

    kind: ClassVar[str] = "periods"

    period: int
    status: str = "cutoff"
    root: str | None = None

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        need_role(world, event, OPERATOR)
        period = event.body["period"]
        if event.type == "period.cutoff":
            following = state.period + 1 if state else 1
            if period != following:
                raise Conflict(f"the next period is {following}", field="period")
            if state:
                need_status(state.status, SETTLED, f"period {state.period}")
            return
        state = need_state(state, f"period {period}")
        if period != state.period:
            raise Conflict(f"period {state.period} is under way", field="period")
        before = {
            "period.closed": ("cutoff",),
            "period.abandoned": ("cutoff", "closed"),
            "payout.proposed": ("closed",),
            "payout.activated": ("proposed",),
            "payout.vetoed": ("proposed",),
        }[event.type]
        need_status(state.status, before, f"period {period}")
        if event.type in ("payout.proposed", "payout.activated") and (
            event.body["root"] != state.root
        ):
            raise Conflict(f"period {period} was closed with root {state.root}", field="root")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        if event.type == "period.cutoff" or state is None:
            version = state.version if state else 0
            return cls(id=id, version=version, period=event.body["period"])
        status = event.type.split(".")[1]
        return replace(state, status=status, root=event.body.get("root", state.root))


@dataclass(frozen=True, kw_only=True)
class Claims(Aggregate):
    """What one EVM address has claimed, as the chain shows it."""

    kind: ClassVar[str] = "claims"

    cumulative_wei: int = 0

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        need_role(world, event, OPERATOR)
        body = event.body
        expected = chain_event_id("claim", body["chain_id"], body["tx_hash"], body["log_index"])
        if event.id != expected:
            raise InvalidEvent(f"the id of this {event.type} must be {expected}", field="id")
        before = state.cumulative_wei if state else 0
        if int(body["cumulative_wei"]) != before + int(body["amount_wei"]):
            raise Conflict(f"the address had claimed {before} wei before", field="cumulative_wei")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        return replace(state or cls(id=id), cumulative_wei=int(event.body["cumulative_wei"]))


@dataclass(frozen=True, kw_only=True)
class Anchors(Aggregate):
    """The checkpoints that the L1 holds: sizes only grow."""

    kind: ClassVar[str] = "anchors"

    size: int

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        need_role(world, event, OPERATOR)
        if state and event.body["size"] <= state.size:
            raise Conflict(f"a checkpoint of size {state.size} is anchored already", field="size")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        size = event.body["size"]
        return replace(state, size=size) if state else cls(id=id, size=size)
