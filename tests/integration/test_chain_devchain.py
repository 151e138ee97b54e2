"""The development chain: owned once, survives kills, leaves nothing behind. Real anvil."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ledger.chain.client import ChainClient
from ledger.chain.deploy import deploy_all, load_deployments
from ledger.chain.devchain import DevChain, _best_block, _keep_first_genesis
from ledger.errors import ChainError, ConfigError
from tests.chain_world import ORIGIN, new_client, new_world

ROOT = Path(__file__).parents[2]
ACCOUNT = "0x" + "ab" * 20


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def until_gone(pid: int, timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(pid)


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert until_gone(pid)


def owner_process(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Another process that owns a chain in `folder`, and its anvil's pid."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from ledger.chain.devchain import DevChain\n"
        f"chain = DevChain(Path({str(folder)!r})).start()\n"
        f"chain.fund({ACCOUNT!r}, 77)\nchain.save()\n"
        "print(chain.pid, flush=True)\ntime.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert owner.stdout is not None
    return owner, int(owner.stdout.readline())


def test_a_second_owner_is_refused_and_a_stop_is_clean(tmp_path: Path) -> None:
    chain = DevChain(tmp_path).start()
    try:
        pid = chain.pid
        assert pid is not None
        assert chain.alive
        with pytest.raises(ChainError, match="another process runs"):
            DevChain(tmp_path).start()
    finally:
        chain.stop()
    assert not running(pid)
    assert chain.pid is None
    assert not chain.alive
    chain.stop()  # a second time is no error


def test_a_killed_owner_leaves_no_anvil_and_its_state_is_found(tmp_path: Path) -> None:
    owner, pid = owner_process(tmp_path)
    owner.kill()
    owner.wait()
    with DevChain(tmp_path) as chain:  # at once: it has to wait for the guard of the dead owner
        assert ChainClient(chain.rpc_url).balance(ACCOUNT) == 77
        assert not running(pid)


def test_an_anvil_whose_guard_was_killed_too_is_ended(tmp_path: Path) -> None:
    owner, pid = owner_process(tmp_path)
    stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    os.kill(int(stat[1]), signal.SIGKILL)  # its parent, the guard
    owner.kill()
    owner.wait()
    with DevChain(tmp_path) as chain:
        assert until_gone(pid)
        assert ChainClient(chain.rpc_url).balance(ACCOUNT) == 77


def test_a_stranger_with_the_recorded_pid_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "anvil.pid").write_text(str(stranger.pid))
        with DevChain(tmp_path):
            assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_what_was_saved_survives_kill_9_and_a_half_written_state(tmp_path: Path) -> None:
    chain = DevChain(tmp_path / "chain").start()
    try:
        world = new_world(chain, tmp_path)  # deploy_all saves at its end
        port, block = chain.port, world.client.head()
        kill(chain.pid)
        # What a kill in the middle of anvil's own write would leave.
        chain.state_path.write_bytes(chain.saved_path.read_bytes()[:1000])
        chain.start()
        assert chain.port == port, "clients keep their address"
        assert world.client.head() == block
        again = load_deployments(world.client, tmp_path, origin=ORIGIN)
        assert again == world.deployments
    finally:
        chain.stop()


def test_many_may_save_at_once_and_none_takes_the_chain_back(tmp_path: Path) -> None:
    def mine_and_save(port: int) -> None:
        chain = DevChain(tmp_path)  # as another process of the home sees it
        chain.port = port
        client = ChainClient(chain.rpc_url)
        for _ in range(10):
            chain.mine()
            mined = client.head()
            chain.save()
            assert (_best_block(chain.saved_path) or 0) >= mined

    with DevChain(tmp_path) as chain, ThreadPoolExecutor(3) as pool:
        list(pool.map(mine_and_save, [chain.port] * 3))


def test_deploying_again_finds_everything_and_a_reset_is_named(tmp_path: Path) -> None:
    with DevChain(tmp_path / "one") as chain:
        client = new_client(chain, tmp_path / "owner.key")
        assert load_deployments(client, tmp_path, origin=ORIGIN) is None
        first = deploy_all(client, tmp_path, origin=ORIGIN, challenge_window_s=1)
        nonce = client.nonce()
        assert deploy_all(client, tmp_path, origin=ORIGIN, challenge_window_s=1) == first
        assert client.nonce() == nonce, "nothing was sent"
        with pytest.raises(ConfigError, match="another state folder"):
            deploy_all(client, tmp_path, origin="log.example/other", challenge_window_s=1)
        assert first.outdated == ()
    time.sleep(1)  # another genesis second
    with DevChain(tmp_path / "two") as chain:
        client = new_client(chain, tmp_path / "owner.key")
        with pytest.raises(ChainError, match="the chain was reset"):
            deploy_all(client, tmp_path, origin=ORIGIN, challenge_window_s=1)


def test_one_genesis_across_restarts(tmp_path: Path) -> None:
    chain = DevChain(tmp_path / "chain").start()
    try:
        world = new_world(chain, tmp_path)
        for _ in range(3):
            time.sleep(1.05)  # anvil makes a genesis of the new second at each start
            chain.stop()
            chain.start()
            client = ChainClient(chain.rpc_url, key_file=world.key_file)
            assert load_deployments(client, tmp_path, origin=ORIGIN) == world.deployments
    finally:
        chain.stop()


@pytest.mark.parametrize("order", [(5, 9, 7), (9, 7, 5), (7, 5, 9)])
def test_the_earliest_genesis_of_a_dump_is_kept(tmp_path: Path, order: tuple[int, ...]) -> None:
    # Which of two blocks 0 answers after a load is chance; so the file is looked at, not anvil.
    def block(number: int, timestamp: int) -> dict[str, Any]:
        return {"header": {"number": hex(number), "timestamp": hex(timestamp)}}

    path = tmp_path / "state.json"
    blocks = [block(1, 6), *(block(0, timestamp) for timestamp in order), block(2, 8)]
    path.write_text(json.dumps({"best_block_number": 2, "blocks": blocks, "accounts": {"a": 1}}))
    _keep_first_genesis(path)
    kept = json.loads(path.read_text())
    assert kept["blocks"] == [block(1, 6), block(0, 5), block(2, 8)]
    assert (kept["best_block_number"], kept["accounts"]) == (2, {"a": 1})


class Killed(Exception):
    pass


def deploy_killed_at(client: ChainClient, folder: Path, at: int, moment: str) -> None:
    """A deployment that dies just before or just after it sends contract number `at`."""
    calls = 0
    real = client.broadcast_creation

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        sent = real(*arguments, **options) if calls < at or moment == "after" else None
        if calls == at:
            raise Killed
        return sent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "broadcast_creation", dying)
        with pytest.raises(Killed):
            deploy_all(client, folder, origin=ORIGIN, challenge_window_s=1)


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_deployment_killed_at_any_contract_is_finished_not_repeated(
    tmp_path: Path, at: int, moment: str, chain: DevChain
) -> None:
    client = new_client(chain, tmp_path / "owner.key")
    deploy_killed_at(client, tmp_path, at, moment)
    deploy_all(client, tmp_path, origin=ORIGIN, challenge_window_s=1)
    assert client.nonce() == 4, "four contracts, four transactions"


def test_a_creation_in_flight_is_adopted(tmp_path: Path) -> None:
    with DevChain(tmp_path / "slow", block_time_s=1) as slow:
        client = new_client(slow, tmp_path / "owner.key")
        deploy_killed_at(client, tmp_path, 1, "after")
        deploy_all(client, tmp_path, origin=ORIGIN, challenge_window_s=1)
        assert client.nonce() == 4


def test_no_node_is_a_designed_error() -> None:
    client = ChainClient("http://127.0.0.1:1")
    with pytest.raises(ChainError, match="no answer from the EVM node"):
        client.head()


def test_sending_without_a_key_names_the_setting(chain: DevChain) -> None:
    with pytest.raises(ConfigError, match="key"):
        ChainClient(chain.rpc_url).nonce()


def test_a_bad_key_file_does_not_leak_its_content(tmp_path: Path) -> None:
    path = tmp_path / "bad.key"
    path.write_text("0xsecret")
    with pytest.raises(ConfigError) as caught:
        ChainClient("http://127.0.0.1:1", key_file=path)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with DevChain(tmp_path_factory.mktemp("chain")) as running_chain:
        yield running_chain


def test_many_restarts_keep_one_genesis(tmp_path: Path) -> None:
    """anvil adds a genesis block to its state at each start; which one answers is then chance."""
    seen = set()
    for _ in range(8):
        with DevChain(tmp_path) as chain:
            client = ChainClient(chain.rpc_url)
            seen.add(client.block_hash(0))
            chain.mine()
    assert len(seen) == 1
