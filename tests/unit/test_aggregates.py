"""What may happen next: each rule of the aggregates once kept and once broken."""

import json
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from ledger.aggregates.application import Ledger
from ledger.aggregates.governance import Governance
from ledger.aggregates.inferences import (
    Account,
    chain_event_id,
    fee_event_id,
    inference_id,
)
from ledger.aggregates.runs import Run
from ledger.domain.envelope import MAX_ENVELOPE_BYTES, encode_entry, leaf_hash, sign_event
from ledger.domain.ids import sender_id
from ledger.errors import Conflict, Forbidden, InvalidEvent, NotFound, PaymentRequired, TooLarge
from tests.actors import (
    ADDRESS,
    ANN,
    BEN,
    DEV,
    EVE,
    HEX,
    LOG,
    NOW,
    OPERATOR,
    OWNER,
    Actor,
    H,
    MemoryLedger,
)  # fmt: skip

CHAIN = {"chain_id": 1, "contract": ADDRESS, "tx_hash": HEX, "block_number": 1}


@pytest.fixture
def world() -> MemoryLedger:
    return MemoryLedger()


def datanet(world: MemoryLedger, **changes: Any) -> str:
    name = str(uuid4())
    body = {
        "datanet": name, "name": "docs", "description": "", "licence": "CC-BY-4.0", "reviewers": [],
    }  # fmt: skip
    world.do(OWNER, "datanet.created", {**body, **changes})
    return name


def contribution(world: MemoryLedger, net: str, actor: Actor = ANN, **changes: Any) -> str:
    name = str(uuid4())
    body = {
        "contribution": name, "datanet": net, "licence": "CC-BY-4.0", "rows_root": H,
        "rows_count": 3, "rows_sha256": H, "title": "rows",
    }  # fmt: skip
    world.do(actor, "contribution.recorded", {**body, **changes})
    return name


def completed_run(world: MemoryLedger) -> str:
    run = str(uuid4())
    world.do(
        DEV,
        "run.requested",
        {
            "run": run, "name": "r", "datanets": [datanet(world)], "base_model": H,
            "base_id": "base", "config": {"r": 8, "lr": "0.001"},
        },
    )  # fmt: skip
    world.do(OPERATOR, "run.started", {"run": run, "attempt": 1, "submission_id": "s"})
    world.do(
        OPERATOR,
        "run.completed",
        {
            "run": run, "attempt": 1, "manifest_sha256": H, "adapter_sha256": H,
            "adapter_config_sha256": H, "index_sha256": H, "index_root": H, "rows_count": 3,
            "contributions_count": 1, "steps": 5, "loss": "1.5",
        },
    )  # fmt: skip
    return run


def adapter(world: MemoryLedger) -> tuple[str, str]:
    run, name = completed_run(world), str(uuid4())
    body = {
        "adapter": name, "run": run, "model": "dev/docs", "adapter_sha256": H, "base_model": H,
        "input_wei_per_token": "10", "output_wei_per_token": "20",
    }  # fmt: skip
    world.do(DEV, "adapter.published", body)
    return name, run


def inference_body(adapter_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "inference": str(uuid4()), "adapter": adapter_id, "consumer": EVE.id,
        "prompt_commitment": H, "output_commitment": H, "transcript_sha256": H,
        "prompt_tokens": 10, "completion_tokens": 5, "max_tokens": 8, "seed": 1,
        "temperature_ppm": 0, "top_p_ppm": 1_000_000, "finish_reason": "stop", "fee_wei": "200",
        **changes,
    }  # fmt: skip


def policy(world: MemoryLedger) -> None:
    world.do(
        OPERATOR,
        "fee_policy.set",
        {
            "version": 1, "protocol_bps": 1000, "owner_bps": 2000, "operator_bps": 1000,
            "contributors_bps": 6000,
        },
    )  # fmt: skip


def deposit(world: MemoryLedger, amount: int) -> None:
    world.do(
        OPERATOR,
        "deposit.recorded",
        {"account": EVE.id, "amount_wei": str(amount), **CHAIN, "log_index": 0},
        id=chain_event_id("deposit", 1, HEX, 0),
    )


def fee_body(inference: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "account": EVE.id, "inference": inference["inference"], "adapter": inference["adapter"],
        "policy_version": 1, "amount_wei": "200", "protocol_wei": "20", "owner": DEV.id,
        "owner_wei": "40", "operator_wei": "20", "contributors_wei": "120", **changes,
    }  # fmt: skip


def test_nothing_happens_before_the_operator_opens_the_ledger() -> None:
    world = MemoryLedger(opened=False)
    with pytest.raises(Conflict, match="not open"):
        world.do(ANN, "identity.registered", {"name": "Ann"})
    with pytest.raises(Forbidden, match="operator"):
        world.do(ANN, "ledger.opened", {"name": "mine"})
    world.do(OPERATOR, "ledger.opened", {"name": "ours"})
    with pytest.raises(Conflict, match="already"):
        world.do(OPERATOR, "ledger.opened", {"name": "again"})


def test_indexes_are_dense_and_a_repetition_signed_anew_is_refused(world: MemoryLedger) -> None:
    raw = ANN.sign("identity.registered", {"name": "again"})
    with pytest.raises(Conflict):
        world.append(raw)
    stranger, id = Actor(99), uuid4()
    appended = world.do(stranger, "identity.registered", {"name": "new"}, id=id)
    assert (appended.index, appended.replayed) == (7, False)
    again = stranger.sign("identity.registered", {"name": "new"}, id=id, at=NOW + 1)
    with pytest.raises(Conflict, match="recorded already, at index 7") as caught:
        world.append(again)
    assert caught.value.detail == {"index": 7, "replayed": str(id)}


def test_the_same_bytes_are_stored_once_and_answered_alike(world: MemoryLedger) -> None:
    stranger = Actor(99)
    raw = stranger.sign("identity.registered", {"name": "new"})
    first, second = world.append(raw), world.append(raw)
    assert (first.replayed, second.replayed) == (False, True)
    assert second == replace(first, replayed=True)
    assert first.leaf_hash == leaf_hash(encode_entry(7, first.recorded_at, raw))
    assert world.do(ANN, "identity.evm_bound", {"address": ADDRESS, "signature": "0x"}).index == 8


def test_a_repetition_is_one_whatever_has_changed_since(world: MemoryLedger) -> None:
    """Neither a lost role nor a clock set back makes a stored event unknown."""
    world.do(OPERATOR, "role.granted", {"member": BEN.id, "role": "governance"})
    raw = BEN.sign("role.granted", {"member": EVE.id, "role": "worker"}, at=NOW + 200_000_000)
    stored = world.append(raw)
    world.do(OPERATOR, "role.revoked", {"member": BEN.id, "role": "governance"})
    world.ledger._clock = lambda: NOW - 400_000_000
    assert world.append(raw) == replace(stored, replayed=True)


def test_a_batch_is_repeated_as_a_whole_or_refused(world: MemoryLedger) -> None:
    raws = [Actor(n).sign("identity.registered", {"name": "x"}) for n in range(90, 94)]
    stored = world.append_all(raws[:3])
    assert world.append_all(raws[:3]) == [replace(one, replayed=True) for one in stored]
    with pytest.raises(Conflict, match=r"of these 3 events, the log has number 2, 3") as caught:
        world.append_all([raws[3], raws[0], raws[2]])
    first = json.loads(raws[0])["id"]
    assert caught.value.detail == {"index": stored[0].index, "replayed": first}
    assert world.append(raws[3]).index == stored[2].index + 1, "nothing of the batch was stored"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda raw: raw.replace(b'"name":"x"', b'"name":"y"'), "signature"),
        (lambda raw: raw.replace(b'{"actor"', b'{ "actor"'), "canonical"),
        (lambda raw: raw[:-1], "not JSON"),
        (lambda raw: raw.replace(b'"v":1', b'"v":2'), "version"),
        (lambda raw: b"[]", "exactly the fields"),
        (lambda raw: b"\xff" + raw, "not JSON"),
    ],
)
def test_spoiled_bytes_are_refused(world: MemoryLedger, spoil: Any, match: str) -> None:
    raw = Actor(50).sign("identity.registered", {"name": "x"})
    with pytest.raises(InvalidEvent, match=match):
        world.append(spoil(raw))


def test_wrong_log_unknown_type_wrong_fields_future_and_size(world: MemoryLedger) -> None:
    far = Actor(51, log="elsewhere.example/log")
    with pytest.raises(InvalidEvent, match="signed for log"):
        world.append(far.sign("identity.registered", {"name": "x"}))
    with pytest.raises(InvalidEvent, match="unknown event type"):
        world.do(ANN, "identity.invented", {"name": "x"})
    with pytest.raises(InvalidEvent, match="missing \\['name'\\]"):
        world.do(ANN, "identity.registered", {"nom": "x"})
    with pytest.raises(InvalidEvent, match="future"):
        world.append(Actor(52).sign("identity.registered", {"name": "x"}, at=NOW + 10**12))
    with pytest.raises(TooLarge, match="MAX_ENVELOPE_BYTES"):
        world.append(b"x" * (MAX_ENVELOPE_BYTES + 1))
    with pytest.raises(TooLarge, match="blob"):
        sign_event(ANN.key, type="x", log=LOG, body={"a": "x" * 70_000}, id=uuid4(), at=NOW)


def test_contributions_are_reviewed_by_others(world: MemoryLedger) -> None:
    net = datanet(world, reviewers=[BEN.id])
    name = contribution(world, net)
    ids = {"contribution": name, "datanet": net}
    with pytest.raises(Forbidden, match="reviewers"):
        world.do(EVE, "contribution.approved", {**ids, "note": ""})
    world.do(BEN, "contribution.approved", {**ids, "note": "good"})
    with pytest.raises(Conflict, match="is approved"):
        world.do(OWNER, "contribution.rejected", {**ids, "reason": "late"})
    with pytest.raises(Forbidden, match="only the contributor"):
        world.do(BEN, "contribution.withdrawn", {**ids, "reason": ""})
    world.do(ANN, "contribution.withdrawn", {**ids, "reason": "mine"})
    own = contribution(world, net, actor=OWNER)
    with pytest.raises(Forbidden, match="own contribution"):
        world.do(OWNER, "contribution.approved", {"contribution": own, "datanet": net, "note": ""})
    with pytest.raises(Conflict, match="datanet takes"):
        contribution(world, net, licence="MIT")
    with pytest.raises(NotFound, match="no datanet"):
        contribution(world, str(uuid4()))
    world.do(OWNER, "datanet.closed", {"datanet": net, "reason": "full"})
    with pytest.raises(Conflict, match="closed"):
        contribution(world, net)


def test_a_run_has_one_terminal_event(world: MemoryLedger) -> None:
    run = completed_run(world)
    with pytest.raises(Conflict, match="is completed"):
        world.do(OPERATOR, "run.failed", {"run": run, "attempt": 1, "reason": "late"})
    with pytest.raises(Conflict, match="is completed"):
        world.do(DEV, "run.cancelled", {"run": run, "reason": "late"})
    state = world.ledger.need(Run, run)
    assert (state.status, state.attempt, state.version) == ("completed", 1, 3)


def test_attempts_count_up_and_need_a_worker(world: MemoryLedger) -> None:
    run = str(uuid4())
    body = {
        "run": run, "name": "r", "datanets": [datanet(world)], "base_model": H, "base_id": "b",
        "config": {},
    }  # fmt: skip
    world.do(DEV, "run.requested", body)
    start = {"run": run, "attempt": 2, "submission_id": "s"}
    with pytest.raises(Conflict, match="attempt 1"):
        world.do(OPERATOR, "run.started", start)
    with pytest.raises(Forbidden, match="worker"):
        world.do(BEN, "run.started", {**start, "attempt": 1})
    world.do(OPERATOR, "role.granted", {"member": BEN.id, "role": "worker"})
    world.do(BEN, "run.started", {**start, "attempt": 1})
    world.do(BEN, "run.started", start)


def test_an_answer_is_paid_once_from_prepaid_money(world: MemoryLedger) -> None:
    name, run = adapter(world)
    policy(world)
    body = inference_body(name)
    with pytest.raises(Conflict, match="200 wei"):
        world.do(OPERATOR, "inference.recorded", inference_body(name, fee_wei="199"))
    inference = OPERATOR.sign("inference.recorded", body)
    fee = OPERATOR.sign("fee.charged", fee_body(body), id=fee_event_id(LOG, body["inference"]))
    with pytest.raises(PaymentRequired, match="prepaid balance 0"):
        world.ledger.append_all([inference, fee])
    deposit(world, 300)
    first, second = world.ledger.append_all([inference, fee])
    assert second.index == first.index + 1
    assert world.ledger.need(Account, EVE.id).prepaid_wei == 100
    with pytest.raises(InvalidEvent, match="id of this fee"):
        world.do(OPERATOR, "fee.charged", fee_body(body))
    share = {
        "inference": body["inference"], "adapter": name, "run": run, "method": "m",
        "index_sha256": H, "evidence_sha256": H,
        "shares": [{"contributor": ANN.id, "ppm": 999_999}], "unattributed_ppm": 1,
    }  # fmt: skip
    with pytest.raises(InvalidEvent, match="sum to 1000000"):
        world.do(OPERATOR, "attribution.recorded", {**share, "unattributed_ppm": 2})
    world.do(OPERATOR, "attribution.recorded", share)
    with pytest.raises(Conflict, match="attributed already"):
        world.do(OPERATOR, "attribution.recorded", share)


def test_an_answer_that_broke_off_costs_nothing_and_pays_nobody(world: MemoryLedger) -> None:
    name, run = adapter(world)
    policy(world)
    deposit(world, 300)
    whole = inference_body(name)
    body = {k: v for k, v in whole.items() if k not in ("finish_reason", "fee_wei")}
    body["reason"] = "crashed"
    with pytest.raises(Forbidden, match="operator"):
        world.do(EVE, "inference.interrupted", body)
    with pytest.raises(InvalidEvent, match="broke off"):
        world.do(OPERATOR, "inference.interrupted", {**body, "reason": "tired"})
    parts = ("amount", "protocol", "owner", "operator", "contributors")
    nothing = {f"{part}_wei": "0" for part in parts}
    with pytest.raises(Conflict, match="costs nothing"):
        world.ledger.append_all(
            [
                OPERATOR.sign("inference.interrupted", body),
                OPERATOR.sign(
                    "fee.charged", {**fee_body(whole), **nothing},
                    id=fee_event_id(LOG, whole["inference"]),
                ),
            ]
        )  # fmt: skip
    world.do(OPERATOR, "inference.interrupted", body)
    for type, again in (("inference.recorded", whole), ("inference.interrupted", body)):
        with pytest.raises(Conflict, match="already"):
            world.do(OPERATOR, type, again)
    share = {
        "inference": body["inference"], "adapter": name, "run": run, "method": "m",
        "index_sha256": H, "evidence_sha256": H, "shares": [], "unattributed_ppm": 1_000_000,
    }  # fmt: skip
    with pytest.raises(Conflict, match="broke off"):
        world.do(OPERATOR, "attribution.recorded", share)
    assert world.ledger.need(Account, EVE.id).prepaid_wei == 300


def test_nobody_takes_the_id_of_an_answer_that_is_under_way(world: MemoryLedger) -> None:
    """Its consumer learns it with the first token, long before it is recorded."""
    stranger = Actor(78)
    wanted = inference_id(LOG, stranger.id, "nonce")
    with pytest.raises(Forbidden, match="version 5"):
        world.do(stranger, "identity.registered", {"name": "squatter"}, id=wanted)


def test_a_fee_must_follow_the_policy_in_force(world: MemoryLedger) -> None:
    name, _ = adapter(world)
    policy(world)
    deposit(world, 1000)

    def charge(**changes: Any) -> None:
        body = inference_body(name)
        event_id = fee_event_id(LOG, body["inference"])
        recorded = OPERATOR.sign("inference.recorded", body)
        charged = OPERATOR.sign("fee.charged", fee_body(body, **changes), id=event_id)
        world.ledger.append_all([recorded, charged])

    with pytest.raises(Conflict, match="splits this fee"):
        charge(protocol_wei="60", owner_wei="0")
    with pytest.raises(Conflict, match="adapter's owner"):
        charge(owner=EVE.id)
    with pytest.raises(InvalidEvent, match="sum to amount_wei"):
        charge(owner_wei="1")
    charge()
    late = inference_body(name)
    world.do(OPERATOR, "inference.recorded", late)
    event_id = fee_event_id(LOG, late["inference"])
    with pytest.raises(Conflict, match="in the append that records"):
        world.do(OPERATOR, "fee.charged", fee_body(late), id=event_id)


def test_nobody_takes_an_id_that_the_ledger_will_need(world: MemoryLedger) -> None:
    """Ids of version 5 can be computed by anyone: squatting one would block the event it is for."""
    wanted = fee_event_id(LOG, str(uuid4()))
    stranger = Actor(77)
    with pytest.raises(Forbidden, match="version 5"):
        world.do(stranger, "identity.registered", {"name": "squatter"}, id=wanted)
    own = sender_id("mine", 1)
    appended = world.do(stranger, "identity.registered", {"name": "honest"}, id=own)
    again = stranger.sign("identity.registered", {"name": "honest"}, id=own, at=NOW + 1)
    with pytest.raises(Conflict, match="recorded already") as caught:
        world.append(again)
    assert caught.value.detail["replayed"] == str(own)
    with pytest.raises(Conflict, match=f"another event, at index {appended.index}") as caught:
        world.do(BEN, "identity.registered", {"name": "x"}, id=own)
    assert "replayed" not in caught.value.detail


def test_an_answer_that_costs_nothing_needs_no_deposit(world: MemoryLedger) -> None:
    name, _ = adapter(world)
    policy(world)
    body = inference_body(name, prompt_tokens=0, completion_tokens=0, fee_wei="0")
    zero = dict.fromkeys(
        ("amount_wei", "protocol_wei", "owner_wei", "operator_wei", "contributors_wei"), "0"
    )
    recorded = OPERATOR.sign("inference.recorded", body)
    charged = OPERATOR.sign(
        "fee.charged", fee_body(body, **zero), id=fee_event_id(LOG, body["inference"])
    )
    assert len(world.ledger.append_all([recorded, charged])) == 2


def test_an_upper_case_origin_is_a_ledger_too() -> None:
    keeper = Actor(1, log="Example.ORG/Log")
    ledger = Ledger(
        log="Example.ORG/Log", operator=keeper.id, clock=lambda: NOW, entries_of=lambda ids: {}
    )
    ledger.append(keeper.sign("ledger.opened", {"name": "x"}))
    ledger.append(keeper.sign("identity.registered", {"name": "x"}))


def test_a_period_can_be_abandoned_before_it_is_on_chain(world: MemoryLedger) -> None:
    world.do(OPERATOR, "period.cutoff", {"period": 1})
    world.do(OPERATOR, "period.abandoned", {"period": 1, "reason": "nobody to pay"})
    world.do(OPERATOR, "period.cutoff", {"period": 2})


def test_governance_cannot_lock_itself_out(world: MemoryLedger) -> None:
    own = {"member": OPERATOR.id, "role": "governance"}
    with pytest.raises(Conflict, match="last member"):
        world.do(OPERATOR, "role.revoked", own)
    world.do(OPERATOR, "role.granted", {**own, "member": BEN.id})
    world.do(OPERATOR, "role.revoked", own)


def test_one_append_cannot_repeat_an_id(world: MemoryLedger) -> None:
    raw = Actor(60).sign("identity.registered", {"name": "x"})
    with pytest.raises(InvalidEvent, match="same id"):
        world.ledger.append_all([raw, raw])


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\x00b", "bell\x07"])
def test_names_hold_no_control_characters(world: MemoryLedger, name: str) -> None:
    with pytest.raises(InvalidEvent, match="control characters"):
        world.do(Actor(61), "identity.registered", {"name": name})


def test_a_loaded_aggregate_is_not_replayed_again(world: MemoryLedger) -> None:
    policy(world)
    for n in range(2, 30):
        body = {"protocol_bps": 0, "owner_bps": 0, "operator_bps": 0, "contributors_bps": 10_000}
        world.do(OPERATOR, "fee_policy.set", {"version": n, **body})
    read: list[int] = []
    select = world.ledger.recorder.select_events

    def counted(*arguments: Any, **named: Any) -> Any:
        found = select(*arguments, **named)
        read.append(len(found))
        return found

    world.ledger.recorder.select_events = counted  # type: ignore[method-assign]
    governance = world.ledger.need(Governance)
    assert governance.policy is not None
    assert governance.policy.version == 29
    assert sum(read) <= 1


def test_shares_come_from_the_index_of_the_run(world: MemoryLedger) -> None:
    name, run = adapter(world)
    body = inference_body(name)
    world.do(OPERATOR, "inference.recorded", body)
    share = {
        "inference": body["inference"], "adapter": name, "run": run, "method": "m",
        "index_sha256": "cd" * 32, "evidence_sha256": H,
        "shares": [{"contributor": ANN.id, "ppm": 1_000_000}], "unattributed_ppm": 0,
    }  # fmt: skip
    with pytest.raises(Conflict, match="attribution index"):
        world.do(OPERATOR, "attribution.recorded", share)


def test_periods_go_one_at_a_time(world: MemoryLedger) -> None:
    with pytest.raises(Conflict, match="next period is 1"):
        world.do(OPERATOR, "period.cutoff", {"period": 2})
    world.do(OPERATOR, "period.cutoff", {"period": 1})
    closed = {
        "period": 1, "log_size": 9, "root": HEX, "total_wei": "5", "accounts": 1, "tree_sha256": H,
    }  # fmt: skip
    with pytest.raises(Conflict, match="is cutoff"):
        world.do(OPERATOR, "payout.activated", {"period": 1, "root": HEX, **CHAIN})
    world.do(OPERATOR, "period.closed", closed)
    other = "0x" + "00" * 32
    with pytest.raises(Conflict, match="closed with root"):
        world.do(OPERATOR, "payout.proposed", {"period": 1, "root": other, **CHAIN})
    world.do(OPERATOR, "payout.proposed", {"period": 1, "root": HEX, **CHAIN})
    with pytest.raises(Conflict, match="proposed"):
        world.do(OPERATOR, "period.cutoff", {"period": 2})
    world.do(OPERATOR, "payout.activated", {"period": 1, "root": HEX, **CHAIN})
    world.do(OPERATOR, "period.cutoff", {"period": 2})


def test_claims_and_anchors_only_grow(world: MemoryLedger) -> None:
    claim = {
        "address": ADDRESS, "amount_wei": "5", "cumulative_wei": "5", **CHAIN, "log_index": 3,
    }  # fmt: skip
    world.do(OPERATOR, "payout.claimed", claim, id=chain_event_id("claim", 1, HEX, 3))
    with pytest.raises(Conflict, match="claimed 5 wei before"):
        world.do(
            OPERATOR,
            "payout.claimed",
            {**claim, "log_index": 4},
            id=chain_event_id("claim", 1, HEX, 4),
        )
    anchor = {"size": 8, "root": H, **CHAIN, "block_hash": HEX, "l1_sha256": H}
    world.do(OPERATOR, "checkpoint.anchored", anchor)
    with pytest.raises(Conflict, match="size 8"):
        world.do(OPERATOR, "checkpoint.anchored", anchor)


def test_gates_guard_facts_outside_the_ledger() -> None:
    def gate(event: Any) -> None:
        raise InvalidEvent("the EVM signature is not by that address")

    world = MemoryLedger(gates={"identity.evm_bound": gate})
    with pytest.raises(InvalidEvent, match="EVM signature"):
        world.do(ANN, "identity.evm_bound", {"address": ADDRESS, "signature": "0x00"})
