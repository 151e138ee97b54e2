"""`tributary attribution evaluate` on a real Ray: whole, and killed with SIGKILL in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workers._ray_guard import within
from workers.ray_cluster import LocalRay

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")

PEOPLE, EACH = 6, 6
SUBSETS, COALITIONS = 4, 4
TIMEOUT_S = 150
AMOUNTS = [
    "--subsets", str(SUBSETS), "--seeds", "1", "--rows", "24", "--queries", "3",
    "--coalitions", str(COALITIONS), "--players", "3", "--canaries", "3", "--cpus", "2",
    "--set", "epochs=1", "--set", "r=4", "--method", "index", "--method", "grad-dot",
    "--method", "bm25", "--part", "fidelity", "--part", "payout", "--part", "canaries",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": f"What does tool{who}.part{n} do?",
            "completion": f"It turns {who * 7 + n} wheels of the mill.",
            "contributor": f"person-{who}",
        }
        for who in range(PEOPLE)
        for n in range(EACH)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ledger.cli.main", "attribution", "evaluate"]
    return subprocess.Popen(
        [*command, "--data", str(data), "--out", str(out), *AMOUNTS, *more],
        env={**os.environ, "TRIBUTARY_HOME": str(out.parent / "home"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(out: Path) -> set[str]:
    return {path.name for path in (out / "units").glob("*.json")}


def test_killed_in_the_middle_it_goes_on_and_measures_everything(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start(data, out)
    deadline = time.monotonic() + TIMEOUT_S
    while len(finished(out)) < 2:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {name: (out / "units" / name).stat().st_mtime_ns for name in finished(out)}
    assert len(before) < SUBSETS + COALITIONS + 2
    assert not (out / "results.json").exists()

    second = start(data, out)
    printed, told = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 0, told
    for name, written in before.items():
        assert (out / "units" / name).stat().st_mtime_ns == written  # not measured again
    assert len(finished(out)) == SUBSETS + COALITIONS + 2  # nobody, and everybody, too
    assert not list((out / "units").glob("*.training"))
    assert not list(within(str(LocalRay(out).temp)))  # our own Ray ended with us

    results = json.loads((out / "results.json").read_text())
    assert set(results["fidelity"]["lds"]) == {"index", "grad-dot", "bm25"}
    for estimate in results["fidelity"]["lds"].values():
        assert -1 <= estimate["low"] <= estimate["mean"] <= estimate["high"] <= 1
    assert results["fidelity"]["ceiling"] is None  # one training seed has none
    assert results["payout"]["players"] == 3
    assert 0 <= results["payout"]["ours"]["attributed"] <= 1
    assert results["canaries"]["methods"]["index"]["verbatim@1"] == 1.0
    assert "Linear datamodeling score" in printed
    assert "| ours (int8 index) |" in (out / "results.md").read_text()
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_two_evaluations_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = start(data, out)
        told = second.communicate(timeout=TIMEOUT_S)[1]
    assert second.returncode == 5, told
    assert "another evaluation works in" in told
