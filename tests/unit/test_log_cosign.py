"""The log collects cosignatures: verified, in time, by the policy; and what it does when witnesses
are away, slow, forging, or have seen another history."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from ledger.errors import ConfigError, StorageError, Unavailable
from ledger.log import cosign as room
from ledger.log.add_checkpoint import PATH, format_cosignature, format_size
from ledger.log.cosign import Cosigners
from ledger.log.sequencer import Sequencer
from ledger.log.signer import LogSigner
from ledger.log.witness import Witness
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.evidence import check_evidence, parse_evidence
from ledger.verify.note import (
    COSIGNATURE,
    VerifierKey,
    cosign_text,
    format_vkey,
    parse_note,
    vkey_of,
)
from ledger.verify.policy import parse_policy
from tests.fakes import MemoryEntryLog, MemoryTileStore
from tests.witness_world import (
    LOG_KEY,
    LOG_VKEY,
    NOW_S,
    ORIGIN,
    Branch,
    Clock,
    policy_text,
    witness_at,
)

MAIN = Branch()
Handler = Callable[[str, str, bytes], tuple[int, bytes]]


class Net:
    """Witnesses behind names, with faults: the transport that a Cosigners gets."""

    def __init__(self, folder: Path, names: str = "ab") -> None:
        self.folder = folder
        self.stack = ExitStack()
        self.calls: list[tuple[str, str, bytes]] = []
        self.faults: dict[str, Handler] = {}
        self.witnesses = {n: self.start(n) for n in names}

    def start(self, name: str) -> Witness:
        return self.stack.enter_context(witness_at(self.folder / name, name=f"{name}.example"))

    def honest(self, name: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        witness = self.witnesses[name]
        if method == "GET":
            return 200, witness.checkpoint(path.split("/")[0])
        assert (method, path) == ("POST", PATH)
        answer = witness.add_checkpoint(body)
        return answer.status, answer.body

    def send(self, url: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        name = url.removeprefix("http://")
        self.calls.append((name, method, body))
        if name in self.faults:
            return self.faults[name](method, path, body)
        return self.honest(name, method, path, body)

    def cosigners(
        self, *, k: str = "all", required: bool = True, timeout_s: float = 2.0, **more: str
    ) -> Cosigners:
        rows = [(n, w.vkey, f"http://{n}") for n, w in self.witnesses.items()]
        return Cosigners(
            policy=parse_policy(policy_text(rows, k) + "".join(more.values())),
            vkey=LOG_VKEY,
            send=self.send,
            evidence=self.folder / "evidence",
            clock=Clock(),
            timeout_s=timeout_s,
            required=required,
        )  # fmt: skip


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    net = Net(tmp_path)
    with net.stack:
        yield net


def collect(cosigners: Cosigners, size: int, branch: Branch = MAIN) -> bytes:
    return cosigners.collect(branch.note(size), prove_from=lambda old: branch.proof(old, size))


def names(note: bytes) -> list[str]:
    return [line.name for line in parse_note(note).signatures]


def away(method: str, path: str, body: bytes) -> tuple[int, bytes]:
    raise Unavailable("connection refused")


def test_the_note_gets_the_lines_of_all(net: Net) -> None:
    cosigners = net.cosigners()
    for size in (0, 3, 8, 9, 300):
        note = collect(cosigners, size)
        assert names(note) == [ORIGIN, "a.example", "b.example"]
        opened = open_checkpoint(note, LOG_VKEY, witnesses=cosigners.policy.keys)
        assert cosigners.policy.satisfied_by([v.key for v in opened.witnesses])
        assert [v.timestamp for v in opened.witnesses] == [NOW_S, NOW_S]
    assert cosigners.health() == (True, "size 300: 2 of the 2 needed in everyone")
    assert len(net.calls) == 10  # it knows their sizes: one request each


def test_a_log_that_forgot_asks_again_from_the_size_it_is_told(net: Net) -> None:
    collect(net.cosigners(), 5)
    net.calls.clear()
    assert names(collect(net.cosigners(), 9)) == [ORIGIN, "a.example", "b.example"]
    assert sorted((n, body.split(b"\n")[0]) for n, _, body in net.calls) == [
        ("a", b"old 0"), ("a", b"old 5"), ("b", b"old 0"), ("b", b"old 5")
    ]  # fmt: skip


def test_the_same_checkpoint_again_after_a_publication_that_was_lost(net: Net) -> None:
    cosigners = net.cosigners()
    collect(cosigners, 5)
    assert names(collect(cosigners, 5)) == [ORIGIN, "a.example", "b.example"]
    assert names(collect(net.cosigners(), 5)) == [ORIGIN, "a.example", "b.example"]


def test_required_withholds_and_says_who_is_missing(net: Net) -> None:
    cosigners = net.cosigners()
    net.faults["b"] = away
    with pytest.raises(Unavailable, match=r"withheld: 1 of the 2 .* without b\. b: connection"):
        collect(cosigners, 5)
    ok, detail = cosigners.health()
    assert not ok
    assert "size 5 withheld" in detail
    del net.faults["b"]
    # It failed a moment ago, but the quorum needs it: it is asked at once.
    assert names(collect(cosigners, 6)) == [ORIGIN, "a.example", "b.example"]
    assert cosigners.health()[0]


def test_without_required_the_note_goes_out_with_what_came(net: Net) -> None:
    cosigners = net.cosigners(required=False)
    net.faults["b"] = away
    assert names(collect(cosigners, 5)) == [ORIGIN, "a.example"]
    assert cosigners.health()[0]
    asked = len(net.calls)
    assert names(collect(cosigners, 6)) == [ORIGIN, "a.example"]
    assert [n for n, _, _ in net.calls[asked:]] == ["a"]  # b is left alone for a while


def test_one_of_two_is_enough_and_the_other_is_given_a_moment(net: Net) -> None:
    cosigners = net.cosigners(k="1", timeout_s=20)
    held = threading.Event()
    net.faults["b"] = lambda *args: (held.wait(10), net.honest("b", *args))[1]
    began = time.monotonic()
    assert names(collect(cosigners, 5)) == [ORIGIN, "a.example"]
    assert room.GRACE_S <= time.monotonic() - began < 3
    began = time.monotonic()
    assert names(collect(cosigners, 6)) == [ORIGIN, "a.example"]  # b is busy: nobody waits for it
    assert time.monotonic() - began < room.GRACE_S
    held.set()


def test_a_silent_witness_costs_the_time_limit_once(net: Net) -> None:
    cosigners = net.cosigners(required=False, timeout_s=0.4)
    held = threading.Event()
    net.faults["b"] = lambda *args: (held.wait(10), net.honest("b", *args))[1]
    began = time.monotonic()
    for size in (5, 6, 7):
        assert names(collect(cosigners, size)) == [ORIGIN, "a.example"]
    assert 0.4 <= time.monotonic() - began < 1.0
    held.set()
    # Its late line was for the first note; now it is asked again, from where it stands.
    deadline = time.monotonic() + 10
    while names(collect(cosigners, 8)) != [ORIGIN, "a.example", "b.example"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_forged_and_foreign_lines_never_get_into_the_note(net: Net) -> None:
    stranger, text = SigningKey(b"x" * 32), MAIN.text(5)
    own = net.witnesses["b"]

    def line(name: str, key: SigningKey, signed: str = text) -> bytes:
        return format_cosignature(cosign_text(signed, name, key, NOW_S))

    real = net.honest("b", "POST", PATH, MAIN.request(0, 5))[1]
    earlier = line("b.example", own._key, MAIN.text(4))
    altered = real.replace(b"\n", b"").decode()
    altered = altered[:-8] + ("A" if altered[-8] != "A" else "B") + altered[-7:] + "\n"
    bad = {
        "nothing": b"",
        "not lines": b"<html>busy</html>\n",
        "a stranger's": line("c.example", stranger),
        "its name, another key": line("b.example", stranger),
        "of another tree": earlier,
        "altered": altered.encode(),
        "text before": text.encode() + b"\n" + real,
        "another note around it": b"x\n\n" + real,
        "signed with more around it": b"x\n\n" + line("b.example", own._key, f"{text}\nx\n"),
        "too long": real + line("c.example", stranger) * 200,
    }
    for body in bad.values():
        net.faults["b"] = lambda *args, body=body: (200, body)
        with pytest.raises(Unavailable, match=r"b: "):
            collect(net.cosigners(), 5)
    # Beside the real one, lines of unknown keys are ignored.
    net.faults["b"] = lambda *args: (200, line("c.example", stranger) + real)
    assert names(collect(net.cosigners(), 5)) == [ORIGIN, "a.example", "b.example"]


@pytest.mark.parametrize(
    ("status", "body"),
    [(500, b""), (404, b"unknown log\n"), (403, b""), (429, b""), (301, b""), (204, b""),
     (409, format_size(4)), (400, b"\x1b[31m\xff")],
)  # fmt: skip
def test_other_answers_are_failures_of_that_witness(net: Net, status: int, body: bytes) -> None:
    cosigners = net.cosigners()
    net.faults["b"] = lambda *args: (status, body)
    with pytest.raises(Unavailable, match=rf"b: it answered {status}") as caught:
        collect(cosigners, 5)
    assert str(caught.value).isprintable()
    assert not (net.folder / "evidence").exists()


def test_a_witness_that_crashes_our_code_is_a_failure_of_that_witness(net: Net) -> None:
    def bug(*args: object) -> tuple[int, bytes]:
        raise ZeroDivisionError("ours")

    net.faults["b"] = bug
    with pytest.raises(Unavailable, match="b: ZeroDivisionError: ours"):
        collect(net.cosigners(), 5)


@pytest.mark.parametrize(
    ("size", "kind", "conclusive"),
    [(9, "split-view", True), (12, "inconsistent", True), (7, "rollback", False)],
)
def test_another_history_is_an_alarm_with_evidence(
    net: Net, size: int, kind: str, conclusive: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Same key, another tree: a restored backup, or a stolen key. The witness's copy proves it."""
    collect(net.cosigners(), 9)
    fork = Branch("fork", fork=4)
    cosigners = net.cosigners()
    with pytest.raises(Unavailable, match="withheld"):
        collect(cosigners, size, fork)
    assert not cosigners.health()[0]
    assert "CRITICAL" in {record.levelname for record in caplog.records}
    kept = list((net.folder / "evidence").glob("*.json"))
    assert kept
    for path in kept:
        evidence = parse_evidence(path.read_bytes())
        verdict = check_evidence(evidence, format_vkey(LOG_VKEY))
        assert (evidence.kind, verdict.facts["conclusive"]) == (kind, conclusive)
    asked = len(net.calls)
    with pytest.raises(Unavailable):
        collect(cosigners, size + 1, fork)
    assert len(net.calls) == asked  # such a witness is not asked again for a while


def test_an_alarm_without_proof_is_still_an_alarm(
    net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    for status in (409, 422):
        net.faults["b"] = lambda *args, status=status: (status, b"no\n")
        with pytest.raises(Unavailable, match="b: "):
            collect(net.cosigners(), 5)
    net.faults["b"] = lambda *args: (409, format_size(1_000))
    with pytest.raises(Unavailable, match="older backup"):
        collect(net.cosigners(), 5)
    assert sum(record.levelname == "CRITICAL" for record in caplog.records) == 3
    assert not (net.folder / "evidence").exists()


def test_a_proof_that_cannot_be_made_is_no_cosignature(net: Net) -> None:
    collect(net.cosigners(), 5)

    def broken(old: int) -> list[bytes]:
        raise StorageError("no tiles")

    with pytest.raises(Unavailable, match="a: no tiles; b: no tiles"):
        net.cosigners().collect(MAIN.note(9), prove_from=broken)


def keys(*types: int) -> list[VerifierKey]:
    return [vkey_of(f"w{n}", SigningKey(bytes([n]) * 32), t) for n, t in enumerate(types)]


def test_policies_that_cannot_work_are_refused_at_the_start(net: Net) -> None:
    (key,) = keys(COSIGNATURE)
    own = vkey_of("w", LOG_KEY, COSIGNATURE)
    other = vkey_of("other", SigningKey(b"o" * 32))
    for text, match in {
        f"witness a {format_vkey(key)}\nquorum a\n": "cannot make",
        f"witness a {format_vkey(key)} ftp://a\nquorum a\n": "no http",
        f"witness a {format_vkey(own)} http://a\nquorum a\n": "own key",
        f"log {format_vkey(other)}\nquorum none\n": "other logs",
    }.items():
        with pytest.raises(ConfigError, match=match):
            Cosigners(
                policy=parse_policy(text), vkey=LOG_VKEY, send=net.send, evidence=net.folder,
                clock=Clock(), timeout_s=1, required=True,
            )  # fmt: skip


# --- in the sequencer ---


class House:
    """A real sequencer and signer over stores in memory, with the witnesses of a Net."""

    def __init__(self, net: Net, **settings: bool) -> None:
        self.net, self.log, self.tiles = net, MemoryEntryLog(), MemoryTileStore()
        self.signer = LogSigner(origin=ORIGIN, key=LOG_KEY, state_path=net.folder / "signed.json")
        self.cosigners = net.cosigners(**settings)  # type: ignore[arg-type]
        self.sequencer = Sequencer(
            log=self.log, tiles=self.tiles, signer=self.signer, clock=lambda: 5,
            cosigners=self.cosigners,
        )  # fmt: skip

    def grow(self, count: int) -> None:
        for _ in range(count):
            self.log.append(b"entry %d" % self.log.size())


def test_withheld_checkpoints_come_when_the_quorum_does(net: Net) -> None:
    house = House(net)
    house.sequencer.step()
    house.grow(10)
    net.faults["b"] = away
    for _ in range(2):
        with pytest.raises(Unavailable, match="size 10 withheld"):
            house.sequencer.step()
        assert house.tiles.latest().size == 0  # type: ignore[union-attr]
    house.grow(7)  # appends go on, and so does what the signer and witness a remember
    with pytest.raises(Unavailable, match="size 17 withheld"):
        house.sequencer.step()
    del net.faults["b"]
    published = house.sequencer.step()
    assert published
    assert published.size == 17
    assert names(published.note) == [ORIGIN, "a.example", "b.example"]


def test_publish_lost_after_the_witnesses_cosigned(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(net)
    house.grow(5)

    def lost(*args: object, **kwargs: object) -> None:
        raise StorageError("lost")

    with monkeypatch.context() as broken:
        broken.setattr(house.tiles, "publish", lost)
        with pytest.raises(StorageError):
            house.sequencer.step()
    for _ in range(2):
        house.grow(1)
        published = house.sequencer.step()
        assert published
        assert names(published.note) == [ORIGIN, "a.example", "b.example"]


def test_a_witness_that_was_away_is_added_when_the_log_is_idle(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000.0]
    monkeypatch.setattr("ledger.log.cosign.time.monotonic", lambda: now[0])
    house = House(net, required=False)
    net.faults["b"] = away
    house.grow(5)
    first = house.sequencer.step()
    assert first
    assert names(first.note) == [ORIGIN, "a.example"]
    del net.faults["b"]
    asked = len(net.calls)
    assert house.sequencer.complete() == first  # it failed a moment ago, and is left alone
    assert len(net.calls) == asked
    now[0] += room.RECOSIGN_S + 1
    _until(lambda: house.sequencer.complete() != first)
    fuller = house.tiles.latest()
    assert fuller
    assert names(fuller.note) == [ORIGIN, "a.example", "b.example"]
    assert (fuller.size, fuller.root, fuller.signed_at) == (first.size, first.root, first.signed_at)
    now[0] += room.RECOSIGN_S + 1
    asked = len(net.calls)
    assert house.sequencer.complete() == fuller  # nobody is missing: nobody is asked
    assert len(net.calls) == asked


def test_an_idle_log_does_not_wait_for_the_silent(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that come while a witness that was away is asked again must not wait for it."""
    monkeypatch.setattr(room, "RECOSIGN_S", 0.0)
    monkeypatch.setattr(room, "MAX_PAUSE_S", 0.01)
    house = House(net, required=False)
    net.faults["b"] = away
    house.grow(5)
    house.sequencer.step()
    held = threading.Event()
    net.faults["b"] = lambda *args: (held.wait(10), net.honest("b", *args))[1]
    time.sleep(0.05)
    began = time.monotonic()
    house.sequencer.complete()
    house.grow(1)
    newer = house.sequencer.step()
    assert time.monotonic() - began < 0.5
    held.set()
    assert newer
    assert names(newer.note) == [ORIGIN, "a.example"]
    _until(lambda: "b.example" in names(house.sequencer.complete().note))  # type: ignore[union-attr]


def test_the_running_sequencer_completes_and_withholds(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "RECOSIGN_S", 0.05)
    monkeypatch.setattr(room, "MAX_PAUSE_S", 0.05)
    monkeypatch.setattr("ledger.log.sequencer.WAIT_S", 0.05)
    house = House(net, required=False)
    net.faults["b"] = away
    house.grow(3)
    stop = threading.Event()
    thread = threading.Thread(target=house.sequencer.run, args=(stop,))
    thread.start()
    try:
        _until(lambda: names(house.tiles.latest().note) == [ORIGIN, "a.example"])  # type: ignore[union-attr]
        del net.faults["b"]
        _until(lambda: "b.example" in names(house.tiles.latest().note))  # type: ignore[union-attr]
    finally:
        stop.set()
        thread.join(10)


def _until(condition: Callable[[], bool], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            if condition():
                return
        except AttributeError:
            pass  # no checkpoint yet
        assert time.monotonic() < deadline
        time.sleep(0.02)
