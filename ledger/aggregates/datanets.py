"""Datanets and the contributions to them: gather, license, review, withdraw."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self
from uuid import UUID

from ledger.aggregates.base import (
    Aggregate,
    World,
    need,
    need_state,
    need_status,
    refuse_existing,
)
from ledger.aggregates.governance import Identity
from ledger.domain.envelope import Envelope
from ledger.errors import Conflict, Forbidden


@dataclass(frozen=True, kw_only=True)
class Datanet(Aggregate):
    kind: ClassVar[str] = "datanet"

    owner: str
    licence: str
    reviewers: frozenset[str]
    status: str = "open"

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        if event.type == "datanet.created":
            refuse_existing(state, f"datanet {event.body['datanet']}")
            need(world, Identity, event.actor)
            return
        state = need_state(state, f"datanet {event.body['datanet']}")
        if event.actor != state.owner:
            raise Forbidden("only the owner closes a datanet")
        need_status(state.status, ("open",), "the datanet")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        body = event.body
        if state is None:
            reviewers = frozenset(body["reviewers"]) | {event.actor}
            return cls(id=id, owner=event.actor, licence=body["licence"], reviewers=reviewers)
        return replace(state, status="closed")


@dataclass(frozen=True, kw_only=True)
class Contribution(Aggregate):
    """recorded -> approved | rejected; recorded or approved -> withdrawn by the contributor."""

    kind: ClassVar[str] = "contribution"

    datanet: str
    contributor: str
    rows_sha256: str
    rows_count: int
    status: str = "recorded"

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        body = event.body
        datanet = need(world, Datanet, body["datanet"])
        if event.type == "contribution.recorded":
            refuse_existing(state, f"contribution {body['contribution']}")
            need(world, Identity, event.actor)
            need_status(datanet.status, ("open",), "the datanet")
            if body["licence"] != datanet.licence:
                raise Conflict(
                    f"the datanet takes {datanet.licence}, the contribution says {body['licence']}",
                    field="licence",
                )
            return
        state = need_state(state, f"contribution {body['contribution']}")
        if body["datanet"] != state.datanet:
            raise Conflict(f"the contribution belongs to datanet {state.datanet}", field="datanet")
        if event.type == "contribution.withdrawn":
            if event.actor != state.contributor:
                raise Forbidden("only the contributor withdraws a contribution")
            need_status(state.status, ("recorded", "approved"), "the contribution")
            return
        if event.actor not in datanet.reviewers:
            raise Forbidden("only the datanet's owner and its reviewers review contributions")
        if event.actor == state.contributor:
            raise Forbidden("nobody reviews their own contribution; another reviewer must")
        need_status(state.status, ("recorded",), "the contribution")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        body = event.body
        if state is None:
            return cls(
                id=id,
                datanet=body["datanet"],
                contributor=event.actor,
                rows_sha256=body["rows_sha256"],
                rows_count=body["rows_count"],
            )
        return replace(state, status=event.type.removeprefix("contribution."))
