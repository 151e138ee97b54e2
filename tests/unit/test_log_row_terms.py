"""Terms read from a log's own entries: nothing can be left out, added or read from another log."""

from pathlib import Path

import pytest

from ledger.errors import Inconsistent, InvalidEvent, NotFound, VerificationError
from ledger.log.answer_case import answer_case, run_case
from ledger.log.row_terms import read_terms
from ledger.log.serving import LogFiles
from ledger.log.sources import StoreSource
from ledger.ports import LogSource
from ledger.verify.checkpoint import Checkpoint, parse_checkpoint
from ledger.verify.note import parse_note
from tests.unit.lineage_world import World, name

MANY = 290
"""Entries before the first that matters: more than one bundle of 256."""
OURS = {name("ann"), name("ben")}


class Told:
    """A log of fillers, then: ann withdrawn, a stranger withdrawn, two of ben's rows split off."""

    def __init__(self, folder: Path, *, forget: bool = False) -> None:
        self.world = World(folder)
        for n in range(MANY):
            closed = {"datanet": name(f"net {n}"), "reason": ""}
            self.world.add("dev", "datanet.closed", closed, label=f"filler {n}")
        net = {"datanet": name("net")}
        self.steps = [self.world.log.size()]
        for type, body in (
            ("contribution.withdrawn", {"contribution": name("ann"), "reason": "mine"}),
            ("contribution.withdrawn", {"contribution": name("stranger"), "reason": ""}),
            ("cluster.split", {"contribution": name("ben"), "row": 2, "note": ""}),
            ("cluster.split", {"contribution": name("ben"), "row": 0, "note": ""}),
            ("cluster.appealed", {"contribution": name("ben"), "row": 1, "reason": ""}),
            # Words in another event's prose are no event.
            ("datanet.closed", {"reason": 'a "contribution.withdrawn" of ben'}),
        ):
            if forget:
                type, body = "datanet.closed", {"reason": "nothing happened"}
            self.world.add("ann", type, {**net, **body}, label=f"{type} {len(self.steps)}")
            self.steps.append(self.world.log.size())
        self.world.checkpoint()

    @property
    def head(self) -> Checkpoint:
        latest = self.world.tiles.latest()
        assert latest
        return parse_checkpoint(parse_note(latest.note).text)

    @property
    def source(self) -> LogSource:
        return StoreSource(LogFiles(log=self.world.log, tiles=self.world.tiles))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told(tmp_path_factory.mktemp("told"))


def test_terms_are_of_their_size(told: Told) -> None:
    ann, ben = [name("ann")], name("ben")
    expected = [
        ([], []), (ann, []), (ann, []), (ann, [[ben, 2]]), (ann, [[ben, 0], [ben, 2]]),
        (ann, [[ben, 0], [ben, 2]]), (ann, [[ben, 0], [ben, 2]]),
    ]  # fmt: skip
    for size, (withdrawn, splits) in zip(told.steps, expected, strict=True):
        assert read_terms(told.source, size, told.head, OURS) == {
            "log_size": size, "withdrawn": withdrawn, "splits": splits,
        }  # fmt: skip
    everything = read_terms(told.source, told.head.size, told.head, {name("stranger")})
    assert everything["withdrawn"] == [name("stranger")]
    assert read_terms(told.source, 0, told.head, OURS)["withdrawn"] == []


def test_a_size_that_the_log_has_not_signed_is_refused(told: Told) -> None:
    with pytest.raises(Inconsistent, match="has signed"):
        read_terms(told.source, told.head.size + 1, told.head, OURS)


class Lying:
    """A server that gives an altered file."""

    def __init__(self, source: LogSource, old: bytes, new: bytes) -> None:
        self._source, self._old, self._new = source, old, new

    def read(self, path: str) -> bytes:
        return self._source.read(path).replace(self._old, self._new)


def test_an_altered_entry_is_refused(told: Told) -> None:
    """The withdrawal reads as something else; the tree is not the signed one then."""
    lying = Lying(told.source, b'"mine"', b'"MINE"')
    with pytest.raises(VerificationError):
        read_terms(lying, told.head.size, told.head, OURS)
    hidden = Lying(told.source, b'"contribution.withdrawn"', b'"contribution.withdrawm"')
    with pytest.raises(Inconsistent):
        read_terms(hidden, told.head.size, told.head, OURS)
    with pytest.raises(Inconsistent):
        read_terms(hidden, told.steps[1], told.head, OURS)


def test_another_logs_entries_are_refused(told: Told, tmp_path: Path) -> None:
    """A log of the same beginning and size that never heard of the withdrawal."""
    other = Told(tmp_path, forget=True)
    assert other.head.size == told.head.size
    assert read_terms(other.source, other.head.size, other.head, OURS)["withdrawn"] == []
    for size in (told.steps[0] + 1, told.head.size):
        with pytest.raises(Inconsistent):
            read_terms(other.source, size, told.head, OURS)


def test_a_case_is_read_from_a_bundle_that_holds(tmp_path: Path) -> None:
    world = World(tmp_path).tell()
    world.checkpoint()
    case = answer_case(world.bundle("attribution.recorded"), trusted_vkey=world.vkey)
    assert case.attribution.index == world.index_of("attribution.recorded")
    assert case.inference.index == world.index_of("inference.recorded")
    assert [row["row"] for row in case.run.rows] == [0, 1, 2, 0, 1, 2]
    assert case.run.recorded[name("ben")].index == world.index_of("recorded ben")
    assert case.run.head.size == world.log.size()
    assert run_case(world.bundle("run.completed"), name("run")).completed == case.run.completed
    with pytest.raises(InvalidEvent, match=r"adapter\.published"):
        answer_case(world.bundle("adapter.published"))
    with pytest.raises(NotFound, match="not attributed yet"):
        answer_case(world.bundle("inference.recorded"))
    with pytest.raises(NotFound, match=r"run\.completed"):
        run_case(world.bundle("recorded ann"), name("run"))
    with pytest.raises(VerificationError):
        answer_case(world.bundle("attribution.recorded")[:-1])
