"""Folders of audits that run at once in one home: nobody's is swept but a dead one's."""

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ledger.errors import Unavailable
from ledger.processes import workplace as module
from ledger.processes.workplace import LOCK, workplace

TIMEOUT_S = 20
WORKER = """
import sys
from pathlib import Path
from ledger.processes.workplace import workplace
with workplace(Path(sys.argv[1])) as work:
    (work / "index").mkdir()
    (work / "index" / "vectors.i8").write_bytes(b"half")
    print(work, flush=True)
    sys.stdin.read()
"""


@contextmanager
def worker(place: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """Another process at work there, and its folder."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()
            process.wait(timeout=TIMEOUT_S)


def inside(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()} - {LOCK}


def test_two_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    with workplace(tmp_path) as one:
        (one / "index").write_bytes(b"half")
        with workplace(tmp_path) as other:
            assert other != one
            assert list(other.iterdir()) == []
        assert (one / "index").read_bytes() == b"half"
        assert inside(tmp_path) == {one.name}
    assert inside(tmp_path) == set()


def test_a_killed_one_is_swept_when_nobody_works(tmp_path: Path) -> None:
    with worker(tmp_path) as (process, left):
        with workplace(tmp_path):
            assert (left / "index" / "vectors.i8").read_bytes() == b"half"
        assert left.exists()
        with workplace(tmp_path) as mine:
            process.kill()
            process.wait(timeout=TIMEOUT_S)
            with workplace(tmp_path):
                assert left.exists(), "somebody still works: nothing is swept"
            assert mine.exists()
    assert left.exists()
    with workplace(tmp_path) as mine:
        assert inside(tmp_path) == {mine.name}


def test_a_sweep_that_takes_for_ever_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_WAIT_S", 0.05)
    with (tmp_path / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="sweeping"), workplace(tmp_path):
            pass
