"""The monitor on logs that behave and on logs that do not."""

from pathlib import Path

from tests.unit.monitor_world import DictSource, entries, log_files, monitor

SIZES = (0, 1, 2, 5, 255, 256, 257, 511, 512, 600, 1024, 1025)


def test_an_honest_log_passes_through_growth_and_restarts(tmp_path: Path) -> None:
    source = DictSource()
    for size in SIZES:
        source.files = log_files(entries(size))
        for again in range(2):
            poll = monitor(source, tmp_path).poll()
            assert (poll.alarms, poll.unchecked) == ((), ())
            assert poll.size == size
