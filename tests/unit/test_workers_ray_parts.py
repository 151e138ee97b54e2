"""What surrounds Ray, without starting one: its guard, its files, its errors in our classes."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError, WorkerCrashedError

from ledger.errors import Backpressure, ComputeError, ConfigError, InvalidEvent, NotFound
from workers import _ray_guard, jobs, ray_cluster
from workers._ray_guard import end_within, within
from workers.link import WorkerSpec
from workers.openlora.errors import PromptTooLong, UnknownAdapter
from workers.ray_cluster import AttachedRay, ClusterInfo, LocalRay, find
from workers.ray_errors import designed

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")

STUBBORN = (
    "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('ready', flush=True); time.sleep(60)"
)
PARENT = (
    "import subprocess,sys,time;"
    f"subprocess.Popen([sys.executable,'-c',{STUBBORN!r}],start_new_session=True);"
    "time.sleep(60)"
)


def wait_for(place: Path, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(list(within(str(place)))) != count:
        assert time.monotonic() < deadline, list(within(str(place)))
        time.sleep(0.02)


@linux
@pytest.mark.parametrize("how", ["by its folder", "by its environment"])
def test_ends_what_belongs_to_a_place_and_nothing_else(tmp_path: Path, how: str) -> None:
    place, alike = tmp_path / "place", tmp_path / "place2"
    place.mkdir()
    alike.mkdir()
    where: dict[str, Any] = {"cwd": place / "."}
    if how == "by its environment":
        where = {"env": {**os.environ, "TRIBUTARY_RAY": str(place / "start")}}
    ours = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True, **where
    )
    other = subprocess.Popen(["sleep", "60"], cwd=alike)
    try:
        assert ours.stdout is not None
        assert ours.stdout.readline() == "ready\n"
        assert list(within(str(place))) == [ours.pid]
        assert end_within(str(place), patience_s=0.3) == 1
        assert ours.wait(5) == -9
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@linux
@pytest.mark.parametrize("how", ["owner closes the pipe", "guard is killed"])
def test_the_guard_ends_its_command_with_all_that_came_of_it(tmp_path: Path, how: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-I", "-S", _ray_guard.__file__, str(tmp_path / "log"), str(place)]
    guard = subprocess.Popen(
        [*command, sys.executable, "-c", PARENT], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        wait_for(place, 2)
        if how == "guard is killed":
            guard.kill()
            wait_for(place, 1)  # the command followed; its stubborn child is for the next start
            end_within(str(place), patience_s=0.3)
        else:
            assert guard.stdin is not None
            guard.stdin.close()
        guard.wait(10)
        wait_for(place, 0)
    finally:
        guard.kill()
        end_within(str(place), patience_s=0.1)


def test_files_of_a_local_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("long-" * 20)
    ray = LocalRay(deep)
    assert len(str(ray.temp)) <= ray_cluster.MAX_TEMP_CHARS, "Unix sockets lie in it"
    assert LocalRay(deep).temp == ray.temp
    assert LocalRay(tmp_path / "other").temp != ray.temp
    token = ray_cluster._token_file(ray.folder)
    assert token.stat().st_mode & 0o777 == 0o600
    assert ray_cluster._token_file(ray.folder).read_text() == token.read_text()
    with pytest.raises(ComputeError):
        _ = ray.address
    assert find(deep) is None
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(ComputeError, match="0700"):
        ray_cluster._private_folder(shared)
    link = tmp_path / "link"
    link.symlink_to(shared)
    with pytest.raises(ComputeError, match="0700"):
        ray_cluster._private_folder(link)


def test_a_cluster_of_someone_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="RAY_API_SERVER_ADDRESS"):
        AttachedRay(tmp_path, "head:6379")
    ray = AttachedRay(tmp_path, "127.0.0.1:1", "http://head:8265").start()
    assert find(tmp_path) == ray.info
    assert not ray.alive()
    assert "RAY_AUTH_TOKEN_PATH" not in ray.info.env(), "the environment's own token counts"
    ray.stop()
    assert find(tmp_path) is None


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    info = ClusterInfo(
        address="127.0.0.1:1", jobs_url="http://127.0.0.1:1", token_file=None, python="python"
    )
    with pytest.raises(ComputeError, match="no Ray answers"):
        ray_cluster.connect(info)


def test_errors_keep_their_class_across_ray() -> None:
    def from_worker(cause: Exception) -> Exception:
        return RayTaskError("work", "traceback", cause)

    unknown = designed(from_worker(UnknownAdapter("x")))
    assert type(unknown) is NotFound
    assert unknown.detail == {"code": "model_not_found", "adapter": "x"}
    assert "adapter 'x' is not published" in str(unknown)
    assert type(designed(from_worker(PromptTooLong("too long")))) is InvalidEvent
    full = designed(from_worker(Backpressure("full", retry_after_s=7)))
    assert isinstance(full, Backpressure)
    assert full.retry_after_s == 7
    for error in (
        from_worker(ZeroDivisionError("ours")),
        ActorDiedError(),
        WorkerCrashedError(),
        GetTimeoutError(),
        TimeoutError(),
        RuntimeError("of Ray"),
    ):
        assert type(designed(error)) is ComputeError


def test_a_job_command_line_reads_back_and_carries_no_secret(tmp_path: Path) -> None:
    key_file = tmp_path / "key with space"
    key_file.write_text("ab" * 32)
    spec = WorkerSpec(
        api="http://127.0.0.1:1", key_file=key_file, home=tmp_path, base_model=tmp_path / "base"
    )
    words = jobs.entrypoint("python", spec, "r", 3)
    assert words[:4] == ["python", "-m", "workers.jobs", "train"]
    assert "ab" * 32 not in " ".join(words)
    seen = {}

    def train(*given: object) -> int:
        seen["given"] = given
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "train", train)
        assert jobs.main(words[3:]) == 0
    assert seen["given"] == (spec, "r", 3)
