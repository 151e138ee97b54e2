"""Training runs and the adapters that come of them. The ledger owns queue and retries: an attempt
is an event, and a run has exactly one terminal event."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self
from uuid import UUID

from ledger.aggregates.base import (
    GOVERNANCE,
    WORKER,
    Aggregate,
    World,
    need,
    need_role,
    need_state,
    need_status,
    refuse_existing,
)
from ledger.aggregates.datanets import Contribution, Datanet
from ledger.aggregates.governance import Identity
from ledger.domain.datanets import RETIRE
from ledger.domain.envelope import Envelope
from ledger.errors import Conflict, Forbidden

ACTIVE = ("requested", "started")


@dataclass(frozen=True, kw_only=True)
class Run(Aggregate):
    """requested -> started (attempt 1, 2, ...) -> completed | failed | cancelled."""

    kind: ClassVar[str] = "run"

    requester: str
    base_model: str
    datanets: tuple[str, ...]
    status: str = "requested"
    attempt: int = 0
    adapter_sha256: str | None = None
    index_sha256: str | None = None

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        body = event.body
        if event.type == "run.requested":
            refuse_existing(state, f"run {body['run']}")
            need(world, Identity, event.actor)
            for datanet in body["datanets"]:
                need(world, Datanet, datanet)
            return
        state = need_state(state, f"run {body['run']}")
        need_status(state.status, ACTIVE, "the run")
        if event.type == "run.cancelled":
            if event.actor != state.requester:
                raise Forbidden("only its requester cancels a run")
            return
        need_role(world, event, WORKER)
        expected = state.attempt + (event.type == "run.started")
        if body["attempt"] != expected:
            raise Conflict(f"the run is at attempt {expected}", field="attempt")
        if event.type == "run.completed":
            need_status(state.status, ("started",), "the run")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        body = event.body
        if state is None:
            return cls(
                id=id,
                requester=event.actor,
                base_model=body["base_model"],
                datanets=tuple(body["datanets"]),
            )
        status = event.type.removeprefix("run.")
        if status == "started":
            return replace(state, status=status, attempt=body["attempt"])
        return replace(
            state,
            status=status,
            adapter_sha256=body.get("adapter_sha256"),
            index_sha256=body.get("index_sha256"),
        )


@dataclass(frozen=True, kw_only=True)
class Adapter(Aggregate):
    """published by the run's requester; retired by them or by governance, or recalled because a
    contribution it was trained on was withdrawn, where that one's datanet says so."""

    kind: ClassVar[str] = "adapter"

    owner: str
    run: str
    input_wei_per_token: int
    output_wei_per_token: int
    status: str = "published"

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        body = event.body
        if event.type == "adapter.published":
            refuse_existing(state, f"adapter {body['adapter']}")
            run = need(world, Run, body["run"])
            need_status(run.status, ("completed",), "the run")
            if event.actor != run.requester:
                raise Forbidden("only the run's requester publishes its adapter")
            for field, expected in (
                ("adapter_sha256", run.adapter_sha256),
                ("base_model", run.base_model),
            ):
                if body[field] != expected:
                    raise Conflict(f"the run has {field} {expected}", field=field)
            return
        state = need_state(state, f"adapter {body['adapter']}")
        if event.type == "adapter.recalled":
            cls._decide_recall(state, event, world)
        elif event.actor != state.owner and not world.has_role(event.actor, GOVERNANCE):
            raise Forbidden("only its owner or governance retires an adapter")
        need_status(state.status, ("published",), "the adapter")

    @classmethod
    def _decide_recall(cls, state: Self, event: Envelope, world: World) -> None:
        """Whether the run trained on the contribution is outside the rules: a gate looks into its
        manifest."""
        body = event.body
        contribution = need(world, Contribution, body["contribution"])
        datanet = need(world, Datanet, body["datanet"])
        if event.actor != datanet.owner and not world.has_role(event.actor, WORKER):
            raise Forbidden("only a worker or the datanet's owner recalls an adapter")
        if contribution.datanet != body["datanet"]:
            raise Conflict(
                f"the contribution belongs to datanet {contribution.datanet}", field="datanet"
            )
        if body["datanet"] not in need(world, Run, state.run).datanets:
            raise Conflict("the adapter's run did not ask for this datanet", field="datanet")
        need_status(contribution.status, ("withdrawn",), "the contribution")
        if datanet.policy.on_withdrawal != RETIRE:
            raise Conflict(
                f"this datanet's policy lets adapters stay (on_withdrawal is "
                f"{datanet.policy.on_withdrawal!r}, not {RETIRE!r})"
            )

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        body = event.body
        if state is None:
            return cls(
                id=id,
                owner=event.actor,
                run=body["run"],
                input_wei_per_token=int(body["input_wei_per_token"]),
                output_wei_per_token=int(body["output_wei_per_token"]),
            )
        return replace(state, status="retired")
