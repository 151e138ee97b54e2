"""Who may do what: the opening of the ledger, roles, the fee policy; and identities."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self
from uuid import UUID

from ledger.aggregates.base import (
    GOVERNANCE,
    Aggregate,
    World,
    need_role,
    need_state,
    refuse_existing,
)
from ledger.domain.envelope import Envelope
from ledger.domain.events import ROLES
from ledger.domain.fees import FeePolicy
from ledger.errors import Conflict, Forbidden


@dataclass(frozen=True, kw_only=True)
class Governance(Aggregate):
    """One per ledger. Its first event is the first of the log, signed by the operator."""

    kind: ClassVar[str] = "governance"

    opener: str
    name: str
    members: frozenset[tuple[str, str]]
    policy: FeePolicy | None = None

    def has_role(self, actor: str, role: str) -> bool:
        return (actor, role) in self.members

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        if event.type == "ledger.opened":
            refuse_existing(state, "the opening of this ledger")
            if event.actor != world.operator:
                raise Forbidden("only the operator's key opens a ledger")
            return
        state = need_state(state, "the opening of this ledger")
        need_role(world, event, GOVERNANCE)
        body = event.body
        if event.type == "role.granted" and state.has_role(body["member"], body["role"]):
            raise Conflict(f"{body['member']} already has the role {body['role']}")
        if event.type == "role.revoked" and not state.has_role(body["member"], body["role"]):
            raise Conflict(f"{body['member']} does not have the role {body['role']}")
        governors = [member for member, role in state.members if role == GOVERNANCE]
        if (
            event.type == "role.revoked"
            and governors == [body["member"]]
            and (body["role"] == GOVERNANCE)
        ):
            raise Conflict("the last member of governance stays; grant the role to another first")
        if event.type == "fee_policy.set":
            following = state.policy.version + 1 if state.policy else 1
            if body["version"] != following:
                raise Conflict(f"the next fee policy is version {following}", field="version")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        body = event.body
        if state is None:
            everything = frozenset((event.actor, role) for role in ROLES)
            return cls(id=id, opener=event.actor, name=body["name"], members=everything)
        if event.type == "role.granted":
            return replace(state, members=state.members | {(body["member"], body["role"])})
        if event.type == "role.revoked":
            return replace(state, members=state.members - {(body["member"], body["role"])})
        return replace(state, policy=FeePolicy.of(body))


@dataclass(frozen=True, kw_only=True)
class Identity(Aggregate):
    """An Ed25519 key with a display name and, once bound, the EVM address that is paid.

    An address is bound once and stays. That it belongs to the key's owner is proven by an EIP-712
    signature, which the application's gate checks. Two identities that bind one address: the first
    in the log is paid, the other keeps accruing (`projections.balances`).
    """

    kind: ClassVar[str] = "identity"

    name: str
    evm_address: str | None = None

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        if event.type == "identity.registered":
            refuse_existing(state, f"identity {event.actor}")
            return
        if need_state(state, f"identity {event.actor}").evm_address is not None:
            raise Conflict("this identity has bound an EVM address already")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        if state is None:
            return cls(id=id, name=event.body["name"])
        return replace(state, evm_address=event.body["address"].lower())
