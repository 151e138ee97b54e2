"""The Ray actors: thin shells around the engines, each in a process of its own.

Here Ray meets code that knows no Ray: plain classes first, the handles that start them last.
torch is imported inside, when an actor starts, so that importing this module stays cheap for the
processes that only hold handles. Errors are those of `ledger.errors`; `ray_errors.designed` gives
them back to callers.

Cores: the trainer holds one of Ray's CPUs. Serving and attribution hold none: they must always
find a place, on a laptop with two cores too; their torch threads are set by hand.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import structlog

from ledger.errors import ComputeError, InvalidEvent, LedgerError, NotFound, StorageError
from ledger.ports import ChatDelta, ChatRequest
from workers.artefacts import ArtefactCache
from workers.attribute import Attributed
from workers.link import WorkerSpec, plain_uuid
from workers.ray_cluster import NAMESPACE

log = structlog.get_logger(__name__)

SERVING_NAME = "openlora"
MAX_STREAMS = 1_000
MAX_PREFETCH = 32
"""Newly published adapters that one refresh loads ahead of their first request."""
COALESCE_S = 0.02
"""With several streams, tokens of one answer travel together for this long: Ray takes about
0.3 ms an item on each side, which 32 streams of single tokens would not leave for the model."""
CALM_STREAMS = 2
TRAINER_RESTARTS = 5
"""Deaths of a trainer's process that one attempt survives."""


# --- training ------------------------------------------------------------------------------------


class TrainerActor:
    """Runs one training run. Restarted by Ray when its process dies; the driver then calls again,
    and training goes on at the last snapshot."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    def execute(self, run: dict[str, Any]) -> Any:
        """`runs.Outcome` of the run."""
        from workers.runs import execute

        return execute(self._spec, run, self._spec.client())


# --- serving -------------------------------------------------------------------------------------


class OpenLoRAActor:
    """OpenLoRA behind asyncio. Adapters resolve through the ledger only, from id to blobs."""

    def __init__(self, spec: WorkerSpec, threads: int) -> None:
        import torch

        from workers import base_model
        from workers.openlora.driver import AsyncEngine
        from workers.openlora.engine import Engine, EngineConfig

        torch.set_num_threads(threads)
        path = spec.base_path()
        self._digest = base_model.digest(path)
        model, tokenizer = base_model.load(path)
        # The trainer names its base by hash: an adapter of another base is refused at loading.
        config = EngineConfig(base_names=frozenset({f"sha256:{self._digest}"}))
        self._tokenizer = tokenizer
        self._serving = AsyncEngine(Engine(model, tokenizer, config))
        self._serving.start()
        self._client = spec.client()
        self._cache = ArtefactCache(self._client, spec.home / "cache")
        self._loaded: dict[str, Path] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        self._streams = 0

    async def ready(self) -> str:
        """The base model's digest, once the model is loaded."""
        return self._digest

    async def count_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        from workers.openlora.chat import encode_chat

        return len(encode_chat(self._tokenizer, messages))

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta]:
        """The answer in pieces. `completion_tokens` counts up; the last has `finish_reason`."""
        from workers.openlora.chat import encode_chat
        from workers.openlora.engine import GenerationRequest

        if request.adapter is not None:
            await self._load(request.adapter)
        generation = GenerationRequest(
            request_id=request.request_id,
            adapter_id=request.adapter,
            prompt_ids=encode_chat(self._tokenizer, request.messages),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=tuple(request.stop),
        )
        self._streams += 1
        try:
            # On leaving, however it happens, the engine's generator is closed: that cancels.
            async with contextlib.aclosing(self._generate(generation)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self._streams -= 1

    async def _generate(self, generation: Any) -> AsyncGenerator[ChatDelta]:
        from workers.openlora.chat import openai_finish_reason

        clock = asyncio.get_running_loop().time
        tokens, text, last = 0, "", 0.0
        async with contextlib.aclosing(self._serving.generate(generation)) as deltas:
            async for delta in deltas:
                tokens += len(delta.token_ids)
                text += delta.text
                if delta.finish is not None:
                    yield ChatDelta(
                        text=text,
                        finish_reason=openai_finish_reason(delta.finish.reason),
                        prompt_tokens=delta.finish.prompt_tokens,
                        completion_tokens=delta.finish.completion_tokens,
                    )
                elif text and (self._streams <= CALM_STREAMS or clock() - last >= COALESCE_S):
                    yield ChatDelta(
                        text=text,
                        prompt_tokens=len(generation.prompt_ids),
                        completion_tokens=tokens,
                    )
                    text, last = "", clock()

    async def cancel(self, request_id: str) -> bool:
        return self._serving.cancel(request_id)

    async def stats(self) -> dict[str, Any]:
        return {**self._serving.stats(), "base_model": self._digest, "streams": self._streams}

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
        fresh = [str(row["adapter"]) for row in published if row["adapter"] not in self._loaded]
        for adapter in fresh[:MAX_PREFETCH]:
            try:
                await self._load(adapter)
            except LedgerError as error:
                log.warning("adapter not loaded", adapter=adapter, reason=error.message)
        return len(self._loaded)

    async def _load(self, adapter: str) -> None:
        if adapter in self._loaded:
            return
        lock = self._loading.setdefault(plain_uuid(adapter), asyncio.Lock())
        async with lock:
            if adapter not in self._loaded:
                folder, row, run = await asyncio.to_thread(self._resolve, adapter)
                try:
                    await self._publish(adapter, folder, row, run)
                except StorageError as error:  # a damaged copy on this disk: once more, afresh
                    log.warning("adapter copy damaged", adapter=adapter, reason=error.message)
                    self._cache.drop(folder)
                    folder, row, run = await asyncio.to_thread(self._resolve, adapter)
                    await self._publish(adapter, folder, row, run)
                self._loaded[adapter] = folder
                log.info("adapter loaded", adapter=adapter, model=row["model"])
        self._loading.pop(adapter, None)

    async def _publish(
        self, adapter: str, folder: Path, row: Mapping[str, Any], run: Mapping[str, Any]
    ) -> None:
        await self._serving.load_adapter(
            adapter, folder, row["adapter_sha256"], config_sha256=run["adapter_config_sha256"]
        )

    def _resolve(self, adapter: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
        row = self._client.get(f"/v1/adapters/{adapter}")
        if row["status"] != "published":
            raise NotFound(f"adapter {adapter} is {row['status']}; list the published ones")
        if row["base_model"] != self._digest:
            raise InvalidEvent(
                f"adapter {adapter} is for base model {row['base_model']}; served is {self._digest}"
            )
        run = self._client.get(f"/v1/runs/{row['run']}")
        folder = self._cache.adapter(row["adapter_sha256"], run["adapter_config_sha256"])
        return folder, row, run

    def _unload(self, adapter: str) -> None:
        self._loaded.pop(adapter, None)
        with contextlib.suppress(NotFound):
            self._serving.retire(adapter)


# --- attribution ---------------------------------------------------------------------------------


class AttributionActor:
    """Whose rows shaped some answers: `influence.Influence` in a process of its own."""

    def __init__(self, spec: WorkerSpec, threads: int) -> None:
        from workers.influence import Influence

        self._influence = Influence(spec.client(), spec.home, spec.base_path(), threads)

    def attribute(self, inferences: list[dict[str, Any]]) -> list[Attributed | LedgerError]:
        """As `Influence.attribute`; errors of single answers come as the API's clients know them,
        since what crosses processes must be read on the other side."""
        from workers.ray_errors import designed

        return [
            designed(found) if isinstance(found, LedgerError) else found
            for found in self._influence.attribute(inferences)
        ]


# --- handles -------------------------------------------------------------------------------------


def trainer_actor(spec: WorkerSpec, name: str) -> Any:
    """A trainer that ends with its driver. `name` shows in the dashboard and in `ps`."""
    # No task retries: a call that died is for the driver to repeat, which counts and logs it.
    return _start(
        TrainerActor, spec, num_cpus=1, max_restarts=TRAINER_RESTARTS, max_task_retries=0, name=name
    )


def serving_actor(spec: WorkerSpec, threads: int = 1) -> Any:
    """The one OpenLoRA actor of the cluster, started if need be. It outlives its starter."""
    return _start(
        OpenLoRAActor,
        spec,
        threads,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=MAX_STREAMS,
        name=SERVING_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
    )


def attribution_actor(spec: WorkerSpec, threads: int = 1) -> Any:
    """An attribution actor that ends with its starter."""
    return _start(AttributionActor, spec, threads, num_cpus=0, max_restarts=-1, max_task_retries=0)


def find_serving_actor() -> Any:
    """Raises ComputeError while no worker service has started one."""
    try:
        return ray.get_actor(SERVING_NAME, namespace=NAMESPACE)
    except ValueError as error:
        raise ComputeError("no OpenLoRA actor runs in this Ray yet; retry in a moment") from error


def _start(cls: type, *arguments: object, **options: object) -> Any:
    remote: Any = ray.remote(cls)
    return remote.options(**options).remote(*arguments)
