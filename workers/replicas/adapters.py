"""The ledger's published adapters in one engine: loaded by id, prefetched, retired, healed.

An id resolves through the ledger, from its record to blobs by hash: never to a path that a client
named. When a model's adapter is replaced, the API resolves the name to the new id, which was
prefetched; the old one leaves with its last answer once the ledger retired it. What the operator
wants kept is asked of the API by name. Knows the client, the cache and the engine; no network of
its own.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, Protocol

import structlog

from ledger.client import Client
from ledger.errors import Forbidden, InvalidEvent, LedgerError, NotFound, StorageError
from workers.artefacts import ArtefactCache
from workers.link import plain_uuid
from workers.openlora.driver import AsyncEngine

log = structlog.get_logger(__name__)

MAX_PREFETCH = 32
"""Newly published adapters that one refresh loads ahead of their first request."""


class Adapters(Protocol):
    """What a backend asks: `ensure` before a request, `renew` when its copy turned out damaged."""

    async def ensure(self, adapter: str) -> None: ...

    async def renew(self, adapter: str) -> None: ...


class LedgerAdapters:
    """The adapters of one engine; one event loop. `at_home` says which ones this engine is likely
    to be asked for, and so prefetches; it loads others when they are asked for."""

    def __init__(
        self,
        client: Client,
        cache: ArtefactCache,
        serving: AsyncEngine,
        digest: str,
        *,
        at_home: Callable[[str], bool] = lambda adapter: True,
        keep: Set[str] = frozenset(),
    ) -> None:
        self._client = client
        self._cache = cache
        self._serving = serving
        self._digest = digest
        self._at_home = at_home
        self._keep = keep
        self._kept: dict[str, bool] = {}
        """Adapters that are to be kept, and whether they are."""
        self._loaded: dict[str, Path] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        self._seen: set[str] = set()

    async def ensure(self, adapter: str) -> None:
        """Have the engine know it. Raises InvalidEvent (no id, another base, a form that cannot be
        served), NotFound (unknown, retired), StorageError (damaged twice), Unavailable."""
        if adapter in self._loaded:
            return
        lock = self._loading.setdefault(plain_uuid(adapter), asyncio.Lock())
        try:
            async with lock:
                if adapter not in self._loaded:
                    await self._load_or_heal(adapter)
        finally:
            self._loading.pop(adapter, None)

    async def renew(self, adapter: str) -> None:
        """Its files turned out damaged after it was loaded: fetch them again, once."""
        lock = self._loading.setdefault(plain_uuid(adapter), asyncio.Lock())
        try:
            async with lock:
                log.warning("adapter files damaged", adapter=adapter)
                self._unload(adapter)
                await self._load(adapter, afresh=True)
        finally:
            self._loading.pop(adapter, None)

    async def refresh(self) -> int:
        """Retire what the ledger retired, load what it published newly; how many are loaded."""
        published = await asyncio.to_thread(
            lambda: list(self._client.pages("/v1/adapters", status="published"))
        )
        listed = {str(row["adapter"]) for row in published}
        for adapter in [a for a in self._loaded if a not in listed]:
            # A listing may be cut; the adapter's own page decides.
            row = await asyncio.to_thread(self._client.get, f"/v1/adapters/{adapter}")
            if row["status"] != "published":
                self._unload(adapter)
                log.info("adapter retired", adapter=adapter)
        # Only what is new: loading all there are would drive the used ones out of memory.
        fresh = [str(r["adapter"]) for r in published if str(r["adapter"]) not in self._seen]
        self._seen = listed
        for adapter in [a for a in fresh if self._at_home(a)][:MAX_PREFETCH]:  # newest first
            try:
                await self.ensure(adapter)
            except LedgerError as error:
                log.warning("adapter not loaded", adapter=adapter, reason=error.message)
        await self._keep_named()
        return len(self._loaded)

    async def _keep_named(self) -> None:
        """What the operator named is kept where it is at home: an id, or what a model's name stands
        for now. The API says which that is: others may publish under the same string."""
        named = [await asyncio.to_thread(self._adapter_of, name) for name in sorted(self._keep)]
        wanted = {adapter for adapter in named if adapter and self._at_home(adapter)}
        for adapter in self._kept.keys() - wanted:
            del self._kept[adapter]
            with contextlib.suppress(NotFound):
                await self._serving.keep_adapter(adapter, kept=False)
        for adapter in sorted(a for a in wanted if not self._kept.get(a)):
            try:
                await self.ensure(adapter)
                await self._serving.keep_adapter(adapter)
                self._kept[adapter] = True
            except LedgerError as error:
                if adapter not in self._kept:  # said once, tried again at each look
                    log.warning("adapter not kept", adapter=adapter, reason=error.message)
                self._kept[adapter] = False

    def _adapter_of(self, name: str) -> str | None:
        with contextlib.suppress(NotFound, Forbidden):
            return str(self._client.model(name)["adapter"])
        return None

    async def _load_or_heal(self, adapter: str) -> None:
        try:
            await self._load(adapter)
        except StorageError as error:  # a damaged copy on this disk: once more, afresh
            log.warning("adapter copy damaged", adapter=adapter, reason=error.message)
            await self._load(adapter, afresh=True)

    async def _load(self, adapter: str, *, afresh: bool = False) -> None:
        row, run = await asyncio.to_thread(self._resolve, adapter)
        hashes = row["adapter_sha256"], run["adapter_config_sha256"]
        folder = await asyncio.to_thread(self._fetch, *hashes, afresh)
        await self._serving.load_adapter(adapter, folder, hashes[0], config_sha256=hashes[1])
        self._loaded[adapter] = folder
        log.info("adapter loaded", adapter=adapter, model=row["model"])

    def _resolve(self, adapter: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        row = self._client.get(f"/v1/adapters/{adapter}")
        if row["status"] != "published":
            raise NotFound(f"adapter {adapter} is {row['status']}; list the published ones")
        if row["base_model"] != self._digest:
            raise InvalidEvent(
                f"adapter {adapter} is for base model {row['base_model']}; served is {self._digest}"
            )
        return row, self._client.get(f"/v1/runs/{row['run']}")

    def _fetch(self, weights_sha256: str, config_sha256: str, afresh: bool) -> Path:
        folder = self._cache.adapter(weights_sha256, config_sha256)
        if afresh:
            self._cache.drop(folder)
            folder = self._cache.adapter(weights_sha256, config_sha256)
        return folder

    def _unload(self, adapter: str) -> None:
        self._loaded.pop(adapter, None)
        self._kept.pop(adapter, None)
        with contextlib.suppress(NotFound):
            self._serving.retire(adapter)
