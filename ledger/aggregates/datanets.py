"""Datanets and the contributions to them: gather, license, review, hold, withdraw.

Three things run beside each other in a contribution. Its *status* is what the contributor and the
reviewers decided about it. A *hold* suspends it, whatever its status: it is no input of new runs
and its contributor's earnings wait; nobody loses anything by it, and none outlasts MAX_HOLD_US
against the contributor's will. *Appeals* are about single rows that an index merged with somebody
else's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import ClassVar, Self
from uuid import UUID

from ledger.aggregates.base import (
    WORKER,
    Aggregate,
    World,
    need,
    need_state,
    need_status,
    refuse_existing,
)
from ledger.aggregates.governance import Identity
from ledger.domain.datanets import MAX_HOLD_US, DatanetPolicy
from ledger.domain.envelope import Envelope
from ledger.errors import Conflict, Forbidden, TooLarge

MAX_OPEN_APPEALS = 100
"""Appeals of one contribution that may wait for a decision."""
STANDING = ("recorded", "approved")


@dataclass(frozen=True, kw_only=True)
class Datanet(Aggregate):
    kind: ClassVar[str] = "datanet"

    owner: str
    licence: str
    reviewers: frozenset[str]
    status: str = "open"
    policy: DatanetPolicy = field(default_factory=DatanetPolicy)

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        if event.type == "datanet.created":
            refuse_existing(state, f"datanet {event.body['datanet']}")
            need(world, Identity, event.actor)
            return
        state = need_state(state, f"datanet {event.body['datanet']}")
        if event.actor != state.owner:
            raise Forbidden("only the owner closes a datanet or sets its policy")
        if event.type == "datanet.closed":
            need_status(state.status, ("open",), "the datanet")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        body = event.body
        if state is None:
            reviewers = frozenset(body["reviewers"]) | {event.actor}
            return cls(id=id, owner=event.actor, licence=body["licence"], reviewers=reviewers)
        if event.type == "datanet.policy_set":
            return replace(state, policy=DatanetPolicy.of(body))
        return replace(state, status="closed")


@dataclass(frozen=True, kw_only=True)
class Contribution(Aggregate):
    """recorded -> approved | rejected; recorded or approved -> withdrawn by the contributor.

    `held_at` is when the hold in force was signed (us), None without one; `appeals` are rows that
    wait for a decision, `splits` rows that stand for themselves again.
    """

    kind: ClassVar[str] = "contribution"

    datanet: str
    contributor: str
    rows_sha256: str
    rows_count: int
    status: str = "recorded"
    held_at: int | None = None
    appeals: frozenset[int] = frozenset()
    splits: frozenset[int] = frozenset()

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        body = event.body
        datanet = need(world, Datanet, body["datanet"])
        if event.type == "contribution.recorded":
            refuse_existing(state, f"contribution {body['contribution']}")
            need(world, Identity, event.actor)
            _decide_recorded(event, datanet)
            return
        state = need_state(state, f"contribution {body['contribution']}")
        if body["datanet"] != state.datanet:
            raise Conflict(f"the contribution belongs to datanet {state.datanet}", field="datanet")
        _RULES[event.type](state, event, datanet, world)

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        body = event.body
        match event.type:
            case "contribution.recorded":
                return cls(
                    id=id,
                    datanet=body["datanet"],
                    contributor=event.actor,
                    rows_sha256=body["rows_sha256"],
                    rows_count=body["rows_count"],
                )
        assert state is not None, "an event of a contribution follows its recording"
        match event.type:
            case "contribution.held":
                return replace(state, held_at=event.at)
            case "contribution.released":
                return replace(state, held_at=None)
            case "cluster.appealed":
                return replace(state, appeals=state.appeals | {body["row"]})
            case "cluster.split":
                row = frozenset({body["row"]})
                return replace(state, appeals=state.appeals - row, splits=state.splits | row)
            case "cluster.upheld":
                return replace(state, appeals=state.appeals - {body["row"]})
        return replace(state, status=event.type.removeprefix("contribution."))


# --- the rules, one per type ------------------------------------------------------------------


def _decide_recorded(event: Envelope, datanet: Datanet) -> None:
    body = event.body
    need_status(datanet.status, ("open",), "the datanet")
    if body["licence"] != datanet.licence:
        raise Conflict(
            f"the datanet takes {datanet.licence}, the contribution says {body['licence']}",
            field="licence",
        )
    limit = datanet.policy.max_rows_per_contribution
    if body["rows_count"] > limit:
        raise TooLarge(
            f"this datanet takes max_rows_per_contribution = {limit} rows at a time, not "
            f"{body['rows_count']}: split them into several contributions",
            field="body.rows_count",
        )


def _need_reviewer(state: Contribution, event: Envelope, datanet: Datanet) -> None:
    if event.actor not in datanet.reviewers:
        raise Forbidden("only the datanet's owner and its reviewers review contributions")
    if event.actor == state.contributor:
        raise Forbidden("nobody reviews their own contribution; another reviewer must")


def _need_contributor(state: Contribution, event: Envelope, does: str) -> None:
    if event.actor != state.contributor:
        raise Forbidden(f"only the contributor {does}")


def _reviewed(state: Contribution, event: Envelope, datanet: Datanet, world: World) -> None:
    _need_reviewer(state, event, datanet)
    need_status(state.status, ("recorded",), "the contribution")


def _withdrawn(state: Contribution, event: Envelope, datanet: Datanet, world: World) -> None:
    _need_contributor(state, event, "withdraws a contribution")
    need_status(state.status, STANDING, "the contribution")


def _held(state: Contribution, event: Envelope, datanet: Datanet, world: World) -> None:
    if not world.has_role(event.actor, WORKER):
        _need_reviewer(state, event, datanet)
    elif event.actor == state.contributor:
        raise Forbidden("nobody reviews their own contribution; another reviewer must")
    need_status(state.status, STANDING, "the contribution")
    if state.held_at is not None:
        raise Conflict("the contribution is held already; one hold at a time")


def _released(state: Contribution, event: Envelope, datanet: Datanet, world: World) -> None:
    if state.held_at is None:
        raise Conflict("the contribution is not held")
    if event.actor != state.contributor:
        _need_reviewer(state, event, datanet)
    elif event.at < state.held_at + MAX_HOLD_US:
        until = datetime.fromtimestamp((state.held_at + MAX_HOLD_US) // 1_000_000, UTC)
        raise Forbidden(
            "until MAX_HOLD_US (30 days) are over a hold is for the datanet's owner and its "
            f"reviewers to end; from {until:%Y-%m-%d %H:%M:%S} UTC on you may, too",
            from_us=state.held_at + MAX_HOLD_US,
        )


def _appealed(state: Contribution, event: Envelope, datanet: Datanet, world: World) -> None:
    _need_contributor(state, event, "appeals the merge of a row")
    need_status(state.status, STANDING, "the contribution")
    row = event.body["row"]
    if row >= state.rows_count:
        raise Conflict(f"the contribution has rows 0 to {state.rows_count - 1}", field="row")
    if row in state.splits:
        raise Conflict(f"row {row} stands for itself already", field="row")
    if row in state.appeals:
        raise Conflict(f"an appeal of row {row} waits for its decision", field="row")
    if len(state.appeals) >= MAX_OPEN_APPEALS:
        raise Conflict(
            f"MAX_OPEN_APPEALS = {MAX_OPEN_APPEALS} appeals of this contribution wait for a "
            "decision: appeal again once some are decided"
        )


def _judged(state: Contribution, event: Envelope, datanet: Datanet, world: World) -> None:
    _need_reviewer(state, event, datanet)
    row = event.body["row"]
    if row not in state.appeals:
        raise Conflict(f"no appeal of row {row} is open", field="row")


Rule = Callable[[Contribution, Envelope, Datanet, World], None]

_RULES: Mapping[str, Rule] = {
    "contribution.approved": _reviewed,
    "contribution.rejected": _reviewed,
    "contribution.withdrawn": _withdrawn,
    "contribution.held": _held,
    "contribution.released": _released,
    "cluster.appealed": _appealed,
    "cluster.split": _judged,
    "cluster.upheld": _judged,
}
