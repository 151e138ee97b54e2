"""Which answers are settled, how, and what is kept for later: whatever fails, and in any order.

The ledger here is a dict of ids; what `recording` puts into the real one, and what a killed process
leaves, is shown by tests/integration/test_api_exactly_once.py.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ledger.api.answers import settling
from ledger.api.answers.answer import Answer, Terms
from ledger.api.answers.asking import to_intent
from ledger.api.answers.desk import Desk, Owed, Running
from ledger.api.answers.journal import SUFFIX, Journal
from ledger.api.answers.settling import REFUSED, settle_all
from ledger.api.answers.sitting import ending
from ledger.api.services import Reservations
from ledger.errors import InvalidEvent, Unavailable
from ledger.ports import ChatRequest

HELD_WEI = 50
TERMS = Terms(
    adapter="a", model="m", owner="o", adapter_sha256="", input_wei_per_token=1,
    output_wei_per_token=2,
)  # fmt: skip


class Taken(dict[str, tuple[str | None, str, int]]):
    """A ledger that holds each id once; `errors` are what it says to an id, one a time."""

    def __init__(self) -> None:
        self.errors: dict[str, list[Exception]] = {}

    def settle(self, box: Any, answer: Answer, reason: str | None) -> None:
        if waiting := self.errors.get(answer.inference):
            raise waiting.pop(0)
        self.setdefault(answer.inference, (reason, answer.text, answer.completion_tokens))


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Taken:
    taken = Taken()
    monkeypatch.setattr(settling, "settle", taken.settle)
    return taken


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Any]:
    journal = Journal(tmp_path)
    yield SimpleNamespace(answers=Desk(journal), reservations=Reservations())
    journal.close()


def answer(id: str, **said: Any) -> Answer:
    request = ChatRequest(request_id=id, adapter="a", messages=(), max_tokens=9)
    return Answer(
        inference=id, consumer="eve", terms=TERMS, request=request, created=1, prompt_tokens=3,
        held_wei=HELD_WEI, **said,
    )  # fmt: skip


def died(folder: Path, *ids: str) -> Path:
    """The journal of a process that is gone. An answer whose id ends with `!` was delivered whole,
    with `?` not begun, and with `.` settled; the others broke off."""
    journal = Journal(folder)
    for id in ids:
        intent = journal.begin(to_intent(answer(id)))
        if not id.endswith("?"):
            intent.deliver(2, b'"so far"')
        if id.endswith("!"):
            intent.owe(ending(answer(id, text="all", finish_reason="stop", completion_tokens=4)))
        if id.endswith("."):
            intent.close()
    path = journal._files[-1].path
    journal.close()
    return path


BROKEN, WHOLE = ("crashed", "so far", 2), (None, "all", 4)


def test_each_answer_becomes_what_it_was(box: Any, ledger: Taken, tmp_path: Path) -> None:
    died(tmp_path, "broken", "whole!", "unsaid?", "done.")
    died(tmp_path, "another")
    assert not box.answers.looked
    settle_all(box)
    assert ledger == {"broken": BROKEN, "whole!": WHOLE, "another": BROKEN}
    assert box.answers.looked
    assert not box.answers.unsettled
    assert list(tmp_path.iterdir()) == []


def test_what_the_ledger_cannot_take_now_waits(box: Any, ledger: Taken, tmp_path: Path) -> None:
    path = died(tmp_path, "one", "two")
    ledger.errors["two"] = [Unavailable("the database is away")]
    settle_all(box)
    assert (set(ledger), box.answers.unsettled) == ({"one"}, {"two"})
    assert path.exists(), "until all of it is settled"
    settle_all(box)
    assert ledger == {"one": BROKEN, "two": BROKEN}
    assert not box.answers.unsettled
    assert not path.exists()


def test_what_it_will_never_take_is_kept_for_people(
    box: Any, ledger: Taken, tmp_path: Path
) -> None:
    path = died(tmp_path, "bad", "good")
    ledger.errors["bad"] = [InvalidEvent("never")]
    settle_all(box)
    settle_all(box)
    assert (dict(ledger), box.answers.unsettled) == ({"good": BROKEN}, frozenset())
    [kept] = tmp_path.iterdir()
    assert kept == path.with_suffix(REFUSED)
    assert kept.stat().st_mode & 0o777 == 0o600


def test_what_nobody_foresaw_stops_nobody_else(box: Any, ledger: Taken, tmp_path: Path) -> None:
    for id in ("one", "two", "three"):
        died(tmp_path, id)
    ledger.errors = {id: [RuntimeError("?")] for id in ("one", "two")}
    (tmp_path / f"0{SUFFIX}").mkdir()  # cannot be opened as a file
    settle_all(box)
    assert (set(ledger), box.answers.unsettled) == ({"three"}, {"one", "two"})
    assert box.answers.looked, "a journal that cannot be read does not refuse every key"
    settle_all(box)
    assert set(ledger) == {"one", "two", "three"}


def test_a_damaged_journal_is_settled_and_kept(box: Any, ledger: Taken, tmp_path: Path) -> None:
    path = died(tmp_path, "one", "two", "three!")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"two", b"owt")  # the second answer's intent
    path.write_bytes(b"".join(lines))
    settle_all(box)
    assert ledger == {"one": BROKEN, "three!": WHOLE}
    assert list(tmp_path.iterdir()) == [path.with_suffix(REFUSED)]


def test_an_id_that_is_being_answered_here_is_left_alone(
    box: Any, ledger: Taken, tmp_path: Path
) -> None:
    died(tmp_path, "again")
    box.answers.running["again"] = Running(request_sha256="")
    settle_all(box)
    assert (dict(ledger), box.answers.unsettled) == ({}, {"again"})
    del box.answers.running["again"]
    settle_all(box)
    assert ledger == {"again": BROKEN}


def test_the_living_are_not_settled(box: Any, ledger: Taken) -> None:
    box.answers.journal.begin(to_intent(answer("mine"))).deliver(1, b'"x"')
    settle_all(box)
    assert ledger == {}


def test_what_is_owed_is_settled_once_and_frees_its_money(box: Any, ledger: Taken) -> None:
    for id, reason in (("whole", None), ("broken", "failed"), ("never", None), ("odd", "failed")):
        owed = answer(id, text=id)
        intent = box.answers.journal.begin(to_intent(owed))
        intent.owe(ending(owed))
        if reason is None:
            box.reservations.hold("eve", HELD_WEI, lambda: 10**6)
        box.answers.owed[id] = Owed(answer=owed, intent=intent, reason=reason)
    ledger.errors = {
        "whole": [Unavailable("away")],
        "never": [InvalidEvent("never")] * 9,
        "odd": [RuntimeError("?")],
    }
    settle_all(box)
    assert not ledger, "the others are not even tried while the ledger is away"
    assert box.reservations.held_wei("eve") == 2 * HELD_WEI
    settle_all(box)
    settle_all(box)
    assert ledger == {
        "whole": (None, "whole", 0),
        "broken": ("failed", "broken", 0),
        "odd": ("failed", "odd", 0),
    }
    assert set(box.answers.owed) == {"never"}
    assert box.reservations.held_wei("eve") == HELD_WEI
