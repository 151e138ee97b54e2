"""Inferences with their attribution, and the prepaid accounts that pay for them."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self
from uuid import UUID

from ledger.aggregates.base import (
    OPERATOR,
    WORKER,
    Aggregate,
    World,
    need,
    need_role,
    need_state,
    refuse_existing,
)
from ledger.aggregates.governance import Governance
from ledger.aggregates.runs import Adapter, Run
from ledger.domain.envelope import Envelope
from ledger.domain.fees import fee_wei
from ledger.domain.ids import derived_id
from ledger.errors import Conflict, InvalidEvent, NotFound, PaymentRequired


@dataclass(frozen=True, kw_only=True)
class Inference(Aggregate):
    """One answer: recorded by the operator, attributed once by a worker. Or recorded as broken off
    by a fault of ours: that costs nothing, so there is nothing to attribute."""

    kind: ClassVar[str] = "inference"

    adapter: str
    consumer: str
    fee_wei: int
    attributed: bool = False
    interrupted: bool = False

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        body = event.body
        adapter = need(world, Adapter, body["adapter"])
        if event.type != "attribution.recorded":
            need_role(world, event, OPERATOR)
            refuse_existing(state, f"inference {body['inference']}")
        if event.type == "inference.interrupted":
            return
        if event.type == "inference.recorded":
            fee = fee_wei(
                body["prompt_tokens"],
                body["completion_tokens"],
                input_wei_per_token=adapter.input_wei_per_token,
                output_wei_per_token=adapter.output_wei_per_token,
            )
            if int(body["fee_wei"]) != fee:
                raise Conflict(f"at the adapter's prices the fee is {fee} wei", field="fee_wei")
            return
        need_role(world, event, WORKER)
        state = need_state(state, f"inference {body['inference']}")
        if state.interrupted:
            raise Conflict("this answer broke off and cost nothing: nobody is paid for it")
        if state.attributed:
            raise Conflict("this inference is attributed already")
        if body["adapter"] != state.adapter or body["run"] != adapter.run:
            raise Conflict(f"the inference used adapter {state.adapter} of run {adapter.run}")
        index = need(world, Run, adapter.run).index_sha256
        if body["shares"] and body["index_sha256"] != index:
            raise Conflict(f"the run's attribution index is {index}", field="index_sha256")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        body = event.body
        if state is None:
            return cls(
                id=id,
                adapter=body["adapter"],
                consumer=body["consumer"],
                fee_wei=int(body.get("fee_wei", "0")),
                interrupted=event.type == "inference.interrupted",
            )
        return replace(state, attributed=True)


def inference_id(log: str, consumer: str, *nonce: object) -> UUID:
    """Of an answer, and of the event that records it. A function of what it stands for, so of
    version 5: the consumer learns it with the first token, and could take any other id first."""
    return derived_id("inference", log, consumer, *nonce)


def fee_event_id(log: str, inference: str) -> UUID:
    """One fee per inference: the event id is a function of it, and ids are unique in the store."""
    return derived_id("fee", log, inference)


def chain_event_id(what: str, chain_id: int, tx_hash: str, log_index: int) -> UUID:
    """One event per EVM log, however often the watcher sees it."""
    return derived_id(what, chain_id, tx_hash, log_index)


@dataclass(frozen=True, kw_only=True)
class Account(Aggregate):
    """A consumer's prepaid balance in wei: deposits seen on chain, less fees. Never below zero."""

    kind: ClassVar[str] = "account"

    prepaid_wei: int = 0

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: World) -> None:
        need_role(world, event, OPERATOR)
        body = event.body
        charged = event.type == "fee.charged"
        if charged:
            expected = fee_event_id(world.log, body["inference"])
        else:
            expected = chain_event_id(
                "deposit", body["chain_id"], body["tx_hash"], body["log_index"]
            )
        if event.id != expected:
            raise InvalidEvent(f"the id of this {event.type} must be {expected}", field="id")
        if charged:
            cls._decide_fee(state, event, world)

    @classmethod
    def _decide_fee(cls, state: Self | None, event: Envelope, world: World) -> None:
        body, amount = event.body, int(event.body["amount_wei"])
        inference = need(world, Inference, body["inference"])
        if not world.is_new(Inference, body["inference"]):
            # So the policy in force at the inference's index is the one in force now.
            raise Conflict("a fee is charged in the append that records its inference")
        if inference.interrupted:
            raise Conflict("an answer that broke off costs nothing, not even a fee of 0")
        if (inference.consumer, inference.adapter, inference.fee_wei) != (
            body["account"],
            body["adapter"],
            amount,
        ):
            raise Conflict("the fee differs from what the inference says (consumer, adapter, fee)")
        policy = need(world, Governance).policy
        if policy is None:
            raise NotFound("no fee policy is in force; governance sets one with fee_policy.set")
        split = policy.split(amount)
        if body["policy_version"] != policy.version or any(
            int(body[f"{part}_wei"]) != wei for part, wei in split.items()
        ):
            raise Conflict(f"fee policy {policy.version} splits this fee as {split}")
        if body["owner"] != need(world, Adapter, body["adapter"]).owner:
            raise Conflict("the owner's part goes to the adapter's owner", field="owner")
        have = state.prepaid_wei if state else 0
        if have < amount:
            raise PaymentRequired(f"the fee is {amount} wei, the prepaid balance {have} wei")

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        amount = int(event.body["amount_wei"])
        state = state or cls(id=id)
        change = amount if event.type == "deposit.recorded" else -amount
        return replace(state, prepaid_wei=state.prepaid_wei + change)
