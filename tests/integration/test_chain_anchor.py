"""Commits with real RFC 9162 proofs, the anchorer killed between any two steps, the L1 proof."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ledger.chain.anchorer import STEPS, Anchorer, AnchorRecord
from ledger.chain.client import ChainClient, event_topic
from ledger.chain.devchain import DevChain
from ledger.chain.watcher import Committed, Watcher
from ledger.errors import ChainError, Inconsistent, VerificationError
from ledger.verify.l1 import verify_l1
from tests.chain_world import SmallLog, World, entry_of, new_world

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(chain: DevChain, tmp_path: Path) -> World:
    """Contracts of this test's own, with an owner of their own, on the module's chain."""
    return new_world(chain, tmp_path)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevChain]:
    with DevChain(tmp_path_factory.mktemp("chain")) as running_chain:
        yield running_chain


def anchorer(world: World, log: SmallLog, **options: Any) -> Anchorer:
    return Anchorer(
        options.pop("client", world.client),
        contract=world.deployments.anchor,
        first_block=world.deployments.block,
        source=log,
        verify=verify_l1,
        **options,
    )


def anchor(world: World, log: SmallLog, recorded: int = 0) -> AnchorRecord:
    record = anchorer(world, log).run(recorded)
    assert record is not None
    return record


def commits(world: World) -> list[int]:
    """Sizes of all Committed events of this world's contract."""
    topic = "0x" + event_topic("CheckpointAnchor", "Committed").hex()
    logs = world.client.logs([world.deployments.anchor], [topic], 0, world.client.head())
    return [int(log["topics"][1], 16) for log in logs]


def raw_commit(world: World, log: SmallLog, size: int, /, **changed: Any) -> None:
    """A commit with some arguments replaced; raises what the contract says."""
    held = anchorer(world, log).anchored().size
    arguments = {
        "size": size,
        "root": log.root(size),
        "consistency": log.consistency_proof(held, size) if 0 < held < size else [],
        "entry": log.entry(size - 1),
        "inclusion": log.inclusion_proof(size - 1, size),
        **changed,
    }
    contract = world.client.contract("CheckpointAnchor", world.deployments.anchor)
    world.client.send(contract.functions.commit(*arguments.values()))


def test_a_growing_log_is_anchored_and_proven(world: World) -> None:
    log = SmallLog()
    recorded = 0
    for size in (1, 2, 3, 7, 8, 40, 41, 100):
        record = anchor(world, log.grow(size), recorded)
        assert (record.size, record.root) == (size, log.root(size))
        assert record.note == b"note %d" % size
        facts = verify_l1(record.l1, size=size, root=log.root(size))
        assert facts["chain_id"] == world.client.chain_id
        assert facts["contract"] == world.deployments.anchor.lower()
        assert facts["block_hash"] == "0x" + record.block_hash.hex()
        recorded = size
        assert anchorer(world, log).run(recorded) is None
    assert commits(world) == [1, 2, 3, 7, 8, 40, 41, 100]


def test_every_step_is_observed_in_order(world: World) -> None:
    seen: list[str] = []
    anchorer(world, SmallLog.of(3), observe=seen.append).run(0)
    assert tuple(seen) == STEPS


def test_a_forked_log_is_refused_by_the_contract(world: World) -> None:
    anchor(world, SmallLog.of(9))
    forked = SmallLog.of(4).grow(20, "other history")
    with pytest.raises(ChainError) as caught:
        anchorer(world, forked).run(9)
    assert caught.value.detail["error"] == "NotAnExtension"
    assert commits(world) == [9]


def test_contradictions_send_nothing(world: World) -> None:
    anchor(world, SmallLog.of(9))
    nonce = world.client.nonce()
    with pytest.raises(Inconsistent, match="forked"):
        anchorer(world, SmallLog.of(9, "other")).run(9)
    with pytest.raises(Inconsistent, match="forked"):
        anchorer(world, SmallLog.of(12, "other")).run(0)
    with pytest.raises(Inconsistent, match="lost entries"):
        anchorer(world, SmallLog.of(8)).run(9)
    assert world.client.nonce() == nonce


def test_what_the_contract_refuses(world: World) -> None:
    log = SmallLog.of(30)
    anchor(world, SmallLog.of(9))
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("WrongSize", 20, {"size": 21}),
        ("NotTheLastEntry", 20, {"entry": entry_of(19, "forged")}),
        ("NotTheLastEntry", 20, {"entry": b"short"}),
        ("NotTheLastEntry", 20, {"inclusion": []}),
        ("NotAnExtension", 20, {"consistency": []}),
        ("NotAnExtension", 20, {"root": bytes(32)}),
        ("Rollback", 8, {}),
        ("Fork", 9, {"root": bytes(32)}),
    ]
    for error, size, changed in cases:
        with pytest.raises(ChainError) as caught:
            raw_commit(world, log, size, **changed)
        assert caught.value.detail["error"] == error, (error, str(caught.value))
    raw_commit(world, log, 9)  # the same pair again is no error
    raw_commit(world, log, 20)
    assert commits(world) == [9, 20]


def test_another_sender_is_refused(world: World, chain: DevChain, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = new_world(chain, tmp_path / "other")
    with pytest.raises(ChainError) as caught:
        anchorer(world, SmallLog.of(3), client=other.client).run(0)
    assert caught.value.detail["error"] == "NotCommitter"


def test_any_flipped_byte_of_the_l1_section_fails(world: World) -> None:
    log = SmallLog.of(5)
    record = anchor(world, log)
    checked = 0
    for path, text in hex_fields(record.l1):
        for at in range(2, len(text), 2):
            flipped = f"{int(text[at : at + 2], 16) ^ 1 << at // 2 % 8:02x}"
            section = replaced(record.l1, path, text[:at] + flipped + text[at + 2 :])
            with pytest.raises(VerificationError):
                verify_l1(section, size=5, root=record.root)
            checked += 1
    assert checked > 1000
    with pytest.raises(VerificationError):
        verify_l1({**record.l1, "block_number": 1}, size=5, root=record.root)


def hex_fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from hex_fields(member, (*path, key))
    elif isinstance(value, list):
        for i, member in enumerate(value):
            yield from hex_fields(member, (*path, i))


def replaced(value: Any, path: tuple[Any, ...], new: str) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def run_killed_before(world: World, size: int, step: str, recorded: int) -> None:
    """An anchorer process that kills itself, with SIGKILL, when it comes to `step`."""
    code = f"""
import os, signal
from pathlib import Path
from ledger.chain.anchorer import Anchorer
from ledger.chain.client import ChainClient
from ledger.verify.l1 import verify_l1
from tests.chain_world import SmallLog
def observe(step):
    if step == {step!r}:
        os.kill(os.getpid(), signal.SIGKILL)
client = ChainClient({world.client.rpc_url!r}, key_file=Path({str(world.key_file)!r}))
Anchorer(client, contract={world.deployments.anchor!r}, first_block=0,
         source=SmallLog.of({size}), verify=verify_l1, observe=observe).run({recorded})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_killed_between_any_two_steps_it_resumes_and_sends_once(world: World) -> None:
    recorded = 0
    for i, step in enumerate(STEPS):
        size = 3 + 4 * i
        run_killed_before(world, size, step, recorded)
        sent_before = world.client.nonce()
        record = anchor(world, SmallLog.of(size), recorded)
        assert record.size == size
        if STEPS.index(step) > STEPS.index("send"):
            assert world.client.nonce() == sent_before, "the mined commit was found, not repeated"
        # Killed again after handing the record out: the same key, so the append is a replay.
        assert anchor(world, SmallLog.of(size), recorded).key == record.key
        recorded = size
    assert commits(world) == [3 + 4 * i for i in range(len(STEPS))]


def test_a_commit_in_flight_is_waited_for(tmp_path: Path) -> None:
    with DevChain(tmp_path / "slow", block_time_s=1) as slow:
        world = new_world(slow, tmp_path)
        run_killed_before(world, 6, "confirm", 0)  # broadcast, not mined yet
        sent = world.client.nonce()
        assert anchor(world, SmallLog.of(6)).size == 6
        assert commits(world) == [6]
        assert world.client.nonce() == sent, "not sent a second time"


def test_anchors_survive_kill_9_of_the_node(tmp_path: Path) -> None:
    chain = DevChain(tmp_path / "chain").start()
    try:
        world = new_world(chain, tmp_path)
        log = SmallLog.of(5)
        first = anchor(world, log)
        assert chain.pid is not None
        os.kill(chain.pid, signal.SIGKILL)
        while chain.alive:
            time.sleep(0.01)
        with pytest.raises(ChainError):
            anchorer(world, log).run(5)
        chain.start()
        assert anchorer(world, log).run(5) is None, "still anchored"
        again = anchor(world, log, recorded=0)
        assert (again.key, again.block_hash) == (first.key, first.block_hash)
        second = anchor(world, log.grow(11), recorded=5)
        verify_l1(second.l1, size=11, root=log.root(11))
        # An older block's state is gone after the restart; the newest block proves the pair.
        chain.mine()
        chain.stop()
        chain.start()
        world = replace(world, client=ChainClient(chain.rpc_url, key_file=world.key_file))
        verify_l1(anchor(world, log, recorded=5).l1, size=11, root=log.root(11))
    finally:
        chain.stop()


def test_confirmations_are_waited_for(world: World, chain: DevChain) -> None:
    client = ChainClient(
        chain.rpc_url, key_file=world.key_file, confirmations=3, receipt_timeout_s=0.5
    )
    log = SmallLog.of(4)
    with pytest.raises(ChainError, match="3 confirmations"):
        anchorer(world, log, client=client).run(0)
    watcher = Watcher(client, world.deployments)
    assert not any(isinstance(e, Committed) for e in watcher.poll(watcher.start()).events)
    chain.mine(2)
    record = anchorer(world, log, client=client).run(0)
    assert record is not None
    assert record.size == 4
    (event,) = watcher.poll(watcher.start()).events
    assert isinstance(event, Committed)
    assert (event.size, event.root, event.tx_hash) == (4, record.root, record.tx_hash)
