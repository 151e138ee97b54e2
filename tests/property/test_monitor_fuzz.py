"""A log that serves anything at all: the monitor ends each look with a result or a designed error,
what it keeps can be judged, and it never takes a tree for verified that was not signed."""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledger.errors import Unavailable
from ledger.verify.evidence import check_evidence
from ledger.verify.note import format_vkey
from tests.unit.monitor_world import VKEY, DictSource, entries, kept, log_files, monitor

FILES = log_files(entries(300))
FIRST = log_files(entries(7))
PATHS = sorted(FILES)
EXAMPLES = 120


def spoil(data: bytes, how: int, at: int, junk: bytes) -> bytes:
    at = at % (len(data) + 1)
    return (
        data[:at] + junk + data[at:],
        data[:at] + junk + data[at + len(junk) :],
        data[:at],
        junk,
    )[how]


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    spoiled=st.lists(
        st.tuples(
            st.sampled_from(PATHS),
            st.integers(0, 3),
            st.integers(0, 20_000),
            st.binary(max_size=40),
        ),
        min_size=1,
        max_size=3,
    ),
    started=st.booleans(),
    every=st.booleans(),
)
def test_anything_served_ends_as_designed(
    spoiled: list[tuple[str, int, int, bytes]], started: bool, every: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = DictSource(dict(FIRST))
        if started:
            monitor(source, folder, entries=every).poll()
        source.files = dict(FILES)
        for path, how, at, junk in spoiled:
            source.files[path] = spoil(source.files[path], how, at, junk)
        try:
            poll = monitor(source, folder, entries=every, keep_going=True).poll()
        except Unavailable:
            return
        assert poll.size in (0, 7, 300)
        if poll.size == 300 and not poll.alarms:
            assert source.files["checkpoint"].startswith(FILES["checkpoint"][:60])
        for evidence in kept(folder):
            check_evidence(evidence, format_vkey(VKEY))
        source.files = dict(FILES)
        assert monitor(source, folder, entries=every).poll().size == 300, "it recovers"


@settings(max_examples=60, deadline=None, database=None)
@given(files=st.dictionaries(st.sampled_from(PATHS), st.binary(max_size=300)))
def test_a_place_that_is_no_log_ends_as_designed(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        try:
            poll = monitor(DictSource(files), Path(name)).poll()
        except Unavailable:
            assert "checkpoint" not in files
            return
        assert poll.size == 0
        assert [alarm.kind for alarm in poll.alarms] == ["bad-checkpoint"]
