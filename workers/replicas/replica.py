"""One replica as a process has it: engine, adapters and server on a thread with an event loop.

Order at the start: the model is loaded, the port is open, then the registration is written; so who
finds the file finds a replica that answers. `drain` marks the file before it refuses anything. A
process that is killed leaves its file: readers see that nobody, or somebody else, answers there.

Blocking calls are bounded: `start`, `stop` and what they wait for have limits, and the threads are
daemons. Knows no Ray: the actor around it only makes, asks and drains it.
"""

import asyncio
import contextlib
import os
import secrets
import threading
from pathlib import Path
from typing import Any

import structlog

from ledger.errors import ComputeError, LedgerError
from workers.artefacts import ArtefactCache
from workers.link import WorkerSpec
from workers.replicas import registry
from workers.replicas.adapters import LedgerAdapters
from workers.replicas.backend import EngineBackend
from workers.replicas.protocol import DRAINING, READY, Hello
from workers.replicas.registry import Registration
from workers.replicas.routing import order
from workers.replicas.server import ReplicaServer

log = structlog.get_logger(__name__)

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
REFRESH_S = 3.0
REFRESH_SHARE = 0.05
"""Looking at the ledger takes at most this share of a replica's time, however long its list."""
LOOPBACK = "127.0.0.1"


class Replica:
    """`start`, `hello`, `drain`, `stop` from any thread; the rest happens on its own."""

    def __init__(
        self,
        backend: EngineBackend,
        adapters: LedgerAdapters | None,
        *,
        home: Path,
        name: str,
        host: str = LOOPBACK,
    ) -> None:
        self._backend = backend
        self._adapters = adapters
        self._home = home
        self._name = name
        self._instance = secrets.token_hex(8)
        self._server = ReplicaServer(
            backend,
            name=name,
            instance=self._instance,
            pid=os.getpid(),
            secret=registry.secret(home),
            host=host,
        )
        self._address = ""
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=f"replica-{name}", daemon=True)

    def start(self) -> "Replica":
        """Registered and answering when this returns; ComputeError when it cannot be."""
        self._thread.start()
        self._started.wait(START_TIMEOUT_S)
        if self._failure is not None or not self._address:
            raise ComputeError(f"replica {self._name} did not start: {self._failure or 'too slow'}")
        return self

    def hello(self) -> Hello:
        return self._server.hello()

    @property
    def registration(self) -> Registration:
        return Registration(
            name=self._name,
            address=self._address,
            pid=os.getpid(),
            instance=self._instance,
            base_model=self._backend.base_model,
            state=DRAINING if self._backend.draining else READY,
        )

    def drain(self) -> int:
        """Refuse what is new; how many answers are still under way. Ask again until none are."""
        if not self._backend.draining:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._server.drain)
            self._backend.draining = True
            registry.write(self._home, self.registration)
            log.info("draining", replica=self._name, answers=self._backend.live)
        return self._backend.live

    def stop(self) -> None:
        """Unregister and end; answers under way break off. Idempotent."""
        registry.remove(self._home, self._name, self._instance)
        if self._loop is not None and self._ending is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._ending.set)
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    # --- its thread ---

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
            log.exception("replica ended", replica=self._name)
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        self._address = await self._server.start()
        refresh = asyncio.create_task(self._refresh())
        try:
            registry.write(self._home, self.registration)
            log.info("replica is ready", replica=self._name, address=self._address)
            self._started.set()
            await self._ending.wait()
        finally:
            refresh.cancel()
            await self._server.stop()

    def _show(self) -> None:
        """Register again where the file was erased. Not while it drains: then the service did."""
        if self._backend.draining or self._name in registry.registered(self._home):
            return
        log.warning("registered again: its file was gone", replica=self._name)
        registry.write(self._home, self.registration)

    async def _refresh(self) -> None:
        """Follow the ledger's adapters. It may be down for a while: what is loaded is served."""
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            try:
                self._show()
                if self._adapters is not None:
                    await self._adapters.refresh()
            except LedgerError as error:
                log.warning("adapters not refreshed", error=error.slug, why=error.message)
            except Exception:
                log.exception("adapters not refreshed")
            await asyncio.sleep(max(REFRESH_S, (clock() - begun) / REFRESH_SHARE))


def open_replica(spec: WorkerSpec, *, name: str, host: str, threads: int) -> Replica:
    """Load the base model onto the device that is there, and serve it; not started yet."""
    import torch

    from workers import base_model
    from workers.openlora.driver import AsyncEngine
    from workers.openlora.engine import Engine, EngineConfig

    torch.set_num_threads(threads)
    path = spec.base_path()
    digest = base_model.digest(path)
    model, tokenizer = base_model.load(path)
    # The trainer names its base by hash: an adapter of another base is refused at loading.
    config = EngineConfig(base_names=frozenset({f"sha256:{digest}"}))
    serving = AsyncEngine(Engine(_placed(model), tokenizer, config))
    serving.start()
    client = spec.client()

    def at_home(adapter: str) -> bool:
        return order(adapter, {*registry.registered(spec.home), name})[0] == name

    cache = ArtefactCache(client, spec.home / "cache")
    adapters = LedgerAdapters(client, cache, serving, digest, at_home=at_home, keep=spec.keep)
    backend = EngineBackend(serving, adapters, digest)
    return Replica(backend, adapters, home=spec.home, name=name, host=host)


def _placed(model: Any) -> Any:
    """On a GPU in bfloat16 where Ray gave us one; else as it is, float32 on the CPU."""
    import torch

    from workers.openlora.placing import placed

    if torch.cuda.is_available():
        return placed(model, torch.device("cuda"), torch.bfloat16)
    return model
