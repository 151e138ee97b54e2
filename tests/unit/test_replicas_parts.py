"""What replicas are made of, without one running: bytes, files, choices, adapters, the keeper."""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from transformers import LlamaForCausalLM

from ledger import errors
from ledger.errors import (
    Backpressure,
    ComputeError,
    InvalidEvent,
    LedgerError,
    NotFound,
    StorageError,
)
from ledger.ports import ChatRequest, TokenChance
from tests.unit.openlora_world import SavedAdapter, engine_for, save_adapter, tiny_llama
from workers import keeper, ray_cluster
from workers.artefacts import ArtefactCache
from workers.base_model import digest
from workers.bounded import Hangs, bounded
from workers.keeper import Keeper
from workers.link import WorkerSpec
from workers.openlora.driver import AsyncEngine
from workers.openlora.errors import PromptTooLong, UnknownAdapter
from workers.ray_cluster import ClusterInfo
from workers.replicas import errors as wire
from workers.replicas import protocol, registry
from workers.replicas.adapters import LedgerAdapters
from workers.replicas.pending import Pending
from workers.replicas.protocol import Ended, Failed, Hello, Piece, Submit
from workers.replicas.registry import Registration
from workers.replicas.routing import CALM_LOAD, choose, order

# --- bytes ---


def roundtrip(value: Any) -> Any:
    return protocol.unpack(protocol.pack(value))


def test_messages_survive_the_wire() -> None:
    request = ChatRequest(
        request_id="r", adapter=None, prompt="a\ud7ffé", max_tokens=3, stop=["x"], payer="p",
        logprobs=2, temperature=0.1, seed=2**53 - 1, timeout_s=1.5,
    )  # fmt: skip
    submit = Submit(number=7, request=request, resume_ids=(1, 2), timeout_s=0.25)
    found = Submit.from_wire(roundtrip(submit.to_wire()))
    assert (found.number, found.resume_ids, found.timeout_s) == (7, (1, 2), 0.25)
    assert {**vars(found.request), "stop": ["x"], "messages": ()} == {
        **vars(request),
        "stop": ["x"],
        "messages": (),
    }
    chance = TokenChance(text="�", raw=b"\xc3", logprob=-0.5, top=(("�", b"\xc3", -0.5),))
    for end in (
        None,
        Ended(reason="stop", prompt_tokens=3, completion_tokens=2),
        Failed(error=ComputeError("gone"), resumable=True),
    ):
        piece = Piece(number=1, text="é", token_ids=(5, 6), chances=(chance,), end=end)
        back = Piece.from_wire(roundtrip(piece.to_wire()))
        if isinstance(end, Failed):
            assert isinstance(back.end, Failed)
            assert (back.end.error.message, back.end.resumable) == ("gone", True)
        else:
            assert back == piece
    newer = {**submit.to_wire(), "request": {**submit.to_wire()["request"], "unknown": 1}}
    assert Submit.from_wire(newer).request.request_id == "r", "a peer may be a version ahead"
    for bad in ({}, {**submit.to_wire(), "request": {}}, {**submit.to_wire(), "number": "x"}):
        with pytest.raises(InvalidEvent, match="not a request of this protocol"):
            Submit.from_wire(bad)


def test_designed_errors_survive_the_wire() -> None:
    def back(error: LedgerError) -> LedgerError:
        return wire.from_wire(roundtrip(wire.to_wire(error)))

    classes = [
        c
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, LedgerError) and c is not Backpressure
    ]
    for cls in classes:
        found = back(cls("what and why", field="a", number=3, odd=Path("x")))
        assert type(found) is cls
        assert found.message == "what and why"
        assert found.detail == {"field": "a", "number": 3, "odd": "x"}
    full = back(Backpressure("full", retry_after_s=9))
    assert isinstance(full, Backpressure)
    assert full.retry_after_s == 9
    assert type(back(UnknownAdapter("x"))) is NotFound, "inner rooms' errors as their ancestors"
    long = back(PromptTooLong("long", limit=3))
    assert type(long) is InvalidEvent
    assert long.detail == {"code": "context_length_exceeded", "limit": 3}
    assert type(wire.from_wire({"error": "OfTomorrow", "message": "m"})) is ComputeError
    assert type(wire.from_wire({"error": "__builtins__", "message": "m"})) is ComputeError


def test_pending_pieces_merge_in_order_and_are_cut_into_messages() -> None:
    async def work() -> None:
        pending = Pending(limit=10)
        for n in range(6):
            pending.put(Piece(number=n % 2, text=str(n), token_ids=(n,)))
        assert not pending.full
        even, odd = pending.take()
        assert (even.text, even.token_ids, odd.text) == ("024", (0, 2, 4), "135")
        assert pending.take() == []
        for n in range(30_000):
            pending.put(Piece(number=0, token_ids=(n,)))
        assert pending.full
        sizes = []
        while pieces := pending.take():
            sizes.append(len(pieces[0].token_ids))
        assert sum(sizes) == 30_000
        assert max(sizes) <= 8_192
        assert not pending.full

        began = time.monotonic()
        pending.put(Piece(number=0, token_ids=(1,)), urgent=True)
        await pending.wait(5)
        await pending.pause(64)
        assert time.monotonic() - began < 0.015, "a first token does not wait for others"
        pending.put(Piece(number=3))
        assert pending.drop() == {0, 3}

    asyncio.run(work())


# --- files ---


def test_registrations_are_private_whole_and_their_own(tmp_path: Path) -> None:
    one = Registration(
        name="openlora-0", address="127.0.0.1:1", pid=1, instance="i", base_model="b", state="ready"
    )
    registry.write(tmp_path, one)
    path = tmp_path / "ray" / "replicas" / "openlora-0.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert registry.registered(tmp_path) == {"openlora-0": one}
    (path.parent / "broken.json").write_text("{")
    (path.parent / "other.json").write_text(path.read_text())
    (path.parent / "long.json").write_text(" " * 5_000)
    mistyped = {**vars(one), "name": "typed", "address": 7}
    (path.parent / "typed.json").write_text(json.dumps(mistyped))
    assert registry.registered(tmp_path) == {"openlora-0": one}, "a file of another name is none"
    registry.remove(tmp_path, "openlora-0", "of another start")
    assert registry.registered(tmp_path) == {"openlora-0": one}
    registry.remove(tmp_path, "openlora-0", "i")
    registry.remove(tmp_path, "openlora-0")
    assert registry.registered(tmp_path) == {}
    assert registry.registered(tmp_path / "nowhere") == {}


def test_the_secret_is_one_however_many_make_it(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(registry.secret(tmp_path)), daemon=True)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(set(found)) == 1
    path = tmp_path / "ray" / "data-plane.secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no parts are left"
    path.write_text("short")
    with pytest.raises(ComputeError, match="remove it"):
        registry.secret(tmp_path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ComputeError, match="cannot be read"):
        registry.secret(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ComputeError, match="cannot be read"):
        registry.secret(tmp_path)


# --- choices ---


def test_adapters_keep_their_homes_when_replicas_come_and_go() -> None:
    names = [f"openlora-{n}" for n in range(5)]
    adapters = [f"adapter {n}" for n in range(1_000)]
    before = {a: choose(a, dict.fromkeys(names, 0)) for a in adapters}
    shares = [list(before.values()).count(name) for name in names]
    assert min(shares) > 140, "about a fifth each"
    after = {a: choose(a, dict.fromkeys(names[:-1], 0)) for a in adapters}
    moved = [a for a in adapters if before[a] != after[a]]
    assert {before[a] for a in moved} == {names[-1]}, "only those whose home is gone"
    assert all(after[a] == order(a, names)[1] for a in moved), "to the next in their order"


def test_loads_are_bounded_and_calm_replicas_are_left_alone() -> None:
    first, second = order("a", ["x", "y"])
    assert choose("a", {first: CALM_LOAD - 1, second: 0}) == first
    assert choose("a", {first: 40, second: 0}) == second
    assert choose("a", {first: 40, second: 36}) == first, "crowded alike: home is better"
    assert choose(None, {"x": 3, "y": 2}) == "y"
    assert choose("a", {}) is None
    loads = dict.fromkeys(["x", "y", "z"], 0)
    for _ in range(300):  # everybody asks for one adapter
        loads[choose("a", loads) or ""] += 1
    assert max(loads.values()) <= 1.25 * 100 + 1


# --- adapters of a ledger ---


class Ledger:
    """The client's calls that adapters are resolved by, over dictionaries."""

    def __init__(self, saved: list[SavedAdapter], base: str) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.fetched: list[str] = []
        for n, adapter in enumerate(saved):
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                data = (adapter.path / name).read_bytes()
                self.blobs[hashlib.sha256(data).hexdigest()] = data
            self.rows[uuid(n)] = {
                "adapter": uuid(n), "status": "published", "base_model": base, "model": f"m{n}",
                "run": f"run {n}", "adapter_sha256": adapter.sha256,
                "adapter_config_sha256": adapter.config_sha256,
            }  # fmt: skip

    def pages(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Newest first, as the API lists them."""
        return iter([r for r in self.rows.values() if r["status"] == "published"][::-1])

    def get(self, path: str) -> dict[str, Any]:
        _, _, what, name = path.split("/")
        if what == "runs":
            return next(r for r in self.rows.values() if r["run"] == name)
        if name not in self.rows:
            raise NotFound(f"no adapter {name}")
        return self.rows[name]

    def model(self, name: str) -> dict[str, Any]:
        named = [r for r in self.pages("") if name in (r["model"], r["adapter"])]
        if not named:
            raise NotFound(f"no model {name}")
        return named[0]

    def get_blob(self, sha256: str) -> bytes:
        self.fetched.append(sha256)
        return self.blobs[sha256]


def uuid(n: int) -> str:
    return f"00000000-0000-0000-0000-{n:012d}"


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def saved(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> list[SavedAdapter]:
    folder = tmp_path_factory.mktemp("saved")
    return [save_adapter(base, folder, f"a{n}", rank=2, seed=n) for n in range(4)]


def test_the_newest_are_read_ahead(
    base: LlamaForCausalLM,
    saved: list[SavedAdapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.replicas.adapters.MAX_PREFETCH", 2)
    ledger: Any = Ledger(saved, "b" * 64)
    serving = AsyncEngine(engine_for(base))
    adapters = LedgerAdapters(ledger, ArtefactCache(ledger, tmp_path), serving, "b" * 64)
    assert asyncio.run(adapters.refresh()) == 2
    assert serving.engine.store.ids() == [uuid(2), uuid(3)]


def test_what_the_operator_names_is_kept(
    base: LlamaForCausalLM, saved: list[SavedAdapter], tmp_path: Path
) -> None:
    ledger: Any = Ledger(saved, "b" * 64)
    serving = AsyncEngine(engine_for(base, slots=4))
    adapters = LedgerAdapters(
        ledger, ArtefactCache(ledger, tmp_path), serving, "b" * 64,
        at_home=lambda adapter: adapter != uuid(3), keep={uuid(0), uuid(3), "m"},
    )  # fmt: skip

    def kept() -> set[str]:
        return {e.adapter_id for e in serving.engine.store._kept}

    async def work() -> None:
        ledger.rows[uuid(1)]["model"] = ledger.rows[uuid(2)]["model"] = "m"
        await adapters.refresh()
        assert kept() == {uuid(0), uuid(2)}, "an id, a model's newest, and what lives elsewhere not"
        await adapters.renew(uuid(0))
        await adapters.refresh()
        assert kept() == {uuid(0), uuid(2)}, "a fresh copy is kept as the old one was"
        ledger.rows[uuid(2)]["status"] = "retired"
        await adapters.refresh()
        assert kept() == {uuid(0), uuid(1)}, "what the name stands for now"
        ledger.rows[uuid(1)]["status"] = "retired"
        await adapters.refresh()
        assert kept() == {uuid(0)}

    asyncio.run(work())


def test_adapters_follow_the_ledger(
    base: LlamaForCausalLM, saved: list[SavedAdapter], tmp_path: Path
) -> None:
    ledger: Any = Ledger(saved, "b" * 64)
    serving = AsyncEngine(engine_for(base))
    cache = ArtefactCache(ledger, tmp_path)
    adapters = LedgerAdapters(
        ledger, cache, serving, "b" * 64, at_home=lambda adapter: adapter != uuid(1)
    )

    def registered() -> list[str]:
        return serving.engine.store.ids()

    async def work() -> None:
        ledger.rows[uuid(3)]["base_model"] = "c" * 64
        assert await adapters.refresh() == 2
        assert registered() == [uuid(0), uuid(2)], "those that live here, of this base"
        await asyncio.gather(*[adapters.ensure(uuid(1)) for _ in range(5)])
        assert registered() == [uuid(0), uuid(1), uuid(2)], "and what is asked for"
        assert [ledger.fetched.count(a.sha256) for a in saved] == [1, 1, 1, 0], "each once"

        with pytest.raises(InvalidEvent, match="is for base model c"):
            await adapters.ensure(uuid(3))
        with pytest.raises(NotFound, match="no adapter"):
            await adapters.ensure(uuid(9))
        with pytest.raises(InvalidEvent, match="is no id"):
            await adapters.ensure("../../etc/passwd")

        ledger.rows[uuid(1)]["status"] = "retired"
        await adapters.refresh()
        assert registered() == [uuid(0), uuid(2)]
        with pytest.raises(NotFound, match="is retired"):
            await adapters.ensure(uuid(1))

        # Damaged on this disk: a fresh copy is fetched, once; should that be damaged, an error.
        (weights,) = tmp_path.glob(f"adapters/{saved[2].sha256}-*/adapter_model.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        before = len(ledger.fetched)
        await adapters.renew(uuid(2))
        assert ledger.fetched[before:].count(saved[2].sha256) == 1
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == saved[2].sha256
        damaged = cache.adapter
        cache.adapter = spoil(damaged)  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="hashes to"):
            await adapters.renew(uuid(2))
        cache.adapter = damaged  # type: ignore[method-assign]
        await adapters.ensure(uuid(2))
        assert registered() == [uuid(0), uuid(2)]

    asyncio.run(work())


def spoil(fetch: Any) -> Any:
    """A disk that damages what is written to it."""

    def fetched(*hashes: str) -> Path:
        folder: Path = fetch(*hashes)
        (folder / "adapter_model.safetensors").write_bytes(b"rubbish")
        return folder

    return fetched


# --- limits ---


def test_a_call_that_hangs_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bounded("a sum", lambda: 1 + 1, 5) == 2
    with pytest.raises(ValueError):
        bounded("a mistake", lambda: int("x"), 5)
    never = threading.Event()
    began = time.monotonic()
    with pytest.raises(Hangs, match=r"waiting did not return within 0\.1 s"):
        bounded("waiting", never.wait, 0.1)
    assert time.monotonic() - began < 5

    monkeypatch.setattr(ray_cluster, "_hung", None)
    monkeypatch.setattr(ray_cluster, "_forget_exit", lambda: None)
    with pytest.raises(Hangs):
        ray_cluster.call("ray.init", never.wait, 0.1)
    assert ray_cluster.hung() == "ray.init"
    with pytest.raises(Hangs, match="start it again"):
        ray_cluster.call("ray.get_actor", lambda: pytest.fail("nothing is called any more"))
    never.set()


# --- the keeper ---

INFO = ClusterInfo(address="127.0.0.1:9", jobs_url="", token_file=None, python="python")


class Cluster:
    """Actors as the keeper sees them: handles whose calls answer, or raise what Ray would."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.made: list[str] = []
        self.killed: list[tuple[str, bool]] = []
        self.base = digest()
        self.actors: dict[str, Any] = {}
        monkeypatch.setattr(Keeper, "_started", lambda keeper, *given: self.start(*given))
        monkeypatch.setattr(Keeper, "_gpus", lambda keeper: 0.0)
        monkeypatch.setattr(ray, "kill", self.kill)
        monkeypatch.setattr(ray, "get", lambda refs, timeout: [ref() for ref in refs])
        monkeypatch.setattr(keeper, "POLL_S", 0.001)
        key = home / "key"
        key.touch(mode=0o600)
        self.spec = WorkerSpec(api="http://127.0.0.1:1", key_file=key, home=home)

    def keeper(self, replicas: int = 2) -> Keeper:
        return Keeper(
            self.spec, replicas=replicas, threads=1, host=None, get=lambda ref, limit_s: ref()
        )

    def start(self, name: str, info: ClusterInfo, gpus: float) -> Any:
        if name not in self.actors:
            self.made.append(name)
            self.actors[name] = self.actor(name)
        return self.actors[name]

    def actor(self, name: str) -> Any:
        hello = Hello(name=name, instance="i", pid=1, base_model=self.base, state="ready")
        found = SimpleNamespace(name=name, hello=hello, under_way=[0], error=None)

        def health() -> dict[str, Any]:
            if found.error:
                raise found.error
            return dict(found.hello.to_wire())

        def drain() -> int:
            left = found.under_way
            return int(left.pop(0) if len(left) > 1 else left[0])

        found.health = SimpleNamespace(remote=lambda: health)
        found.drain = SimpleNamespace(remote=lambda: drain)
        where = Registration(
            name=name, address="127.0.0.1:1", pid=1, instance="i", base_model="", state="ready"
        )
        registry.write(self.home, where)
        return found

    def kill(self, actor: Any, *, no_restart: bool = True) -> None:
        self.killed.append((actor.name, no_restart))
        if no_restart:
            self.actors.pop(actor.name, None)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def test_the_keeper_keeps_what_is_wanted(cluster: Cluster) -> None:
    kept = cluster.keeper()
    assert kept.step(INFO) == 2
    assert kept.step(INFO) == 2
    assert cluster.made == ["openlora-0", "openlora-1"]
    cluster.actors["openlora-0"].under_way = [2, 1, 0]
    assert kept.drain() == 0
    assert sorted(cluster.killed) == [("openlora-0", True), ("openlora-1", True)]
    assert registry.registered(cluster.home) == {}


def test_the_keeper_cuts_what_does_not_finish(cluster: Cluster) -> None:
    kept = cluster.keeper(1)
    kept.step(INFO)
    cluster.actors["openlora-0"].under_way = [3]
    began = time.monotonic()
    assert kept.drain(0.1) == 3
    assert time.monotonic() - began < 2
    assert cluster.killed == [("openlora-0", True)]


def test_the_keeper_replaces_another_base_model_one_at_a_time(cluster: Cluster) -> None:
    mine, cluster.base = cluster.base, "of another service"
    for name in ("openlora-0", "openlora-1"):
        cluster.actors[name] = cluster.actor(name)
    cluster.base = mine
    cluster.actors["openlora-0"].under_way = [1, 0]
    kept = cluster.keeper()
    with pytest.raises(ComputeError, match="replacing"):
        kept.step(INFO)
    assert cluster.killed == [("openlora-0", True)], "the other one serves meanwhile"
    with pytest.raises(ComputeError, match="openlora-1 served"):
        kept.step(INFO)
    assert cluster.made == ["openlora-0"], "it was up again before"
    assert kept.step(INFO) == 2
    assert cluster.killed == [("openlora-0", True), ("openlora-1", True)]


def test_the_keeper_restarts_what_is_stuck_or_silent(cluster: Cluster) -> None:
    kept = cluster.keeper(1)
    kept.step(INFO)
    actor = cluster.actors["openlora-0"]
    actor.hello = Hello(**{**actor.hello.to_wire(), "stuck_s": keeper.STUCK_S + 1})
    kept.step(INFO)
    assert cluster.killed == [("openlora-0", False)], "Ray starts another process"
    actor.hello = Hello(**{**actor.hello.to_wire(), "stuck_s": 0.0})
    assert kept.step(INFO) == 1

    actor.error = ray.exceptions.GetTimeoutError("no answer")
    for n in range(keeper.FAILURES):
        assert len(cluster.killed) == 1, n
        with pytest.raises(ComputeError):
            kept.step(INFO)
    assert cluster.killed[1:] == [("openlora-0", False)]
    actor.error = None
    assert kept.step(INFO) == 1

    actor.error = ray.exceptions.ActorDiedError()
    del cluster.actors["openlora-0"]
    for _ in range(keeper.FAILURES):
        with pytest.raises(ComputeError):
            kept.step(INFO)
    assert kept.step(INFO) == 1, "dead for good: another actor"
    assert cluster.made == ["openlora-0"] * 2


def test_the_keeper_ends_replicas_that_are_more_than_wanted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers import actors

    monkeypatch.setattr(actors, "find_actor", lambda name: cluster.actors.get(name))
    cluster.keeper(3).step(INFO)
    gone = Registration(
        name="openlora-7", address="127.0.0.1:1", pid=1, instance="i", base_model="", state="ready"
    )
    registry.write(cluster.home, gone)
    assert cluster.keeper(1).step(INFO) == 1
    assert sorted(cluster.killed) == [("openlora-1", True), ("openlora-2", True)]
    assert set(registry.registered(cluster.home)) == {"openlora-0"}
    assert json.loads((cluster.home / "ray/replicas/openlora-0.json").read_text())["pid"] == 1
