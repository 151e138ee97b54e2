"""`tributary monitor` for real: the service over HTTP through growth and restarts, a static log
that turns bad, a forked anchor on a real chain, metrics, exit codes."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from ledger.chain.anchorer import Anchorer
from ledger.chain.devchain import DevChain
from ledger.log.add_checkpoint import AddCheckpoint, format_request
from ledger.processes.anchors import anchor_reader
from ledger.verify.evidence import check_evidence
from ledger.verify.l1 import verify_l1
from ledger.verify.note import format_vkey
from tests.api_world import LOG as API_LOG
from tests.api_world import service
from tests.chain_world import SmallLog, World, new_world
from tests.unit.monitor_world import (
    VKEY,
    DictSource,
    entries,
    entry,
    kept,
    log_files,
    monitor,
    write_files,
)
from tests.witness_world import served, witness_at

COMMAND = "from ledger.cli.main import main; main()"
WAIT_S = 30.0


def tributary(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def static(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_the_service_is_followed_through_growth(pg_url: str, tmp_path: Path) -> None:
    with service(pg_url, tmp_path / "home", None) as api:  # type: ignore[arg-type]
        state = tmp_path / "state"
        first = tributary("monitor", api.url, "--once", "--state", state, "--json")
        assert first.returncode == 0, first.stderr
        found = json.loads(first.stdout)
        assert (found["size"], found["alarms"]) == (api.size, [])
        assert found["entries"] == api.size
        assert "The key comes from the log itself" in first.stderr
        for _ in range(3):
            api.client("owner").append("datanet.created", net())
        api.settle()
        again = tributary("monitor", f"{api.url}/log", "--once", "--state", state, "--json")
        assert (again.returncode, again.stderr) == (0, ""), "its key is known by now"
        assert json.loads(again.stdout)["grown"] == 3
        named = tributary("monitor", api.url, "--once", "--state", state, "--key", vkey(state))
        assert named.returncode == 0, named.stderr
        assert re.search(rf"fine: {api.size} entries \(\+0, 0 read\)", named.stdout)
        assert API_LOG in vkey(state)
    gone = tributary("monitor", api.url, "--once", "--state", state)
    assert gone.returncode == 7
    assert "does not answer" in gone.stderr


def net() -> dict[str, Any]:
    text = {"name": "n", "description": "", "licence": "CC0-1.0"}
    return {"datanet": str(uuid4()), "reviewers": [], **text}


def vkey(state: Path) -> str:
    return str(json.loads((state / "monitor.json").read_bytes())["vkey"])


def test_a_static_log_turns_bad_while_it_is_watched(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    write_files(folder, log_files(entries(300)))
    words = ["--key", format_vkey(VKEY), "--state", str(tmp_path / "state")]
    with static(folder) as url:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "monitor", url, *words, "--interval", "0.1",
             "--metrics-port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stderr
            where = re.search(r"http\S+", process.stderr.readline())
            assert where

            def metrics() -> str:
                return httpx.get(where[0]).text

            wait_for(lambda: 'monitor_size{log="log.example/monitored"} 300.0' in metrics(), "300")
            write_files(folder, log_files(entries(600)))
            wait_for(lambda: 'monitor_size{log="log.example/monitored"} 600.0' in metrics(), "600")
            assert re.search(r"monitor_entries_total\{\S+ 600.0", metrics())
            assert re.search(r"monitor_reachable\{\S+ 1.0", metrics())
            assert re.search(r'monitor_alarms_total\{kind="split-view",\S+ 0.0', metrics())
            write_files(folder, log_files([entry(0, name="x"), *entries(700)[1:]]))
            output, errors = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "fine: 600 entries" in output
    assert "ALARM inconsistent" in errors
    [file] = (tmp_path / "state" / "evidence").glob("*.json")
    assert f"evidence: {file} (proves it to anybody" in errors
    assert "now: Stop relying on this log" in errors

    checked = tributary("evidence", "check", file, "--key", format_vkey(VKEY))
    assert checked.returncode == 0
    assert checked.stdout.startswith("PROVEN: inconsistent by log.example/monitored")
    assert json.loads(tributary("evidence", "check", file, "--json").stdout)["facts"]["conclusive"]
    file.write_bytes(file.read_bytes().replace(b'"found_at":1', b'"found_at":2'))
    assert tributary("evidence", "check", file).returncode == 0, "the finder's word, as it says"
    data = json.loads(file.read_bytes())
    data["items"]["nodes"] = data["items"]["checkpoint_1"]
    file.write_text(json.dumps(data, separators=(",", ":"), sort_keys=True, ensure_ascii=False))
    refused = tributary("evidence", "check", file)
    assert (refused.returncode, refused.stdout) == (1, "")


def test_without_a_key_or_with_wrong_words(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    write_files(folder, log_files(entries(3)))
    state = ["--once", "--state", tmp_path / "state"]
    for words, code, said in (
        ([folder, *state], 8, "give --key"),
        ([folder, *state, "--key", "nonsense"], 8, "--key"),
        ([folder, *state, "--key", format_vkey(VKEY), "--contract", "0x1"], 8, "needs --rpc"),
        ([folder, *state, "--key", format_vkey(VKEY), "--policy", folder], 8, "cannot read"),
        ([tmp_path / "nowhere", *state, "--key", format_vkey(VKEY)], 7, "no log here"),
        ([folder, *state, "--key", format_vkey(VKEY)], 0, ""),
        ([folder, *state], 0, ""),
    ):
        found = tributary("monitor", *words)
        assert (found.returncode, said in found.stderr) == (code, True), (words, found.stderr)
    policy = tmp_path / "policy"
    policy.write_text(f"log {format_vkey(VKEY)}\nquorum none\n")
    found = tributary("monitor", folder, "--once", "--state", tmp_path / "b", "--policy", policy)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_signal_ends_it_in_order(tmp_path: Path) -> None:
    write_files(tmp_path / "log", log_files(entries(3)))
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "monitor", str(tmp_path / "log"), "--key",
         format_vkey(VKEY), "--state", str(tmp_path / "state")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert "fine: 3 entries" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0


def test_killed_at_any_time_it_goes_on(tmp_path: Path) -> None:
    held = entries(6_000)
    folder, state = tmp_path / "log", tmp_path / "state"
    write_files(folder, log_files(held[:5_000]))
    words = ["monitor", folder, "--key", format_vkey(VKEY), "--state", state, "--interval", "0.1"]
    small = "import ledger.log.monitor_growth as room; room.PROGRESS_ENTRIES = 512; "
    for pause_s in (0.0, 0.1, 0.25):
        process = subprocess.Popen(
            [sys.executable, "-c", small + COMMAND, *map(str, words)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for((state / "lock").exists, "the monitor to start")
        wait_for(lambda: (state / "monitor.json").exists(), "the first write")
        time.sleep(pause_s)
        process.kill()
        process.wait(WAIT_S)
    write_files(folder, log_files(held))
    found = tributary(*words, "--once", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["size"] == len(held)


def test_a_witness_that_was_shown_another_log_convicts_it(tmp_path: Path) -> None:
    forked = log_files([entry(0, name="x"), *entries(9)[1:]])
    write_files(tmp_path / "log", log_files(entries(20)))
    state = tmp_path / "state"
    with witness_at(tmp_path / "witness", logs=(VKEY,)) as witness, served(witness) as url:
        ask = AddCheckpoint(old_size=0, proof=(), checkpoint=forked["checkpoint"])
        assert httpx.post(f"{url}/add-checkpoint", content=format_request(ask)).status_code == 200
        policy = tmp_path / "policy"
        log = f"log {format_vkey(VKEY)}"
        policy.write_text(f"{log}\nwitness w {witness.vkey_text} {url}\nquorum none\n")
        words = ["monitor", tmp_path / "log", "--once", "--policy", policy, "--state", state]
        found = tributary(*words)
        assert found.returncode == 1, found.stderr
        assert "showed a witness a tree of 9 entries that ours does not extend" in found.stderr
    [evidence] = kept(state)
    assert check_evidence(evidence, format_vkey(VKEY)).facts["conclusive"]
    silent = tributary(*words[:-1], tmp_path / "other")
    assert (silent.returncode, "not checked: the witness" in silent.stderr) == (7, True)
    assert tributary(*words[:-1], tmp_path / "third", "--no-ask-witnesses").returncode == 0


# --- the chain ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with DevChain(tmp_path_factory.mktemp("chain")) as chain:
        yield new_world(chain, tmp_path_factory.mktemp("owner"))


def test_a_forked_anchor_raises_the_alarm(world: World, tmp_path: Path) -> None:
    contract = world.deployments.anchor
    read = anchor_reader(world.client.rpc_url, contract)
    source = DictSource(log_files(entries(20)))
    assert monitor(source, tmp_path / "none", anchor=read).poll().anchored is None
    anchorer = Anchorer(
        world.client,
        contract=contract,
        first_block=world.deployments.block,
        source=SmallLog(entries=list(entries(9))),
        verify=verify_l1,
    )
    assert anchorer.run(0)
    good = monitor(source, tmp_path / "good", anchor=read).poll()
    assert (good.alarms, good.anchored) == ((), 9)

    # The same log shown with another beginning: its own checkpoints agree, the chain does not.
    source.files = log_files([entry(0, name="x"), *entries(20)[1:]])
    poll = monitor(source, tmp_path / "forked", anchor=read).poll()
    assert [alarm.kind for alarm in poll.alarms] == ["anchor-mismatch"]
    [evidence] = kept(tmp_path / "forked")
    verdict = check_evidence(evidence, format_vkey(VKEY))
    assert any(line.startswith("Block 0x") for line in verdict.proven), "with the proof of the L1"
    assert any("history was rewritten" in line for line in verdict.proven)

    source.files = log_files(entries(5))
    poll = monitor(source, tmp_path / "short", anchor=read).poll()
    assert [alarm.kind for alarm in poll.alarms] == ["anchor-mismatch"]
    assert "shows only 5" in poll.alarms[0].says

    folder = tmp_path / "log"
    write_files(folder, log_files([entry(0, name="x"), *entries(20)[1:]]))
    found = tributary(
        "monitor", folder, "--key", format_vkey(VKEY), "--state", tmp_path / "cli", "--once",
        "--rpc", world.client.rpc_url, "--contract", contract,
    )  # fmt: skip
    assert found.returncode == 1
    assert "ALARM anchor-mismatch" in found.stderr


def test_a_chain_that_does_not_answer_is_no_alarm_and_no_success(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    write_files(folder, log_files(entries(3)))
    found = tributary(
        "monitor", folder, "--key", format_vkey(VKEY), "--state", tmp_path / "state", "--once",
        "--rpc", "http://127.0.0.1:9", "--contract", "0x" + "12" * 20,
    )  # fmt: skip
    assert found.returncode == 7
    assert "not checked: the L1 contract" in found.stderr
