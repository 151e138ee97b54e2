"""Replicas over small engines in this process, reached over real gRPC, for the tests of the router.

All replicas of a world serve the same weights; their adapters lie in folders. `Adapters` here loads
from those folders what `LedgerAdapters` would load through the ledger.
"""

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from transformers import LlamaForCausalLM

from ledger.errors import NotFound
from ledger.ports import ChatDelta, ChatRequest
from tests.unit.openlora_world import SavedAdapter, engine_for
from workers.openlora.driver import AsyncEngine
from workers.replicas.backend import EngineBackend
from workers.replicas.replica import Replica
from workers.serving import ServingRouter

T = TypeVar("T")
TEST_TIMEOUT_S = 60.0
DIGEST = "ba5e" * 16


class FolderAdapters:
    """`Adapters` over saved ones, by name; it counts what was asked of it."""

    def __init__(self, serving: AsyncEngine, saved: list[SavedAdapter]) -> None:
        self._serving = serving
        self._saved = {a.name: a for a in saved}
        self.loaded: list[str] = []
        self.renewed: list[str] = []

    async def ensure(self, adapter: str) -> None:
        if adapter in self.loaded:
            return
        if adapter not in self._saved:
            raise NotFound(f"no adapter {adapter}", code="model_not_found")
        found = self._saved[adapter]
        await self._serving.load_adapter(adapter, found.path, found.sha256)
        self.loaded.append(adapter)

    async def renew(self, adapter: str) -> None:
        self.renewed.append(adapter)


class World:
    """`await world.start("a")`, `world.kill("a")`; `world.router` asks them."""

    def __init__(self, home: Path, base: LlamaForCausalLM, saved: list[SavedAdapter]) -> None:
        self.home = home
        self._base = base
        self._saved = saved
        self.replicas: dict[str, Replica] = {}
        self.engines: dict[str, AsyncEngine] = {}
        self.adapters: dict[str, FolderAdapters] = {}
        self.router = ServingRouter(home)

    def start(self, name: str, **config: Any) -> Replica:
        serving = AsyncEngine(engine_for(self._base, **{"max_len": 400} | config))
        serving.start()
        adapters = FolderAdapters(serving, self._saved)
        backend = EngineBackend(serving, adapters, DIGEST)
        replica = Replica(backend, None, home=self.home, name=name).start()
        self.replicas[name], self.engines[name], self.adapters[name] = replica, serving, adapters
        return replica

    def kill(self, name: str) -> None:
        """As a process that is killed ends: its connections break, its file stays."""
        replica, loop = self.replicas[name], self.replicas[name]._loop
        assert loop is not None
        asyncio.run_coroutine_threadsafe(replica._server.stop(), loop).result(5)

    def stop(self) -> None:
        for name, replica in self.replicas.items():
            replica.stop()
            self.engines[name].stop()

    def steps(self, name: str) -> int:
        return self.engines[name].engine.counters.completion_tokens

    async def ask(self, request: ChatRequest) -> list[ChatDelta]:
        return [delta async for delta in self.router.stream(request)]


def chat(adapter: str | None = None, text: str = "Tell me.", **more: Any) -> ChatRequest:
    messages = [{"role": "user", "content": text}]
    fields: dict[str, Any] = {"messages": messages, "max_tokens": 24, **more}
    return ChatRequest(request_id=os.urandom(8).hex(), adapter=adapter, **fields)


def story(**more: Any) -> ChatRequest:
    """Long enough to be cut in the middle."""
    return chat(**{"max_tokens": 300, "temperature": 1.3, "seed": 11} | more)


def text_of(deltas: list[ChatDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def run(world: World, work: Coroutine[Any, Any, T], timeout_s: float = TEST_TIMEOUT_S) -> T:
    """On an event loop of its own, which leaves no session behind; bounded."""

    async def bounded() -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        finally:
            await world.router.aclose()
            # gRPC tells a channel's end from a thread: not to a loop that is closed by then.
            await asyncio.sleep(0.02)

    return asyncio.run(bounded())


async def until(what: Any, timeout_s: float = 20.0) -> Any:
    """Wait for `what()` to be true."""
    async with asyncio.timeout(timeout_s):
        while not (found := what()):
            await asyncio.sleep(0.01)
    return found
