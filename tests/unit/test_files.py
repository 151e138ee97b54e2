"""A file is the old one or the new one, whichever system call fails."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ledger.files import write_durably

CALLS = ("open", "fchmod", "fdopen", "fsync", "replace")


def test_written_whole_with_its_mode_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for data, mode in ((b"one", 0o600), (b"", 0o644)):
        write_durably(path, data, mode=mode)
        assert path.read_bytes() == data
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("call", CALLS)
def test_a_failing_call_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"ledger.files.os.{call}", fail)
        with pytest.raises(OSError, match="No space left"):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file.new").write_bytes(b"half of something longer")
    write_durably(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["file"]
