"""The journal of answers: what survives a process, and what a damaged file still says."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ledger.api.answers import journal as module
from ledger.api.answers.journal import SUFFIX, Abandoned, Journal, adopted
from ledger.errors import StorageError, Unavailable

INTENT = {"inference": "a", "messages": [{"role": "user", "content": "hé\u2028llo"}]}


def left_behind(folder: Path) -> list[Abandoned]:
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with adopted(path) as abandoned:
            if abandoned is not None:
                found.append(abandoned)
    return found


def written(folder: Path) -> Path:
    """The file of a process that is gone: one settled answer, one in the middle, one delivered
    whole, one of which nothing left."""
    journal = Journal(folder)
    settled, middle, whole, _ = (journal.begin({**INTENT, "n": n}) for n in range(4))
    settled.deliver(1, b'"x"')
    settled.close()
    middle.deliver(1, b'"once \\u00e9"')
    middle.deliver(3, b'" upon"')
    whole.owe({"text": "all of it", "finish_reason": "stop"})
    journal.close()  # as the kernel does for a process that ends: the lock is free
    [path] = folder.glob(f"*{SUFFIX}")
    return path


def test_what_a_process_left_is_read_back(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    [abandoned] = left_behind(tmp_path)
    assert abandoned.damaged == 0
    middle, whole, untold = abandoned.answers
    assert (middle.intent, middle.text, middle.tokens) == ({**INTENT, "n": 1}, "once é upon", 3)
    assert middle.delivered
    assert middle.ending is None
    assert whole.ending == {"text": "all of it", "finish_reason": "stop"}
    assert not untold.delivered


def test_a_file_cut_short_anywhere_loses_the_last_record_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "made")
    data = path.read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    for length in range(len(data)):
        (cut / path.name).write_bytes(data[:length])
        [abandoned] = left_behind(cut)
        whole_lines = data[:length].count(b"\n")
        assert abandoned.damaged == (0 if data[:length].endswith(b"\n") or not length else 1)
        assert len(abandoned.answers) <= whole_lines


def test_a_flipped_byte_is_seen_and_the_rest_counts(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    for at in range(0, len(data) - 1, 7):
        if data[at] == 0x0A:
            continue
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :])
        [abandoned] = left_behind(tmp_path)
        assert abandoned.damaged >= 1, at
        assert {left.intent["n"] for left in abandoned.answers} <= {0, 1, 2, 3}


def test_a_living_process_keeps_its_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(INTENT)
    assert left_behind(tmp_path) == [], "its owner holds the lock"
    journal.close()
    assert len(left_behind(tmp_path)) == 1


def test_an_idle_journal_holds_no_prompt(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    one, other = journal.begin(INTENT), journal.begin(INTENT)
    [path] = tmp_path.glob(f"*{SUFFIX}")
    one.close()
    one.close()
    assert path.stat().st_size > 0, "the other one is open"
    other.close()
    assert path.stat().st_size == 0
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 50)
    journal = Journal(tmp_path)
    intents = [journal.begin(INTENT) for _ in range(module.MAX_OPEN_FILES)]
    with pytest.raises(Unavailable, match="MAX_OPEN_FILES"):
        journal.begin(INTENT)
    intents[0].close()
    journal.begin(INTENT)
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == module.MAX_OPEN_FILES
    journal.close()


def test_a_full_disk_stops_what_is_about_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    intent = journal.begin(INTENT)
    intent.deliver(1, b'"said"')
    real = os.write

    def short(descriptor: int, data: Any) -> int:
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(StorageError, match="disk full"):
        intent.deliver(2, b'" unsaid"')
    monkeypatch.undo()
    intent.deliver(3, b'" later"')
    journal.close()
    [abandoned] = left_behind(tmp_path)
    assert abandoned.damaged == 1
    assert [left.text for left in abandoned.answers] == ["said later"]


def test_a_thread_that_comes_late_writes_into_nobody_s_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    late, later = journal.begin(INTENT), journal.begin(INTENT)
    late.deliver(1, b'"said"')
    descriptor = late._file.descriptor
    journal.close()
    with (tmp_path / "other").open("wb") as other:
        assert other.fileno() == descriptor, "the number is given out again"
        with pytest.raises(StorageError, match="given up"):
            late.deliver(2, b'" too late"')
        late.close()
        later.close()
    assert (tmp_path / "other").read_bytes() == b""
    [abandoned] = left_behind(tmp_path / "journal")
    assert [left.text for left in abandoned.answers] == ["said", ""], "the next one settles them"


def test_answers_of_many_threads_stand_each_for_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    kept = journal.begin({"n": "first"})  # so that the file is never idle

    def answer(n: int) -> None:
        intent = journal.begin({"n": n})
        for tokens in range(1, 20):
            intent.deliver(tokens, b'"%d."' % tokens)
        if n % 2:
            intent.close()

    threads = [threading.Thread(target=answer, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert kept._file.size == kept._file.path.stat().st_size
    journal.close()
    [abandoned] = left_behind(tmp_path)
    assert abandoned.damaged == 0
    said = "".join(f"{n}." for n in range(1, 20))
    found = {left.intent["n"]: (left.text, left.tokens) for left in abandoned.answers}
    assert found.pop("first") == ("", 0)
    assert found == dict.fromkeys(range(0, 8, 2), (said, 19))
