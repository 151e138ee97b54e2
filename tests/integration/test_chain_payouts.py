"""The money's way on a real chain: deposit, release, propose, activate, claim; and the watcher."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ledger.chain.client import ChainClient
from ledger.chain.devchain import DevChain
from ledger.chain.payouts import Payouts, PayoutTree, build_payout_tree
from ledger.chain.watcher import (
    Activated,
    ChainEvent,
    Claimed,
    Cursor,
    Deposited,
    Proposed,
    Released,
    Vetoed,
    Watcher,
)
from ledger.errors import ChainError, InvalidEvent
from tests.chain_world import World, new_world

ACTOR = "ed25519:" + "5a" * 32
ALICE, BOB = "0x" + "a1" * 20, "0x" + "b0" * 20
WINDOW_S = 100


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevChain]:
    with DevChain(tmp_path_factory.mktemp("chain")) as running_chain:
        yield running_chain


@pytest.fixture
def world(chain: DevChain, tmp_path: Path) -> World:
    return new_world(chain, tmp_path, window_s=WINDOW_S)


@pytest.fixture
def payouts(world: World) -> Payouts:
    return Payouts(world.client, world.deployments)


def run_period(world: World, payouts: Payouts, period: int, amounts: dict[str, int]) -> PayoutTree:
    """Deposit and release what the tree adds, propose, wait, activate."""
    tree = build_payout_tree(amounts)
    added = tree.total - payouts.active().total
    payouts.deposit(ACTOR, added)
    payouts.release(period, added)
    payouts.propose(period, tree.root, tree.total, 10 * period)
    world.chain.advance(WINDOW_S)
    payouts.activate(period)
    return tree


def test_two_periods_end_to_end(world: World, payouts: Payouts) -> None:
    first = run_period(world, payouts, 1, {ALICE: 700, BOB: 300})
    assert payouts.active().root == first.root
    assert payouts.active().log_size == 10
    assert payouts.claim(ALICE, 700, first.proof(ALICE)) is not None
    assert payouts.claim(ALICE, 700, first.proof(ALICE)) is None, "claiming twice pays once"
    second = run_period(world, payouts, 2, {ALICE: 900, BOB: 350})
    for account in (ALICE, BOB):
        payouts.claim(account, second.amount(account), second.proof(account))
        assert payouts.claimed(account) == second.amount(account)
        assert payouts.token_balance(account) == second.amount(account)
    assert payouts.total_claimed() == second.total == 1250
    assert payouts.escrowed() == 0


def test_a_second_claim_reverts_in_the_contract(world: World, payouts: Payouts) -> None:
    tree = run_period(world, payouts, 1, {ALICE: 700, BOB: 300})
    contract = world.client.contract("PayoutDistributor", world.deployments.distributor)
    account = contract.w3.to_checksum_address(ALICE)
    call = contract.functions.claim(account, 700, list(tree.proof(ALICE)))
    world.client.send(call)
    with pytest.raises(ChainError) as caught:
        world.client.send(call)
    assert caught.value.detail["error"] == "NothingToClaim"
    with pytest.raises(ChainError) as caught:
        payouts.claim(BOB, 301, tree.proof(BOB))
    assert caught.value.detail["error"] == "InvalidProof"


def test_each_step_may_be_repeated(world: World, payouts: Payouts) -> None:
    tree = build_payout_tree({ALICE: 5})
    payouts.deposit(ACTOR, 5)
    assert payouts.release(1, 5) is not None
    assert payouts.release(1, 5) is None
    with pytest.raises(ChainError, match="released once"):
        payouts.release(1, 4)
    assert payouts.propose(1, tree.root, tree.total, 7) is not None
    assert payouts.propose(1, tree.root, tree.total, 7) is None
    assert 0 < payouts.seconds_left() <= WINDOW_S
    with pytest.raises(ChainError) as caught:
        payouts.activate(1)
    assert caught.value.detail["error"] == "WindowOpen"
    world.chain.advance(WINDOW_S)
    assert payouts.seconds_left() == 0
    assert payouts.activate(1) is not None
    assert payouts.activate(1) is None
    assert payouts.propose(1, tree.root, tree.total, 7) is None


def test_an_uncovered_root_waits_for_its_money(world: World, payouts: Payouts) -> None:
    tree = build_payout_tree({ALICE: 5})
    payouts.propose(1, tree.root, 5, 7)
    world.chain.advance(WINDOW_S)
    with pytest.raises(ChainError) as caught:
        payouts.activate(1)
    assert caught.value.detail["error"] == "Underfunded"
    payouts.deposit(ACTOR, 5)
    payouts.release(1, 5)
    assert payouts.activate(1) is not None


def test_the_watcher_reads_everything_in_order_and_once(world: World, payouts: Payouts) -> None:
    tree = build_payout_tree({ALICE: 4, BOB: 6})
    wrong = build_payout_tree({ALICE: 10})
    payouts.propose(1, wrong.root, 10, 5)
    payouts.veto(1)
    run_period(world, payouts, 1, {ALICE: 4, BOB: 6})
    payouts.claim(BOB, 6, tree.proof(BOB))

    watcher = Watcher(world.client, world.deployments)
    batch = watcher.poll(watcher.start())
    kinds = [type(event) for event in batch.events]
    assert kinds == [Proposed, Vetoed, Deposited, Released, Proposed, Activated, Claimed]
    assert [(e.block, e.log_index) for e in batch.events] == sorted(
        (e.block, e.log_index) for e in batch.events
    )
    deposit, claim = batch.events[2], batch.events[-1]
    assert isinstance(deposit, Deposited)
    assert (deposit.actor, deposit.amount, deposit.deposit_id) == (ACTOR, 10, 0)
    assert deposit.sender == world.client.address.lower()
    assert isinstance(claim, Claimed)
    assert (claim.account, claim.amount, claim.cumulative) == (BOB, 6, 6)
    assert watcher.poll(batch.cursor).events == ()

    # One block at a time, the cursor through its text form: the same events.
    cursor, stepwise = watcher.start(), list[ChainEvent]()
    while (step := watcher.poll(cursor, max_blocks=1)).cursor != cursor:
        stepwise += step.events
        cursor = Cursor.parse(str(step.cursor))
    assert tuple(stepwise) == batch.events
    assert cursor == batch.cursor

    payouts.claim(ALICE, 4, tree.proof(ALICE))
    (later,) = watcher.poll(cursor).events
    assert isinstance(later, Claimed)
    assert later.account == ALICE


def test_a_deep_reorganisation_stops_the_watcher(world: World, payouts: Payouts) -> None:
    snapshot = world.client.rpc("evm_snapshot")
    payouts.deposit(ACTOR, 5)
    watcher = Watcher(world.client, world.deployments)
    cursor = watcher.poll(watcher.start()).cursor
    world.client.rpc("evm_revert", snapshot)
    with pytest.raises(ChainError, match="the chain ends at"):
        watcher.poll(cursor)
    world.chain.mine(5)
    with pytest.raises(ChainError, match="reorganisation deeper"):
        watcher.poll(cursor)
    # With confirmations the deposit would not have been read before it was safe.
    patient = Watcher(
        ChainClient(world.chain.rpc_url, confirmations=12), replace(world.deployments)
    )
    assert patient.poll(patient.start()).cursor.block < cursor.block


@pytest.mark.parametrize("text", ["", "x", "1:zz", "1"])
def test_what_is_no_cursor(text: str) -> None:
    if text == "1":
        assert Cursor.parse(text) == Cursor(block=1)
        return
    with pytest.raises(InvalidEvent):
        Cursor.parse(text)


def test_two_processes_with_one_key_do_not_collide(world: World) -> None:
    from concurrent.futures import ThreadPoolExecutor

    clients = [ChainClient(world.chain.rpc_url, key_file=world.key_file) for _ in range(4)]
    token = [c.contract("WOPEN", world.deployments.wopen) for c in clients]

    def wrap(i: int) -> int:
        return clients[i % 4].send(token[i % 4].functions.deposit(), value=1).block_number

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(wrap, range(16)))
    assert Payouts(world.client, world.deployments).token_balance(world.client.address) == 16
