"""The monitor on logs that behave and on logs that do not: each way to lie raises its alarm, and
the file that is kept proves it to somebody who holds nothing but the log's key."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ledger.domain.envelope import encode_entry, leaf_hash
from ledger.errors import ConfigError, StorageError, Unavailable
from ledger.files import write_durably
from ledger.log import monitor_growth, monitor_state
from ledger.log.add_checkpoint import checkpoint_path
from ledger.log.monitor import Poll
from ledger.log.monitor_findings import MAX_ALARMS_PER_LOOK
from ledger.log.monitor_others import AnchoredTree
from ledger.log.monitor_state import MonitorFolder
from ledger.verify.evidence import Evidence, check_evidence
from ledger.verify.merkle import tree_root
from ledger.verify.note import VerifierKey, format_vkey, vkey_of
from ledger.verify.policy import parse_policy
from tests.unit.monitor_world import (
    LOG,
    NOW_US,
    OTHER_KEY,
    VKEY,
    DictSource,
    checkpoint,
    entries,
    entry,
    event,
    kept,
    log_files,
    monitor,
    witness_key,
)

SIZES = (0, 1, 2, 5, 255, 256, 257, 511, 512, 600, 1024, 1025)
Files = dict[str, bytes]


def roots(held: list[bytes]) -> bytes:
    return tree_root([leaf_hash(e) for e in held])


def check(folder: Path) -> list[tuple[str, bool]]:
    """(kind, conclusive) of every file kept, each proven again under the log's key."""
    found = []
    for evidence in kept(folder):
        verdict = check_evidence(evidence, format_vkey(VKEY))
        assert verdict.trusted
        found.append((evidence.kind, bool(verdict.facts["conclusive"])))
    return sorted(found)


def alarms(poll: Poll) -> list[tuple[str, bool]]:
    assert all(alarm.path and alarm.path.is_file() for alarm in poll.alarms)
    return sorted((alarm.kind, alarm.conclusive) for alarm in poll.alarms)


# --- a log that behaves ---


@pytest.mark.parametrize("every", [True, False])
def test_an_honest_log_passes_through_growth_and_restarts(tmp_path: Path, every: bool) -> None:
    source = DictSource()
    before = 0
    for size in SIZES:
        source.files = log_files(entries(size))
        for again in (False, True):
            poll = monitor(source, tmp_path, entries=every).poll()
            assert (poll.alarms, poll.unchecked) == ((), ())
            assert (poll.size, poll.grown) == (size, 0 if again else size - before)
            if every:
                assert poll.entries == poll.grown
        before = size
    assert poll.root == roots(entries(SIZES[-1]))
    assert not (tmp_path / "evidence").exists()


def test_each_entry_is_read_once(tmp_path: Path) -> None:
    source = DictSource(log_files(entries(700)))
    monitor(source, tmp_path).poll()
    source.reads.clear()
    source.files = log_files(entries(900))
    monitor(source, tmp_path).poll()
    assert sorted(source.reads) == [
        "checkpoint",
        "tile/0/002", "tile/0/003.p/132", "tile/1/000.p/3",
        "tile/entries/002", "tile/entries/003.p/132",
    ]  # fmt: skip


def test_modes_may_change_between_runs(tmp_path: Path) -> None:
    source = DictSource()
    for size, every in ((10, True), (300, False), (700, True), (1000, False), (1025, True)):
        source.files = log_files(entries(size))
        poll = monitor(source, tmp_path, entries=every).poll()
        assert (poll.size, poll.alarms) == (size, ())


def test_partial_tiles_may_be_dropped_once_the_full_one_is_there(tmp_path: Path) -> None:
    source = DictSource(log_files(entries(300)))
    later = log_files(entries(600))
    source.files |= {path: data for path, data in later.items() if path != "checkpoint"}
    for path in [path for path in source.files if ".p/" in path and path not in later]:
        del source.files[path]
    source.files.pop("tile/1/000.p/1", None)
    source.files["tile/1/000"] = later["tile/1/000.p/2"]  # as if it had filled since
    poll = monitor(source, tmp_path).poll()
    assert (poll.size, poll.alarms) == (300, ())


def test_a_type_that_is_not_known_is_counted_and_not_judged(tmp_path: Path) -> None:
    held = [*entries(3), entry(3, type="moon.landed", name="x")]
    poll = monitor(DictSource(log_files(held)), tmp_path).poll()
    assert (poll.alarms, poll.unknown_types) == ((), {"moon.landed": 1})


def test_no_answer_is_no_alarm(tmp_path: Path) -> None:
    source = DictSource(log_files(entries(600)), down=4)
    with pytest.raises(Unavailable):
        monitor(source, tmp_path).poll()
    with pytest.raises(Unavailable, match="no log here"):
        monitor(DictSource(), tmp_path).poll()
    source.down = None
    assert monitor(source, tmp_path).poll().size == 600


# --- logs that do not ---


def lie_unsigned(files: Files, held: list[bytes]) -> Files:
    bad = encode_entry(3, NOW_US + 3, event(3)[:-5] + b'x"}')
    return log_files([*held[:3], bad, *held[4:]])


def lie_other_signature(files: Files, held: list[bytes]) -> Files:
    raw = event(3).replace(b'"name 3"', b'"name 4"')  # canonical, and not what was signed
    return log_files([*held[:3], encode_entry(3, NOW_US + 3, raw), *held[4:]])


def lie_other_log(files: Files, held: list[bytes]) -> Files:
    return log_files([*held[:3], entry(3, log="log.example/other"), *held[4:]])


def lie_body(files: Files, held: list[bytes]) -> Files:
    return log_files([*held[:3], entry(3, nonsense=1), *held[4:]])


def lie_short_entry(files: Files, held: list[bytes]) -> Files:
    return log_files([*held[:3], b"short", *held[4:]])


def lie_time(files: Files, held: list[bytes]) -> Files:
    return log_files([*held[:3], entry(3, at=NOW_US + 1), *held[4:]])


def lie_swapped(files: Files, held: list[bytes]) -> Files:
    return log_files([*held[:3], held[4], held[3], *held[5:]])


def lie_repeated(files: Files, held: list[bytes]) -> Files:
    return log_files([*held[:-1], held[0]])


def lie_left_out(files: Files, held: list[bytes]) -> Files:
    return log_files([*held[:3], *held[4:]])


def lie_smaller_size(files: Files, held: list[bytes]) -> Files:
    """The last leaf of three proves as the last of two, under another split: 600 as 599 does not,
    so the log hides one entry before the last."""
    return log_files([*held[:-2], held[-1]])


def lie_tile(files: Files, held: list[bytes]) -> Files:
    tile = bytearray(files["tile/0/000"])
    tile[40] ^= 1
    return files | {"tile/0/000": bytes(tile)}


def lie_upper_tile(files: Files, held: list[bytes]) -> Files:
    return files | {"tile/1/000.p/2": bytes(64)}


def lie_long_tile(files: Files, held: list[bytes]) -> Files:
    return files | {"tile/0/000": files["tile/0/000"] + bytes(10)}


def lie_entry_served(files: Files, held: list[bytes]) -> Files:
    """Another, well-formed entry in the bundle than in the tree."""
    other = log_files([*held[:3], entry(3, name="another"), *held[4:]])
    return files | {"tile/entries/000": other["tile/entries/000"]}


def lie_bundle_cut(files: Files, held: list[bytes]) -> Files:
    return files | {"tile/entries/000": files["tile/entries/000"][:-1]}


def lie_bundle_missing(files: Files, held: list[bytes]) -> Files:
    return {path: data for path, data in files.items() if path != "tile/entries/001"}


def lie_tile_missing(files: Files, held: list[bytes]) -> Files:
    return {path: data for path, data in files.items() if path != "tile/0/001"}


def lie_root(files: Files, held: list[bytes]) -> Files:
    return files | {"checkpoint": checkpoint(len(held), b"\1" * 32)}


def lie_size(files: Files, held: list[bytes]) -> Files:
    return files | {"checkpoint": checkpoint(len(held) + 1, roots(held))}


def lie_other_key(files: Files, held: list[bytes]) -> Files:
    return files | {"checkpoint": checkpoint(len(held), roots(held), key=OTHER_KEY)}


def lie_other_origin(files: Files, held: list[bytes]) -> Files:
    note = checkpoint(len(held), roots(held), origin="log.example/other")
    return files | {"checkpoint": note}


def lie_garbage(files: Files, held: list[bytes]) -> Files:
    return files | {"checkpoint": b"<html>maintenance</html>"}


def lie_endless_checkpoint(files: Files, held: list[bytes]) -> Files:
    return files | {"checkpoint": files["checkpoint"] * 8_000}


Lie = Callable[[Files, list[bytes]], Files]
Found = tuple[str, bool]
SPLIT, FORK, BACK = ("split-view", True), ("inconsistent", True), ("rollback", False)

# The lie, what is found (and whether the file convinces others), and what is found when the log
# goes back to the truth: a checkpoint that it signed once is not forgotten.
LIES: list[tuple[Lie, Found, Found | None]] = [
    (lie_unsigned, ("bad-entry", True), SPLIT),
    (lie_other_signature, ("bad-entry", True), SPLIT),
    (lie_other_log, ("bad-entry", True), SPLIT),
    (lie_body, ("bad-entry", True), SPLIT),
    (lie_short_entry, ("bad-entry", True), SPLIT),
    (lie_time, ("bad-entry", True), SPLIT),
    (lie_swapped, ("misplaced-entry", True), SPLIT),
    (lie_repeated, ("misplaced-entry", True), SPLIT),
    (lie_left_out, ("misplaced-entry", True), FORK),
    (lie_smaller_size, ("wrong-size", True), FORK),
    (lie_tile, ("inconsistent", False), None),
    (lie_upper_tile, ("inconsistent", False), None),
    (lie_long_tile, ("inconsistent", False), None),
    (lie_entry_served, ("inconsistent", False), None),
    (lie_bundle_cut, ("wrong-size", False), None),
    (lie_bundle_missing, ("wrong-size", False), None),
    (lie_tile_missing, ("wrong-size", False), None),
    (lie_root, ("inconsistent", False), SPLIT),
    (lie_size, ("wrong-size", False), BACK),
    (lie_other_key, ("bad-checkpoint", False), None),
    (lie_other_origin, ("bad-checkpoint", False), None),
    (lie_garbage, ("bad-checkpoint", False), None),
    (lie_endless_checkpoint, ("bad-checkpoint", False), None),
]


@pytest.mark.parametrize(
    ("lie", "found", "after"), [pytest.param(*case, id=case[0].__name__) for case in LIES]
)
def test_each_lie_raises_its_alarm(
    tmp_path: Path, lie: Lie, found: Found, after: Found | None
) -> None:
    held = entries(600)
    source = DictSource(lie(log_files(held), held))
    poll = monitor(source, tmp_path).poll()
    assert alarms(poll) == check(tmp_path) == [found]
    # The next run finds the same, in the same file, and has not moved past it.
    again = monitor(source, tmp_path).poll()
    assert (again.alarms, again.size) == (poll.alarms, 0)
    source.files = log_files(held)
    mended = monitor(source, tmp_path).poll()
    assert alarms(mended) == ([after] if after else [])
    assert mended.size == (0 if after else 600)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 512, 513])
@pytest.mark.parametrize("every", [True, False])
def test_the_last_entry_binds_the_size(tmp_path: Path, size: int, every: bool) -> None:
    """A tree whose last leaf is a later entry: RFC proofs alone would accept it."""
    held = [*entries(size - 1), entry(size)]
    poll = monitor(DictSource(log_files(held)), tmp_path, entries=every).poll()
    assert alarms(poll) == check(tmp_path) == [("wrong-size", True)]


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 3), (7, 9), (256, 257), (300, 301), (512, 900)])
def test_a_fork_is_proven_by_hashes_alone(
    tmp_path: Path, every: bool, sizes: tuple[int, int]
) -> None:
    old, new = sizes
    source = DictSource(log_files(entries(old)))
    monitor(source, tmp_path, entries=every).poll()
    forked = [entry(0, name="another beginning"), *entries(new)[1:]]
    source.files = log_files(forked)
    poll = monitor(source, tmp_path, entries=every).poll()
    assert alarms(poll) == check(tmp_path) == [FORK]
    assert poll.size == old
    [evidence] = kept(tmp_path)
    assert set(evidence.items) == {"checkpoint_1", "checkpoint_2", "nodes"}
    assert len(evidence.items["nodes"]) <= 64 * 32


@pytest.mark.parametrize("every", [True, False])
def test_a_split_view(tmp_path: Path, every: bool) -> None:
    source = DictSource(log_files(entries(300)))
    monitor(source, tmp_path, entries=every).poll()
    source.files = log_files([entry(0, name="x"), *entries(300)[1:]])
    assert alarms(monitor(source, tmp_path, entries=every).poll()) == check(tmp_path) == [SPLIT]


def test_a_rollback_and_an_older_fork(tmp_path: Path) -> None:
    source = DictSource(log_files(entries(300)))
    monitor(source, tmp_path).poll()
    whole = source.files
    source.files = whole | {"checkpoint": log_files(entries(200))["checkpoint"]}
    assert alarms(monitor(source, tmp_path).poll()) == [BACK]
    # The tiles of 300 are still there, and show that this tree of 200 was never their beginning.
    forked = [entry(0, name="x"), *entries(200)[1:]]
    source.files = whole | {"checkpoint": log_files(forked)["checkpoint"]}
    assert alarms(monitor(source, tmp_path).poll()) == [FORK]
    source.files = whole
    assert monitor(source, tmp_path).poll().alarms == ()


def test_what_was_shown_before_the_log_fell_silent_counts(tmp_path: Path) -> None:
    """A checkpoint is remembered before a single entry of it was read."""
    source = DictSource(log_files(entries(300)), down=1)
    for n, size in enumerate((300, 301, 302)):
        source.files, source.down = log_files(entries(size)), len(source.reads) + 1
        with pytest.raises(Unavailable):
            monitor(source, tmp_path).poll()
        assert len(source.reads) == n + 1
    source.down = None
    held = [*entries(300), entry(300, name="x"), *entries(600)[301:]]
    source.files = log_files(held)
    assert alarms(monitor(source, tmp_path).poll()) == [FORK]
    source.files = log_files(entries(302))
    assert alarms(monitor(source, tmp_path).poll()) == [BACK], "from the forked 600"


def test_without_entries_the_edge_and_the_last_entry_are_held_against_the_root(
    tmp_path: Path,
) -> None:
    files = log_files(entries(300))
    forked = log_files([*entries(299), entry(299, name="x")])
    edge, last = "tile/0/001.p/44", "tile/entries/001.p/44"
    source = DictSource(files | {edge: forked[edge]})
    poll = monitor(source, tmp_path / "edge", entries=False).poll()
    assert alarms(poll) == check(tmp_path / "edge") == [("inconsistent", False)]
    source = DictSource(files | {last: forked[last]})
    poll = monitor(source, tmp_path / "last", entries=False).poll()
    assert alarms(poll) == check(tmp_path / "last") == [("inconsistent", False)]
    [evidence] = kept(tmp_path / "last")
    assert set(evidence.items) == {"entry", "leaf", "proof"}


def test_an_alarm_is_not_lost_when_the_log_falls_silent_after_it(tmp_path: Path) -> None:
    source = DictSource(log_files(entries(300)), down=4)
    poll = monitor(source, tmp_path, policy=policy(1)).poll()
    assert alarms(poll) == [("witness-conflict", False)]
    assert poll.unchecked == ("the log does not answer",)


def test_changed_old_entries_are_noticed_where_only_they_change(tmp_path: Path) -> None:
    source = DictSource(log_files(entries(10)))
    monitor(source, tmp_path).poll()
    files = log_files(entries(20))
    other = log_files([*entries(3), entry(3, name="x"), *entries(20)[4:]])
    source.files = files | {"tile/entries/000.p/20": other["tile/entries/000.p/20"]}
    poll = monitor(source, tmp_path).poll()
    assert alarms(poll) == [("inconsistent", False)]
    [evidence] = kept(tmp_path)
    assert set(evidence.items) == {"entry", "leaf", "proof"}


def test_keep_going_goes_past_bad_entries_once(tmp_path: Path) -> None:
    held = entries(600)
    bad = {3, 400, 401}
    lying = [entry(n, log="log.example/other") if n in bad else e for n, e in enumerate(held)]
    source = DictSource(log_files(lying))
    poll = monitor(source, tmp_path, keep_going=True).poll()
    assert alarms(poll) == [("bad-entry", True)] * 3
    assert poll.size == 600
    again = monitor(source, tmp_path, keep_going=True).poll()
    assert (again.alarms, again.size) == ((), 600)
    source.files = log_files([*lying, *(entry(n, log="log.example/x") for n in range(600, 640))])
    many = monitor(source, tmp_path, keep_going=True).poll()
    assert (len(many.alarms), many.more) == (MAX_ALARMS_PER_LOOK, 40 - MAX_ALARMS_PER_LOOK)
    assert many.size == 640


# --- witnesses ---


def policy(k: int) -> tuple[object, bytes]:
    keys = [format_vkey(witness_key(n)[1]) for n in range(3)]
    lines = [f"witness w{n} {key}" for n, key in enumerate(keys)]
    text = "\n".join([*lines, f"group g {k} w0 w1 w2", "quorum g", ""]).encode()
    return parse_policy(text), text


def test_a_policy_is_held_against_every_checkpoint(tmp_path: Path) -> None:
    held = entries(5)
    at = NOW_US // 1_000_000
    source = DictSource(log_files(held, cosigned=[(0, at), (1, at)]))
    poll = monitor(source, tmp_path, policy=policy(2)).poll()
    assert (poll.alarms, poll.size) == ((), 5)
    assert poll.witnesses == ("witness.example/0", "witness.example/1")
    lacking = monitor(source, tmp_path, policy=policy(3)).poll()
    assert alarms(lacking) == check(tmp_path) == [("witness-conflict", False)]
    assert lacking.size == 5, "the tree itself is followed all the same"
    assert len(source.reads) > 5, "cosignatures may come a moment later: it was read again"


def test_cosignatures_that_come_a_moment_later_are_waited_for(tmp_path: Path) -> None:
    source = DictSource(log_files(entries(5)))
    later = log_files(entries(5), cosigned=[(0, 1), (1, 1)])
    watching = monitor(source, tmp_path, policy=policy(2))
    watching._sleep = lambda seconds: source.files.update(later)
    assert watching.poll().alarms == ()


def test_a_witness_that_cosigned_both_sides_is_named(tmp_path: Path) -> None:
    source = DictSource(log_files(entries(5), cosigned=[(0, 1), (1, 1)]))
    monitor(source, tmp_path, policy=policy(1)).poll()
    forked = [entry(0, name="x"), *entries(5)[1:]]
    source.files = log_files(forked, cosigned=[(1, 2), (2, 2)])
    poll = monitor(source, tmp_path, policy=policy(1)).poll()
    assert alarms(poll) == check(tmp_path) == [SPLIT, ("witness-conflict", True)]
    [evidence] = [e for e in kept(tmp_path) if e.kind == "witness-conflict"]
    assert evidence.items["witness"].decode() == format_vkey(witness_key(1)[1])


def test_a_witness_that_steps_back_is_named(tmp_path: Path) -> None:
    source = DictSource(log_files(entries(9), cosigned=[(0, 10)]))
    monitor(source, tmp_path, policy=policy(1)).poll()
    source.files = log_files(entries(5), cosigned=[(0, 11)])
    poll = monitor(source, tmp_path, policy=policy(1)).poll()
    # It convicts that key, not the log.
    assert alarms(poll) == check(tmp_path) == [BACK, ("witness-conflict", False)]


def asked(n: int, note: bytes | None) -> dict[VerifierKey, DictSource]:
    """A witness that shows this checkpoint."""
    files = {} if note is None else {checkpoint_path(LOG): note}
    return {witness_key(n)[1]: DictSource(files)}


@pytest.mark.parametrize("size", [None, 0, 1, 8, 299, 300, 301])
def test_a_witness_that_saw_the_same_log(tmp_path: Path, size: int | None) -> None:
    note = None
    if size is not None:
        note = log_files(entries(size), cosigned=[(0, 5)])["checkpoint"]
    source = DictSource(log_files(entries(300)))
    poll = monitor(source, tmp_path, witnesses=asked(0, note)).poll()
    assert (poll.alarms, poll.unchecked, poll.size) == ((), (), 300)


@pytest.mark.parametrize("size", [1, 8, 299, 300])
def test_a_witness_that_was_shown_another_log(tmp_path: Path, size: int) -> None:
    other = log_files([entry(0, name="x"), *entries(size)[1:]], cosigned=[(0, 5)])
    source = DictSource(log_files(entries(300)))
    poll = monitor(source, tmp_path, witnesses=asked(0, other["checkpoint"])).poll()
    assert alarms(poll) == check(tmp_path) == [SPLIT if size == 300 else FORK]


def test_a_witness_that_does_not_answer_is_said(tmp_path: Path) -> None:
    down = {witness_key(0)[1]: DictSource(down=0)}
    source = DictSource(log_files(entries(3)))
    assert len(monitor(source, tmp_path, witnesses=down).poll().unchecked) == 1
    poll = monitor(source, tmp_path, witnesses=asked(0, b"nonsense")).poll()
    assert (len(poll.unchecked), poll.alarms) == (1, ())
    forged = log_files([entry(0, name="x")], key=OTHER_KEY, cosigned=[(0, 5)])["checkpoint"]
    assert monitor(source, tmp_path, witnesses=asked(0, forged)).poll().alarms == ()


# --- the contract ---


def anchored(size: int, root: bytes) -> AnchoredTree:
    contract = "0x" + "ab" * 20
    return AnchoredTree(chain_id=1, contract=contract, size=size, root=root, section=None)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 256, 299, 300])
def test_an_anchor_that_agrees(tmp_path: Path, size: int) -> None:
    source = DictSource(log_files(entries(300)))
    held = anchored(size, roots(entries(size)))
    poll = monitor(source, tmp_path, anchor=lambda: held).poll()
    assert (poll.alarms, poll.anchored) == ((), size or None)
    reads = len(source.reads)
    assert monitor(source, tmp_path, anchor=lambda: held).poll().anchored == (size or None)
    assert len(source.reads) == reads + 1


@pytest.mark.parametrize("size", [1, 2, 3, 256, 299, 300, 301])
def test_an_anchor_that_does_not(tmp_path: Path, size: int) -> None:
    source = DictSource(log_files(entries(300)))
    poll = monitor(source, tmp_path, anchor=lambda: anchored(size, b"\7" * 32)).poll()
    # A node's word without a proof of its state is testimony.
    assert alarms(poll) == check(tmp_path) == [("anchor-mismatch", False)]
    [evidence] = kept(tmp_path)
    assert ("nodes" in evidence.items) == (size < 300)
    assert ("shows only 300" in evidence.says) == (size > 300)
    assert poll.size == 300


def test_a_node_that_does_not_answer_is_said(tmp_path: Path) -> None:
    def down() -> AnchoredTree:
        raise Unavailable("no node")

    poll = monitor(DictSource(log_files(entries(3))), tmp_path, anchor=down).poll()
    assert (poll.alarms, poll.size) == ((), 3)
    assert poll.unchecked == ("the L1 contract: no node",)


# --- memory ---


WRITES = 9


@pytest.mark.parametrize("kept_write", [False, True])
@pytest.mark.parametrize("kill_at", range(1, WRITES + 1))
def test_a_kill_at_any_write_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int, kept_write: bool
) -> None:
    """The process ends right before, or right after, one durable write; a new one goes on."""
    monkeypatch.setattr(monitor_growth, "PROGRESS_ENTRIES", 256)

    class Killed(BaseException):
        pass

    writes = 0

    def write(path: Path, data: bytes, /, **options: int) -> None:
        nonlocal writes
        writes += 1
        if writes != kill_at or kept_write:
            write_durably(path, data)
        if writes == kill_at:
            raise Killed

    monkeypatch.setattr(monitor_state, "write_durably", write)
    killed = 0

    def poll(held: list[bytes]) -> Poll:
        nonlocal killed
        source = DictSource(log_files(held))
        try:
            return monitor(source, tmp_path).poll()
        except Killed:
            killed += 1
            return monitor(source, tmp_path).poll()

    for size in (700, 1025):
        found = poll(entries(size))
        assert (found.size, found.alarms) == (size, ())
    assert alarms(poll([entry(0, name="x"), *entries(1100)[1:]])) == [FORK]
    assert killed == 1


def test_catching_up_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_growth, "PROGRESS_ENTRIES", 256)
    source = DictSource(log_files(entries(1500)), down=9)  # checkpoint and four bundles with tiles
    with pytest.raises(Unavailable):
        monitor(source, tmp_path).poll()
    source.down = None
    source.reads.clear()
    assert monitor(source, tmp_path).poll().size == 1500
    assert "tile/entries/000" not in source.reads
    assert "tile/entries/004" in source.reads
    assert not (tmp_path / "progress.json").exists()


def test_progress_that_leads_nowhere_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that were served once and never signed for do not spoil the monitor for good."""
    monkeypatch.setattr(monitor_growth, "PROGRESS_ENTRIES", 256)
    lying = log_files([entry(0, name="x"), *entries(1500)[1:]])
    honest = log_files(entries(1500))
    source = DictSource(lying | {"checkpoint": honest["checkpoint"]}, down=7)
    with pytest.raises(Unavailable):
        monitor(source, tmp_path).poll()
    assert (tmp_path / "progress.json").exists()
    source.files, source.down = honest, None
    assert [kind for kind, _ in alarms(monitor(source, tmp_path).poll())] == ["inconsistent"]
    assert monitor(source, tmp_path).poll().size == 1500


def test_a_full_disk_is_an_error_and_hides_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes, /, **options: int) -> None:
        raise OSError(28, "No space left on device")

    source = DictSource(log_files(entries(5)))
    monitor(source, tmp_path).poll()
    monkeypatch.setattr("ledger.log.kept_evidence.write_durably", full)
    monkeypatch.setattr(monitor_state, "write_durably", full)
    source.files = log_files([entry(0, name="x"), *entries(5)[1:]])
    [alarm] = monitor(source, tmp_path).poll().alarms
    assert (alarm.kind, alarm.path) == ("split-view", None)
    source.files = log_files(entries(6))
    with pytest.raises(StorageError, match="cannot write the state"):
        monitor(source, tmp_path).poll()


def test_a_folder_is_of_one_log_and_one_process(tmp_path: Path) -> None:
    monitor(DictSource(log_files(entries(5))), tmp_path).poll()
    other = MonitorFolder(tmp_path, log=LOG, key=vkey_of(LOG, OTHER_KEY))
    with pytest.raises(ConfigError, match="follows the log"):
        other.load()
    folder = MonitorFolder(tmp_path, log=LOG, key=VKEY)
    with folder.locked(), pytest.raises(ConfigError, match="another monitor"), other.locked():
        pass


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    monitor(DictSource(log_files(entries(5))), tmp_path).poll()
    path = tmp_path / "monitor.json"
    good = path.read_bytes()
    folder = MonitorFolder(tmp_path, log=LOG, key=VKEY)
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            state = folder.load()
        except ConfigError:
            continue
        # Only what steers nothing may change unseen: counters and times.
        path.write_bytes(good)
        assert state == replace(
            folder.load(),
            recorded_at=state.recorded_at,
            entries=state.entries,
            last_ok=state.last_ok,
        )


def test_evidence_outlives_its_folder(tmp_path: Path) -> None:
    """What was kept is whole in itself: proven from a copy, by somebody who has nothing else."""
    source = DictSource(log_files(entries(5)))
    monitor(source, tmp_path).poll()
    source.files = log_files([entry(0, name="x"), *entries(5)[1:]])
    [alarm] = monitor(source, tmp_path).poll().alarms
    assert alarm.path
    elsewhere = tmp_path / "elsewhere" / "evidence"
    elsewhere.mkdir(parents=True)
    shutil.copy(alarm.path, elsewhere)
    shutil.rmtree(tmp_path / "evidence")
    [evidence] = kept(elsewhere.parent)
    assert isinstance(evidence, Evidence)
    assert check_evidence(evidence).facts["conclusive"]


def test_a_witness_that_is_always_ahead_of_what_we_are_shown(tmp_path: Path) -> None:
    """A log could keep us on a fork, a step behind what it shows the witness."""
    source = DictSource(log_files(entries(5)))
    found: list[tuple[str, bool]] = []
    for size in (5, 10, 15):
        source.files = log_files(entries(size))
        other = log_files([entry(0, name="x"), *entries(size + 4)[1:]], cosigned=[(0, 5)])
        witnesses = asked(0, other["checkpoint"])
        found += alarms(monitor(source, tmp_path, witnesses=witnesses).poll())
    # Size 9 is held against 10; then 9 and 14 against 15.
    assert found == check(tmp_path) == [FORK] * 3


def test_a_witness_that_was_ahead_on_the_same_log(tmp_path: Path) -> None:
    source = DictSource()
    for size in (5, 10, 15, 20):
        source.files = log_files(entries(size))
        ours = log_files(entries(size + 7), cosigned=[(0, 5)])["checkpoint"]
        watching = monitor(source, tmp_path, witnesses=asked(0, ours))
        assert watching.poll().alarms == ()
    assert [s.checkpoint.size for s in watching.state.ahead] == [22, 27]
